/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One walk over all sources. Each page is hashed once; a larger unit's hash is the hash of its
 * pages' hashes. Each level has an open-addressed table with one entry for each content, which
 * names the first unit that had it; a unit is compared byte by byte with those that have its hash.
 *
 * Invariants: a table never moves or grows (its size follows from the number of units, known
 * before); an entry's `source` is the last source that had this content, which is enough to count
 * the distinct contents of each source, because sources are walked one after the other.
 *
 * Memory: 16 bytes an entry at three quarters full, 21.3 bytes a page, and a fifteenth of that for
 * the larger units; page tables for the dumps are 8 bytes more. Dumps are mapped, and dropped
 * behind the walk; what is compared again later is read.
 *
 * Not promised: files that are written meanwhile are counted as whatever was read.
 */
#include "analyze_count.h"

#include <errno.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "hash.h"

#define DROP_BEHIND_BYTES (16UL << 20)
#define COMPARE_BYTES     65536UL
#define UNIT_PAGES_MAX    HUGE_PAGES

const uint64_t ctl_analyze_unit_bytes[ANALYZE_LEVELS] = {PAGE_BYTES, 65536, HUGE_BYTES};

struct entry {
    uint32_t tag;    /* of the hash; 0: the entry is empty */
    uint32_t unit;   /* the first one with this content, all sources laid end to end */
    uint32_t source; /* the last one that had this content */
    uint32_t compressed_bytes;
};

/* The unit of a larger level that is being walked through. */
struct pending {
    uint64_t hashes[UNIT_PAGES_MAX];
    uint32_t pages;
    uint32_t compressed_bytes;
    bool zero, changed;
};

struct level {
    uint64_t unit_bytes;
    uint32_t unit_pages;
    struct entry *table;
    uint64_t slots;
    uint32_t *first_unit; /* of each source */
    struct pending pending;
};

struct counter {
    const struct analyze_source *sources;
    size_t source_count;
    struct level levels[ANALYZE_LEVELS];
    struct analyze_result *result;
    uint64_t seed; /* random: nobody can prepare dumps whose pages collide */
    uint64_t zero_hash;
    void *lz4_state;
    const struct analyze_file *walked; /* what the walk is in, mapped from dropped_bytes on */
    uint64_t dropped_bytes;
    uint8_t *buffer; /* COMPARE_BYTES */
    int error;       /* a read that failed, after which no count is right */
};

/* ---- comparing units ---- */

