/* SPDX-License-Identifier: Apache-2.0 */
/* The world and the walk through it. See sim.h. */
#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "log.h"
#include "sim.h"

#define NS_PER_MS     1000000ULL
#define NS_PER_S      1000000000ULL
#define FIRST_UID     5000U
#define GRACE_S       2U
#define REST_TURNS    20000U
#define REST_EVERY    2500U /* steps */
#define CLEAR_EVERY   5U    /* rests */
#define TABLES_EVERY  500U  /* steps */
#define CONTENTS      24U   /* so few that most of them are there twice */
#define CONTENTS_SLOW 2000U
#define TRACE_PRIME   0x100000001b3ULL

/* ---- memd ---- */

void sim_trace(struct sim *sim, const void *bytes, size_t count)
{
    const uint8_t *at = bytes;

    for (size_t i = 0; i < count; i++)
        sim->trace = (sim->trace ^ at[i]) * TRACE_PRIME;
}

static void write_config(const struct sim *sim)
{
    char path[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/memd.conf", sim->dir);
    file = fopen(path, "we");
    if (!file)
        return;
    fprintf(file,
            "[host]\nsocket = %s/memd.sock\nstate_dir = %s/state\ngrace_s = %u\nbudget = 8G\n"
            "[store]\nbudget = %uK\n[domain red]\nuids = %u%s\n[domain blue]\nuids = %u\n",
            sim->dir, sim->dir, GRACE_S, sim->options.seed % 3 ? 1U << 20 : 2048, FIRST_UID,
            sim->uid_admitted ? " 5001" : "", FIRST_UID + 2);
    fclose(file);
}

static void start_daemon(struct sim *sim)
{
    char path[128], error[CONFIG_ERROR_BYTES];
    struct config config;
    int result;

    snprintf(path, sizeof(path), "%s/memd.conf", sim->dir);
    result = config_load(path, &config, error);
    if (!result)
        result = daemon_start(&sim->daemon, &config, path);
    else
        sim_wrong(sim, "%s", error);
    if (result)
        sim_wrong(sim, "memd does not start: %s", strerror(-result));
    sim->running = result == 0;
}

void sim_start(struct sim *sim, const struct sim_options *options)
{
    memset(sim, 0, sizeof(*sim));
    sim->options = *options;
    sim->uid_admitted = true;
    sim->trace = 0xcbf29ce484222325ULL;
    log_setup(options->verbose ? LOG_LEVEL_DETAIL : LOG_LEVEL_ERROR);
    sim_host_start(&sim->host, options->seed);
    if (options->weak_hashes)
        sim->host.hash_mask = 0x1f;
    for (uint32_t i = 0; i < SIM_VMMS; i++)
        sim->vmms[i] = (struct sim_vmm){.sim = sim, .fd = -1};
    sim->seen = calloc(SIM_SEGMENTS_SEEN, sizeof(*sim->seen));
    strcpy(sim->dir, "/tmp/memd-sim-XXXXXX");
    if (!sim->seen || !mkdtemp(sim->dir)) {
        sim_wrong(sim, "no directory or memory for the simulation");
        return;
    }
    write_config(sim);
    start_daemon(sim);
    sim->idle_fds = sim_check_count_fds();
}

static int remove_one(const char *path, const struct stat *about, int kind, struct FTW *walk)
{
    (void)about;
    (void)kind;
    (void)walk;
    return remove(path);
}

void sim_stop(struct sim *sim)
{
    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        if (sim->vmms[i].link != SIM_OFF)
            sim_vmm_die(&sim->vmms[i]);
    }
    if (sim->running)
        daemon_stop(&sim->daemon);
    sim_host_stop(&sim->host);
    nftw(sim->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    free(sim->seen);
}

void sim_turn(struct sim *sim)
{
    sim_host_pass(&sim->host, sim_host_below(&sim->host, 400000));
    if (loop_turn(&sim->daemon.loop, 0))
        sim_wrong(sim, "the loop is broken");
    sim->turns++;
    sim_check_turn(sim);
}

static void pass(struct sim *sim, uint64_t ns)
{
    sim_host_pass(&sim->host, ns);
    sim_turn(sim);
}

void sim_restart_daemon(struct sim *sim)
{
    daemon_stop(&sim->daemon);
    sim->host.peer_count = 0;
    for (uint32_t i = 0; i < SIM_VMMS; i++)
        sim_vmm_disconnect(&sim->vmms[i]);
    start_daemon(sim);
}

/* ---- guests ---- */

static uint32_t any_content(const struct sim_vmm *vmm)
{
    struct sim_host *host = &vmm->sim->host;
    uint32_t id = 1 + sim_host_below(host, vmm->sim->options.slow ? CONTENTS_SLOW : CONTENTS);

    switch (sim_host_below(host, 8)) {
    case 0: return 0;
    case 1: return sim_content_of(sim_content_owner_of(vmm), 1 + sim_host_below(host, 60000));
    case 2:
    case 3: return sim_content_of(sim_content_owner_of(vmm), id);
    default: return sim_content_of(0, id);
    }
}

static void fill(struct sim_vmm *vmm, uint32_t first)
{
    for (uint32_t i = first; i < vmm->page_count; i++)
        sim_vmm_write(vmm, i, any_content(vmm));
}

static void plug(struct sim_vmm *vmm)
{
    uint32_t first = vmm->page_count;

    sim_vmm_plug(vmm, 1 + sim_host_below(&vmm->sim->host, 160));
    fill(vmm, first);
}

struct sim_vmm *sim_add(struct sim *sim, uint32_t domain, bool liar)
{
    struct sim_vmm *vmm = NULL;
    int result;

    for (uint32_t i = 0; i < SIM_VMMS && !vmm; i++) {
        if (sim->vmms[i].link == SIM_OFF)
            vmm = &sim->vmms[i];
    }
    if (!vmm)
        return NULL;
    *vmm = (struct sim_vmm){.sim = sim, .fd = -1, .domain = domain, .liar = liar};
    vmm->number = sim->vmm_count++ % 60000;
    vmm->next_hva = 0x7f0000000000ULL;
    vmm->pid = sim_host_spawn(&sim->host);
    vmm->uid = FIRST_UID + (domain == 1 ? 2 : domain == 0 ? sim_host_below(&sim->host, 2) : 3);
    snprintf(vmm->name, sizeof(vmm->name), "vm%u", vmm->number);
    result = sim_vmm_register(vmm);
    if (result) {
        sim_wrong(sim, "%s can't be registered: %s", vmm->name, strerror(-result));
        sim_host_kill(&sim->host, vmm->pid);
        return NULL;
    }
    vmm->link = SIM_ALONE;
    plug(vmm);
    plug(vmm);
    return vmm;
}

/* ---- what may happen ---- */

static struct sim_vmm *any_vmm(struct sim *sim)
{
    return &sim->vmms[sim_host_below(&sim->host, SIM_VMMS)];
}

static void let_act(struct sim *sim)
{
    struct sim_vmm *vmm = any_vmm(sim);
    struct sim_host *host = &sim->host;

    if (vmm->link == SIM_OFF)
        return;
    if (vmm->stalled) {
        vmm->stalled--;
        return;
    }
    sim_vmm_step(vmm, sim_host_below(host, 200), sim_host_below(host, 200));
}

static void let_write(struct sim *sim)
{
    struct sim_vmm *vmm = any_vmm(sim);
    uint32_t page = sim_vmm_any_page(vmm), run = sim_host_below(&sim->host, 8);

    for (uint32_t i = page; vmm->link != SIM_OFF && page != PAGE_NONE && i <= page + run; i++) {
        if (i < vmm->page_count && sim_host_once_in(&sim->host, 8))
            sim_vmm_discard(vmm, i);
        else if (i < vmm->page_count)
            sim_vmm_write(vmm, i, any_content(vmm));
    }
}

static void let_pass(struct sim *sim)
{
    struct sim_vmm *vmm = any_vmm(sim);

    if (vmm->link != SIM_SERVED || vmm->stalled)
        return;
    if (sim_host_once_in(&sim->host, 3))
        sim_vmm_pass(vmm, sim_host_below(&sim->host, vmm->page_count + 1),
                     sim_host_below(&sim->host, 64));
    else
        sim_vmm_pass(vmm, 0, vmm->page_count);
    if (sim_host_once_in(&sim->host, 4))
        sim_vmm_say_stats(vmm);
}

static void let_lie(struct sim *sim)
{
    struct sim_vmm *vmm = any_vmm(sim);

    for (uint32_t tries = 0; tries < SIM_VMMS && !vmm->liar; tries++)
        vmm = any_vmm(sim);
    if (vmm->link == SIM_SERVED && vmm->liar && sim_host_once_in(&sim->host, 4))
        sim_lie(vmm);
}

static void let_time_pass(struct sim *sim)
{
    static const uint64_t spans[] = {NS_PER_MS,       20 * NS_PER_MS,   60 * NS_PER_MS,
                                     250 * NS_PER_MS, 1100 * NS_PER_MS, 3 * NS_PER_S,
                                     6 * NS_PER_S,    70 * NS_PER_S};

    /* Long spans are rare: most of what goes wrong goes wrong close together. */
    if (sim_host_once_in(&sim->host, sim->options.slow ? 3 : 12))
        pass(sim, spans[sim_host_below(&sim->host, 8)]);
    else
        pass(sim, spans[sim_host_below(&sim->host, 4)]);
}

static void let_turn(struct sim *sim)
{
    for (uint32_t i = sim_host_below(&sim->host, 6); i > 0; i--)
        sim_turn(sim);
}

static void let_disconnect(struct sim *sim)
{
    struct sim_vmm *vmm = any_vmm(sim);

    if (vmm->link == SIM_OFF)
        return;
    sim_vmm_disconnect(vmm);
    if (sim_host_once_in(&sim->host, 3)) /* comes back when its shares were let go */
        vmm->next_connect_ns += (GRACE_S + 1) * NS_PER_S;
}

static void let_die(struct sim *sim)
{
    struct sim_vmm *vmm = any_vmm(sim);

    if (vmm->link != SIM_OFF && sim_host_once_in(&sim->host, 2))
        sim_vmm_die(vmm);
}

static void let_come(struct sim *sim)
{
    uint32_t domain = sim_host_below(&sim->host, SIM_DOMAINS + 1) % SIM_DOMAINS;

    (void)sim_add(sim, domain, sim->options.liars && sim_host_once_in(&sim->host, 3));
}

static void let_stall(struct sim *sim)
{
    any_vmm(sim)->stalled = sim_host_below(&sim->host, 200);
}

static void let_plug(struct sim *sim)
{
    struct sim_vmm *vmm = any_vmm(sim);

    if (vmm->link == SIM_OFF)
        return;
    if (sim_host_once_in(&sim->host, 2) && vmm->block_count > 1) {
        uint32_t block = sim_host_below(&sim->host, vmm->block_count);

        if (vmm->blocks[block].live)
            sim_vmm_unplug(vmm, block);
    } else {
        plug(vmm);
    }
}

static void let_detach(struct sim *sim)
{
    struct sim_vmm *vmm = any_vmm(sim);
    struct guest *guest = vmm->link == SIM_SERVED ? registry_find(&sim->daemon, vmm->name) : NULL;

    if (guest)
        (void)agents_detach(guest, !sim_host_once_in(&sim->host, 4), "the walk says so");
}

/* A guest that was detached is none of memd's any more. */
static void bury(struct sim *sim)
{
    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        if (sim->vmms[i].link == SIM_ALONE && sim->vmms[i].detached)
            sim_vmm_die(&sim->vmms[i]);
    }
}

