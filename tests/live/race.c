/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The race test: merges and breaks against everybody who can write to a guest's memory.
 *
 * This process is the VMM and the guest. One thread merges runs of pages with the store, as fast as
 * it can. Against it work, each on pages of its own, whose content it always knows:
 *   thread    stores of eight bytes, taken back later
 *   direct    O_DIRECT reads from a file into the pages
 *   fixed     io_uring reads into registered (pinned) buffers, registered anew all the time
 *   outside   another process, by process_vm_writev
 *   discard   pages given up (read as zeros) and filled again
 *   fork      forks; the children check a part that nobody changes, write to it, and look again
 *   huge      stores, and O_DIRECT reads, into huge pages, which are made anew all the time
 * A page alternates between the content that its slot of the store has and one that it has not.
 * Whoever finds a byte that is not the one it put there says so and ends the run.
 *
 * usage: race [--merges N] [--file PATH] [--huge] [--no-freeze]
 * With --huge there are only these last ones, and they are merged whole only.
 * With --no-freeze pages are compared in place and mapped without having been frozen: the test then
 * has to find lost bytes.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <liburing.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "discard.h"
#include "freeze.h"
#include "merge_row.h"
#include "race_parts.h"

#define SLOTS 1024U
enum {
    PART_THREAD_A,
    PART_THREAD_B,
    PART_DIRECT,
    PART_FIXED,
    PART_OUTSIDE,
    PART_DISCARD,
    PART_FORK,
    PART_HUGE,
    PART_COUNT
};
#define PART_PAGES 1024U
#define PAGES      8192U

static_assert(PAGES == PART_COUNT * PART_PAGES, "each part has its pages");

static const char *const part_names[PART_COUNT] = {"thread",  "thread",  "direct", "fixed",
                                                   "outside", "discard", "fork",   "huge"};

static uint64_t wanted_merges = 200000;
static bool no_freeze;
static bool only_huge;
static const char *direct_path;
static int direct_fd = -1;

/* Shared with the process outside. */
static struct shared {
    uint32_t stop;
    uint32_t errors;
    uint64_t rounds[PART_COUNT];
} * shared;

static void fill(void *page, uint32_t content)
{
    uint32_t *words = page;

    for (uint32_t i = 0; i < PAGE_BYTES / 4; i++)
        words[i] = content * 2654435761U + i;
}

/* The content of a page's slot, and the other one. */
static void fill_version(void *page, uint32_t index, bool other)
{
    fill(page, index % SLOTS + 1);
    if (other)
        for (size_t at = 0; at < PAGE_BYTES; at += 512)
            ((uint8_t *)page)[at + index % 512] ^= 0xff;
}

static bool stopped(void)
{
    return __atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE);
}

static void fail(int part, uint32_t index, const char *what)
{
    __atomic_add_fetch(&shared->errors, 1, __ATOMIC_ACQ_REL);
    __atomic_store_n(&shared->stop, 1, __ATOMIC_RELEASE);
    printf("race: %s: page %u: %s\n", part_names[part], index, what);
    fflush(stdout);
}

static bool check(int part, uint32_t index, const void *want, const void *got)
{
    if (memcmp(want, got, PAGE_BYTES) == 0)
        return true;
    fail(part, index, "a byte is not the one that was put there");
    return false;
}

/* A page that the kernel copied before it was protected can't be merged again until it is given
 * up. Its owner, who has nothing under way in it, does that now and then. */
static void free_captive(uint32_t index)
{
    if (!ram_captive(block, index))
        return;
    lock_take(&block->lock);
    discard_pages(&ram, block, index, 1, MADV_DONTNEED);
    lock_release(&block->lock);
    fill_version(ram_address(block, index), index, false);
}

static uint32_t part_first(int part)
{
    return (uint32_t)part * PART_PAGES;
}

/* ---- threads ---- */

static void *write_in_threads(void *context)
{
    int part = (int)(intptr_t)context;
    uint32_t random = 77 + (uint32_t)part;
    uint8_t want[PAGE_BYTES];

    while (!stopped()) {
        uint32_t first = part_first(part) + next_random(&random) % (PART_PAGES - 64);
        uint32_t pages = next_random(&random) % 64 + 1;
        for (uint32_t i = first; i < first + pages && !stopped(); i++) {
            volatile uint64_t *word =
                (uint64_t *)ram_address(block, i) + next_random(&random) % (PAGE_BYTES / 8);
            uint64_t before;
            free_captive(i);
            before = *word;
            fill_version(want, i, false);
            if (!check(part, i, want, ram_address(block, i)))
                return NULL;
            *word = ~before;
            for (uint32_t spin = next_random(&random) % 200; spin > 0; spin--)
                __asm__ volatile("" ::: "memory");
            if (*word != ~before) {
                fail(part, i, "a store is lost");
                return NULL;
            }
            *word = before;
        }
        shared->rounds[part]++;
    }
    return NULL;
}

