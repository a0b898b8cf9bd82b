/* SPDX-License-Identifier: Apache-2.0 */
#include "scan.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "discard.h"
#include "freeze.h"
#include "remap.h"
#include "uffd.h"

/* A huge page is cold when at most this many of its CHUNK_SAMPLES samples changed in a pass. */
#define COLD_SAMPLES 4U
/* A hot huge page, and a hot armed chunk, is left alone for up to this many passes. */
#define MAX_BACKOFF 8U
/* An armed chunk with nothing shared in which this many of 512 pages were written in each of
 * HOT_PASSES passes costs a fault a page and pass for nothing. */
#define HOT_WRITTEN 448U
#define HOT_PASSES  3U

/* ---- one chunk ---- */

struct chunk_view {
    struct scanner *scanner;
    struct guest_ram *ram;
    struct ram_block *block;
    struct chunk *chunk;
    uint32_t first, end; /* pages */
    bool whole;          /* just armed: nothing is protected yet */
};

/* Lists the pages with one of `anyof`, all of `mask`. Returns the number of regions or -errno. */
static int list_pages(struct chunk_view *view, uint64_t flags, uint64_t mask, uint64_t anyof)
{
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .flags = flags,
        .start = (uintptr_t)ram_address(view->block, view->first),
        .end = (uintptr_t)ram_address(view->block, view->end),
        .vec = (uintptr_t)view->scanner->regions,
        .vec_len = HUGE_PAGES,
        .category_mask = mask,
        .category_anyof_mask = anyof,
        .return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_HUGE,
    };

    return sys_ioctl(view->ram->pagemap_fd, PAGEMAP_SCAN, &scan);
}

static uint32_t page_at(const struct chunk_view *view, uint64_t address)
{
    return (uint32_t)((address - (uintptr_t)view->block->base) / PAGE_BYTES);
}

static void arm_wait(struct ram_block *block, uint32_t index)
{
    uint8_t patience = (block->table[index] & TABLE_PATIENCE_MASK) / TABLE_PATIENCE_UNIT;

    block->table[index] =
        (uint8_t)((block->table[index] & ~TABLE_WAIT_MASK) | patience * TABLE_WAIT_UNIT);
}

/* A page that was written since the last pass: where is it now, and is it young? */
static void note_written(struct chunk_view *view, uint32_t index, uint64_t categories)
{
    struct ram_block *block = view->block;
    enum place place = ram_place(block, index);

    if (ram_captive(block, index) || place == PLACE_SHARED || place == PLACE_REMOTE)
        return; /* a page that is still to come is missing, but not empty */
    if (!(categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED))) {
        if (place != PLACE_ABSENT)
            ram_move_places(view->ram, block, index, 1, TRANSITION_DISCARD);
        return;
    }
    if (categories & PAGE_IS_PFNZERO) {
        ram_move_places(view->ram, block, index, 1, TRANSITION_DROP);
        ram_set_young(block, index, false);
        return;
    }
    if (place != PLACE_PRIVATE)
        ram_move_places(view->ram, block, index, 1,
                        place == PLACE_ZERO ? TRANSITION_WRITE : TRANSITION_POPULATE);
    ram_set_young(block, index, true);
    arm_wait(block, index);
}

/* Which young pages are candidates now. Called before the written ones become young again, with
 * those already out of the bitmap. */
static void collect_candidates(struct chunk_view *view)
{
    struct scanner *scanner = view->scanner;
    struct ram_block *block = view->block;

    memset(scanner->pending, 0, sizeof(scanner->pending));
    for (uint32_t i = view->first; i < view->end; i++) {
        if (!block->young[i / 64]) {
            i |= 63; /* nothing in these 64 */
            continue;
        }
        if (!ram_young(block, i))
            continue;
        if (block->table[i] & TABLE_WAIT_MASK) {
            block->table[i] -= TABLE_WAIT_UNIT;
            continue;
        }
        ram_set_young(block, i, false);
        if (ram_place(block, i) != PLACE_PRIVATE || ram_captive(block, i))
            continue;
        scanner->pending[(i - view->first) / 64] |= 1ULL << ((i - view->first) % 64);
        scanner->have_pending = true;
        scanner->pass_candidates++;
    }
}

