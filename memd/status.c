/* SPDX-License-Identifier: Apache-2.0 */
#include "status.h"

#include <inttypes.h>
#include <jemalloc/jemalloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon.h"
#include "host.h"
#include "match.h"

#define NS_PER_S 1e9

static json_t *integer(uint64_t value)
{
    return json_integer((json_int_t)value);
}

static void set(json_t *json, const char *name, uint64_t value)
{
    json_object_set_new(json, name, integer(value));
}

/* ---- figures ---- */

struct figures {
    uint64_t used_bytes, promised_bytes, guaranteed_bytes;
    uint64_t pages_shared, pages_sharing, zero_pages, broken_pages;
    uint64_t stored_pages, spilled_pages;
    uint64_t merges, unmerges, mismatches;
    uint64_t store_pages, segments, table_bytes;
    double cpu_seconds;
};

/* What an agent has not stated yet is private: that is where pages begin. Of a guest whose agent is
 * gone nothing is known: it may use all that it was promised, whatever its agent had announced. */
static void places_of(const struct guest *guest, uint64_t *ret_places)
{
    uint64_t merged = 0, zero = 0, all = guest->account.max_bytes / PAGE_BYTES;

    memset(ret_places, 0, sizeof(*ret_places) * PLACE_COUNT);
    if (guest->session && guest->places_stated) {
        memcpy(ret_places, guest->account.places, sizeof(guest->account.places));
        return;
    }
    if (guest->engine != ENGINE_KERNEL) {
        ret_places[PLACE_PRIVATE] =
            guest->presence == AGENT_LOST ? all : guest->account.managed_pages;
        return;
    }
    kernel_ksm_of_process(guest->pid, &merged, &zero);
    merged = merged < all ? merged : all;
    zero = zero < all - merged ? zero : all - merged;
    ret_places[PLACE_SHARED] = merged;
    ret_places[PLACE_ZERO] = zero;
    ret_places[PLACE_PRIVATE] = all - merged - zero;
}

static void add_domains(const struct daemon *daemon, struct figures *figures)
{
    for (const struct trust_domain *domain = daemon->domains.first; domain; domain = domain->next) {
        uint64_t shared = 0;

        for (const struct ksm_member *member = domain->members; member; member = member->next)
            shared += member->shared;
        /* Users of a slot that were asked and have not answered are none yet. */
        figures->pages_shared += domain->store.used;
        figures->pages_sharing += shared > domain->store.used ? shared - domain->store.used : 0;
        figures->store_pages += domain->store.pages;
        figures->segments += domain->store.segment_count;
        figures->table_bytes += trust_domain_table_bytes(domain);
    }
}

static void add_guests(const struct daemon *daemon, struct figures *figures)
{
    const struct registry *registry = &daemon->registry;

    figures->merges = registry->departed_merges;
    figures->unmerges = registry->departed_unmerges;
    figures->mismatches = registry->departed_mismatches;
    for (const struct guest *guest = registry->first; guest; guest = guest->next) {
        uint64_t places[PLACE_COUNT];

        places_of(guest, places);
        if (guest->engine != ENGINE_KERNEL)
            figures->zero_pages += places[PLACE_ZERO];
        figures->stored_pages += places[PLACE_STORED];
        figures->spilled_pages += places[PLACE_SPILLED];
        figures->broken_pages += guest->session ? guest->stats.broken : 0;
        figures->merges += guest->stats.merges;
        figures->unmerges += guest->stats.unmerges;
        figures->mismatches += guest->stats.mismatches;
    }
}

/* PSS counts what is mapped; the store counts also where no agent maps it, but once. */
static uint64_t used_bytes(const struct daemon *daemon, uint64_t store_bytes)
{
    uint64_t pss = daemon->pss.own_bytes, shmem = daemon->pss.own_shmem_bytes;

    for (const struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        pss += guest->resident_bytes;
        shmem += guest->shmem_bytes;
    }
    return pss - (shmem < pss ? shmem : pss) + (store_bytes > shmem ? store_bytes : shmem);
}

static struct figures collect(struct daemon *daemon)
{
    struct kernel_ksm_figures kernel = kernel_ksm_figures(&daemon->kernel_ksm);
    struct figures figures = {.used_bytes = 0};

    add_domains(daemon, &figures);
    add_guests(daemon, &figures);
    figures.pages_shared += kernel.pages_shared;
    figures.pages_sharing += kernel.pages_sharing;
    figures.zero_pages += kernel.zero_pages;
    figures.promised_bytes = ledger_promised_bytes(&daemon->ledger);
    figures.guaranteed_bytes = ledger_guaranteed_bytes(&daemon->ledger);
    figures.used_bytes = used_bytes(daemon, figures.store_pages * PAGE_BYTES);
    figures.cpu_seconds =
        (double)(host_own_cpu_ns() + registry_agents_cpu_ns(daemon) + daemon->kernel_ksm.cpu_ns) /
        NS_PER_S;
    return figures;
}