/* ---- direct I/O ---- */

static int make_versions_file(void)
{
    static uint8_t page[PAGE_BYTES] __attribute__((aligned(4096)));
    int fd = open(direct_path, O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0600);

    if (fd < 0)
        return -errno;
    for (uint32_t i = 0; i < 2 * SLOTS; i++) {
        fill_version(page, i % SLOTS, i >= SLOTS);
        if (pwrite(fd, page, PAGE_BYTES, i * (off_t)PAGE_BYTES) != (ssize_t)PAGE_BYTES)
            return -EIO;
    }
    fsync(fd);
    close(fd);
    fd = open(direct_path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

static off_t version_offset(uint32_t index, bool other)
{
    return (off_t)((other ? SLOTS : 0) + index % SLOTS) * (off_t)PAGE_BYTES;
}

static bool read_both_versions(uint32_t part, uint32_t index, int fd)
{
    uint8_t want[PAGE_BYTES];

    for (int other = 1; other >= 0; other--) {
        if (pread(fd, ram_address(block, index), PAGE_BYTES, version_offset(index, other)) !=
            (ssize_t)PAGE_BYTES) {
            fail(part, index, strerror(errno));
            return false;
        }
        fill_version(want, index, other);
        if (!check(part, index, want, ram_address(block, index)))
            return false;
    }
    return true;
}

static void *read_directly(void *context)
{
    int fd = (int)(intptr_t)context;
    uint32_t random = 4711;

    while (!stopped()) {
        uint32_t i = part_first(PART_DIRECT) + next_random(&random) % PART_PAGES;
        free_captive(i);
        if (!read_both_versions(PART_DIRECT, i, fd))
            return NULL;
        shared->rounds[PART_DIRECT]++;
    }
    return NULL;
}

/* ---- io_uring with registered buffers ---- */

#define FIXED_BUFFERS 16U

static bool read_fixed(struct io_uring *ring, int fd, uint32_t buffer, uint32_t index, bool other)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    struct io_uring_cqe *cqe;
    int result;

    io_uring_prep_read_fixed(sqe, fd, ram_address(block, index), PAGE_BYTES,
                             (uint64_t)version_offset(index, other), (int)buffer);
    io_uring_submit(ring);
    if (io_uring_wait_cqe(ring, &cqe) < 0)
        return false;
    result = cqe->res;
    io_uring_cqe_seen(ring, cqe);
    return result == (int)PAGE_BYTES;
}

static void *read_into_fixed_buffers(void *context)
{
    int fd = (int)(intptr_t)context;
    struct io_uring ring;
    uint32_t random = 99;
    uint8_t want[PAGE_BYTES];

    if (io_uring_queue_init(8, &ring, 0) < 0) {
        printf("race: no io_uring here: fixed buffers are left out\n");
        return NULL;
    }
    while (!stopped()) {
        uint32_t first =
            part_first(PART_FIXED) + next_random(&random) % (PART_PAGES - FIXED_BUFFERS);
        struct iovec buffers[FIXED_BUFFERS];
        for (uint32_t b = 0; b < FIXED_BUFFERS; b++)
            free_captive(first + b);
        for (uint32_t b = 0; b < FIXED_BUFFERS; b++)
            buffers[b] = (struct iovec){ram_address(block, first + b), PAGE_BYTES};
        if (io_uring_register_buffers(&ring, buffers, FIXED_BUFFERS) < 0) {
            fail(PART_FIXED, first, "buffers can't be registered");
            break;
        }
        for (uint32_t k = 0; k < 2 * FIXED_BUFFERS && !stopped(); k++) {
            uint32_t b = k / 2;
            bool other = k % 2 == 0;
            if (!read_fixed(&ring, fd, b, first + b, other)) {
                fail(PART_FIXED, first + b, "a read failed");
                break;
            }
            fill_version(want, first + b, other);
            check(PART_FIXED, first + b, want, ram_address(block, first + b));
        }
        io_uring_unregister_buffers(&ring);
        shared->rounds[PART_FIXED]++;
    }
    io_uring_queue_exit(&ring);
    return NULL;
}

/* ---- another process ---- */

static bool outside_copy(pid_t pid, uint32_t index, void *bytes, bool write)
{
    struct iovec local = {bytes, PAGE_BYTES};
    struct iovec remote = {ram_address(block, index), PAGE_BYTES};
    ssize_t done = write ? process_vm_writev(pid, &local, 1, &remote, 1, 0)
                         : process_vm_readv(pid, &local, 1, &remote, 1, 0);

    return done == (ssize_t)PAGE_BYTES;
}

static void write_from_outside(pid_t pid)
{
    uint32_t random = 31;
    uint8_t want[PAGE_BYTES];
    uint8_t got[PAGE_BYTES];

    while (!stopped()) {
        uint32_t i = part_first(PART_OUTSIDE) + next_random(&random) % PART_PAGES;
        for (int other = 1; other >= 0; other--) {
            fill_version(want, i, other);
            if (!outside_copy(pid, i, want, true) || !outside_copy(pid, i, got, false)) {
                fail(PART_OUTSIDE, i, strerror(errno));
                _exit(1);
            }
            if (!check(PART_OUTSIDE, i, want, got))
                _exit(1);
        }
        shared->rounds[PART_OUTSIDE]++;
    }
    _exit(0);
}

/* ---- discards ---- */

static void *discard(void *context)
{
    static const uint8_t zeros[PAGE_BYTES];
    uint32_t random = 5;
    uint8_t want[PAGE_BYTES];

    (void)context;
    while (!stopped()) {
        uint32_t first = part_first(PART_DISCARD) + next_random(&random) % (PART_PAGES - 32);
        uint32_t pages = next_random(&random) % 32 + 1;
        lock_take(&block->lock);
        if (discard_pages(&ram, block, first, pages, MADV_DONTNEED) < 0)
            fail(PART_DISCARD, first, "the discard failed");
        lock_release(&block->lock);
        for (uint32_t i = first; i < first + pages && !stopped(); i++) {
            check(PART_DISCARD, i, zeros, ram_address(block, i));
            fill_version(ram_address(block, i), i, false);
            fill_version(want, i, false);
            check(PART_DISCARD, i, want, ram_address(block, i));
        }
        shared->rounds[PART_DISCARD]++;
    }
    return NULL;
}

/* ---- forks ---- */

/* After a fork the kernel holds all pages for shared until they are written to; nobody writes to
 * these otherwise. */
static void make_exclusive(void)
{
    for (uint32_t i = part_first(PART_FORK); i < part_first(PART_FORK) + PART_PAGES; i++) {
        free_captive(i);
        __atomic_fetch_or(ram_address(block, i), 0, __ATOMIC_RELAXED);
    }
}

static void child_checks(void)
{
    uint8_t want[PAGE_BYTES];

    for (uint32_t i = part_first(PART_FORK); i < part_first(PART_FORK) + PART_PAGES; i += 7) {
        uint8_t *page = ram_address(block, i);
        fill_version(want, i, false);
        if (!check(PART_FORK, i, want, page))
            _exit(1);
        page[i % PAGE_BYTES] ^= 1;
        want[i % PAGE_BYTES] ^= 1;
        if (!check(PART_FORK, i, want, page))
            _exit(1);
    }
    _exit(0);
}

static void *fork_again_and_again(void *context)
{
    (void)context;
    while (!stopped()) {
        pid_t child;
        int status;

        ram_lock_all(&ram);
        child = fork();
        if (child == 0) {
            ram_reset_locks(&ram);
            child_checks();
        }
        ram_unlock_all(&ram);
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
            fail(PART_FORK, 0, "a child failed");
            return NULL;
        }
        shared->rounds[PART_FORK]++;
        make_exclusive();
        poll(NULL, 0, 300);
    }
    return NULL;
}

