/* SPDX-License-Identifier: Apache-2.0 */
#include "merge.h"

#include <errno.h>
#include <string.h>

#include "freeze.h"
#include "protocol.h"
#include "remap.h"

/* One batch: the pages of one call that are frozen together. */
struct batch {
    struct guest_ram *ram;
    struct ram_block *block;
    struct merge_stats *stats;
    uint8_t *view;     /* of the first page */
    uint8_t *outcomes; /* likewise */
    uint32_t index;
    uint32_t slot;
};

static void set_outcomes(struct batch *batch, uint32_t i, uint32_t pages, uint8_t outcome)
{
    memset(batch->outcomes + i, outcome, pages);
}

static bool equal(const struct batch *batch, uint32_t i)
{
    return memcmp(freeze_bytes(batch->ram, i), batch->view + (size_t)i * PAGE_BYTES, PAGE_BYTES) ==
           0;
}

/* Maps frozen pages [i, i + run), which are equal to the store's, or gives them back. */
static void map_run(struct batch *batch, uint32_t i, uint32_t run)
{
    struct ram_block *block = batch->block;
    uint32_t captives = 0;
    int r = remap_to_store(batch->ram, block, batch->index + i, run,
                           batch->view + (size_t)i * PAGE_BYTES, batch->slot + i, &captives);

    if (r < 0) {
        freeze_return(batch->ram, block, batch->index + i, i, run);
        set_outcomes(batch, i, run, r == -ENOMEM ? NOT_MERGED_BUDGET : NOT_MERGED_REFUSED);
        return;
    }
    batch->stats->vmas_added += 2;
    batch->stats->merges += run - captives;
    for (uint32_t k = i; k < i + run; k++)
        batch->outcomes[k] = ram_captive(block, batch->index + k) ? NOT_MERGED_GONE : 0;
}

static void settle_frozen(struct batch *batch, uint32_t frozen)
{
    for (uint32_t i = 0, run; i < frozen; i += run) {
        bool same = equal(batch, i);
        run = 1;
        while (i + run < frozen && equal(batch, i + run) == same)
            run++;
        if (same) {
            map_run(batch, i, run);
        } else {
            freeze_return(batch->ram, batch->block, batch->index + i, i, run);
            set_outcomes(batch, i, run, NOT_MERGED_MISMATCH);
            batch->stats->mismatches += run;
        }
    }
    freeze_thaw(batch->ram, batch->block, batch->index, frozen);
}

static bool is_mergeable(const struct ram_block *block, uint32_t index)
{
    return ram_place(block, index) == PLACE_PRIVATE && !ram_captive(block, index) &&
           block->chunks[ram_chunk_of(block, index)].state == CHUNK_ARMED;
}

/* Does as much of the batch as one freeze gets. Returns how many pages have their outcome. */
static uint32_t merge_batch(struct batch *batch, uint32_t pages)
{
    uint32_t run = 0;
    int frozen;

    while (run < pages && is_mergeable(batch->block, batch->index + run))
        run++;
    if (run == 0) {
        set_outcomes(batch, 0, 1, NOT_MERGED_GONE);
        return 1;
    }
    do {
        frozen = freeze_take(batch->ram, batch->block, batch->index, run);
    } while (frozen == -EINVAL && (run /= 2) > 0); /* not within one VMA */
    if (frozen <= 0) {
        batch->stats->busy++;
        set_outcomes(batch, 0, 1, frozen == -ENOENT ? NOT_MERGED_GONE : NOT_MERGED_BUSY);
        return 1;
    }
    settle_frozen(batch, (uint32_t)frozen);
    return (uint32_t)frozen;
}

/* How many pages from `index` on may be frozen together: a whole chunk, or some, and none of the
 * next chunk, so that that may be frozen whole. */
static uint32_t batch_pages(const struct ram_block *block, uint32_t index, uint32_t pages)
{
    uint32_t room = ram_chunk_end(block, ram_chunk_of(block, index)) - index;

    if (pages >= HUGE_PAGES && room == HUGE_PAGES)
        return HUGE_PAGES;
    room = room < FREEZE_MAX_PAGES ? room : FREEZE_MAX_PAGES;
    return pages < room ? pages : room;
}

void merge_pages(struct guest_ram *ram, struct segments *segments, struct ram_block *block,
                 uint32_t index, uint32_t slot, uint32_t pages, uint8_t *outcomes,
                 struct merge_stats *stats)
{
    uint8_t *view = segments_view(segments, slot, pages);
    uint32_t done = 0;

    memset(outcomes, NOT_MERGED_GONE, pages);
    if (!view) {
        memset(outcomes, NOT_MERGED_REFUSED, pages);
        return;
    }
    while (done < pages) {
        struct batch batch = {
            .ram = ram,
            .block = block,
            .stats = stats,
            .view = view + (size_t)done * PAGE_BYTES,
            .outcomes = outcomes + done,
            .index = index + done,
            .slot = slot + done,
        };
        uint32_t left = batch_pages(block, index + done, pages - done);

        lock_take(&block->lock);
        done += block->live && !block->resting ? merge_batch(&batch, left) : left;
        lock_release(&block->lock);
    }
}

uint8_t merge_remap(struct guest_ram *ram, struct segments *segments, struct ram_block *block,
                    uint32_t index, uint32_t slot, struct merge_stats *stats)
{
    uint8_t *view = segments_view(segments, slot, 1);
    uint8_t outcome = NOT_MERGED_GONE;
    uint32_t captives = 0;
    uint8_t *old;

    if (!view)
        return NOT_MERGED_REFUSED;
    lock_take(&block->lock);
    if (block->live && !block->resting && ram_place(block, index) == PLACE_SHARED) {
        old = segments_view(segments, block->slots[index], 1);
        if (!old || memcmp(old, view, PAGE_BYTES) != 0)
            outcome = NOT_MERGED_MISMATCH;
        else if (remap_to_store(ram, block, index, 1, view, slot, &captives) < 0)
            outcome = NOT_MERGED_BUDGET;
        else
            outcome = captives ? NOT_MERGED_GONE : 0;
    }
    stats->vmas_added += 2;
    lock_release(&block->lock);
    return outcome;
}
