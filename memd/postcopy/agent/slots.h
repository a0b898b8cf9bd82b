/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Contents that several pages of this guest share: they are sent once. Counted when a migration
 * begins to send; what is shared by one page only here is sent like any page.
 */
#ifndef MEMD_POSTCOPY_AGENT_SLOTS_H
#define MEMD_POSTCOPY_AGENT_SLOTS_H

#include "regions.h"

struct slot_entry {
    uint32_t slot;
    uint32_t uses;    /* 0: free */
    uint32_t content; /* its number on the wire, given once and for ever; SLOT_NONE: not yet */
    bool sent;        /* as far as is known */
    uint64_t hash;    /* once it has a number */
};

struct slots {
    struct slot_entry *table; /* open addressing */
    uint64_t room;            /* a power of two; 0: none is shared */
    uint32_t contents;        /* numbers given out */
};

/* Counts. 0 or -ENOMEM. */
int slots_open(struct slots *slots, const struct regions *regions);
void slots_close(struct slots *slots);

/* The entry of a slot that several pages have, or NULL. */
struct slot_entry *slots_find(struct slots *slots, uint32_t slot);

/* The destination has the first `known` contents, as for the others it is not known. They keep
 * their numbers: what is still on its way there must not mean something else when it arrives. */
void slots_forget(struct slots *slots, uint32_t known);

#endif
