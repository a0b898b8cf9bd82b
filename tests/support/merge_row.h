/* SPDX-License-Identifier: Apache-2.0 */
/* A merge with slots that follow each other, as tests and measurements lay out their stores. */
#ifndef MEMD_TESTS_MERGE_ROW_H
#define MEMD_TESTS_MERGE_ROW_H

#include "merge.h"

/* merge_pages() with the slots from `slot` on, one segment's; at most a huge page. */
static inline void merge_row(struct guest_ram *ram, struct segments *segments,
                             struct ram_block *block, uint32_t index, uint32_t slot, uint32_t pages,
                             uint8_t *outcomes, struct merge_stats *stats)
{
    uint32_t slots[HUGE_PAGES] = {0};

    for (uint32_t i = 0; i < pages; i++)
        slots[i] = slot + i;
    merge_pages(ram, segments, block, index, slots, pages, outcomes, stats);
}

#endif
