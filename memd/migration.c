/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A migration here is a record and a mover. The record outlives memd (migrations.json); the mover
 * is the only one who knows how far it is, and says so. Of what a mover says three things have
 * consequences here, each safe to do again:
 *
 *   - it needs its guest's VMM: started once, by incoming.c, never a second one of that name;
 *   - it is over: noted durably, then what is memd's part is done (a source that was left is ended,
 *     a copy that never ran is ended), then the mover may go;
 *   - it has died without saying so: another one takes over, with the agent's word on where it is.
 *
 * A source's VMM is ended for nothing less than its mover's word that every page has been proven.
 */
#include "migration.h"

#include <errno.h>
#include <inttypes.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon.h"
#include "host.h"
#include "log.h"

#define NS_PER_S         1000000000ULL
#define NS_PER_MS        1000000ULL
#define RECORDS_FILE     "migrations.json"
#define RECORDS_MAX      64U /* that are over */
#define UNKNOWN_MAX      16U /* peers that have not said yet who they are */
#define ACCEPT_TURN      8
#define STRANGER_WORDS_S 10U /* a line in so many seconds */
#define ARRIVAL_S        30U /* for the VMM to start and its agent to say hello */
#define ARRIVAL_MORE_S   5U  /* after a block of RAM: for the next */
#define ARRIVAL_LOOK     (50 * NS_PER_MS)
#define RETRY_NS         (200 * NS_PER_MS)
#define TRIES_MOST       5U
#define DEATHS_MOST      20U
#define UNTOLD_MOST      3U /* deaths of movers that never said a word: nothing has begun */

static const char *const stage_names[ORDER_STAGE_COUNT] = {"prepare", "precopy", "switch",
                                                           "postcopy", "done"};
static const char *const outcome_names[ORDER_OUTCOME_COUNT] = {
    "running", "completed", "failed_source_runs", "failed_guest_lost", "cancelled"};

/* ---- the list ---- */

static struct migration *find(const struct daemon *daemon, const char *name)
{
    for (struct migration *one = daemon->migrations.first; one; one = one->next) {
        if (strcmp(one->start.name, name) == 0)
            return one;
    }
    return NULL;
}

static void retry(struct loop_timer *timer);
static void look_for_arrival(struct loop_timer *timer);

struct migration *migration_new(struct daemon *daemon, bool source)
{
    struct migration *migration = calloc(1, sizeof(*migration));

    if (!migration)
        return NULL;
    migration->daemon = daemon;
    migration->source = source;
    migration->began_s = host_wall_seconds();
    migration->death = migration->orders = (struct loop_watch){.fd = -1, .op = LOOP_NOT_QUEUED};
    migration->retry = (struct loop_timer){.expired = retry, .owner = migration};
    migration->arrival = (struct loop_timer){.expired = look_for_arrival, .owner = migration};
    migration->next = daemon->migrations.first;
    daemon->migrations.first = migration;
    return migration;
}

void migration_forget(struct migration *migration)
{
    struct migration **place = &migration->daemon->migrations.first;

    mover_process_let_go(migration);
    loop_timer_cancel(&migration->daemon->loop, &migration->retry);
    loop_timer_cancel(&migration->daemon->loop, &migration->arrival);
    while (*place != migration)
        place = &(*place)->next;
    *place = migration->next;
    if (migration->socket[0])
        unlinkat(migration->daemon->migrations.dir, migration->socket, 0);
    if (!migration->source && !migration->start.name[0])
        migration->daemon->migrations.unknown--;
    free(migration);
}

/* The latest of a guest is kept, and not more than RECORDS_MAX in all. */
static void forget_old(struct daemon *daemon, const struct migration *fresh)
{
    struct migration *next;
    uint32_t kept = 0;

    for (struct migration *one = daemon->migrations.first; one; one = next) {
        next = one->next;
        if (one == fresh || !one->over || one->pid)
            continue;
        if (strcmp(one->start.name, fresh->start.name) == 0 || ++kept > RECORDS_MAX)
            migration_forget(one);
    }
}

/* ---- the record ---- */

