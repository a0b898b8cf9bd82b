/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Both sides of moving a stock QEMU, as QMP commands.
 *
 *   source       check, capabilities ... getfd, migrate fd: ... (quit, or: cancel, cont)
 *   destination  (started with -S -incoming defer) check, capabilities, getfd, migrate-incoming fd:
 *                ... the state ... cont
 *
 * While the guest stands still every command is downtime: a millisecond where the host is busy. So
 * nobody says stop: QEMU begins while the guest runs, stops it by itself when nothing but its
 * devices is left to be saved, and has saved them a millisecond later. And the destination's QEMU
 * waits for the first byte already when the state comes. A state that was saved like this says that
 * the guest ran; -S keeps the QEMU that loads it from letting it run at once.
 *
 * With the capability x-ignore-shared QEMU leaves RAM that is shared with a file to somebody else.
 * Guest RAM is on such a file because memctl run put it there (cmdline.c); the agent has answered
 * QEMU's mmap with private memory, which QEMU does not know. What is left for QEMU to move is the
 * state of devices, and small memory that is not the guest's RAM (firmware, video).
 *
 * Invariants
 *   - nothing is changed before check has found that all of the guest's RAM is on that file, and
 *     that nobody else maps it;
 *   - a state counts as saved only when QEMU's own figures say that no RAM was part of it: QEMU
 *     decides by version and backend, and one that moved RAM would load it over the agent's pages;
 *   - until the source has quit, qemu_migrate_resume() lets the guest run on there.
 *
 * Not promised: that the destination's command line fits. QEMU compares devices and RAM blocks by
 * itself when it loads, and ends when they differ.
 */
#include "migrate.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "cmdline.h"
#include "qmp.h"

#define COMMAND_MS 5000 /* a monitor answers in a millisecond; a busy host takes longer */
#define TRANSFER_MS                                                                 \
    15000 /* 0.3 MB take 10 ms, 64 MB of video memory on a busy host a second. What \
           * the agent says meanwhile (each 100 ms) fits into its socket for 28 s */
#define SETTLE_MS                                                                   \
    2000 /* QEMU's small memory takes an eighth of a second at most, at its default \
          * speed: a guest that writes to it faster is stopped */
#define FINALIZE_MS 5000 /* it is done within milliseconds; a busy host takes longer */
#define FD_NAME     "memd-state"
#define AWAIT       "migrate-incoming"
#define PATH_CHARS  108
#define WHY_CHARS   320

struct qemu_migrate {
    char path[PATH_CHARS];        /* "" when it was given as a connection */
    int fd;                       /* that connection, until it is used first; -1 */
    struct qmp *qmp;              /* NULL: not connected */
    json_t *capabilities;         /* as they were before we changed them; NULL: not changed */
    unsigned long long ram_bytes; /* of the guest, known once it is checked */
    int feed;                     /* destination: the state goes in here; -1: QEMU waits for none */
    char why[WHY_CHARS];
};

__attribute__((format(printf, 3, 4))) static int fail(struct qemu_migrate *vm, int error,
                                                      const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(vm->why, sizeof(vm->why), format, arguments);
    va_end(arguments);
    return error;
}

/* ---- one command ---- */

static void disconnect(struct qemu_migrate *vm)
{
    qmp_close(vm->qmp);
    vm->qmp = NULL;
}

static int reach(struct qemu_migrate *vm)
{
    int fd = vm->fd;

    if (vm->qmp)
        return 0;
    vm->fd = -1;
    if (fd >= 0)
        return qmp_open_fd(fd, COMMAND_MS, &vm->qmp);
    return vm->path[0] ? qmp_open(vm->path, COMMAND_MS, &vm->qmp) : -ENOTCONN;
}

/* Gives up a reference to `arguments`. *ret_result as of qmp_execute(), or NULL where the answer
 * does not matter. */
static int run_with_fd(struct qemu_migrate *vm, const char *command, json_t *arguments, int fd,
                       json_t **ret_result)
{
    json_t *result = NULL;
    int r = reach(vm);

    vm->why[0] = '\0';
    if (r < 0) {
        json_decref(arguments);
        return fail(vm, r, "QEMU's monitor%s%s: %s", vm->path[0] ? " at " : "", vm->path,
                    strerror(-r));
    }
    r = qmp_execute_with_fd(vm->qmp, command, arguments, fd, COMMAND_MS, &result);
    json_decref(arguments);
    if (r == -EREMOTEIO)
        return fail(vm, r, "QEMU: %s: %s", command, qmp_error(vm->qmp));
    if (r < 0) {
        if (r != -ETIMEDOUT)
            disconnect(vm);
        return fail(vm, r, "QEMU's monitor: %s: %s", command, strerror(-r));
    }
    if (ret_result)
        *ret_result = result;
    else
        json_decref(result);
    return 0;
}