static bool all_absent(const struct chunk_view *view)
{
    for (uint32_t i = view->first; i < view->end; i++)
        if (ram_place(view->block, i) != PLACE_ABSENT)
            return false;
    return true;
}

static bool nothing_shared(const struct chunk_view *view)
{
    for (uint32_t i = view->first; i < view->end; i++)
        if (ram_place(view->block, i) != PLACE_PRIVATE || ram_captive(view->block, i))
            return false;
    return true;
}

/* Leaves chunks alone that cost more than they can give. */
static void review_armed(struct chunk_view *view, uint32_t written)
{
    if (written >= HOT_WRITTEN && nothing_shared(view)) {
        if (++view->chunk->hot_passes < HOT_PASSES)
            return;
        discard_disarm(view->ram, view->block, (uint32_t)(view->chunk - view->block->chunks),
                       CHUNK_HOT);
        view->chunk->backoff = MAX_BACKOFF;
        return;
    }
    view->chunk->hot_passes = 0;
    if (all_absent(view))
        discard_disarm(view->ram, view->block, (uint32_t)(view->chunk - view->block->chunks),
                       CHUNK_EMPTY);
}

/* Lists what was written, and protects it again, where the survey saw writes: a protecting scan
 * makes the kernel notify KVM of the whole range. What was written elsewhere since the survey, the
 * next pass finds. */
static int list_written(struct chunk_view *view)
{
    uint32_t chunk = (uint32_t)(view->chunk - view->block->chunks);
    struct survey_extent written = survey_written(&view->scanner->survey, view->block, chunk);
    struct chunk_view part = *view;

    if (view->whole)
        written = (struct survey_extent){.end = (uint16_t)(view->end - view->first)};
    if (written.end == 0)
        return 0;
    part.first = view->first + written.first;
    part.end = view->first + written.end;
    return list_pages(&part, PM_SCAN_WP_MATCHING, PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN, 0);
}

static void scan_armed(struct chunk_view *view)
{
    struct page_region *regions = view->scanner->regions;
    uint64_t candidates = view->scanner->pass_candidates;
    uint32_t written = 0;
    uint32_t fresh = 0; /* written now, and not at the last look */
    int count = list_written(view);

    for (int r = 0; r < count; r++)
        for (uint64_t at = regions[r].start; at < regions[r].end; at += PAGE_BYTES) {
            fresh += !ram_young(view->block, page_at(view, at));
            ram_set_young(view->block, page_at(view, at), false);
        }
    collect_candidates(view);
    for (int r = 0; r < count; r++)
        for (uint64_t at = regions[r].start; at < regions[r].end; at += PAGE_BYTES) {
            note_written(view, page_at(view, at), regions[r].categories);
            written++;
        }
    view->scanner->pass_written += written;
    survey_count_look(view->chunk, fresh + (uint32_t)(view->scanner->pass_candidates - candidates));
    review_armed(view, written);
}

static void arm(struct chunk_view *view)
{
    if (remap_arm(view->ram, view->block, view->first, view->end - view->first) < 0)
        return;
    memset(view->chunk, 0, sizeof(*view->chunk));
    view->chunk->state = CHUNK_ARMED;
    view->whole = true;
    scan_armed(view);
}

/* Sets the places of a chunk that is not armed. */
static void set_places(struct chunk_view *view, bool present)
{
    for (uint32_t i = view->first; i < view->end; i++) {
        enum place place = ram_place(view->block, i);
        if (present && place == PLACE_ABSENT)
            ram_move_places(view->ram, view->block, i, 1, TRANSITION_POPULATE);
        else if (present && place == PLACE_ZERO)
            ram_move_places(view->ram, view->block, i, 1, TRANSITION_WRITE);
        else if (!present && place != PLACE_ABSENT)
            ram_move_places(view->ram, view->block, i, 1, TRANSITION_DISCARD);
    }
}