static void hex(const uint8_t *bytes, size_t count, char *into)
{
    for (size_t i = 0; i < count; i++)
        sprintf(into + 2 * i, "%02x", bytes[i]);
}

static bool unhex(const char *text, uint8_t *into, size_t count)
{
    if (strlen(text) != 2 * count)
        return false;
    for (size_t i = 0; i < count; i++) {
        if (sscanf(text + 2 * i, "%2hhx", &into[i]) != 1)
            return false;
    }
    return true;
}

static json_t *record_of(const struct migration *migration)
{
    const struct order_start *start = &migration->start;
    char session[2 * ORDERS_SESSION_BYTES + 1];

    hex(start->session, sizeof(start->session), session);
    return json_pack(
        "{s:s,s:s,s:b,s:b,s:s,s:s,s:i,s:I,s:s,s:i,s:i,s:i,s:I,s:b,s:f,s:s}", "guest", start->name,
        "peer", migration->peer, "source", migration->source, "over", migration->over, "session",
        session, "socket", migration->socket, "pid", (int)migration->pid, "start_time",
        (json_int_t)migration->start_time, "host", start->host, "port", (int)start->port,
        "data_port", (int)start->data_port, "listen_port", (int)migration->listen_port, "bandwidth",
        (json_int_t)start->bandwidth, "precopy_only", (int)start->precopy_only, "began",
        migration->began_s, "outcome", outcome_names[migration->status.outcome]);
}

static json_t *list_of_migrations(void *owner)
{
    const struct daemon *daemon = owner;
    json_t *all = json_array();

    for (const struct migration *one = daemon->migrations.first; all && one; one = one->next) {
        if (one->start.name[0])
            json_array_insert_new(all, 0, record_of(one));
    }
    return all;
}

static uint64_t save(struct daemon *daemon)
{
    return state_saver_ask(&daemon->migrations.saver);
}

/* Who was over is noted: its mover may go. */
static void records_are_saved(void *owner)
{
    struct daemon *daemon = owner;

    for (struct migration *one = daemon->migrations.first; one; one = one->next) {
        if (one->over && daemon->migrations.saver.written >= one->kept)
            mover_process_say(one, ORDER_FORGET);
    }
}

/* ---- what is over ---- */

static const char *words_of(const struct migration *migration)
{
    return migration->status.words[0] ? migration->status.words : migration->words;
}

static void say_the_end(const struct migration *migration)
{
    static const char *const events[ORDER_OUTCOME_COUNT] = {
        [ORDER_COMPLETED] = "migration_completed",
        [ORDER_SOURCE_RUNS] = "migration_failed",
        [ORDER_GUEST_LOST] = "guest_lost",
        [ORDER_CANCELLED] = "migration_cancelled"};
    const struct order_status *status = &migration->status;
    const char *name = migration->start.name, *words = words_of(migration);

    if (status->outcome == ORDER_COMPLETED)
        log_notice("guest '%s': it has %s %s", name,
                   migration->source ? "moved to" : "arrived from", migration->peer);
    else if (status->outcome == ORDER_GUEST_LOST)
        log_error("guest '%s' is lost: %s. It runs neither here nor at %s as far as this host "
                  "knows; what its VMMs still hold is left as it is",
                  name, words, migration->peer);
    else
        log_warning("guest '%s': its move was %s: %s. It %s", name,
                    status->outcome == ORDER_CANCELLED ? "called off" : "given up", words,
                    migration->source ? "goes on here" : "goes on where it was");
    events_emit(&migration->daemon->events, events[status->outcome], name[0] ? name : NULL,
                json_pack("{s:s,s:s,s:s}", "role", migration->source ? "source" : "destination",
                          "peer", migration->peer, "reason", words));
}

/* A source whose pages are all proven elsewhere, or a copy that was never let run. */
static bool is_empty_shell(const struct migration *migration)
{
    uint32_t outcome = migration->status.outcome;

    return migration->source ? outcome == ORDER_COMPLETED
                             : outcome == ORDER_SOURCE_RUNS || outcome == ORDER_CANCELLED;
}

