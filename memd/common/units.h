/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Units: what a number counts lives in its type or its name.
 *
 * A guest is addressed by *page numbers*: its managed RAM blocks laid end to end, in units of
 * 4 KiB, in the order in which the VMM announced them. A page number is no address: only the
 * agent, in the VMM's own address space, can turn it into one.
 */
#ifndef MEMD_COMMON_UNITS_H
#define MEMD_COMMON_UNITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_SHIFT 12
#define PAGE_BYTES 4096UL
#define HUGE_BYTES (2UL << 20)
#define HUGE_PAGES (HUGE_BYTES / PAGE_BYTES) /* 512 */

/* No page, no slot. */
#define PAGE_NONE UINT32_MAX
#define SLOT_NONE UINT32_MAX

/* A guest may have this many managed pages (4 TiB): the hint space of the index has 31 bits. */
#define GUEST_MAX_PAGES (1U << 30)

/* a + b into *ret_sum; false, and *ret_sum untouched, when it does not fit. */
static inline bool checked_add_u64(uint64_t a, uint64_t b, uint64_t *ret_sum)
{
    uint64_t sum;

    if (__builtin_add_overflow(a, b, &sum))
        return false;
    *ret_sum = sum;
    return true;
}

/* a x b into *ret_product; false, and *ret_product untouched, when it does not fit. */
static inline bool checked_mul_u64(uint64_t a, uint64_t b, uint64_t *ret_product)
{
    uint64_t product;

    if (__builtin_mul_overflow(a, b, &product))
        return false;
    *ret_product = product;
    return true;
}

#endif
