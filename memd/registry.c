/* SPDX-License-Identifier: Apache-2.0 */
#include "registry.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon.h"
#include "host.h"
#include "log.h"
#include "monitor.h"
#include "state.h"

#define NS_PER_S     1000000000ULL
#define HELLO_WAIT_S 10
#define GUESTS_FILE  "guests.json"
#define WISHES_FILE  "set.json"

static void hello_is_late(struct loop_timer *timer);
static void grace_is_over(struct loop_timer *timer);
static void process_died(struct loop_watch *watch, uint32_t events);

const char *registry_engine_name(enum guest_engine engine)
{
    static const char *const names[ENGINE_COUNT] = {"none", "agent", "kernel", "xen"};

    return engine < ENGINE_COUNT ? names[engine] : "none";
}

const char *registry_presence_name(enum guest_presence presence)
{
    static const char *const names[AGENT_PRESENCE_COUNT] = {"none", "connected", "lost"};

    return presence < AGENT_PRESENCE_COUNT ? names[presence] : "none";
}

struct guest *registry_find(const struct daemon *daemon, const char *name)
{
    for (struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        if (strcmp(guest->name, name) == 0)
            return guest;
    }
    return NULL;
}

struct guest *registry_find_token(const struct daemon *daemon, const char *token)
{
    for (struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        if (memcmp(guest->token, token, PROTOCOL_TOKEN_BYTES) == 0)
            return guest;
    }
    return NULL;
}

static json_t *integer(uint64_t value)
{
    return json_integer((json_int_t)value);
}

/* ---- what is promised ---- */

static struct guest_wish wish_from_json(const json_t *json)
{
    struct guest_wish wish = {.has_max = false};
    const json_t *value;

    if ((value = json_object_get(json, "max_bytes"))) {
        wish.has_max = true;
        wish.max_bytes = (uint64_t)json_integer_value(value);
    }
    if ((value = json_object_get(json, "min_bytes"))) {
        wish.has_min = true;
        wish.min_bytes = (uint64_t)json_integer_value(value);
    }
    if ((value = json_object_get(json, "shares"))) {
        wish.has_shares = true;
        wish.shares = (uint32_t)json_integer_value(value);
    }
    if ((value = json_object_get(json, "domain")) && json_is_string(value)) {
        wish.has_domain = true;
        snprintf(wish.domain, sizeof(wish.domain), "%s", json_string_value(value));
    }
    return wish;
}

static void wish_into_json(const struct guest_wish *wish, json_t *json)
{
    if (wish->has_max)
        json_object_set_new(json, "max_bytes", integer(wish->max_bytes));
    if (wish->has_min)
        json_object_set_new(json, "min_bytes", integer(wish->min_bytes));
    if (wish->has_shares)
        json_object_set_new(json, "shares", integer(wish->shares));
    if (wish->has_domain)
        json_object_set_new(json, "domain", json_string(wish->domain));
}

static void overlay(struct guest_wish *under, const struct guest_wish *over)
{
    if (over->has_max)
        under->max_bytes = over->max_bytes;
    if (over->has_min)
        under->min_bytes = over->min_bytes;
    if (over->has_shares)
        under->shares = over->shares;
    if (over->has_domain)
        strcpy(under->domain, over->domain);
}

/* The request, under the file, under memctl set, under `latest` (may be NULL). */
static struct guest_wish resolve(const struct daemon *daemon, const char *name,
                                 const struct guest_wish *asked, const struct guest_wish *latest)
{
    const struct config_guest *preset = config_guest_find(&daemon->config, name);
    const json_t *set = json_object_get(daemon->registry.wishes, name);
    struct guest_wish result = *asked;

    if (!asked->has_shares)
        result.shares = SHARES_DEFAULT;
    if (!asked->has_min)
        result.min_bytes = 0;
    if (!asked->has_domain)
        result.domain[0] = '\0';
    if (preset) {
        struct guest_wish file = {
            preset->has_max,   preset->has_min,   preset->has_shares, preset->has_domain,
            preset->max_bytes, preset->min_bytes, preset->shares,     ""};
        strcpy(file.domain, preset->domain);
        overlay(&result, &file);
    }
    if (set) {
        struct guest_wish kept = wish_from_json(set);
        overlay(&result, &kept);
    }
    if (latest)
        overlay(&result, latest);
    return result;
}