/* ---- huge pages ---- */

#define HUGE_WRITES 4U

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

/* Gives the chunk up and fills it while it is not armed; makes one huge page of it, if there is
 * one. */
static void make_huge(uint32_t first)
{
    lock_take(&block->lock);
    if (discard_pages(&ram, block, first, HUGE_PAGES, MADV_DONTNEED) < 0)
        fail(PART_HUGE, first, "the discard failed");
    lock_release(&block->lock);
    for (uint32_t i = first; i < first + HUGE_PAGES; i++)
        fill_version(ram_address(block, i), i, false);
    madvise(ram_address(block, first), HUGE_BYTES, MADV_COLLAPSE);
    lock_take(&block->lock);
    if (remap_arm(&ram, block, first, HUGE_PAGES) < 0)
        fail(PART_HUGE, first, "it can't be armed");
    block->chunks[ram_chunk_of(block, first)].state = CHUNK_ARMED;
    ram_move_places(&ram, block, first, HUGE_PAGES, TRANSITION_POPULATE);
    lock_release(&block->lock);
}

/* Some stores that stay for a moment: a merge that meets them has to give these pages back. */
static bool write_in_huge(uint32_t first, uint32_t *random)
{
    volatile uint64_t *words[HUGE_WRITES];
    uint64_t before[HUGE_WRITES];

    for (uint32_t k = 0; k < HUGE_WRITES; k++) {
        uint32_t at = k * (uint32_t)HUGE_PAGES / HUGE_WRITES + next_random(random) % 128;
        words[k] = (uint64_t *)ram_address(block, first + at) + next_random(random) % 512;
        before[k] = *words[k];
        *words[k] = ~before[k];
    }
    for (uint32_t spin = next_random(random) % 20000; spin > 0; spin--)
        __asm__ volatile("" ::: "memory");
    for (uint32_t k = 0; k < HUGE_WRITES; k++) {
        if (*words[k] != ~before[k]) {
            fail(PART_HUGE, first, "a store is lost");
            return false;
        }
        *words[k] = before[k];
    }
    return true;
}