static size_t find_source(const struct counter *counter, const struct level *level, uint32_t unit)
{
    size_t low = 0, high = counter->source_count;

    while (high - low > 1) {
        size_t middle = (low + high) / 2;

        if (level->first_unit[middle] <= unit)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Where a unit's bytes are; `bytes` is less than a whole unit at the end of a source. */
struct place_of_unit {
    const struct analyze_file *file;
    uint64_t offset, bytes;
};

static struct place_of_unit place_unit(const struct counter *counter, const struct level *level,
                                       uint32_t unit)
{
    size_t source = find_source(counter, level, unit);
    const struct analyze_file *file = &counter->sources[source].now;
    uint64_t offset = (unit - level->first_unit[source]) * level->unit_bytes;
    uint64_t left = file->pages * PAGE_BYTES - offset;

    return (struct place_of_unit){
        .file = file,
        .offset = offset,
        .bytes = left < level->unit_bytes ? left : level->unit_bytes,
    };
}

/* `count` bytes of a unit that the walk has left behind: from the mapping while it is there, else
 * read, since mapping it again would let memory grow with the dumps. */
static const uint8_t *old_bytes(struct counter *counter, const struct place_of_unit *place,
                                uint64_t offset, uint64_t count)
{
    uint64_t at = place->offset + offset;

    if (place->file == counter->walked && at >= counter->dropped_bytes)
        return place->file->bytes + at;
    if (pread(place->file->fd, counter->buffer, count, (off_t)at) != (ssize_t)count) {
        counter->error = -EIO;
        memset(counter->buffer, 0, count);
    }
    return counter->buffer;
}

static bool all_zero(const uint8_t *bytes, uint64_t count)
{
    for (uint64_t offset = 0; offset < count; offset += PAGE_BYTES) {
        if (!hash_page_is_zero(bytes + offset))
            return false;
    }
    return true;
}

/* Compares an older unit with the one that the walk is at. What one of them has less (at the end
 * of its source) counts as zeros. */
static bool same_content(struct counter *counter, const struct level *level, uint32_t older,
                         uint32_t current)
{
    struct place_of_unit a = place_unit(counter, level, older);
    struct place_of_unit b = place_unit(counter, level, current);
    const uint8_t *b_bytes = b.file->bytes + b.offset;
    uint64_t both = a.bytes < b.bytes ? a.bytes : b.bytes;
    uint64_t longest = a.bytes < b.bytes ? b.bytes : a.bytes;

    for (uint64_t offset = 0, step; offset < longest; offset += step) {
        uint64_t end = offset < both ? both : longest;
        bool same;

        step = end - offset < COMPARE_BYTES ? end - offset : COMPARE_BYTES;
        if (offset >= a.bytes)
            same = all_zero(b_bytes + offset, step);
        else if (offset >= b.bytes)
            same = all_zero(old_bytes(counter, &a, offset, step), step);
        else
            same = memcmp(old_bytes(counter, &a, offset, step), b_bytes + offset, step) == 0;
        if (!same)
            return false;
    }
    return true;
}

/* The entry with the content of `unit`, or the empty one where it belongs. */
static struct entry *find_entry(struct counter *counter, const struct level *level, uint64_t hash,
                                uint32_t unit)
{
    uint64_t slot = (uint64_t)((unsigned __int128)hash * level->slots >> 64);
    uint32_t tag = (uint32_t)hash ? (uint32_t)hash : 1;

    for (;; slot = slot + 1 == level->slots ? 0 : slot + 1) {
        struct entry *entry = &level->table[slot];

        if (entry->tag == 0 ||
            (entry->tag == tag && same_content(counter, level, entry->unit, unit)))
            return entry;
    }
}

/* ---- counting ---- */

static uint32_t compress_page(const struct counter *counter, const uint8_t *page)
{
    char compressed[PAGE_BYTES];
    int bytes = LZ4_compress_fast_extState(counter->lz4_state, (const char *)page, compressed,
                                           PAGE_BYTES, PAGE_BYTES - 1, 1);

    return bytes > 0 ? (uint32_t)bytes : PAGE_BYTES;
}

static void count_content(struct analyze_counts *counts, uint32_t compressed_bytes)
{
    counts->unique++;
    counts->compressed_bytes += compressed_bytes;
}

/* Counts a unit that is not zero. `page` is NULL for a larger unit, whose pages have been
 * compressed already. Returns the size of the content, compressed. */
static uint32_t count_unit(struct counter *counter, int which, size_t source, uint32_t unit,
                           uint64_t hash, const uint8_t *page)
{
    struct level *level = &counter->levels[which];
    struct entry *entry = find_entry(counter, level, hash, unit);

    if (entry->tag == 0) {
        *entry = (struct entry){
            .tag = (uint32_t)hash ? (uint32_t)hash : 1,
            .unit = unit,
            .source = (uint32_t)source,
            .compressed_bytes =
                page ? compress_page(counter, page) : level->pending.compressed_bytes,
        };
        count_content(&counter->result->all[which], entry->compressed_bytes);
        count_content(&counter->result->sources[source][which], entry->compressed_bytes);
    } else if (entry->source != source) {
        entry->source = (uint32_t)source;
        count_content(&counter->result->sources[source][which], entry->compressed_bytes);
    }
    return entry->compressed_bytes;
}

/* Counts what needs no look at the content; false when there is nothing else to count. */
static bool count_kind(struct analyze_counts *counts, bool zero, bool changed)
{
    counts->changed += changed;
    counts->units += !changed;
    counts->zero += zero && !changed;
    return !zero && !changed;
}

/* The pending unit of a larger level is complete, or its source is at its end. */
static void end_unit(struct counter *counter, int which, size_t source, uint32_t unit)
{
    struct level *level = &counter->levels[which];
    struct pending *pending = &level->pending;
    struct analyze_counts *counts = counter->result->sources[source];

    while (pending->pages < level->unit_pages)
        pending->hashes[pending->pages++] = counter->zero_hash;
    if (count_kind(&counts[which], pending->zero, pending->changed)) {
        uint64_t hash = XXH3_64bits_withSeed(
            pending->hashes, level->unit_pages * sizeof(pending->hashes[0]), counter->seed);

        count_unit(counter, which, source, unit, hash, NULL);
    }
    pending->pages = 0;
}

/* Adds a page to the pending unit of a larger level. */
static void add_page(struct pending *pending, uint64_t hash, uint32_t compressed_bytes, bool zero,
                     bool changed)
{
    if (pending->pages == 0) {
        pending->zero = true;
        pending->changed = false;
        pending->compressed_bytes = 0;
    }
    pending->hashes[pending->pages++] = hash;
    pending->zero &= zero;
    pending->changed |= changed;
    pending->compressed_bytes += compressed_bytes;
}

static bool page_changed(const struct analyze_source *source, uint64_t page)
{
    return source->earlier.fd >= 0 &&
           memcmp(source->now.bytes + page * PAGE_BYTES, source->earlier.bytes + page * PAGE_BYTES,
                  PAGE_BYTES) != 0;
}

static void count_page(struct counter *counter, size_t index, uint64_t page)
{
    const struct analyze_source *source = &counter->sources[index];
    const uint8_t *bytes = source->now.bytes + page * PAGE_BYTES;
    struct level *levels = counter->levels;
    bool changed = page_changed(source, page);
    bool zero = !changed && hash_page_is_zero(bytes);
    uint64_t hash = counter->zero_hash;
    uint32_t compressed = 0;

    if (count_kind(&counter->result->sources[index][ANALYZE_PAGES], zero, changed)) {
        hash = XXH3_64bits_withSeed(bytes, PAGE_BYTES, counter->seed);
        compressed =
            count_unit(counter, ANALYZE_PAGES, index,
                       levels[ANALYZE_PAGES].first_unit[index] + (uint32_t)page, hash, bytes);
    }
    for (int which = ANALYZE_PAGES + 1; which < ANALYZE_LEVELS; which++) {
        struct level *level = &levels[which];

        add_page(&level->pending, hash, compressed, zero, changed);
        if (level->pending.pages == level->unit_pages || page + 1 == source->now.pages)
            end_unit(counter, which, index,
                     level->first_unit[index] + (uint32_t)(page / level->unit_pages));
    }
}

/* Gives back what lies behind the walk. */
static void drop_behind(const struct analyze_file *file, uint64_t end_bytes)
{
    if (file->fd >= 0)
        madvise((void *)(file->bytes + end_bytes - DROP_BEHIND_BYTES), DROP_BEHIND_BYTES,
                MADV_DONTNEED);
}

static int count_source(struct counter *counter, size_t index)
{
    const struct analyze_source *source = &counter->sources[index];

    counter->walked = &source->now;
    counter->dropped_bytes = 0;
    for (uint64_t page = 0; page < source->now.pages; page++) {
        uint64_t end_bytes = (page + 1) * PAGE_BYTES;

        count_page(counter, index, page);
        if (end_bytes % DROP_BEHIND_BYTES == 0) {
            drop_behind(&source->now, end_bytes);
            drop_behind(&source->earlier, end_bytes);
            counter->dropped_bytes = end_bytes;
        }
    }
    return counter->error;
}

/* What follows from the sources' own counts. */
static void sum_up(struct counter *counter)
{
    for (int which = 0; which < ANALYZE_LEVELS; which++) {
        struct analyze_counts *all = &counter->result->all[which];

        for (size_t i = 0; i < counter->source_count; i++) {
            struct analyze_counts *own = &counter->result->sources[i][which];

            own->intra = own->units - own->zero - own->unique;
            all->units += own->units;
            all->zero += own->zero;
            all->intra += own->intra;
            all->changed += own->changed;
        }
    }
}

/* ---- setting up ---- */

static int open_level(struct counter *counter, struct level *level, uint64_t bytes)
{
    uint64_t units = 0;

    level->unit_bytes = bytes;
    level->unit_pages = (uint32_t)(bytes / PAGE_BYTES);
    level->first_unit = calloc(counter->source_count, sizeof(*level->first_unit));
    if (!level->first_unit)
        return -ENOMEM;
    for (size_t i = 0; i < counter->source_count; i++) {
        level->first_unit[i] = (uint32_t)units;
        units += (counter->sources[i].now.pages + level->unit_pages - 1) / level->unit_pages;
        if (units > UINT32_MAX)
            return -E2BIG;
    }
    level->slots = units + units / 3 + 1;
    level->table = mmap(NULL, level->slots * sizeof(struct entry), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (level->table == MAP_FAILED) {
        level->table = NULL;
        return -ENOMEM;
    }
    return 0;
}

static int open_counter(struct counter *counter)
{
    static const uint8_t zeros[PAGE_BYTES];
    int error = 0;

    if (getrandom(&counter->seed, sizeof(counter->seed), 0) != sizeof(counter->seed))
        return -EAGAIN;
    counter->zero_hash = XXH3_64bits_withSeed(zeros, PAGE_BYTES, counter->seed);
    counter->lz4_state = malloc((size_t)LZ4_sizeofState());
    counter->result->sources = calloc(counter->source_count, sizeof(*counter->result->sources));
    counter->buffer = malloc(COMPARE_BYTES);
    if (!counter->lz4_state || !counter->buffer || !counter->result->sources)
        return -ENOMEM;
    for (int which = 0; error == 0 && which < ANALYZE_LEVELS; which++)
        error = open_level(counter, &counter->levels[which], ctl_analyze_unit_bytes[which]);
    return error;
}

static void close_counter(struct counter *counter)
{
    for (int which = 0; which < ANALYZE_LEVELS; which++) {
        struct level *level = &counter->levels[which];

        free(level->first_unit);
        if (level->table)
            munmap(level->table, level->slots * sizeof(struct entry));
    }
    free(counter->lz4_state);
    free(counter->buffer);
    free(counter);
}

int ctl_analyze_count(const struct analyze_source *sources, size_t count,
                      struct analyze_result *ret_result)
{
    struct analyze_result result = {0};
    struct counter *counter = calloc(1, sizeof(*counter));
    int error;

    if (!counter)
        return -ENOMEM;
    counter->sources = sources;
    counter->source_count = count;
    counter->result = &result;
    error = open_counter(counter);
    for (size_t i = 0; error == 0 && i < count; i++)
        error = count_source(counter, i);
    if (error == 0) {
        sum_up(counter);
        *ret_result = result;
    } else {
        ctl_analyze_result_free(&result);
    }
    close_counter(counter);
    return error;
}

void ctl_analyze_result_free(struct analyze_result *result)
{
    free(result->sources);
    result->sources = NULL;
}
