/* SPDX-License-Identifier: Apache-2.0 */
#include "passes.h"

#include <errno.h>
#include <string.h>

#include "uffd.h"

/* A chunk that is being looked at. */
struct look {
    struct passes *passes;
    struct ram_block *block;
    uint64_t page; /* on the wire, of the first */
    uint32_t first, end;
    uint64_t log[HUGE_PAGES / 64]; /* what the VMM says was written */
};

static void mark(struct look *look, uint32_t index, bool pending)
{
    uint64_t page = look->page + (index - look->first);

    regions_clear(look->passes->sent, page);
    if (pending)
        regions_set(look->passes->pending, page);
}

/* ---- what the kernel and the VMM know ---- */

static int ask_kernel(struct look *look, uint64_t flags, uint64_t mask, uint64_t anyof)
{
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .flags = flags,
        .start = (uintptr_t)ram_address(look->block, look->first),
        .end = (uintptr_t)ram_address(look->block, look->end),
        .vec = (uintptr_t)look->passes->regions_found,
        .vec_len = HUGE_PAGES,
        .category_mask = mask,
        .category_anyof_mask = anyof,
        .return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_WRITTEN,
    };

    return sys_ioctl(look->passes->ram->pagemap_fd, PAGEMAP_SCAN, &scan);
}

static uint32_t page_at(const struct look *look, uint64_t address)
{
    return (uint32_t)((address - (uintptr_t)look->block->base) / PAGE_BYTES);
}

static bool holds_bytes(uint64_t categories)
{
    return categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED) && !(categories & PAGE_IS_PFNZERO);
}

/* The scanner would have found it, and finds it no more: the place is moved and the page becomes
 * young in its stead. Armed chunks only; the others are looked at anew anyway. */
static void note_for_scanner(struct look *look, uint32_t index, uint64_t categories)
{
    struct ram_block *block = look->block;
    enum place place = ram_place(block, index);

    if (block->chunks[ram_chunk_of(block, index)].state != CHUNK_ARMED ||
        ram_captive(block, index) || place == PLACE_SHARED)
        return;
    if (!(categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED))) {
        if (place != PLACE_ABSENT)
            ram_move_places(look->passes->ram, block, index, 1, TRANSITION_DISCARD);
    } else if (!(categories & PAGE_IS_PFNZERO)) {
        if (place == PLACE_ZERO || place == PLACE_ABSENT)
            ram_move_places(look->passes->ram, block, index, 1,
                            place == PLACE_ZERO ? TRANSITION_WRITE : TRANSITION_POPULATE);
        ram_set_young(block, index, true);
    }
}

/* Adds the VMM's own log. Without locks: it may call us. */
static void ask_vmm(struct look *look)
{
    struct passes *passes = look->passes;
    uint32_t pages = look->end - look->first;

    memset(look->log, 0, sizeof(look->log));
    if (!passes->log.ask ||
        !passes->log.ask(passes->log.self, ram_address(look->block, look->first),
                         (size_t)pages * PAGE_BYTES, look->log))
        return;
    for (uint32_t i = 0; i < pages; i++)
        if (look->log[i / 64] >> (i % 64) & 1)
            mark(look, look->first + i, false);
}

/* ---- passes ---- */

/* Caller holds the lock, as below. */
static int track(struct look *look)
{
    struct chunk *chunk = &look->block->chunks[ram_chunk_of(look->block, look->first)];
    int r;

    if (chunk->state == CHUNK_ARMED)
        return 0;
    r = uffd_register(look->passes->ram->guest_fd, ram_address(look->block, look->first),
                      (size_t)(look->end - look->first) * PAGE_BYTES, UFFDIO_REGISTER_MODE_WP);
    if (r == 0)
        chunk->tracked = 1;
    return r;
}

static int list_written(struct look *look)
{
    const struct page_region *regions = look->passes->regions_found;
    int count = ask_kernel(look, PM_SCAN_WP_MATCHING, PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN, 0);

    for (int r = 0; r < count; r++)
        for (uint64_t at = regions[r].start; at < regions[r].end; at += PAGE_BYTES) {
            note_for_scanner(look, page_at(look, at), regions[r].categories);
            mark(look, page_at(look, at), holds_bytes(regions[r].categories));
        }
    return count < 0 ? count : 0;
}

