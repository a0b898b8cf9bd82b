/* SPDX-License-Identifier: Apache-2.0 */
/* The counts of analyze as a table for people, as JSON, and as CSV. */
#include "analyze_report.h"

#include <string.h>

#include "ctl.h"

/* ---- what follows from the counts ---- */

uint64_t ctl_analyze_duplicates(const struct analyze_counts *counts)
{
    return counts->units - counts->zero - counts->unique;
}

/* Units that are left when each content is kept once. */
uint64_t ctl_analyze_kept(const struct analyze_counts *counts)
{
    return counts->unique + (counts->zero > 0);
}

static uint64_t inter(const struct analyze_counts *counts)
{
    return ctl_analyze_duplicates(counts) - counts->intra;
}

static double ratio_of(uint64_t units, uint64_t kept)
{
    return kept ? (double)units / (double)kept : 1.0;
}

static uint64_t saved_bytes(const struct analyze_counts *counts, uint64_t unit_bytes)
{
    return unit_bytes * (counts->units - ctl_analyze_kept(counts));
}

struct analyze_what_if ctl_analyze_what_if(const struct analyze_report *report, int which, int way)
{
    const struct analyze_result *result = report->result;
    const struct analyze_counts *all = &result->all[which];
    uint64_t kept = all->zero > 0;

    if (way == WHAT_IF_ONE_DOMAIN)
        kept += all->unique;
    for (size_t i = 0; way == WHAT_IF_EACH_ALONE && i < report->source_count; i++)
        kept += result->sources[i][which].unique;
    for (size_t i = 0; way == WHAT_IF_THESE_DOMAINS && i < report->options->domains; i++)
        kept += result->domains[i][which].unique;
    return (struct analyze_what_if){
        .kept = kept,
        .saved_bytes = ctl_analyze_unit_bytes[which] * (all->units - kept),
        .ratio = ratio_of(all->units, kept),
    };
}

/* ---- JSON ---- */

static void set_u64(json_t *object, const char *key, uint64_t value)
{
    json_object_set_new(object, key, json_integer((json_int_t)value));
}

static json_t *make_counts(const struct analyze_report *report, const struct analyze_counts *counts,
                           uint64_t unit_bytes)
{
    json_t *object = json_object();

    set_u64(object, "page_bytes", unit_bytes);
    set_u64(object, "pages", counts->units);
    set_u64(object, "zero_pages", counts->zero);
    set_u64(object, "unique_contents", counts->unique);
    set_u64(object, "duplicate_pages", ctl_analyze_duplicates(counts));
    set_u64(object, "intra_guest_duplicates", counts->intra);
    set_u64(object, "inter_guest_duplicates", inter(counts));
    set_u64(object, "saved_bytes", saved_bytes(counts, unit_bytes));
    json_object_set_new(object, "ratio",
                        json_real(ratio_of(counts->units, ctl_analyze_kept(counts))));
    if (!report->options->no_compression)
        set_u64(object, "compressed_bytes", counts->compressed_bytes);
    set_u64(object, "changed_pages", counts->changed);
    return object;
}

/* The counts of pages, with those of the larger units inside. `common` is shown where it was
 * counted. */
static json_t *make_levels(const struct analyze_report *report,
                           const struct analyze_counts levels[ANALYZE_LEVELS], bool common)
{
    json_t *object = NULL, *larger = json_object();

    for (int which = ANALYZE_PAGES; which < ANALYZE_LEVELS; which++) {
        uint64_t bytes = ctl_analyze_unit_bytes[which];
        json_t *counts = make_counts(report, &levels[which], bytes);
        char key[CTL_SIZE_CHARS];

        if (common)
            set_u64(counts, "common_contents", levels[which].common);
        snprintf(key, sizeof(key), "%llu", (unsigned long long)bytes);
        if (which == ANALYZE_PAGES)
            object = counts;
        else
            json_object_set_new(larger, key, counts);
    }
    json_object_set_new(object, "granularities", larger);
    return object;
}

/* A file's name may be no UTF-8; JSON has to be. */
static json_t *make_name(const struct analyze_report *report, size_t source)
{
    json_t *name = json_string(report->sources[source].name);

    return name ? name : json_sprintf("source %zu", source + 1);
}

static json_t *make_sources(const struct analyze_report *report)
{
    json_t *sources = json_array();

    for (size_t i = 0; i < report->source_count; i++) {
        json_t *source = json_object();

        json_object_set_new(source, "name", make_name(report, i));
        json_object_update_missing_new(source,
                                       make_levels(report, report->result->sources[i], true));
        set_u64(source, "unsettled_pages", report->sources[i].now.unsettled);
        set_u64(source, "absent_pages", report->sources[i].now.absent);
        json_array_append_new(sources, source);
    }
    return sources;
}