static void let_config_change(struct sim *sim)
{
    sim->uid_admitted = !sim->uid_admitted;
    write_config(sim);
    daemon_reload(&sim->daemon);
}

/* As when memd waits for a disk: agents connect, greet, say what they hold, and give up. */
static void let_stand_still(struct sim *sim)
{
    if (!sim->options.cuts)
        return;
    sim->still = true;
    for (uint32_t seconds = 2 + sim_host_below(&sim->host, 12); seconds > 0; seconds--) {
        for (uint32_t i = 0; i < SIM_VMMS; i++) {
            if (sim->vmms[i].link != SIM_OFF && !sim->vmms[i].stalled)
                sim_vmm_step(&sim->vmms[i], 200, 200);
        }
        sim_host_pass(&sim->host, NS_PER_S);
    }
    sim->still = false;
}

static void let_restart(struct sim *sim)
{
    if (sim->options.restarts)
        sim_restart_daemon(sim);
}

static const struct {
    uint32_t weight;
    void (*let)(struct sim *sim);
} events[] = {
    {600, let_act},         {250, let_write},    {120, let_pass},      {60, let_lie},
    {250, let_turn},        {90, let_time_pass}, {5, let_disconnect},  {3, let_die},
    {12, let_come},         {4, let_stall},      {6, let_plug},        {2, let_detach},
    {1, let_config_change}, {1, let_restart},    {4, let_stand_still},
};
#define EVENTS (sizeof(events) / sizeof(events[0]))

