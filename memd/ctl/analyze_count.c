/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One walk over all sources, in chunks. A batch of pages is hashed first, which also fetches their
 * places in the table; then each of them is looked up. Pages with a new content are compressed
 * beside the walk (analyze_compress.c), and at the end of each source their sizes are waited for.
 *
 * Exactly by content, without holding the pages: a table has one entry for each content, which
 * names the first unit that had it. A page whose hash is found is compared byte by byte with that
 * first page, which is read again from its source (from the chunk at hand if it lies in there; as a
 * run where duplicates follow each other like their originals; the last such run is kept). So each
 * page gets the number of the first page that is equal to it: its *content*. Two larger units are
 * equal exactly if the contents of their pages are, so that for them numbers are compared, once all
 * pages of a source have theirs.
 *
 * Invariants: a table never moves or grows (its size follows from the number of pages in the files,
 * known before); an entry's `source` is the last source that had this content, which is enough to
 * count the distinct contents of each source and of each domain, because sources are walked one
 * after the other, and the sources of a domain without others between.
 *
 * Memory: 12 bytes an entry at three quarters full, 16 bytes a page, a fifteenth of that for the
 * larger units, and for each page 4 bytes of its content and 2 of its compressed size; about 23
 * bytes a page. Holes cost nothing.
 *
 * Not promised: files that are written meanwhile are counted as whatever was read; the caller looks
 * whether they were.
 */
#include "analyze_count.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "analyze_compress.h"
#include "hash.h"

#define CHUNK_PAGES ANALYZE_CHUNK_PAGES

/* A batch is hashed, and then looked up: long enough for the table's lines to arrive, short enough
 * that hashing does not drive them out again. */
#define BATCH_PAGES 16U

/* The longest run of originals that is read ahead for comparing. */
#define RUN_PAGES 64U

/* A page's content: 0 is that of zero pages, else one more than the number of the first page that
 * is equal to it. */
#define CONTENT_ZERO    0U
#define CONTENT_CHANGED UINT32_MAX

const uint64_t ctl_analyze_unit_bytes[ANALYZE_LEVELS] = {PAGE_BYTES, 65536, HUGE_BYTES};

struct entry {
    uint32_t tag;    /* of the hash; 0: the entry is empty */
    uint32_t unit;   /* the first one with this content, all sources laid end to end */
    uint32_t source; /* the last one that had this content */
};

struct level {
    uint32_t unit_pages;
    struct entry *table;
    uint64_t slots;
};

/* A page that was hashed and is to be looked up. */
struct candidate {
    uint64_t hash;
    uint32_t page;
};

/* Pages that were read again to be compared with. */
struct run {
    uint8_t *bytes;
    uint32_t first, pages; /* page numbers over all sources */
    uint32_t next;         /* if this one is asked for next, a longer run is worth while */
    uint32_t wanted;       /* pages */
};

struct counter {
    const struct analyze_source *sources;
    size_t source_count;
    const struct analyze_options *options;
    struct level levels[ANALYZE_LEVELS];
    struct analyze_result *result;
    uint32_t *first_page; /* of each source: a multiple of HUGE_PAGES */
    uint32_t *contents;   /* of each page */
    uint16_t *sizes;      /* of each content, compressed, at its number less 1; NULL: not wanted */
    uint64_t page_count;
    struct hash_secret secret; /* random: nobody can prepare dumps whose pages collide */
    struct analyze_compressor *compressor;
    struct analyze_chunk *chunk; /* at hand; else NULL */
    uint8_t *earlier_buffer;     /* for what can't be looked at in place */
    struct run run;
    struct candidate batch[BATCH_PAGES];
    uint32_t batch_count;
};

/* ---- tables ---- */

static uint64_t slot_of(const struct level *level, uint64_t hash)
{
    return (uint64_t)((unsigned __int128)hash * level->slots >> 64);
}

static uint32_t tag_of(uint64_t hash)
{
    return (uint32_t)hash ? (uint32_t)hash : 1;
}

static uint64_t next_slot(const struct level *level, uint64_t slot)
{
    return slot + 1 == level->slots ? 0 : slot + 1;
}