static json_t *make_domains(const struct analyze_report *report)
{
    json_t *domains = json_array();

    for (uint32_t i = 0; i < report->options->domains; i++) {
        json_t *domain = json_object(), *members = json_array();

        for (size_t s = 0; s < report->source_count; s++) {
            if (report->sources[s].domain == i)
                json_array_append_new(members, make_name(report, s));
        }
        json_object_set_new(domain, "name", json_string(report->domain_names[i]));
        json_object_set_new(domain, "members", members);
        json_object_update_missing_new(domain,
                                       make_levels(report, report->result->domains[i], false));
        json_array_append_new(domains, domain);
    }
    return domains;
}

static const char *const way_keys[WHAT_IFS] = {"one_domain", "these_domains", "each_alone"};

static json_t *make_what_if(const struct analyze_report *report)
{
    json_t *object = json_object();

    for (int way = 0; way < WHAT_IFS; way++) {
        struct analyze_what_if found = ctl_analyze_what_if(report, ANALYZE_PAGES, way);
        json_t *member = json_object();

        set_u64(member, "kept_pages", found.kept);
        set_u64(member, "saved_bytes", found.saved_bytes);
        json_object_set_new(member, "ratio", json_real(found.ratio));
        json_object_set_new(object, way_keys[way], member);
    }
    return object;
}

static uint64_t absent_of_all(const struct analyze_report *report)
{
    uint64_t absent = 0;

    for (size_t i = 0; i < report->source_count; i++)
        absent += report->sources[i].now.absent;
    return absent;
}

void ctl_analyze_print_json(const struct analyze_report *report)
{
    json_t *object = make_levels(report, report->result->all, true);
    uint64_t unsettled = 0;

    for (size_t i = 0; i < report->source_count; i++)
        unsettled += report->sources[i].now.unsettled;
    set_u64(object, "unsettled_pages", unsettled);
    set_u64(object, "absent_pages", absent_of_all(report));
    json_object_set_new(object, "sources", make_sources(report));
    if (report->options->domains) {
        json_object_set_new(object, "domains", make_domains(report));
        json_object_set_new(object, "what_if", make_what_if(report));
    }
    ctl_print_json(object);
    json_decref(object);
}

/* ---- the table ---- */

static bool has_living(const struct analyze_report *report)
{
    bool living = false;

    for (size_t i = 0; i < report->source_count; i++)
        living |= report->sources[i].now.live;
    return living;
}

/* absent: NULL where it is not known, or does not say anything. */
static void add_counts(const struct analyze_report *report, struct ctl_table *table,
                       const char *label, const struct analyze_counts *counts, uint64_t unit_bytes,
                       const uint64_t *absent)
{
    uint64_t kept = ctl_analyze_kept(counts);

    ctl_table_add(table, "%s", label);
    ctl_table_add_count(table, counts->units);
    ctl_table_add_count(table, counts->zero);
    ctl_table_add_count(table, counts->unique);
    ctl_table_add_count(table, counts->intra);
    ctl_table_add_count(table, inter(counts));
    ctl_table_add_size(table, saved_bytes(counts, unit_bytes));
    ctl_table_add_percent(table, counts->units - kept, counts->units);
    ctl_table_add(table, "%.2f", ratio_of(counts->units, kept));
    if (report->options->no_compression)
        ctl_table_add(table, "-");
    else
        ctl_table_add_size(table, counts->compressed_bytes);
    ctl_table_add_count(table, counts->changed);
    if (has_living(report) && absent)
        ctl_table_add_count(table, *absent);
    else if (has_living(report))
        ctl_table_add(table, "-");
}

static void print_what_if(const struct analyze_report *report)
{
    static const char *const headings[] = {"WHAT IF", ">KEPT",  ">SAVED",
                                           ">",       ">RATIO", ">AGAINST ONE DOMAIN"};
    static const char *const labels[WHAT_IFS] = {"one domain for all", "these domains",
                                                 "each source on its own"};
    struct ctl_table *table = ctl_table_new(headings, sizeof(headings) / sizeof(headings[0]));
    uint64_t pages = report->result->all[ANALYZE_PAGES].units;
    uint64_t most = ctl_analyze_what_if(report, ANALYZE_PAGES, WHAT_IF_ONE_DOMAIN).saved_bytes;

    for (int way = 0; way < WHAT_IFS; way++) {
        struct analyze_what_if found = ctl_analyze_what_if(report, ANALYZE_PAGES, way);

        ctl_table_add(table, "%s", labels[way]);
        ctl_table_add_count(table, found.kept);
        ctl_table_add_size(table, found.saved_bytes);
        ctl_table_add_percent(table, found.saved_bytes, pages * PAGE_BYTES);
        ctl_table_add(table, "%.2f", found.ratio);
        ctl_table_add_percent(table, found.saved_bytes, most);
    }
    putchar('\n');
    ctl_table_print(table, 0);
}