static int check_promise(const struct daemon *daemon, const struct guest *guest,
                         const struct guest_wish *wish, char *words, size_t words_bytes)
{
    if (wish->min_bytes > wish->max_bytes) {
        snprintf(words, words_bytes,
                 "min would be %" PRIu64 " MiB and max %" PRIu64
                 " MiB: a guest can't be guaranteed more than it is promised; lower min or raise "
                 "max",
                 wish->min_bytes >> 20, wish->max_bytes >> 20);
        return -EINVAL;
    }
    if (!ledger_can_guarantee(&daemon->ledger, guest ? &guest->account : NULL, wish->min_bytes)) {
        snprintf(words, words_bytes,
                 "the guarantees would be more than the budget of %" PRIu64
                 " MiB; lower min here or elsewhere, or raise [host] budget",
                 daemon->ledger.budget_bytes >> 20);
        return -ENOSPC;
    }
    return 0;
}

/* Puts it into force; true when the guest has to change its domain. */
static bool apply(struct guest *guest, const struct guest_wish *wish)
{
    bool moves = strcmp(guest->domain, wish->domain) != 0;

    guest->account.max_bytes = wish->max_bytes;
    guest->account.min_bytes = wish->min_bytes;
    guest->account.shares = wish->shares;
    strcpy(guest->domain, wish->domain);
    return moves;
}

int registry_wish(struct guest *guest, const struct guest_wish *wish, char *words,
                  size_t words_bytes)
{
    struct daemon *daemon = guest->daemon;
    struct guest_wish total = resolve(daemon, guest->name, &guest->asked, wish);
    const char *refusal = NULL;
    json_t *kept, *all;
    int result = check_promise(daemon, guest, &total, words, words_bytes);

    if (result)
        return result;
    if (wish->has_domain && wish->domain[0])
        refusal = domains_refusal(daemon, wish->domain, guest->uid);
    if (refusal) {
        snprintf(words, words_bytes, "domain '%s': %s", wish->domain, refusal);
        return -EPERM;
    }
    all = json_deep_copy(daemon->registry.wishes);
    kept = json_object_get(all, guest->name);
    if (!kept) {
        kept = json_object();
        json_object_set_new(all, guest->name, kept);
    }
    wish_into_json(wish, kept);
    result = state_write(daemon->state_dir, WISHES_FILE, all, true);
    if (result) {
        json_decref(all);
        snprintf(words, words_bytes, "it can't be kept in the state directory: %s",
                 strerror(-result));
        return result;
    }
    json_decref(daemon->registry.wishes);
    daemon->registry.wishes = all;
    if (apply(guest, &total))
        (void)agents_detach(guest, true, "the guest changes its trust domain");
    return 0;
}

void registry_reload(struct daemon *daemon, const struct config *old)
{
    for (struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        const struct config_guest *before = config_guest_find(old, guest->name);
        const struct config_guest *now = config_guest_find(&daemon->config, guest->name);
        struct guest_wish total = resolve(daemon, guest->name, &guest->asked, NULL);
        char words[256];

        if (!before && !now)
            continue;
        if (check_promise(daemon, guest, &total, words, sizeof(words))) {
            log_warning("guest '%s': its section is not taken over: %s", guest->name, words);
            continue;
        }
        if (apply(guest, &total))
            (void)agents_detach(guest, true,
                                "the configuration puts the guest into another domain");
    }
}

/* ---- processes ---- */

static void stop_watching(struct guest *guest)
{
    loop_watch_remove(&guest->daemon->loop, &guest->death);
    if (guest->death.fd >= 0)
        close(guest->death.fd);
    guest->death.fd = -1;
}

