/* SPDX-License-Identifier: Apache-2.0 */
/* The control socket and the metrics listener: who may, what is too much, and streams. */
#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <errno.h>
#include <jemalloc/jemalloc.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "host_http.h"

#define STRANGER 4711U

static size_t allocated_bytes(void)
{
    uint64_t epoch = 1;
    size_t bytes = 0, size = sizeof(epoch);

    (void)mallctl("epoch", &epoch, &size, &epoch, size);
    size = sizeof(bytes);
    (void)mallctl("stats.allocated", &bytes, &size, NULL, 0);
    return bytes;
}

static struct guest *register_as(struct world *world, const char *name, uid_t uid)
{
    struct guest *guest = world_register(world, name, NULL);

    guest->uid = uid;
    return guest;
}

static const char *body_of_a_guest(const char *name)
{
    static char body[128];

    snprintf(body, sizeof(body), "{\"name\":\"%s\",\"pid\":%d,\"max_bytes\":4096}", name,
             (int)getpid());
    return body;
}

/* ---- who may ---- */

static const struct {
    const char *method, *path;
} all_routes[] = {
    {"GET", "/v1/status"},
    {"GET", "/v1/guests/theirs"},
    {"POST", "/v1/guests"},
    {"PATCH", "/v1/guests/theirs"},
    {"DELETE", "/v1/guests/theirs"},
    {"GET", "/v1/events"},
    {"GET", "/metrics"},
};

Test(host_control, a_foreign_user_may_nothing)
{
    struct world world;

    if (geteuid() != 0)
        cr_skip_test("only root can become somebody else");
    world_start(&world, "");
    register_as(&world, "theirs", 0);
    for (size_t i = 0; i < sizeof(all_routes) / sizeof(all_routes[0]); i++)
        cr_assert_eq(http_status_as(&world, STRANGER, all_routes[i].method, all_routes[i].path,
                                    body_of_a_guest("mine")),
                     403, "%s %s", all_routes[i].method, all_routes[i].path);
    cr_assert_null(registry_find(&world.daemon, "mine"));
    cr_assert_not_null(registry_find(&world.daemon, "theirs"));
    cr_assert_eq(http_status_as(&world, STRANGER, "GET", "/v1/guests/none", ""), 403,
                 "a stranger does not learn which names there are");
    world_stop(&world);
}

Test(host_control, a_vmms_user_reads_its_own_guest_and_no_more)
{
    struct world world;

    if (geteuid() != 0)
        cr_skip_test("only root can become somebody else");
    world_start(&world, "");
    register_as(&world, "own", STRANGER);
    register_as(&world, "theirs", STRANGER + 1);
    cr_assert_eq(http_status_as(&world, STRANGER, "GET", "/v1/guests/own", ""), 200);
    cr_assert_eq(http_status_as(&world, STRANGER, "GET", "/v1/guests/theirs", ""), 403);
    cr_assert_eq(http_status_as(&world, STRANGER, "PATCH", "/v1/guests/own", "{\"shares\":2}"),
                 403);
    cr_assert_eq(http_status_as(&world, STRANGER, "DELETE", "/v1/guests/own", ""), 403);
    cr_assert_eq(http_status_as(&world, STRANGER, "GET", "/v1/status", ""), 403);
    cr_assert_not_null(registry_find(&world.daemon, "own"));
    world_stop(&world);
}

/* ---- what is too much, and what is nonsense ---- */

#define HUGE_BODY (4U << 20)

static int answer_to(struct world *world, const char *head, size_t body_bytes)
{
    static char text[1 << 16];
    static char blanks[HUGE_BODY];
    int fd = http_connect(world), status = 0;

    memset(blanks, ' ', sizeof(blanks));
    if (http_send(world, fd, head, strlen(head)))
        (void)http_send(world, fd, blanks, body_bytes);
    http_read_all(world, NULL, 0, fd, text, sizeof(text));
    (void)sscanf(text, "HTTP/1.1 %d", &status);
    return status;
}

