/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A VMM that calls libmemd, and does what it must not: it gets an error, and its guest's bytes stay
 * what they were.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <memd/memd.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "agent_bytes.h"
#include "agent_memd.h"
#include "procfs.h"
#include "uffd.h"

#define PAGES 256U
#define BYTES (PAGES * PAGE_BYTES)

static struct memd_end memd;
static struct memd_vm *vm;
static uint8_t *ram;
static bool dont_fork; /* the RAM, as QEMU has it */

static void holds_all(uint32_t from)
{
    for (uint32_t i = from; i < PAGES; i++)
        cr_assert(bytes_hold(ram + i * PAGE_BYTES, i + 1), "page %u has other bytes", i);
}

static uint8_t *map(size_t bytes)
{
    uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    cr_assert_neq(at, MAP_FAILED);
    madvise(at, bytes, MADV_NOHUGEPAGE);
    return at;
}

static int attach(const struct memd_ops *ops)
{
    struct memd_options options = {
        .size = sizeof(options), .socket = memd.path, .vmm = "test", .ops = ops};

    return memd_attach(&options, &vm);
}

static void set_up_with(const struct memd_ops *ops)
{
    int r;

    memd_end_start(&memd);
    r = attach(ops);
    if (r == -ENOSYS || r == -EPERM)
        cr_skip_test("no agent on this kernel: %s", strerror(-r));
    cr_assert_eq(r, 0, "%s", strerror(-r));
    ram = map(BYTES);
    if (dont_fork)
        madvise(ram, BYTES, MADV_DONTFORK);
    cr_assert_eq(memd_ram_add(vm, ram, BYTES, MEMD_RAM_FRESH), 0);
    for (uint32_t i = 0; i < PAGES; i++)
        bytes_fill(ram + i * PAGE_BYTES, i + 1);
}

static struct memd_status status(void)
{
    struct memd_status now = {.size = sizeof(now)};

    cr_assert_eq(memd_get_status(vm, &now), 0);
    return now;
}

