/* SPDX-License-Identifier: Apache-2.0 */
#include "freeze.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "uffd.h"

/* One page by copy: when MOVE is refused. Without memory there is nothing better than to try
 * again: the bytes are safe in the staging area, and the guest waits. */
static void copy_back(struct guest_ram *ram, uint8_t *to, const uint8_t *from)
{
    for (;;) {
        long copied = uffd_copy(ram->guest_fd, to, from, PAGE_BYTES, false);
        if (copied == (long)PAGE_BYTES || copied == -EEXIST || copied == -ENOENT)
            return;
        sys_call0(SYS_sched_yield);
    }
}

void freeze_return(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t first,
                   uint32_t pages)
{
    uint8_t *to = ram_address(block, index);
    uint8_t *from = freeze_bytes(ram, first);
    size_t left = (size_t)pages * PAGE_BYTES;

    while (left > 0) {
        long moved = uffd_move(ram->guest_fd, to, from, left);
        if (moved <= 0) {
            copy_back(ram, to, from);
            moved = (long)PAGE_BYTES;
        }
        to += moved;
        from += moved;
        left -= (size_t)moved;
    }
}

void freeze_thaw(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages)
{
    uffd_wake(ram->guest_fd, ram_address(block, index), pages * PAGE_BYTES);
    ram->staged += pages;
}

void freeze_empty(struct guest_ram *ram)
{
    if (ram->staged > 0)
        sys_madvise(ram->staging, ram->staged * PAGE_BYTES, MADV_DONTNEED);
    ram->staged = 0;
}

int freeze_take(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages)
{
    uint32_t frozen;
    long moved;

    if (pages > FREEZE_MAX_PAGES)
        pages = FREEZE_MAX_PAGES;
    if (ram->staged + pages > FREEZE_MAX_PAGES)
        freeze_empty(ram);
    moved = uffd_move(ram->guest_fd, freeze_bytes(ram, 0), ram_address(block, index),
                      pages * PAGE_BYTES);
    if (moved < 0)
        return (int)moved;
    frozen = (uint32_t)(moved / (long)PAGE_BYTES);
    /* Asked now: what was read into these pages before, was read from a file opened before. */
    if (__atomic_load_n(&ram->direct_io_changed, __ATOMIC_ACQUIRE)) {
        freeze_return(ram, block, index, 0, frozen);
        freeze_thaw(ram, block, index, frozen);
        return -EBUSY;
    }
    return (int)frozen;
}

int freeze_probe(struct guest_ram *ram)
{
    uint8_t *at =
        sys_mmap(NULL, 2 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct ram_block block = {.base = at, .pages = 2};
    int r;

    if (sys_failed(at))
        return (int)(intptr_t)at;
    r = uffd_register(ram->guest_fd, at, 2 * PAGE_BYTES,
                      UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
    if (r == 0) {
        /* Nobody serves faults yet: the pages are put there, not touched. */
        static const uint8_t probe[2 * PAGE_BYTES] = {1, [PAGE_BYTES] = 2};
        uffd_copy(ram->guest_fd, at, probe, sizeof(probe), false);
        r = freeze_take(ram, &block, 0, 2);
        if (r == 2 && freeze_bytes(ram, 0)[0] == 1 && freeze_bytes(ram, 1)[0] == 2) {
            freeze_return(ram, &block, 0, 0, 2);
            freeze_thaw(ram, &block, 0, 2);
            r = at[0] == 1 && at[PAGE_BYTES] == 2 ? 0 : -EIO;
        } else if (r >= 0) {
            r = -EIO;
        }
    }
    sys_munmap(at, 2 * PAGE_BYTES);
    return r;
}
