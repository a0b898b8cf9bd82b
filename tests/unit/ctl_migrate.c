/* SPDX-License-Identifier: Apache-2.0 */
/* The monitor's part of a migration, against a QEMU that is not as it should be. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "migrate.h"

#define GREETING  "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n"
#define DONE      "{\"return\": {}}\n"
#define LINES_MAX 64U
#define CLOSE     "close" /* the monitor's connection ends instead of an answer */

struct answer {
    const char *command, *text;
};

/* A QEMU that can be moved: 64 MiB of RAM, half a MiB of firmware. */
static const struct answer good[] = {
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
    {"migrate", DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\n"
                     "{\"event\": \"STOP\"}\n"
                     "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n"},
    {"migrate-incoming",
     DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\n"
          "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n"},
};

static struct {
    char path[64];
    int listener;
    pthread_t thread;
    const struct answer *odd; /* what it answers in another way */
    size_t odd_count;
    const char *until; /* such a command: from then on nothing is odd any more */
    const char *status;
    char commands[LINES_MAX][32]; /* what it was asked, in order */
    char arguments[LINES_MAX][256];
    size_t asked;
    int given; /* the descriptor that came with getfd, -1 */
} qemu;

static struct qemu_migrate *vm;

/* ---- the scripted QEMU ---- */

static const char *look_up(const struct answer *answers, size_t count, const char *command)
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

/* False: the connection ends. */
static bool answer(int fd, const char *line)
{
    json_t *request = json_loads(line, 0, NULL);
    const char *command = json_string_value(json_object_get(request, "execute"));
    const char *text = look_up(qemu.odd, qemu.odd_count, command);
    char status[80];

    remember(command, json_object_get(request, "arguments"));
    if (!text && strcmp(command, "query-status") == 0) {
        snprintf(status, sizeof(status), "{\"return\": {\"status\": \"%s\"}}\n", qemu.status);
        text = status;
    }
    if (!text)
        text = look_up(good, sizeof(good) / sizeof(good[0]), command);
    if (strcmp(command, "stop") == 0 || strcmp(command, "migrate-incoming") == 0)
        qemu.status = "paused";
    if (strcmp(command, "cont") == 0)
        qemu.status = "running";
    if (qemu.until && strcmp(command, qemu.until) == 0)
        qemu.odd_count = 0;
    json_decref(request);
    if (!text)
        text = DONE;
    return strcmp(text, CLOSE) != 0 && send(fd, text, strlen(text), MSG_NOSIGNAL) > 0;
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

static void start(const char *status, const struct answer *odd, size_t odd_count)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    snprintf(qemu.path, sizeof(qemu.path), "/tmp/unit_migrate.%d", getpid());
    strcpy(address.sun_path, qemu.path);
    unlink(qemu.path);
    qemu.odd = odd;
    qemu.odd_count = odd_count;
    qemu.status = status;
    qemu.given = -1;
    qemu.asked = 0;
    qemu.until = NULL;
    qemu.listener = socket(AF_UNIX, SOCK_STREAM, 0);
    cr_assert(bind(qemu.listener, (struct sockaddr *)&address, sizeof(address)) == 0);
    cr_assert(listen(qemu.listener, 4) == 0);
    pthread_create(&qemu.thread, NULL, serve, NULL);
    cr_assert(qemu_migrate_open(qemu.path, &vm) == 0);
}

static void stop(void)
{
    qemu_migrate_close(vm);
    shutdown(qemu.listener, SHUT_RDWR);
    pthread_join(qemu.thread, NULL);
    close(qemu.listener);
    unlink(qemu.path);
}

/* The arguments that the number-th use of this command came with, "" when there was none. */
static const char *asked(const char *command, size_t number)
{
    for (size_t i = 0; i < qemu.asked; i++)
        if (strcmp(qemu.commands[i], command) == 0 && number-- == 0)
            return qemu.arguments[i];
    return "";
}

static bool was_asked(const char *command)
{
    for (size_t i = 0; i < qemu.asked; i++)
        if (strcmp(qemu.commands[i], command) == 0)
            return true;
    return false;
}

/* ---- what can't be moved ---- */

#define ODD(name, words) (&(const struct answer){name, words}), 1

static void expect_refusal(const char *status, const struct answer *odd, size_t odd_count,
                           int error, const char *words)
{
    int r;

    start(status, odd, odd_count);
    r = qemu_migrate_check(vm);
    cr_expect(r == error, "%s: %d", words, r);
    cr_expect(strstr(qemu_migrate_why(vm), words), "'%s' has not '%s'", qemu_migrate_why(vm),
              words);
    for (size_t i = 0; i < qemu.asked; i++)
        cr_expect(strncmp(qemu.commands[i], "q", 1) == 0 || strstr(qemu.commands[i], "human"),
                  "%s was run before it was refused", qemu.commands[i]);
    stop();
}

