/* SPDX-License-Identifier: Apache-2.0 */
#include "slots.h"

#include <errno.h>

/* Fibonacci hashing: slots of one segment follow each other. */
static uint64_t place_of(const struct slots *slots, uint32_t slot)
{
    return (slot * 0x9e3779b97f4a7c15ULL >> 20) & (slots->room - 1);
}

static struct slot_entry *look_up(struct slots *slots, uint32_t slot)
{
    uint64_t at = place_of(slots, slot);

    while (slots->table[at].uses && slots->table[at].slot != slot)
        at = (at + 1) & (slots->room - 1);
    return &slots->table[at];
}

static uint64_t count_shared(const struct regions *regions)
{
    uint64_t shared = 0;

    for (uint32_t i = 0; i < regions->count; i++) {
        struct ram_block *block = regions->at[i].block;

        lock_take(&block->lock);
        shared += block->live ? block->counts[PLACE_SHARED] : 0;
        lock_release(&block->lock);
    }
    return shared;
}

static void count_use(struct slots *slots, uint32_t slot, uint64_t *left)
{
    struct slot_entry *entry = look_up(slots, slot);

    if (entry->uses == 0) {
        if (*left == 0)
            return; /* shared since it was counted: sent like any page */
        --*left;
        *entry = (struct slot_entry){.slot = slot, .content = SLOT_NONE};
    }
    entry->uses++;
}

static void count_block(struct slots *slots, struct ram_block *block, uint64_t *left)
{
    for (uint32_t c = 0; c < block->chunk_count; c++) {
        lock_take(&block->lock);
        for (uint32_t i = ram_chunk_first(block, c); block->live && i < ram_chunk_end(block, c);
             i++)
            if (ram_place(block, i) == PLACE_SHARED)
                count_use(slots, block->slots[i], left);
        lock_release(&block->lock);
    }
}

int slots_open(struct slots *slots, const struct regions *regions)
{
    uint64_t shared = count_shared(regions);
    uint64_t left = shared;

    *slots = (struct slots){0};
    if (shared == 0)
        return 0;
    slots->room = 1ULL << (65 - __builtin_clzll(shared)); /* two to four times as many */
    slots->table = regions_map(slots->room * sizeof(*slots->table));
    if (!slots->table) {
        slots->room = 0;
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < regions->count; i++)
        count_block(slots, regions->at[i].block, &left);
    return 0;
}

void slots_close(struct slots *slots)
{
    regions_unmap(slots->table, slots->room * sizeof(*slots->table));
    *slots = (struct slots){0};
}

struct slot_entry *slots_find(struct slots *slots, uint32_t slot)
{
    struct slot_entry *entry;

    if (slots->room == 0)
        return NULL;
    entry = look_up(slots, slot);
    return entry->uses > 1 ? entry : NULL;
}

void slots_forget(struct slots *slots, uint32_t known)
{
    for (uint64_t i = 0; i < slots->room; i++)
        slots->table[i].sent &= slots->table[i].content < known;
}
