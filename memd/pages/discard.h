/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Giving pages up, and giving a whole block back to the VMM.
 *
 * A discard (MADV_DONTNEED) on a private mapping of the store would bring the store's bytes back:
 * a guest that reported a page free would find another page's content in it. So a discard of a
 * shared page puts fresh memory there.
 *
 * What works on a whole block goes chunk by chunk, with the lock taken anew for each where nobody
 * needs it to be one: who writes to a shared page meanwhile waits for that lock.
 */
#ifndef MEMD_PAGES_DISCARD_H
#define MEMD_PAGES_DISCARD_H

#include "ram.h"

/*
 * Makes pages [index, index + pages) absent. `advice` is what the VMM asked for (MADV_DONTNEED,
 * MADV_FREE, ...) and what pages that are not in the store get. Caller holds the lock. 0 or the
 * kernel's -errno.
 */
int discard_pages(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages,
                  int advice);

/*
 * Makes every shared page of chunk `c` private and takes its registration away, so that it is as
 * the VMM made it but for what it holds. Caller holds the lock and has set the block's `resting`.
 * Returns how many pages could not be made private (no memory, no VMA: they stay as they are, and
 * right; nor could those that are still at a migration source), 0 when all is done. Captive pages
 * are private already and stay where they are.
 */
uint32_t discard_stand_down(struct guest_ram *ram, struct ram_block *block, uint32_t c);

/* The VMM is about to map something else at these pages: whatever is known of the store there ends.
 * Caller holds the lock. */
void discard_forget(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages);

/*
 * Ends every share of chunk `c`, whatever happens; registrations stay. A page for which there is no
 * copy to be had keeps its mapping and becomes captive: its slot's number may soon mean something
 * else, and is not to be looked up again. Caller holds the lock.
 */
void discard_shares(struct guest_ram *ram, struct ram_block *block, uint32_t c);

/* Makes the pages of chunk `c` that share with one segment private; registrations stay. Caller
 * holds the lock. Returns how many could not be. */
uint32_t discard_segment(struct guest_ram *ram, struct ram_block *block, uint32_t c,
                         uint32_t segment);

/* Takes an armed chunk's registration away. Its places must have no shared page. Where the kernel
 * has no VMA for that, or pages of it are remote, the chunk stays armed. */
void discard_disarm(struct guest_ram *ram, struct ram_block *block, uint32_t c,
                    enum chunk_state state);

#endif