/* ---- JSON ---- */

static json_t *host_json(const struct daemon *daemon, const struct figures *figures)
{
    uint64_t budget = daemon->ledger.budget_bytes;
    json_t *json = json_object();

    set(json, "budget_bytes", budget);
    set(json, "used_bytes", figures->used_bytes);
    set(json, "promised_bytes", figures->promised_bytes);
    set(json, "guaranteed_bytes", figures->guaranteed_bytes);
    json_object_set_new(json, "overcommit_ratio",
                        json_real(budget ? (double)figures->promised_bytes / (double)budget : 0));
    json_object_set_new(json, "state",
                        json_string(ledger_host_state_name(
                            ledger_host_state(&daemon->ledger, figures->used_bytes))));
    return json;
}

static json_t *sharing_json(const struct daemon *daemon, const struct figures *figures)
{
    json_t *json = json_object();

    set(json, "pages_shared", figures->pages_shared);
    set(json, "pages_sharing", figures->pages_sharing);
    set(json, "zero_pages", figures->zero_pages);
    set(json, "broken_pages", figures->broken_pages);
    set(json, "saved_bytes", PAGE_BYTES * (figures->pages_sharing + figures->zero_pages));
    set(json, "stored_pages", figures->stored_pages);
    set(json, "stored_bytes", 0);
    set(json, "spilled_pages", figures->spilled_pages);
    set(json, "merges", figures->merges);
    set(json, "unmerges", figures->unmerges);
    set(json, "mismatches", figures->mismatches);
    json_object_set_new(json, "cpu_seconds", json_real(figures->cpu_seconds));
    set(json, "store_bytes", figures->store_pages * PAGE_BYTES);
    set(json, "store_budget_bytes", daemon->domains.budget.limit_pages * PAGE_BYTES);
    set(json, "store_segments", figures->segments);
    set(json, "store_refused_pages", daemon->domains.budget.refused_pages);
    set(json, "table_bytes", figures->table_bytes);
    json_object_set_new(json, "steers_ksmd", json_boolean(daemon->kernel_ksm.running));
    return json;
}

static const char *domain_shown(const struct guest *guest)
{
    const struct ksm_member *member = guest->session ? agents_member(guest->session) : NULL;

    if (member)
        return member->domain->own ? "" : member->domain->name;
    return guest->domain;
}

static json_t *places_json(const struct guest *guest)
{
    uint64_t places[PLACE_COUNT];
    json_t *json = json_object();

    places_of(guest, places);
    for (int place = 0; place < PLACE_COUNT; place++)
        set(json, place_name((enum place)place), places[place]);
    return json;
}

static json_t *faults_json(const struct guest *guest)
{
    json_t *json = json_object();

    set(json, "count", guest->stats.fault_count);
    set(json, "p50_us", guest->stats.fault_p50_us);
    set(json, "p99_us", guest->stats.fault_p99_us);
    set(json, "p999_us", guest->stats.fault_p999_us);
    set(json, "max_us", guest->stats.fault_max_us);
    return json;
}

static json_t *guest_json(const struct guest *guest)
{
    json_t *json = json_object(), *migration;

    json_object_set_new(json, "name", json_string(guest->name));
    set(json, "pid", (uint64_t)guest->pid);
    json_object_set_new(json, "vmm", json_string(guest->vmm));
    json_object_set_new(json, "engine", json_string(registry_engine_name(guest->engine)));
    json_object_set_new(json, "agent", json_string(registry_presence_name(guest->presence)));
    json_object_set_new(json, "domain", json_string(domain_shown(guest)));
    set(json, "max_bytes", guest->account.max_bytes);
    set(json, "min_bytes", guest->account.min_bytes);
    set(json, "shares", guest->account.shares);
    set(json, "target_bytes", guest->account.max_bytes);
    set(json, "balloon_bytes", 0);
    set(json, "resident_bytes", guest->resident_bytes);
    json_object_set_new(json, "places", places_json(guest));
    set(json, "working_set_bytes", 0);
    json_object_set_new(json, "faults", faults_json(guest));
    migration = migration_status(guest->daemon, guest->name);
    json_object_set_new(json, "migration", migration ? migration : json_null());
    return json;
}

json_t *status_of_host(struct daemon *daemon)
{
    struct figures figures = collect(daemon);
    json_t *json = json_object(), *guests = json_array();

    for (const struct guest *guest = daemon->registry.first; guest; guest = guest->next)
        json_array_insert_new(guests, 0, guest_json(guest)); /* the oldest first */
    json_object_set_new(json, "host", host_json(daemon, &figures));
    json_object_set_new(json, "sharing", sharing_json(daemon, &figures));
    json_object_set_new(json, "guests", guests);
    return json;
}