/* Somebody came and never said which guest it is about: not worth a line for each, but an operator
 * whose certificates don't fit has to see it. */
static void let_stranger_go(struct migration *migration)
{
    struct daemon *daemon = migration->daemon;
    uint64_t now = loop_now(&daemon->loop);

    if (now < daemon->migrations.next_stranger_ns) {
        log_detail("%s had no guest to bring: %s", migration->peer, words_of(migration));
    } else {
        log_warning("%s had no guest to bring: %s", migration->peer, words_of(migration));
        daemon->migrations.next_stranger_ns = now + STRANGER_WORDS_S * NS_PER_S;
    }
    mover_process_say(migration, ORDER_FORGET);
    if (!migration->pid)
        migration_forget(migration);
}

static void come_to_an_end(struct migration *migration)
{
    struct daemon *daemon = migration->daemon;
    struct guest *guest = registry_find(daemon, migration->start.name);

    if (migration->over)
        return;
    migration->over = true;
    if (!migration->start.name[0]) {
        let_stranger_go(migration);
        return;
    }
    loop_timer_cancel(&daemon->loop, &migration->arrival);
    say_the_end(migration);
    if (guest && is_empty_shell(migration) && (migration->source || migration->arrived))
        registry_end_process(guest, migration->source ? "it has moved to another host"
                                                      : "it did not arrive");
    migration->kept = save(daemon);
    forget_old(daemon, migration);
}

/* It ends before a mover could say so. */
static void fail(struct migration *migration, const char *why)
{
    snprintf(migration->words, sizeof(migration->words), "%s", why);
    migration->status.words[0] = '\0';
    migration->status.outcome = ORDER_SOURCE_RUNS;
    migration->status.stage = ORDER_STAGE_DONE;
    come_to_an_end(migration);
}

/* ---- what movers say ---- */

static void note_route(struct migration *migration, const struct order_status *status)
{
    struct order_start *start = &migration->start;
    bool known = !migration->source || start->data_port == status->data_port;

    start->epoch = status->epoch;
    if (memcmp(start->session, status->session, sizeof(start->session)) != 0)
        known = false;
    memcpy(start->session, status->session, sizeof(start->session));
    if (migration->source)
        start->data_port = status->data_port;
    if (!known && start->name[0])
        save(migration->daemon);
}

/* A link that is cut before the guest was handed over ends the attempt, not the wish: the guest
 * runs here, so nothing speaks against beginning again. What the destination refuses is final, but
 * for the remains of an earlier attempt. */
static bool is_worth_another_try(const struct migration *migration)
{
    return migration->source && migration->status.outcome == ORDER_SOURCE_RUNS &&
           migration->got_far && !migration->called_off && migration->tries < TRIES_MOST &&
           (migration->status.was_cut || migration->tries > 0);
}

static void begin_again(struct migration *migration)
{
    migration->again = true;
    migration->tries++;
    migration->before = migration->status;
    migration->status.outcome = ORDER_GOES_ON;
    migration->status.stage = ORDER_STAGE_PREPARE;
    log_warning("guest '%s': its move was cut off: %s; it begins again", migration->start.name,
                words_of(migration));
    mover_process_say(migration, ORDER_FORGET);
}

/* A mover that takes over knows nothing of what its predecessor saw. */
static void add_what_was_before(struct migration *migration)
{
    const struct order_status *before = &migration->before;
    struct order_status *now = &migration->status;

    if (!before->header.type)
        return;
    now->downtime_ns = now->downtime_ns ? now->downtime_ns : before->downtime_ns;
    now->precopy_ns = now->precopy_ns ? now->precopy_ns : before->precopy_ns;
    now->postcopy_ns += before->postcopy_ns;
    now->elapsed_ns += before->elapsed_ns;
    now->reconnects += before->reconnects + (migration->tries > 0);
    now->bytes_sent += before->bytes_sent;
}

