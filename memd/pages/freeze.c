/* SPDX-License-Identifier: Apache-2.0 */
#include "freeze.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "kernel_abi.h"
#include "uffd.h"

/* ---- the staging areas ---- */

/* Staging takes the guest's frozen pages: it must never be seen by a child, a core dump, khugepaged
 * or ksmd, and reading a hole in it must not hand out a page. */
static int prepare_staging(const struct guest_ram *ram, uint8_t *at, size_t bytes)
{
    sys_madvise(at, bytes, MADV_DONTFORK);
    sys_madvise(at, bytes, MADV_DONTDUMP);
    sys_madvise(at, bytes, MADV_NOHUGEPAGE);
    sys_madvise(at, bytes, MADV_UNMERGEABLE);
    return uffd_register(ram->guest_fd, at, bytes, UFFDIO_REGISTER_MODE_MISSING);
}

static uint8_t *map_staging(uint8_t *at, size_t bytes)
{
    return sys_mmap(at, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0), -1, 0);
}

/* Read by the fault handler too. */
static void set_huge_staging(struct guest_ram *ram, uint8_t *at)
{
    __atomic_store_n(&ram->huge_staging, at, __ATOMIC_RELEASE);
}

/* Without it everything works, huge pages are split. */
static void open_huge_staging(struct guest_ram *ram)
{
    uint8_t *area = map_staging(NULL, 2 * HUGE_BYTES);
    uint8_t *at;

    if (sys_failed(area))
        return;
    at = (uint8_t *)(((uintptr_t)area + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    if (at > area)
        sys_munmap(area, (size_t)(at - area));
    sys_munmap(at + HUGE_BYTES, (size_t)(area + HUGE_BYTES - at));
    if (prepare_staging(ram, at, HUGE_BYTES) < 0)
        sys_munmap(at, HUGE_BYTES);
    else
        set_huge_staging(ram, at);
}

int freeze_open(struct guest_ram *ram, const char **ret_reason)
{
    int r;

    ram->staging = map_staging(NULL, FREEZE_MAX_PAGES * PAGE_BYTES);
    if (sys_failed(ram->staging)) {
        *ret_reason = "no memory for the staging area";
        r = (int)(intptr_t)ram->staging;
        ram->staging = NULL;
        return r;
    }
    ram->frozen = ram->staging;
    r = prepare_staging(ram, ram->staging, FREEZE_MAX_PAGES * PAGE_BYTES);
    if (r < 0)
        *ret_reason = "the staging area can't be registered with userfaultfd";
    else
        open_huge_staging(ram);
    return r;
}

void freeze_close(struct guest_ram *ram)
{
    if (ram->staging)
        sys_munmap(ram->staging, FREEZE_MAX_PAGES * PAGE_BYTES);
    if (ram->huge_staging)
        sys_munmap(ram->huge_staging, HUGE_BYTES);
    ram->staging = NULL;
    set_huge_staging(ram, NULL);
}

bool freeze_is_staging(const struct guest_ram *ram, const uint8_t *page)
{
    const uint8_t *huge = __atomic_load_n(&ram->huge_staging, __ATOMIC_ACQUIRE);

    return (page >= ram->staging && page < ram->staging + FREEZE_MAX_PAGES * PAGE_BYTES) ||
           (huge && page >= huge && page < huge + HUGE_BYTES);
}

void freeze_disarm(struct guest_ram *ram)
{
    uint8_t *huge = __atomic_load_n(&ram->huge_staging, __ATOMIC_ACQUIRE);

    uffd_unregister(ram->guest_fd, ram->staging, FREEZE_MAX_PAGES * PAGE_BYTES);
    if (huge)
        uffd_unregister(ram->guest_fd, huge, HUGE_BYTES);
}

static bool is_huge(const struct guest_ram *ram, const uint8_t *at)
{
    struct page_region region = {0};
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .start = (uintptr_t)at,
        .end = (uintptr_t)at + HUGE_BYTES,
        .vec = (uintptr_t)&region,
        .vec_len = 1,
        .category_mask = PAGE_IS_PRESENT | PAGE_IS_HUGE,
        .return_mask = PAGE_IS_HUGE,
    };

    return sys_ioctl(ram->pagemap_fd, PAGEMAP_SCAN, &scan) == 1 && region.start == scan.start &&
           region.end == scan.end;
}

bool freeze_is_huge(const struct guest_ram *ram, const struct ram_block *block, uint32_t index)
{
    const uint8_t *at = ram_address(block, index);

    return ram->huge_staging && (uintptr_t)at % HUGE_BYTES == 0 &&
           block->pages - index >= HUGE_PAGES && is_huge(ram, at);
}

/* The kernel moves a huge page whole only to where there are no page tables. Those of pages that
 * came one by one, or were taken out so, stay for as long as the mapping. */
static void empty_huge(struct guest_ram *ram)
{
    if (!ram->huge_staged)
        return;
    ram->huge_staged = false;
    if (is_huge(ram, ram->huge_staging)) {
        sys_madvise(ram->huge_staging, HUGE_BYTES, MADV_DONTNEED);
        return;
    }
    if (!sys_failed(map_staging(ram->huge_staging, HUGE_BYTES)) &&
        prepare_staging(ram, ram->huge_staging, HUGE_BYTES) == 0)
        return;
    sys_munmap(ram->huge_staging, HUGE_BYTES);
    set_huge_staging(ram, NULL);
}

/* ---- move ---- */

/* The first pages of [from, end) that are there, in memory or in swap. 1, 0 where there are none,
 * or -errno. */
static int find_present(const struct guest_ram *ram, uintptr_t from, uintptr_t end,
                        struct page_region *ret_found)
{
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .start = from,
        .end = end,
        .vec = (uintptr_t)ret_found,
        .vec_len = 1,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    };

    /* No return_mask: regions are of one kind, and any page may be swapped, or look so while the
     * kernel moves it about (compaction). */
    return sys_ioctl(ram->pagemap_fd, PAGEMAP_SCAN, &scan);
}