/* In the first pass: what the scanner had protected before is not listed as written. */
static int list_present(struct look *look)
{
    const struct page_region *regions = look->passes->regions_found;
    int count = ask_kernel(look, 0, 0, PAGE_IS_PRESENT | PAGE_IS_SWAPPED);

    for (int r = 0; r < count; r++)
        for (uint64_t at = regions[r].start; at < regions[r].end; at += PAGE_BYTES)
            if (holds_bytes(regions[r].categories) && !ram_captive(look->block, page_at(look, at)))
                mark(look, page_at(look, at), true);
    return count < 0 ? count : 0;
}

/* What the kernel does not list: pages of the store, and what the VMM has said. (Captives wait for
 * the stop: nobody knows when they are written.) */
static void list_others(struct look *look)
{
    for (uint32_t i = look->first; i < look->end; i++) {
        uint64_t page = look->page + (i - look->first);
        uint32_t off = i - look->first;
        bool logged = look->log[off / 64] >> (off % 64) & 1;

        if (!regions_test(look->passes->sent, page) &&
            (ram_place(look->block, i) == PLACE_SHARED ||
             (logged && ram_place(look->block, i) == PLACE_PRIVATE)))
            regions_set(look->passes->pending, page);
    }
}

static int pass_over(struct look *look)
{
    int r;

    ask_vmm(look);
    lock_take(&look->block->lock);
    r = look->block->live ? track(look) : -ENOENT;
    if (r == 0)
        r = list_written(look);
    if (r == 0 && !look->passes->begun)
        r = list_present(look);
    if (r == 0)
        list_others(look);
    lock_release(&look->block->lock);
    return r;
}

/* ---- the stop ---- */

/* Caller holds the lock. What was listed holds bytes; is it also right at the destination? Returns
 * whether it has to be sent. */
static bool judge(struct look *look, uint32_t index, uint64_t categories, bool tracked)
{
    uint64_t page = look->page + (index - look->first);
    bool sent = regions_test(look->passes->sent, page);
    bool holds = holds_bytes(categories) || ram_place(look->block, index) == PLACE_SHARED;
    bool stale =
        !tracked || categories & PAGE_IS_WRITTEN || ram_captive(look->block, index) || !sent;

    if (sent && (!holds || stale))
        regions_clear(look->passes->sent, page);
    return holds && stale;
}

/* The guest stands still until all of them are judged: their bits are set a word at a time. */
static void judge_all(struct look *look, int count, bool tracked)
{
    const struct page_region *region = look->passes->regions_found, *end = region + count;
    uint64_t at = (uintptr_t)ram_address(look->block, look->first);
    uint64_t page = look->page, word = 0;

    for (uint32_t i = look->first; i < look->end; i++, page++, at += PAGE_BYTES) {
        bool shared = ram_place(look->block, i) == PLACE_SHARED;

        while (region < end && region->end <= at)
            region++;
        /* In the store a page is what its place says; the mark says nothing there. */
        if (judge(look, i, region < end && region->start <= at && !shared ? region->categories : 0,
                  tracked))
            word |= regions_bit(page);
        if (page % 64 == 63 || i + 1 == look->end) {
            __atomic_fetch_or(&look->passes->pending[page / 64], word, __ATOMIC_ACQ_REL);
            word = 0;
        }
    }
}

static int stop_over(struct look *look, bool tracked)
{
    const uint16_t *shared = &look->block->chunk_shared[ram_chunk_of(look->block, look->first)];
    int count;

    if (tracked)
        ask_vmm(look);
    lock_take(&look->block->lock);
    count = look->block->live ? ask_kernel(look, 0, 0, PAGE_IS_PRESENT | PAGE_IS_SWAPPED) : -ENOENT;
    /* Where nothing is, and nothing was sent, nothing is pending. */
    if (count > 0 || (count == 0 && (tracked || *shared)))
        judge_all(look, count, tracked);
    lock_release(&look->block->lock);
    return count < 0 ? count : 0;
}

/* ---- what needs no look at the stop ---- */

