/* SPDX-License-Identifier: Apache-2.0 */
/* The exact counter against a counter that sorts, and the copy of a live process. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "analyze_count.h"
#include "ctl_collide.h"

#define SOURCES_MAX 4

/* ---- dumps ---- */

struct dump {
    uint8_t *bytes;
    uint64_t pages;
};

static struct dump make_dump(uint64_t pages)
{
    struct dump dump = {.bytes = calloc(pages, PAGE_BYTES), .pages = pages};

    cr_assert(dump.bytes);
    return dump;
}

/* Fills a page with bytes that follow from `content`; 0 is a zero page. */
static void fill(struct dump *dump, uint64_t page, uint32_t content)
{
    uint8_t *bytes = dump->bytes + page * PAGE_BYTES;

    for (uint32_t i = 0; i < PAGE_BYTES; i++)
        bytes[i] = content ? (uint8_t)((content * 2654435761U) >> (i % 24)) : 0;
    if (content)
        memcpy(bytes, &content, sizeof(content));
}

static void free_dumps(const struct dump *dumps, size_t count)
{
    for (size_t i = 0; i < count; i++)
        free(dumps[i].bytes);
}

static struct analyze_file open_dump(const struct dump *dump)
{
    char path[] = "/tmp/unit_ctl.XXXXXX", why[ANALYZE_WHY_CHARS];
    struct analyze_file file;
    size_t bytes = dump->pages * PAGE_BYTES;
    int fd = mkstemp(path);

    cr_assert(fd >= 0 && write(fd, dump->bytes, bytes) == (ssize_t)bytes);
    close(fd);
    cr_assert(ctl_analyze_open_dump(path, &file, why) == 0, "%s", why);
    unlink(path);
    return file;
}

/* ---- the naive counter ---- */

struct unit {
    uint8_t *bytes; /* a whole unit, padded with zeros */
    size_t size;
    size_t source;
};

static int compare_units(const void *a, const void *b)
{
    const struct unit *first = a, *second = b;

    return memcmp(first->bytes, second->bytes, first->size);
}

static int compare_units_and_sources(const void *a, const void *b)
{
    const struct unit *first = a, *second = b;
    int order = compare_units(a, b);

    return order ? order : (first->source > second->source) - (first->source < second->source);
}

static bool is_zero(const uint8_t *bytes, size_t size)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, size - 1) == 0;
}

static uint64_t compressed(const struct unit *unit)
{
    uint64_t sum = 0;
    char out[LZ4_COMPRESSBOUND(PAGE_BYTES)];

    for (size_t at = 0; at < unit->size; at += PAGE_BYTES) {
        int bytes =
            LZ4_compress_default((const char *)unit->bytes + at, out, PAGE_BYTES, sizeof(out));

        if (!is_zero(unit->bytes + at, PAGE_BYTES))
            sum += bytes < (int)PAGE_BYTES ? (uint64_t)bytes : PAGE_BYTES;
    }
    return sum;
}

/* Whether the content that begins at `first` in the sorted units is of several sources. */
static bool is_common(const struct unit *units, size_t count, size_t first)
{
    size_t last = first;

    while (last + 1 < count && compare_units(&units[first], &units[last + 1]) == 0)
        last++;
    return units[first].source != units[last].source;
}

static struct analyze_counts naive(const struct dump *dumps, const struct dump *earlier,
                                   size_t count, size_t size)
{
    struct analyze_counts counts = {0};
    struct unit *units = NULL;
    size_t filled = 0;

    for (size_t s = 0; s < count; s++) {
        uint64_t bytes = dumps[s].pages * PAGE_BYTES;

        for (uint64_t at = 0; at < bytes; at += size) {
            uint64_t part = bytes - at < size ? bytes - at : size;
            struct unit unit = {.bytes = calloc(1, size), .size = size, .source = s};

            memcpy(unit.bytes, dumps[s].bytes + at, part);
            if (earlier && memcmp(earlier[s].bytes + at, dumps[s].bytes + at, part) != 0) {
                counts.changed++;
                free(unit.bytes);
                continue;
            }
            counts.units++;
            if (is_zero(unit.bytes, size)) {
                counts.zero++;
                free(unit.bytes);
                continue;
            }
            units = reallocarray(units, filled + 1, sizeof(*units));
            units[filled++] = unit;
        }
    }
    if (filled)
        qsort(units, filled, sizeof(*units), compare_units_and_sources);
    for (size_t i = 0; i < filled; i++) {
        if (i == 0 || compare_units(&units[i - 1], &units[i]) != 0) {
            counts.unique++;
            counts.compressed_bytes += compressed(&units[i]);
            counts.common += is_common(units, filled, i);
        } else if (units[i - 1].source == units[i].source) {
            counts.intra++;
        }
    }
    for (size_t i = 0; i < filled; i++)
        free(units[i].bytes);
    free(units);
    return counts;
}