void migration_heard_status(struct migration *migration, const struct order_status *status)
{
    if (migration->over && !migration->start.name[0])
        mover_process_say(migration, ORDER_FORGET);
    else if (migration->over)
        records_are_saved(migration->daemon);
    if (migration->over || migration->again)
        return;
    if (status->reconnects > migration->status.reconnects)
        log_notice("guest '%s': the connection to %s was made again", migration->start.name,
                   migration->peer);
    migration->deaths = 0;
    migration->status = *status;
    migration->untold = false;
    add_what_was_before(migration);
    note_route(migration, status);
    migration->got_far |= status->data_port != 0;
    if (is_worth_another_try(migration))
        begin_again(migration);
    else if (status->outcome != ORDER_GOES_ON)
        come_to_an_end(migration);
}

static void refuse(struct migration *migration, int error, const char *words)
{
    mover_process_give_guest(migration, error, words, -1);
    log_warning("guest '%s' from %s was refused: %s", migration->start.name, migration->peer,
                words);
}

static bool moves_otherwise(const struct daemon *daemon, const char *name,
                            const struct migration *except)
{
    for (const struct migration *one = daemon->migrations.first; one; one = one->next) {
        if (one != except && !one->over && strcmp(one->start.name, name) == 0)
            return true;
    }
    return false;
}

bool migration_moves(const struct daemon *daemon, const char *name)
{
    return moves_otherwise(daemon, name, NULL);
}

void migration_heard_need(struct migration *migration, const struct order_need_guest *need)
{
    struct daemon *daemon = migration->daemon;
    char words[200] = "its VMM can't be started here";
    struct guest *guest;
    int result;

    if (migration->source || migration->over)
        return;
    if (!migration->start.name[0]) {
        daemon->migrations.unknown--;
        strcpy(migration->start.name, need->name);
        memcpy(migration->start.session, need->session, sizeof(need->session));
    }
    migration->arrival_pages = need->pages;
    migration->arrival_deadline_ns = loop_now(&daemon->loop) + ARRIVAL_S * NS_PER_S;
    if (moves_otherwise(daemon, migration->start.name, migration)) {
        refuse(migration, -EBUSY, "a guest of this name is on its way already");
        return;
    }
    if (!migration->arrived) {
        result = incoming_start(daemon, migration->start.name, &guest, words, sizeof(words));
        if (result) {
            refuse(migration, result, words);
            return;
        }
        migration->arrived = true;
        log_notice("guest '%s': it comes from %s; its VMM is pid %d", guest->name, migration->peer,
                   (int)guest->pid);
        events_emit(&daemon->events, "migration_started", guest->name,
                    json_pack("{s:s,s:s}", "role", "destination", "peer", migration->peer));
        save(daemon);
    }
    loop_timer_set(&daemon->loop, &migration->arrival, ARRIVAL_LOOK);
}

/* The agent of the VMM that was started has come, and has told of its RAM. If that is not what the
 * source has, it is the mover's to say, which compares the two. */
static void look_for_arrival(struct loop_timer *timer)
{
    struct migration *migration = timer->owner;
    struct daemon *daemon = migration->daemon;
    struct guest *guest = registry_find(daemon, migration->start.name);
    uint64_t now = loop_now(&daemon->loop);
    int fd, result;

    if (!guest) {
        refuse(migration, -ESRCH, "the VMM that was started for it has ended");
        return;
    }
    if (guest->account.managed_pages != migration->arrived_pages) {
        migration->arrived_pages = guest->account.managed_pages;
        migration->arrival_deadline_ns = now + ARRIVAL_MORE_S * NS_PER_S;
    }
    if (guest->account.managed_pages < migration->arrival_pages &&
        now < migration->arrival_deadline_ns) {
        loop_timer_set(&daemon->loop, timer, ARRIVAL_LOOK);
        return;
    }
    result = mover_process_reach_agent(guest, migration->start.role, &fd);
    if (result) {
        refuse(migration, result, "the agent of the VMM that was started for it did not come");
        return;
    }
    mover_process_give_guest(migration, 0, "", fd);
    close(fd);
}

