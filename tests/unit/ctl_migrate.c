/* SPDX-License-Identifier: Apache-2.0 */
/* The monitor's part of a migration, against a QEMU that is not as it should be. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "migrate.h"
#include "scripted_qemu.h"

static struct qemu_migrate *vm;
static uint64_t stopped_ns;

static void start(const char *status, const struct scripted_answer *odd, size_t odd_count)
{
    scripted_qemu_start(status, odd, odd_count);
    cr_assert(qemu_migrate_open(scripted_qemu.path, &vm) == 0);
}

static void stop(void)
{
    qemu_migrate_close(vm);
    scripted_qemu_stop();
}

/* ---- what can't be moved ---- */

#define ODD(name, words) (&(const struct scripted_answer){name, words}), 1

static void expect_refusal(const char *status, const struct scripted_answer *odd, size_t odd_count,
                           int error, const char *words)
{
    int r;

    start(status, odd, odd_count);
    r = qemu_migrate_check(vm);
    cr_expect(r == error, "%s: %d", words, r);
    cr_expect(strstr(qemu_migrate_why(vm), words), "'%s' has not '%s'", qemu_migrate_why(vm),
              words);
    for (size_t i = 0; i < scripted_qemu.asked; i++)
        cr_expect(strncmp(scripted_qemu.commands[i], "q", 1) == 0 ||
                      strstr(scripted_qemu.commands[i], "human"),
                  "%s was run before it was refused", scripted_qemu.commands[i]);
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
    cr_assert(qemu_migrate_save(vm, fd, &stopped_ns) == 0, "%s", qemu_migrate_why(vm));
    cr_assert(qemu_migrate_check_saved(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(qemu_migrate_why(vm), "");
    cr_expect(!scripted_qemu_was_asked("stop"), "the guest stood still longer than it had to");
    cr_expect(stopped_ns + 1000 >= scripted_qemu.stopped_after_ns &&
              stopped_ns <= scripted_qemu.stopped_before_ns + 1000);
    cr_expect(fstat(fd, &mine) == 0 && fstat(scripted_qemu.given, &theirs) == 0 &&
              mine.st_ino == theirs.st_ino);
    cr_expect(strstr(scripted_qemu_asked("migrate", 0), "\"fd:memd-state\""));
    cr_expect(strstr(scripted_qemu_asked("getfd", 0), "\"memd-state\""));
    cr_expect(strstr(scripted_qemu_asked("migrate-set-capabilities", 0),
                     "{\"capability\":\"x-ignore-shared\",\"state\":true}"));
    cr_expect(strstr(scripted_qemu_asked("migrate-set-capabilities", 0),
                     "{\"capability\":\"multifd\",\"state\":false}"));
    cr_expect_not(strstr(scripted_qemu_asked("migrate-set-capabilities", 0), "validate-uuid"));
    cr_assert(qemu_migrate_resume(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect(strstr(scripted_qemu_asked("migrate-set-capabilities", 1),
                     "{\"capability\":\"multifd\",\"state\":true}"));
    cr_expect_str_eq(scripted_qemu.status, "running");
    stop();
    close(scripted_qemu.given);
    close(fd);
}

Test(ctl_migrate, source_that_is_not_finalized_yet_runs_when_it_is)
{
    int fd = memfd_create("state", MFD_CLOEXEC);

    start("running",
          ODD("cont", "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Migration is not "
                      "finalized yet\"}}\n"));
    scripted_qemu.until = "cont";
    cr_assert(qemu_migrate_save(vm, fd, &stopped_ns) == 0, "%s", qemu_migrate_why(vm));
    cr_assert(qemu_migrate_resume(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(scripted_qemu.status, "running");
    stop();
    close(fd);
}

static void expect_save(const struct scripted_answer *odd, size_t odd_count, int error,
                        const char *words)
{
    int fd = memfd_create("state", MFD_CLOEXEC), r;

    start("running", odd, odd_count);
    r = qemu_migrate_save(vm, fd, &stopped_ns);
    if (r == 0)
        r = qemu_migrate_check_saved(vm);
    cr_expect(r == error, "%s: %d", words, r);
    cr_expect(strstr(qemu_migrate_why(vm), words), "'%s' has not '%s'", qemu_migrate_why(vm),
              words);
    scripted_qemu.odd_count = 0;
    cr_expect(qemu_migrate_resume(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(scripted_qemu.status, "running");
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
    static const struct scripted_answer odd[] = {
        {"getfd", "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n" DONE},
        {"migrate", DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"failed\"}}\n"}};

    expect_save(odd, 2, -EIO, "failed");
}

/* Video memory that is written to all the time. */
Test(ctl_migrate, guest_that_does_not_settle_is_stopped)
{
    static const struct scripted_answer odd[] = {
        {"migrate", DONE "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"active\"}}\n"},
        {"stop", "{\"event\": \"STOP\"}\n" DONE
                 "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n"}};
    int fd = memfd_create("state", MFD_CLOEXEC);

    start("running", odd, 2);
    cr_assert(qemu_migrate_save(vm, fd, &stopped_ns) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(scripted_qemu.commands[scripted_qemu.asked - 1], "stop");
    stop();
    close(fd);
}

/* QEMU's stamps are of a clock that can be set. */
Test(ctl_migrate, stamps_that_can_not_be)
{
    static const char *const stamps[] = {"{\"seconds\": 1, \"microseconds\": 1}",
                                         "{\"seconds\": 99999999999, \"microseconds\": 1}", "7"};

    for (size_t i = 0; i < sizeof(stamps) / sizeof(stamps[0]); i++) {
        int fd = memfd_create("state", MFD_CLOEXEC);
        struct timespec before, after;
        char text[320];

        snprintf(text, sizeof(text),
                 DONE "{\"event\": \"STOP\", \"timestamp\": %s}\n"
                      "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"completed\"}}\n",
                 stamps[i]);
        start("running", ODD("migrate", text));
        clock_gettime(CLOCK_MONOTONIC, &before);
        cr_assert(qemu_migrate_save(vm, fd, &stopped_ns) == 0, "%s", qemu_migrate_why(vm));
        clock_gettime(CLOCK_MONOTONIC, &after);
        cr_expect(stopped_ns / 1000000000 >= (uint64_t)before.tv_sec &&
                      stopped_ns / 1000000000 <= (uint64_t)after.tv_sec,
                  "%s", stamps[i]);
        stop();
        close(fd);
    }
}

/* It waits for the state before that has come, and is asked to once. */
Test(ctl_migrate, destination_waits_for_its_state)
{
    int fd = memfd_create("state", MFD_CLOEXEC);

    cr_assert(write(fd, "state", 5) == 5);
    start("inmigrate", NULL, 0);
    cr_assert(qemu_migrate_await(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect(scripted_qemu_was_asked("migrate-incoming"));
    cr_assert(qemu_migrate_load(vm, fd) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(scripted_qemu_asked("migrate-incoming", 1), "", "it waits already");
    stop();
    close(scripted_qemu.given);
    close(fd);
}

/* Active until it is cancelled: only then may the guest run. */
Test(ctl_migrate, resume_ends_what_still_goes_on)
{
    start("paused", ODD("query-migrate", "{\"return\": {\"status\": \"active\"}}\n"));
    scripted_qemu.until = "migrate_cancel";
    cr_expect(qemu_migrate_resume(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_expect(scripted_qemu_was_asked("migrate_cancel"));
    cr_expect_str_eq(scripted_qemu.commands[scripted_qemu.asked - 1], "cont");
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
    uint64_t began_ns = 0;

    cr_assert(write(fd, "state", 5) == 5);
    start("inmigrate", NULL, 0);
    cr_assert(qemu_migrate_check_incoming(vm) == 0, "%s", qemu_migrate_why(vm));
    cr_assert(qemu_migrate_load(vm, fd) == 0, "%s", qemu_migrate_why(vm));
    cr_expect_str_eq(scripted_qemu.loaded, "state");
    cr_assert(qemu_migrate_run(vm, &began_ns) == 0, "%s", qemu_migrate_why(vm));
    cr_expect(began_ns > 0);
    cr_expect_str_eq(scripted_qemu.status, "running");
    stop();
    close(scripted_qemu.given);
    close(fd);
}

static void expect_load(const struct scripted_answer *odd, size_t odd_count, int error,
                        const char *words)
{
    int fd = memfd_create("state", MFD_CLOEXEC), r;

    cr_assert(write(fd, "state", 5) == 5);
    start("inmigrate", odd, odd_count);
    r = qemu_migrate_load(vm, fd);
    cr_expect(r == error, "%s: %d", words, r);
    cr_expect(strstr(qemu_migrate_why(vm), words), "'%s' has not '%s'", qemu_migrate_why(vm),
              words);
    cr_expect(!scripted_qemu_was_asked("cont"));
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