static void expect_same(const struct analyze_counts *got, const struct analyze_counts *want,
                        bool with_common, const char *where)
{
    if (with_common)
        cr_expect(got->common == want->common, "%s: %lu common, not %lu", where, got->common,
                  want->common);
    cr_expect(got->units == want->units, "%s: %lu units, not %lu", where, got->units, want->units);
    cr_expect(got->zero == want->zero, "%s: %lu zero, not %lu", where, got->zero, want->zero);
    cr_expect(got->unique == want->unique, "%s: %lu unique, not %lu", where, got->unique,
              want->unique);
    cr_expect(got->intra == want->intra, "%s: %lu intra, not %lu", where, got->intra, want->intra);
    cr_expect(got->changed == want->changed, "%s: %lu changed, not %lu", where, got->changed,
              want->changed);
    cr_expect(got->compressed_bytes == want->compressed_bytes, "%s: %lu compressed, not %lu", where,
              got->compressed_bytes, want->compressed_bytes);
}

static void compare_results(const struct analyze_result *result, const struct dump *dumps,
                            const struct dump *earlier, size_t count)
{
    for (int level = 0; level < ANALYZE_LEVELS; level++) {
        size_t size = ctl_analyze_unit_bytes[level];
        struct analyze_counts want = naive(dumps, earlier, count, size);
        char where[64];

        snprintf(where, sizeof(where), "all, level %d", level);
        expect_same(&result->all[level], &want, true, where);
        for (size_t s = 0; s < count; s++) {
            want = naive(&dumps[s], earlier ? &earlier[s] : NULL, 1, size);
            snprintf(where, sizeof(where), "source %zu, level %d", s, level);
            expect_same(&result->sources[s][level], &want, false, where);
        }
    }
}

/* Sources' common contents: those of each that some other source has. */
static void compare_common(const struct analyze_result *result, const struct dump *dumps,
                           const struct dump *earlier, size_t count)
{
    for (int level = 0; level < ANALYZE_LEVELS; level++) {
        size_t size = ctl_analyze_unit_bytes[level];
        struct analyze_counts all = naive(dumps, earlier, count, size);

        for (size_t s = 0; s < count; s++) {
            struct dump others[SOURCES_MAX], others_earlier[SOURCES_MAX];
            struct analyze_counts own = naive(&dumps[s], earlier ? &earlier[s] : NULL, 1, size);
            struct analyze_counts rest = {0};
            size_t n = 0;

            for (size_t other = 0; other < count; other++) {
                if (other == s)
                    continue;
                others[n] = dumps[other];
                others_earlier[n++] = earlier ? earlier[other] : dumps[other];
            }
            if (n)
                rest = naive(others, earlier ? others_earlier : NULL, n, size);
            cr_expect(result->sources[s][level].common == own.unique + rest.unique - all.unique,
                      "source %zu, level %d: %lu common contents", s, level,
                      result->sources[s][level].common);
        }
    }
}

typedef int count_function(const struct analyze_source *, size_t, const struct analyze_options *,
                           struct analyze_result *);

static void open_sources(const struct dump *dumps, const struct dump *earlier, size_t count,
                         struct analyze_source *ret_sources)
{
    for (size_t s = 0; s < count; s++) {
        ret_sources[s] =
            (struct analyze_source){.name = "dump", .now = open_dump(&dumps[s]), .earlier.fd = -1};
        if (earlier)
            ret_sources[s].earlier = open_dump(&earlier[s]);
    }
}

static void close_sources(struct analyze_source *sources, size_t count)
{
    for (size_t s = 0; s < count; s++) {
        ctl_analyze_close(&sources[s].now);
        ctl_analyze_close(&sources[s].earlier);
    }
}

