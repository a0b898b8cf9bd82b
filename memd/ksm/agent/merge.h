/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Merging: mapping a slot of the store where a guest page was.
 *
 * Freeze, compare every byte, map, thaw, in runs of up to FREEZE_MAX_PAGES pages, or of one
 * huge page, that follow each other in the guest (what follows each other in the store too is
 * mapped by one call). A hash never decides anything here. What differs, is pinned or is not
 * private any more goes back to the guest as it was.
 */
#ifndef MEMD_KSM_AGENT_MERGE_H
#define MEMD_KSM_AGENT_MERGE_H

#include "ram.h"
#include "segments.h"

struct merge_stats {
    uint64_t merges;     /* pages, ever */
    uint64_t mismatches; /* pages whose bytes differed, ever */
    uint64_t busy;       /* freezes that were refused, ever */
    uint32_t vmas_added; /* at most so many VMAs since the caller set this to 0 */
};

/*
 * Merges page index + i with slots[i]. Takes the block's lock, a batch at a time. For each page
 * outcomes[i] becomes 0 (it is shared) or an enum not_merged.
 */
void merge_pages(struct guest_ram *ram, struct segments *segments, struct ram_block *block,
                 uint32_t index, const uint32_t *slots, uint32_t pages, uint8_t *outcomes,
                 struct merge_stats *stats);
/* Whether one call maps both: `next` lies behind `slot`, in the same segment. */
static inline bool merge_slot_follows(uint32_t slot, uint32_t next)
{
    return next == slot + 1 && SLOT_SEGMENT(next) == SLOT_SEGMENT(slot);
}

/* Moves a shared page to another slot with the same bytes. 0 or an enum not_merged; then it is
 * shared as before, unless it was not shared at all. */
uint8_t merge_remap(struct guest_ram *ram, struct segments *segments, struct ram_block *block,
                    uint32_t index, uint32_t slot, struct merge_stats *stats);

#endif