Test(host_control, a_body_that_is_too_large_is_refused_before_it_is_read)
{
    struct world world;
    size_t before;

    world_start(&world, "");
    cr_assert_eq(answer_to(&world,
                           "POST /v1/guests HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n\r\n",
                           0),
                 413);
    before = allocated_bytes();
    for (int i = 0; i < 20; i++)
        (void)answer_to(&world,
                        "POST /v1/guests HTTP/1.1\r\nHost: x\r\nContent-Length: 4194304\r\n\r\n",
                        HUGE_BODY);
    cr_assert_lt(allocated_bytes(), before + (256U << 10), "bodies were kept");
    cr_assert_eq(http_status(&world, "GET", "/v1/status", ""), 200);
    world_stop(&world);
}

Test(host_control, a_body_of_unknown_length_is_cut)
{
    struct world world;
    size_t before;

    world_start(&world, "");
    (void)http_status(&world, "GET", "/v1/status", "");
    before = allocated_bytes();
    /* One chunk of 4 MiB, of which no more than the limit is taken. */
    cr_assert_eq(answer_to(&world,
                           "POST /v1/guests HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
                           "chunked\r\n\r\n400000\r\n",
                           HUGE_BODY),
                 0);
    cr_assert_lt(allocated_bytes(), before + (256U << 10), "the body was kept");
    cr_assert_eq(http_status(&world, "GET", "/v1/status", ""), 200);
    world_stop(&world);
}

Test(host_control, nonsense_is_answered_or_cut_and_nothing_else)
{
    static const char *const nonsense[] = {
        "\r\n\r\n\r\n\r\n",
        "GET\r\n\r\n",
        "\x16\x03\x01\x02\x01\x01\x01\xfc\x03\x03\r\n\r\n",
        "GET /v1/status HTTP/9.9\r\n\r\n",
        "GET /v1/status HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "GET /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "POST /v1/guests HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "GET /v1/guests/%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /v1/guests/../status HTTP/1.1\r\nHost: x\r\n\r\n",
        ": : :\r\n: :\r\n\r\n",
    };
    static char text[1 << 16];
    struct world world;

    world_start(&world, "");
    for (size_t i = 0; i < sizeof(nonsense) / sizeof(nonsense[0]); i++) {
        int fd = http_connect(&world), status = 400;

        (void)http_send(&world, fd, nonsense[i], strlen(nonsense[i]));
        shutdown(fd, SHUT_WR);
        http_read_all(&world, NULL, 0, fd, text, sizeof(text));
        (void)sscanf(text, "HTTP/1.%*d %d", &status);
        cr_assert(status >= 400 && status < 600, "%zu: %d", i, status);
        cr_assert_eq(http_status(&world, "GET", "/v1/status", ""), 200, "%zu", i);
    }
    world_stop(&world);
}

Test(host_control, json_that_is_no_registration_registers_nobody)
{
    static const char *const bodies[] = {
        "",
        "null",
        "[]",
        "{\"name\":\"a\",\"name\":\"b\",\"pid\":1,\"max_bytes\":4096}",
        "{\"name\":\"a\\u0000b\",\"pid\":1,\"max_bytes\":4096}",
        "{\"name\":\"a\xff\",\"pid\":1,\"max_bytes\":4096}",
        "{\"name\":\"a\",\"pid\":1e9,\"max_bytes\":4096}",
        "{\"name\":\"a\",\"pid\":-1,\"max_bytes\":4096}",
        "{\"name\":\"a\",\"pid\":99999999999999999999,\"max_bytes\":4096}",
        "{\"name\":\"a\",\"pid\":1,\"max_bytes\":0}",
        "{\"name\":\"a\",\"pid\":1,\"max_bytes\":\"-1\"}",
        "{\"name\":\"a\",\"pid\":1,\"max_bytes\":\"99999999999999999999G\"}",
        "{\"name\":[\"a\"],\"pid\":1,\"max_bytes\":4096}",
        "{\"name\":\"a\",\"pid\":1,\"max_bytes\":4096}}",
        "{\"name\":\"a\",\"pid\":1,\"max_bytes\":4096,\"engine\":\"xen\"}",
    };
    struct world world;

    world_start(&world, "");
    for (size_t i = 0; i < sizeof(bodies) / sizeof(bodies[0]); i++)
        cr_assert_eq(http_status(&world, "POST", "/v1/guests", bodies[i]), 400, "%s", bodies[i]);
    cr_assert_eq(world.daemon.registry.count, 0);
    world_stop(&world);
}