static int start_afresh(struct migration *migration)
{
    struct order_start *start = &migration->start;
    int result = host_random(start->session, sizeof(start->session));

    start->epoch = start->data_port = 0;
    if (!result)
        result = mover_process_start(migration, -1);
    if (!result)
        migration->again = false;
    return result;
}

/* Its agent must be there for another mover: after a restart of memd that takes a moment. */
static void retry(struct loop_timer *timer)
{
    struct migration *migration = timer->owner;
    struct daemon *daemon = migration->daemon;
    struct guest *guest = registry_find(daemon, migration->start.name);
    int result;

    if (migration->over)
        return;
    if (!guest) {
        migration->status.outcome =
            migration->status.stage >= ORDER_STAGE_SWITCH && !migration->again ? ORDER_GUEST_LOST
                                                                               : ORDER_SOURCE_RUNS;
        snprintf(migration->words, sizeof(migration->words), "its VMM has ended");
        come_to_an_end(migration);
        return;
    }
    migration->start.takes_over = !migration->again;
    if (migration->again)
        result = start_afresh(migration);
    else
        result = guest->session ? mover_process_start(migration, -1) : -ENOTCONN;
    if (result && result != migration->no_mover && result != -ENOTCONN)
        log_error("guest '%s': no mover can be started: %s; trying on", guest->name,
                  mover_process_why(result));
    migration->no_mover = result;
    if (result)
        loop_timer_set(&daemon->loop, timer, RETRY_NS);
    else
        save(daemon);
}

void migration_lost_mover(struct migration *migration)
{
    struct daemon *daemon = migration->daemon;

    if (!migration->start.name[0]) {
        migration_forget(migration); /* nobody knows who that was */
        return;
    }
    if (migration->over)
        return;
    if (migration->again) {
        loop_timer_set(&daemon->loop, &migration->retry, migration->tries * NS_PER_S);
        return;
    }
    log_warning("guest '%s': its mover has died; another one takes over", migration->start.name);
    migration->before = migration->status;
    events_emit(&daemon->events, "mover_died", migration->start.name, NULL);
    if (!migration->source && !migration->arrived) {
        fail(migration, "its mover has died");
        return;
    }
    if (migration->untold && ++migration->deaths >= UNTOLD_MOST) {
        fail(migration, "no mover stays alive; look at memd's log");
        return;
    }
    if (++migration->deaths > DEATHS_MOST)
        log_error("guest '%s': no mover stays alive; trying on", migration->start.name);
    loop_timer_set(&daemon->loop, &migration->retry,
                   migration->deaths > 1 ? migration->deaths * RETRY_NS : 1);
}

/* ---- asked by the operator ---- */

static int check(const struct guest *guest, char *words, size_t words_bytes)
{
    const struct daemon *daemon = guest->daemon;
    const struct config *config = &daemon->config;

    if (migration_moves(daemon, guest->name)) {
        snprintf(words, words_bytes, "guest '%s' moves already", guest->name);
        return -EBUSY;
    }
    if (!config->plain && !config->tls_cert[0]) {
        snprintf(words, words_bytes,
                 "[migration] in memd.conf has no tls_cert, tls_key and tls_ca, and does not say "
                 "plain = yes");
        return -EPERM;
    }
    if (!guest->session) {
        snprintf(words, words_bytes, "guest '%s' has no agent that could move it", guest->name);
        return -EPERM;
    }
    if (!agents_can_move(guest->session)) {
        snprintf(words, words_bytes, "the agent in guest '%s' is too old to move it", guest->name);
        return -EPERM;
    }
    return 0;
}

static int prepare(struct migration *migration, const struct guest *guest,
                   const struct migration_request *request)
{
    struct order_start *start = &migration->start;
    uint16_t port;

    strcpy(start->name, guest->name);
    strcpy(start->vmm, guest->vmm);
    strcpy(migration->peer, request->to);
    start->precopy_only = request->precopy_only;
    start->postcopy_only = request->postcopy_only;
    start->bandwidth = request->bandwidth_bytes;
    if (!words_split_address(request->to, start->host, sizeof(start->host), &port) || port == 0)
        return -EINVAL;
    start->port = port;
    return host_random(start->session, sizeof(start->session));
}

