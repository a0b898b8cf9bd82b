/* SPDX-License-Identifier: Apache-2.0 */
#include "merge.h"

#include <errno.h>
#include <string.h>

#include "freeze.h"
#include "protocol.h"
#include "remap.h"

/* So many runs of the store are mapped in one freeze: what is mapped first waits for the last, 8 us
 * a run, until it is protected. */
#define MAX_RUNS 8U

/* One batch: the pages of one call that are frozen together. */
struct batch {
    struct guest_ram *ram;
    struct segments *segments;
    struct ram_block *block;
    struct merge_stats *stats;
    const uint32_t *slots; /* of the first page and those behind it */
    uint8_t *outcomes;     /* likewise */
    uint32_t index;
};

static void set_outcomes(struct batch *batch, uint32_t i, uint32_t pages, uint8_t outcome)
{
    memset(batch->outcomes + i, outcome, pages);
}

static uint8_t *view_of(const struct batch *batch, uint32_t i)
{
    return segments_view(batch->segments, batch->slots[i], 1);
}

static void give_back(struct batch *batch, uint32_t i, uint32_t pages, uint8_t outcome)
{
    freeze_return(batch->ram, batch->block, batch->index + i, i, pages);
    set_outcomes(batch, i, pages, outcome);
}

static void protect(struct batch *batch, uint32_t i, uint32_t pages)
{
    uint32_t captives =
        remap_protect(batch->ram, batch->block, batch->index + i, pages, batch->slots + i);

    batch->stats->merges += pages - captives;
    for (uint32_t k = i; k < i + pages; k++)
        batch->outcomes[k] = ram_captive(batch->block, batch->index + k) ? NOT_MERGED_GONE : 0;
}

/* What is to be mapped must be there: a hole that is protected looks as if a page that was written
 * had been swapped out. The comparison has faulted it in, but a slot that another page of the batch
 * was mapped to since is not there any more. */
static void fault_in(const uint8_t *view, uint32_t pages)
{
    for (uint32_t i = 0; i < pages; i++)
        (void)*(volatile const uint8_t *)(view + (size_t)i * PAGE_BYTES);
}

/* Maps pages from i on that are equal to the store's, run by run, and protects them together; or
 * gives them back. Returns how many. */
static uint32_t map_equal(struct batch *batch, const bool *equal, uint32_t i, uint32_t frozen)
{
    uint32_t at = i;
    uint32_t run = 0;
    int r = 0;

    while (r == 0 && at < frozen && equal[at]) {
        run = 1;
        while (at + run < frozen && equal[at + run] &&
               merge_slot_follows(batch->slots[at + run - 1], batch->slots[at + run]))
            run++;
        fault_in(view_of(batch, at), run);
        r = remap_map(batch->ram, batch->block, batch->index + at, run, view_of(batch, at));
        if (r == 0) {
            batch->stats->vmas_added += 2;
            at += run;
        }
    }
    if (at > i)
        protect(batch, i, at - i);
    if (r < 0) {
        give_back(batch, at, run, r == -ENOMEM ? NOT_MERGED_BUDGET : NOT_MERGED_REFUSED);
        at += run;
    }
    return at - i;
}

static void settle_frozen(struct batch *batch, uint32_t frozen)
{
    bool equal[HUGE_PAGES];

    for (uint32_t i = 0; i < frozen; i++)
        equal[i] = memcmp(freeze_bytes(batch->ram, i), view_of(batch, i), PAGE_BYTES) == 0;
    for (uint32_t i = 0, run; i < frozen; i += run) {
        if (equal[i]) {
            run = map_equal(batch, equal, i, frozen);
            continue;
        }
        run = 1;
        while (i + run < frozen && !equal[i + run])
            run++;
        give_back(batch, i, run, NOT_MERGED_MISMATCH);
        batch->stats->mismatches += run;
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

    while (run < pages && is_mergeable(batch->block, batch->index + run) && view_of(batch, run))
        run++;
    if (run == 0) {
        set_outcomes(batch, 0, 1, view_of(batch, 0) ? NOT_MERGED_GONE : NOT_MERGED_REFUSED);
        return 1;
    }
    do {
        frozen = freeze_take(batch->ram, batch->block, batch->index, run);
    } while (frozen == -EINVAL && (run /= 2) > 0); /* not within one VMA */
    if (frozen <= 0) {
        /* Where a freeze must wait all of them do: to try one by one would split a huge page. */
        uint32_t refused = frozen == -EBUSY && freeze_must_wait(batch->ram) ? run : 1;
        batch->stats->busy++;
        set_outcomes(batch, 0, refused, frozen == -ENOENT ? NOT_MERGED_GONE : NOT_MERGED_BUSY);
        return refused;
    }
    settle_frozen(batch, (uint32_t)frozen);
    return (uint32_t)frozen;
}

/* How many pages from `index` on may be frozen together: a whole chunk, or some, and none of the
 * next chunk, so that that may be frozen whole. */
static uint32_t batch_pages(const struct ram_block *block, uint32_t index, const uint32_t *slots,
                            uint32_t pages)
{
    uint32_t room = ram_chunk_end(block, ram_chunk_of(block, index)) - index;
    uint32_t most = room < FREEZE_MAX_PAGES ? room : FREEZE_MAX_PAGES;
    uint32_t taken = 1;

    if (pages >= HUGE_PAGES && room == HUGE_PAGES)
        most = HUGE_PAGES;
    most = pages < most ? pages : most;
    for (uint32_t runs = 1; taken < most; taken++) {
        runs += !merge_slot_follows(slots[taken - 1], slots[taken]);
        if (runs > MAX_RUNS)
            break;
    }
    return taken;
}

void merge_pages(struct guest_ram *ram, struct segments *segments, struct ram_block *block,
                 uint32_t index, const uint32_t *slots, uint32_t pages, uint8_t *outcomes,
                 struct merge_stats *stats)
{
    uint32_t done = 0;

    memset(outcomes, NOT_MERGED_GONE, pages);
    while (done < pages) {
        struct batch batch = {
            .ram = ram,
            .segments = segments,
            .block = block,
            .stats = stats,
            .slots = slots + done,
            .outcomes = outcomes + done,
            .index = index + done,
        };
        uint32_t left = batch_pages(block, index + done, slots + done, pages - done);

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
    bool captive = false;
    uint8_t *old;

    if (!view)
        return NOT_MERGED_REFUSED;
    lock_take(&block->lock);
    if (block->live && !block->resting && ram_place(block, index) == PLACE_SHARED) {
        old = segments_view(segments, block->slots[index], 1);
        if (!old || memcmp(old, view, PAGE_BYTES) != 0)
            outcome = NOT_MERGED_MISMATCH;
        else if (remap_to_store(ram, block, index, view, slot, &captive) < 0)
            outcome = NOT_MERGED_BUDGET;
        else
            outcome = captive ? NOT_MERGED_GONE : 0;
    }
    stats->vmas_added += 2;
    lock_release(&block->lock);
    return outcome;
}