static bool read_into_huge(uint32_t index)
{
    return direct_fd < 0 || read_both_versions(PART_HUGE, index, direct_fd);
}

static void *work_in_huge_pages(void *context)
{
    uint32_t random = 1234;
    uint8_t want[PAGE_BYTES];

    (void)context;
    while (!stopped()) {
        uint32_t half = next_random(&random) % 2 * (uint32_t)HUGE_PAGES;
        uint32_t first = part_first(PART_HUGE) + half;
        make_huge(first);
        for (uint32_t k = next_random(&random) % 32; k > 0 && !stopped(); k--)
            if (!write_in_huge(first, &random) ||
                (k % 8 == 0 && !read_into_huge(first + next_random(&random) % HUGE_PAGES)))
                return NULL;
        for (uint32_t i = first; i < first + HUGE_PAGES; i++) {
            fill_version(want, i, false);
            if (!check(PART_HUGE, i, want, ram_address(block, i)))
                return NULL;
        }
        shared->rounds[PART_HUGE]++;
    }
    return NULL;
}

/* ---- the merger ---- */

/* merge_without_freeze for a whole chunk. */
static void merge_huge_without_freeze(uint32_t index, uint32_t slot)
{
    uint8_t *view = segments_view(&segments, slot, HUGE_PAGES);
    uint32_t slots[HUGE_PAGES];

    lock_take(&block->lock);
    for (uint32_t i = 0; i < HUGE_PAGES; i++) {
        slots[i] = slot + i;
        if (ram_place(block, index + i) != PLACE_PRIVATE || ram_captive(block, index + i)) {
            lock_release(&block->lock);
            return;
        }
    }
    if (memcmp(ram_address(block, index), view, HUGE_BYTES) == 0 &&
        remap_map(&ram, block, index, HUGE_PAGES, view) == 0)
        stats.merges += HUGE_PAGES - remap_protect(&ram, block, index, HUGE_PAGES, slots);
    lock_release(&block->lock);
}

static void merge_huge(uint32_t *random)
{
    uint32_t half = next_random(random) % 2 * (uint32_t)HUGE_PAGES;
    uint32_t index = part_first(PART_HUGE) + half;
    uint8_t outcomes[HUGE_PAGES];

    if (no_freeze)
        merge_huge_without_freeze(index, SLOT(1, index % SLOTS));
    else
        merge_row(&ram, &segments, block, index, SLOT(1, index % SLOTS), HUGE_PAGES, outcomes,
                  &stats);
}

/* Each content is in the store twice: pages that follow each other need not do so there. */
static void merge_here_and_there(uint32_t index, uint32_t pages, uint32_t *random)
{
    uint8_t outcomes[FREEZE_MAX_PAGES];
    uint32_t slots[FREEZE_MAX_PAGES];
    uint32_t copy = 0;

    for (uint32_t i = 0; i < pages; i++) {
        if (next_random(random) % 4 == 0)
            copy = SLOTS - copy;
        slots[i] = SLOT(1, copy + (index + i) % SLOTS);
    }
    merge_pages(&ram, &segments, block, index, slots, pages, outcomes, &stats);
}

static void merge_some(uint32_t *random)
{
    uint8_t outcomes[FREEZE_MAX_PAGES];
    uint32_t pages = next_random(random) % FREEZE_MAX_PAGES + 1;
    uint32_t index = next_random(random) % (PAGES - FREEZE_MAX_PAGES);
    uint32_t slot = index % SLOTS;

    if (only_huge || next_random(random) % 8 == 0) {
        merge_huge(random);
        return;
    }
    if (slot + pages > SLOTS)
        pages = SLOTS - slot;
    if (no_freeze)
        merge_without_freeze(index, SLOT(1, slot), pages);
    else if (next_random(random) % 2)
        merge_here_and_there(index, pages, random);
    else
        merge_row(&ram, &segments, block, index, SLOT(1, slot), pages, outcomes, &stats);
}