/* Counts with `function` and naively, and compares everything. */
static void check_with(count_function *function, const struct dump *dumps,
                       const struct dump *earlier, size_t count)
{
    struct analyze_source sources[SOURCES_MAX];
    struct analyze_options options = {0};
    struct analyze_result result;

    open_sources(dumps, earlier, count, sources);
    cr_assert(function(sources, count, &options, &result) == 0);
    compare_results(&result, dumps, earlier, count);
    compare_common(&result, dumps, earlier, count);
    ctl_analyze_result_free(&result);
    close_sources(sources, count);
}

static void check(const struct dump *dumps, const struct dump *earlier, size_t count)
{
    check_with(ctl_analyze_count, dumps, earlier, count);
}

/* ---- counting ---- */

Test(ctl_analyze, one_page_alone)
{
    struct dump dump = make_dump(1);

    fill(&dump, 0, 7);
    check(&dump, NULL, 1);
    fill(&dump, 0, 0);
    check(&dump, NULL, 1);
    free_dumps(&dump, 1);
}

Test(ctl_analyze, all_pages_zero)
{
    struct dump dump = make_dump(1200);

    check(&dump, NULL, 1);
    free_dumps(&dump, 1);
}

Test(ctl_analyze, all_pages_equal)
{
    struct dump dump = make_dump(1200);

    for (uint64_t page = 0; page < dump.pages; page++)
        fill(&dump, page, 5);
    check(&dump, NULL, 1);
    free_dumps(&dump, 1);
}

Test(ctl_analyze, pages_that_differ_in_their_last_8_bytes_only)
{
    struct dump dump = make_dump(600);

    for (uint64_t page = 0; page < dump.pages; page++) {
        uint64_t last = page % 100;

        fill(&dump, page, 3);
        memcpy(dump.bytes + (page + 1) * PAGE_BYTES - sizeof(last), &last, sizeof(last));
    }
    check(&dump, NULL, 1);
    free_dumps(&dump, 1);
}

Test(ctl_analyze, pages_that_are_zero_but_for_their_last_byte)
{
    struct dump dump = make_dump(40);

    for (uint64_t page = 0; page < dump.pages; page += 3)
        dump.bytes[(page + 1) * PAGE_BYTES - 1] = 1 + page % 2;
    check(&dump, NULL, 1);
    free_dumps(&dump, 1);
}

Test(ctl_analyze, a_short_last_unit_equals_a_whole_one_that_ends_in_zeros)
{
    struct dump dumps[2] = {make_dump(3 * 512), make_dump(512 + 20)};

    fill(&dumps[0], 0, 9);
    fill(&dumps[0], 512 + 1, 9);
    fill(&dumps[0], 1024, 9);
    fill(&dumps[1], 1, 9);        /* whole, equal to the second unit above */
    fill(&dumps[1], 512, 9);      /* short, equal to the first and third */
    fill(&dumps[1], 512 + 16, 9); /* and now not any more; short at 64 KiB too */
    check(dumps, NULL, 2);
    fill(&dumps[1], 512 + 16, 0);
    check(dumps, NULL, 2);
    check((struct dump[]){dumps[1], dumps[0]}, NULL, 2); /* the short one first */
    free_dumps(dumps, 2);
}

Test(ctl_analyze, the_same_contents_in_other_sources_are_no_duplicates_within_one)
{
    struct dump dumps[3] = {make_dump(100), make_dump(70), make_dump(1)};

    for (uint64_t page = 0; page < 100; page++)
        fill(&dumps[0], page, (uint32_t)page % 30);
    for (uint64_t page = 0; page < 70; page++)
        fill(&dumps[1], page, 20 + (uint32_t)page % 20);
    fill(&dumps[2], 0, 25);
    check(dumps, NULL, 3);
    free_dumps(dumps, 3);
}

Test(ctl_analyze, pages_that_changed_are_left_out)
{
    struct dump now[2] = {make_dump(1030), make_dump(100)};
    struct dump earlier[2] = {make_dump(1030), make_dump(100)};

    for (uint64_t page = 0; page < 1030; page++) {
        fill(&now[0], page, 1 + (uint32_t)page % 50);
        fill(&earlier[0], page, 1 + (uint32_t)page % 50);
    }
    fill(&earlier[0], 3, 0);
    fill(&now[0], 700, 0);                           /* now zero, and was not */
    earlier[0].bytes[1030 * PAGE_BYTES - 1] ^= 0x80; /* one bit */
    fill(&now[1], 5, 4);
    check(now, earlier, 2);
    free_dumps(now, 2);
    free_dumps(earlier, 2);
}