/* ---- one guest in full ---- */

static const char *state_of(const struct guest *guest)
{
    static const char *const names[AGENT_STATE_COUNT] = {"active", "standing_down", "gave_up"};

    if (!guest->session)
        return "none";
    return guest->has_stats ? names[guest->stats.state] : "active";
}

/* All that holds sharing back, in one line. */
static json_t *reason_of(const struct daemon *daemon, const struct guest *guest)
{
    const char *parts[] = {guest->reason, guest->domain_note,
                           guest->session ? guest->stats.reason : "",
                           daemon->domains.budget.full ? "the store is full" : ""};
    char text[1024] = "";
    size_t used = 0;

    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        if (parts[i][0] && used < sizeof(text))
            used += (size_t)snprintf(text + used, sizeof(text) - used, "%s%s", used ? "; " : "",
                                     parts[i]);
    }
    return json_string(text);
}

static json_t *blocks_json(const struct guest *guest)
{
    json_t *json = json_array();

    for (uint32_t i = 0; i < guest->block_count; i++) {
        const struct guest_block *block = &guest->blocks[i];
        json_t *one = json_object();

        set(one, "first_page", block->first_page);
        set(one, "pages", block->pages);
        set(one, "hva", block->hva);
        json_object_set_new(one, "managed", json_boolean(block->managed));
        json_object_set_new(one, "reason", json_string(block->reason));
        json_array_append_new(json, one);
    }
    return json;
}

static json_t *counters_json(const struct guest *guest)
{
    const struct message_stats *stats = &guest->stats;
    uint64_t cpu_ns = guest->agent_cpu_ns + (guest->session ? agents_cpu_ns(guest->session) : 0);
    json_t *json = json_object();

    set(json, "merges", stats->merges);
    set(json, "zero_merges", stats->zero_merges);
    set(json, "unmerges", stats->unmerges);
    set(json, "mismatches", stats->mismatches);
    set(json, "busy", stats->busy);
    set(json, "broken", stats->broken);
    set(json, "hashed", stats->hashed);
    set(json, "discards", stats->discards);
    json_object_set_new(json, "cpu_seconds", json_real((double)cpu_ns / NS_PER_S));
    set(json, "passes", stats->passes);
    return json;
}

json_t *status_of_guest(struct daemon *daemon, struct guest *guest)
{
    json_t *json = guest_json(guest);

    json_object_set_new(json, "state", json_string(state_of(guest)));
    json_object_set_new(json, "reason", reason_of(daemon, guest));
    set(json, "uid", guest->uid);
    set(json, "huge_pages", guest->stats.huge_pages);
    set(json, "vmas", guest->stats.vmas);
    set(json, "vma_budget", guest->stats.vma_budget);
    json_object_set_new(json, "blocks", blocks_json(guest));
    json_object_set_new(json, "counters", counters_json(guest));
    if (guest->qmp[0])
        json_object_set_new(json, "qmp", json_string(guest->qmp));
    return json;
}

/* ---- Prometheus ---- */

static void __attribute__((format(printf, 5, 6)))
metric(FILE *out, const char *name, const char *type, const char *help, const char *format, ...)
{
    va_list arguments;

    fprintf(out, "# HELP memd_%s %s\n# TYPE memd_%s %s\nmemd_%s ", name, help, name, type, name);
    va_start(arguments, format);
    vfprintf(out, format, arguments);
    va_end(arguments);
    fputc('\n', out);
}

static void gauge(FILE *out, const char *name, const char *help, uint64_t value)
{
    metric(out, name, "gauge", help, "%" PRIu64, value);
}

static void counter(FILE *out, const char *name, const char *help, uint64_t value)
{
    metric(out, name, "counter", help, "%" PRIu64, value);
}

/* What the allocator has handed out, and what it holds for that; 0 under another allocator. */
static void allocator_metrics(FILE *out)
{
    uint64_t epoch = 1;
    size_t allocated = 0, resident = 0, bytes = sizeof(epoch);

    (void)mallctl("epoch", &epoch, &bytes, &epoch, bytes);
    bytes = sizeof(allocated);
    (void)mallctl("stats.allocated", &allocated, &bytes, NULL, 0);
    (void)mallctl("stats.resident", &resident, &bytes, NULL, 0);
    gauge(out, "allocated_bytes", "Memory of memd that is in use, tables of trust domains aside.",
          allocated);
    gauge(out, "allocator_resident_bytes", "Memory that the allocator holds for that.", resident);
}

