/* SPDX-License-Identifier: Apache-2.0 */
#include "regions.h"

#include <string.h>
#include <sys/mman.h>

void regions_take(struct regions *regions, struct guest_ram *ram)
{
    uint32_t count = __atomic_load_n(&ram->block_count, __ATOMIC_ACQUIRE);

    memset(regions, 0, sizeof(*regions));
    for (uint32_t b = 0; b < count; b++) {
        struct ram_block *block = &ram->blocks[b];

        if (!__atomic_load_n(&block->live, __ATOMIC_ACQUIRE) || block->attributes & RAM_VMM_MOVES)
            continue;
        regions->at[regions->count++] =
            (struct region){.block = block, .first = regions->pages, .pages = block->pages};
        regions->pages += block->pages;
    }
}

const struct region *regions_find(const struct regions *regions, uint64_t page)
{
    uint32_t i = regions->count - 1;

    while (i > 0 && regions->at[i].first > page)
        i--;
    return &regions->at[i];
}

bool regions_number(const struct regions *regions, const struct ram_block *block, uint32_t index,
                    uint64_t *ret_page)
{
    for (uint32_t i = 0; i < regions->count; i++) {
        if (regions->at[i].block != block)
            continue;
        *ret_page = regions->at[i].first + index;
        return true;
    }
    return false;
}

static void *map(size_t bytes, int flags)
{
    void *at =
        sys_mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

    if (sys_failed(at))
        return NULL;
    sys_madvise(at, bytes, MADV_DONTDUMP);
    sys_madvise(at, bytes, MADV_DONTFORK);
    return at;
}

void *regions_map(size_t bytes)
{
    return map(bytes, MAP_NORESERVE);
}

void *regions_map_ready(size_t bytes)
{
    return map(bytes, MAP_POPULATE);
}

void regions_unmap(void *memory, size_t bytes)
{
    if (memory)
        sys_munmap(memory, bytes);
}

uint64_t regions_next(const uint64_t *bitmap, uint64_t from, uint64_t end)
{
    while (from < end) {
        uint64_t word = __atomic_load_n(&bitmap[from / 64], __ATOMIC_ACQUIRE) >> (from % 64);

        if (word) {
            from += (uint64_t)__builtin_ctzll(word);
            return from < end ? from : end;
        }
        from = (from / 64 + 1) * 64;
    }
    return end;
}