static void print_notes(const struct analyze_report *report)
{
    uint64_t absent = absent_of_all(report);
    char text[CTL_SIZE_CHARS];

    if (absent)
        printf("absent pages (never touched, or given back) are among ZERO and SAVED, and take no "
               "memory already: %s\n",
               ctl_format_size(absent * PAGE_BYTES, text));

    for (size_t i = 0; i < report->source_count; i++) {
        if (report->sources[i].now.unsettled)
            printf("%s: %s pages changed while it was copied; they count as they were copied\n",
                   report->sources[i].name,
                   ctl_format_count(report->sources[i].now.unsettled, text));
    }
}

void ctl_analyze_print_table(const struct analyze_report *report)
{
    static const char *const headings[] = {"SOURCE", ">PAGES", ">ZERO",    ">UNIQUE",
                                           ">INTRA", ">INTER", ">SAVED",   ">",
                                           ">RATIO", ">LZ4",   ">CHANGED", ">ABSENT"};
    const struct analyze_result *result = report->result;
    size_t columns = sizeof(headings) / sizeof(headings[0]) - !has_living(report);
    struct ctl_table *table = ctl_table_new(headings, columns);
    uint64_t absent = absent_of_all(report);
    bool several = report->source_count > 1;
    char label[128];

    for (size_t i = 0; several && i < report->source_count; i++)
        add_counts(report, table, report->sources[i].name, &result->sources[i][ANALYZE_PAGES],
                   PAGE_BYTES, report->sources[i].now.live ? &report->sources[i].now.absent : NULL);
    for (uint32_t i = 0; i < report->options->domains; i++) {
        snprintf(label, sizeof(label), "domain %s", report->domain_names[i]);
        add_counts(report, table, label, &result->domains[i][ANALYZE_PAGES], PAGE_BYTES, NULL);
    }
    add_counts(report, table, several ? "all" : report->sources[0].name,
               &result->all[ANALYZE_PAGES], PAGE_BYTES, &absent);
    add_counts(report, table, "in units of 64 KiB", &result->all[ANALYZE_64K], 65536, NULL);
    add_counts(report, table, "in units of 2 MiB", &result->all[ANALYZE_2M], HUGE_BYTES, NULL);
    ctl_table_print(table, 0);
    if (report->options->domains)
        print_what_if(report);
    print_notes(report);
}

/* ---- CSV (RFC 4180, but lines end in a line feed) ---- */

static void write_text(FILE *file, const char *text)
{
    if (!strpbrk(text, ",\"\r\n")) {
        fputs(text, file);
        return;
    }
    putc('"', file);
    for (; *text; text++) {
        if (*text == '"')
            putc('"', file);
        putc(*text, file);
    }
    putc('"', file);
}

static void write_row(const struct analyze_report *report, FILE *file, const char *scope,
                      const char *name, const char *domain, int which,
                      const struct analyze_counts *counts)
{
    uint64_t bytes = ctl_analyze_unit_bytes[which];
    const uint64_t numbers[] = {bytes,
                                counts->units,
                                counts->zero,
                                counts->unique,
                                ctl_analyze_duplicates(counts),
                                counts->intra,
                                inter(counts),
                                saved_bytes(counts, bytes)};

    fprintf(file, "%s,", scope);
    write_text(file, name);
    putc(',', file);
    write_text(file, domain);
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        fprintf(file, ",%llu", (unsigned long long)numbers[i]);
    fprintf(file, ",%.15g,", ratio_of(counts->units, ctl_analyze_kept(counts)));
    if (!report->options->no_compression)
        fprintf(file, "%llu", (unsigned long long)counts->compressed_bytes);
    fprintf(file, ",%llu\n", (unsigned long long)counts->changed);
}

void ctl_analyze_write_csv(const struct analyze_report *report, FILE *file)
{
    const struct analyze_result *result = report->result;

    fputs("scope,name,domain,page_bytes,pages,zero_pages,unique_contents,duplicate_pages,"
          "intra_guest_duplicates,inter_guest_duplicates,saved_bytes,ratio,compressed_bytes,"
          "changed_pages\n",
          file);
    for (int which = 0; which < ANALYZE_LEVELS; which++) {
        write_row(report, file, "all", "", "", which, &result->all[which]);
        for (uint32_t i = 0; i < report->options->domains; i++)
            write_row(report, file, "domain", "", report->domain_names[i], which,
                      &result->domains[i][which]);
        for (size_t i = 0; i < report->source_count; i++)
            write_row(report, file, "source", report->sources[i].name,
                      report->options->domains ? report->domain_names[report->sources[i].domain]
                                               : "",
                      which, &result->sources[i][which]);
    }
}
