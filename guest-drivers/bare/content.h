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

/* What lies between a random word and the next one: a vCPU may be interpreted, and an addition is
 * cheaper than a multiplication. */
#define CONTENT_STEP 0xd6e8feb86659fd93ULL

static inline uint64_t content_random_word(uint64_t key, uint32_t word)
{
    return (key + word) * CONTENT_STEP;
}

/* Words of eight letters, out of which LZ4 makes a quarter. */
#define CONTENT_TEXT(a, b, c, d, e, f, g, h)                                          \
    ((uint64_t)(a) | (uint64_t)(b) << 8 | (uint64_t)(c) << 16 | (uint64_t)(d) << 24 | \
     (uint64_t)(e) << 32 | (uint64_t)(f) << 40 | (uint64_t)(g) << 48 | (uint64_t)(h) << 56)

static inline uint64_t content_text_word(uint64_t key, uint32_t word)
{
    static const uint64_t words[8] = {
        CONTENT_TEXT('b', 'a', 'l', 'l', 'o', 'o', 'n', ' '),
        CONTENT_TEXT('t', 'o', ' ', 's', 'h', 'a', 'r', 'e'),
        CONTENT_TEXT(' ', 'm', 'e', 'm', 'o', 'r', 'y', ' '),
        CONTENT_TEXT('a', ' ', 'g', 'u', 'e', 's', 't', ' '),
        CONTENT_TEXT('i', 's', ' ', 'c', 'o', 'l', 'd', ' '),
        CONTENT_TEXT('o', 'f', ' ', 'p', 'a', 'g', 'e', 's'),
        CONTENT_TEXT(' ', 'w', 'h', 'i', 'c', 'h', ' ', 'a'),
        CONTENT_TEXT('m', 'e', 'r', 'g', 'e', 's', ',', ' '),
    };

    if (word % 128 == 0)
        return key + word; /* what makes the page unique */
    return words[content_random_word(key, word) >> 61];
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

/* The eight words of a line (0 to 63) that was overwritten; `generation` 0: that is at rest. */
static inline void content_line(enum content_kind kind, uint64_t key, uint32_t line, uint64_t seed,
                                uint32_t generation, uint64_t ret_words[CONTENT_LINE_WORDS])
{
    uint32_t first = line * CONTENT_LINE_WORDS;
    uint64_t word;

    if (generation == 0 && (kind == CONTENT_ZERO || kind == CONTENT_TEXT || kind == CONTENT_LEND)) {
        for (uint32_t i = 0; i < CONTENT_LINE_WORDS; i++)
            ret_words[i] = content_word(kind, key, first + i);
        return;
    }
    word =
        content_random_word(generation ? key ^ content_mix(seed << 32 | generation) : key, first);
    for (uint32_t i = 0; i < CONTENT_LINE_WORDS; i++, word += CONTENT_STEP)
        ret_words[i] = word;
}

#endif
