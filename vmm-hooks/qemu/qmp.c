/* SPDX-License-Identifier: Apache-2.0 */
#include "qmp.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

struct qmp {
    int fd;
    bool dead;
    json_int_t last_id; /* of the latest command: an answer to another one has come too late */
    json_t *events;     /* an array */
    size_t filled;      /* bytes in line */
    char error[256];
    char line[QMP_LINE_BYTES];
};

static int64_t now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Waits until the socket is ready for `events`. Once the deadline has passed it is too late, ready
 * or not: who talks without end would be listened to without end. */
static int wait_for(const struct qmp *qmp, short events, int64_t deadline_ms)
{
    struct pollfd poller = {.fd = qmp->fd, .events = events};
    int64_t left;
    int ready;

    do {
        left = deadline_ms - now_ms();
        if (left <= 0)
            return -ETIMEDOUT;
        ready = poll(&poller, 1, (int)left);
    } while (ready < 0 && errno == EINTR);
    if (ready < 0)
        return -errno;
    return ready ? 0 : -ETIMEDOUT;
}

/* One send(), with a copy of `fd` on its first byte unless that is -1. Bytes sent or -errno. */
static ssize_t send_some(const struct qmp *qmp, const char *text, size_t bytes, int fd)
{
    union {
        char room[CMSG_SPACE(sizeof(int))];
        struct cmsghdr header;
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)),
                            .cmsg_level = SOL_SOCKET,
                            .cmsg_type = SCM_RIGHTS}};
    struct iovec piece = {.iov_base = (char *)text, .iov_len = bytes};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    ssize_t sent;

    if (fd >= 0) {
        memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
        message.msg_control = &control;
        message.msg_controllen = sizeof(control.room);
    }
    sent = sendmsg(qmp->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    return sent < 0 ? -errno : sent;
}

static int send_text(struct qmp *qmp, const char *text, int fd, int64_t deadline_ms)
{
    size_t left = strlen(text);

    while (left) {
        int error = wait_for(qmp, POLLOUT, deadline_ms);
        ssize_t sent;

        if (error < 0)
            return error;
        sent = send_some(qmp, text, left, fd);
        if (sent < 0 && sent != -EAGAIN && sent != -EINTR)
            return (int)sent;
        if (sent > 0) {
            fd = -1;
            text += sent;
            left -= (size_t)sent;
        }
    }
    return 0;
}

/* Takes one line out of the buffer as JSON; NULL when there is no whole line, or it is no JSON. */
static json_t *take_line(struct qmp *qmp, bool *ret_was_line)
{
    char *end = memchr(qmp->line, '\n', qmp->filled);
    json_t *object;
    size_t bytes;

    *ret_was_line = end != NULL;
    if (!end)
        return NULL;
    bytes = (size_t)(end - qmp->line) + 1;
    object = json_loadb(qmp->line, bytes, 0, NULL);
    qmp->filled -= bytes;
    memmove(qmp->line, end + 1, qmp->filled);
    return object;
}