/* Takes a process for the guest; its end will be seen. */
static int watch_process(struct guest *guest, pid_t pid)
{
    uint64_t start_time;
    int fd = host_process_open(pid), result;

    if (fd < 0)
        return fd;
    result = host_process_start_time(pid, &start_time);
    if (result) {
        close(fd);
        return result;
    }
    stop_watching(guest);
    guest->death = (struct loop_watch){.fd = fd,
                                       .events = POLLIN,
                                       .level = true,
                                       .ready = process_died,
                                       .owner = guest,
                                       .op = LOOP_NOT_QUEUED};
    guest->pid = pid;
    guest->start_time = start_time;
    return loop_watch_add(&guest->daemon->loop, &guest->death);
}

static void process_died(struct loop_watch *watch, uint32_t events)
{
    struct guest *guest = watch->owner;
    const struct daemon *daemon = guest->daemon;
    bool early = guest->waiting_for_hello && guest->presence == AGENT_NONE;

    (void)events;
    stop_watching(guest);
    if (early && guest->daemonizes)
        loop_timer_set(&guest->daemon->loop, &guest->grace_timer,
                       (uint64_t)(daemon->config.grace_s * (double)NS_PER_S));
    else
        registry_remove(guest, "guest_gone",
                        early ? "its process ended before its agent came; look at what the VMM said"
                              : "its process has ended");
}

void registry_end_process(struct guest *guest, const char *why)
{
    log_notice("guest '%s': its VMM (pid %d) is ended: %s", guest->name, (int)guest->pid, why);
    if (guest->death.fd >= 0)
        host_process_end(guest->death.fd);
}

static void grace_is_over(struct loop_timer *timer)
{
    struct guest *guest = timer->owner;

    if (guest->presence == AGENT_NONE)
        registry_remove(guest, "guest_gone", "its process ended, and no other came in its place");
    else
        registry_let_go(guest);
}

/* ---- engines ---- */

void registry_set_engine(struct guest *guest, enum guest_engine engine, const char *reason)
{
    struct daemon *daemon = guest->daemon;
    uint64_t now = loop_now(&daemon->loop);
    bool had_kernel = guest->engine == ENGINE_KERNEL;

    if (engine == ENGINE_KERNEL &&
        (!daemon->kernel_ksm.available || daemon->config.engine == SHARING_OFF)) {
        snprintf(guest->reason, sizeof(guest->reason), "%s%s%s", reason, reason[0] ? "; " : "",
                 daemon->config.engine == SHARING_OFF ? "sharing is off in memd.conf"
                                                      : daemon->kernel_ksm.reason);
        engine = ENGINE_NONE;
    } else {
        snprintf(guest->reason, sizeof(guest->reason), "%s", reason);
    }
    if (engine == ENGINE_KERNEL && !had_kernel && kernel_ksm_add(&daemon->kernel_ksm, now)) {
        snprintf(guest->reason, sizeof(guest->reason), "%s", daemon->kernel_ksm.reason);
        engine = ENGINE_NONE;
    }
    if (engine != ENGINE_KERNEL && had_kernel)
        kernel_ksm_remove(&daemon->kernel_ksm, now);
    if (engine == ENGINE_KERNEL)
        daemon_steer(daemon);
    guest->engine = engine;
}

static void hello_is_late(struct loop_timer *timer)
{
    static const char why[] = "no agent said hello within 10 s: static or privileged VMM, or it "
                              "announced no RAM (mem-merge=off)";
    struct guest *guest = timer->owner;

    if (guest->presence != AGENT_NONE)
        return;
    if (guest->death.fd >= 0)
        guest->waiting_for_hello = false; /* lives on as what was registered */
    registry_set_engine(guest, ENGINE_KERNEL, why);
    log_warning("guest '%s': %s; it runs on, shared by: %s", guest->name, why,
                guest->engine == ENGINE_KERNEL ? "kernel KSM" : "nobody");
    events_emit(&guest->daemon->events, "agent_missing", guest->name,
                json_pack("{s:s,s:s}", "engine", registry_engine_name(guest->engine), "reason",
                          guest->reason));
    registry_save(guest->daemon);
}