Test(ctl_analyze, everything_changed)
{
    struct dump now = make_dump(20), earlier = make_dump(20);

    for (uint64_t page = 0; page < 20; page++)
        fill(&now, page, 1);
    check(&now, &earlier, 1);
    free_dumps(&now, 1);
    free_dumps(&earlier, 1);
}

/* Runs, copies of whole units, scattered copies and near-duplicates, by chance. */
static void scramble(struct dump *dump, unsigned *seed)
{
    for (uint64_t page = 0; page < dump->pages; page++) {
        int kind = rand_r(seed) % 10;

        if (kind < 2)
            fill(dump, page, 0);
        else if (kind < 8)
            fill(dump, page, 1 + (uint32_t)rand_r(seed) % 200);
        else
            fill(dump, page, (uint32_t)rand_r(seed));
        if (kind == 7)
            dump->bytes[page * PAGE_BYTES + (size_t)rand_r(seed) % PAGE_BYTES] ^= 1;
    }
    for (uint64_t unit = 0; unit + 16 <= dump->pages; unit += 16) {
        if (rand_r(seed) % 3 == 0)
            memcpy(dump->bytes + unit * PAGE_BYTES, dump->bytes, 16 * PAGE_BYTES);
    }
}

Test(ctl_analyze, scrambled_dumps_are_counted_like_by_sorting)
{
    for (unsigned seed = 1; seed <= 12; seed++) {
        unsigned state = seed;
        struct dump dumps[3], earlier[3];

        for (size_t s = 0; s < 3; s++) {
            uint64_t pages = 1 + (uint64_t)rand_r(&state) % 1500;

            dumps[s] = make_dump(pages);
            earlier[s] = make_dump(pages);
            scramble(&dumps[s], &state);
            memcpy(earlier[s].bytes, dumps[s].bytes, pages * PAGE_BYTES);
            for (int i = 0; i < 40; i++)
                earlier[s].bytes[(uint64_t)rand_r(&state) % (pages * PAGE_BYTES)] ^= 4;
        }
        check(dumps, NULL, 3);
        check(dumps, earlier, 3);
        free_dumps(dumps, 3);
        free_dumps(earlier, 3);
    }
}

/* With a hash that is the same for everything only the comparison of bytes is left. */
Test(ctl_analyze, every_hash_collides)
{
    struct dump dumps[2] = {make_dump(150), make_dump(90)};
    unsigned seed = 99;

    scramble(&dumps[0], &seed);
    scramble(&dumps[1], &seed);
    memcpy(dumps[1].bytes, dumps[0].bytes, 30 * PAGE_BYTES);
    check_with(collide_analyze_count, dumps, NULL, 2);
    free_dumps(dumps, 2);
}

/* Every way to put the sources into two domains: each domain counts as if its sources were alone,
 * and nothing else changes. */
Test(ctl_analyze, domains_are_counted_like_their_sources_alone)
{
    struct dump dumps[4];
    struct analyze_source sources[SOURCES_MAX];
    unsigned seed = 5;

    for (size_t s = 0; s < 4; s++) {
        dumps[s] = make_dump(300 + 37 * s);
        scramble(&dumps[s], &seed);
    }
    open_sources(dumps, NULL, 4, sources);
    for (unsigned split = 0; split < 16; split++) {
        struct analyze_options options = {.domains = 2};
        struct analyze_result result;

        for (size_t s = 0; s < 4; s++)
            sources[s].domain = split >> s & 1;
        cr_assert(ctl_analyze_count(sources, 4, &options, &result) == 0);
        compare_results(&result, dumps, NULL, 4);
        compare_common(&result, dumps, NULL, 4);
        for (uint32_t domain = 0; domain < 2; domain++) {
            struct dump members[4];
            size_t n = 0;

            for (size_t s = 0; s < 4; s++) {
                if (sources[s].domain == domain)
                    members[n++] = dumps[s];
            }
            for (int level = 0; level < ANALYZE_LEVELS; level++) {
                struct analyze_counts want = naive(members, NULL, n, ctl_analyze_unit_bytes[level]);

                expect_same(&result.domains[domain][level], &want, false, "domain");
            }
        }
        ctl_analyze_result_free(&result);
    }
    close_sources(sources, 4);
    free_dumps(dumps, 4);
}

