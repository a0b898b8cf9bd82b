/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How long a guest's write waits that meets a freeze.
 *
 * One thread freezes, compares and gives back runs of pages for ever (their last byte differs from
 * the store's, so that nothing is merged and every wait is a freeze's); another stores into pages
 * of the run and times each store. The pages are there and writable but while they are frozen: a
 * store that the kernel counts a page fault for has met a freeze.
 *
 * usage: freeze_wait [--waits N] [--run PAGES]
 */
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "fault.h"
#include "freeze.h"
#include "merge_row.h"
#include "remap.h"

#define PAGES 512U

static struct guest_ram ram;
static struct fault_handler handler;
static struct segments segments;
static struct merge_stats stats;
static struct ram_block *block;
static uint32_t run_pages = FREEZE_MAX_PAGES;
static uint32_t wanted = 10000;
static uint32_t stop;

static uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ULL + (uint64_t)time.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "freeze_wait: %s\n", what);
    exit(1);
}

static void set_up(void)
{
    const char *reason = "it failed";
    uint8_t *at =
        mmap(NULL, 4 * HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = memfd_create("memd-freeze-wait", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t page[PAGE_BYTES];

    at = (uint8_t *)(((uintptr_t)at + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    if (ram_open(&ram, -1, &reason) < 0)
        die(reason);
    ram.sources[PLACE_SHARED] = segments_source(&segments);
    if (fault_start(&handler, &ram) < 0 || ram_add(&ram, at, HUGE_BYTES, 0, true, &block) < 0 ||
        remap_arm(&ram, block, 0, PAGES) < 0)
        die("the guest's memory can't be set up");
    fault_open(&handler);
    block->chunks[0].state = CHUNK_ARMED;
    memset(page, 7, sizeof(page));
    for (uint32_t i = 0; i < PAGES; i++) {
        memset(ram_address(block, i), 7, PAGE_BYTES);
        ram_address(block, i)[PAGE_BYTES - 1] = 8;
        if (pwrite(fd, page, PAGE_BYTES, i * (off_t)PAGE_BYTES) != (ssize_t)PAGE_BYTES)
            die("the store can't be written");
    }
    fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    if (segments_add(&segments, 1, PAGES, fd) < 0)
        die("the store can't be mapped");
    lock_take(&block->lock);
    ram_move_places(&ram, block, 0, PAGES, TRANSITION_POPULATE);
    /* The faults while filling have done so for some. */
    lock_release(&block->lock);
}

static void *freeze_for_ever(void *context)
{
    uint8_t outcomes[FREEZE_MAX_PAGES];

    (void)context;
    while (!__atomic_load_n(&stop, __ATOMIC_ACQUIRE)) {
        merge_row(&ram, &segments, block, 0, SLOT(1, 0), run_pages, outcomes, &stats);
        /* As the scanner does between two batches: look at something else. */
        for (uint64_t until = now_ns() + 100000; now_ns() < until;)
            ;
    }
    return NULL;
}

static long own_faults(void)
{
    struct rusage usage;

    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_minflt + usage.ru_majflt;
}

/* Stores until `wanted` stores have met a freeze; their times. */
static void store_for_ever(uint64_t *ns)
{
    uint32_t random = 1;
    uint32_t waits = 0;

    while (waits < wanted) {
        long faults = own_faults();
        uint64_t before;

        random = random * 1664525 + 1013904223;
        before = now_ns();
        *(volatile uint8_t *)ram_address(block, random % run_pages) = 7;
        ns[waits] = now_ns() - before;
        if (own_faults() != faults)
            waits++;
    }
}

/* As memd does for a living agent. Without the right to it the waits are longer. */
static void put_handler_first(void)
{
    struct sched_param first = {.sched_priority = 1};

    (void)sched_setscheduler((pid_t)__atomic_load_n(&handler.tid, __ATOMIC_ACQUIRE),
                             SCHED_FIFO | SCHED_RESET_ON_FORK, &first);
}

static int ascending(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a;
    uint64_t right = *(const uint64_t *)b;

    return (left > right) - (left < right);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"waits", required_argument, NULL, 'w'}, {"run", required_argument, NULL, 'r'}, {0}};
    uint64_t *ns;
    pthread_t thread;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (option == 'w')
            wanted = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 'r')
            run_pages = (uint32_t)strtoul(optarg, NULL, 10);
        else
            return 2;
    if (wanted == 0 || run_pages == 0 || run_pages > FREEZE_MAX_PAGES)
        die("--waits takes at least 1, --run 1 to 64");
    ns = calloc(wanted, sizeof(*ns));
    if (!ns)
        die("no memory");
    set_up();
    put_handler_first();
    pthread_create(&thread, NULL, freeze_for_ever, NULL);
    store_for_ever(ns);
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    size_t middle = wanted / 2;
    size_t last_but_one_percent = (size_t)wanted * 99 / 100;

    qsort(ns, wanted, sizeof(*ns), ascending);
    printf(
        "{\"waits\": %u, \"run_pages\": %u, \"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, "
        "\"merges\": %llu}\n",
        wanted, run_pages, (double)ns[middle] / 1e3, (double)ns[last_but_one_percent] / 1e3,
        (double)ns[wanted - 1] / 1e3, (unsigned long long)stats.merges);
    return 0;
}