/* ---- coming and going ---- */

static int make_token(char *token)
{
    uint8_t random[PROTOCOL_TOKEN_BYTES / 2];

    int result = host_random(random, sizeof(random));

    if (result)
        return result;
    for (size_t i = 0; i < sizeof(random); i++)
        sprintf(token + 2 * i, "%02x", random[i]);
    return 0;
}

static struct guest *new_guest(struct daemon *daemon, const char *name)
{
    struct guest *guest = calloc(1, sizeof(*guest));

    if (!guest)
        return NULL;
    guest->daemon = daemon;
    snprintf(guest->name, sizeof(guest->name), "%s", name);
    guest->death = (struct loop_watch){.fd = -1, .op = LOOP_NOT_QUEUED};
    guest->hello_timer = (struct loop_timer){.expired = hello_is_late, .owner = guest};
    guest->grace_timer = (struct loop_timer){.expired = grace_is_over, .owner = guest};
    return guest;
}

static void enlist(struct guest *guest)
{
    struct registry *registry = &guest->daemon->registry;

    guest->next = registry->first;
    registry->first = guest;
    registry->count++;
    ledger_open(&guest->daemon->ledger, &guest->account);
}

/* memd's own count: what an account has as managed is what its guest's blocks sum to. When that
 * does not hold nothing that memd says can be relied on, whatever the agents say. */
static int check_books(struct daemon *daemon, char *words, size_t words_bytes)
{
    for (const struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        uint64_t pages = 0;

        for (uint32_t i = 0; i < guest->block_count; i++)
            pages += guest->blocks[i].managed ? guest->blocks[i].pages : 0;
        if (pages == guest->account.managed_pages)
            continue;
        snprintf(words, words_bytes,
                 "memd's own count of the pages of guest '%s' does not add up: nobody is admitted "
                 "until memd is started again or that guest has gone",
                 guest->name);
        log_error("%s", words);
        events_emit(&daemon->events, "ledger_mismatch", guest->name,
                    json_pack("{s:I}", "managed_pages", (json_int_t)guest->account.managed_pages));
        return -EBUSY;
    }
    return 0;
}

static int may_come(struct daemon *daemon, const struct guest_request *request,
                    const struct guest_wish *wish, char *words, size_t words_bytes)
{
    struct guest *same = registry_find(daemon, request->name);
    int result = check_books(daemon, words, words_bytes);

    if (result)
        return result;
    if (same && same->death.fd < 0 && same->presence == AGENT_NONE) {
        registry_remove(same, "guest_gone", "its process has ended and its name was taken again");
        same = NULL;
    } else if (same && same->pid == request->pid && same->uid == request->uid &&
               same->found_again && same->presence == AGENT_NONE) {
        /* It has not heard that it was registered: memd ended before it could say so. */
        registry_remove(same, "guest_gone", "it registers once more");
        same = NULL;
    }
    if (same) {
        snprintf(words, words_bytes, "a guest '%s' lives already (pid %d); choose another name",
                 request->name, (int)same->pid);
        return -EEXIST;
    }
    /* Whether it admits the VMM's uid is decided by the agent's hello: the VMM may change its own.
     */
    if (wish->domain[0] && !config_domain_find(&daemon->config, wish->domain)) {
        snprintf(words, words_bytes,
                 "domain '%s': there is no such domain in memd.conf; add [domain %s] with uids",
                 wish->domain, wish->domain);
        return -EPERM;
    }
    return check_promise(daemon, NULL, wish, words, words_bytes);
}

