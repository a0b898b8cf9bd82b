/* SPDX-License-Identifier: Apache-2.0 */
#include "survey.h"

/* ---- what was found ---- */

static void mark_busy(struct survey *survey, uint32_t first, uint32_t end)
{
    for (uint32_t c = first; c < end; c++)
        survey->busy |= 1U << (c - survey->first);
}

static uint32_t page_at(const struct ram_block *block, uint64_t address)
{
    return (uint32_t)((address - (uintptr_t)block->base) / PAGE_BYTES);
}

/* Pages [from, to) of the block, within one chunk, were written. */
static void note_written(struct survey *survey, const struct ram_block *block, uint32_t from,
                         uint32_t to)
{
    uint32_t c = ram_chunk_of(block, from);
    uint32_t first = ram_chunk_first(block, c);
    struct survey_extent *written = &survey->written[c - survey->first];

    if (written->end == 0)
        written->first = (uint16_t)(from - first);
    written->end = (uint16_t)(to - first); /* they come in order */
    mark_busy(survey, c, c + 1);
}

static void note_region(struct survey *survey, const struct ram_block *block,
                        const struct page_region *region)
{
    uint32_t end = page_at(block, region->end);

    for (uint32_t at = page_at(block, region->start), to; at < end; at = to) {
        to = ram_chunk_end(block, ram_chunk_of(block, at));
        to = to < end ? to : end;
        note_written(survey, block, at, to);
    }
}

/* All of these chunks, wherever they were written. */
static void note_unknown(struct survey *survey, const struct ram_block *block, uint32_t first,
                         uint32_t end)
{
    for (uint32_t c = first; c < end; c++) {
        survey->written[c - survey->first] = (struct survey_extent){0};
        note_written(survey, block, ram_chunk_first(block, c), ram_chunk_end(block, c));
    }
}

/* Chunks [first, end) are all armed or all empty. What there was no room for is busy. */
static void ask_kernel(struct survey *survey, const struct guest_ram *ram,
                       const struct ram_block *block, uint32_t first, uint32_t end,
                       struct page_region *regions)
{
    bool armed = block->chunks[first].state == CHUNK_ARMED;
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .start = (uintptr_t)ram_address(block, ram_chunk_first(block, first)),
        .end = (uintptr_t)ram_address(block, ram_chunk_end(block, end - 1)),
        .vec = (uintptr_t)regions,
        .vec_len = HUGE_PAGES,
        .category_mask = armed ? PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN : 0,
        .category_anyof_mask = armed ? 0 : PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        .return_mask = PAGE_IS_PRESENT,
    };
    int count = sys_ioctl(ram->pagemap_fd, PAGEMAP_SCAN, &scan);

    for (int r = 0; r < count; r++)
        note_region(survey, block, &regions[r]);
    if (count < 0)
        note_unknown(survey, block, first, end);
    else if (scan.walk_end < scan.end)
        note_unknown(survey, block, ram_chunk_of(block, page_at(block, scan.walk_end)), end);
}

static bool has_young(const struct ram_block *block, uint32_t chunk)
{
    uint32_t first = ram_chunk_first(block, chunk);
    uint32_t last = ram_chunk_end(block, chunk) - 1;

    /* Whole words: a neighbour's young page costs a look, no more. */
    for (uint32_t word = first / 64; word <= last / 64; word++)
        if (block->young[word])
            return true;
    return false;
}

/* ---- what is asked ---- */

/* What has to be done to know of a chunk. */
enum question { LOOK, ASK_ARMED, ASK_EMPTY, NOTHING };

/* Is it left out of this pass? Neighbours are left out of different ones. */
static bool left_out(const struct survey *survey, const struct ram_block *block, uint32_t c)
{
    uint32_t fruitless = block->chunks[c].fruitless;
    uint32_t every = fruitless >= SURVEY_FRUITLESS_8TH   ? 8
                     : fruitless >= SURVEY_FRUITLESS_4TH ? 4
                     : fruitless >= SURVEY_FRUITLESS_2ND ? 2
                                                         : 1;

    return survey->lazy && (survey->pass + c / SURVEY_CHUNKS) % every != 0;
}

static enum question question(const struct survey *survey, const struct ram_block *block,
                              uint32_t c)
{
    switch (block->chunks[c].state) {
    case CHUNK_ARMED:
        return ram_chunk_is_shared(block, c) || left_out(survey, block, c) ? NOTHING : ASK_ARMED;
    case CHUNK_EMPTY: return ASK_EMPTY;
    default: return LOOK;
    }
}

/* The chunks from `first` on that one question serves. */
static uint32_t stretch(const struct survey *survey, const struct ram_block *block, uint32_t first,
                        uint32_t end)
{
    uint32_t c = first + 1;

    while (c < end && question(survey, block, c) == question(survey, block, first))
        c++;
    return c - first;
}

void survey_take(struct survey *survey, const struct guest_ram *ram, struct ram_block *block,
                 uint32_t first, struct page_region *regions)
{
    uint32_t end = first + SURVEY_CHUNKS;

    if (end > block->chunk_count)
        end = block->chunk_count;
    *survey = (struct survey){
        .block = block, .first = first, .end = end, .pass = survey->pass, .lazy = survey->lazy};
    for (uint32_t c = first, run; c < end; c += run) {
        enum question asked = question(survey, block, c);
        run = stretch(survey, block, c, end);
        if (asked == LOOK)
            note_unknown(survey, block, c, c + run);
        else if (asked != NOTHING)
            ask_kernel(survey, ram, block, c, c + run, regions);
    }
    for (uint32_t c = first; c < end; c++) {
        if (left_out(survey, block, c))
            continue;
        if (has_young(block, c))
            mark_busy(survey, c, c + 1);
        if (survey_is_quiet(survey, block, c)) {
            block->chunks[c].hot_passes = 0;
            if (block->chunks[c].state == CHUNK_ARMED)
                survey_count_look(&block->chunks[c], 0);
        }
    }
}

void survey_count_look(struct chunk *chunk, uint32_t new_pages)
{
    uint32_t most = new_pages ? SURVEY_FRUITLESS_8TH - 1 : UINT8_MAX;

    if (new_pages > SURVEY_LITTLE)
        chunk->fruitless = 0;
    else if (chunk->fruitless < most)
        chunk->fruitless++;
    else
        chunk->fruitless = (uint8_t)most;
}

struct survey_extent survey_written(const struct survey *survey, const struct ram_block *block,
                                    uint32_t chunk)
{
    if (survey_is_due(survey, block, chunk))
        return (struct survey_extent){
            .end = (uint16_t)(ram_chunk_end(block, chunk) - ram_chunk_first(block, chunk))};
    return survey->written[chunk - survey->first];
}
