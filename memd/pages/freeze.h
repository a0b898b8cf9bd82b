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

/*
 * Besides: HUGE_PAGES at once where they are one huge page. The kernel moves that as it is (1 us),
 * and what takes time is to compare (200 us) and to map. Taken in pieces it would first be split
 * (150 us), then moved page by page (100 us) and freed so (100 us).
 */

/* Maps the staging areas. 0, or -errno and what is wrong in *ret_reason (static storage). */
int freeze_open(struct guest_ram *ram, const char **ret_reason);
void freeze_close(struct guest_ram *ram);
/* Nobody serves faults any more: a hole in the staging areas reads as zeros. */
void freeze_disarm(struct guest_ram *ram);

/* Is the page in a staging area? Any thread. */
bool freeze_is_staging(const struct guest_ram *ram, const uint8_t *page);

/* A file was opened for direct I/O: nothing is frozen before it was looked at. */
static inline bool freeze_must_wait(const struct guest_ram *ram)
{
    return __atomic_load_n(&ram->direct_io_changed, __ATOMIC_ACQUIRE);
}

/* Moves pages [index, index + pages) into a staging area. Returns how many were frozen (from
 * index on, at least 1), or -errno: -EBUSY pinned or not exclusive, or a file was opened for direct
 * I/O meanwhile, -ENOENT not there, -EINVAL not within one VMA. The frozen bytes are at
 * freeze_bytes(ram, 0), ... */
int freeze_take(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages);

/* The bytes of the i-th frozen page. */
static inline uint8_t *freeze_bytes(const struct guest_ram *ram, uint32_t i)
{
    return ram->frozen + (size_t)i * PAGE_BYTES;
}

/* Would a freeze of the 2 MiB from `index` on be one of a huge page? */
bool freeze_is_huge(const struct guest_ram *ram, const struct ram_block *block, uint32_t index);

/* Gives `pages` frozen pages, from the `first`-th of the freeze on, back to the guest at `index`.
 * Can't fail: where MOVE is refused (a fork came between) the bytes are copied, again and again
 * until the kernel has a page for them. */
void freeze_return(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t first,
                   uint32_t pages);

/* Ends a freeze of `pages` pages at `index`: wakes whoever waits. Bytes that were not given back
 * stay in the staging area until freeze_empty, or until a freeze needs the room: to free single
 * pages one by one costs as much as to move them. */
void freeze_thaw(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages);

/* Frees what earlier freezes have left in the staging areas. Between freezes, on their thread. */
void freeze_empty(struct guest_ram *ram);

/* Tries MOVE there and back on two pages of our own. 0 or -errno. */
int freeze_probe(struct guest_ram *ram);

#endif
