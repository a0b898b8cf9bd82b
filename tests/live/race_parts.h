/* SPDX-License-Identifier: Apache-2.0 */
/* What race.c and race_kvm.c have in common: guest memory that is taken in and armed at once, the
 * store, and the merge that must never be done. */
#ifndef TESTS_LIVE_RACE_PARTS_H
#define TESTS_LIVE_RACE_PARTS_H

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fault.h"
#include "freeze.h"
#include "merge.h"
#include "remap.h"

static struct guest_ram ram;
static struct fault_handler handler;
static struct segments segments;
static struct merge_stats stats;
static struct ram_block *block;

static inline uint32_t next_random(uint32_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

/* As reclaim and DAMON do: page table entries lose their accessed bits while the pages are moved.
 * For ever; a thread of its own. */
static void *age_pages(void *unused)
{
    uint32_t random = 815;

    for (;;) {
        for (uint32_t i = next_random(&random) % 64; i > 0; i--) {
            madvise(ram_address(block, 0), (size_t)block->pages * PAGE_BYTES, MADV_COLD);
            madvise(ram.staging, FREEZE_MAX_PAGES * PAGE_BYTES, MADV_COLD);
            madvise(ram.huge_staging, HUGE_BYTES, MADV_COLD);
        }
        usleep(next_random(&random) % 20000);
    }
    return unused;
}

/* What must never be done: compare in place, then map. */
static inline void merge_without_freeze(uint32_t index, uint32_t slot, uint32_t pages)
{
    uint8_t *view = segments_view(&segments, slot, pages);
    bool captive;

    for (uint32_t i = 0; i < pages; i++) {
        lock_take(&block->lock);
        if (ram_place(block, index + i) == PLACE_PRIVATE && !ram_captive(block, index + i) &&
            memcmp(ram_address(block, index + i), view + i * PAGE_BYTES, PAGE_BYTES) == 0 &&
            remap_to_store(&ram, block, index + i, view + i * PAGE_BYTES, slot + i, &captive) == 0)
            stats.merges++;
        lock_release(&block->lock);
    }
}

/* The handler runs, all of the memory is armed. 0 or -errno; with a reason, this kernel can't. */
static inline int take_memory_in(uint8_t *guest, size_t bytes, uint32_t attributes,
                                 const char **ret_reason)
{
    int r = ram_open(&ram, -1, ret_reason);

    if (r < 0)
        return r;
    *ret_reason = NULL;
    ram.sources[PLACE_SHARED] = segments_source(&segments);
    r = fault_start(&handler, &ram);
    fault_open(&handler);
    if (r == 0)
        r = ram_add(&ram, guest, bytes, attributes, true, &block);
    for (uint32_t c = 0; r == 0 && c < block->chunk_count; c++) {
        uint32_t first = ram_chunk_first(block, c);

        lock_take(&block->lock);
        r = remap_arm(&ram, block, first, ram_chunk_end(block, c) - first);
        block->chunks[c].state = CHUNK_ARMED;
        lock_release(&block->lock);
    }
    return r;
}

/* The memfd becomes segment 1. */
static inline int take_store(int fd, uint32_t slots)
{
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return -errno;
    return segments_add(&segments, 1, slots, fd);
}

#endif