static void step(struct sim *sim)
{
    uint32_t total = 0, pick;
    size_t i = 0;

    for (size_t k = 0; k < EVENTS; k++)
        total += events[k].weight;
    pick = sim_host_below(&sim->host, total);
    while (pick >= events[i].weight)
        pick -= events[i++].weight;
    events[i].let(sim);
    bury(sim);
    sim->steps++;
}

/* ---- rest ---- */

/* What is going on, or NULL. */
static const char *domain_is_at(const struct trust_domain *domain)
{
    if (domain->round.asked)
        return "a round waits for content";
    if (domain->round.filled || domain->round.segment)
        return "a round is not published";
    if (domain->settled_ns)
        return "a domain waits for agents of an earlier memd";
    for (const struct ksm_segment *segment = domain->store.first; segment;
         segment = segment->next) {
        if (segment->pinned)
            return "a segment is worked on";
    }
    return NULL;
}

static const char *is_at(const struct sim *sim)
{
    const char *what = sim->daemon.loop.first_task ? "the loop has tasks" : NULL;

    if (sim->daemon.registry.saver.taken)
        what = "the list of guests is being written";
    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        if (!sim_vmm_is_idle(&sim->vmms[i]))
            return "an agent has something to read, or memd has";
    }
    for (const struct trust_domain *domain = sim->daemon.domains.first; domain && !what;
         domain = domain->next)
        what = domain_is_at(domain);
    return what;
}

