/* SPDX-License-Identifier: Apache-2.0 */
#include "remap.h"

#include <errno.h>
#include <sys/mman.h>

#include "kernel_abi.h"
#include "procfs.h"
#include "uffd.h"

#define REMAP_FLAGS (MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP)

/*
 * Moves a mapping over the guest's address and leaves the place that it came from empty.
 *
 * mremap unmaps what is at its target before it asks whether the process may have so much memory.
 * Within the limits the answer is yes: as much was just unmapped, and the address space stays
 * locked in between. It is no where a limit was lowered below what is in use, and the guest would
 * be left with a gap; so that is asked first.
 */
static int move_over(uint8_t *from, size_t bytes, uint8_t *to)
{
    void *moved;

    if (!procfs_within_limits())
        return -ENOMEM;
    moved = sys_mremap(from, bytes, bytes, REMAP_FLAGS, to);
    return sys_failed(moved) ? (int)(intptr_t)moved : 0;
}

int remap_arm(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages)
{
    uint8_t *at = ram_address(block, index);
    size_t bytes = (size_t)pages * PAGE_BYTES;
    int r = uffd_register(ram->guest_fd, at, bytes,
                          UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);

    /* The first of several VMAs may be registered by now: who touches a hole there would wait for
     * ever. What was registered whole can be let go without another VMA. */
    if (r == -ENOMEM)
        uffd_unregister(ram->guest_fd, at, bytes);
    return r;
}

/* Registers pages that were moved over the guest's address. Where that is refused they are right
 * as they are, but a hole among them would read as zeros: they must never be frozen. */
static void arm_moved(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                      uint32_t pages)
{
    bool armed = remap_arm(ram, block, index, pages) == 0;

    for (uint32_t i = index; i < index + pages; i++)
        ram_set_captive(block, i, !armed);
}

/* madvise attributes that the block has and the view has not, or the other way round. */
static void restore_attributes(const struct ram_block *block, uint8_t *at, size_t bytes)
{
    if (!(block->attributes & RAM_DONTFORK))
        sys_madvise(at, bytes, MADV_DOFORK);
    if (block->attributes & RAM_DONTDUMP)
        sys_madvise(at, bytes, MADV_DONTDUMP);
}

static bool attributes_differ(const struct ram_block *block)
{
    return (block->attributes & (RAM_DONTFORK | RAM_DONTDUMP)) != REMAP_VIEW_ATTRIBUTES;
}

/* Where nobody can tell which pages were written before they were protected, all may have been. */
static uint32_t suspect_all(struct ram_block *block, uint32_t index, uint32_t pages)
{
    for (uint32_t i = index; i < index + pages; i++)
        ram_set_captive(block, i, true);
    return pages;
}

/* Marks the pages that are anonymous already: written between the mapping and its protection. */
static uint32_t find_captives(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                              uint32_t pages)
{
    struct page_region regions[16];
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .start = (uintptr_t)ram_address(block, index),
        .end = (uintptr_t)ram_address(block, index + pages),
        .vec = (uintptr_t)regions,
        .vec_len = sizeof(regions) / sizeof(regions[0]),
        .category_inverted = PAGE_IS_FILE,
        .category_mask = PAGE_IS_FILE,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        .return_mask = PAGE_IS_PRESENT,
    };
    uint32_t captives = 0;
    int found;

    while ((found = sys_ioctl(ram->pagemap_fd, PAGEMAP_SCAN, &scan)) > 0) {
        for (int i = 0; i < found; i++)
            for (uintptr_t at = regions[i].start; at < regions[i].end; at += PAGE_BYTES) {
                ram_set_captive(block, (uint32_t)((at - (uintptr_t)block->base) / PAGE_BYTES),
                                true);
                captives++;
            }
        if (scan.walk_end >= scan.end)
            break;
        scan.start = scan.walk_end;
    }
    return found < 0 ? suspect_all(block, index, pages) : captives;
}

static void record_shares(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                          uint32_t pages, const uint32_t *slots)
{
    for (uint32_t i = 0; i < pages; i++) {
        if (ram_captive(block, index + i)) {
            if (ram_place(block, index + i) == PLACE_SHARED) {
                /* It was to move within the store: the share that it had has ended. */
                ram_move_places(ram, block, index + i, 1, TRANSITION_BREAK);
                ram_note_broken(ram, block, index + i, 1);
            }
            continue;
        }
        block->slots[index + i] = slots[i];
        ram_move_places(ram, block, index + i, 1, TRANSITION_SHARE);
    }
}