static int run(struct qemu_migrate *vm, const char *command, json_t *arguments, json_t **ret_result)
{
    return run_with_fd(vm, command, arguments, -1, ret_result);
}

/* The string member `key` of what `command` answers, "" where there is none. */
static int ask_word(struct qemu_migrate *vm, const char *command, const char *key, char word[32])
{
    json_t *result;
    const char *value;
    int r = run(vm, command, NULL, &result);

    if (r < 0)
        return r;
    value = json_string_value(json_object_get(result, key));
    snprintf(word, 32, "%s", value ? value : "");
    json_decref(result);
    return 0;
}

/* ---- can it be moved ---- */

static const json_t *find_named(const json_t *array, const char *key, const char *name)
{
    json_t *object;
    size_t i;

    json_array_foreach(array, i, object)
    {
        const char *value = json_string_value(json_object_get(object, key));

        if (value && strcmp(value, name) == 0)
            return object;
    }
    return NULL;
}

static int check_capability(struct qemu_migrate *vm)
{
    json_t *capabilities;
    int r = run(vm, "query-migrate-capabilities", NULL, &capabilities);
    bool known;

    if (r < 0)
        return r;
    known = find_named(capabilities, "capability", "x-ignore-shared");
    json_decref(capabilities);
    return known ? 0
                 : fail(vm, -ENOTSUP,
                        "this QEMU always moves the guest's RAM itself (it has no capability "
                        "x-ignore-shared)");
}

/* How much RAM the machine has: what it began with, and what was plugged in since. */
static int ask_sizes(struct qemu_migrate *vm, json_int_t *ret_base, json_int_t *ret_plugged)
{
    json_t *sizes;
    int r = run(vm, "query-memory-size-summary", NULL, &sizes);

    if (r < 0)
        return r;
    *ret_base = json_integer_value(json_object_get(sizes, "base-memory"));
    *ret_plugged = json_integer_value(json_object_get(sizes, "plugged-memory"));
    json_decref(sizes);
    return 0;
}

/* All of it must be on the one backend that memctl run made. */
static int check_ram(struct qemu_migrate *vm)
{
    json_int_t base, plugged;
    json_t *backends;
    const json_t *ours;
    int r = ask_sizes(vm, &base, &plugged);
    bool alone;

    if (r == 0)
        r = run(vm, "query-memdev", NULL, &backends);
    if (r < 0)
        return r;
    ours = find_named(backends, "id", QEMU_BACKEND_ID);
    alone = ours && json_array_size(backends) == 1 && plugged == 0 && base > 0 &&
            json_is_true(json_object_get(ours, "share")) &&
            json_integer_value(json_object_get(ours, "size")) == base;
    json_decref(backends);
    vm->ram_bytes = (unsigned long long)base;
    return alone ? 0
                 : fail(vm, -ENOTSUP,
                        "not all of the guest's RAM is where memctl run puts it for a migration "
                        "(started with --no-migrate, or memory was added)");
}

/* Devices that give the guest's memory to somebody else, by the beginning of their type. */
static const char *sharing_device(const json_t *children)
{
    static const char *const types[] = {"child<vhost-user", "child<vfio-", "child<vhost-vdpa",
                                        "child<ivshmem"};
    json_t *child;
    size_t i;

    json_array_foreach(children, i, child)
    {
        const char *type = json_string_value(json_object_get(child, "type"));

        for (size_t t = 0; type && t < sizeof(types) / sizeof(types[0]); t++)
            if (strncmp(type, types[t], strlen(types[t])) == 0)
                return types[t] + strlen("child<");
    }
    return NULL;
}

static int check_devices(struct qemu_migrate *vm)
{
    static const char *const places[] = {"/machine/peripheral", "/machine/peripheral-anon"};

    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        json_t *children;
        int r = run(vm, "qom-list", json_pack("{s:s}", "path", places[i]), &children);
        const char *device = r == 0 ? sharing_device(children) : NULL;

        if (r < 0)
            return r;
        json_decref(children);
        if (device)
            return fail(vm, -ENOTSUP, "a device (%s...) maps the guest's memory too", device);
    }
    return 0;
}

