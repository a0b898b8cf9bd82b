/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pages of a guest as they are numbered on the wire: its live blocks laid end to end, in the
 * order in which the VMM announced them, without those that it moves by itself (RAM_VMM_MOVES).
 * Taken once, when a migration begins; a block that leaves afterwards makes the migration fail.
 *
 * Bitmaps and arrays of a migration go by these numbers. Different threads set bits of the same
 * word, so the bits are moved by atomic operations.
 */
#ifndef MEMD_POSTCOPY_AGENT_REGIONS_H
#define MEMD_POSTCOPY_AGENT_REGIONS_H

#include "ram.h"

struct region {
    struct ram_block *block;
    uint64_t first; /* on the wire */
    uint32_t pages;
};

struct regions {
    uint32_t count;
    uint64_t pages; /* of all */
    struct region at[RAM_MAX_BLOCKS];
};

void regions_take(struct regions *regions, struct guest_ram *ram);

/* The region that holds `page`, which is below regions->pages. */
const struct region *regions_find(const struct regions *regions, uint64_t page);

/* Number on the wire of a block's page; false when the block was not there when it began. */
bool regions_number(const struct regions *regions, const struct ram_block *block, uint32_t index,
                    uint64_t *ret_page);

/* Zeroed memory of our own, or NULL; not in core dumps, not in children. */
void *regions_map(size_t bytes);
/* The same, and all of it is there: for what is written to while the guest stands still. */
void *regions_map_ready(size_t bytes);
void regions_unmap(void *memory, size_t bytes);

static inline size_t regions_bitmap_bytes(const struct regions *regions)
{
    return (regions->pages + 63) / 64 * 8;
}

static inline uint64_t regions_bit(uint64_t page)
{
    return 1ULL << (page % 64);
}

static inline bool regions_test(const uint64_t *bitmap, uint64_t page)
{
    return __atomic_load_n(&bitmap[page / 64], __ATOMIC_RELAXED) & regions_bit(page);
}

/* Each returns whether the bit was set before. */
static inline bool regions_set(uint64_t *bitmap, uint64_t page)
{
    return __atomic_fetch_or(&bitmap[page / 64], regions_bit(page), __ATOMIC_ACQ_REL) &
           regions_bit(page);
}

static inline bool regions_clear(uint64_t *bitmap, uint64_t page)
{
    return __atomic_fetch_and(&bitmap[page / 64], ~regions_bit(page), __ATOMIC_ACQ_REL) &
           regions_bit(page);
}

/* The first page from `from` on, below `end`, whose bit is set; `end` when there is none. */
uint64_t regions_next(const uint64_t *bitmap, uint64_t from, uint64_t end);

#endif