/* ---- GET /v1/events ---- */

struct listener {
    int fd;
    char text[1 << 19];
    size_t used;
    bool ended;
};

static void listen_to_events(struct world *world, struct listener *listener)
{
    static const char request[] = "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n";

    memset(listener, 0, sizeof(*listener));
    listener->fd = http_connect(world);
    cr_assert(http_send(world, listener->fd, request, strlen(request)));
    UNTIL(world, NULL, 0, world->daemon.events.first != NULL);
}

static bool has_heard(struct listener *listener, const char *word)
{
    ssize_t got = read(listener->fd, listener->text + listener->used,
                       sizeof(listener->text) - 1 - listener->used);

    listener->ended |= got == 0;
    if (got > 0)
        listener->used += (size_t)got;
    listener->text[listener->used] = '\0';
    return strstr(listener->text, word) != NULL;
}

/* The chunks' sizes taken out: what an HTTP library would hand on. */
static json_t *next_event(const char **text)
{
    char *end;
    size_t length = strtoul(*text, &end, 16);
    json_t *event;

    cr_assert_eq(strncmp(end, "\r\n", 2), 0, "a chunk begins with its size: %.20s", *text);
    event = json_loadb(end + 2, length, 0, NULL);
    *text = end + 2 + length + 2;
    return event;
}

Test(host_control, events_come_one_by_one_as_chunks)
{
    static struct listener listener;
    struct world world;
    const char *at;

    world_start(&world, "");
    listen_to_events(&world, &listener);
    for (int i = 0; i < 5; i++) {
        char name[16];

        snprintf(name, sizeof(name), "event_%d", i);
        events_emit(&world.daemon.events, name, "g", json_pack("{s:i}", "number", i));
        UNTIL(&world, NULL, 0, has_heard(&listener, name));
    }
    cr_assert_not_null(strstr(listener.text, "Transfer-Encoding: chunked"));
    cr_assert_not_null(strstr(listener.text, "application/x-ndjson"));
    at = strstr(listener.text, "\r\n\r\n") + 4;
    for (int i = 0; i < 5; i++) {
        json_t *event = next_event(&at);

        cr_assert_eq(json_integer_value(json_object_get(event, "number")), i);
        cr_assert(json_is_real(json_object_get(event, "time")));
        json_decref(event);
    }
    close(listener.fd);
    UNTIL(&world, NULL, 0, world.daemon.events.first == NULL);
    events_emit(&world.daemon.events, "nobody_hears_this", NULL, NULL);
    cr_assert_eq(http_status(&world, "GET", "/v1/status", ""), 200);
    world_stop(&world);
}

Test(host_control, a_listener_that_reads_nothing_costs_its_buffer_and_no_more)
{
    static struct listener deaf;
    struct world world;
    size_t before;

    world_start(&world, "");
    listen_to_events(&world, &deaf);
    (void)http_status(&world, "GET", "/v1/status", "");
    before = allocated_bytes();
    for (int i = 0; i < 20000; i++) {
        events_emit(&world.daemon.events, "noise", "a-guest-with-a-name", NULL);
        if (i % 100 == 0)
            world_turn(&world);
    }
    cr_assert_gt(world.daemon.events.first->lost, 0);
    cr_assert_leq(world.daemon.events.first->used, EVENTS_BUFFER_BYTES);
    cr_assert_lt(allocated_bytes(), before + EVENTS_BUFFER_BYTES, "events pile up");
    cr_assert_eq(http_status(&world, "GET", "/v1/status", ""), 200, "others are served");
    /* It reads after all. */
    UNTIL(&world, NULL, 0, !has_heard(&deaf, "noise") || deaf.used > EVENTS_BUFFER_BYTES / 2);
    deaf.used = 0;
    UNTIL(&world, NULL, 0, !has_heard(&deaf, "nothing") && world.daemon.events.first->used == 0);
    deaf.used = 0;
    events_emit(&world.daemon.events, "afterwards", NULL, NULL);
    UNTIL(&world, NULL, 0, has_heard(&deaf, "afterwards"));
    cr_assert_not_null(strstr(deaf.text, "events_lost"));
    close(deaf.fd);
    world_stop(&world);
}

