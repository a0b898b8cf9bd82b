/* SPDX-License-Identifier: Apache-2.0 */
/* Puts a guest into empty RAM: its ELF image, and (for the bare guest) the content of its memory.
 */
#ifndef MEMVM_LOADER_H
#define MEMVM_LOADER_H

#include "memory.h"

struct loaded {
    uint64_t entry;
    uint64_t end; /* behind the highest address that the image uses */
};

/* loader.c: a static 64-bit ELF program for addresses from ADDRESS_KERNEL on. 0 or -errno, after
 * saying what is wrong with it. */
int loader_load(const struct guest_memory *memory, const char *path, struct loaded *ret_loaded);

/*
 * preset.c: reads words NAME=VALUE, lays the regions out behind `end`, fills them, and writes the
 * struct boot_info (guest-drivers/bare/boot.h). 0, or -EINVAL or -ENOSPC after saying why.
 */
int preset_fill(const struct guest_memory *memory, uint64_t end, uint32_t cpus,
                uint32_t virtio_count, char *const *words);

/* "16M" -> 16777216; K, M, G. 0 or -EINVAL. */
int preset_size(const char *text, uint64_t *ret_bytes);

#endif
