/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the loader tells the bare guest (at ADDRESS_BOOT_INFO): how much of which content it finds
 * in memory, and what to do with it. The content itself is in content.h.
 */
#ifndef BARE_BOOT_H
#define BARE_BOOT_H

#include <stdint.h>

#include "content.h"

#define BOOT_MAGIC 0x6d656d6462617265ULL /* "memdbare" */

struct boot_region {
    uint32_t first; /* page number */
    uint32_t pages;
};

struct boot_info {
    uint64_t magic;
    uint64_t seed;
    uint32_t cpus;
    uint32_t duty;         /* share of each vCPU to use, in per cent */
    uint32_t every_ms;     /* how often to print the `verified` line */
    uint32_t virtio_count; /* devices at ADDRESS_VIRTIO */
    uint32_t crash;        /* 1: run into an undefined instruction (to test that it is told) */
    uint32_t generations;  /* page number of the table: a word for each line of `churn` and `hot` */
    struct boot_region regions[CONTENT_KINDS];
};

_Static_assert(sizeof(struct boot_info) == 40 + 8 * CONTENT_KINDS, "loader and guest agree");

#endif