/* Network back ends are no objects that could be listed; the monitor for people knows them. */
static int check_networks(struct qemu_migrate *vm)
{
    json_t *text;
    int r =
        run(vm, "human-monitor-command", json_pack("{s:s}", "command-line", "info network"), &text);
    bool shared;

    if (r < 0)
        return r;
    shared = json_is_string(text) && (strstr(json_string_value(text), "type=vhost-user") ||
                                      strstr(json_string_value(text), "type=vhost-vdpa"));
    json_decref(text);
    return shared ? fail(vm, -ENOTSUP, "a network back end (vhost) maps the guest's memory too")
                  : 0;
}

/* What QEMU itself has against it: some devices can't be moved at all. */
static int check_blockers(struct qemu_migrate *vm)
{
    json_t *migration;
    const char *reason, *status;
    int r = run(vm, "query-migrate", NULL, &migration);

    if (r < 0)
        return r;
    status = json_string_value(json_object_get(migration, "status"));
    reason = json_string_value(json_array_get(json_object_get(migration, "blocked-reasons"), 0));
    if (reason)
        r = fail(vm, -ENOTSUP, "QEMU can't move this machine: %s", reason);
    else if (status && (strcmp(status, "active") == 0 || strcmp(status, "setup") == 0))
        r = fail(vm, -EBUSY, "QEMU is moving this guest already, without memd");
    json_decref(migration);
    return r;
}

/* Everything that has to be so at both sides. */
static int check_machine(struct qemu_migrate *vm)
{
    int r = check_capability(vm);

    if (r == 0)
        r = check_ram(vm);
    if (r == 0)
        r = check_devices(vm);
    return r == 0 ? check_networks(vm) : r;
}

int qemu_migrate_check(struct qemu_migrate *vm)
{
    char status[32];
    int r = ask_word(vm, "query-status", "status", status);

    if (r == 0 && strcmp(status, "running") != 0)
        r = fail(vm, -ENOTSUP, "the guest does not run: QEMU says '%s'", status);
    if (r == 0)
        r = check_machine(vm);
    return r == 0 ? check_blockers(vm) : r;
}

int qemu_migrate_check_incoming(struct qemu_migrate *vm)
{
    char status[32];
    int r = ask_word(vm, "query-status", "status", status);

    if (r == 0 && strcmp(status, "inmigrate") != 0)
        r = fail(vm, -ENOTSUP, "QEMU does not wait for a guest: it says '%s'", status);
    return r == 0 ? check_machine(vm) : r;
}

/* ---- capabilities ---- */

/* What the operator may have turned on for migrations of another kind, and that is not in the way.
 */
static bool may_stay(const char *capability)
{
    static const char *const harmless[] = {"late-block-activate", "validate-uuid", "dirty-bitmaps"};

    for (size_t i = 0; i < sizeof(harmless) / sizeof(harmless[0]); i++)
        if (strcmp(harmless[i], capability) == 0)
            return true;
    return false;
}

static bool is_wanted(const char *capability)
{
    return strcmp(capability, "x-ignore-shared") == 0 || strcmp(capability, "events") == 0;
}

/* The list with which to go from `now` to what a migration of ours needs. */
static json_t *list_changes(const json_t *now)
{
    json_t *changes = json_array(), *each;
    size_t i;

    json_array_foreach(now, i, each)
    {
        const char *name = json_string_value(json_object_get(each, "capability"));
        bool on = json_is_true(json_object_get(each, "state"));

        if (name && !may_stay(name) && on != is_wanted(name))
            json_array_append_new(changes,
                                  json_pack("{s:s, s:b}", "capability", name, "state", !on));
    }
    return changes;
}

static int set_capabilities(struct qemu_migrate *vm, json_t *list)
{
    return run(vm, "migrate-set-capabilities", json_pack("{s:O}", "capabilities", list), NULL);
}

int qemu_migrate_prepare(struct qemu_migrate *vm)
{
    json_t *now, *changes;
    int r = vm->capabilities ? 0 : run(vm, "query-migrate-capabilities", NULL, &now);

    if (r < 0 || vm->capabilities)
        return r;
    changes = list_changes(now);
    r = set_capabilities(vm, changes);
    json_decref(changes);
    if (r == 0)
        vm->capabilities = json_incref(now);
    json_decref(now);
    return r;
}