int migration_begin(struct guest *guest, const struct migration_request *request, char *words,
                    size_t words_bytes)
{
    struct daemon *daemon = guest->daemon;
    int result = check(guest, words, words_bytes);
    struct migration *migration;

    if (result)
        return result;
    migration = migration_new(daemon, true);
    if (!migration)
        return -ENOMEM;
    result = prepare(migration, guest, request);
    if (result)
        snprintf(words, words_bytes, "'%s' is not HOST:PORT, with a port from 1 to 65535",
                 request->to);
    else if ((result = mover_process_start(migration, -1)))
        snprintf(words, words_bytes, "its mover can't be started: %s", mover_process_why(result));
    if (result) {
        migration_forget(migration);
        return result;
    }
    migration->untold = true;
    forget_old(daemon, migration);
    save(daemon);
    log_notice("guest '%s': it moves to %s", guest->name, migration->peer);
    events_emit(&daemon->events, "migration_started", guest->name,
                json_pack("{s:s,s:s}", "role", "source", "peer", migration->peer));
    return 0;
}

int migration_cancel(struct daemon *daemon, const char *name, char *words, size_t words_bytes)
{
    struct migration *migration = find(daemon, name);

    if (!migration || migration->over) {
        snprintf(words, words_bytes, "guest '%s' does not move", name);
        return -ENOENT;
    }
    if (!migration->status.may_cancel && migration->status.header.type) {
        snprintf(words, words_bytes,
                 "guest '%s' has been handed over: its move can't be called off any more", name);
        return -EBUSY;
    }
    migration->called_off = true;
    mover_process_say(migration, ORDER_CANCEL);
    if (migration->again || (migration->untold && migration->deaths)) {
        migration->status.outcome = ORDER_CANCELLED;
        come_to_an_end(migration);
    }
    return 0;
}

/* ---- the listener ---- */

static void take_peer(struct daemon *daemon, int fd, const struct sockaddr_storage *address,
                      socklen_t bytes)
{
    struct migration *migration =
        daemon->migrations.unknown < UNKNOWN_MAX ? migration_new(daemon, false) : NULL;
    char host[64] = "?", port[8] = "?";
    int result;

    (void)getnameinfo((const struct sockaddr *)address, bytes, host, sizeof(host), port,
                      sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV);
    if (!migration) {
        log_warning("a migration from %s was not taken: %u others have not said who they are", host,
                    daemon->migrations.unknown);
        close(fd);
        return;
    }
    daemon->migrations.unknown++;
    snprintf(migration->peer, sizeof(migration->peer), strchr(host, ':') ? "[%s]:%s" : "%s:%s",
             host, port);
    result = mover_process_start(migration, fd);
    if (result) {
        log_error("a mover for %s can't be started: %s", migration->peer,
                  mover_process_why(result));
        migration_forget(migration);
    }
}

static void can_accept(struct loop_watch *watch, uint32_t events)
{
    struct daemon *daemon = watch->owner;

    (void)events;
    for (int i = 0; i < ACCEPT_TURN; i++) {
        struct sockaddr_storage address;
        socklen_t bytes = sizeof(address);
        int fd = accept4(daemon->migrations.listener, (struct sockaddr *)&address, &bytes,
                         SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd < 0)
            return;
        take_peer(daemon, fd, &address, bytes);
    }
}

static void stop_listening(struct daemon *daemon)
{
    struct migrations *migrations = &daemon->migrations;

    loop_watch_remove(&daemon->loop, &migrations->arrivals);
    if (migrations->arrivals.fd >= 0)
        close(migrations->arrivals.fd);
    if (migrations->listener >= 0)
        close(migrations->listener);
    migrations->arrivals.fd = migrations->listener = -1;
    daemon->migrations.listens_at[0] = '\0';
}

