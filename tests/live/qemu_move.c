/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moves a guest between two stock QEMUs of this host by vmm-hooks/qemu/migrate.c. What memd's
 * agents will do with the RAM this program does in the simplest way: it copies all of it while the
 * guest is stopped.
 *
 * usage: qemu_move check QMP
 *        qemu_move stay QMP              save, and run on
 *        qemu_move go QMP PID ADDRESS DESTINATION-QMP PID ADDRESS BYTES [FORGET]
 * ADDRESS is where the guest's RAM begins in the process (hexadecimal); every FORGETth page is not
 * copied. Prints a line of JSON with how long things took; ends with 1 after saying what failed.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "migrate.h"
#include "units.h"

#define COPY_PAGES 256U

struct side {
    struct qemu_migrate *vm;
    pid_t pid;
    uintptr_t ram;
};

static double now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static void must(const struct side *side, const char *what, int r)
{
    if (r == 0)
        return;
    printf("%s: %s (%s)\n", what, qemu_migrate_why(side->vm), strerror(-r));
    exit(1);
}

static struct side open_side(char *const *words, bool has_ram)
{
    struct side side = {0};

    must(&side, "open", qemu_migrate_open(words[0], &side.vm));
    if (has_ram) {
        side.pid = (pid_t)strtol(words[1], NULL, 10);
        side.ram = strtoull(words[2], NULL, 16);
    }
    return side;
}

static void copy_pages(const struct side *from, const struct side *to, uint64_t at, size_t bytes)
{
    static uint8_t room[COPY_PAGES * PAGE_BYTES];
    struct iovec mine = {room, bytes}, theirs = {(void *)(from->ram + at), bytes};

    if (process_vm_readv(from->pid, &mine, 1, &theirs, 1, 0) != (ssize_t)bytes) {
        perror("reading the source's RAM");
        exit(1);
    }
    theirs.iov_base = (void *)(to->ram + at);
    if (process_vm_writev(to->pid, &mine, 1, &theirs, 1, 0) != (ssize_t)bytes) {
        perror("writing the destination's RAM");
        exit(1);
    }
}

static void copy_ram(const struct side *from, const struct side *to, uint64_t bytes,
                     uint64_t forget)
{
    uint64_t step = forget ? PAGE_BYTES : COPY_PAGES * PAGE_BYTES;

    for (uint64_t at = 0; at < bytes; at += step)
        if (!forget || (at / PAGE_BYTES + 1) % forget != 0)
            copy_pages(from, to, at, bytes - at < step ? bytes - at : step);
}

static int stay(char *const *words)
{
    struct side here = open_side(words, false);
    int fd = memfd_create("state", MFD_CLOEXEC);
    uint64_t stopped_ns;

    must(&here, "check", qemu_migrate_check(here.vm));
    must(&here, "save", qemu_migrate_save(here.vm, fd, &stopped_ns));
    must(&here, "check what was saved", qemu_migrate_check_saved(here.vm));
    must(&here, "resume", qemu_migrate_resume(here.vm));
    printf("{\"down_ms\": %.1f, \"state_bytes\": %lld}\n", now_ms() - (double)stopped_ns / 1e6,
           (long long)lseek(fd, 0, SEEK_END));
    qemu_migrate_close(here.vm);
    return 0;
}

static int go(char *const *words)
{
    struct side from = open_side(words, true), to = open_side(words + 3, true);
    uint64_t bytes = strtoull(words[6], NULL, 10);
    uint64_t forget = words[7] ? strtoull(words[7], NULL, 10) : 0;
    int fd = memfd_create("state", MFD_CLOEXEC);
    double saved, copied, loaded;
    uint64_t stopped_ns, running_ns;
    struct stat state;

    must(&from, "check", qemu_migrate_check(from.vm));
    must(&to, "check at the destination", qemu_migrate_check_incoming(to.vm));
    must(&to, "wait", qemu_migrate_await(to.vm));
    must(&from, "save", qemu_migrate_save(from.vm, fd, &stopped_ns));
    must(&from, "check what was saved", qemu_migrate_check_saved(from.vm));
    saved = now_ms();
    copy_ram(&from, &to, bytes, forget);
    copied = now_ms();
    must(&to, "load", qemu_migrate_load(to.vm, fd));
    loaded = now_ms();
    must(&to, "run", qemu_migrate_run(to.vm, &running_ns));
    must(&from, "quit", qemu_migrate_quit(from.vm));
    fstat(fd, &state);
    printf("{\"save_ms\": %.1f, \"copy_ms\": %.1f, \"load_ms\": %.1f, \"run_ms\": %.1f, "
           "\"state_bytes\": %lld}\n",
           saved - (double)stopped_ns / 1e6, copied - saved, loaded - copied,
           (double)running_ns / 1e6 - loaded, (long long)state.st_size);
    qemu_migrate_close(from.vm);
    qemu_migrate_close(to.vm);
    return 0;
}

static int check(char *const *words)
{
    struct side here = open_side(words, false);

    must(&here, "check", qemu_migrate_check(here.vm));
    qemu_migrate_close(here.vm);
    puts("{}");
    return 0;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 3 && strcmp(argv[1], "check") == 0)
        return check(argv + 2);
    if (argc == 3 && strcmp(argv[1], "stay") == 0)
        return stay(argv + 2);
    if ((argc == 9 || argc == 10) && strcmp(argv[1], "go") == 0)
        return go(argv + 2);
    return 2;
}
