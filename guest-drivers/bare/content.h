/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the memory of a bare guest holds. The loader presets it and the guest verifies it, both with
 * these functions; they are the only definition.
 *
 * Memory is a list of regions, one a kind. What a word of a page has to be follows from the kind,
 * the page's index in its region, the guest's seed, the word's place and, where the guest writes,
 * the generation of its cache line. So any wrong byte is found, be it foreign, stale or torn.
 *
 *   zero     zeros
 *   common   the same in every guest, page by page
 *   text     of this guest alone, compressible
 *   twin     of this guest alone, each content in four places
 *   unique   of this guest alone, incompressible
 *   churn    rests like `common`; some lines are overwritten, and set back some rounds later
 *   hot      of this guest alone; lines are rewritten for ever
 *   flip     rests like `common`; at each visit a line is overwritten, read back and set back
 *   lend     zeros but for one line; at each visit the page is given up, found empty, and that
 *            line written again
 */
#ifndef BARE_CONTENT_H
#define BARE_CONTENT_H

#include <stdint.h>

enum content_kind {
    CONTENT_ZERO,
    CONTENT_COMMON,
    CONTENT_TEXT,
    CONTENT_TWIN,
    CONTENT_UNIQUE,
    CONTENT_CHURN,
    CONTENT_HOT,
    CONTENT_FLIP,
    CONTENT_LEND,
    CONTENT_KINDS,
};

/* As a table's initializer, so that loader and guest have the same names. */
#define CONTENT_NAMES                                                              \
    {                                                                              \
        "zero", "common", "text", "twin", "unique", "churn", "hot", "flip", "lend" \
    }

#define CONTENT_PAGE_BYTES 4096U
#define CONTENT_PAGE_WORDS 512U
#define CONTENT_PAGE_LINES 64U
#define CONTENT_LINE_WORDS 8U
#define CONTENT_LEND_KINDS 16U /* different contents in `lend` */

static inline uint64_t content_mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

/* From this all words of a page at rest follow. `pages`: of its region. */
static inline uint64_t content_key(enum content_kind kind, uint64_t seed, uint32_t index,
                                   uint32_t pages)
{
    uint64_t owner = seed;

    if (kind == CONTENT_COMMON || kind == CONTENT_CHURN || kind == CONTENT_FLIP ||
        kind == CONTENT_LEND)
        owner = 0; /* nobody's */
    if (kind == CONTENT_TWIN)
        index %= pages / 4 ? pages / 4 : 1;
    if (kind == CONTENT_LEND)
        index %= CONTENT_LEND_KINDS;
    return content_mix(owner * 0x9e3779b97f4a7c15ULL + kind) ^ content_mix(index + 1ULL);
}

/* One multiplication: a vCPU may be interpreted. */
static inline uint64_t content_random_word(uint64_t key, uint32_t word)
{
    return (key + word) * 0xd6e8feb86659fd93ULL;
}

/* A sentence of eight words of eight letters, out of which LZ4 makes a quarter. */
static inline uint64_t content_text_word(uint64_t key, uint32_t word)
{
    static const char words[8][9] = {"balloon ", "to share", " memory\n", "a guest ",
                                     "is cold ", "of pages", " (a hit)",  "merges, "};
    const char *chars = words[content_random_word(key, word) >> 61];
    uint64_t value = 0;

    if (word % 128 == 0)
        return key + word; /* what makes the page unique */
    for (int i = 7; i >= 0; i--)
        value = value << 8 | (uint8_t)chars[i];
    return value;
}

/* A word (0 to 511) of a page at rest. */
static inline uint64_t content_word(enum content_kind kind, uint64_t key, uint32_t word)
{
    switch (kind) {
    case CONTENT_ZERO: return 0;
    case CONTENT_TEXT: return content_text_word(key, word);
    case CONTENT_LEND:
        return word / CONTENT_LINE_WORDS == key % CONTENT_PAGE_LINES
                   ? content_random_word(key, word)
                   : 0;
    default: return content_random_word(key, word);
    }
}

/* The same in a line that was overwritten: `generation` is then not 0. */
static inline uint64_t content_written_word(enum content_kind kind, uint64_t key, uint32_t word,
                                            uint64_t seed, uint32_t generation)
{
    if (generation == 0)
        return content_word(kind, key, word);
    return content_random_word(key ^ content_mix(seed << 32 | generation), word);
}

#endif
