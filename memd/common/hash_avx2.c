/* SPDX-License-Identifier: Apache-2.0 */
/* The page hash again, compiled for CPUs with AVX2 (see CMakeLists.txt). Debian's libxxhash chooses
 * by itself too, but only as a shared library, which every VMM would have to load. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "hash.h"
#include "hash_avx2.h"

uint64_t hash_avx2_page(const struct hash_secret *secret, const void *page)
{
    return XXH3_64bits_withSecret(page, PAGE_BYTES, secret->bytes, sizeof(secret->bytes));
}