/* Hashes the samples; how many differ from the last time. */
static uint32_t sample(struct chunk_view *view)
{
    uint32_t changed = 0;

    for (uint32_t s = 0; s < CHUNK_SAMPLES; s++) {
        uint32_t index = view->first + s * (uint32_t)(HUGE_PAGES / CHUNK_SAMPLES) + s * 7 % 32;
        uint32_t tag = hash_tag(hash_page(&view->scanner->secret, ram_address(view->block, index)));
        changed += view->chunk->samples[s] != tag;
        view->chunk->samples[s] = tag;
    }
    view->scanner->hashed += CHUNK_SAMPLES;
    return changed;
}

/* 1, 2, 4, ... passes, then MAX_BACKOFF. */
static uint8_t next_backoff(struct chunk *chunk)
{
    if (chunk->hot_passes < MAX_BACKOFF)
        chunk->hot_passes = chunk->hot_passes ? (uint8_t)(chunk->hot_passes * 2) : 1;
    return chunk->hot_passes;
}

static void judge_huge(struct chunk_view *view)
{
    struct chunk *chunk = view->chunk;
    uint32_t now_ms = view->scanner->now_ms;
    uint32_t changed;

    if (chunk->state != CHUNK_HUGE) {
        memset(chunk, 0, sizeof(*chunk));
        chunk->state = CHUNK_HUGE;
        set_places(view, true);
    }
    if (chunk->backoff > 0) {
        chunk->backoff--;
        return;
    }
    changed = sample(view);
    if (!chunk->sampled || changed > COLD_SAMPLES) {
        /* Hot for long: it is enough to look now and then. */
        if (chunk->sampled && now_ms - chunk->changed_ms < view->scanner->settle_ms)
            chunk->backoff = next_backoff(chunk);
        chunk->sampled = 1;
        chunk->changed_ms = now_ms;
    } else if (now_ms - chunk->changed_ms >= view->scanner->settle_ms) {
        arm(view);
    }
}

static void scan_unarmed(struct chunk_view *view)
{
    int count = list_pages(view, 0, 0, PAGE_IS_PRESENT | PAGE_IS_SWAPPED);
    const struct page_region *region = view->scanner->regions;
    bool huge = count == 1 && (region->categories & PAGE_IS_HUGE) &&
                page_at(view, region->end) - page_at(view, region->start) == HUGE_PAGES;

    if (count < 0)
        return;
    if (huge)
        view->scanner->huge_seen++;
    if (view->chunk->state == CHUNK_HOT && count > 0 && !huge && view->chunk->backoff > 0) {
        view->chunk->backoff--;
        return;
    }
    if (huge) {
        judge_huge(view);
    } else if (count > 0) {
        arm(view);
    } else if (view->chunk->state != CHUNK_EMPTY || !all_absent(view)) {
        memset(view->chunk, 0, sizeof(*view->chunk));
        set_places(view, false);
    }
}

/* ---- candidates ---- */

static bool is_pending(const struct scanner *scanner, uint32_t i)
{
    return scanner->pending[i / 64] >> (i % 64) & 1;
}

static void clear_pending(struct scanner *scanner, uint32_t i, uint32_t pages)
{
    for (; pages > 0; i++, pages--)
        scanner->pending[i / 64] &= ~(1ULL << (i % 64));
}

