/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changing what is mapped at a guest page: the store, a private copy, or nothing.
 *
 * The rule that all of this keeps: no address of guest RAM is ever mapped anonymous and
 * unregistered unless its true content is zero.
 *
 * The caller holds the block's lock throughout.
 */
#ifndef MEMD_PAGES_REMAP_H
#define MEMD_PAGES_REMAP_H

#include "ram.h"

/* Attributes that every view of a segment has (see remap_to_store). */
#define REMAP_VIEW_ATTRIBUTES RAM_DONTFORK

/*
 * Maps store pages over frozen pages [index, index + pages), whose places are private and whose
 * bytes have been compared with `view`: a private, writable mapping of the segment with
 * REMAP_VIEW_ATTRIBUTES, out of which the page tables are moved (what the comparison has faulted
 * in arrives mapped). They are not shared before remap_protect, which must follow soon: what is
 * written until then the kernel copies by itself. 0, or -errno: nothing has changed, the hole is
 * still there.
 */
int remap_map(struct guest_ram *ram, const struct ram_block *block, uint32_t index, uint32_t pages,
              uint8_t *view);

/* Protects pages that remap_map has mapped, in one run or more, slots[i] at page index + i. They
 * are shared from then on, but for those that somebody has written to: these are private and
 * captive. Returns how many. */
uint32_t remap_protect(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                       uint32_t pages, const uint32_t *slots);

/* Both, for one page. 0 (and captive or not) or -errno. */
int remap_to_store(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint8_t *view,
                   uint32_t slot, bool *ret_captive);

/*
 * Gives shared pages from `index` on a copy of their own, as many as lie one behind the other in
 * the store, at most `pages`. With `arm`, the copies are registered like the rest of an armed
 * chunk. Returns how many (at least 1), or -errno with nothing changed.
 */
int remap_to_private(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages,
                     bool arm);

/* Puts fresh empty memory where shared or captive pages were: a discard. 0 or -errno. */
int remap_to_absent(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages,
                    bool arm);

/* Registers [index, index + pages) with guest_fd. 0 or -errno: then none of it is (after -ENOMEM
 * not what was before, either). */
int remap_arm(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages);

#endif