static void host_metrics(FILE *out, const struct daemon *daemon, const struct figures *figures)
{
    gauge(out, "budget_bytes", "What guests may use together.", daemon->ledger.budget_bytes);
    gauge(out, "used_bytes", "PSS of all VMMs, memd and its stores.", figures->used_bytes);
    gauge(out, "promised_bytes", "Sum of every guest's max.", figures->promised_bytes);
    gauge(out, "guaranteed_bytes", "Sum of every guest's min.", figures->guaranteed_bytes);
    gauge(out, "guests", "Registered guests.", daemon->registry.count);
    gauge(out, "agents", "Connected agents.", daemon->agents.count);
    gauge(out, "pages_shared", "Store pages in use.", figures->pages_shared);
    gauge(out, "pages_sharing", "Further guest pages that use them.", figures->pages_sharing);
    gauge(out, "zero_pages", "Pages that were zero and were dropped.", figures->zero_pages);
    gauge(out, "broken_pages", "Shares that the kernel copied by itself.", figures->broken_pages);
    gauge(out, "saved_bytes", "4096 x (pages_sharing + zero_pages).",
          PAGE_BYTES * (figures->pages_sharing + figures->zero_pages));
    gauge(out, "store_bytes", "Pages of all segments, used or not.",
          figures->store_pages * PAGE_BYTES);
    gauge(out, "store_segments", "Segments of all trust domains.", figures->segments);
    gauge(out, "table_bytes", "Page tables and indexes of all trust domains.",
          figures->table_bytes);
    counter(out, "merges_total", "Pages that became shared.", figures->merges);
    counter(out, "unmerges_total", "Shared pages that became something else.", figures->unmerges);
    counter(out, "mismatches_total", "Freezes that found other bytes.", figures->mismatches);
    counter(out, "store_refused_pages_total", "Pages not published: the store was full.",
            daemon->domains.budget.refused_pages);
    counter(out, "sessions_ended_badly_total", "Agents that lost their session by what they said.",
            daemon->agents.ended_badly);
    counter(out, "ledger_mismatches_total", "Statements of an agent that did not sum.",
            daemon->ledger.mismatches);
    counter(out, "events_total", "Events.", daemon->events.emitted);
    counter(out, "turns_total", "Turns of the loop.", daemon->loop.turns);
    metric(out, "longest_turn_seconds", "gauge", "The longest turn of the loop so far.", "%.6f",
           (double)daemon->loop.longest_turn_ns / NS_PER_S);
    metric(out, "cpu_seconds_total", "counter",
           "memd, all agents' threads, and ksmd while it is used.", "%.6f", figures->cpu_seconds);
}

static void matching_metrics(FILE *out, const struct daemon *daemon)
{
    struct ksm_counters sum = domains_counters(daemon);

    counter(out, "offers_total", "Pages offered by agents.", sum.offers);
    counter(out, "offers_not_neutral_total", "Offers with content that is not neutral.",
            sum.not_neutral);
    counter(out, "wants_total", "Contents asked for.", sum.wants);
    counter(out, "stale_total", "Contents that had changed when asked for.", sum.stale);
    counter(out, "want_timeouts_total", "Contents that did not come.", sum.timeouts);
    counter(out, "merges_asked_total", "MERGE sent.", sum.merges_asked);
    counter(out, "merged_total", "MERGE answered by MERGED.", sum.merged);
    counter(out, "not_merged_total", "MERGE answered by NOT_MERGED.", sum.not_merged);
    counter(out, "broken_total", "Shares that ended by BROKEN.", sum.broken);
    counter(out, "missed_total", "Matches that found no room and were put off.", sum.missed);
    counter(out, "remaps_total", "REMAP sent.", sum.remaps);
}

static void guest_metrics(FILE *out, const struct daemon *daemon)
{
    fprintf(out, "# HELP memd_guest_resident_bytes PSS of the VMM.\n"
                 "# TYPE memd_guest_resident_bytes gauge\n");
    for (const struct guest *guest = daemon->registry.first; guest; guest = guest->next)
        fprintf(out, "memd_guest_resident_bytes{guest=\"%s\"} %" PRIu64 "\n", guest->name,
                guest->resident_bytes);
    fprintf(out, "# HELP memd_guest_pages Pages by place.\n# TYPE memd_guest_pages gauge\n");
    for (const struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        uint64_t places[PLACE_COUNT];

        places_of(guest, places);
        for (int place = 0; place < PLACE_COUNT; place++)
            fprintf(out, "memd_guest_pages{guest=\"%s\",place=\"%s\"} %" PRIu64 "\n", guest->name,
                    place_name((enum place)place), places[place]);
    }
}

char *status_metrics(struct daemon *daemon)
{
    struct figures figures = collect(daemon);
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);

    if (!out)
        return NULL;
    host_metrics(out, daemon, &figures);
    matching_metrics(out, daemon);
    allocator_metrics(out);
    guest_metrics(out, daemon);
    fclose(out);
    return text;
}