int remap_map(struct guest_ram *ram, const struct ram_block *block, uint32_t index, uint32_t pages,
              uint8_t *view)
{
    int r = move_over(view, (size_t)pages * PAGE_BYTES, ram_address(block, index));

    if (r == 0)
        ram_spend(ram, 2);
    return r;
}

uint32_t remap_protect(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                       uint32_t pages, const uint32_t *slots)
{
    uint8_t *at = ram_address(block, index);
    size_t bytes = (size_t)pages * PAGE_BYTES;
    uint32_t captives;
    int r = uffd_register(ram->store_fd, at, bytes, UFFDIO_REGISTER_MODE_WP);

    if (r == 0)
        r = uffd_protect(ram->store_fd, at, bytes, true);
    if (attributes_differ(block))
        restore_attributes(block, at, bytes);
    /* Mapped but not protected: a write would be copied unseen. The guest is right either way; none
     * of these pages counts as shared. */
    captives = r < 0 ? suspect_all(block, index, pages) : find_captives(ram, block, index, pages);
    record_shares(ram, block, index, pages, slots);
    return captives;
}

int remap_to_store(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint8_t *view,
                   uint32_t slot, bool *ret_captive)
{
    int r = remap_map(ram, block, index, 1, view);

    if (r == 0)
        *ret_captive = remap_protect(ram, block, index, 1, &slot) > 0;
    return r;
}

/* Puts `pages` pages of bytes into the shadow. What an earlier attempt left there goes first. */
static int fill_shadow(struct guest_ram *ram, uint8_t *to, const void *bytes, uint32_t pages)
{
    size_t left = (size_t)pages * PAGE_BYTES;
    const uint8_t *from = bytes;
    bool cleared = false;

    while (left > 0) {
        long copied = uffd_copy(ram->shadow_fd, to, from, left, false);
        if (copied == -EEXIST && !cleared) {
            sys_madvise(to, left, MADV_DONTNEED);
            cleared = true;
            continue;
        }
        if (copied <= 0)
            return copied < 0 ? (int)copied : -EIO;
        to += copied;
        from += copied;
        left -= (size_t)copied;
    }
    return 0;
}

static uint32_t shared_run(const struct ram_block *block, uint32_t index, uint32_t pages)
{
    uint32_t run = 0;

    while (run < pages && ram_place(block, index + run) == PLACE_SHARED)
        run++;
    return run;
}

int remap_to_private(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages,
                     bool arm)
{
    struct page_source *source = &ram->sources[PLACE_SHARED];
    uint8_t *shadow = ram_shadow(block, index);
    const void *bytes;
    int cost;
    int run;
    int r;

    run = source->fetch(source->self, block, index, shared_run(block, index, pages), &bytes);
    if (run < 0)
        return run;
    r = fill_shadow(ram, shadow, bytes, (uint32_t)run);
    if (r == 0)
        r = move_over(shadow, (size_t)run * PAGE_BYTES, ram_address(block, index));
    if (r < 0) {
        /* A discard takes what is here for empty. */
        sys_madvise(shadow, (size_t)run * PAGE_BYTES, MADV_DONTNEED);
        return r;
    }
    cost = ram_split_cost(block, index, (uint32_t)run);
    if (arm)
        arm_moved(ram, block, index, (uint32_t)run);
    ram_spend(ram, cost);
    ram_move_places(ram, block, index, (uint32_t)run, TRANSITION_BREAK);
    uffd_wake(ram->store_fd, ram_address(block, index), (size_t)run * PAGE_BYTES);
    return run;
}

int remap_to_absent(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages,
                    bool arm)
{
    size_t bytes = (size_t)pages * PAGE_BYTES;
    int r = move_over(ram_shadow(block, index), bytes, ram_address(block, index));

    if (r < 0)
        return r;
    ram_spend(ram, ram_split_cost(block, index, pages));
    for (uint32_t i = index; i < index + pages; i++)
        ram_set_captive(block, i, false);
    if (arm)
        arm_moved(ram, block, index, pages);
    ram_move_places(ram, block, index, pages, TRANSITION_DISCARD);
    uffd_wake(ram->store_fd, ram_address(block, index), bytes);
    return 0;
}
