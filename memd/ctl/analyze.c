/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memctl analyze: how much could be shared, counted exactly. It changes nothing: dumps are read,
 * and live guests are copied without touching what they don't have.
 *
 * This file opens the sources and says who may share with whom; analyze_source.c and analyze_elf.c
 * know dumps, analyze_guest.c live guests; analyze_count.c counts, analyze_compress.c measures what
 * LZ4 would save; analyze_report.c and analyze_svg.c say what came out.
 */
#include <errno.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze_count.h"
#include "analyze_report.h"
#include "ctl.h"

#define GUEST_PREFIX "guest:"

enum { ANALYZE_SINCE, ANALYZE_DOMAIN, ANALYZE_CSV, ANALYZE_SVG, ANALYZE_NO_COMPRESSION };

const struct ctl_option ctl_analyze_options[] = {
    [ANALYZE_SINCE] = {.name = "since",
                       .value = "FILE",
                       .help =
                           "leave out what differs from this earlier dump (one for each source)",
                       .repeats = true},
    [ANALYZE_DOMAIN] = {.name = "domain",
                        .value = "NAME=SOURCE[,...]",
                        .help = "what if only these shared with each other (* and ? work)",
                        .repeats = true},
    [ANALYZE_CSV] = {.name = "csv", .value = "FILE", .help = "write the counts to a CSV file, too"},
    [ANALYZE_SVG] = {.name = "svg", .value = "FILE", .help = "draw the counts of pages as a chart"},
    [ANALYZE_NO_COMPRESSION] = {.name = "no-compression",
                                .help = "do not measure what LZ4 would save: takes less CPU"},
    {0},
};

struct analyze {
    const struct ctl_arguments *arguments;
    struct analyze_source *sources;
    size_t count;
    char **domain_names; /* those given, and one for each source that is in none of them */
    struct analyze_options options;
};

/* A mapped file that shrinks, or a disk that fails, shows as SIGBUS; there is no going on. */
static void on_bus_error(int signal_number)
{
    static const char words[] =
        "memctl: a source can't be read: it has shrunk, or its disk fails; dump it again\n";

    (void)signal_number;
    if (write(STDERR_FILENO, words, sizeof(words) - 1) < 0)
        _exit(CTL_FAILED);
    _exit(CTL_FAILED);
}

/* ---- opening sources ---- */

/* Twice the same would be taken for duplicates. */
static bool is_given_twice(const struct ctl_arguments *arguments, size_t index)
{
    for (size_t i = 0; i < index; i++) {
        if (strcmp(arguments->operands[i], arguments->operands[index]) == 0)
            return true;
    }
    return false;
}

static enum ctl_status name_sources(struct analyze *analyze)
{
    const struct ctl_arguments *arguments = analyze->arguments;
    size_t since = arguments->repeated[ANALYZE_SINCE].count;

    if (!arguments->operand_count)
        return CTL_USAGE; /* options.c has said so */
    if (since && since != arguments->operand_count) {
        ctl_say("analyze: --since is given once for each source, in the same order");
        return CTL_USAGE;
    }
    for (size_t i = 0; i < arguments->operand_count; i++) {
        if (!*arguments->operands[i]) {
            ctl_say("analyze: a source's name is empty; give a file or guest:NAME");
            return CTL_USAGE;
        }
        if (is_given_twice(arguments, i)) {
            ctl_say("analyze: %s is given twice, and would be its own duplicate; name it once",
                    arguments->operands[i]);
            return CTL_USAGE;
        }
    }
    analyze->sources = calloc(arguments->operand_count, sizeof(*analyze->sources));
    if (!analyze->sources) {
        ctl_say("no memory");
        return CTL_FAILED;
    }
    analyze->count = arguments->operand_count;
    for (size_t i = 0; i < analyze->count; i++)
        analyze->sources[i] = (struct analyze_source){.name = arguments->operands[i],
                                                      .domain = ANALYZE_NO_DOMAIN,
                                                      .now.fd = -1,
                                                      .earlier.fd = -1};
    return CTL_DONE;
}

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

    if (!ctl_value_check_guest_name(name))
        return CTL_USAGE;
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

    if (ctl_analyze_open_dump(path, file, why) == 0)
        return CTL_DONE;
    ctl_say("%s", why);
    return CTL_FAILED;
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
    const struct ctl_values *since = &arguments->repeated[ANALYZE_SINCE];
    struct analyze_source *source = &analyze->sources[index];
    const char *name = source->name;
    enum ctl_status status;

    if (strncmp(name, GUEST_PREFIX, strlen(GUEST_PREFIX)) == 0)
        status = open_guest(analyze, name + strlen(GUEST_PREFIX), source);
    else
        status = open_file(name, &source->now);
    if (status == CTL_DONE && since->count)
        status = open_earlier(source, since->at[index]);
    return status;
}

