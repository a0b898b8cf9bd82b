/* SPDX-License-Identifier: Apache-2.0 */
#define XXH_INLINE_ALL
#include "proof.h"

#include <xxhash.h>

#include "hash.h"

_Static_assert(sizeof(XXH3_kSecret) == sizeof(struct hash_secret), "of XXH3's own secret");

/* XXH3_64bits(): by the page hash, which uses what the CPU has. */
uint64_t proof_content(const void *bytes)
{
    return hash_page((const struct hash_secret *)(const void *)XXH3_kSecret, bytes);
}

/* The finalizer of SplitMix64: every bit of the page number reaches every bit of the hash. */
uint64_t proof_page(uint64_t content, uint64_t page)
{
    uint64_t mixed = content ^ (page + 1) * 0x9e3779b97f4a7c15ULL;

    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9ULL;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebULL;
    return mixed ^ mixed >> 31;
}

uint64_t proof_sum(const struct region *region, const uint64_t *placed, const uint64_t *hashes,
                   uint64_t *ret_pages)
{
    uint64_t end = region->first + region->pages;
    uint64_t pages = 0;
    uint64_t sum = 0;

    for (uint64_t page = regions_next(placed, region->first, end); page < end;
         page = regions_next(placed, page + 1, end)) {
        sum += __atomic_load_n(&hashes[page], __ATOMIC_RELAXED);
        pages++;
    }
    *ret_pages = pages;
    return sum;
}