Test(ctl_analyze, without_compression_only_the_compressed_bytes_are_missing)
{
    struct dump dump = make_dump(600);
    struct analyze_source source;
    struct analyze_options options = {.no_compression = true};
    struct analyze_result result;
    unsigned seed = 8;

    scramble(&dump, &seed);
    open_sources(&dump, NULL, 1, &source);
    cr_assert(ctl_analyze_count(&source, 1, &options, &result) == 0);
    for (int level = 0; level < ANALYZE_LEVELS; level++) {
        struct analyze_counts want = naive(&dump, NULL, 1, ctl_analyze_unit_bytes[level]);

        want.compressed_bytes = 0;
        expect_same(&result.all[level], &want, true, "all");
    }
    ctl_analyze_result_free(&result);
    close_sources(&source, 1);
    free_dumps(&dump, 1);
}

/* Pages of our own mapping that are present. */
static size_t present_here(const uint8_t *start, off_t bytes)
{
    size_t present = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    uint64_t entry;

    cr_assert(fd >= 0);
    for (uintptr_t at = (uintptr_t)start; at < (uintptr_t)start + (size_t)bytes; at += PAGE_BYTES) {
        cr_assert(pread(fd, &entry, sizeof(entry), (off_t)(at / PAGE_BYTES * sizeof(entry))) ==
                  sizeof(entry));
        present += entry >> 63;
    }
    close(fd);
    return present;
}

/* The dump with holes where its pages are zeros. */
static struct analyze_file open_sparse(const struct dump *dump)
{
    char path[] = "/tmp/unit_ctl.XXXXXX", why[ANALYZE_WHY_CHARS];
    struct analyze_file file;
    int fd = mkstemp(path);

    cr_assert(fd >= 0 && ftruncate(fd, (off_t)(dump->pages * PAGE_BYTES)) == 0);
    for (uint64_t page = 0; page < dump->pages; page++) {
        off_t at = (off_t)(page * PAGE_BYTES);

        if (!is_zero(dump->bytes + at, PAGE_BYTES))
            cr_assert(pwrite(fd, dump->bytes + at, PAGE_BYTES, at) == (ssize_t)PAGE_BYTES);
    }
    close(fd);
    cr_assert(ctl_analyze_open_dump(path, &file, why) == 0, "%s", why);
    unlink(path);
    return file;
}

/* Counts what was opened, and compares it with the naive counts of these dumps. */
static void check_opened(struct analyze_source *source, const struct dump *dump,
                         const struct dump *earlier)
{
    struct analyze_options options = {0};
    struct analyze_result result;

    cr_assert(ctl_analyze_count(source, 1, &options, &result) == 0);
    compare_results(&result, dump, earlier, 1);
    ctl_analyze_result_free(&result);
    close_sources(source, 1);
}

/* Holes of 2 MiB and more are not even looked at; the counts are those of zeros. */
Test(ctl_analyze, a_sparse_dump_counts_like_one_full_of_zeros)
{
    struct dump dump = make_dump(6 * 512 + 70);
    struct analyze_source source = {.name = "dump", .earlier.fd = -1};

    fill(&dump, 3, 1);
    fill(&dump, 3 * 512 + 511, 1);
    fill(&dump, 6 * 512 + 69, 2);
    source.now = open_sparse(&dump);
    check_opened(&source, &dump, NULL);
    free_dumps(&dump, 1);
}

/* 2 MiB each: a hole in both dumps, in one, in the other, in none; and again. */
Test(ctl_analyze, a_hole_in_one_of_two_dumps_is_no_hole_in_the_other)
{
    struct dump now = make_dump(8 * 512 + 20), earlier = make_dump(8 * 512 + 20);
    struct analyze_source source = {.name = "dump"};

    for (uint64_t page = 0; page < now.pages; page++) {
        uint64_t piece = page / 512 % 4;

        fill(&now, page, piece % 2 ? 1 + (uint32_t)page % 9 : 0);
        fill(&earlier, page, piece > 1 ? 1 + (uint32_t)page % 9 : 0);
    }
    fill(&earlier, 3 * 512 + 7, 0);
    source.now = open_sparse(&now);
    source.earlier = open_sparse(&earlier);
    cr_assert(source.now.extent_count > 1 && source.earlier.extent_count > 1, "no holes");
    check_opened(&source, &now, &earlier);
    free_dumps(&now, 1);
    free_dumps(&earlier, 1);
}

