/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One walk over all sources, in chunks. A batch of pages is hashed first, which also fetches their
 * places in the table; then each of them is looked up.
 *
 * Exactly by content, without holding the pages: a table has one entry for each content, which
 * names the first unit that had it. A page whose hash is found is compared byte by byte with that
 * first page, which is read again from its source (from the chunk at hand if it lies in there; as a
 * run where duplicates follow each other like their originals; the last such run is kept). So each
 * page gets the number of the first page that is equal to it: its *content*. Two larger units are
 * equal exactly if the contents of their pages are, so that for them numbers are compared.
 *
 * Invariants: a table never moves or grows (its size follows from the number of pages in the files,
 * known before); an entry's `source` is the last source that had this content, which is enough to
 * count the distinct contents of each source and of each domain, because sources are walked one
 * after the other, and the sources of a domain without others between.
 *
 * Memory: 16 bytes an entry at three quarters full, 21.3 bytes a page, a fifteenth of that for the
 * larger units, and 4 bytes for each page's content; about 27 bytes a page. Holes cost nothing.
 *
 * Not promised: files that are written meanwhile are counted as whatever was read; the caller looks
 * whether they were.
 */
#include "analyze_count.h"

#include <errno.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "hash.h"

/* A chunk is what is dropped at once when it is behind: 512 KiB, against which a system call costs
 * nothing. */
#define CHUNK_PAGES 128U

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
    uint32_t compressed_bytes;
};

struct level {
    uint32_t unit_pages;
    struct entry *table;
    uint64_t slots;
    uint32_t compressed_bytes; /* of the unit that is being walked through, so far */
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
    uint64_t content_count;
    uint64_t seed; /* random: nobody can prepare dumps whose pages collide */
    void *lz4_state;
    struct run run;
    /* The chunk at hand. */
    const uint8_t *chunk;
    uint8_t *buffer, *earlier_buffer; /* for what can't be looked at in place */
    uint32_t chunk_first, chunk_pages;
    uint64_t hashes[BATCH_PAGES];
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
    struct run *run = &counter->run;
    int error = 0;