/* Caller holds the lock. */
static bool is_full(struct look *look)
{
    const struct page_region *regions = look->passes->regions_found;
    int count = ask_kernel(look, 0, 0, PAGE_IS_PRESENT | PAGE_IS_SWAPPED);
    /* In the store a page is what its place says. */
    uint32_t shared = look->block->chunk_shared[ram_chunk_of(look->block, look->first)];
    uint32_t held = shared;

    for (int r = 0; r < count; r++) {
        if (!holds_bytes(regions[r].categories))
            continue;
        held += (uint32_t)((regions[r].end - regions[r].start) / PAGE_BYTES);
        for (uint64_t at = regions[r].start; shared && at < regions[r].end; at += PAGE_BYTES)
            held -= ram_place(look->block, page_at(look, at)) == PLACE_SHARED;
    }
    return held == look->end - look->first;
}

/* All of its pages are to be sent. */
static void take_whole(const struct look *look)
{
    uint64_t end = look->page + (look->end - look->first), word = 0;

    for (uint64_t page = look->page; page < end; page++) {
        word |= regions_bit(page);
        if (page % 64 == 63 || page + 1 == end) {
            __atomic_fetch_or(&look->passes->pending[page / 64], word, __ATOMIC_ACQ_REL);
            word = 0;
        }
    }
}

/* ---- over all chunks ---- */

static int64_t count_pending(const struct passes *passes)
{
    uint64_t words = (passes->regions->pages + 63) / 64;
    int64_t pages = 0;

    for (uint64_t w = 0; w < words; w++)
        pages += __builtin_popcountll(__atomic_load_n(&passes->pending[w], __ATOMIC_RELAXED));
    return pages;
}

/* A chunk of a region. */
static struct look look_at(struct passes *passes, const struct region *region, uint32_t chunk)
{
    uint32_t first = ram_chunk_first(region->block, chunk);

    return (struct look){.passes = passes,
                         .block = region->block,
                         .page = region->first + first,
                         .first = first,
                         .end = ram_chunk_end(region->block, chunk)};
}

void passes_foresee(struct passes *passes)
{
    uint8_t *full = passes->full;

    for (uint32_t i = 0; i < passes->regions->count; i++) {
        const struct region *region = &passes->regions->at[i];

        for (uint32_t c = 0; c < region->block->chunk_count; c++) {
            struct look look = look_at(passes, region, c);

            lock_take(&look.block->lock);
            *full++ = look.block->live && is_full(&look);
            lock_release(&look.block->lock);
        }
    }
}

int64_t passes_begin(struct passes *passes)
{
    int r = 0;

    for (uint32_t i = 0; i < passes->regions->count; i++) {
        const struct region *region = &passes->regions->at[i];

        for (uint32_t c = 0; c < region->block->chunk_count && r == 0; c++) {
            struct look look = look_at(passes, region, c);

            r = pass_over(&look);
        }
    }
    passes->begun = r >= 0;
    return r < 0 ? r : count_pending(passes);
}

int passes_stop(struct passes *passes, bool tracked, const struct passes_listener *listener)
{
    const uint8_t *full = passes->full;
    int r = 0;

    memset(passes->pending, 0, regions_bitmap_bytes(passes->regions));
    for (uint32_t i = 0; i < passes->regions->count; i++) {
        const struct region *region = &passes->regions->at[i];

        for (uint32_t c = 0; c < region->block->chunk_count && r == 0; c++) {
            struct look look = look_at(passes, region, c);

            if (*full++ && !tracked)
                take_whole(&look);
            else
                r = stop_over(&look, tracked);
            if (r == 0)
                r = listener->hear(listener->self, region->first + look.end);
        }
    }
    return r;
}

void passes_end(struct passes *passes)
{
    for (uint32_t i = 0; i < passes->regions->count; i++) {
        struct ram_block *block = passes->regions->at[i].block;

        for (uint32_t c = 0; c < block->chunk_count; c++) {
            uint32_t first = ram_chunk_first(block, c);

            lock_take(&block->lock);
            if (block->live && block->chunks[c].tracked && block->chunks[c].state != CHUNK_ARMED)
                uffd_unregister(passes->ram->guest_fd, ram_address(block, first),
                                (size_t)(ram_chunk_end(block, c) - first) * PAGE_BYTES);
            if (block->live)
                block->chunks[c].tracked = 0;
            lock_release(&block->lock);
        }
    }
}