static enum ctl_status open_sources(struct analyze *analyze)
{
    enum ctl_status status = CTL_DONE;

    for (size_t i = 0; status == CTL_DONE && i < analyze->count; i++)
        status = open_source(analyze, i);
    return status;
}

static enum ctl_status check_sources(const struct analyze *analyze)
{
    for (size_t i = 0; i < analyze->count; i++) {
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

/* ---- domains ---- */

/* Puts one source into a domain. */
static bool enter_domain(struct analyze_source *source, uint32_t domain)
{
    if (source->domain == ANALYZE_NO_DOMAIN || source->domain == domain) {
        source->domain = domain;
        return true;
    }
    ctl_say("analyze: %s would be in two domains", source->name);
    return false;
}

/* Puts into a domain what `pattern` names: a source as it was written, else what it matches. */
static bool match_sources(struct analyze *analyze, const char *pattern, uint32_t domain)
{
    bool exact = false, found = false;

    for (size_t i = 0; i < analyze->count; i++)
        exact |= strcmp(pattern, analyze->sources[i].name) == 0;
    for (size_t i = 0; i < analyze->count; i++) {
        struct analyze_source *source = &analyze->sources[i];

        if (exact ? strcmp(pattern, source->name) != 0 : fnmatch(pattern, source->name, 0) != 0)
            continue;
        if (!enter_domain(source, domain))
            return false;
        found = true;
    }
    if (!found)
        ctl_say("analyze: --domain names '%s', which is none of the sources", pattern);
    return found;
}

/* "NAME=SOURCE[,SOURCE...]" */
static enum ctl_status take_domain(struct analyze *analyze, const char *text)
{
    uint32_t domain = analyze->options.domains;
    const char *sign = strchr(text, '=');
    char *list, *rest, *pattern;
    bool good = true;

    if (!sign || sign == text || !sign[1]) {
        ctl_say("analyze: --domain wants NAME=SOURCE[,SOURCE...], not '%s'", text);
        return CTL_USAGE;
    }
    for (uint32_t i = 0; i < domain; i++)
        good &= strncmp(analyze->domain_names[i], text, (size_t)(sign - text)) != 0 ||
                analyze->domain_names[i][sign - text] != '\0';
    if (!good) {
        ctl_say("analyze: the domain of '%s' is given twice", text);
        return CTL_USAGE;
    }
    list = strdup(sign + 1);
    analyze->domain_names[domain] = strndup(text, (size_t)(sign - text));
    analyze->options.domains++;
    good = list && analyze->domain_names[domain];
    rest = list;
    while (good && (pattern = strsep(&rest, ",")))
        good = match_sources(analyze, pattern, domain);
    free(list);
    return good ? CTL_DONE : CTL_USAGE;
}

/* A guest without a domain shares within itself only, as under memd. */
static enum ctl_status take_domains(struct analyze *analyze)
{
    const struct ctl_values *given = &analyze->arguments->repeated[ANALYZE_DOMAIN];
    enum ctl_status status = CTL_DONE;

    if (given->count == 0)
        return CTL_DONE;
    analyze->domain_names = calloc(given->count + analyze->count, sizeof(char *));
    if (!analyze->domain_names) {
        ctl_say("no memory");
        return CTL_FAILED;
    }
    for (size_t i = 0; status == CTL_DONE && i < given->count; i++)
        status = take_domain(analyze, given->at[i]);
    for (size_t i = 0; status == CTL_DONE && i < analyze->count; i++) {
        struct analyze_source *source = &analyze->sources[i];

        if (source->domain != ANALYZE_NO_DOMAIN)
            continue;
        source->domain = analyze->options.domains++;
        analyze->domain_names[source->domain] = strdup(source->name);
        status = analyze->domain_names[source->domain] ? CTL_DONE : CTL_FAILED;
    }
    return status;
}

/* ---- output ---- */

static bool is_same_file(const char *path, const struct analyze_file *file)
{
    struct stat status;

    return path && file->fd >= 0 && stat(path, &status) == 0 &&
           status.st_dev == file->status.st_dev && status.st_ino == file->status.st_ino;
}

/* A slip of the hand must not write a chart over a dump. */
static enum ctl_status check_outputs(const struct analyze *analyze)
{
    static const int outputs[] = {ANALYZE_CSV, ANALYZE_SVG};

    for (size_t i = 0; i < 2 * analyze->count; i++) {
        const struct analyze_source *source = &analyze->sources[i / 2];
        const char *path = analyze->arguments->value[outputs[i % 2]];

        if (is_same_file(path, &source->now) || is_same_file(path, &source->earlier)) {
            ctl_say("analyze: --%s would overwrite %s", ctl_analyze_options[outputs[i % 2]].name,
                    path);
            return CTL_USAGE;
        }
    }
    return CTL_DONE;
}

static enum ctl_status write_file(const struct analyze_report *report, const char *path,
                                  void (*write)(const struct analyze_report *, FILE *))
{
    FILE *file = path ? fopen(path, "we") : NULL;
    bool failed;

    if (!path)
        return CTL_DONE;
    if (file)
        write(report, file);
    failed = !file || ferror(file);
    if (file && fclose(file) != 0)
        failed = true;
    if (failed)
        ctl_say("%s can't be written: %m", path);
    return failed ? CTL_FAILED : CTL_DONE;
}

static enum ctl_status print(const struct analyze *analyze, const struct analyze_result *result)
{
    const struct ctl_arguments *arguments = analyze->arguments;
    struct analyze_report report = {.sources = analyze->sources,
                                    .source_count = analyze->count,
                                    .domain_names = (const char *const *)analyze->domain_names,
                                    .options = &analyze->options,
                                    .result = result};
    enum ctl_status status;

    if (arguments->json)
        ctl_analyze_print_json(&report);
    else
        ctl_analyze_print_table(&report);
    status = write_file(&report, arguments->value[ANALYZE_CSV], ctl_analyze_write_csv);
    if (status == CTL_DONE)
        status = write_file(&report, arguments->value[ANALYZE_SVG], ctl_analyze_write_svg);
    return status;
}

static const char *explain(int error)
{
    switch (error) {
    case -EIO: return "a source has shrunk, or its disk fails; dump it again";
    case -E2BIG: return "the sources are larger than 16 TiB together; count fewer at once";
    case -ENOMEM:
        return "not enough memory (about 25 bytes a page are needed); count fewer sources at once";
    default: return strerror(-error);
    }
}

static enum ctl_status count_and_print(const struct analyze *analyze)
{
    struct analyze_result result;
    enum ctl_status status;
    int error = ctl_analyze_count(analyze->sources, analyze->count, &analyze->options, &result);

    if (error < 0) {
        ctl_say("could not count: %s", explain(error));
        return CTL_FAILED;
    }
    status = check_sources(analyze);
    if (status == CTL_DONE)
        status = print(analyze, &result);
    ctl_analyze_result_free(&result);
    return status;
}

enum ctl_status ctl_analyze_run(const struct ctl_arguments *arguments)
{
    struct analyze analyze = {
        .arguments = arguments,
        .options.no_compression = arguments->value[ANALYZE_NO_COMPRESSION] != NULL,
    };
    enum ctl_status status = name_sources(&analyze);

    signal(SIGBUS, on_bus_error);
    if (status == CTL_DONE)
        status = take_domains(&analyze);
    if (status == CTL_DONE)
        status = open_sources(&analyze);
    if (status == CTL_DONE)
        status = check_outputs(&analyze);
    if (status == CTL_DONE)
        status = count_and_print(&analyze);
    for (size_t i = 0; i < analyze.count; i++) {
        ctl_analyze_close(&analyze.sources[i].now);
        ctl_analyze_close(&analyze.sources[i].earlier);
    }
    for (uint32_t i = 0; i < analyze.options.domains; i++)
        free(analyze.domain_names[i]);
    free(analyze.domain_names);
    free(analyze.sources);
    return status;
}