/* A file with some bytes before the dump, as the headers of a core are. */
static struct analyze_file open_behind(const struct dump *dump, size_t head)
{
    char path[] = "/tmp/unit_ctl.XXXXXX";
    struct analyze_file file = {.fd = mkstemp(path), .pages = dump->pages, .extent_count = 1};
    size_t bytes = dump->pages * PAGE_BYTES;

    unlink(path);
    file.extents = calloc(1, sizeof(*file.extents));
    cr_assert(file.fd >= 0 && file.extents);
    file.extents[0] = (struct analyze_extent){.pages = dump->pages, .offset = head};
    cr_assert(pwrite(file.fd, dump->bytes, bytes, (off_t)head) == (ssize_t)bytes);
    cr_assert(fstat(file.fd, &file.status) == 0);
    file.map = mmap(NULL, head + bytes, PROT_READ, MAP_SHARED, file.fd, 0);
    cr_assert(file.map != MAP_FAILED);
    return file;
}

/* QEMU's headers and notes have any length. */
Test(ctl_analyze, pages_at_odd_places_of_a_file_are_counted_where_they_lie)
{
    static uint8_t buffer[5 * PAGE_BYTES];
    struct dump dump = make_dump(2000);
    struct analyze_source source = {.name = "dump", .earlier.fd = -1};
    const uint8_t *view;
    unsigned seed = 3;

    scramble(&dump, &seed);
    source.now = open_behind(&dump, 1237);
    cr_assert(ctl_analyze_view(&source.now, 700, 5, buffer, &view) == 0);
    cr_expect(view == source.now.map + 1237 + 700 * PAGE_BYTES);
    check_opened(&source, &dump, NULL);
    free_dumps(&dump, 1);
}

/* What is behind must not stay mapped, wherever it lies; of all pages the last may. */
Test(ctl_analyze, what_was_looked_at_is_given_back)
{
    struct dump dump = make_dump(2000);
    size_t heads[] = {0, 1237, 5 * PAGE_BYTES + 8};

    for (uint64_t page = 0; page < dump.pages; page++)
        fill(&dump, page, 1 + (uint32_t)page);
    for (size_t i = 0; i < 3; i++) {
        struct analyze_source source = {.name = "dump", .earlier.fd = -1};
        struct analyze_options options = {0};
        struct analyze_result result;

        source.now = open_behind(&dump, heads[i]);
        cr_assert(ctl_analyze_count(&source, 1, &options, &result) == 0);
        cr_expect(present_here(source.now.map, source.now.status.st_size) <= 1, "behind %zu bytes",
                  heads[i]);
        ctl_analyze_result_free(&result);
        close_sources(&source, 1);
    }
    free_dumps(&dump, 1);
}

/* After half of it was compressed. */
Test(ctl_analyze, a_source_that_ends_early_is_an_error, .timeout = 60)
{
    struct dump dump = make_dump(2000);
    struct analyze_source source = {.name = "dump", .earlier.fd = -1};
    struct analyze_options options = {0};
    struct analyze_result result;

    for (uint64_t page = 0; page < dump.pages; page++)
        fill(&dump, page, 1 + (uint32_t)page);
    source.now = open_behind(&dump, 0);
    munmap((void *)source.now.map, dump.pages * PAGE_BYTES);
    source.now.map = NULL;
    cr_assert(ftruncate(source.now.fd, 1100 * PAGE_BYTES) == 0);
    cr_expect(ctl_analyze_count(&source, 1, &options, &result) == -EIO);
    close_sources(&source, 1);
    free_dumps(&dump, 1);
}

/* More than is kept mapped behind the walk, so that contents are read again from the file. */
Test(ctl_analyze, duplicates_that_are_far_apart)
{
    struct dump dump = make_dump(12000);

    for (uint64_t page = 0; page < dump.pages; page++)
        fill(&dump, page, 1 + (uint32_t)page % 5900);
    dump.bytes[11000 * PAGE_BYTES + 4000] ^= 1;
    check(&dump, NULL, 1);
    free_dumps(&dump, 1);
}