Test(ctl_migrate, machines_that_can_not_be_moved)
{
    expect_refusal("paused", NULL, 0, -ENOTSUP, "'paused'");
    expect_refusal("running",
                   ODD("query-migrate-capabilities",
                       "{\"return\": [{\"capability\": \"xbzrle\", \"state\": false}]}\n"),
                   -ENOTSUP, "x-ignore-shared");
    expect_refusal("running",
                   ODD("query-memory-size-summary",
                       "{\"return\": {\"base-memory\": 67108864, \"plugged-memory\": 4096}}\n"),
                   -ENOTSUP, "memory was added");
    expect_refusal("running",
                   ODD("query-memory-size-summary", "{\"return\": {\"base-memory\": 134217728}}\n"),
                   -ENOTSUP, "not all of the guest's RAM");
    expect_refusal("running", ODD("query-memdev", "{\"return\": []}\n"), -ENOTSUP,
                   "not all of the guest's RAM");
    expect_refusal("running",
                   ODD("query-memdev", "{\"return\": [{\"id\": \"memd.ram\", \"size\": 67108864, "
                                       "\"share\": false}]}\n"),
                   -ENOTSUP, "not all of the guest's RAM");
    expect_refusal("running",
                   ODD("query-memdev", "{\"return\": [{\"id\": \"memd.ram\", \"size\": 67108864, "
                                       "\"share\": true}, {\"id\": \"x\", \"size\": 1}]}\n"),
                   -ENOTSUP, "not all of the guest's RAM");
}

Test(ctl_migrate, machines_whose_memory_others_have_too)
{
    expect_refusal("running",
                   ODD("qom-list", "{\"return\": [{\"name\": \"fs\", \"type\": "
                                   "\"child<vhost-user-fs-pci>\"}]}\n"),
                   -ENOTSUP, "vhost-user");
    expect_refusal("running",
                   ODD("qom-list", "{\"return\": [{\"type\": \"string\"}, {\"name\": \"gpu\", "
                                   "\"type\": \"child<vfio-pci>\"}]}\n"),
                   -ENOTSUP, "vfio");
    expect_refusal("running",
                   ODD("human-monitor-command", "{\"return\": \"n: index=0,type=vhost-user\"}\n"),
                   -ENOTSUP, "network back end");
    expect_refusal(
        "running",
        ODD("query-migrate", "{\"return\": {\"blocked-reasons\": [\"9p is mounted\"]}}\n"),
        -ENOTSUP, "9p is mounted");
    expect_refusal("running", ODD("query-migrate", "{\"return\": {\"status\": \"active\"}}\n"),
                   -EBUSY, "already");
    expect_refusal("running", ODD("query-memdev", CLOSE), -ECONNRESET, "query-memdev");
    expect_refusal("running", ODD("query-memdev", "{\"error\": {\"desc\": \"not today\"}}\n"),
                   -EREMOTEIO, "not today");
}

/* ---- the source ---- */

