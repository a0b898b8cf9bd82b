/* SPDX-License-Identifier: Apache-2.0 */
/* memctl status: the host, what sharing saves, and a line for each guest. */
#include <stdio.h>
#include <string.h>

#include "ctl.h"

static void print_host(const json_t *status)
{
    uint64_t budget = ctl_json_u64(status, "host.budget_bytes");
    uint64_t used = ctl_json_u64(status, "host.used_bytes");
    char size[CTL_SIZE_CHARS], percent[CTL_SIZE_CHARS];

    printf("host      state %s", ctl_json_text(status, "host.state"));
    printf("   budget %s", ctl_format_size(budget, size));
    printf("   used %s (%s)", ctl_format_size(used, size),
           ctl_format_percent(used, budget, percent));
    printf("\n          promised %s (%.2f of the budget)",
           ctl_format_size(ctl_json_u64(status, "host.promised_bytes"), size),
           ctl_json_real(status, "host.overcommit_ratio"));
    printf("   guaranteed %s\n",
           ctl_format_size(ctl_json_u64(status, "host.guaranteed_bytes"), size));
}

static void print_sharing(const json_t *status)
{
    uint64_t budget = ctl_json_u64(status, "sharing.store_budget_bytes");
    char text[CTL_SIZE_CHARS];

    printf("sharing   saved %s",
           ctl_format_size(ctl_json_u64(status, "sharing.saved_bytes"), text));
    printf(": %s further users of",
           ctl_format_count(ctl_json_u64(status, "sharing.pages_sharing"), text));
    printf(" %s shared pages",
           ctl_format_count(ctl_json_u64(status, "sharing.pages_shared"), text));
    printf(", %s zero pages\n", ctl_format_count(ctl_json_u64(status, "sharing.zero_pages"), text));
    printf("          store %s",
           ctl_format_size(ctl_json_u64(status, "sharing.store_bytes"), text));
    if (budget)
        printf(" of %s", ctl_format_size(budget, text));
    printf("   CPU %.1f s   merges %s", ctl_json_real(status, "sharing.cpu_seconds"),
           ctl_format_count(ctl_json_u64(status, "sharing.merges"), text));
    printf("   unmerges %s", ctl_format_count(ctl_json_u64(status, "sharing.unmerges"), text));
    printf("   mismatches %s\n",
           ctl_format_count(ctl_json_u64(status, "sharing.mismatches"), text));
}

/* "agent" is what there should be, "lost" is what the operator has to see. */
static const char *engine_state(const json_t *guest)
{
    const char *engine = ctl_json_text(guest, "engine");

    if (strcmp(engine, "agent") == 0 && strcmp(ctl_json_text(guest, "agent"), "connected") != 0)
        return strcmp(ctl_json_text(guest, "agent"), "lost") == 0 ? "agent lost" : "agent awaited";
    return engine;
}

static void add_guest(struct ctl_table *table, const json_t *guest)
{
    uint64_t max = ctl_json_u64(guest, "max_bytes"), min = ctl_json_u64(guest, "min_bytes");
    uint64_t shared = ctl_json_u64(guest, "places.shared") * PAGE_BYTES;
    uint64_t zero = ctl_json_u64(guest, "places.zero") * PAGE_BYTES;
    const char *domain = ctl_json_text(guest, "domain");

    ctl_table_add(table, "%s", ctl_json_text(guest, "name"));
    ctl_table_add(table, "%s", ctl_json_text(guest, "vmm"));
    ctl_table_add(table, "%llu", (unsigned long long)ctl_json_u64(guest, "pid"));
    ctl_table_add(table, "%s", engine_state(guest));
    ctl_table_add(table, "%s", *domain ? domain : "-");
    ctl_table_add_size(table, max);
    if (min)
        ctl_table_add_size(table, min);
    else
        ctl_table_add(table, "-");
    ctl_table_add_size(table, ctl_json_u64(guest, "resident_bytes"));
    ctl_table_add_percent(table, ctl_json_u64(guest, "resident_bytes"), max);
    ctl_table_add_size(table, ctl_json_u64(guest, "places.private") * PAGE_BYTES);
    ctl_table_add_size(table, shared);
    ctl_table_add_size(table, zero);
}

static void print_guests(const json_t *guests)
{
    static const char *const headings[] = {"GUEST",   "VMM",      "PID",     "ENGINE",
                                           "DOMAIN",  ">MAX",     ">MIN",    ">RESIDENT",
                                           ">OF MAX", ">PRIVATE", ">SHARED", ">ZERO"};
    size_t columns = sizeof(headings) / sizeof(headings[0]);
    struct ctl_table *table;
    const json_t *guest;
    size_t i;

    if (json_array_size(guests) == 0) {
        printf("\nno guests\n");
        return;
    }
    table = ctl_table_new(headings, columns);
    json_array_foreach(guests, i, guest) add_guest(table, guest);
    putchar('\n');
    ctl_table_print(table, 0);
}

enum ctl_status ctl_status_run(const struct ctl_arguments *arguments)
{
    json_t *answer = NULL;
    enum ctl_status status =
        ctl_http_call(arguments->socket, "GET", "/v1/status", NULL, CTL_TIMEOUT_S, &answer);

    if (status != CTL_DONE)
        return status;
    if (arguments->json) {
        ctl_print_json(answer);
    } else {
        print_host(answer);
        print_sharing(answer);
        print_guests(json_object_get(answer, "guests"));
    }
    json_decref(answer);
    return CTL_DONE;
}