/* How much of what was to be moved has come: all up to the last page that is there (the kernel may
 * have dropped one before that, if the guest had given it up by MADV_FREE), but nothing from the
 * first page on that is still where it was. */
static long bytes_moved(const struct guest_ram *ram, const uint8_t *to, const uint8_t *from,
                        size_t bytes)
{
    uintptr_t end = (uintptr_t)to;
    struct page_region found;
    size_t moved;
    int r;

    while (end < (uintptr_t)to + bytes && find_present(ram, end, (uintptr_t)to + bytes, &found) > 0)
        end = (uintptr_t)found.end;
    moved = end - (uintptr_t)to;
    if (moved == 0)
        return 0;
    r = find_present(ram, (uintptr_t)from, (uintptr_t)from + moved, &found);
    if (r < 0)
        return r;
    return r == 0 ? (long)moved : (long)(found.start - (uintptr_t)from);
}

/*
 * UFFDIO_MOVE to where nothing is. Returns the bytes that were moved, or -errno when none were.
 *
 * What the kernel says is not to be relied on unless it says "all". Linux 6.18 moves runs of pages
 * at once; when one run had to be tried again (a page table entry changed under it, as when its
 * accessed bit is cleared: reclaim, DAMON, MADV_COLD do that), move_pages() in mm/userfaultfd.c
 * keeps that run's -EAGAIN, goes on, and does not count what it moves from then on. It was seen to
 * say 8 pages, and EEXIST, when it had moved 64. So where it says less, it is looked at what came.
 * A huge page that was split before it could be moved goes the same way.
 */
static long move(const struct guest_ram *ram, uint8_t *to, uint8_t *from, size_t bytes)
{
    long moved = uffd_move(ram->guest_fd, to, from, bytes);
    long came;

    if (moved == (long)bytes)
        return moved;
    came = bytes_moved(ram, to, from, bytes);
    return came > 0 && came > moved ? came : moved;
}

/* ---- thaw ---- */

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
        long moved = move(ram, to, from, left);
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
    if (ram->frozen != ram->huge_staging)
        ram->staged += pages;
}

void freeze_empty(struct guest_ram *ram)
{
    empty_huge(ram);
    if (ram->staged > 0)
        sys_madvise(ram->staging, ram->staged * PAGE_BYTES, MADV_DONTNEED);
    ram->staged = 0;
}

/* ---- freeze ---- */

/* Chooses where the pages go. Returns how many they may be. */
static uint32_t choose_staging(struct guest_ram *ram, const struct ram_block *block, uint32_t index,
                               uint32_t pages)
{
    empty_huge(ram);
    if (pages >= HUGE_PAGES && freeze_is_huge(ram, block, index)) {
        ram->frozen = ram->huge_staging;
        ram->huge_staged = true; /* by an attempt that fails too: page tables may be left of it */
        return HUGE_PAGES;
    }
    if (pages > FREEZE_MAX_PAGES)
        pages = FREEZE_MAX_PAGES;
    if (ram->staged + pages > FREEZE_MAX_PAGES)
        freeze_empty(ram);
    ram->frozen = ram->staging + ram->staged * PAGE_BYTES;
    return pages;
}

int freeze_take(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages)
{
    uint32_t frozen;
    long moved;

    pages = choose_staging(ram, block, index, pages);
    moved = move(ram, ram->frozen, ram_address(block, index), pages * PAGE_BYTES);
    if (moved < 0)
        return (int)moved;
    frozen = (uint32_t)(moved / (long)PAGE_BYTES);
    ram->huge_freezes += frozen == HUGE_PAGES;
    /* Asked now: what was read into these pages before, was read from a file opened before. */
    if (freeze_must_wait(ram)) {
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