/* The next JSON object from QEMU, whatever it is. */
static int receive(struct qmp *qmp, int64_t deadline_ms, json_t **ret_object)
{
    for (;;) {
        bool was_line;
        json_t *object = take_line(qmp, &was_line);
        ssize_t got;
        int error;

        if (object) {
            *ret_object = object;
            return 0;
        }
        if (was_line || qmp->filled == sizeof(qmp->line))
            return -EPROTO;
        error = wait_for(qmp, POLLIN, deadline_ms);
        if (error < 0)
            return error;
        got = recv(qmp->fd, qmp->line + qmp->filled, sizeof(qmp->line) - qmp->filled, MSG_DONTWAIT);
        if (got == 0)
            return -ECONNRESET;
        if (got < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        if (got > 0)
            qmp->filled += (size_t)got;
    }
}

static void keep_error(struct qmp *qmp, json_t *error)
{
    const char *text = json_string_value(json_object_get(error, "desc"));

    snprintf(qmp->error, sizeof(qmp->error), "%s", text ? text : "an error without a description");
}

static void keep_event(struct qmp *qmp, json_t *object)
{
    if (!json_object_get(object, "event"))
        return;
    json_array_append(qmp->events, object);
    if (json_array_size(qmp->events) > QMP_EVENTS_MAX)
        json_array_remove(qmp->events, 0);
}

/* Is it the answer to a command whose time was over? */
static bool is_late(const struct qmp *qmp, const json_t *object)
{
    const json_t *id = json_object_get(object, "id");

    return id && json_integer_value(id) != qmp->last_id;
}

/* Waits for the answer to the command that was sent. */
static int receive_answer(struct qmp *qmp, int64_t deadline_ms, json_t **ret_result)
{
    for (;;) {
        json_t *object = NULL, *result, *error_object;
        int error = receive(qmp, deadline_ms, &object);

        if (error < 0)
            return error;
        result = is_late(qmp, object) ? NULL : json_object_get(object, "return");
        error_object = is_late(qmp, object) ? NULL : json_object_get(object, "error");
        if (result)
            *ret_result = json_incref(result);
        else if (error_object)
            keep_error(qmp, error_object);
        else
            keep_event(qmp, object);
        json_decref(object);
        if (result || error_object)
            return result ? 0 : -EREMOTEIO;
    }
}

static int execute(struct qmp *qmp, const char *command, json_t *arguments, int fd,
                   int64_t deadline_ms, json_t **ret_result)
{
    json_t *request = json_pack("{s:s, s:O*, s:I}", "execute", command, "arguments", arguments,
                                "id", ++qmp->last_id);
    char *text = request ? json_dumps(request, JSON_COMPACT) : NULL;
    int error = text ? send_text(qmp, text, fd, deadline_ms) : -ENOMEM;

    if (error == 0)
        error = send_text(qmp, "\n", -1, deadline_ms);
    if (error == -ETIMEDOUT)
        error = -EPIPE; /* a part of it may be on its way: nothing can follow that */
    if (error == 0)
        error = receive_answer(qmp, deadline_ms, ret_result);
    free(text);
    json_decref(request);
    return error;
}

int qmp_execute_with_fd(struct qmp *qmp, const char *command, json_t *arguments, int fd,
                        int timeout_ms, json_t **ret_result)
{
    int error;

    if (qmp->dead)
        return -ENOTCONN;
    qmp->error[0] = '\0';
    error = execute(qmp, command, arguments, fd, now_ms() + timeout_ms, ret_result);
    qmp->dead = error < 0 && error != -EREMOTEIO && error != -ETIMEDOUT;
    return error;
}

int qmp_execute(struct qmp *qmp, const char *command, json_t *arguments, int timeout_ms,
                json_t **ret_result)
{
    return qmp_execute_with_fd(qmp, command, arguments, -1, timeout_ms, ret_result);
}

/* ---- events ---- */

int qmp_wait_event(struct qmp *qmp, int timeout_ms, json_t **ret_event)
{
    int64_t deadline_ms = now_ms() + timeout_ms;

    if (qmp->dead)
        return -ENOTCONN;
    while (json_array_size(qmp->events) == 0) {
        json_t *object = NULL;
        int error = receive(qmp, deadline_ms, &object);

        if (error < 0) {
            qmp->dead = error != -ETIMEDOUT;
            return error;
        }
        keep_event(qmp, object);
        json_decref(object);
    }
    *ret_event = json_incref(json_array_get(qmp->events, 0));
    json_array_remove(qmp->events, 0);
    return 0;
}

void qmp_forget_events(struct qmp *qmp)
{
    json_array_clear(qmp->events);
}

/* ---- connecting ---- */

/* Reads the greeting and ends the negotiation. */
static int greet(struct qmp *qmp, int64_t deadline_ms)
{
    json_t *greeting = NULL, *result = NULL;
    int error = receive(qmp, deadline_ms, &greeting);

    if (error < 0)
        return error;
    error = json_object_get(greeting, "QMP") ? 0 : -EPROTO;
    json_decref(greeting);
    if (error == 0)
        error = execute(qmp, "qmp_capabilities", NULL, -1, deadline_ms, &result);
    if (error == 0)
        json_decref(result);
    return error;
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd, error;

    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    memcpy(address.sun_path, path, strlen(path));
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    /* Not blocking: with a full backlog this says EAGAIN instead of waiting without end. */
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        error = -errno;
        close(fd);
        return error;
    }
    return fd;
}

int qmp_open_fd(int fd, int timeout_ms, struct qmp **ret_qmp)
{
    struct qmp *qmp = calloc(1, sizeof(*qmp));
    int error = -ENOMEM;

    if (!qmp)
        goto close_fd;
    qmp->fd = fd;
    qmp->events = json_array();
    error = qmp->events ? greet(qmp, now_ms() + timeout_ms) : -ENOMEM;
    if (error < 0)
        goto free_qmp;
    *ret_qmp = qmp;
    return 0;

free_qmp:
    json_decref(qmp->events);
    free(qmp);
close_fd:
    close(fd);
    return error;
}

int qmp_open(const char *path, int timeout_ms, struct qmp **ret_qmp)
{
    int fd = connect_to(path);

    return fd < 0 ? fd : qmp_open_fd(fd, timeout_ms, ret_qmp);
}

const char *qmp_error(const struct qmp *qmp)
{
    return qmp->error;
}

void qmp_close(struct qmp *qmp)
{
    if (!qmp)
        return;
    close(qmp->fd);
    json_decref(qmp->events);
    free(qmp);
}
