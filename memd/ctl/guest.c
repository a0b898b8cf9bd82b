/* SPDX-License-Identifier: Apache-2.0 */
/* memctl guest: one guest in full, and why something holds sharing back. */
#include <stdio.h>
#include <string.h>

#include "ctl.h"
#include "places.h"
#include "qmp.h"

#define QMP_TIMEOUT_MS 2000
#define BAR_CHARS      30

/* The VM's own state, asked from QEMU; NULL when it can't be had. A new reference. */
static json_t *ask_run_state(const char *path)
{
    json_t *result = NULL, *state = NULL;
    struct qmp *qmp;

    if (!*path || qmp_open(path, QMP_TIMEOUT_MS, &qmp) < 0)
        return NULL;
    if (qmp_execute(qmp, "query-status", NULL, QMP_TIMEOUT_MS, &result) == 0)
        state = json_incref(json_object_get(result, "status"));
    json_decref(result);
    qmp_close(qmp);
    return state;
}

static void print_line(const char *label, const char *text)
{
    printf("  %-14s %s\n", label, *text ? text : "-");
}

static void print_identity(const json_t *guest)
{
    char line[128];

    printf("guest %s\n", ctl_json_text(guest, "name"));
    snprintf(line, sizeof(line), "%s, process %llu, user %llu", ctl_json_text(guest, "vmm"),
             (unsigned long long)ctl_json_u64(guest, "pid"),
             (unsigned long long)ctl_json_u64(guest, "uid"));
    print_line("VMM", line);
    if (json_object_get(guest, "run_state"))
        print_line("VM", ctl_json_text(guest, "run_state"));
    snprintf(line, sizeof(line), "%s (agent: %s, %s)", ctl_json_text(guest, "engine"),
             ctl_json_text(guest, "agent"), ctl_json_text(guest, "state"));
    print_line("engine", line);
    print_line("domain", ctl_json_text(guest, "domain"));
    print_line("held back by",
               *ctl_json_text(guest, "reason") ? ctl_json_text(guest, "reason") : "nothing");
}

/* The latest one, where there was one. */
static void print_migration(const json_t *guest)
{
    const json_t *migration = json_object_get(guest, "migration");
    const char *status = ctl_json_text(migration, "status");
    bool goes_on = strcmp(status, "running") == 0;
    char line[160];

    if (!json_is_object(migration))
        return;
    snprintf(line, sizeof(line), "%s %s: %s",
             strcmp(ctl_json_text(migration, "role"), "source") == 0 ? "to" : "from",
             ctl_json_text(migration, "peer"),
             goes_on ? ctl_json_text(migration, "stage") : status);
    print_line("migration", line);
}

static void print_promises(const json_t *guest)
{
    uint64_t max = ctl_json_u64(guest, "max_bytes");
    uint64_t resident = ctl_json_u64(guest, "resident_bytes");
    char a[CTL_SIZE_CHARS], b[CTL_SIZE_CHARS], line[160];

    snprintf(line, sizeof(line), "%s, guaranteed %s, %llu shares", ctl_format_size(max, a),
             ctl_format_size(ctl_json_u64(guest, "min_bytes"), b),
             (unsigned long long)ctl_json_u64(guest, "shares"));
    print_line("promised", line);
    snprintf(line, sizeof(line), "%s (%s of what is promised)", ctl_format_size(resident, a),
             ctl_format_percent(resident, max, b));
    print_line("resident", line);
    snprintf(line, sizeof(line), "%s (balloon %s)",
             ctl_format_size(ctl_json_u64(guest, "target_bytes"), a),
             ctl_format_size(ctl_json_u64(guest, "balloon_bytes"), b));
    print_line("target", line);
    print_line("working set", ctl_json_u64(guest, "working_set_bytes")
                                  ? ctl_format_size(ctl_json_u64(guest, "working_set_bytes"), a)
                                  : "");
}

static const char *bar(uint64_t part, uint64_t whole, char text[BAR_CHARS + 1])
{
    size_t filled = whole ? (size_t)((part * BAR_CHARS + whole - 1) / whole) : 0;

    filled = filled > BAR_CHARS ? BAR_CHARS : filled;
    memset(text, '#', filled);
    text[filled] = '\0';
    return text;
}

