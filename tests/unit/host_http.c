/* SPDX-License-Identifier: Apache-2.0 */
#include "host_http.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

int http_connect(const struct world *world)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s/memd.sock", world->dir);
    cr_assert_eq(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0, "%s",
                 strerror(errno));
    return fd;
}

/* The kernel states who connected as of connect(). */
int http_connect_as(const struct world *world, uid_t uid)
{
    int fd;

    cr_assert_eq(chmod(world->dir, 0711), 0);
    cr_assert_eq(setegid(uid) | seteuid(uid), 0);
    fd = http_connect(world);
    cr_assert_eq(seteuid(0) | setegid(0), 0);
    return fd;
}

bool http_send(struct world *world, int fd, const char *text, size_t bytes)
{
    for (int tries = 0; bytes && tries < 20000; tries++) {
        ssize_t sent = send(fd, text, bytes, MSG_NOSIGNAL);

        if (sent < 0 && errno != EAGAIN)
            return false;
        if (sent > 0) {
            text += sent;
            bytes -= (size_t)sent;
        }
        world_turn(world);
    }
    return bytes == 0;
}

size_t http_read_all(struct world *world, struct fake *fakes, size_t count, int fd, char *into,
                     size_t bytes)
{
    size_t used = 0;

    for (int i = 0; i < 20000 && used < bytes - 1; i++) {
        ssize_t got = read(fd, into + used, bytes - 1 - used);

        if (got == 0 || (got < 0 && errno != EAGAIN))
            break;
        if (got > 0)
            used += (size_t)got;
        fakes_turn(world, fakes, count);
    }
    close(fd);
    into[used] = '\0';
    return used;
}

static json_t *talk(struct world *world, struct fake *fakes, size_t count, int fd,
                    const char *method, const char *path, const char *body, int *ret_status)
{
    static char text[1 << 20];
    const char *start;

    snprintf(text, sizeof(text),
             "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s",
             method, path, strlen(body), body);
    (void)http_send(world, fd, text, strlen(text));
    http_read_all(world, fakes, count, fd, text, sizeof(text));
    *ret_status = 0;
    if (sscanf(text, "HTTP/1.1 %d", ret_status) != 1)
        return NULL;
    start = strstr(text, "\r\n\r\n");
    return start ? json_loads(start + 4, 0, NULL) : NULL;
}

json_t *http_ask(struct world *world, struct fake *fakes, size_t count, const char *method,
                 const char *path, const char *body, int *ret_status)
{
    return talk(world, fakes, count, http_connect(world), method, path, body, ret_status);
}

int http_status(struct world *world, const char *method, const char *path, const char *body)
{
    int status;

    json_decref(http_ask(world, NULL, 0, method, path, body, &status));
    return status;
}

int http_status_as(struct world *world, uid_t uid, const char *method, const char *path,
                   const char *body)
{
    int status;

    json_decref(talk(world, NULL, 0, http_connect_as(world, uid), method, path, body, &status));
    return status;
}