static void act_until_idle(struct sim *sim)
{
    const char *what = NULL;
    uint32_t quiet = 0;

    for (uint32_t i = 0; i < REST_TURNS && quiet < 8 && !sim->wrong[0]; i++) {
        for (uint32_t k = 0; k < SIM_VMMS; k++) {
            if (sim->vmms[k].link != SIM_OFF)
                sim_vmm_step(&sim->vmms[k], RING_ENTRIES, RING_ENTRIES);
        }
        bury(sim);
        pass(sim, 5 * NS_PER_MS);
        what = is_at(sim);
        quiet = what ? 0 : quiet + 1;
    }
    if (quiet < 8)
        sim_wrong(sim, "memd and its agents do not come to rest: %s", what ? what : "still");
}

void sim_rest(struct sim *sim)
{
    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        if (sim->vmms[i].link != SIM_OFF && sim->vmms[i].liar)
            sim_vmm_die(&sim->vmms[i]);
        sim->vmms[i].stalled = 0;
    }
    act_until_idle(sim);
    pass(sim, (GRACE_S + 1) * NS_PER_S); /* who has not come back by now is let go */
    act_until_idle(sim);
    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        if (sim->vmms[i].link == SIM_SERVED)
            sim_vmm_say_stats(&sim->vmms[i]);
    }
    act_until_idle(sim);
    sim->rests++;
    if (!sim->wrong[0])
        sim_check_rest(sim);
}

void sim_clear(struct sim *sim)
{
    for (uint32_t i = 0; i < SIM_VMMS; i++) {
        if (sim->vmms[i].link != SIM_OFF)
            sim_vmm_die(&sim->vmms[i]);
    }
    act_until_idle(sim);
    pass(sim, (GRACE_S + 1) * NS_PER_S);
    act_until_idle(sim);
    sim->full_rests++;
    if (!sim->wrong[0])
        sim_check_empty(sim);
}

void sim_walk(struct sim *sim, uint64_t steps)
{
    for (uint64_t end = sim->steps + steps; sim->steps < end && !sim->wrong[0];) {
        step(sim);
        if (sim->steps % TABLES_EVERY == 0)
            sim_check_tables(sim);
        if (sim->steps % REST_EVERY == 0 && !sim->wrong[0])
            sim_rest(sim);
        if (sim->steps % ((uint64_t)REST_EVERY * CLEAR_EVERY) == 0 && !sim->wrong[0])
            sim_clear(sim);
    }
    if (!sim->wrong[0])
        sim_rest(sim);
    if (!sim->wrong[0])
        sim_clear(sim);
    sim_trace(sim, &sim->turns, sizeof(sim->turns));
}