static void print_places(const json_t *guest)
{
    static const char *const headings[] = {"PLACE", ">PAGES", ">SIZE", ">OF ALL", ""};
    struct ctl_table *table = ctl_table_new(headings, 5);
    char text[BAR_CHARS + 1];
    uint64_t pages[PLACE_COUNT], total = 0;

    for (int place = 0; place < PLACE_COUNT; place++) {
        char path[32];

        snprintf(path, sizeof(path), "places.%s", place_name(place));
        pages[place] = ctl_json_u64(guest, path);
        total += pages[place];
    }
    for (int place = 0; place < PLACE_COUNT; place++) {
        ctl_table_add(table, "%s", place_name(place));
        ctl_table_add_count(table, pages[place]);
        ctl_table_add_size(table, pages[place] * PAGE_BYTES);
        ctl_table_add_percent(table, pages[place], total);
        ctl_table_add(table, "%s", bar(pages[place], total, text));
    }
    putchar('\n');
    ctl_table_print(table, 2);
}

static void print_counters(const json_t *guest)
{
    static const char *const headings[] = {"", ">", "", ">", "", ">"};
    static const char *const counters[] = {"merges",     "zero_merges", "unmerges",
                                           "mismatches", "busy",        "broken",
                                           "hashed",     "discards",    "passes"};
    struct ctl_table *table = ctl_table_new(headings, 6);

    for (size_t i = 0; i < sizeof(counters) / sizeof(counters[0]); i++) {
        char path[32];

        snprintf(path, sizeof(path), "counters.%s", counters[i]);
        ctl_table_add(table, "%s", counters[i]);
        ctl_table_add_count(table, ctl_json_u64(guest, path));
    }
    putchar('\n');
    ctl_table_print(table, 2);
    printf("  agent's CPU time %.2f s   huge pages %llu   VMAs %llu of %llu\n",
           ctl_json_real(guest, "counters.cpu_seconds"),
           (unsigned long long)ctl_json_u64(guest, "huge_pages"),
           (unsigned long long)ctl_json_u64(guest, "vmas"),
           (unsigned long long)ctl_json_u64(guest, "vma_budget"));
    printf("  faults served %llu   p50 %llu us   p99 %llu us   p99.9 %llu us   longest %llu us\n",
           (unsigned long long)ctl_json_u64(guest, "faults.count"),
           (unsigned long long)ctl_json_u64(guest, "faults.p50_us"),
           (unsigned long long)ctl_json_u64(guest, "faults.p99_us"),
           (unsigned long long)ctl_json_u64(guest, "faults.p999_us"),
           (unsigned long long)ctl_json_u64(guest, "faults.max_us"));
}

static void add_block(struct ctl_table *table, const json_t *block)
{
    bool managed = json_is_true(json_object_get(block, "managed"));

    if (managed)
        ctl_table_add_count(table, ctl_json_u64(block, "first_page"));
    else
        ctl_table_add(table, "-");
    ctl_table_add_size(table, ctl_json_u64(block, "pages") * PAGE_BYTES);
    ctl_table_add(table, "0x%llx", (unsigned long long)ctl_json_u64(block, "hva"));
    ctl_table_add(table, "%s%s", managed ? "managed" : "left alone: ",
                  managed ? "" : ctl_json_text(block, "reason"));
}

static void print_blocks(const json_t *guest)
{
    static const char *const headings[] = {">FIRST PAGE", ">SIZE", ">ADDRESS", "BLOCK"};
    const json_t *blocks = json_object_get(guest, "blocks"), *block;
    struct ctl_table *table;
    size_t i;

    if (json_array_size(blocks) == 0)
        return;
    table = ctl_table_new(headings, 4);
    json_array_foreach(blocks, i, block) add_block(table, block);
    putchar('\n');
    ctl_table_print(table, 2);
}

enum ctl_status ctl_guest_run(const struct ctl_arguments *arguments)
{
    json_t *guest = NULL, *state;
    enum ctl_status status;
    char path[128];

    if (!ctl_value_check_guest_name(arguments->operands[0]))
        return CTL_USAGE;
    snprintf(path, sizeof(path), "/v1/guests/%s", arguments->operands[0]);
    status = ctl_http_call(arguments->socket, "GET", path, NULL, CTL_TIMEOUT_S, &guest);
    if (status != CTL_DONE)
        return status;
    state = ask_run_state(ctl_json_text(guest, "qmp"));
    if (state)
        json_object_set_new(guest, "run_state", state);
    if (arguments->json) {
        ctl_print_json(guest);
    } else {
        print_identity(guest);
        print_migration(guest);
        print_promises(guest);
        print_places(guest);
        print_counters(guest);
        print_blocks(guest);
    }
    json_decref(guest);
    return CTL_DONE;
}