static int start_listening(struct daemon *daemon)
{
    const char *where = daemon->config.migration_listen;
    struct migrations *migrations = &daemon->migrations;
    struct epoll_event event = {.events = EPOLLIN};

    if (!where[0])
        return 0;
    migrations->listener = control_listen_tcp(where);
    if (migrations->listener < 0) {
        log_error("[migration] listen = %s: %s", where, strerror(-migrations->listener));
        return migrations->listener;
    }
    strcpy(migrations->listens_at, where);
    migrations->arrivals = (struct loop_watch){.fd = epoll_create1(EPOLL_CLOEXEC),
                                               .events = POLLIN,
                                               .level = true,
                                               .ready = can_accept,
                                               .owner = daemon,
                                               .op = LOOP_NOT_QUEUED};
    if (migrations->arrivals.fd < 0 ||
        epoll_ctl(migrations->arrivals.fd, EPOLL_CTL_ADD, migrations->listener, &event))
        return -errno;
    if (daemon->config.plain)
        log_warning("[migration] plain = yes: whoever can reach %s may send guests here, and read "
                    "those that are sent",
                    where);
    return loop_watch_add(&daemon->loop, &migrations->arrivals);
}

void migration_reload(struct daemon *daemon)
{
    if (strcmp(daemon->migrations.listens_at, daemon->config.migration_listen) == 0)
        return;
    stop_listening(daemon);
    (void)start_listening(daemon);
}

/* ---- status ---- */

static void set(json_t *json, const char *name, uint64_t value)
{
    json_object_set_new(json, name, json_integer((json_int_t)value));
}

static void set_seconds(json_t *json, const char *name, uint64_t ns)
{
    json_object_set_new(json, name, json_real((double)ns / 1e9));
}

static void add_report(const struct order_status *status, json_t *json)
{
    set_seconds(json, "downtime_s", status->downtime_ns);
    set_seconds(json, "precopy_s", status->precopy_ns);
    set_seconds(json, "postcopy_s", status->postcopy_ns);
    set_seconds(json, "total_s", status->elapsed_ns);
    /* Scanners rest from the first pass, or the stop, until no page is remote. */
    set_seconds(json, "sharing_rested_s",
                status->precopy_ns + status->downtime_ns + status->postcopy_ns);
    set(json, "bytes_sent", status->bytes_sent);
    set(json, "pages_demand", status->pages_demand);
    set(json, "pages_pushed", status->pages_pushed);
    set(json, "pages_deduplicated", status->pages_slot);
    set(json, "pages_zero", status->pages_zero);
    set(json, "pages_resent", status->pages_resent);
    set(json, "reconnects", status->reconnects);
    json_object_set_new(json, "fault_us",
                        json_pack("{s:i,s:i,s:i,s:i}", "p50", (int)status->fault_p50_us, "p99",
                                  (int)status->fault_p99_us, "p999", (int)status->fault_p999_us,
                                  "max", (int)status->fault_max_us));
}

json_t *migration_status(const struct daemon *daemon, const char *name)
{
    const struct migration *migration = find(daemon, name);
    const struct order_status *status;
    json_t *json;

    if (!migration)
        return NULL;
    status = &migration->status;
    json =
        json_pack("{s:s,s:s,s:s,s:s,s:s,s:b,s:f,s:s}", "guest", name, "status",
                  outcome_names[status->outcome], "stage", stage_names[status->stage], "role",
                  migration->source ? "source" : "destination", "peer", migration->peer, "linked",
                  (int)status->linked, "began", migration->began_s, "reason", words_of(migration));
    if (!json)
        return NULL;
    set(json, "pid", (uint64_t)migration->pid);
    set(json, "pages", status->pages);
    set(json, "pages_left", status->pages_left);
    set(json, "pass", status->pass);
    set(json, "rate_bytes", status->rate_bytes);
    json_object_set_new(json, "left_s",
                        status->rate_bytes
                            ? json_real((double)status->pages_left * (double)PAGE_BYTES /
                                        (double)status->rate_bytes)
                            : json_null());
    add_report(status, json);
    return json;
}

/* ---- start and stop ---- */