int registry_add(struct daemon *daemon, const struct guest_request *request,
                 struct guest **ret_guest, char *words, size_t words_bytes)
{
    struct guest_wish wish = resolve(daemon, request->name, &request->wish, NULL);
    enum guest_engine engine = request->engine;
    struct guest *guest;
    int result = may_come(daemon, request, &wish, words, words_bytes);

    if (result)
        return result;
    guest = new_guest(daemon, request->name);
    if (!guest)
        return -ENOMEM;
    guest->uid = request->uid;
    guest->asked = request->wish;
    snprintf(guest->vmm, sizeof(guest->vmm), "%s", request->vmm);
    snprintf(guest->qmp, sizeof(guest->qmp), "%s", request->qmp);
    apply(guest, &wish);
    result = make_token(guest->token);
    if (!result)
        result = watch_process(guest, request->pid);
    if (result) {
        snprintf(words, words_bytes, "process %d: %s", (int)request->pid, strerror(-result));
        stop_watching(guest);
        free(guest);
        return -ESRCH;
    }
    enlist(guest);
    daemon->pss.sampled_ns = 0; /* the next who asks gets this guest too */
    if (engine == ENGINE_AGENT && daemon->config.engine == SHARING_KERNEL)
        engine = ENGINE_KERNEL;
    guest->waiting_for_hello = engine == ENGINE_AGENT;
    guest->daemonizes = request->daemonizes;
    registry_set_engine(guest, engine, request->reason);
    registry_expect_hello(guest);
    registry_save(daemon);
    log_notice("guest '%s': registered by uid %d, pid %d, %" PRIu64 " MiB promised, engine %s",
               guest->name, (int)guest->uid, (int)guest->pid, guest->account.max_bytes >> 20,
               registry_engine_name(guest->engine));
    events_emit(&daemon->events, "guest_registered", guest->name,
                json_pack("{s:i,s:s}", "pid", (int)guest->pid, "engine",
                          registry_engine_name(guest->engine)));
    *ret_guest = guest;
    return 0;
}

void registry_expect_hello(struct guest *guest)
{
    if (guest->waiting_for_hello)
        loop_timer_set(&guest->daemon->loop, &guest->hello_timer, HELLO_WAIT_S * NS_PER_S);
}

/* Frees what the guest holds; says nothing. */
static void take_apart(struct guest *guest)
{
    struct daemon *daemon = guest->daemon;
    struct registry *registry = &daemon->registry;
    struct guest **place = &registry->first;

    if (guest->session)
        agents_forget_guest(guest->session);
    if (guest->lost)
        agents_forget_guest(guest->lost);
    loop_timer_cancel(&daemon->loop, &guest->hello_timer);
    loop_timer_cancel(&daemon->loop, &guest->grace_timer);
    stop_watching(guest);
    registry->departed_cpu_ns += guest->agent_cpu_ns;
    registry->departed_merges += guest->stats.merges;
    registry->departed_unmerges += guest->stats.unmerges;
    registry->departed_mismatches += guest->stats.mismatches;
    ledger_close(&guest->account);
    while (*place && *place != guest)
        place = &(*place)->next;
    if (*place) {
        *place = guest->next;
        registry->count--;
    }
}

void registry_remove(struct guest *guest, const char *event, const char *why)
{
    struct daemon *daemon = guest->daemon;

    if (guest->over)
        return;
    guest->over = true;
    if (guest->engine == ENGINE_KERNEL)
        kernel_ksm_remove(&daemon->kernel_ksm, loop_now(&daemon->loop));
    take_apart(guest);
    log_notice("guest '%s': %s", guest->name, why);
    events_emit(&daemon->events, event, guest->name, json_pack("{s:s}", "reason", why));
    control_detached(daemon, guest->name, strcmp(event, "detached") == 0);
    if (strcmp(event, "guest_gone") == 0)
        monitor_remove_place(daemon, guest);
    registry_save(daemon);
    pss_forget(daemon, guest);
    free(guest);
}

/* ---- agents ---- */