    if (page - counter->chunk_first < counter->chunk_pages) {
        *ret_bytes = counter->chunk + (page - counter->chunk_first) * PAGE_BYTES;
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
        *ret_same = memcmp(bytes, counter->chunk + (current - counter->chunk_first) * PAGE_BYTES,
                           PAGE_BYTES) == 0;
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

static uint32_t compress_page(const struct counter *counter, uint32_t page)
{
    const uint8_t *bytes = counter->chunk + (page - counter->chunk_first) * PAGE_BYTES;
    char compressed[PAGE_BYTES];
    int size;

    if (counter->options->no_compression)
        return 0;
    size = LZ4_compress_fast_extState(counter->lz4_state, (const char *)bytes, compressed,
                                      PAGE_BYTES, PAGE_BYTES - 1, 1);
    return size > 0 ? (uint32_t)size : PAGE_BYTES;
}

static void count_content(struct analyze_counts *counts, uint32_t compressed_bytes)
{
    counts->unique++;
    counts->compressed_bytes += compressed_bytes;
}

/* A domain meets a content for the first time. */
static void count_in_domain(struct counter *counter, int which, size_t source,
                            uint32_t compressed_bytes)
{
    if (counter->options->domains)
        count_content(&counter->result->domains[counter->sources[source].domain][which],
                      compressed_bytes);
}

/* Another source meets a content that is known. */
static void count_again(struct counter *counter, int which, size_t source, struct entry *entry)
{
    struct level *level = &counter->levels[which];
    struct analyze_result *result = counter->result;
    size_t first = find_source(counter, (uint64_t)entry->unit * level->unit_pages);

    if (entry->source == first) { /* until now it was the only one */
        result->all[which].common++;
        result->sources[first][which].common++;
    }
    result->sources[source][which].common++;
    count_content(&result->sources[source][which], entry->compressed_bytes);
    if (counter->sources[entry->source].domain != counter->sources[source].domain)
        count_in_domain(counter, which, source, entry->compressed_bytes);
    entry->source = (uint32_t)source;
}

/* Counts a unit that is not zero; *ret_entry is the one of its content. */
static int count_unit(struct counter *counter, int which, size_t source, uint32_t unit,
                      uint64_t hash, struct entry **ret_entry)
{
    struct level *level = &counter->levels[which];
    struct entry *entry;
    int error = find_entry(counter, level, hash, unit, &entry);

    if (error < 0)
        return error;
    if (entry->tag == 0) {
        *entry = (struct entry){
            .tag = tag_of(hash),
            .unit = unit,
            .source = (uint32_t)source,
            .compressed_bytes =
                which == ANALYZE_PAGES ? compress_page(counter, unit) : level->compressed_bytes,
        };
        count_content(&counter->result->all[which], entry->compressed_bytes);
        count_content(&counter->result->sources[source][which], entry->compressed_bytes);
        count_in_domain(counter, which, source, entry->compressed_bytes);
    } else if (entry->source != source) {
        count_again(counter, which, source, entry);
    }
    *ret_entry = entry;
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

/* The last page of a larger unit has been counted. */
static int end_unit(struct counter *counter, int which, size_t source, uint32_t unit)
{
    struct level *level = &counter->levels[which];
    const uint32_t *contents = &counter->contents[(uint64_t)unit * level->unit_pages];
    struct entry *entry;
    uint32_t any = 0;
    bool changed = false;
    int error = 0;

    for (uint32_t i = 0; i < level->unit_pages; i++) {
        any |= contents[i];
        changed |= contents[i] == CONTENT_CHANGED;
    }
    if (count_kind(&counter->result->sources[source][which], 1, any == 0, changed))
        error = count_unit(
            counter, which, source, unit,
            XXH3_64bits_withSeed(contents, level->unit_pages * sizeof(contents[0]), counter->seed),
            &entry);
    level->compressed_bytes = 0;
    return error;
}

static int end_units(struct counter *counter, size_t source, uint32_t page, bool last)
{
    int error = 0;

    for (int which = ANALYZE_PAGES + 1; error == 0 && which < ANALYZE_LEVELS; which++) {
        uint32_t unit_pages = counter->levels[which].unit_pages;

        if ((page + 1) % unit_pages == 0 || last)
            error = end_unit(counter, which, source, page / unit_pages);
    }
    return error;
}

/* ---- the walk ---- */

/* Finds the kinds of `count` pages from page `from` of the chunk on, and the hashes of those that
 * need one. */
static void hash_batch(struct counter *counter, const uint8_t *earlier, uint32_t from,
                       uint32_t count)
{
    const struct level *level = &counter->levels[ANALYZE_PAGES];
    uint32_t *contents = &counter->contents[counter->chunk_first];

    for (uint32_t i = from; i < from + count; i++) {
        const uint8_t *page = counter->chunk + i * PAGE_BYTES;

        contents[i] = CONTENT_ZERO;
        if (earlier && memcmp(page, earlier + i * PAGE_BYTES, PAGE_BYTES) != 0) {
            contents[i] = CONTENT_CHANGED;
        } else if (*(const uint64_t *)(const void *)page || !hash_page_is_zero(page)) {
            uint64_t hash = XXH3_64bits_withSeed(page, PAGE_BYTES, counter->seed);

            contents[i] = counter->chunk_first + i + 1;
            counter->hashes[i - from] = hash;
            __builtin_prefetch(&level->table[slot_of(level, hash)], 1);
        }
    }
}

static int count_page(struct counter *counter, size_t source, uint32_t page, uint64_t hash)
{
    uint32_t *content = &counter->contents[page];
    struct entry *entry;
    int error;

    if (!count_kind(&counter->result->sources[source][ANALYZE_PAGES], 1, *content == CONTENT_ZERO,
                    *content == CONTENT_CHANGED))
        return 0;
    error = count_unit(counter, ANALYZE_PAGES, source, page, hash, &entry);
    if (error < 0)
        return error;
    *content = entry->unit + 1;
    for (int which = ANALYZE_PAGES + 1; which < ANALYZE_LEVELS; which++)
        counter->levels[which].compressed_bytes += entry->compressed_bytes;
    return 0;
}

/* *ret_earlier is NULL where there is no earlier dump. */
static int view_chunk(struct counter *counter, const struct analyze_source *source, uint64_t page,
                      uint32_t pages, const uint8_t **ret_earlier)
{
    int error = ctl_analyze_view(&source->now, page, pages, counter->buffer, &counter->chunk);

    *ret_earlier = NULL;
    if (error == 0 && source->earlier.fd >= 0)
        error =
            ctl_analyze_view(&source->earlier, page, pages, counter->earlier_buffer, ret_earlier);
    return error;
}

static int count_chunk(struct counter *counter, size_t index, uint64_t page, uint32_t pages)
{
    const struct analyze_source *source = &counter->sources[index];
    const uint8_t *earlier;
    int error = view_chunk(counter, source, page, pages, &earlier);

    if (error < 0)
        return error;
    counter->chunk_first = counter->first_page[index] + (uint32_t)page;
    counter->chunk_pages = pages;
    for (uint32_t i = 0; error == 0 && i < pages; i++) {
        if (i % BATCH_PAGES == 0)
            hash_batch(counter, earlier, i, pages - i < BATCH_PAGES ? pages - i : BATCH_PAGES);
        error =
            count_page(counter, index, counter->chunk_first + i, counter->hashes[i % BATCH_PAGES]);
        if (error == 0)
            error = end_units(counter, index, counter->chunk_first + i,
                              page + i + 1 == source->now.pages);
    }
    ctl_analyze_drop(&source->now, counter->chunk, pages);
    if (earlier)
        ctl_analyze_drop(&source->earlier, earlier, pages);
    return error;
}

/* Counts whole 2 MiB of a hole at once, which is all that a sparse file of terabytes has. Returns
 * how many pages. */
static uint64_t count_hole(struct counter *counter, size_t index, uint64_t page)
{
    const struct analyze_source *source = &counter->sources[index];
    uint64_t pages;

    if (page % HUGE_PAGES || source->earlier.fd >= 0)
        return 0;
    pages = ctl_analyze_hole(&source->now, page) / HUGE_PAGES * HUGE_PAGES;
    for (int which = 0; which < ANALYZE_LEVELS; which++)
        count_kind(&counter->result->sources[index][which],
                   pages / counter->levels[which].unit_pages, true, false);
    return pages;
}

static int count_source(struct counter *counter, size_t index)
{
    uint64_t pages = counter->sources[index].now.pages, some;
    int error = 0;

    for (uint64_t page = 0; error == 0 && page < pages; page += some) {
        some = count_hole(counter, index, page);
        if (some == 0) {
            some = pages - page < CHUNK_PAGES ? pages - page : CHUNK_PAGES;
            error = count_chunk(counter, index, page, (uint32_t)some);
        }
    }
    counter->chunk_pages = 0;
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

static uint64_t table_bytes(const struct level *level)
{
    uint64_t bytes = level->slots * sizeof(struct entry);

    /* The kernel gives huge pages to mappings that are whole numbers of them. Each look-up is
     * somewhere else: without huge pages, each costs a miss of the translation as well. */
    return bytes < HUGE_BYTES ? bytes : (bytes + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
}

static int open_level(struct level *level, uint64_t unit_bytes, uint64_t units)
{
    level->unit_pages = (uint32_t)(unit_bytes / PAGE_BYTES);
    level->slots = units + units / 3 + 1;
    level->table = map_zeros(table_bytes(level));
    if (!level->table)
        return -ENOMEM;
    madvise(level->table, table_bytes(level), MADV_HUGEPAGE);
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
    counter->content_count = pages;
    counter->contents = map_zeros(pages * sizeof(*counter->contents));
    return counter->contents ? 0 : -ENOMEM;
}

static int open_counter(struct counter *counter)
{
    struct analyze_result *result = counter->result;
    uint32_t domains = counter->options->domains;
    int error;

    if (getrandom(&counter->seed, sizeof(counter->seed), 0) != sizeof(counter->seed))
        return -EAGAIN;
    counter->lz4_state = malloc((size_t)LZ4_sizeofState());
    counter->buffer = malloc(CHUNK_PAGES * PAGE_BYTES);
    counter->earlier_buffer = malloc(CHUNK_PAGES * PAGE_BYTES);
    counter->run = (struct run){.bytes = malloc(RUN_PAGES * PAGE_BYTES), .next = PAGE_NONE};
    result->sources = calloc(counter->source_count, sizeof(*result->sources));
    result->domains = domains ? calloc(domains, sizeof(*result->domains)) : NULL;
    if (!counter->lz4_state || !counter->buffer || !counter->earlier_buffer ||
        !counter->run.bytes || !result->sources || (domains && !result->domains))
        return -ENOMEM;
    error = number_pages(counter);
    return error == 0 ? open_levels(counter) : error;
}

static void close_counter(struct counter *counter)
{
    for (int which = 0; which < ANALYZE_LEVELS; which++) {
        struct level *level = &counter->levels[which];

        if (level->table)
            munmap(level->table, table_bytes(level));
    }
    if (counter->contents)
        munmap(counter->contents, counter->content_count * sizeof(*counter->contents));
    free(counter->first_page);
    free(counter->lz4_state);
    free(counter->buffer);
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
