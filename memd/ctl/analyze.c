/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memctl analyze: how much could be shared, counted exactly. It changes nothing: dumps are mapped
 * for reading, and live guests are copied without touching what they don't have.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze_count.h"
#include "ctl.h"

#define GUEST_PREFIX "guest:"

enum { ANALYZE_SINCE };

const struct ctl_option ctl_analyze_options[] = {
    [ANALYZE_SINCE] = {.name = "since",
                       .value = "FILE",
                       .help =
                           "leave out what differs from this earlier dump (one for each source)",
                       .repeats = true},
    {0},
};

struct analyze {
    const struct ctl_arguments *arguments;
    struct analyze_source *sources;
    size_t opened;
};

/* A mapped file that shrinks, or a disk that fails, shows as SIGBUS; there is no going on. */
static void on_bus_error(int signal_number)
{
    static const char words[] =
        "memctl: a source can't be read: it has shrunk, or its disk fails\n";

    (void)signal_number;
    if (write(STDERR_FILENO, words, sizeof(words) - 1) < 0)
        _exit(CTL_FAILED);
    _exit(CTL_FAILED);
}

/* ---- opening sources ---- */

static int compare_blocks(const void *a, const void *b)
{
    uint64_t first = ctl_json_u64(*(const json_t *const *)a, "first_page");
    uint64_t second = ctl_json_u64(*(const json_t *const *)b, "first_page");

    return first < second ? -1 : first > second;
}

/* The managed blocks of a guest in the order of their page numbers; their number, or -errno. */
static int list_blocks(const json_t *guest, struct analyze_block **ret_blocks)
{
    const json_t *all = json_object_get(guest, "blocks"), *block;
    const json_t **managed = calloc(json_array_size(all) + 1, sizeof(json_t *));
    struct analyze_block *blocks = calloc(json_array_size(all) + 1, sizeof(*blocks));
    size_t count = 0, i;

    if (!managed || !blocks) {
        free(managed);
        free(blocks);
        return -ENOMEM;
    }
    json_array_foreach(all, i, block)
    {
        if (json_is_true(json_object_get(block, "managed")))
            managed[count++] = block;
    }
    qsort(managed, count, sizeof(json_t *), compare_blocks);
    for (i = 0; i < count; i++)
        blocks[i] = (struct analyze_block){.hva = ctl_json_u64(managed[i], "hva"),
                                           .pages = ctl_json_u64(managed[i], "pages")};
    free(managed);
    *ret_blocks = blocks;
    return (int)count;
}

static enum ctl_status copy_guest(const json_t *guest, const char *name,
                                  struct analyze_source *source)
{
    struct analyze_block *blocks;
    char why[ANALYZE_WHY_CHARS] = "no memory";
    int count = list_blocks(guest, &blocks), error = count;

    if (count == 0) {
        ctl_say("guest %s has no RAM that memd manages: there is nothing to count", name);
        free(blocks);
        return CTL_FAILED;
    }
    if (count > 0) {
        error = ctl_analyze_open_blocks((int)ctl_json_u64(guest, "pid"), blocks, (size_t)count,
                                        &source->now, why);
        free(blocks);
    }
    if (error < 0)
        ctl_say("guest %s: %s", name, why);
    return error < 0 ? CTL_FAILED : CTL_DONE;
}

static enum ctl_status open_guest(const struct analyze *analyze, const char *name,
                                  struct analyze_source *source)
{
    enum ctl_status status;
    json_t *guest;
    char path[128];

    if (!ctl_value_is_guest_name(name)) {
        ctl_say("'%s' is no guest's name", name);
        return CTL_USAGE;
    }
    snprintf(path, sizeof(path), "/v1/guests/%s", name);
    status = ctl_http_call(analyze->arguments->socket, "GET", path, NULL, CTL_TIMEOUT_S, &guest);
    if (status != CTL_DONE)
        return status;
    status = copy_guest(guest, name, source);
    json_decref(guest);
    return status;
}

static enum ctl_status open_file(const char *path, struct analyze_file *file)
{
    char why[ANALYZE_WHY_CHARS];
    int error = ctl_analyze_open_dump(path, file, why);

