/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The round: what is about to be published.
 *
 * Theory of operation. Content is published only when it has a second user. When a page is offered
 * whose tag another page was offered with, an *item* is made: the other page is its source and is
 * asked for the content (WANT), the newcomer is its first waiter, and so are later ones. When the
 * content comes (PAGE), memd copies it, hashes its own copy, and the item is *filled*; when the
 * source has changed (STALE, or no answer), the first waiter takes its place.
 *
 * Filled items collect until there are as many as a segment should have, or until nothing new comes
 * for a while. Then a segment is *sealed* from them, in steps of a bounded number of pages each:
 * sort by guest and page (so that runs of pages become runs of slots), write, seal, record, and
 * then tell source and waiters of each item to MERGE. New items collect meanwhile.
 *
 * Everything has a fixed capacity; what does not fit is *missed*: the page stays known (SPARE), and
 * the domain's sweep tries it again.
 *
 * Not promised: that source or waiters still want the content when it is sealed. That is looked at
 * again item by item, and items with less than two takers are dropped before the segment is made.
 */
#ifndef MEMD_KSM_ROUND_H
#define MEMD_KSM_ROUND_H

#include "loop.h"
#include "units.h"

struct trust_domain;
struct ksm_segment;

#define KSM_ITEMS_MAX      (1U << 15) /* two segments of the largest size */
#define KSM_WAITERS_MAX    (1U << 17)
#define KSM_ROUND_SMALLEST 512U /* pages of a domain's first segments: 2 MiB */

enum ksm_item_state { ITEM_FREE, ITEM_ASKED, ITEM_FILLED, ITEM_SEALING };

struct ksm_item {
    uint64_t hash;
    uint64_t order; /* guest and page of the source */
    uint64_t asked_ns;
    uint32_t source; /* a reference of the index */
    uint32_t tag;
    uint32_t first_waiter;
    uint32_t next; /* in its bucket, or the next free one */
    enum ksm_item_state state;
};

struct ksm_waiter {
    uint32_t ref, next;
};

struct ksm_round {
    struct ksm_item *items;
    struct ksm_waiter *waiters;
    uint32_t *buckets; /* by source */
    uint8_t *staging;  /* the content of item i is page i */
    uint32_t item_top, free_item, free_items;
    uint32_t waiter_top, free_waiter, free_waiters;
    uint32_t asked, filled;
    uint32_t capacity; /* pages of the next full segment */
    uint64_t first_filled_ns, last_filled_ns;
    bool hurry; /* a pass has ended: nothing more will come for a while */
    struct loop_timer timer;

    /* What is being sealed. */
    struct loop_task seal_task;
    struct ksm_segment *segment;
    uint32_t *order; /* item of each page */
    uint32_t count, written, resolved;
};

int ksm_round_start(struct trust_domain *domain);
void ksm_round_stop(struct trust_domain *domain);

/* Asks source, a HINT, for its content on behalf of ref. false: no room, or source can't be
 * reached; nothing was changed. */
bool ksm_round_ask(struct trust_domain *domain, uint32_t source, uint32_t ref, uint32_t tag,
                   uint64_t hash);
/* ref waits for the content of source, which is WANTED or FILLED. false: no room. */
bool ksm_round_wait(struct trust_domain *domain, uint32_t source, uint32_t ref, uint32_t tag);
/* The content of source, which is WANTED, has come; it may still change and is copied first. */
void ksm_round_fill(struct trust_domain *domain, uint32_t source, const void *content);
/* The content of source, which was WANTED (and is something else now), will not come. */
void ksm_round_abandon(struct trust_domain *domain, uint32_t source);
/* Seal soon. */
void ksm_round_hurry(struct trust_domain *domain);
/* True when at least half of the items are free. */
bool ksm_round_has_room(const struct trust_domain *domain);

#endif