Test(host_control, listeners_that_leave_in_the_middle_harm_nobody)
{
    static struct listener leaves, stays;
    struct world world;

    world_start(&world, "");
    listen_to_events(&world, &stays);
    for (int i = 0; i < 50; i++) {
        listen_to_events(&world, &leaves);
        for (int n = 0; n < i; n++)
            events_emit(&world.daemon.events, "noise", "a-guest-with-a-name", NULL);
        if (i % 2)
            world_turn(&world);
        close(leaves.fd);
    }
    UNTIL(&world, NULL, 0,
          world.daemon.events.first != NULL && world.daemon.events.first->next == NULL);
    events_emit(&world.daemon.events, "afterwards", NULL, NULL);
    UNTIL(&world, NULL, 0, has_heard(&stays, "afterwards"));
    daemon_stop(&world.daemon);
    world.running = false;
    while (!has_heard(&stays, "\r\n0\r\n\r\n") && !stays.ended)
        ;
    cr_assert_not_null(strstr(stays.text, "\r\n0\r\n\r\n"), "memd ends the stream when it stops");
    close(stays.fd);
    world_stop(&world);
}

/* ---- [metrics] listen ---- */

static uint16_t free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    cr_assert_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(getsockname(fd, (struct sockaddr *)&address, &bytes), 0);
    close(fd);
    return ntohs(address.sin_port);
}

/* The status of a request over TCP; -1: nobody listens there. */
static int ask_port(struct world *world, uint16_t port, const char *request)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    static char text[1 << 18];
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), status = 0, on = 1;

    if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
        close(fd);
        return -1;
    }
    cr_assert_eq(ioctl(fd, FIONBIO, &on), 0);
    snprintf(text, sizeof(text), "%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", request);
    (void)http_send(world, fd, text, strlen(text));
    http_read_all(world, NULL, 0, fd, text, sizeof(text));
    (void)sscanf(text, "HTTP/1.1 %d", &status);
    if (status == 200)
        cr_assert_not_null(strstr(text, "# TYPE memd_guests gauge"));
    return status;
}