static int peer_process(struct guest *guest, pid_t pid)
{
    if (pid <= 0 || (pid == guest->pid && guest->death.fd >= 0))
        return 0;
    return watch_process(guest, pid);
}

int registry_agent_came(struct guest *guest, struct session *session, pid_t pid, uid_t uid)
{
    struct daemon *daemon = guest->daemon;
    bool is_news = guest->waiting_for_hello || guest->uid != uid || guest->pid != pid;
    int result = peer_process(guest, pid);

    if (result)
        return result;
    guest->uid = uid;
    guest->session = session;
    guest->presence = AGENT_CONNECTED;
    guest->waiting_for_hello = false;
    guest->has_stats = guest->places_stated = false;
    guest->block_count = 0;
    guest->account.managed_pages = 0;
    ledger_forget_places(&guest->account);
    loop_timer_cancel(&daemon->loop, &guest->hello_timer);
    loop_timer_cancel(&daemon->loop, &guest->grace_timer);
    /* After a restart all agents come back at once. To replace a file may take longer than an agent
     * waits for its welcome (ext4 with "discard"), and a hundred of them would never get theirs. */
    if (is_news)
        registry_save(daemon);
    return 0;
}

void registry_let_go(struct guest *guest)
{
    struct session *lost = guest->lost;

    guest->lost = NULL;
    if (lost)
        agents_let_go(lost);
}

void registry_agent_left(struct guest *guest, const char *why)
{
    struct daemon *daemon = guest->daemon;

    guest->lost = agents_keep_one(guest->lost, guest->session);
    guest->session = NULL;
    guest->presence = AGENT_LOST;
    ledger_forget_places(&guest->account);
    if (host_process_is_exiting(guest->pid))
        return; /* its pidfd says the rest in a moment */
    log_warning("guest '%s': its agent is gone: %s; it runs on with what it shares", guest->name,
                why);
    events_emit(&daemon->events, "agent_lost", guest->name, json_pack("{s:s}", "reason", why));
    snprintf(guest->reason, sizeof(guest->reason), "%s", why);
    loop_timer_set(&daemon->loop, &guest->grace_timer,
                   (uint64_t)(daemon->config.grace_s * (double)NS_PER_S));
}

uint64_t registry_agents_cpu_ns(struct daemon *daemon)
{
    uint64_t sum = daemon->registry.departed_cpu_ns;

    for (const struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        sum += guest->agent_cpu_ns;
        if (guest->session)
            sum += agents_cpu_ns(guest->session);
    }
    return sum;
}

/* ---- the state directory ---- */

static json_t *guest_to_json(const struct guest *guest)
{
    json_t *json =
        json_pack("{s:s,s:s,s:I,s:I,s:I,s:s,s:s,s:s,s:s,s:b,s:b}", "name", guest->name, "token",
                  guest->token, "uid", (json_int_t)guest->uid, "pid", (json_int_t)guest->pid,
                  "start_time", (json_int_t)guest->start_time, "vmm", guest->vmm, "qmp", guest->qmp,
                  "engine", registry_engine_name(guest->engine), "reason", guest->reason, "waiting",
                  guest->waiting_for_hello, "daemonizes", guest->daemonizes);

    if (json)
        wish_into_json(&guest->asked, json);
    return json;
}

static json_t *list_of_guests(void *owner)
{
    const struct daemon *daemon = owner;
    json_t *all = json_array();

    for (const struct guest *guest = daemon->registry.first; all && guest; guest = guest->next)
        json_array_append_new(all, guest_to_json(guest));
    return all;
}

static void list_is_saved(void *owner)
{
    control_saved(owner);
}

void registry_save(struct daemon *daemon)
{
    (void)state_saver_ask(&daemon->registry.saver);
}

static enum guest_engine engine_from(const char *name)
{
    for (int engine = 0; engine < ENGINE_COUNT; engine++) {
        if (strcmp(name, registry_engine_name((enum guest_engine)engine)) == 0)
            return (enum guest_engine)engine;
    }
    return ENGINE_NONE;
}

