/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page hash: XXH3-64 of 4096 bytes under a secret that belongs to one trust domain, so that
 * nobody outside it can choose contents that collide inside it. A hash only says where to look:
 * nothing is ever shared because two hashes are equal.
 *
 * The index keeps 32 of the 64 bits (hash_tag). Among N pages a page of unique content meets a
 * stranger with its tag with probability N / 2^32: 0.05 % for 2 million pages (8 GiB), and what
 * that costs is one comparison that fails.
 */
#ifndef MEMD_COMMON_HASH_H
#define MEMD_COMMON_HASH_H

#include "units.h"

/* Bytes of a domain's secret. XXH3 asks for at least 136 (XXH3_SECRET_SIZE_MIN) and has 192 of
 * its own; we take as many. */
#define HASH_SECRET_BYTES 192

struct hash_secret {
    uint8_t bytes[HASH_SECRET_BYTES];
};

/* Hash of the 4096 bytes at `page`. Any thread; reads memory only (a page that changes meanwhile
 * gives some hash, not a crash). */
uint64_t hash_page(const struct hash_secret *secret, const void *page);

/* The 32 bits of a page hash that are kept. Never 0, so that 0 can mean "none". */
static inline uint32_t hash_tag(uint64_t hash)
{
    uint32_t tag = (uint32_t)(hash >> 32) ^ (uint32_t)hash;

    return tag ? tag : 1;
}

/* True when all 4096 bytes at `page` are zero. */
bool hash_page_is_zero(const void *page);

#endif