/* Drops frozen pages that are all zeros, and gives the others back. Returns how many were. */
static uint32_t drop_frozen(struct scanner *scanner, struct ram_block *block, uint32_t index,
                            uint32_t frozen)
{
    struct guest_ram *ram = scanner->ram;
    uint32_t dropped = 0;

    for (uint32_t i = 0, run; i < frozen; i += run) {
        bool zero = hash_page_is_zero(freeze_bytes(ram, i));
        run = 1;
        while (i + run < frozen && hash_page_is_zero(freeze_bytes(ram, i + run)) == zero)
            run++;
        if (zero && uffd_zero(ram->guest_fd, ram_address(block, index + i), run * PAGE_BYTES) ==
                        (long)(run * PAGE_BYTES)) {
            ram_move_places(ram, block, index + i, run, TRANSITION_DROP);
            dropped += run;
        } else {
            freeze_return(ram, block, index + i, i, run);
        }
    }
    return dropped;
}

static bool may_drop(struct ram_block *block, uint32_t index, uint32_t pages)
{
    if (!block->live || block->resting ||
        block->chunks[ram_chunk_of(block, index)].state != CHUNK_ARMED)
        return false;
    for (uint32_t i = index; i < index + pages; i++)
        if (ram_place(block, i) != PLACE_PRIVATE || ram_captive(block, i))
            return false;
    return true;
}

/* Tries to drop pages that looked like zeros a moment ago. Returns how many are done with. */
static uint32_t drop_zeros(struct scanner *scanner, struct ram_block *block, uint32_t index,
                           uint32_t pages)
{
    uint32_t done;
    int frozen;

    if (pages < HUGE_PAGES && pages > FREEZE_MAX_PAGES)
        pages = FREEZE_MAX_PAGES;
    done = pages;
    lock_take(&block->lock);
    if (may_drop(block, index, pages)) {
        frozen = freeze_take(scanner->ram, block, index, pages);
        if (frozen > 0) {
            scanner->zero_merges += drop_frozen(scanner, block, index, (uint32_t)frozen);
            freeze_thaw(scanner->ram, block, index, (uint32_t)frozen);
            done = (uint32_t)frozen;
        } else {
            scanner->busy++;
            if (frozen != -EBUSY || !freeze_must_wait(scanner->ram))
                done = 1;
        }
    }
    lock_release(&block->lock);
    return done;
}

static bool is_readable(const struct ram_block *block)
{
    return block->live && !block->resting;
}

/* One candidate, or a run of zero pages that starts with it; false when the sink is full. */
static bool look_at(struct scanner *scanner, struct ram_block *block, uint32_t first, uint32_t i,
                    uint32_t chunk_pages)
{
    uint32_t most = i == 0 && chunk_pages == HUGE_PAGES ? HUGE_PAGES : FREEZE_MAX_PAGES;
    uint32_t run = 0;
    uint64_t hash = 0;

    /* A resting block may have been unmapped in part. */
    lock_take(&block->reading);
    while (is_readable(block) && run < most && i + run < chunk_pages &&
           is_pending(scanner, i + run) && hash_page_is_zero(ram_address(block, first + i + run)))
        run++;
    if (is_readable(block) && run == 0)
        hash = hash_page(&scanner->secret, ram_address(block, first + i));
    lock_release(&block->reading);
    if (run > 0) {
        clear_pending(scanner, i, drop_zeros(scanner, block, first + i, run));
        return true;
    }
    scanner->hashed++;
    if (is_readable(block) &&
        !scanner->sink.offer(scanner->sink.self, block->first_page + first + i, hash))
        return false;
    clear_pending(scanner, i, 1);
    return true;
}

/* Nothing of this chunk may be frozen now: its candidates stay young. */
static void put_off(struct scanner *scanner, struct ram_block *block, uint32_t first,
                    uint32_t pages)
{
    lock_take(&block->lock);
    for (uint32_t i = 0; block->live && i < pages; i++)
        if (is_pending(scanner, i))
            ram_set_young(block, first + i, true);
    lock_release(&block->lock);
    scanner->have_pending = false;
}

