/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finding what changed, without reading it.
 *
 * A pass walks all blocks, one 2 MiB chunk a step; stretches in which nothing has happened since
 * the last pass are passed over at once (survey.h). In an armed chunk the kernel lists the pages
 * that were written since the last pass (PAGEMAP_SCAN with WP_ASYNC), and protects them again: 2
 * to 4 ns a page when nothing changed. A page that was written is *young*; one that stays unwritten
 * for a pass (more, if its shares were broken before) is a candidate: it is read once, dropped if
 * it is all zeros, and otherwise hashed and offered.
 *
 * Chunks that are not armed are looked at for what they are: empty, 4 KiB pages (armed at once),
 * or one huge page. A huge page is judged by the hashes of a few of its pages: while they change
 * it is left alone; when a pass finds nearly all of them as they were, it is cold and armed. The
 * first write to an armed huge page splits it, and no earlier.
 *
 * A scanner belongs to one thread. It never waits: when the sink takes no more, the step returns
 * and the next one goes on where it stopped.
 */
#ifndef MEMD_KSM_AGENT_SCAN_H
#define MEMD_KSM_AGENT_SCAN_H

#include "hash.h"
#include "kernel_abi.h"
#include "ram.h"
#include "survey.h"

struct scan_sink {
    /* Takes a candidate; false when there is no room now. */
    bool (*offer)(void *self, uint32_t page, uint64_t hash);
    /* May these pages be frozen now? */
    bool (*may_freeze)(void *self, struct ram_block *block, uint32_t index, uint32_t pages);
    void *self;
};

enum scan_result {
    SCAN_MORE,    /* call again */
    SCAN_FULL,    /* the sink is full: call again when it has room */
    SCAN_PASS_END /* every block has been walked; the next call starts a new pass */
};

struct scanner {
    struct guest_ram *ram;
    struct hash_secret secret;
    struct scan_sink sink;
    uint32_t now_ms;    /* the caller's clock, set before each pass; may wrap */
    uint32_t settle_ms; /* a huge page is cold when it has not changed for so long */
    bool lazy; /* set by the caller: what has been quiet for long is left out of most passes */
    uint32_t block_at, chunk_at;
    struct survey survey;              /* of chunk_at and what comes behind it */
    uint64_t pending[HUGE_PAGES / 64]; /* candidates of the current chunk still to be looked at */
    bool have_pending;
    uint64_t pass_written;    /* pages found written in this pass */
    uint64_t pass_candidates; /* pages that became candidates in this pass */
    uint64_t hashed;          /* ever */
    uint64_t zero_merges;     /* ever */
    uint64_t busy;            /* freezes that were refused for zero pages, ever */
    uint64_t huge_chunks;     /* as of the last pass */
    uint64_t huge_seen;       /* in this pass */
    uint32_t passes;
    struct page_region regions[HUGE_PAGES];
};

enum scan_result scan_step(struct scanner *scanner);

/* Every private page is a candidate again, and every huge block to be judged again: the index that
 * knew them is gone. */
void scan_forget(struct scanner *scanner);

#endif