/* Its process, as it was recorded. One that was waited for may have daemonized, and say hello from
 * another process: it is waited for a while longer. 0, or -ESRCH: it is gone. */
static int find_process_again(struct guest *guest, pid_t pid, uint64_t start_time)
{
    struct daemon *daemon = guest->daemon;
    uint64_t started;

    if (host_process_start_time(pid, &started) == 0 && started == start_time)
        return watch_process(guest, pid);
    if (!guest->waiting_for_hello || !guest->daemonizes)
        return -ESRCH;
    guest->pid = pid;
    guest->start_time = start_time;
    loop_timer_set(&daemon->loop, &guest->grace_timer,
                   (uint64_t)(daemon->config.grace_s * (double)NS_PER_S));
    return 0;
}

/* A guest of an earlier life of memd; gone meanwhile: nothing. */
static void restore(struct daemon *daemon, json_t *json)
{
    const char *name, *token, *vmm, *qmp, *engine, *reason;
    json_int_t uid, pid, start_time;
    struct guest *guest;
    int waiting;

    if (json_unpack(json, "{s:s,s:s,s:I,s:I,s:I,s:s,s:s,s:s,s:s,s:b}", "name", &name, "token",
                    &token, "uid", &uid, "pid", &pid, "start_time", &start_time, "vmm", &vmm, "qmp",
                    &qmp, "engine", &engine, "reason", &reason, "waiting", &waiting) ||
        !words_are_name(name) || strlen(token) != PROTOCOL_TOKEN_BYTES)
        return;
    guest = new_guest(daemon, name);
    if (guest) {
        guest->waiting_for_hello = waiting;
        guest->daemonizes = json_is_true(json_object_get(json, "daemonizes"));
    }
    if (!guest || find_process_again(guest, (pid_t)pid, (uint64_t)start_time)) {
        free(guest);
        return;
    }
    memcpy(guest->token, token, PROTOCOL_TOKEN_BYTES);
    guest->uid = (uid_t)uid;
    snprintf(guest->vmm, sizeof(guest->vmm), "%s", vmm);
    snprintf(guest->qmp, sizeof(guest->qmp), "%s", qmp);
    guest->asked = wish_from_json(json);
    struct guest_wish wish = resolve(daemon, name, &guest->asked, NULL);
    apply(guest, &wish);
    enlist(guest);
    registry_set_engine(guest, engine_from(engine), reason);
    registry_expect_hello(guest);
    guest->found_again = true;
    if (!waiting && guest->engine == ENGINE_AGENT)
        guest->presence = AGENT_LOST;
    log_notice("guest '%s': found again, pid %d", guest->name, (int)guest->pid);
}

int registry_start(struct daemon *daemon)
{
    json_t *guests = state_read(daemon->state_dir, GUESTS_FILE), *guest;
    size_t i;

    daemon->registry.saver = (struct state_saver){.loop = &daemon->loop,
                                                  .dir = daemon->state_dir,
                                                  .name = GUESTS_FILE,
                                                  .content = list_of_guests,
                                                  .saved = list_is_saved,
                                                  .owner = daemon};
    daemon->registry.wishes = state_read(daemon->state_dir, WISHES_FILE);
    if (!json_is_object(daemon->registry.wishes)) {
        json_decref(daemon->registry.wishes);
        daemon->registry.wishes = json_object();
    }
    json_array_foreach(guests, i, guest) restore(daemon, guest);
    json_decref(guests);
    return daemon->registry.wishes ? 0 : -ENOMEM;
}

void registry_stop(struct daemon *daemon)
{
    state_saver_end(&daemon->registry.saver);
    for (struct guest *guest = daemon->registry.first, *next; guest; guest = next) {
        next = guest->next;
        take_apart(guest);
        free(guest);
    }
    daemon->registry.first = NULL;
    json_decref(daemon->registry.wishes);
    daemon->registry.wishes = NULL;
}