#define UNTIL(condition)                                           \
    do {                                                           \
        int tries_;                                                \
        for (tries_ = 0; tries_ < 20000 && !(condition); tries_++) \
            usleep(1000);                                          \
        cr_assert((condition), "never came: %s", #condition);      \
    } while (0)

/* The pages from `from` on are in the store. */
static void share(uint32_t from)
{
    int fd = bytes_segment(PAGES, 1, ALL_SEALS);

    UNTIL(status().connected == 1 && memd.fd >= 0);
    memd_end_give(&memd, 1, PAGES, fd);
    /* Again until the scanner has armed the memory, and all that was busy is not. */
    for (int tries = 0; tries < 400 && status().shared < PAGES - from; tries++) {
        memd_end_merge(&memd, from, SLOT(1, from), PAGES - from);
        usleep(50000);
    }
    cr_assert_eq(status().shared, PAGES - from);
    close(fd);
}

static void tear_down(void)
{
    cr_assert_eq(memd_detach(vm), 0);
    memd_end_stop(&memd);
}

/* ---- attach and detach ---- */

Test(linked, options_that_are_wrong, .timeout = 60)
{
    char long_path[200];
    struct memd_options good = {.size = sizeof(good), .socket = "/nonexistent"}, bad = good;
    struct memd_ops half = {.size = sizeof(half)};

    vm = NULL;
    cr_assert_eq(memd_attach(NULL, &vm), -EINVAL);
    cr_assert_eq(memd_attach(&good, NULL), -EINVAL);
    bad.size = 3;
    cr_assert_eq(memd_attach(&bad, &vm), -EINVAL);
    bad.size = SIZE_MAX;
    cr_assert_eq(memd_attach(&bad, &vm), -E2BIG);
    bad = good;
    bad.token = "0123456789abcdef0123456789abcde";
    cr_assert_eq(memd_attach(&bad, &vm), -EINVAL, "a token that is too short");
    bad.token = "0123456789abcdef0123456789abcdeg";
    cr_assert_eq(memd_attach(&bad, &vm), -EINVAL, "a token with a letter that is none");
    memset(long_path, 'x', sizeof(long_path));
    long_path[sizeof(long_path) - 1] = '\0';
    bad = good;
    bad.socket = long_path;
    cr_assert_eq(memd_attach(&bad, &vm), -EINVAL);
    bad = good;
    bad.ops = &half;
    half.pause = (int (*)(void *))(uintptr_t)1;
    cr_assert_eq(memd_attach(&bad, &vm), -EINVAL, "half of a pair of hooks");
    cr_assert_null(vm);
}

Test(linked, attach_twice, .timeout = 60)
{
    struct memd_vm *first;

    set_up_with(NULL);
    first = vm;
    cr_assert_eq(attach(NULL), -EBUSY);
    cr_assert_eq(vm, first);
    tear_down();
}

Test(linked, detach_with_shared_pages_and_what_is_called_afterwards, .timeout = 60)
{
    struct memd_status now = {.size = sizeof(now)};
    struct memd_vm *gone;

    set_up_with(NULL);
    share(0);
    gone = vm;
    cr_assert_eq(memd_detach(vm), 0);
    holds_all(0);
    memset(ram, 0, BYTES); /* it is plain memory again */
    cr_assert_eq(memd_detach(gone), -EBADF);
    cr_assert_eq(memd_get_status(gone, &now), -EBADF);
    cr_assert_eq(memd_ram_add(gone, ram, BYTES, 0), -EBADF);
    cr_assert_eq(memd_ram_remove(gone, ram, BYTES), -EBADF);
    cr_assert_eq(memd_ram_discard(gone, ram, BYTES), -EBADF);
    cr_assert_eq(memd_ram_discard(NULL, ram, BYTES), -EBADF);
    cr_assert_eq(attach(NULL), 0, "it may come again");
    cr_assert_eq(memd_ram_add(vm, ram, BYTES, 0), 0);
    tear_down();
}

/* ---- RAM ---- */

Test(linked, ram_that_is_shared_is_taken_away_whole_and_once, .timeout = 60)
{
    set_up_with(NULL);
    share(0);
    cr_assert_eq(memd_ram_remove(vm, ram, BYTES / 2), -ENOENT);
    cr_assert_eq(memd_ram_remove(vm, ram + PAGE_BYTES, BYTES - PAGE_BYTES), -ENOENT);
    cr_assert_eq(memd_ram_remove(vm, ram + 1, BYTES), -ENOENT);
    cr_assert_eq(memd_ram_remove(vm, NULL, BYTES), -ENOENT);
    cr_assert_eq(memd_ram_remove(vm, &vm, BYTES), -ENOENT, "never registered");
    cr_assert_eq(status().shared, PAGES, "nothing of that did anything");
    cr_assert_eq(memd_ram_remove(vm, ram, BYTES), 0);
    holds_all(0);
    cr_assert_eq(status().pages, 0);
    cr_assert_eq(memd_ram_remove(vm, ram, BYTES), -ENOENT, "twice");
    cr_assert_eq(munmap(ram, BYTES), 0);
    tear_down();
}

Test(linked, ranges_that_can_not_be_registered, .timeout = 60)
{
    uint8_t *other, *file;

    set_up_with(NULL);
    other = map(4 * PAGE_BYTES);
    cr_assert_eq(memd_ram_add(vm, other + 1, PAGE_BYTES, 0), -EINVAL);
    cr_assert_eq(memd_ram_add(vm, other, PAGE_BYTES + 1, 0), -EINVAL);
    cr_assert_eq(memd_ram_add(vm, other, 0, 0), -EINVAL);
    cr_assert_eq(memd_ram_add(vm, NULL, PAGE_BYTES, 0), -EINVAL);
    cr_assert_eq(memd_ram_add(vm, other, SIZE_MAX / PAGE_BYTES * PAGE_BYTES, 0), -EINVAL);
    cr_assert_eq(memd_ram_add(vm, other, PAGE_BYTES, 1U << 31), -EINVAL,
                 "a flag of a newer version");
    /* In front of it, behind it, in it, around it, the same. */
    cr_assert_eq(memd_ram_add(vm, ram - PAGE_BYTES, 2 * PAGE_BYTES, 0), -EEXIST);
    cr_assert_eq(memd_ram_add(vm, ram + BYTES - PAGE_BYTES, 2 * PAGE_BYTES, 0), -EEXIST);
    cr_assert_eq(memd_ram_add(vm, ram + PAGE_BYTES, PAGE_BYTES, MEMD_RAM_FRESH), -EEXIST);
    cr_assert_eq(memd_ram_add(vm, ram - PAGE_BYTES, BYTES + 2 * PAGE_BYTES, 0), -EEXIST);
    cr_assert_eq(memd_ram_add(vm, ram, BYTES, MEMD_RAM_FRESH), -EEXIST);
    munmap(other + PAGE_BYTES, PAGE_BYTES);
    cr_assert_eq(memd_ram_add(vm, other, 4 * PAGE_BYTES, 0), -EFAULT);
    mprotect(other, PAGE_BYTES, PROT_READ);
    cr_assert_eq(memd_ram_add(vm, other, PAGE_BYTES, 0), -EINVAL);
    file = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    cr_assert_eq(memd_ram_add(vm, file, PAGE_BYTES, 0), -EINVAL);
    cr_assert_eq(status().pages, PAGES);
    holds_all(0);
    tear_down();
}

#define PLUGGED 24U

struct plug {
    pthread_barrier_t *together;
    uint8_t *at;
    int result;
};

static void *plug(void *context)
{
    struct plug *own = context;

    pthread_barrier_wait(own->together);
    own->result = memd_ram_add(vm, own->at, 2 * PAGE_BYTES, 0);
    return NULL;
}

Test(linked, ram_that_threads_register_at_once_is_not_mixed_up, .timeout = 60)
{
    pthread_t threads[PLUGGED];
    struct plug plugs[PLUGGED];
    pthread_barrier_t together;

    set_up_with(NULL);
    pthread_barrier_init(&together, NULL, PLUGGED);
    for (uint32_t i = 0; i < PLUGGED; i++) {
        plugs[i] = (struct plug){.together = &together, .at = map(4 * PAGE_BYTES)};
        cr_assert_eq(pthread_create(&threads[i], NULL, plug, &plugs[i]), 0);
    }
    for (uint32_t i = 0; i < PLUGGED; i++) {
        pthread_join(threads[i], NULL);
        cr_assert_eq(plugs[i].result, 0);
    }
    cr_assert_eq(status().pages, PAGES + 2 * PLUGGED);
    for (uint32_t i = 0; i < PLUGGED; i++)
        cr_assert_eq(memd_ram_remove(vm, plugs[i].at, 2 * PAGE_BYTES), 0, "block %u", i);
    holds_all(0);
    tear_down();
}

/* As where the kernel had copied the page before it was protected. */
static void make_captive(uint32_t index)
{
    struct ram_block *block = ram_find(&vm->ram, ram + index * PAGE_BYTES);

    lock_take(&block->lock);
    uffd_protect(vm->ram.store_fd, ram_address(block, index), PAGE_BYTES, false);
    ram_move_places(&vm->ram, block, index, 1, TRANSITION_BREAK);
    ram_set_captive(block, index, true);
    lock_release(&block->lock);
}

Test(linked, ram_with_a_captive_page_is_taken_away_as_well, .timeout = 60)
{
    set_up_with(NULL);
    share(0);
    make_captive(5);
    cr_assert_eq(memd_ram_remove(vm, ram, BYTES), 0);
    holds_all(0);
    cr_assert_eq(status().pages, 0, "nothing is left of it");
    cr_assert_eq(status().captives, 0);
    cr_assert_eq(munmap(ram, BYTES), 0);
    cr_assert_eq(mmap(ram, BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
                 (void *)ram);
    cr_assert_eq(memd_ram_add(vm, ram, BYTES, MEMD_RAM_FRESH), 0);
    cr_assert_eq(ram[5 * PAGE_BYTES], 0);
    tear_down();
}

Test(linked, a_discard_goes_no_further_than_it_was_told, .timeout = 60)
{
    uint8_t *around;

    set_up_with(NULL);
    share(0);
    cr_assert_eq(memd_ram_discard(vm, ram + 1, PAGE_BYTES), -EINVAL);
    cr_assert_eq(memd_ram_discard(vm, ram, 0), -EINVAL);
    cr_assert_eq(memd_ram_discard(vm, ram, SIZE_MAX), -EINVAL);
    cr_assert_eq(memd_ram_discard(vm, NULL, PAGE_BYTES), -EINVAL);
    holds_all(0);
    cr_assert_eq(memd_ram_discard(vm, ram, 3 * PAGE_BYTES + 1), 0);
    for (size_t i = 0; i < 4 * PAGE_BYTES; i++)
        cr_assert_eq(ram[i], 0, "a discarded page shows the store");
    holds_all(4);
    /* Beyond what is registered there is other memory, and then none. */
    around = map(8 * PAGE_BYTES);
    memset(around, 5, 8 * PAGE_BYTES);
    cr_assert_eq(memd_ram_add(vm, around + 2 * PAGE_BYTES, PAGE_BYTES, 0), 0);
    munmap(around + 4 * PAGE_BYTES, PAGE_BYTES);
    cr_assert_eq(memd_ram_discard(vm, around + PAGE_BYTES, 5 * PAGE_BYTES), -ENOMEM);
    cr_assert_eq(around[0], 5);
    cr_assert_eq(around[PAGE_BYTES] + around[2 * PAGE_BYTES] + around[3 * PAGE_BYTES], 0);
    cr_assert_eq(around[5 * PAGE_BYTES], 0);
    cr_assert_eq(around[6 * PAGE_BYTES], 5);
    tear_down();
}

/* What goes wrong in a child has a number. */
static int be_a_child(void)
{
    struct memd_status now = {.size = sizeof(now)};

    if (memd_ram_add(vm, ram, BYTES, 0) != -EAGAIN)
        return 1;
    if (memd_ram_remove(vm, ram, BYTES) != -EAGAIN)
        return 2;
    if (memd_get_status(vm, &now) != -EAGAIN || memd_detach(vm) != -EAGAIN)
        return 3;
    if (attach(NULL) != -EBUSY)
        return 4;
    if (memd_ram_discard(vm, ram, 2 * PAGE_BYTES) != 0 || ram[0] || ram[2 * PAGE_BYTES - 1])
        return 5;
    ram[2 * PAGE_BYTES] = 0x77; /* a shared page of the child's own */
    for (uint32_t i = 3; i < PAGES; i++) {
        if (!bytes_hold(ram + i * PAGE_BYTES, i + 1))
            return 6;
    }
    return 0;
}

Test(linked, a_child_manages_nothing_and_harms_nothing, .timeout = 60)
{
    int ended = -1;
    pid_t pid;

    set_up_with(NULL);
    share(0);
    pid = fork();
    if (pid == 0)
        _exit(be_a_child());
    waitpid(pid, &ended, 0);
    cr_assert_eq(ended, 0, "in the child: %d", WEXITSTATUS(ended));
    holds_all(0);
    cr_assert_eq(status().shared, PAGES);
    tear_down();
}

/* What the VMM keeps from its children isn't there, and what a child has mapped since is its own.
 */
static int be_a_child_without_ram(int file)
{
    char *mine =
        mmap(ram, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0);

    if (mine != (char *)ram)
        return 1;
    strcpy(mine, "mine");
    if (memd_ram_discard(vm, ram, PAGE_BYTES) != 0)
        return 2;
    return strcmp(mine, "mine") == 0 ? 0 : 3; /* of a file, a discard loses nothing */
}

Test(linked, a_child_that_did_not_get_the_ram_has_other_memory_there, .timeout = 60)
{
    int ended = -1, file = memfd_create("memd-child", MFD_CLOEXEC);
    pid_t pid;

    cr_assert_eq(ftruncate(file, BYTES), 0);
    dont_fork = true;
    set_up_with(NULL);
    share(0);
    pid = fork();
    if (pid == 0)
        _exit(be_a_child_without_ram(file));
    waitpid(pid, &ended, 0);
    cr_assert_eq(ended, 0, "in the child: %d", WEXITSTATUS(ended));
    holds_all(0);
    tear_down();
    close(file);
}

/* A child that libc did not make: nothing was told of the fork. */
Test(linked, a_child_by_clone_harms_nothing_either, .timeout = 60)
{
    int ended = -1;
    pid_t pid;

    set_up_with(NULL);
    share(0);
    pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (pid == 0)
        _exit(be_a_child());
    waitpid(pid, &ended, 0);
    cr_assert_eq(ended, 0, "in the child: %d", WEXITSTATUS(ended));
    holds_all(0);
    cr_assert_eq(status().shared, PAGES);
    tear_down();
}

/* ---- hooks ---- */

static int hook_answer, hook_detach = 1, hook_asked;
static bool hook_waits;
static sem_t hook_waiting, hook_released;

static int on_pinned(void *opaque, const void *addr, size_t bytes)
{
    struct memd_status now = {.size = sizeof(now)};

    (void)opaque;
    (void)addr;
    (void)bytes;
    __atomic_add_fetch(&hook_asked, 1, __ATOMIC_RELAXED);
    if (__atomic_load_n(&hook_waits, __ATOMIC_ACQUIRE)) {
        sem_post(&hook_waiting);
        while (sem_wait(&hook_released) && errno == EINTR)
            ;
    }
    if (hook_detach == 0 && vm)
        hook_detach = memd_get_status(vm, &now) == 0 ? memd_detach(vm) : 1;
    return hook_answer;
}

static const struct memd_ops ops = {.size = sizeof(ops), .pinned = on_pinned};

Test(linked, a_hook_that_lies_ends_the_sharing_and_nothing_else, .timeout = 60)
{
    set_up_with(&ops);
    share(PAGES / 2);
    hook_answer = 42;
    for (int tries = 0; tries < 400 && !memd_end_heard(&memd, "'pinned'"); tries++) {
        memd_end_merge(&memd, 0, SLOT(1, 0), 8);
        bytes_fill(ram + (PAGES - 1) * PAGE_BYTES, PAGES); /* a share ends meanwhile */
        usleep(50000);
    }
    cr_assert(memd_end_heard(&memd, "'pinned'"), "the offence is told to memd");
    hook_asked = hook_answer = 0;
    memd_end_merge(&memd, 0, SLOT(1, 0), PAGES / 2);
    UNTIL(status().passes > 3);
    cr_assert_eq(hook_asked, 0, "it is not asked again");
    cr_assert_leq(status().shared, PAGES / 2);
    holds_all(0);
    tear_down();
}

/* The agent may wait for the rest of a huge page, but not for ever. */
Test(linked, the_beginning_of_a_huge_page_is_merged_though_the_rest_never_comes, .timeout = 60)
{
    size_t bytes = 2 * HUGE_BYTES;
    uint8_t *at;
    int fd = bytes_segment(PAGES, 1, ALL_SEALS);

    memd_end_start(&memd);
    if (attach(NULL) < 0)
        cr_skip_test("no agent on this kernel");
    at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    at = (uint8_t *)(((uintptr_t)at + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    madvise(at, HUGE_BYTES, MADV_HUGEPAGE);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        bytes_fill(at + i * PAGE_BYTES, i + 1);
    cr_assert_eq(memd_ram_add(vm, at, HUGE_BYTES, 0), 0);
    UNTIL(status().connected == 1 && memd.fd >= 0);
    memd_end_give(&memd, 1, PAGES, fd);
    for (int tries = 0; tries < 400 && status().shared < 8; tries++) {
        memd_end_merge(&memd, 0, SLOT(1, 0), 8);
        usleep(50000);
    }
    cr_assert_eq(status().shared, 8);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        cr_assert(bytes_hold(at + i * PAGE_BYTES, i + 1));
    close(fd);
    tear_down();
}

/* Pages that go to slots all over the store take two mappings each. */
Test(linked, scattered_pages_are_merged_as_far_as_the_mappings_last, .timeout = 60)
{
    int fd = bytes_segment(PAGES, 1, ALL_SEALS);
    uint32_t slots[PAGES], limit;

    set_up_with(NULL);
    for (uint32_t i = 0; i < PAGES; i++) { /* backwards */
        slots[i] = SLOT(1, PAGES - 1 - i);
        bytes_fill(ram + i * PAGE_BYTES, PAGES - i);
    }
    UNTIL(status().connected == 1 && memd.fd >= 0 && status().passes > 0 && vm->vmas > 0);
    limit = 2 * vm->vmas + 80; /* from the half on single pages are not worth it */
    cr_assert_lt(limit, vm->vmas + 2 * PAGES);
    vm->vma_limit = limit;
    memd_end_give(&memd, 1, PAGES, fd);
    for (int tries = 0; tries < 400 && !memd_end_heard(&memd, "VMA budget"); tries++) {
        memd_end_merge_scattered(&memd, 0, slots, PAGES);
        usleep(50000);
    }
    cr_assert(memd_end_heard(&memd, "VMA budget"));
    cr_assert_gt(status().shared, 10);
    cr_assert_leq((uint32_t)procfs_count_vmas(), limit, "%d VMAs", procfs_count_vmas());
    for (uint32_t i = 0; i < PAGES; i++)
        cr_assert(bytes_hold(ram + i * PAGE_BYTES, PAGES - i), "page %u has other bytes", i);
    close(fd);
    tear_down();
}

Test(linked, a_pass_that_changes_nothing_says_nothing, .timeout = 60)
{
    uint32_t passes, said;

    set_up_with(NULL);
    share(0);
    memd_end_tune(&memd, 10);
    passes = status().passes;
    UNTIL(status().passes > passes + 20); /* what was shared last is told of */
    passes = status().passes;
    said = __atomic_load_n(&memd.messages, __ATOMIC_ACQUIRE);
    UNTIL(status().passes >= passes + 80);
    said = __atomic_load_n(&memd.messages, __ATOMIC_ACQUIRE) - said;
    cr_assert_geq(said, 8, "each eighth is told of");
    cr_assert_leq(said, 40, "%u messages", said);
    tear_down();
}

Test(linked, a_hook_that_wants_to_detach, .timeout = 60)
{
    hook_detach = 0;
    set_up_with(&ops);
    share(0);
    cr_assert_eq(hook_detach, -EDEADLK);
    holds_all(0);
    tear_down();
}

Test(linked, a_hook_that_does_not_return_does_not_stop_the_guest, .timeout = 60)
{
    sem_init(&hook_waiting, 0, 0);
    sem_init(&hook_released, 0, 0);
    set_up_with(&ops);
    share(PAGES / 2);
    __atomic_store_n(&hook_waits, true, __ATOMIC_RELEASE);
    memd_end_merge(&memd, 0, SLOT(1, 0), PAGES / 2);
    while (sem_wait(&hook_waiting) && errno == EINTR)
        ;
    /* The scanner is in the hook. Writes to shared pages, discards and removals go on. */
    for (uint32_t i = 0; i < PAGES; i++)
        bytes_fill(ram + i * PAGE_BYTES, i + 1);
    cr_assert_eq(status().shared, 0);
    cr_assert_eq(memd_ram_discard(vm, ram, PAGE_BYTES), 0);
    cr_assert_eq(ram[0], 0);
    holds_all(1);
    __atomic_store_n(&hook_waits, false, __ATOMIC_RELEASE);
    sem_post(&hook_released);
    tear_down();
    holds_all(1);
}
