/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guest RAM: one private anonymous mapping, guest address 0 at its start. Whatever address a guest
 * names goes through memory_at() before anything is done with it.
 */
#ifndef MEMVM_MEMORY_H
#define MEMVM_MEMORY_H

#include <stdint.h>

#define MEMORY_PAGE_BYTES 4096UL

struct guest_memory {
    uint8_t *base;
    uint64_t bytes; /* whole pages */
};

/* Maps `bytes`, aligned to 2 MiB so that huge pages fit. 0 or -errno. */
int memory_open(struct guest_memory *memory, uint64_t bytes);

/* Where [address, address + bytes) is in this process, or NULL unless all of it is RAM. */
void *memory_at(const struct guest_memory *memory, uint64_t address, uint64_t bytes);

#endif
