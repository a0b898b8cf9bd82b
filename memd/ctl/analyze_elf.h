/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a guest's RAM lies in an ELF core, as QEMU's dump-guest-memory writes it: ET_CORE, 32 or
 * 64 bits, either byte order, a PT_LOAD segment for each stretch of RAM, which says its
 * guest-physical address (p_paddr), its length (p_memsz), and how much of it is in the file
 * (p_filesz at p_offset; what is not there is zeros).
 *
 * Nothing in the file is believed: every offset and sum is checked, and what is kept is bounded by
 * ELF_SEGMENTS_MAX, however many segments the file says it has.
 */
#ifndef MEMD_CTL_ANALYZE_ELF_H
#define MEMD_CTL_ANALYZE_ELF_H

#include "units.h"

#define ANALYZE_WHY_CHARS 512

/* More than any real dump has: QEMU writes some tens, and with paging=on some ten thousands. What
 * is kept of them is 24 MiB at most. */
#define ELF_SEGMENTS_MAX (1U << 20)

/* All sources together: the counter's page numbers have 32 bits. 16 TiB. */
#define ANALYZE_PAGES_MAX ((uint64_t)UINT32_MAX - HUGE_PAGES)

/* Pages that lie one after the other in a source and in its file. */
struct analyze_extent {
    uint64_t page;   /* of the source */
    uint64_t pages;  /* at least 1 */
    uint64_t offset; /* in the file, in bytes; needs no alignment */
};

/* The file's bytes, by whatever means. */
struct elf_input {
    /* Reads exactly `count` bytes that lie within `size`. 0 or -errno. */
    int (*read)(void *context, uint64_t offset, void *to, size_t count);
    void *context;
    uint64_t size;
};

struct elf_ram {
    struct analyze_extent *extents; /* freed by the caller; ascending, and not overlapping */
    size_t extent_count;
    uint64_t pages; /* of the guest; those in no extent are zeros */
};

/* Guest RAM, segments laid end to end in the order of their guest-physical addresses. 0, or -errno
 * with words in `why` that fit behind the file's name: what is wrong and what to do. */
int ctl_analyze_elf_read(const struct elf_input *input, struct elf_ram *ret_ram,
                         char why[ANALYZE_WHY_CHARS]);

#endif
