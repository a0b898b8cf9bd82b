/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which pages a source must send: what the guest has, and what it has written since it was sent.
 *
 * The kernel tells both (PAGEMAP_SCAN). While writes are tracked every chunk is registered for
 * asynchronous write-protection, armed or not; a pass lists what was written and protects it again
 * before a byte of it is read, so a write that comes in between is found by the next pass. Pages of
 * the store are not tracked: who writes to one gets a page of its own, which counts as written.
 *
 * The scanner consumes the same marks: it must not run meanwhile. Nor may anything be merged: a
 * page that is moved into the store loses its mark.
 */
#ifndef MEMD_POSTCOPY_AGENT_PASSES_H
#define MEMD_POSTCOPY_AGENT_PASSES_H

#include "kernel_abi.h"
#include "regions.h"

/* What the VMM knows to be written by ways that do not show in the page tables: adds it (a bit a
 * page, of at most 512 pages); false: there is no such log. Called without locks. */
struct passes_log {
    bool (*ask)(void *self, const void *addr, size_t bytes, uint64_t *bitmap);
    void *self;
};

struct passes {
    struct guest_ram *ram;
    const struct regions *regions;
    uint64_t *sent;        /* bitmap: what the destination was sent is right, as far as is known */
    uint64_t *pending;     /* bitmap: to be sent */
    struct passes_log log; /* .ask may be NULL */
    bool begun;            /* there was a pass */
    uint8_t
        *full; /* one a chunk, in their order: each of its pages held bytes when it was foreseen */
    struct page_region regions_found[HUGE_PAGES];
};

/* Looks, while the guest still runs, which chunks need not be looked at when it has stopped: where
 * every page holds bytes, every page is to be sent. (One that is given up meanwhile is sent as
 * nothing.) Only a stop without passes before it makes use of that. */
void passes_foresee(struct passes *passes);

/* Begins a pass: what was written since the last one (in the first: everything) is no longer
 * `sent`, and `pending`. Returns how many pages are, or -errno. */
int64_t passes_begin(struct passes *passes);

/* Hears now and then how far it is: the pages before `end` are judged. What it returns below 0 ends
 * the work. */
struct passes_listener {
    int (*hear)(void *self, uint64_t end);
    void *self;
};

/* The guest has stopped. `pending` becomes what the destination must still get. Each page is either
 * pending, or `sent`, or holds nothing. 0 or -errno. */
int passes_stop(struct passes *passes, bool tracked, const struct passes_listener *listener);

/* Ends the tracking. */
void passes_end(struct passes *passes);

#endif