Test(ctl_migrate, source_goes_and_comes_back)
{
    int fd = memfd_create("state", MFD_CLOEXEC);
    struct stat mine, theirs;

    start("running", NULL, 0);
    cr_assert(qemu_migrate_check(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_assert(qemu_migrate_stop(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_assert(qemu_migrate_save(vm, fd) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(qemu_migrate_why(vm), "");
    cr_expect(fstat(fd, &mine) == 0 && fstat(qemu.given, &theirs) == 0 &&
              mine.st_ino == theirs.st_ino);
    cr_expect(strstr(asked("migrate", 0), "\"fd:memd-state\""));
    cr_expect(strstr(asked("getfd", 0), "\"memd-state\""));
    cr_expect(strstr(asked("migrate-set-capabilities", 0),
                     "{\"capability\":\"x-ignore-shared\",\"state\":true}"));
    cr_expect(strstr(asked("migrate-set-capabilities", 0),
                     "{\"capability\":\"multifd\",\"state\":false}"));
    cr_expect_not(strstr(asked("migrate-set-capabilities", 0), "validate-uuid"));
    cr_assert(qemu_migrate_resume(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect(strstr(asked("migrate-set-capabilities", 1),
                     "{\"capability\":\"multifd\",\"state\":true}"));
    cr_expect_str_eq(qemu.status, "running");
    stop();
    close(qemu.given);
    close(fd);
}

static void expect_save(const struct answer *odd, size_t odd_count, int error, const char *words)
{
    int fd = memfd_create("state", MFD_CLOEXEC), r;

    start("running", odd, odd_count);
    cr_assert(qemu_migrate_stop(vm) == 0, "%s", qemu_migrate_why(vm));
    r = qemu_migrate_save(vm, fd);
    cr_expect(r == error, "%s: %d", words, r);
    cr_expect(strstr(qemu_migrate_why(vm), words), "'%s' has not '%s'", qemu_migrate_why(vm),
              words);
    qemu.odd_count = 0;
    cr_expect(qemu_migrate_resume(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(qemu.status, "running");
    stop();
    close(fd);
}

Test(ctl_migrate, states_that_are_none)
{
    expect_save(ODD("query-migrate",
                    "{\"return\": {\"status\": \"completed\", \"ram\": {\"total\": 67633152}}}\n"),
                -EXDEV, "it moved 64 MiB itself");
    expect_save(ODD("query-migrate", "{\"return\": {\"status\": \"completed\"}}\n"), -EPROTO,
                "does not say how much RAM");
    expect_save(
        ODD("migrate", DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"failed\"}}\n"),
        -EIO, "failed");
    expect_save(ODD("migrate", "{\"error\": {\"desc\": \"no such descriptor\"}}\n"), -EREMOTEIO,
                "no such descriptor");
    expect_save(ODD("getfd", CLOSE), -ECONNRESET, "getfd");
    expect_save(ODD("migrate", CLOSE), -ECONNRESET, "migrate");
}

/* An event of an earlier migration says nothing about this one. */
Test(ctl_migrate, the_end_of_another_migration)
{
    static const struct answer odd[] = {
        {"getfd", "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n" DONE},
        {"migrate", DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"failed\"}}\n"}};

    expect_save(odd, 2, -EIO, "failed");
}

Test(ctl_migrate, guest_that_is_not_stopped_is_not_saved)
{
    start("running", NULL, 0);
    cr_expect(qemu_migrate_save(vm, STDIN_FILENO) == -EBUSY);
    cr_expect(!was_asked("migrate"));
    stop();
}

/* Active until it is cancelled: only then may the guest run. */
Test(ctl_migrate, resume_ends_what_still_goes_on)
{
    start("paused", ODD("query-migrate", "{\"return\": {\"status\": \"active\"}}\n"));
    qemu.until = "migrate_cancel";
    cr_expect(qemu_migrate_resume(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect(was_asked("migrate_cancel"));
    cr_expect_str_eq(qemu.commands[qemu.asked - 1], "cont");
    stop();
}

/* ---- the destination ---- */

Test(ctl_migrate, destination_that_runs_already)
{
    start("running", NULL, 0);
    cr_expect(qemu_migrate_check_incoming(vm) == -ENOTSUP);
    cr_expect(strstr(qemu_migrate_why(vm), "does not wait for a guest"));
    stop();
}

Test(ctl_migrate, destination_loads_and_runs)
{
    int fd = memfd_create("state", MFD_CLOEXEC);

    cr_assert(write(fd, "state", 5) == 5);
    start("inmigrate", NULL, 0);
    cr_assert(qemu_migrate_check_incoming(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_assert(qemu_migrate_load(vm, fd) == 0, "%s", qemu_migrate_why(vm));
    cr_expect(lseek(qemu.given, 0, SEEK_CUR) == 0, "QEMU would not read it from its beginning");
    cr_assert(qemu_migrate_run(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(qemu.status, "running");
    stop();
    close(qemu.given);
    close(fd);
}

static void expect_load(const struct answer *odd, size_t odd_count, int error, const char *words)
{
    int fd = memfd_create("state", MFD_CLOEXEC), r;

    start("inmigrate", odd, odd_count);
    r = qemu_migrate_load(vm, fd);
    cr_expect(r == error, "%s: %d", words, r);
    cr_expect(strstr(qemu_migrate_why(vm), words), "'%s' has not '%s'", qemu_migrate_why(vm),
              words);
    cr_expect(!was_asked("cont"));
    stop();
    close(fd);
}

Test(ctl_migrate, states_that_do_not_fit)
{
    expect_load(ODD("migrate-incoming", CLOSE), -ECONNRESET, "migrate-incoming");
    expect_load(ODD("migrate-incoming",
                    DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"failed\"}}\n"),
                -EIO, "failed");
    expect_load(ODD("query-status", "{\"return\": {\"status\": \"running\"}}\n"), -EPROTO,
                "'running'");
}

Test(ctl_migrate, quit_is_said)
{
    start("running", ODD("quit", CLOSE));
    cr_expect(qemu_migrate_quit(vm) == 0);
    stop();
}

Test(ctl_migrate, no_monitor)
{
    char path[200];

    memset(path, 'a', sizeof(path));
    path[sizeof(path) - 1] = '\0';
    cr_expect(qemu_migrate_open(path, &vm) == -ENAMETOOLONG);
    cr_assert(qemu_migrate_open("/tmp/no.such.qmp", &vm) == 0);
    cr_expect(qemu_migrate_check(vm) == -ENOENT);
    cr_expect(strstr(qemu_migrate_why(vm), "/tmp/no.such.qmp"));
    qemu_migrate_close(vm);
}
