/* SPDX-License-Identifier: Apache-2.0 */
#include "scripted_qemu.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n"

/* A QEMU that can be moved: 64 MiB of RAM, half a MiB of firmware. */
static const struct scripted_answer good[] = {
    {"query-migrate-capabilities",
     "{\"return\": [{\"capability\": \"x-ignore-shared\", \"state\": false}, {\"capability\": "
     "\"multifd\", \"state\": true}, {\"capability\": \"validate-uuid\", \"state\": true}, "
     "{\"capability\": \"events\", \"state\": false}]}\n"},
    {"query-memory-size-summary", "{\"return\": {\"base-memory\": 67108864}}\n"},
    {"query-memdev",
     "{\"return\": [{\"id\": \"memd.ram\", \"size\": 67108864, \"share\": true}]}\n"},
    {"qom-list", "{\"return\": [{\"name\": \"net0\", \"type\": \"child<virtio-net-pci>\"}]}\n"},
    {"human-monitor-command", "{\"return\": \"net0: index=0,type=user\\r\\n\"}\n"},
    {"query-migrate", "{\"return\": {\"status\": \"completed\", \"ram\": {\"total\": 524288}}}\n"},
    {"migrate", DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\n"},
    {"migrate-incoming", DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"setup\"}}\n"},
};

#define COMPLETED "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n"

struct scripted_qemu scripted_qemu;
#define qemu scripted_qemu

/* ---- the scripted QEMU ---- */

static const char *look_up(const struct scripted_answer *answers, size_t count, const char *command)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(answers[i].command, command) == 0)
            return answers[i].text;
    return NULL;
}

static void remember(const char *command, const json_t *arguments)
{
    char *text = json_dumps(arguments, JSON_COMPACT | JSON_ENCODE_ANY);

    snprintf(qemu.commands[qemu.asked], sizeof(qemu.commands[0]), "%s", command);
    snprintf(qemu.arguments[qemu.asked], sizeof(qemu.arguments[0]), "%s", text ? text : "");
    free(text);
    qemu.asked++;
}

static bool say(int fd, const char *text)
{
    return send(fd, text, strlen(text), MSG_NOSIGNAL) > 0;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

/* The guest stands still, and its devices are saved. */
static bool end_saving(int fd)
{
    struct timespec now;
    char text[160];

    qemu.stopped_after_ns = now_ns();
    clock_gettime(CLOCK_REALTIME, &now);
    qemu.stopped_before_ns = now_ns();
    snprintf(text, sizeof(text),
             "{\"event\": \"STOP\", \"timestamp\": {\"seconds\": %lld, \"microseconds\": %ld}}\n"
             "%s",
             (long long)now.tv_sec, now.tv_nsec / 1000, COMPLETED);
    qemu.status = "postmigrate";
    return say(fd, text);
}

/* Once it has read what there is to load. */
static bool end_loading(int fd)
{
    ssize_t got = recv(qemu.given, qemu.loaded, 5, MSG_WAITALL);

    if (got != 5)
        return true;
    qemu.status = "paused";
    return say(fd, COMPLETED);
}

/* False: the connection ends. */
static bool answer(int fd, const char *line)
{
    json_t *request = json_loads(line, 0, NULL);
    const char *command = json_string_value(json_object_get(request, "execute"));
    const char *text = look_up(qemu.odd, qemu.odd_count, command);
    bool odd, saves = strcmp(command, "migrate") == 0,
              loads = strcmp(command, "migrate-incoming") == 0;
    char status[80];

    remember(command, json_object_get(request, "arguments"));
    if (!text && strcmp(command, "query-status") == 0) {
        snprintf(status, sizeof(status), "{\"return\": {\"status\": \"%s\"}}\n", qemu.status);
        text = status;
    }
    odd = text != NULL;
    if (!text)
        text = look_up(good, sizeof(good) / sizeof(good[0]), command);
    if (strcmp(command, "cont") == 0)
        qemu.status = "running";
    if (saves && qemu.given >= 0 && !qemu.writes_nothing)
        cr_assert(write(qemu.given, "state", 5) == 5);
    if (qemu.until && strcmp(command, qemu.until) == 0)
        qemu.odd_count = 0;
    json_decref(request);
    if (!text)
        text = DONE;
    if (strcmp(text, CLOSE) == 0 || !say(fd, text))
        return false;
    return odd || (saves ? end_saving(fd) : loads ? end_loading(fd) : true);
}

static ssize_t receive_byte(int fd, char *byte)
{
    char room[CMSG_SPACE(sizeof(int))];
    struct iovec piece = {byte, 1};
    struct msghdr message = {
        .msg_iov = &piece, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room)};
    ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    const struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;

    if (header)
        memcpy(&qemu.given, CMSG_DATA(header), sizeof(int));
    return got;
}

static void serve_one(int fd)
{
    char line[4096];
    size_t filled = 0;

    send(fd, GREETING, strlen(GREETING), MSG_NOSIGNAL);
    while (filled < sizeof(line) - 1 && receive_byte(fd, line + filled) == 1) {
        if (line[filled++] != '\n')
            continue;
        line[filled] = '\0';
        filled = 0;
        if (!answer(fd, line))
            break;
    }
    close(fd);
}

static void *serve(void *unused)
{
    int fd;

    while ((fd = accept(qemu.listener, NULL, NULL)) >= 0)
        serve_one(fd);
    return unused;
}

void scripted_qemu_start(const char *status, const struct scripted_answer *odd, size_t odd_count)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    memset(&qemu, 0, sizeof(qemu));
    snprintf(qemu.path, sizeof(qemu.path), "/tmp/unit_migrate.%d", getpid());
    strcpy(address.sun_path, qemu.path);
    unlink(qemu.path);
    qemu.odd = odd;
    qemu.odd_count = odd_count;
    qemu.status = status;
    qemu.given = -1;
    qemu.listener = socket(AF_UNIX, SOCK_STREAM, 0);
    cr_assert(bind(qemu.listener, (struct sockaddr *)&address, sizeof(address)) == 0);
    cr_assert(listen(qemu.listener, 4) == 0);
    pthread_create(&qemu.thread, NULL, serve, NULL);
}

void scripted_qemu_stop(void)
{
    shutdown(qemu.listener, SHUT_RDWR);
    pthread_join(qemu.thread, NULL);
    close(qemu.listener);
    unlink(qemu.path);
}

const char *scripted_qemu_asked(const char *command, size_t number)
{
    for (size_t i = 0; i < qemu.asked; i++)
        if (strcmp(qemu.commands[i], command) == 0 && number-- == 0)
            return qemu.arguments[i];
    return "";
}

bool scripted_qemu_was_asked(const char *command)
{
    for (size_t i = 0; i < qemu.asked; i++)
        if (strcmp(qemu.commands[i], command) == 0)
            return true;
    return false;
}
