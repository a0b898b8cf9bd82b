/* SPDX-License-Identifier: Apache-2.0 */
#define XXH_INLINE_ALL
#include "hash.h"

#include <xxhash.h>

#include "hash_avx2.h"

uint64_t hash_page(const struct hash_secret *secret, const void *page)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2"))
        return hash_avx2_page(secret, page);
#endif
    return XXH3_64bits_withSecret(page, PAGE_BYTES, secret->bytes, sizeof(secret->bytes));
}

bool hash_page_is_zero(const void *page)
{
    const uint64_t *words = page;

    /* Most pages that are not zero say so in their first words: look before the long loop. */
    if (words[0] | words[1] | words[PAGE_BYTES / 16])
        return false;
    for (size_t i = 0; i < PAGE_BYTES / sizeof(*words); i += 8) {
        uint64_t any = words[i] | words[i + 1] | words[i + 2] | words[i + 3] | words[i + 4] |
                       words[i + 5] | words[i + 6] | words[i + 7];
        if (any)
            return false;
    }
    return true;
}
