/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Freeze and thaw.
 *
 * A frozen page is out of everybody's reach: UFFDIO_MOVE has taken it out of the guest's address
 * into the staging area, and whoever touches the hole (a vCPU, a thread of the VMM, the kernel on
 * behalf of an I/O) waits in a MISSING fault until it is thawed. The kernel refuses (-EBUSY) a
 * page that is pinned with FOLL_PIN, so no I/O that is under way can still be writing to it.
 *
 * Invariants: the block's lock is held from freeze to thaw; nothing in between goes through libc
 * or waits for another thread; every frozen page is either replaced by something that was
 * compared with it, or given back.
 */
#ifndef MEMD_PAGES_FREEZE_H
#define MEMD_PAGES_FREEZE_H

#include "ram.h"

/* How many pages are frozen at once. A freeze of 64 pages takes about 50 us (move 12, compare 11,
 * map 5 and more on a busy machine); 512 took 9 ms. */
#define FREEZE_MAX_PAGES 64U

/* Moves pages [index, index + pages) into the staging area. Returns how many were frozen (from
 * index on, at least 1), or -errno: -EBUSY pinned or not exclusive, or a file was opened for direct
 * I/O meanwhile, -ENOENT not there, -EINVAL not within one VMA. The frozen bytes are at
 * freeze_bytes(ram, 0), ... */
int freeze_take(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages);

/* The bytes of the i-th frozen page. */
static inline uint8_t *freeze_bytes(const struct guest_ram *ram, uint32_t i)
{
    return ram->staging + (size_t)(ram->staged + i) * PAGE_BYTES;
}

/* Gives `pages` frozen pages, from the `first`-th of the freeze on, back to the guest at `index`.
 * Can't fail: where MOVE is refused (a fork came between) the bytes are copied, again and again
 * until the kernel has a page for them. */
void freeze_return(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t first,
                   uint32_t pages);

/* Ends a freeze of `pages` pages at `index`: wakes whoever waits. Bytes that were not given back
 * stay in the staging area until freeze_empty, or until a freeze needs the room: to free single
 * pages one by one costs as much as to move them. */
void freeze_thaw(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages);

/* Frees what earlier freezes have left in the staging area. Between freezes, on their thread. */
void freeze_empty(struct guest_ram *ram);

/* Tries MOVE there and back on two pages of our own. 0 or -errno. */
int freeze_probe(struct guest_ram *ram);

#endif
