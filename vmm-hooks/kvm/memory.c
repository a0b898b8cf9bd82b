/* SPDX-License-Identifier: Apache-2.0 */
#include "memory.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#define HUGE_BYTES (2UL << 20)

int memory_open(struct guest_memory *memory, uint64_t bytes)
{
    uint64_t reserved = bytes + HUGE_BYTES;
    uint8_t *base = mmap(NULL, reserved, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint64_t before;

    if (base == MAP_FAILED)
        return -errno;
    before = (HUGE_BYTES - (uintptr_t)base % HUGE_BYTES) % HUGE_BYTES;
    if (before)
        munmap(base, before);
    munmap(base + before + bytes, reserved - before - bytes);
    *memory = (struct guest_memory){.base = base + before, .bytes = bytes};
    return 0;
}

void *memory_at(const struct guest_memory *memory, uint64_t address, uint64_t bytes)
{
    if (address > memory->bytes || bytes > memory->bytes - address)
        return NULL;
    return memory->base + address;
}
