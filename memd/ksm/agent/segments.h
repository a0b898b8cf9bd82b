/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The segments of the domain's store that this agent holds: for each a descriptor (to offer it to
 * a restarted memd) and a *view*, a private mapping of the whole segment from which pages are
 * compared and page tables are moved under the guest.
 *
 * A segment is taken only if the kernel has sealed it for good: what was compared once can never
 * change, whoever wrote it.
 */
#ifndef MEMD_KSM_AGENT_SEGMENTS_H
#define MEMD_KSM_AGENT_SEGMENTS_H

#include "page_source.h"
#include "protocol.h"

#define SEGMENTS_HELD_MAX 1024U

struct held_segment {
    uint8_t *view; /* NULL: this place in the table is free */
    uint32_t id;
    uint32_t pages;
    int fd;
    bool to_be_dropped; /* memd wants it back; some pages could not be made private yet */
};

/* Ids are handed out one after the other: a segment stands at its id modulo the table's size. */
struct segments {
    struct held_segment table[SEGMENTS_HELD_MAX];
};

/* Takes a segment in; owns `fd` on success. -EPERM: not sealed; -EINVAL: not that size; -ENOSPC:
 * another segment stands in its place in the table; -EEXIST: it is here already. */
int segments_add(struct segments *segments, uint32_t id, uint32_t pages, int fd);

/* Unmaps the view and closes the descriptor. No page may be shared with it any more. */
void segments_remove(struct segments *segments, uint32_t id);

/* The segment, or NULL. */
struct held_segment *segments_find(struct segments *segments, uint32_t id);

/* The bytes of `pages` pages from `slot` on in its view, or NULL when that is not here. */
uint8_t *segments_view(struct segments *segments, uint32_t slot, uint32_t pages);

/* The page source of shared pages. */
struct page_source segments_source(struct segments *segments);

#endif
