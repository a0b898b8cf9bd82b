/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the parts of the destination's half (incoming.h) have of each other: incoming.c opens and
 * closes it and has the bulk thread, incoming_pages.c places what comes, incoming_urgent.c asks.
 */
#ifndef MEMD_POSTCOPY_AGENT_INCOMING_PARTS_H
#define MEMD_POSTCOPY_AGENT_INCOMING_PARTS_H

#include "incoming.h"

static inline bool incoming_is_mapped(const struct incoming *incoming)
{
    return __atomic_load_n(&incoming->mapped, __ATOMIC_ACQUIRE);
}

static inline void incoming_add(uint64_t *counter, uint64_t pages)
{
    __atomic_add_fetch(counter, pages, __ATOMIC_RELAXED);
}

/* The pages of a run that lie in one chunk of one block. */
struct piece {
    struct ram_block *block;
    uint32_t index, end;
};

/* The first of [page, end). */
struct piece incoming_piece(const struct incoming *incoming, uint64_t page, uint64_t end);

/* Something in `incoming` is new. */
void incoming_tell(struct incoming *incoming);
/* From the fault to the page: who waits for it began to, and waits no more. */
void incoming_begin_wait(struct incoming *incoming, uint64_t page);
void incoming_end_wait(struct incoming *incoming, uint64_t page);
/* Is nothing remote any more? Then the source is to hear it. */
void incoming_look_whether_complete(struct incoming *incoming);

/* ---- incoming_pages.c ---- */

/* Reads what there is, and places it. A connection that says something wrong has failed then. */
void incoming_read(struct incoming *incoming, struct stream *stream);

/* ---- incoming_urgent.c ---- */

/* The page source of remote pages: asks for the page. Handler's thread, with the block's lock. */
int incoming_fetch(void *self, const struct ram_block *block, uint32_t index, uint32_t pages,
                   const void **ret_bytes);
/* The handler's side (fault.h). */
int incoming_prepare_urgent(void *self, short *ret_events);
void incoming_urgent_ready(void *self, short events);

#endif