/* ---- opening dumps ---- */

static int open_bytes(const void *bytes, size_t count, char why[ANALYZE_WHY_CHARS])
{
    char path[] = "/tmp/unit_ctl.XXXXXX";
    struct analyze_file file;
    int fd = mkstemp(path), error;

    cr_assert(fd >= 0 && write(fd, bytes, count) == (ssize_t)count);
    close(fd);
    error = ctl_analyze_open_dump(path, &file, why);
    if (error == 0)
        ctl_analyze_close(&file);
    unlink(path);
    return error;
}

Test(ctl_analyze, what_is_no_raw_dump_is_refused)
{
    static uint8_t bytes[2 * PAGE_BYTES] = {0x7f, 'E', 'L', 'F', 2, 1, 1, 0, [16] = 2};
    char why[ANALYZE_WHY_CHARS];
    struct analyze_file file;

    cr_expect(open_bytes(bytes, 0, why) == -ENODATA);
    cr_expect(strstr(why, "empty"));
    cr_expect(open_bytes(bytes, sizeof(bytes), why) == -EINVAL);
    cr_expect(strstr(why, "dump-guest-memory"), "%s", why);
    memcpy(bytes, "KDUMP   ", 8);
    cr_expect(open_bytes(bytes, sizeof(bytes), why) == -ENOEXEC);
    cr_expect(strstr(why, "without -z"), "%s", why);
    memcpy(bytes, "makedumpfile", 12);
    cr_expect(open_bytes(bytes, sizeof(bytes), why) == -ENOEXEC);
    memset(bytes, 7, 16);
    cr_expect(open_bytes(bytes, sizeof(bytes), why) == 0);
    cr_expect(open_bytes(bytes, PAGE_BYTES + 1, why) == -EINVAL);
    cr_expect(strstr(why, "4096"));
    cr_expect(ctl_analyze_open_dump("/tmp/unit_ctl.no.such.file", &file, why) == -ENOENT);
    cr_expect(ctl_analyze_open_dump("/tmp", &file, why) == -EINVAL);
}

Test(ctl_analyze, a_dump_that_is_written_meanwhile_is_noticed)
{
    char path[] = "/tmp/unit_ctl.XXXXXX", why[ANALYZE_WHY_CHARS];
    struct analyze_file file;
    int fd = mkstemp(path);

    cr_assert(fd >= 0 && ftruncate(fd, PAGE_BYTES) == 0);
    cr_assert(ctl_analyze_open_dump(path, &file, why) == 0);
    cr_expect(ctl_analyze_file_is_same(&file));
    cr_assert(ftruncate(fd, 2 * PAGE_BYTES) == 0);
    cr_expect_not(ctl_analyze_file_is_same(&file));
    ctl_analyze_close(&file);
    close(fd);
    unlink(path);
}

/* ---- live processes ---- */

#define LIVE_PAGES 64

struct live {
    uint8_t *anonymous; /* every fourth page written to */
    uint8_t *store;     /* a private file mapping, no page of it touched */
    uint8_t *shared;
    pid_t child; /* has the same mappings, untouched since the fork */
};

static struct live start_live(void)
{
    size_t bytes = LIVE_PAGES * PAGE_BYTES;
    int fd = memfd_create("store", 0);
    struct live live = {
        .anonymous = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
        .store = NULL,
        .shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0),
    };

    cr_assert(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    for (uint32_t page = 0; page < LIVE_PAGES; page++)
        cr_assert(pwrite(fd, &(uint32_t){page + 1}, 4, (off_t)(page * PAGE_BYTES)) == 4);
    live.store = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    close(fd);
    madvise(live.anonymous, bytes, MADV_NOHUGEPAGE);
    for (uint32_t page = 0; page < LIVE_PAGES; page += 4)
        memcpy(live.anonymous + page * PAGE_BYTES, &(uint32_t){1000 + page}, 4);
    live.child = fork();
    if (live.child == 0) {
        for (;;)
            pause();
    }
    return live;
}

static void stop_live(const struct live *live)
{
    kill(live->child, SIGKILL);
    waitpid(live->child, NULL, 0);
}

