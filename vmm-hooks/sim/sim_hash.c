/* SPDX-License-Identifier: Apache-2.0 */
/* The page hash of the simulation: the real one, of which the machine keeps some bits only, so that
 * contents that differ meet under one hash all the time. Counts. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "hash.h"
#include "sim_host.h"

uint64_t hash_page(const struct hash_secret *secret, const void *page)
{
    struct sim_host *host = sim_host_current();

    host->turn_hashes++;
    return XXH3_64bits_withSecret(page, PAGE_BYTES, secret->bytes, HASH_SECRET_BYTES) &
           host->hash_mask;
}

bool hash_page_is_zero(const void *page)
{
    const uint64_t *words = page;

    for (size_t i = 0; i < PAGE_BYTES / sizeof(*words); i++) {
        if (words[i])
            return false;
    }
    return true;
}
