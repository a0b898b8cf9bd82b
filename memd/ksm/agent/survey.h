/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which of the next chunks deserve a look at all.
 *
 * At rest nearly every chunk is as it was: asking for each of them costs more in system calls and
 * turns than in looking. A survey asks the kernel once for a whole stretch of armed chunks, or of
 * empty ones, and doesn't ask at all about chunks in which every page is shared: who writes there
 * runs into the fault handler. (What a walk costs is the VMAs, not the pages: 250 ns each when they
 * are cold, and scattered shares have one a page.) It changes nothing and protects nothing; what it
 * finds is looked at properly afterwards, and what is written behind it is found by the next pass.
 */
#ifndef MEMD_KSM_AGENT_SURVEY_H
#define MEMD_KSM_AGENT_SURVEY_H

#include "kernel_abi.h"
#include "ram.h"

/* A chunk at which so many looks in a row were fruitless is looked at every 2nd, 4th, 8th pass
 * while the survey is lazy. Fruitless: no page became a candidate, and none was written but those
 * that were written at the look before as well (an idle guest's kernel writes the same pages for
 * ever). A little fruit wakes nobody: it is worth every 4th pass. (As ksmd's smart_scan does with
 * pages: skip_age() in mm/ksm.c, Linux 6.7.) So a page that rests is found after 12 passes at the
 * latest: 8 until it is seen that it was written, 4 until that it was not again. */
#define SURVEY_FRUITLESS_2ND 2U
#define SURVEY_FRUITLESS_4TH 3U
#define SURVEY_FRUITLESS_8TH 5U

/* So many new pages are a little fruit: 1 % of a chunk. */
#define SURVEY_LITTLE 5U

/* 32 MiB: its page tables are walked in 25 to 100 us, during which the block is locked. */
#define SURVEY_CHUNKS 16U

/* Pages [first, end) of a chunk, counted from its beginning, hold all that was written in it. */
struct survey_extent {
    uint16_t first, end;
};

/* Chunks [first, end) of the block have been surveyed; bit i of `busy` is chunk first + i. */
struct survey {
    const struct ram_block *block; /* NULL: none */
    uint32_t first, end;
    uint32_t busy;
    uint32_t pass; /* set by the caller, as is `lazy` */
    bool lazy;     /* where looks were fruitless for long is left out of most passes */
    struct survey_extent written[SURVEY_CHUNKS]; /* of armed chunks */
};

/* Surveys the block from chunk `first` on. `regions` is room for HUGE_PAGES regions. Caller holds
 * the block's lock. */
void survey_take(struct survey *survey, const struct guest_ram *ram, struct ram_block *block,
                 uint32_t first, struct page_region *regions);

/* A look at an armed chunk is over, and so many of its pages were new. */
void survey_count_look(struct chunk *chunk, uint32_t new_pages);

/* Where the survey saw writes in the armed chunk; all of it when it was not surveyed. */
struct survey_extent survey_written(const struct survey *survey, const struct ram_block *block,
                                    uint32_t chunk);

/* Was the chunk surveyed, and is nothing to be done for it? */
static inline bool survey_is_quiet(const struct survey *survey, const struct ram_block *block,
                                   uint32_t chunk)
{
    return survey->block == block && chunk >= survey->first && chunk < survey->end &&
           !(survey->busy >> (chunk - survey->first) & 1);
}

/* Is there no survey of this chunk? */
static inline bool survey_is_due(const struct survey *survey, const struct ram_block *block,
                                 uint32_t chunk)
{
    return survey->block != block || chunk < survey->first || chunk >= survey->end;
}

#endif