static bool read_record(const json_t *json, struct migration *migration)
{
    const char *name, *peer, *session, *socket, *host, *outcome;
    int source, over, pid, port, data_port, listen_port, precopy_only;
    json_int_t start_time, bandwidth;
    double began;
    struct order_start *start = &migration->start;

    if (json_unpack(
            (json_t *)json, "{s:s,s:s,s:b,s:b,s:s,s:s,s:i,s:I,s:s,s:i,s:i,s:i,s:I,s:b,s:F,s:s}",
            "guest", &name, "peer", &peer, "source", &source, "over", &over, "session", &session,
            "socket", &socket, "pid", &pid, "start_time", &start_time, "host", &host, "port", &port,
            "data_port", &data_port, "listen_port", &listen_port, "bandwidth", &bandwidth,
            "precopy_only", &precopy_only, "began", &began, "outcome", &outcome) ||
        !words_are_name(name) || strlen(socket) >= sizeof(migration->socket) ||
        strchr(socket, '/') || strlen(peer) >= sizeof(migration->peer) ||
        strlen(host) >= sizeof(start->host) ||
        !unhex(session, start->session, sizeof(start->session)))
        return false;
    strcpy(start->name, name);
    strcpy(start->host, host);
    strcpy(migration->peer, peer);
    strcpy(migration->socket, socket);
    start->port = (uint32_t)port;
    start->data_port = (uint32_t)data_port;
    start->bandwidth = (uint64_t)bandwidth;
    start->precopy_only = (uint32_t)precopy_only;
    migration->listen_port = (uint16_t)listen_port;
    migration->pid = pid;
    migration->start_time = (uint64_t)start_time;
    migration->began_s = began;
    migration->source = source;
    migration->over = over;
    for (int i = 0; i < ORDER_OUTCOME_COUNT; i++) {
        if (strcmp(outcome, outcome_names[i]) == 0)
            migration->status.outcome = (uint32_t)i;
    }
    return true;
}

/* A migration of an earlier life of memd: its mover, or else another one. */
static void restore(struct daemon *daemon, const json_t *json)
{
    struct migration *migration = migration_new(daemon, true);
    uint64_t started;
    pid_t pid;

    if (!migration)
        return;
    if (!read_record(json, migration)) {
        migration->source = true;
        migration_forget(migration);
        return;
    }
    migration->arrived = !migration->source;
    pid = migration->pid;
    migration->pid = 0;
    if (migration->over)
        return;
    if (pid > 0 && host_process_start_time(pid, &started) == 0 &&
        started == migration->start_time) {
        migration->pid = pid;
        if (mover_process_find(migration) == 0) {
            log_notice("guest '%s': it moves; its mover was found again", migration->start.name);
            return;
        }
        migration->pid = 0;
    }
    loop_timer_set(&daemon->loop, &migration->retry, 1);
}

int migration_start(struct daemon *daemon)
{
    struct migrations *migrations = &daemon->migrations;
    json_t *records = state_read(daemon->state_dir, RECORDS_FILE), *record;
    size_t i;
    int result;

    migrations->listener = -1;
    migrations->arrivals = (struct loop_watch){.fd = -1, .op = LOOP_NOT_QUEUED};
    migrations->saver = (struct state_saver){.loop = &daemon->loop,
                                             .dir = daemon->state_dir,
                                             .name = RECORDS_FILE,
                                             .content = list_of_migrations,
                                             .saved = records_are_saved,
                                             .owner = daemon};
    result = state_subdirectory(daemon->state_dir, "movers", &migrations->dir);
    if (!result)
        result = start_listening(daemon);
    if (!result)
        json_array_foreach(records, i, record) restore(daemon, record);
    json_decref(records);
    return result;
}

void migration_stop(struct daemon *daemon)
{
    struct migrations *migrations = &daemon->migrations;

    state_saver_end(&migrations->saver);
    stop_listening(daemon);
    for (struct migration *one = migrations->first, *next; one; one = next) {
        next = one->next;
        if (!one->over)
            one->socket[0] = '\0'; /* its mover goes on there, and the next memd finds it */
        migration_forget(one);
    }
    if (migrations->dir >= 0)
        close(migrations->dir);
    migrations->dir = -1;
}