void qemu_migrate_unprepare(struct qemu_migrate *vm)
{
    if (vm->capabilities && set_capabilities(vm, vm->capabilities) == 0) {
        json_decref(vm->capabilities);
        vm->capabilities = NULL;
    }
}

void qemu_migrate_inherit(struct qemu_migrate *vm)
{
    if (!vm->capabilities)
        vm->capabilities = json_pack("[{s:s, s:b}, {s:s, s:b}]", "capability", "x-ignore-shared",
                                     "state", 0, "capability", "events", "state", 0);
}

/* ---- the state on its way ---- */

static int give_descriptor(struct qemu_migrate *vm, int fd)
{
    return run_with_fd(vm, "getfd", json_pack("{s:s}", "fdname", FD_NAME), fd, NULL);
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

/* When it happened, by CLOCK_MONOTONIC, and not before `least_ns`: QEMU's stamps are of a clock
 * that somebody may set. */
static uint64_t time_of(const json_t *event, uint64_t least_ns)
{
    const json_t *stamp = json_object_get(event, "timestamp");
    json_int_t s = json_integer_value(json_object_get(stamp, "seconds"));
    json_int_t us = json_integer_value(json_object_get(stamp, "microseconds"));
    uint64_t then = (uint64_t)s * 1000000000ULL + (uint64_t)us * 1000ULL;
    uint64_t now = clock_ns(CLOCK_REALTIME), mono = clock_ns(CLOCK_MONOTONIC);

    if (s <= 0 || then > now || now - then > mono - least_ns)
        return least_ns;
    return mono - (now - then);
}

static bool is_event(const json_t *event, const char *name)
{
    const char *its_name = json_string_value(json_object_get(event, "event"));

    return its_name && strcmp(its_name, name) == 0;
}

/* A state on its way, one way or the other. */
struct transfer {
    const char *command; /* with which it began */
    uint64_t began_ns;
    uint64_t stopped_ns; /* 0: QEMU has not said that the guest stands still */
    bool completed;
};

static int begin_transfer(struct qemu_migrate *vm, struct transfer *transfer)
{
    qmp_forget_events(vm->qmp);
    transfer->began_ns = clock_ns(CLOCK_MONOTONIC);
    return run(vm, transfer->command, json_pack("{s:s}", "uri", "fd:" FD_NAME), NULL);
}

static int look_at_event(struct qemu_migrate *vm, struct transfer *transfer, const json_t *event)
{
    const char *status =
        json_string_value(json_object_get(json_object_get(event, "data"), "status"));

    if (is_event(event, "STOP") && !transfer->stopped_ns)
        transfer->stopped_ns = time_of(event, transfer->began_ns);
    if (!is_event(event, "MIGRATION") || !status)
        return 0;
    transfer->completed = strcmp(status, "completed") == 0;
    if (strcmp(status, "failed") == 0 || strcmp(status, "cancelled") == 0)
        return fail(vm, -EIO, "QEMU: %s: %s", transfer->command, status);
    return 0;
}

/* Until QEMU says how it ended. -ETIMEDOUT: it has not, in so long. */
static int await_end(struct qemu_migrate *vm, struct transfer *transfer, int timeout_ms)
{
    uint64_t deadline_ns = clock_ns(CLOCK_MONOTONIC) + (uint64_t)timeout_ms * 1000000ULL;
    int r = 0;

    while (r == 0 && !transfer->completed) {
        uint64_t now_ns = clock_ns(CLOCK_MONOTONIC);
        json_t *event;

        r = qmp_wait_event(
            vm->qmp, deadline_ns > now_ns ? (int)((deadline_ns - now_ns) / 1000000ULL) : 0, &event);
        if (r == 0) {
            r = look_at_event(vm, transfer, event);
            json_decref(event);
            continue;
        }
        if (r != -ETIMEDOUT)
            disconnect(vm);
        fail(vm, r, "QEMU: %s: %s", transfer->command,
             r == -ECONNRESET ? "it ended over it" : strerror(-r));
    }
    return r;
}

/* QEMU counts all RAM that it does not ignore, moved or not. Were the guest's part of that, it
 * would be at least as much as the guest has. */
int qemu_migrate_check_saved(struct qemu_migrate *vm)
{
    json_t *migration, *total;
    unsigned long long counted;
    int r = run(vm, "query-migrate", NULL, &migration);

    if (r < 0)
        return r;
    total = json_object_get(json_object_get(migration, "ram"), "total");
    counted = (unsigned long long)json_integer_value(total);
    if (!json_is_integer(total))
        r = fail(vm, -EPROTO, "QEMU does not say how much RAM it moved");
    else if (counted >= vm->ram_bytes)
        r = fail(vm, -EXDEV,
                 "QEMU does not leave the guest's RAM to memd: it moved %llu MiB itself",
                 counted >> 20);
    json_decref(migration);
    return r;
}

/* ---- the source ---- */

static bool is_over(const char *status)
{
    return !status[0] || strcmp(status, "none") == 0 || strcmp(status, "completed") == 0 ||
           strcmp(status, "failed") == 0 || strcmp(status, "cancelled") == 0;
}

bool qemu_migrate_is_stopped(struct qemu_migrate *vm)
{
    char status[32];

    if (ask_word(vm, "query-migrate", "status", status) == 0 && !is_over(status))
        return true;
    return ask_word(vm, "query-status", "status", status) == 0 &&
           (strcmp(status, "paused") == 0 || strcmp(status, "postmigrate") == 0 ||
            strcmp(status, "finish-migrate") == 0);
}

int qemu_migrate_save(struct qemu_migrate *vm, int fd, uint64_t *ret_stopped_ns)
{
    struct transfer transfer = {.command = "migrate"};
    int r = vm->ram_bytes ? 0 : check_ram(vm);

    if (r == 0)
        r = qemu_migrate_prepare(vm);
    if (r == 0 && lseek(fd, 0, SEEK_SET) < 0 && errno != ESPIPE)
        r = fail(vm, -errno, "the state's descriptor: %s", strerror(errno));
    if (r == 0)
        r = give_descriptor(vm, fd);
    if (r == 0)
        r = begin_transfer(vm, &transfer);
    if (r == 0)
        r = await_end(vm, &transfer, SETTLE_MS);
    if (r == -ETIMEDOUT && vm->qmp) {
        r = transfer.stopped_ns ? 0 : run(vm, "stop", NULL, NULL);
        if (r == 0)
            r = await_end(vm, &transfer, TRANSFER_MS);
    }
    *ret_stopped_ns = transfer.stopped_ns ? transfer.stopped_ns : transfer.began_ns;
    return r;
}

static int64_t now_ms(void)
{
    return (int64_t)(clock_ns(CLOCK_MONOTONIC) / 1000000ULL);
}

/* A migration that still goes on is ended: the guest must not run while its state is written. */
static int end_transfer(struct qemu_migrate *vm)
{
    static const struct timespec moment = {.tv_nsec = 5000000};
    int64_t deadline_ms = now_ms() + TRANSFER_MS;
    char status[32];
    int r;

    while ((r = ask_word(vm, "query-migrate", "status", status)) == 0) {
        if (is_over(status))
            return 0;
        if (now_ms() > deadline_ms)
            return fail(vm, -ETIMEDOUT, "QEMU does not end its migration (%s)", status);
        if (strcmp(status, "cancelling") != 0)
            r = run(vm, "migrate_cancel", NULL, NULL);
        if (r < 0)
            return r;
        nanosleep(&moment, NULL);
    }
    return r;
}

/* QEMU says that a migration has ended some moments before it lets the guest run ("Migration is not
 * finalized yet"). */
static int let_run(struct qemu_migrate *vm)
{
    static const struct timespec moment = {.tv_nsec = 5000000};
    int64_t deadline_ms = now_ms() + FINALIZE_MS;
    int r;

    while ((r = run(vm, "cont", NULL, NULL)) == -EREMOTEIO && now_ms() < deadline_ms)
        nanosleep(&moment, NULL);
    return r;
}

int qemu_migrate_resume(struct qemu_migrate *vm)
{
    int r = end_transfer(vm);

    if (r == 0)
        r = let_run(vm);
    if (r == 0)
        qemu_migrate_unprepare(vm);
    return r;
}

/* ---- the destination ---- */

int qemu_migrate_await(struct qemu_migrate *vm)
{
    struct transfer transfer = {.command = AWAIT};
    int ends[2], r = qemu_migrate_prepare(vm);

    if (r < 0 || vm->feed >= 0)
        return r;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return fail(vm, -errno, "a socket for the state: %s", strerror(errno));
    r = give_descriptor(vm, ends[1]);
    close(ends[1]);
    if (r == 0)
        r = begin_transfer(vm, &transfer);
    if (r == 0)
        vm->feed = ends[0];
    else
        close(ends[0]);
    return r;
}

static int send_all(int to, const uint8_t *bytes, size_t count, int64_t deadline_ms)
{
    while (count > 0) {
        struct pollfd poller = {.fd = to, .events = POLLOUT};
        int64_t left = deadline_ms - now_ms();
        ssize_t sent;

        if (left <= 0)
            return -ETIMEDOUT;
        sent = send(to, bytes, count, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        if (sent < 0)
            poll(&poller, 1, (int)left);
        bytes += sent > 0 ? sent : 0;
        count -= sent > 0 ? (size_t)sent : 0;
    }
    return 0;
}

/* All of the file into the socket from which QEMU reads. */
static int feed_state(struct qemu_migrate *vm, int fd)
{
    int64_t deadline_ms = now_ms() + TRANSFER_MS;
    uint8_t room[64 << 10];
    off_t at = 0;
    ssize_t got;
    int r = 0;

    while (r == 0 && (got = pread(fd, room, sizeof(room), at)) != 0) {
        if (got < 0)
            return fail(vm, -errno, "the state's descriptor: %s", strerror(errno));
        r = send_all(vm->feed, room, (size_t)got, deadline_ms);
        at += got;
    }
    /* Who has ended says so on the monitor, or by ending there. */
    return r == -EPIPE || r == -ECONNRESET || r == 0
               ? 0
               : fail(vm, r, "QEMU: the state: %s", strerror(-r));
}

int qemu_migrate_load(struct qemu_migrate *vm, int fd)
{
    struct transfer transfer = {.command = AWAIT};
    char status[32];
    int r = qemu_migrate_await(vm);

    if (r == 0)
        r = feed_state(vm, fd);
    if (r == 0)
        r = await_end(vm, &transfer, TRANSFER_MS);
    /* What comes behind the last byte of the state is done in the monitor's own thread. */
    if (r == 0)
        r = ask_word(vm, "query-status", "status", status);
    if (r == 0 && strcmp(status, "paused") != 0)
        r = fail(vm, -EPROTO, "the guest came, and QEMU says '%s'", status);
    return r;
}

int qemu_migrate_run(struct qemu_migrate *vm, uint64_t *ret_began_ns)
{
    uint64_t asked_ns = clock_ns(CLOCK_MONOTONIC);
    json_t *event;
    int r = let_run(vm);

    *ret_began_ns = r == 0 ? clock_ns(CLOCK_MONOTONIC) : 0;
    while (r == 0 && vm->qmp && qmp_wait_event(vm->qmp, 0, &event) == 0) {
        if (is_event(event, "RESUME"))
            *ret_began_ns = time_of(event, asked_ns);
        json_decref(event);
    }
    return r;
}

/* ---- either ---- */

int qemu_migrate_quit(struct qemu_migrate *vm)
{
    int r = run(vm, "quit", NULL, NULL);

    disconnect(vm);
    return r == -ECONNRESET || r == -EPIPE ? 0 : r;
}

int qemu_migrate_open(const char *qmp_path, struct qemu_migrate **ret_vm)
{
    struct qemu_migrate *vm;

    if (strlen(qmp_path) >= PATH_CHARS)
        return -ENAMETOOLONG;
    vm = calloc(1, sizeof(*vm));
    if (!vm)
        return -ENOMEM;
    strcpy(vm->path, qmp_path);
    vm->fd = vm->feed = -1;
    *ret_vm = vm;
    return 0;
}

int qemu_migrate_open_fd(int qmp_fd, struct qemu_migrate **ret_vm)
{
    int r = qemu_migrate_open("", ret_vm);

    if (r < 0)
        close(qmp_fd);
    else
        (*ret_vm)->fd = qmp_fd;
    return r;
}

void qemu_migrate_close(struct qemu_migrate *vm)
{
    if (!vm)
        return;
    disconnect(vm);
    if (vm->fd >= 0)
        close(vm->fd);
    if (vm->feed >= 0)
        close(vm->feed);
    json_decref(vm->capabilities);
    free(vm);
}

const char *qemu_migrate_why(const struct qemu_migrate *vm)
{
    return vm->why;
}