    if (error == 0)
        return CTL_DONE;
    ctl_say("%s", why);
    return error == -ENOEXEC ? CTL_USAGE : CTL_FAILED;
}

static enum ctl_status open_earlier(struct analyze_source *source, const char *path)
{
    enum ctl_status status = open_file(path, &source->earlier);

    if (status != CTL_DONE || source->earlier.pages == source->now.pages)
        return status;
    ctl_say("%s and %s differ in size: they are not of one guest", path, source->name);
    return CTL_FAILED;
}

static enum ctl_status open_source(struct analyze *analyze, size_t index)
{
    const struct ctl_arguments *arguments = analyze->arguments;
    struct analyze_source *source = &analyze->sources[index];
    const char *name = arguments->operands[index];
    enum ctl_status status;

    *source = (struct analyze_source){.name = name, .now.fd = -1, .earlier.fd = -1};
    analyze->opened++;
    if (strncmp(name, GUEST_PREFIX, strlen(GUEST_PREFIX)) == 0)
        status = open_guest(analyze, name + strlen(GUEST_PREFIX), source);
    else
        status = open_file(name, &source->now);
    if (status == CTL_DONE && arguments->repeated_count)
        status = open_earlier(source, arguments->repeated[index]);
    return status;
}

static enum ctl_status open_sources(struct analyze *analyze)
{
    const struct ctl_arguments *arguments = analyze->arguments;
    enum ctl_status status = CTL_DONE;

    if (arguments->repeated_count && arguments->repeated_count != arguments->operand_count) {
        ctl_say("analyze: --since is given once for each source, in the same order");
        return CTL_USAGE;
    }
    analyze->sources = calloc(arguments->operand_count, sizeof(*analyze->sources));
    if (!analyze->sources) {
        ctl_say("no memory");
        return CTL_FAILED;
    }
    for (size_t i = 0; status == CTL_DONE && i < arguments->operand_count; i++)
        status = open_source(analyze, i);
    return status;
}

static enum ctl_status check_sources(const struct analyze *analyze)
{
    for (size_t i = 0; i < analyze->opened; i++) {
        const struct analyze_source *source = &analyze->sources[i];

        if (!ctl_analyze_file_is_same(&source->now) ||
            (source->earlier.fd >= 0 && !ctl_analyze_file_is_same(&source->earlier))) {
            ctl_say("%s was written to while it was counted: the counts would be wrong",
                    source->name);
            return CTL_FAILED;
        }
    }
    return CTL_DONE;
}

/* ---- what follows from the counts ---- */

static uint64_t duplicates(const struct analyze_counts *counts)
{
    return counts->units - counts->zero - counts->unique;
}

/* Units that are left when each content is kept once. */
static uint64_t kept(const struct analyze_counts *counts)
{
    return counts->unique + (counts->zero > 0);
}

static double ratio(const struct analyze_counts *counts)
{
    return kept(counts) ? (double)counts->units / (double)kept(counts) : 1.0;
}

/* ---- output ---- */

static json_t *make_counts(const struct analyze_counts *counts, uint64_t unit_bytes)
{
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:I, s:I}", "page_bytes",
                     (json_int_t)unit_bytes, "pages", (json_int_t)counts->units, "zero_pages",
                     (json_int_t)counts->zero, "unique_contents", (json_int_t)counts->unique,
                     "duplicate_pages", (json_int_t)duplicates(counts), "intra_guest_duplicates",
                     (json_int_t)counts->intra, "inter_guest_duplicates",
                     (json_int_t)(duplicates(counts) - counts->intra), "saved_bytes",
                     (json_int_t)(unit_bytes * (counts->units - kept(counts))), "ratio",
                     ratio(counts), "compressed_bytes", (json_int_t)counts->compressed_bytes,
                     "changed_pages", (json_int_t)counts->changed);
}

