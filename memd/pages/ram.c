/* SPDX-License-Identifier: Apache-2.0 */
#include "ram.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <string.h>
#include <sys/mman.h>

#include "freeze.h"
#include "kernel_abi.h"
#include "procfs.h"
#include "uffd.h"

/* CONFIG_NODES_SHIFT is 10 at most. */
#define NUMA_MASK_WORDS (1024 / (8 * sizeof(unsigned long)))

static uint8_t zero_page[PAGE_BYTES] __attribute__((aligned(4096)));

/* What a page reads as when nothing holds it. */
static int fetch_zeros(void *self, const struct ram_block *block, uint32_t index, uint32_t pages,
                       const void **ret_bytes)
{
    (void)self;
    (void)block;
    (void)index;
    (void)pages;
    *ret_bytes = zero_page;
    return 1;
}

static int open_descriptors(struct guest_ram *ram, int dev, const char **ret_reason)
{
    ram->guest_fd = uffd_open(dev, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED |
                                       UFFD_FEATURE_MOVE | UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    if (ram->guest_fd < 0) {
        *ret_reason =
            ram->guest_fd == -EPERM || ram->guest_fd == -EACCES
                ? "no right to userfaultfd (/dev/userfaultfd, vm.unprivileged_userfaultfd)"
                : "this kernel's userfaultfd lacks WP_ASYNC (6.7) or MOVE (6.8)";
        return ram->guest_fd;
    }
    ram->store_fd =
        uffd_open(dev, UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
    ram->shadow_fd = uffd_open(dev, 0);
    ram->pagemap_fd =
        (int)sys_call4(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
    if (ram->store_fd < 0 || ram->shadow_fd < 0) {
        *ret_reason = "userfaultfd can't write-protect shared memory here (5.19)";
        return ram->store_fd < 0 ? ram->store_fd : ram->shadow_fd;
    }
    if (ram->pagemap_fd < 0) {
        *ret_reason = "/proc/self/pagemap can't be opened";
        return ram->pagemap_fd;
    }
    return 0;
}

/* mremap unmaps what is at its target before it asks whether there is memory to be had. Where each
 * page is promised (vm.overcommit_memory 2) another process may have been promised it in between:
 * the guest would be left with a gap. Elsewhere our mappings (MAP_NORESERVE) are not counted. */
static int check_promises(const char **ret_reason)
{
    if (procfs_number("/proc/sys/vm/overcommit_memory") != 2)
        return 0;
    *ret_reason = "vm.overcommit_memory is 2: pages can't be remapped safely";
    return -ENOTSUP;
}

int ram_open(struct guest_ram *ram, int dev_userfaultfd, const char **ret_reason)
{
    int r;

    memset(ram, 0, sizeof(*ram));
    ram->guest_fd = ram->store_fd = ram->shadow_fd = ram->pagemap_fd = -1;
    ram->lowest = UINTPTR_MAX;
    ram->sources[PLACE_ABSENT] = ram->sources[PLACE_ZERO] = ram->sources[PLACE_PRIVATE] =
        (struct page_source){.name = "zeros", .fetch = fetch_zeros};
    r = check_promises(ret_reason);
    if (r == 0)
        r = open_descriptors(ram, dev_userfaultfd, ret_reason);
    if (r == 0)
        r = freeze_open(ram, ret_reason);
    if (r == 0) {
        r = freeze_probe(ram);
        if (r < 0)
            *ret_reason = "UFFDIO_MOVE does not work here (it was tried on two pages)";
    }
    if (r < 0)
        ram_close(ram);
    return r;
}

void ram_close(struct guest_ram *ram)
{
    int *fds[] = {&ram->guest_fd, &ram->store_fd, &ram->shadow_fd, &ram->pagemap_fd};

    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
        if (*fds[i] >= 0)
            sys_close(*fds[i]);
        *fds[i] = -1;
    }
    freeze_close(ram);
}

int ram_inspect(const void *base, size_t bytes, uint32_t *ret_attributes, const char **ret_reason)
{
    struct procfs_range range;
    int r = procfs_inspect(base, bytes, &range);

    if (r < 0)
        *ret_reason = "/proc/self/smaps can't be read";
    else if (!range.covered)
        *ret_reason = "it is not mapped all through", r = -EFAULT;
    else if (range.file)
        *ret_reason = "it is backed by a file", r = -EINVAL;
    else if (range.shared)
        *ret_reason = "it is a shared mapping", r = -EINVAL;
    else if (range.hugetlb)
        *ret_reason = "it is hugetlb memory", r = -EINVAL;
    else if (range.special)
        *ret_reason = "it is device memory", r = -EINVAL;
    else if (range.locked)
        *ret_reason = "it is locked in memory", r = -EPERM;
    else if (range.userfaultfd)
        *ret_reason = "the VMM has registered it with a userfaultfd of its own", r = -EBUSY;
    else if (!range.read_write)
        *ret_reason = "it is not readable and writable all through", r = -EINVAL;
    else
        *ret_attributes =
            (range.dontfork ? RAM_DONTFORK : 0) | (range.dontdump ? RAM_DONTDUMP : 0) |
            (range.hugepage ? RAM_HUGEPAGE : 0) | (range.nohugepage ? RAM_NOHUGEPAGE : 0);
    return r;
}

void ram_apply_attributes(uint8_t *at, size_t bytes, uint32_t attributes)
{
    if (attributes & RAM_DONTFORK)
        sys_madvise(at, bytes, MADV_DONTFORK);
    if (attributes & RAM_DONTDUMP)
        sys_madvise(at, bytes, MADV_DONTDUMP);
    if (attributes & RAM_HUGEPAGE)
        sys_madvise(at, bytes, MADV_HUGEPAGE);
    if (attributes & RAM_NOHUGEPAGE)
        sys_madvise(at, bytes, MADV_NOHUGEPAGE);
}

void ram_apply_policy(const struct ram_block *block, int mode, const unsigned long *mask,
                      unsigned long max)
{
    sys_call6(SYS_mbind, SYS_ARG(block->shadow), (long)((size_t)(block->pages + 1) * PAGE_BYTES),
              mode, SYS_ARG(mask), (long)max, 0);
}

/* The policy that the VMM has given its memory already. One that holds for the process needs no
 * copy, and a kernel without NUMA has none. */
static void copy_policy(const struct ram_block *block)
{
    unsigned long mask[NUMA_MASK_WORDS] = {0};
    unsigned long max = sizeof(mask) * 8;
    int mode = 0;

    if (sys_call5(SYS_get_mempolicy, &mode, mask, max, block->base, MPOL_F_ADDR) == 0 &&
        mode != MPOL_DEFAULT)
        ram_apply_policy(block, mode, mask, max);
}

/* An address for the shadow that is congruent to the block's modulo 2 MiB, so that huge pages of
 * the guest keep their alignment when it is made of a piece of the shadow. One page more than the
 * block: that page is touched, and holds the anon_vma when everything else has been moved out. */
static int map_shadow(struct ram_block *block)
{
    size_t bytes = (size_t)block->pages * PAGE_BYTES + PAGE_BYTES;
    size_t offset = (uintptr_t)block->base % HUGE_BYTES;
    uint8_t *area = sys_mmap(NULL, bytes + 2 * HUGE_BYTES, PROT_NONE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint8_t *start;
    uint8_t *at;

    if (sys_failed(area))
        return (int)(intptr_t)area;
    start = (uint8_t *)(((uintptr_t)area + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES) + offset;
    at = sys_mmap(start, bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (start > area)
        sys_munmap(area, (size_t)(start - area));
    sys_munmap(start + bytes, (size_t)(area + 2 * HUGE_BYTES - start));
    if (sys_failed(at)) {
        sys_munmap(start, bytes); /* what was reserved for it, if that is still there */
        return (int)(intptr_t)at;
    }
    /* Touched before MADV_HUGEPAGE: one page. All of the shadow must stay one VMA: it is this
     * VMA's anon_vma that the guest's memory gets. */
    at[bytes - PAGE_BYTES] = 1;
    ram_apply_attributes(at, bytes, block->attributes);
    block->shadow = at;
    return 0;
}

/* True when no page of the block is there, in memory or in swap. */
static bool is_empty(const struct guest_ram *ram, const struct ram_block *block)
{
    struct page_region region;
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .start = (uintptr_t)block->base,
        .end = (uintptr_t)ram_address(block, block->pages),
        .vec = (uintptr_t)&region,
        .vec_len = 1,
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        .return_mask = PAGE_IS_PRESENT,
    };

    return sys_ioctl(ram->pagemap_fd, PAGEMAP_SCAN, &scan) == 0;
}

static int map_arrays(struct ram_block *block)
{
    size_t pages = block->pages;
    size_t young_bytes = (pages + 63) / 64 * 8;
    size_t slots_bytes = pages * sizeof(uint32_t);
    size_t chunks_bytes = block->chunk_count * sizeof(struct chunk);
    size_t shared_bytes = block->chunk_count * sizeof(uint16_t);
    uint8_t *at;

    block->arrays_bytes = 2 * young_bytes + slots_bytes + chunks_bytes + shared_bytes + pages;
    at = sys_mmap(NULL, block->arrays_bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (sys_failed(at))
        return (int)(intptr_t)at;
    sys_madvise(at, block->arrays_bytes, MADV_NOHUGEPAGE);
    sys_madvise(at, block->arrays_bytes, MADV_DONTDUMP);
    block->arrays = at;
    block->young = (uint64_t *)at;
    block->told = (uint64_t *)(at + young_bytes);
    at += 2 * young_bytes;
    block->slots = (uint32_t *)at;
    block->chunks = (struct chunk *)(at + slots_bytes);
    block->chunk_shared = (uint16_t *)(at + slots_bytes + chunks_bytes);
    block->table = at + slots_bytes + chunks_bytes + shared_bytes;
    return 0;
}

static void unmap_block_memory(struct ram_block *block)
{
    if (block->arrays)
        sys_munmap(block->arrays, block->arrays_bytes);
    if (block->shadow)
        sys_munmap(block->shadow, (size_t)block->pages * PAGE_BYTES + PAGE_BYTES);
    block->arrays = NULL;
    block->shadow = NULL;
}

static void widen_bounds(struct guest_ram *ram, const struct ram_block *block)
{
    uintptr_t start = (uintptr_t)block->base;
    uintptr_t end = (uintptr_t)ram_address(block, block->pages);

    if (start < ram->lowest)
        __atomic_store_n(&ram->lowest, start, __ATOMIC_RELAXED);
    if (end > ram->highest)
        __atomic_store_n(&ram->highest, end, __ATOMIC_RELAXED);
}

static int prepare_memory(struct guest_ram *ram, struct ram_block *block, bool fresh)
{
    size_t bytes = (size_t)block->pages * PAGE_BYTES;
    void *moved;
    int r = map_arrays(block);

    if (r == 0)
        r = map_shadow(block);
    if (r < 0)
        return r;
    copy_policy(block);
    if (fresh && is_empty(ram, block)) {
        moved = sys_mremap(block->shadow, bytes, bytes,
                           MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, block->base);
        if (sys_failed(moved))
            return (int)(intptr_t)moved;
    }
    return uffd_register(ram->shadow_fd, block->shadow, bytes + PAGE_BYTES,
                         UFFDIO_REGISTER_MODE_MISSING);
}

static int add(struct guest_ram *ram, void *base, size_t bytes, uint32_t attributes, bool fresh,
               struct ram_block **ret_block)
{
    struct ram_block *block = &ram->blocks[ram->block_count];
    uint32_t pages = (uint32_t)(bytes / PAGE_BYTES);
    int r;

    if ((uintptr_t)base % PAGE_BYTES || bytes % PAGE_BYTES || bytes == 0)
        return -EINVAL;
    if (ram->block_count == RAM_MAX_BLOCKS || bytes / PAGE_BYTES > GUEST_MAX_PAGES ||
        ram->next_page + pages > GUEST_MAX_PAGES)
        return -ENOSPC;
    for (uint32_t i = 0; i < ram->block_count; i++) {
        const struct ram_block *other = &ram->blocks[i];
        if (other->live && (uint8_t *)base < ram_address(other, other->pages) &&
            other->base < (uint8_t *)base + bytes)
            return -EEXIST;
    }
    memset(block, 0, sizeof(*block));
    block->base = base;
    block->pages = pages;
    block->first_page = ram->next_page;
    block->attributes = attributes;
    block->chunk_offset = (uint32_t)((uintptr_t)base % HUGE_BYTES / PAGE_BYTES);
    block->chunk_count = (pages + block->chunk_offset + HUGE_PAGES - 1) / HUGE_PAGES;
    block->counts[PLACE_ABSENT] = pages;
    r = prepare_memory(ram, block, fresh);
    if (r < 0) {
        unmap_block_memory(block);
        return r;
    }
    memset(block->table, PLACE_ABSENT, pages);
    ram->next_page += pages;
    block->live = true;
    widen_bounds(ram, block);
    __atomic_store_n(&ram->block_count, ram->block_count + 1, __ATOMIC_RELEASE);
    *ret_block = block;
    return 0;
}

int ram_add(struct guest_ram *ram, void *base, size_t bytes, uint32_t attributes, bool fresh,
            struct ram_block **ret_block)
{
    int r;

    lock_take(&ram->adding);
    r = add(ram, base, bytes, attributes, fresh, ret_block);
    lock_release(&ram->adding);
    return r;
}

struct ram_block *ram_find(struct guest_ram *ram, const void *address)
{
    uint32_t count = __atomic_load_n(&ram->block_count, __ATOMIC_ACQUIRE);
    const uint8_t *at = address;

    for (uint32_t i = 0; i < count; i++) {
        struct ram_block *block = &ram->blocks[i];
        if (block->live && at >= block->base && at < ram_address(block, block->pages))
            return block;
    }
    return NULL;
}

struct ram_block *ram_find_page(struct guest_ram *ram, uint32_t page)
{
    uint32_t count = __atomic_load_n(&ram->block_count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < count; i++) {
        struct ram_block *block = &ram->blocks[i];
        if (block->live && page >= block->first_page && page - block->first_page < block->pages)
            return block;
    }
    return NULL;
}

void ram_forget(struct guest_ram *ram, struct ram_block *block)
{
    (void)ram;
    block->live = false;
    unmap_block_memory(block);
}

void ram_lock_all(struct guest_ram *ram)
{
    for (uint32_t i = 0; i < ram->block_count; i++)
        lock_take(&ram->blocks[i].lock);
}

void ram_unlock_all(struct guest_ram *ram)
{
    for (uint32_t i = ram->block_count; i-- > 0;)
        lock_release(&ram->blocks[i].lock);
}

void ram_reset_locks(struct guest_ram *ram)
{
    for (uint32_t i = 0; i < ram->block_count; i++) {
        lock_reset(&ram->blocks[i].lock);
        lock_reset(&ram->blocks[i].reading);
    }
    lock_reset(&ram->broken.lock);
    lock_reset(&ram->adding);
}

/* All of them are at `from`. */
static void move_run(struct ram_block *block, uint32_t index, uint32_t pages, enum place from,
                     enum place to)
{
    block->counts[from] -= pages;
    block->counts[to] += pages;
    if ((to == PLACE_SHARED) != (from == PLACE_SHARED))
        for (uint32_t i = index; i < index + pages; i++)
            block->chunk_shared[ram_chunk_of(block, i)] += to == PLACE_SHARED ? 1 : -1;
    if (from == PLACE_REMOTE || to == PLACE_REMOTE) {
        memset(&block->table[index], (int)to, pages); /* the flags mean something else there */
        return;
    }
    for (uint32_t i = index; i < index + pages; i++)
        block->table[i] = (uint8_t)((block->table[i] & ~TABLE_PLACE_MASK) | (uint8_t)to);
}

void ram_move_places(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages,
                     enum transition transition)
{
    for (uint32_t i = index, run; i < index + pages; i += run) {
        enum place from = ram_place(block, i);
        int to = transitions_next(transition, from);

        run = 1;
        while (i + run < index + pages && ram_place(block, i + run) == from)
            run++;
        if (to < 0)
            ram->refused_transitions += run;
        else
            move_run(block, i, run, from, (enum place)to);
    }
}

void ram_note_broken(struct guest_ram *ram, const struct ram_block *block, uint32_t index,
                     uint32_t pages)
{
    struct broken_queue *queue = &ram->broken;

    lock_take(&queue->lock);
    for (uint32_t i = 0; i < pages; i++) {
        if (queue->count == BROKEN_QUEUE) {
            queue->overflow = true;
            break;
        }
        queue->pages[queue->count++] = block->first_page + index + i;
    }
    __atomic_add_fetch(&ram->unmerges, pages, __ATOMIC_RELAXED);
    lock_release(&queue->lock);
}

/* What becomes of the border between a page that leaves the store and its neighbour. */
static int border_cost(const struct ram_block *block, uint32_t index, uint32_t neighbour)
{
    if (ram_captive(block, neighbour))
        return 0;
    if (ram_place(block, neighbour) != PLACE_SHARED)
        return -1;
    return block->slots[neighbour] - block->slots[index] == neighbour - index ? 1 : 0;
}

int ram_split_cost(const struct ram_block *block, uint32_t index, uint32_t pages)
{
    uint32_t last = index + pages - 1;

    return (index > 0 ? border_cost(block, index, index - 1) : 0) +
           (last + 1 < block->pages ? border_cost(block, last, last + 1) : 0);
}

bool ram_may_spend(const struct guest_ram *ram, int vmas)
{
    int64_t allowed = __atomic_load_n(&ram->vmas_allowed, __ATOMIC_RELAXED);

    return allowed == 0 || vmas <= 0 ||
           __atomic_load_n(&ram->vmas_spent, __ATOMIC_RELAXED) + vmas <= allowed;
}

void ram_spend(struct guest_ram *ram, int vmas)
{
    __atomic_add_fetch(&ram->vmas_spent, vmas, __ATOMIC_RELAXED);
}

void ram_set_captive(struct ram_block *block, uint32_t index, bool captive)
{
    if (captive == ram_captive(block, index))
        return;
    block->table[index] ^= TABLE_CAPTIVE;
    block->captives += captive ? 1 : -1ULL;
}