static void listen_on(struct world *world, uint16_t port, const char *more)
{
    char path[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/memd.conf", world->dir);
    file = fopen(path, "w");
    if (port)
        fprintf(file, "[metrics]\nlisten = 127.0.0.1:%u\n", port);
    fprintf(file, "%s", more);
    fclose(file);
    kill(getpid(), SIGHUP);
}

Test(host_control, metrics_have_an_address_of_their_own_and_nothing_else_has)
{
    uint16_t port = free_port(), other = free_port();
    struct world world;
    char lines[64];

    snprintf(lines, sizeof(lines), "[metrics]\nlisten = 127.0.0.1:%u\n", port);
    world_start(&world, lines);
    world_register(&world, "theirs", NULL);
    cr_assert_eq(ask_port(&world, port, "GET /metrics"), 200);
    cr_assert_eq(ask_port(&world, port, "POST /metrics"), 404);
    for (size_t i = 0; i + 1 < sizeof(all_routes) / sizeof(all_routes[0]); i++) {
        char request[64];

        snprintf(request, sizeof(request), "%s %s", all_routes[i].method, all_routes[i].path);
        cr_assert_eq(ask_port(&world, port, request), 404, "%s", request);
    }
    listen_on(&world, other, "");
    UNTIL(&world, NULL, 0, ask_port(&world, other, "GET /metrics") == 200);
    cr_assert_eq(ask_port(&world, port, "GET /metrics"), -1);
    listen_on(&world, 0, "");
    UNTIL(&world, NULL, 0, ask_port(&world, other, "GET /metrics") == -1);
    cr_assert_eq(http_status(&world, "GET", "/metrics", ""), 200);
    world_stop(&world);
}

Test(host_control, an_address_that_was_taken_is_tried_again)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof(address);
    int holder = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct world world;
    uint64_t reloads;
    uint16_t port;

    cr_assert_eq(bind(holder, (struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(listen(holder, 1), 0);
    cr_assert_eq(getsockname(holder, (struct sockaddr *)&address, &bytes), 0);
    port = ntohs(address.sin_port);
    world_start(&world, "");
    freopen("/dev/null", "w", stderr);
    reloads = world.daemon.events.emitted;
    listen_on(&world, port, "");
    UNTIL(&world, NULL, 0, world.daemon.events.emitted > reloads);
    cr_assert_eq(http_status(&world, "GET", "/v1/status", ""), 200, "memd goes on without it");
    close(holder);
    listen_on(&world, port, "");
    UNTIL(&world, NULL, 0, ask_port(&world, port, "GET /metrics") == 200);
    world_stop(&world);
}

/* ---- who holds connections ---- */

#define A_UID 16U  /* what one stranger may hold, */
#define ALL   128U /* and all of them together */

/* Connects so often as this user and says nothing; returns how many of them memd keeps. */
static uint32_t hold(struct world *world, uid_t uid, int *fds, uint32_t count)
{
    uint32_t kept = 0;
    char byte;

    for (uint32_t i = 0; i < count; i++) {
        fds[i] = http_connect_as(world, uid);
        world_turn(world);
    }
    for (int i = 0; i < 20; i++)
        world_turn(world);
    for (uint32_t i = 0; i < count; i++)
        kept += recv(fds[i], &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
    return kept;
}

static void let_go(struct world *world, int *fds, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        close(fds[i]);
    for (int i = 0; i < 20; i++)
        world_turn(world);
}

Test(host_control, a_user_that_holds_connections_keeps_nobody_else_out)
{
    struct world world;
    int fds[2 * A_UID];

    if (geteuid() != 0)
        cr_skip_test("only root can become somebody else");
    world_start(&world, "");
    cr_assert_eq(hold(&world, STRANGER, fds, 2 * A_UID), A_UID);
    cr_assert_eq(http_status_as(&world, STRANGER, "GET", "/v1/status", ""), 503);
    cr_assert_eq(http_status_as(&world, STRANGER + 1, "GET", "/v1/status", ""), 403);
    cr_assert_eq(http_status(&world, "GET", "/v1/status", ""), 200);
    let_go(&world, fds, 2 * A_UID);
    cr_assert_eq(http_status_as(&world, STRANGER, "GET", "/v1/status", ""), 403,
                 "what was let go counts no more");
    world_stop(&world);
}

Test(host_control, users_that_hold_connections_do_not_keep_root_out)
{
    static int fds[10][A_UID];
    struct world world;
    uint32_t kept = 0;

    if (geteuid() != 0)
        cr_skip_test("only root can become somebody else");
    world_start(&world, "");
    for (uint32_t i = 0; i < 10; i++)
        kept += hold(&world, STRANGER + i, fds[i], A_UID);
    cr_assert_eq(kept, ALL);
    cr_assert_eq(http_status(&world, "GET", "/v1/status", ""), 200);
    for (uint32_t i = 0; i < 10; i++)
        let_go(&world, fds[i], A_UID);
    cr_assert_eq(http_status_as(&world, STRANGER + 9, "GET", "/v1/status", ""), 403);
    world_stop(&world);
}