static bool look_at_pending(struct scanner *scanner, struct ram_block *block)
{
    uint32_t first = ram_chunk_first(block, scanner->chunk_at);
    uint32_t pages = ram_chunk_end(block, scanner->chunk_at) - first;

    if (!scanner->sink.may_freeze(scanner->sink.self, block, first, pages)) {
        put_off(scanner, block, first, pages);
        return true;
    }
    for (uint32_t i = 0; i < pages; i++) {
        if (!block->live || block->resting)
            break;
        while (is_pending(scanner, i))
            if (!look_at(scanner, block, first, i, pages))
                return false;
    }
    scanner->have_pending = false;
    return true;
}

/* ---- the walk ---- */

static void scan_chunk(struct scanner *scanner, struct ram_block *block)
{
    struct chunk_view view = {
        .scanner = scanner,
        .ram = scanner->ram,
        .block = block,
        .first = ram_chunk_first(block, scanner->chunk_at),
        .end = ram_chunk_end(block, scanner->chunk_at),
    };

    lock_take(&block->lock);
    if (block->live && !block->resting && scanner->chunk_at < block->chunk_count) {
        view.chunk = &block->chunks[scanner->chunk_at];
        if (view.chunk->state == CHUNK_ARMED)
            scan_armed(&view);
        else
            scan_unarmed(&view);
    }
    lock_release(&block->lock);
}

static enum scan_result end_pass(struct scanner *scanner)
{
    scanner->block_at = 0;
    scanner->chunk_at = 0;
    scanner->passes++;
    scanner->huge_chunks = scanner->huge_seen;
    scanner->huge_seen = 0;
    return SCAN_PASS_END;
}

/* Goes on to the next chunk of the block that may have something to look at. */
static void skip_quiet(struct scanner *scanner, struct ram_block *block)
{
    struct survey *survey = &scanner->survey;

    if (survey_is_due(survey, block, scanner->chunk_at)) {
        lock_take(&block->lock);
        survey->pass = scanner->passes;
        survey->lazy = scanner->lazy;
        if (block->live && !block->resting)
            survey_take(survey, scanner->ram, block, scanner->chunk_at, scanner->regions);
        lock_release(&block->lock);
    }
    while (survey_is_quiet(survey, block, scanner->chunk_at))
        scanner->chunk_at++;
}

enum scan_result scan_step(struct scanner *scanner)
{
    struct guest_ram *ram = scanner->ram;
    uint32_t count = __atomic_load_n(&ram->block_count, __ATOMIC_ACQUIRE);
    struct ram_block *block;

    if (scanner->block_at >= count)
        return end_pass(scanner);
    block = &ram->blocks[scanner->block_at];
    if (!block->live || scanner->chunk_at >= block->chunk_count) {
        scanner->have_pending = false;
        scanner->survey.block = NULL;
        scanner->block_at++;
        scanner->chunk_at = 0;
        return SCAN_MORE;
    }
    if (!scanner->have_pending) {
        skip_quiet(scanner, block);
        if (survey_is_due(&scanner->survey, block, scanner->chunk_at) && !block->resting)
            return SCAN_MORE; /* all of it was quiet */
        scan_chunk(scanner, block);
    }
    if (scanner->have_pending && !look_at_pending(scanner, block))
        return SCAN_FULL;
    scanner->chunk_at++;
    return SCAN_MORE;
}

void scan_forget(struct scanner *scanner)
{
    struct guest_ram *ram = scanner->ram;

    for (uint32_t b = 0; b < ram->block_count; b++) {
        struct ram_block *block = &ram->blocks[b];
        lock_take(&block->lock);
        for (uint32_t i = 0; block->live && i < block->pages; i++)
            if (block->chunks[ram_chunk_of(block, i)].state == CHUNK_ARMED &&
                ram_place(block, i) == PLACE_PRIVATE)
                ram_set_young(block, i, true);
        lock_release(&block->lock);
    }
    scanner->have_pending = false;
    scanner->survey.block = NULL;
    scanner->block_at = 0;
    scanner->chunk_at = 0;
}