static size_t find_source(const struct counter *counter, uint64_t page)
{
    size_t low = 0, high = counter->source_count;

    while (high - low > 1) {
        size_t middle = (low + high) / 2;

        if (counter->first_page[middle] <= page)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* ---- pages that lie behind ---- */

/* Reads pages from `page` on again; the more of them, the longer they have been asked for one after
 * the other. */
static int read_run(struct counter *counter, uint32_t page)
{
    struct run *run = &counter->run;
    size_t source = find_source(counter, page);
    const struct analyze_file *file = &counter->sources[source].now;
    uint64_t at = page - counter->first_page[source], count;
    int error;

    run->wanted = page == run->next ? 2 * run->wanted : 1;
    run->wanted = run->wanted < RUN_PAGES ? run->wanted : RUN_PAGES;
    count = file->pages - at < run->wanted ? file->pages - at : run->wanted;
    run->pages = 0;
    error = ctl_analyze_read(file, at, count, run->bytes);
    if (error < 0)
        return error;
    run->first = page;
    run->pages = (uint32_t)count;
    return 0;
}

/* Where the bytes of a page are that was walked over before; they stay until the next call. */
static int old_page(struct counter *counter, uint32_t page, const uint8_t **ret_bytes)
{
    const struct analyze_chunk *chunk = counter->chunk;
    struct run *run = &counter->run;
    int error = 0;

    if (page - chunk->first < chunk->pages) {
        *ret_bytes = chunk->bytes + (page - chunk->first) * PAGE_BYTES;
        return 0;
    }
    if (page - run->first >= run->pages)
        error = read_run(counter, page);
    run->next = page + 1;
    if (error == 0)
        *ret_bytes = run->bytes + (page - run->first) * PAGE_BYTES;
    return error;
}

/* ---- finding contents ---- */

/* Whether two units are equal. Of pages `current` is one of the chunk. */
static int compare_units(struct counter *counter, const struct level *level, uint32_t older,
                         uint32_t current, bool *ret_same)
{
    const struct analyze_chunk *chunk = counter->chunk;
    const uint8_t *bytes;
    int error;

    if (level->unit_pages > 1) {
        *ret_same = memcmp(&counter->contents[(uint64_t)older * level->unit_pages],
                           &counter->contents[(uint64_t)current * level->unit_pages],
                           level->unit_pages * sizeof(counter->contents[0])) == 0;
        return 0;
    }
    error = old_page(counter, older, &bytes);
    if (error == 0)
        *ret_same =
            memcmp(bytes, chunk->bytes + (current - chunk->first) * PAGE_BYTES, PAGE_BYTES) == 0;
    return error;
}

/* The entry with the content of `unit`, or the empty one where it belongs. */
static int find_entry(struct counter *counter, const struct level *level, uint64_t hash,
                      uint32_t unit, struct entry **ret_entry)
{
    uint32_t tag = tag_of(hash);
    bool same = false;

    for (uint64_t slot = slot_of(level, hash);; slot = next_slot(level, slot)) {
        struct entry *entry = &level->table[slot];
        int error = 0;

        if (entry->tag == tag)
            error = compare_units(counter, level, entry->unit, unit, &same);
        if (error < 0)
            return error;
        if (entry->tag == 0 || same) {
            *ret_entry = entry;
            return 0;
        }
    }
}

/* ---- counting ---- */

/* What the pages of a unit take when they are compressed; all of them are settled. */
static uint64_t compressed_bytes(const struct counter *counter, const struct level *level,
                                 uint32_t unit)
{
    const uint32_t *contents = &counter->contents[(uint64_t)unit * level->unit_pages];
    uint64_t bytes = 0;

    for (uint32_t i = 0; counter->sizes && i < level->unit_pages; i++)
        bytes += contents[i] == CONTENT_ZERO ? 0 : counter->sizes[contents[i] - 1];
    return bytes;
}

static void count_content(struct analyze_counts *counts, uint64_t bytes)
{
    counts->unique++;
    counts->compressed_bytes += bytes;
}

/* A domain meets a content for the first time. */
static void count_in_domain(struct counter *counter, int which, size_t source, uint64_t bytes)
{
    if (counter->options->domains)
        count_content(&counter->result->domains[counter->sources[source].domain][which], bytes);
}

/* A content that no source had. Pages are only marked to be compressed: settle_pages(). */
static void count_new(struct counter *counter, int which, size_t source, uint32_t unit)
{
    struct analyze_chunk *chunk = counter->chunk;
    uint64_t bytes = 0;

    if (which != ANALYZE_PAGES)
        bytes = compressed_bytes(counter, &counter->levels[which], unit);
    else if (counter->sizes)
        chunk->wanted[chunk->wanted_count++] = (uint8_t)(unit - chunk->first);
    count_content(&counter->result->all[which], bytes);
    count_content(&counter->result->sources[source][which], bytes);
    count_in_domain(counter, which, source, bytes);
}

/* Another source meets a content that is known. */
static void count_again(struct counter *counter, int which, size_t source, struct entry *entry)
{
    struct level *level = &counter->levels[which];
    struct analyze_result *result = counter->result;
    size_t first = find_source(counter, (uint64_t)entry->unit * level->unit_pages);
    uint64_t bytes = compressed_bytes(counter, level, entry->unit);

    if (entry->source == first) { /* until now it was the only one */
        result->all[which].common++;
        result->sources[first][which].common++;
    }
    result->sources[source][which].common++;
    count_content(&result->sources[source][which], bytes);
    if (counter->sources[entry->source].domain != counter->sources[source].domain)
        count_in_domain(counter, which, source, bytes);
    entry->source = (uint32_t)source;
}

/* Counts a unit that is not zero; *ret_first is the first one that is equal to it. */
static int count_unit(struct counter *counter, int which, size_t source, uint32_t unit,
                      uint64_t hash, uint32_t *ret_first)
{
    struct entry *entry;
    int error = find_entry(counter, &counter->levels[which], hash, unit, &entry);

    if (error < 0)
        return error;
    if (entry->tag == 0) {
        *entry = (struct entry){.tag = tag_of(hash), .unit = unit, .source = (uint32_t)source};
        count_new(counter, which, source, unit);
    } else if (entry->source != source) {
        count_again(counter, which, source, entry);
    }
    *ret_first = entry->unit;
    return 0;
}

/* Counts what needs no look at the content; false when there is nothing else to count. */
static bool count_kind(struct analyze_counts *counts, uint64_t units, bool zero, bool changed)
{
    counts->changed += changed ? units : 0;
    counts->units += changed ? 0 : units;
    counts->zero += zero && !changed ? units : 0;
    return !zero && !changed;
}

/* ---- larger units ---- */

static int count_larger_unit(struct counter *counter, int which, size_t source, uint32_t unit)
{
    const struct level *level = &counter->levels[which];
    const uint32_t *contents = &counter->contents[(uint64_t)unit * level->unit_pages];
    uint32_t any = 0, first;
    bool changed = false;

    for (uint32_t i = 0; i < level->unit_pages; i++) {
        any |= contents[i];
        changed |= contents[i] == CONTENT_CHANGED;
    }
    if (!count_kind(&counter->result->sources[source][which], 1, any == CONTENT_ZERO, changed))
        return 0;
    return count_unit(counter, which, source, unit,
                      XXH3_64bits_withSecret(contents, level->unit_pages * sizeof(contents[0]),
                                             counter->secret.bytes, sizeof(counter->secret.bytes)),
                      &first);
}

/* The units that begin in the 2 MiB from `page` of the source on. */
static int count_larger_units(struct counter *counter, size_t source, uint64_t page)
{
    uint64_t left = counter->sources[source].now.pages - page;
    uint32_t start = counter->first_page[source] + (uint32_t)page;
    uint32_t pages = left < HUGE_PAGES ? (uint32_t)left : (uint32_t)HUGE_PAGES;
    int error = 0;

    for (int which = ANALYZE_PAGES + 1; which < ANALYZE_LEVELS; which++) {
        uint32_t unit_pages = counter->levels[which].unit_pages;

        for (uint32_t i = 0; error == 0 && i < pages; i += unit_pages)
            error = count_larger_unit(counter, which, source, (start + i) / unit_pages);
    }
    return error;
}

/* ---- pages ---- */

static bool is_zero(const uint8_t *page)
{
    static const uint8_t zeros[PAGE_BYTES];
    uint64_t word;

    memcpy(&word, page, sizeof(word));
    return word == 0 && memcmp(page, zeros, PAGE_BYTES) == 0;
}

/* Lists a page of the chunk that has to be looked up, and fetches its place in the table. */
static void add_to_batch(struct counter *counter, uint32_t i)
{
    const struct analyze_chunk *chunk = counter->chunk;
    const struct level *level = &counter->levels[ANALYZE_PAGES];
    uint64_t hash = hash_page(&counter->secret, chunk->bytes + i * PAGE_BYTES);

    __builtin_prefetch(&level->table[slot_of(level, hash)], 1);
    counter->batch[counter->batch_count++] =
        (struct candidate){.hash = hash, .page = chunk->first + i};
}

/* Finds the kinds of `count` pages from page `from` of the chunk on, and the batch of those that
 * have to be looked up. */
static void hash_batch(struct counter *counter, size_t source, const uint8_t *earlier,
                       uint32_t from, uint32_t count)
{
    struct analyze_counts *counts = &counter->result->sources[source][ANALYZE_PAGES];
    const struct analyze_chunk *chunk = counter->chunk;

    counter->batch_count = 0;
    for (uint32_t i = from; i < from + count; i++) {
        const uint8_t *page = chunk->bytes + i * PAGE_BYTES;
        bool changed = earlier && memcmp(page, earlier + i * PAGE_BYTES, PAGE_BYTES) != 0;

        if (changed)
            counter->contents[chunk->first + i] = CONTENT_CHANGED;
        if (count_kind(counts, 1, !changed && is_zero(page), changed))
            add_to_batch(counter, i);
    }
}

static int look_up_batch(struct counter *counter, size_t source)
{
    for (uint32_t i = 0; i < counter->batch_count; i++) {
        const struct candidate *candidate = &counter->batch[i];
        uint32_t first;
        int error =
            count_unit(counter, ANALYZE_PAGES, source, candidate->page, candidate->hash, &first);

        if (error < 0)
            return error;
        counter->contents[candidate->page] = first + 1;
    }
    return 0;
}

/* ---- the walk ---- */

/* *ret_earlier is NULL where there is no earlier dump. */
static int view_chunk(struct counter *counter, const struct analyze_source *source, uint64_t page,
                      const uint8_t **ret_earlier)
{
    struct analyze_chunk *chunk = counter->chunk;
    int error = ctl_analyze_view(&source->now, page, chunk->pages, chunk->buffer, &chunk->bytes);

    *ret_earlier = NULL;
    if (error == 0 && source->earlier.fd >= 0)
        error = ctl_analyze_view(&source->earlier, page, chunk->pages, counter->earlier_buffer,
                                 ret_earlier);
    return error;
}

static int count_chunk(struct counter *counter, size_t index, uint64_t page, uint32_t pages)
{
    const struct analyze_source *source = &counter->sources[index];
    struct analyze_chunk *chunk = ctl_analyze_chunk_take(counter->compressor, &source->now);
    const uint8_t *earlier;
    int error;

    chunk->first = counter->first_page[index] + (uint32_t)page;
    chunk->pages = pages;
    counter->chunk = chunk;
    error = view_chunk(counter, source, page, &earlier);
    for (uint32_t i = 0; error == 0 && i < pages; i += BATCH_PAGES) {
        hash_batch(counter, index, earlier, i, pages - i < BATCH_PAGES ? pages - i : BATCH_PAGES);
        error = look_up_batch(counter, index);
    }
    if (earlier)
        ctl_analyze_drop(&source->earlier, earlier, pages);
    counter->chunk = NULL;
    ctl_analyze_chunk_give(counter->compressor, chunk);
    return error;
}

/* Whole 2 MiB that are a hole from `page` on, and were in the earlier dump, which is all that a
 * sparse file of terabytes has: they need no look. In pages. */
static uint64_t hole_pages(const struct analyze_source *source, uint64_t page)
{
    uint64_t pages, earlier;

    if (page % HUGE_PAGES)
        return 0;
    pages = ctl_analyze_hole(&source->now, page);
    earlier = source->earlier.fd >= 0 ? ctl_analyze_hole(&source->earlier, page) : pages;
    return (pages < earlier ? pages : earlier) / HUGE_PAGES * HUGE_PAGES;
}

static void count_hole(struct counter *counter, size_t index, uint64_t pages)
{
    for (int which = 0; which < ANALYZE_LEVELS; which++)
        count_kind(&counter->result->sources[index][which],
                   pages / counter->levels[which].unit_pages, true, false);
}

static int count_pages(struct counter *counter, size_t index)
{
    const struct analyze_source *source = &counter->sources[index];
    uint64_t pages = source->now.pages, some;
    int error = 0;

    for (uint64_t page = 0; error == 0 && page < pages; page += some) {
        some = hole_pages(source, page);
        if (some) {
            count_hole(counter, index, some);
            continue;
        }
        some = pages - page < CHUNK_PAGES ? pages - page : CHUNK_PAGES;
        error = count_chunk(counter, index, page, (uint32_t)some);
    }
    return error;
}

/* Waits for the sizes of all contents that no source before this one had. */
static void settle_pages(struct counter *counter, size_t index)
{
    struct analyze_result *result = counter->result;
    uint64_t bytes = ctl_analyze_compressor_settle(counter->compressor);

    result->all[ANALYZE_PAGES].compressed_bytes += bytes;
    result->sources[index][ANALYZE_PAGES].compressed_bytes += bytes;
    if (counter->options->domains)
        result->domains[counter->sources[index].domain][ANALYZE_PAGES].compressed_bytes += bytes;
}

static int count_source(struct counter *counter, size_t index)
{
    const struct analyze_source *source = &counter->sources[index];
    int error = count_pages(counter, index);
    uint64_t some;

    settle_pages(counter, index);
    for (uint64_t page = 0; error == 0 && page < source->now.pages; page += some) {
        some = hole_pages(source, page);
        if (some)
            continue;
        some = HUGE_PAGES;
        error = count_larger_units(counter, index, page);
    }
    return error;
}

/* The sources of one domain, without others between. */
static int count_domain(struct counter *counter, uint32_t domain)
{
    int error = 0;

    for (size_t i = 0; error == 0 && i < counter->source_count; i++) {
        if (!counter->options->domains || counter->sources[i].domain == domain)
            error = count_source(counter, i);
    }
    return error;
}

/* ---- what follows from the sources' own counts ---- */

static void add_up(struct analyze_counts *sum, const struct analyze_counts *own)
{
    sum->units += own->units;
    sum->zero += own->zero;
    sum->intra += own->intra;
    sum->changed += own->changed;
}

static void sum_up(struct counter *counter)
{
    struct analyze_result *result = counter->result;

    for (int which = 0; which < ANALYZE_LEVELS; which++) {
        for (size_t i = 0; i < counter->source_count; i++) {
            struct analyze_counts *own = &result->sources[i][which];

            own->intra = own->units - own->zero - own->unique;
            add_up(&result->all[which], own);
            if (counter->options->domains)
                add_up(&result->domains[counter->sources[i].domain][which], own);
        }
    }
}

/* ---- setting up ---- */

/* Zeros that take no memory until they are written to; NULL when there is no room. */
static void *map_zeros(uint64_t bytes)
{
    void *address = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return address == MAP_FAILED ? NULL : address;
}

static uint64_t round_up(uint64_t bytes)
{
    return (bytes + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
}

static uint64_t table_bytes(const struct level *level)
{
    uint64_t bytes = level->slots * sizeof(struct entry);

    /* Linux 6.7 and later put a mapping where huge pages fit if it is a whole number of them. */
    return bytes < HUGE_BYTES ? bytes : round_up(bytes);
}

static int open_level(struct level *level, uint64_t unit_bytes, uint64_t units)
{
    uint64_t bytes;

    level->unit_pages = (uint32_t)(unit_bytes / PAGE_BYTES);
    level->slots = units + units / 3 + 1;
    level->table = map_zeros(table_bytes(level));
    if (!level->table)
        return -ENOMEM;
    /* Each look-up is somewhere else: without huge pages, each costs a miss of the translation as
     * well. What is left over is not worth a huge page. */
    bytes = level->slots * sizeof(struct entry) / HUGE_BYTES * HUGE_BYTES;
    if (bytes)
        madvise(level->table, bytes, MADV_HUGEPAGE);
    return 0;
}

/* Each level's table has room for every unit that can be anything but zeros. */
static int open_levels(struct counter *counter)
{
    int error = 0;

    for (int which = 0; error == 0 && which < ANALYZE_LEVELS; which++) {
        uint64_t unit_pages = ctl_analyze_unit_bytes[which] / PAGE_BYTES, units = 0;

        for (size_t i = 0; i < counter->source_count; i++) {
            const struct analyze_file *file = &counter->sources[i].now;

            /* A piece of an extent can be in two more units than it fills. */
            units += ctl_analyze_data_pages(file) / unit_pages +
                     (which == ANALYZE_PAGES ? 0 : 2 * file->extent_count);
        }
        error = open_level(&counter->levels[which], ctl_analyze_unit_bytes[which], units);
    }
    return error;
}

static int number_pages(struct counter *counter)
{
    uint64_t pages = 0;

    counter->first_page = calloc(counter->source_count, sizeof(*counter->first_page));
    if (!counter->first_page)
        return -ENOMEM;
    for (size_t i = 0; i < counter->source_count; i++) {
        counter->first_page[i] = (uint32_t)pages;
        pages += (counter->sources[i].now.pages + HUGE_PAGES - 1) / HUGE_PAGES * HUGE_PAGES;
        if (pages > ANALYZE_PAGES_MAX)
            return -E2BIG;
    }
    counter->page_count = pages;
    counter->contents = map_zeros(pages * sizeof(*counter->contents));
    if (!counter->contents || counter->options->no_compression)
        return counter->contents ? 0 : -ENOMEM;
    counter->sizes = map_zeros(pages * sizeof(*counter->sizes));
    return counter->sizes ? 0 : -ENOMEM;
}

static int open_counter(struct counter *counter)
{
    struct analyze_result *result = counter->result;
    uint32_t domains = counter->options->domains;
    int error;

    if (getrandom(&counter->secret, sizeof(counter->secret), 0) != sizeof(counter->secret))
        return -EAGAIN;
    counter->earlier_buffer = malloc(CHUNK_PAGES * PAGE_BYTES);
    counter->run = (struct run){.bytes = malloc(RUN_PAGES * PAGE_BYTES), .next = PAGE_NONE};
    result->sources = calloc(counter->source_count, sizeof(*result->sources));
    result->domains = domains ? calloc(domains, sizeof(*result->domains)) : NULL;
    if (!counter->earlier_buffer || !counter->run.bytes || !result->sources ||
        (domains && !result->domains))
        return -ENOMEM;
    error = number_pages(counter);
    if (error == 0)
        error = open_levels(counter);
    return error == 0 ? ctl_analyze_compressor_open(counter->sizes, &counter->compressor) : error;
}

static void close_counter(struct counter *counter)
{
    ctl_analyze_compressor_close(counter->compressor);
    for (int which = 0; which < ANALYZE_LEVELS; which++) {
        struct level *level = &counter->levels[which];

        if (level->table)
            munmap(level->table, table_bytes(level));
    }
    if (counter->contents)
        munmap(counter->contents, counter->page_count * sizeof(*counter->contents));
    if (counter->sizes)
        munmap(counter->sizes, counter->page_count * sizeof(*counter->sizes));
    free(counter->first_page);
    free(counter->earlier_buffer);
    free(counter->run.bytes);
    free(counter);
}

int ctl_analyze_count(const struct analyze_source *sources, size_t count,
                      const struct analyze_options *options, struct analyze_result *ret_result)
{
    struct analyze_result result = {0};
    struct counter *counter = calloc(1, sizeof(*counter));
    int error;

    if (!counter)
        return -ENOMEM;
    counter->sources = sources;
    counter->source_count = count;
    counter->options = options;
    counter->result = &result;
    error = open_counter(counter);
    for (uint32_t domain = 0; error == 0 && domain < (options->domains ? options->domains : 1);
         domain++)
        error = count_domain(counter, domain);
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
    free(result->domains);
    result->sources = NULL;
    result->domains = NULL;
}