/* ---- setting up ---- */

static int make_store(void)
{
    int fd = memfd_create("memd-race", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t page[PAGE_BYTES];

    for (uint32_t i = 0; i < 2 * SLOTS; i++) {
        fill_version(page, i % SLOTS, false);
        if (pwrite(fd, page, PAGE_BYTES, i * (off_t)PAGE_BYTES) != (ssize_t)PAGE_BYTES)
            return -EIO;
    }
    return take_store(fd, 2 * SLOTS);
}

static int set_up(void)
{
    const char *reason = "";
    uint8_t *guest = mmap(NULL, PAGES * PAGE_BYTES + HUGE_BYTES, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int r;

    guest = (uint8_t *)(((uintptr_t)guest + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    r = take_memory_in(guest, PAGES * PAGE_BYTES, RAM_HUGEPAGE, &reason);
    if (r < 0 && reason) {
        printf("skip race: %s\n", reason);
        exit(77);
    }
    for (uint32_t i = 0; r == 0 && i < PAGES; i++)
        fill_version(ram_address(block, i), i, false);
    return r < 0 ? r : make_store();
}

static void parse(int argc, char **argv)
{
    static const struct option options[] = {{"merges", required_argument, NULL, 'm'},
                                            {"file", required_argument, NULL, 'f'},
                                            {"no-freeze", no_argument, NULL, 'n'},
                                            {"huge", no_argument, NULL, 'h'},
                                            {0}};
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (option == 'm')
            wanted_merges = strtoull(optarg, NULL, 10);
        else if (option == 'f')
            direct_path = optarg;
        else if (option == 'n')
            no_freeze = true;
        else if (option == 'h')
            only_huge = true;
        else
            exit(2);
}

static pid_t start_outside(void)
{
    pid_t pid = getpid();
    pid_t child = fork();

    if (child == 0)
        write_from_outside(pid);
    return child;
}

static uint32_t start_others(pthread_t *threads)
{
    uint32_t count = 0;

    pthread_create(&threads[count++], NULL, write_in_threads, (void *)(intptr_t)PART_THREAD_A);
    pthread_create(&threads[count++], NULL, write_in_threads, (void *)(intptr_t)PART_THREAD_B);
    pthread_create(&threads[count++], NULL, discard, NULL);
    pthread_create(&threads[count++], NULL, fork_again_and_again, NULL);
    if (direct_fd >= 0) {
        void *fd = (void *)(intptr_t)direct_fd;
        pthread_create(&threads[count++], NULL, read_directly, fd);
        pthread_create(&threads[count++], NULL, read_into_fixed_buffers, fd);
    }
    return count;
}

static void print_result(void)
{
    printf("race: %" PRIu64 " merges, %" PRIu64 " unmerges, %" PRIu64 " mismatches, %" PRIu64
           " refused, %" PRIu64 " huge, %" PRIu64 " captive, %u errors; rounds:",
           stats.merges, ram.unmerges, stats.mismatches, stats.busy, ram.huge_freezes,
           block->captives, shared->errors);
    for (int part = 0; part < PART_COUNT; part++)
        printf(" %s %" PRIu64, part_names[part], shared->rounds[part]);
    printf("\n");
}

int main(int argc, char **argv)
{
    pthread_t threads[7];
    pthread_t ager;
    uint32_t count = 0;
    uint32_t random = 1;
    int status = 0;
    int r;
    pid_t outside = 0;

    parse(argc, argv);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    r = set_up();
    if (r < 0) {
        printf("race: setting up: %s\n", strerror(-r));
        return 2;
    }
    direct_fd = direct_path ? make_versions_file() : -1;
    if (direct_fd < 0)
        printf("race: no direct I/O here (%s): left out\n",
               direct_path ? strerror(-direct_fd) : "no --file");
    if (!only_huge) {
        outside = start_outside();
        count = start_others(threads);
    }
    pthread_create(&threads[count++], NULL, work_in_huge_pages, NULL);
    pthread_create(&ager, NULL, age_pages, NULL);
    while (!stopped() && stats.merges < wanted_merges)
        merge_some(&random);
    __atomic_store_n(&shared->stop, 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    if (outside)
        waitpid(outside, &status, 0);
    if (direct_path)
        unlink(direct_path);
    print_result();
    return shared->errors || status || ram.refused_transitions ? 1 : 0;
}