/* The counts of pages, with those of the larger units inside. */
static json_t *make_levels(const struct analyze_counts levels[ANALYZE_LEVELS])
{
    json_t *object = make_counts(&levels[ANALYZE_PAGES], PAGE_BYTES), *larger = json_object();

    for (int which = ANALYZE_PAGES + 1; which < ANALYZE_LEVELS; which++) {
        uint64_t bytes = ctl_analyze_unit_bytes[which];
        char key[CTL_SIZE_CHARS];

        snprintf(key, sizeof(key), "%llu", (unsigned long long)bytes);
        json_object_set_new(larger, key, make_counts(&levels[which], bytes));
    }
    json_object_set_new(object, "granularities", larger);
    return object;
}

static void print_json(const struct analyze *analyze, const struct analyze_result *result)
{
    json_t *object = make_levels(result->all), *sources = json_array();

    for (size_t i = 0; i < analyze->opened; i++) {
        json_t *source = json_object();

        /* A file's name may be no UTF-8; JSON has to be. */
        if (json_object_set_new(source, "name", json_string(analyze->sources[i].name)) < 0)
            json_object_set_new(source, "name", json_sprintf("source %zu", i + 1));
        json_object_update_missing_new(source, make_levels(result->sources[i]));
        json_array_append_new(sources, source);
    }
    json_object_set_new(object, "sources", sources);
    ctl_print_json(object);
    json_decref(object);
}

static void add_counts(struct ctl_table *table, const char *label,
                       const struct analyze_counts *counts, uint64_t unit_bytes)
{
    ctl_table_add(table, "%s", label);
    ctl_table_add_count(table, counts->units);
    ctl_table_add_count(table, counts->zero);
    ctl_table_add_count(table, counts->unique);
    ctl_table_add_count(table, counts->intra);
    ctl_table_add_count(table, duplicates(counts) - counts->intra);
    ctl_table_add_size(table, unit_bytes * (counts->units - kept(counts)));
    ctl_table_add_percent(table, counts->units - kept(counts), counts->units);
    ctl_table_add(table, "%.2f", ratio(counts));
    ctl_table_add_size(table, counts->compressed_bytes);
    ctl_table_add_count(table, counts->changed);
}

static void print_table(const struct analyze *analyze, const struct analyze_result *result)
{
    static const char *const headings[] = {"SOURCE", ">PAGES", ">ZERO",   ">UNIQUE",
                                           ">INTRA", ">INTER", ">SAVED",  ">",
                                           ">RATIO", ">LZ4",   ">CHANGED"};
    struct ctl_table *table = ctl_table_new(headings, sizeof(headings) / sizeof(headings[0]));

    for (size_t i = 0; analyze->opened > 1 && i < analyze->opened; i++)
        add_counts(table, analyze->sources[i].name, &result->sources[i][ANALYZE_PAGES], PAGE_BYTES);
    add_counts(table, analyze->opened > 1 ? "all" : analyze->sources[0].name,
               &result->all[ANALYZE_PAGES], PAGE_BYTES);
    add_counts(table, "in units of 64 KiB", &result->all[ANALYZE_64K], 65536);
    add_counts(table, "in units of 2 MiB", &result->all[ANALYZE_2M], HUGE_BYTES);
    ctl_table_print(table, 0);
}

static enum ctl_status count_and_print(const struct analyze *analyze)
{
    struct analyze_result result;
    enum ctl_status status;
    int error = ctl_analyze_count(analyze->sources, analyze->opened, &result);

    if (error < 0) {
        ctl_say("could not count: %s", strerror(-error));
        return CTL_FAILED;
    }
    status = check_sources(analyze);
    if (status == CTL_DONE && analyze->arguments->json)
        print_json(analyze, &result);
    else if (status == CTL_DONE)
        print_table(analyze, &result);
    ctl_analyze_result_free(&result);
    return status;
}

enum ctl_status ctl_analyze_run(const struct ctl_arguments *arguments)
{
    struct analyze analyze = {.arguments = arguments};
    enum ctl_status status;

    signal(SIGBUS, on_bus_error);
    status = open_sources(&analyze);
    if (status == CTL_DONE)
        status = count_and_print(&analyze);
    for (size_t i = 0; i < analyze.opened; i++) {
        ctl_analyze_close(&analyze.sources[i].now);
        ctl_analyze_close(&analyze.sources[i].earlier);
    }
    free(analyze.sources);
    return status;
}