/* Pages of the child that are present in [start, start + LIVE_PAGES). */
static size_t present_pages(const struct live *live, const void *start)
{
    uint64_t entries[LIVE_PAGES];
    char path[64];
    size_t present = 0;
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/pagemap", live->child);
    fd = open(path, O_RDONLY);
    cr_assert(pread(fd, entries, sizeof(entries), (off_t)((uintptr_t)start / PAGE_BYTES * 8)) ==
              sizeof(entries));
    close(fd);
    for (size_t i = 0; i < LIVE_PAGES; i++)
        present += entries[i] >> 63;
    return present;
}

static uint32_t first_word(const struct analyze_file *file, uint64_t page)
{
    uint32_t words[PAGE_BYTES / sizeof(uint32_t)];

    cr_assert(ctl_analyze_read(file, page, 1, (uint8_t *)words) == 0);
    return words[0];
}

Test(ctl_analyze, a_hole_of_a_live_guest_is_not_filled_by_looking)
{
    struct live live = start_live();
    struct analyze_block block = {(uintptr_t)live.anonymous, LIVE_PAGES};
    struct analyze_file file;
    char why[ANALYZE_WHY_CHARS];

    cr_assert(ctl_analyze_open_blocks(live.child, &block, 1, &file, why) == 0, "%s", why);
    for (uint32_t page = 0; page < LIVE_PAGES; page++)
        cr_expect(first_word(&file, page) == (page % 4 ? 0 : 1000 + page));
    cr_expect(present_pages(&live, live.anonymous) == LIVE_PAGES / 4);
    ctl_analyze_close(&file);
    stop_live(&live);
}

Test(ctl_analyze, a_shared_page_that_is_not_mapped_in_yet_is_no_zero_page)
{
    struct live live = start_live();
    struct analyze_block blocks[2] = {{(uintptr_t)live.store, LIVE_PAGES},
                                      {(uintptr_t)live.anonymous, LIVE_PAGES}};
    struct analyze_file file;
    char why[ANALYZE_WHY_CHARS];

    cr_assert(ctl_analyze_open_blocks(live.child, blocks, 2, &file, why) == 0, "%s", why);
    cr_assert(file.pages == 2 * LIVE_PAGES);
    for (uint32_t page = 0; page < LIVE_PAGES; page++)
        cr_expect(first_word(&file, page) == page + 1);
    cr_expect(first_word(&file, LIVE_PAGES + 4) == 1004);
    ctl_analyze_close(&file);
    stop_live(&live);
}

Test(ctl_analyze, memory_that_can_not_be_looked_at_safely_is_refused)
{
    struct live live = start_live();
    struct analyze_block block = {(uintptr_t)live.shared, LIVE_PAGES};
    struct analyze_file file;
    char why[ANALYZE_WHY_CHARS];

    cr_expect(ctl_analyze_open_blocks(live.child, &block, 1, &file, why) < 0);
    cr_expect(strstr(why, "shared"), "%s", why);
    stop_live(&live);
    cr_expect(ctl_analyze_open_blocks(live.child, &block, 1, &file, why) < 0);
}

/* A child that writes to its first page for ever, and never to the second. */
static pid_t start_writer(uint64_t *page)
{
    pid_t child;

    memset(page, 5, 2 * PAGE_BYTES);
    child = fork();
    if (child == 0)
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* not to spin on when the test is ended from outside */
    while (child == 0)
        (*(volatile uint64_t *)page)++;
    return child;
}

Test(ctl_analyze, a_page_that_changes_while_it_is_copied_is_counted)
{
    uint64_t *pages = mmap(NULL, 2 * PAGE_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    struct analyze_block block = {(uintptr_t)pages, 2};
    struct analyze_file file;
    char why[ANALYZE_WHY_CHARS];
    pid_t child = start_writer(pages);
    uint64_t seen = 0;

    /* It may not have had its turn in between. */
    for (int i = 0; seen == 0 && i < 3000; i++) {
        cr_assert(ctl_analyze_open_blocks(child, &block, 1, &file, why) == 0, "%s", why);
        seen = file.unsettled;
        ctl_analyze_close(&file);
    }
    cr_expect(seen == 1, "%lu pages", seen);
    kill(child, SIGSTOP);
    waitpid(child, NULL, WUNTRACED);
    cr_assert(ctl_analyze_open_blocks(child, &block, 1, &file, why) == 0, "%s", why);
    cr_expect(file.unsettled == 0);
    ctl_analyze_close(&file);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}
