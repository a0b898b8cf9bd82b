/* SPDX-License-Identifier: Apache-2.0 */
#include "domains.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "daemon.h"
#include "log.h"
#include "member.h"
#include "neutral.h"
#include "procfs.h"
#include "state.h"

#define NS_PER_S 1000000000ULL

/* ---- what domains say ---- */

static void event(void *owner, const struct trust_domain *domain, const char *event,
                  uint32_t segment, uint32_t pages)
{
    struct daemon *daemon = owner;
    json_t *more = json_pack("{s:s}", "domain", domain->name);

    if (strcmp(event, "store_full") == 0) {
        log_warning("the store is full (%" PRIu64 " MiB, [store] budget): what is shared stays "
                    "shared, nothing new is published",
                    daemon->domains.budget.limit_pages * PAGE_BYTES >> 20);
    } else if (more) {
        json_object_set_new(more, "segment", json_integer(segment));
        json_object_set_new(more, "pages", json_integer(pages));
    }
    events_emit(&daemon->events, event, NULL, more);
}

/* Descriptors also rest with the service manager, where there is one. */
static void park(void *owner, const struct trust_domain *domain, uint32_t segment, int fd)
{
    char words[200];

    (void)owner;
    if (!getenv("NOTIFY_SOCKET"))
        return;
    snprintf(words, sizeof(words), "%s=1\nFDNAME=memd.%" PRIu32 ".%s",
             fd >= 0 ? "FDSTORE" : "FDSTOREREMOVE", segment, domain->name);
    if (fd >= 0)
        (void)sd_pid_notify_with_fds(0, 0, words, &fd, 1);
    else
        (void)sd_notify(0, words);
}

/* What is not taken back must not rest there for ever: it would keep its memory. */
static void unpark(const char *name)
{
    char words[300];

    snprintf(words, sizeof(words), "FDSTOREREMOVE=1\nFDNAME=%s", name);
    (void)sd_notify(0, words);
}

static void add_counters(struct ksm_counters *sum, const struct ksm_counters *one)
{
    /* Nothing but counters of one type. */
    uint64_t *into = (uint64_t *)sum;
    const uint64_t *from = (const uint64_t *)one;

    for (size_t i = 0; i < sizeof(*sum) / sizeof(*into); i++)
        into[i] += from[i];
}

static void unlink_domain(struct daemon *daemon, const struct trust_domain *domain)
{
    struct trust_domain **place = &daemon->domains.first;

    while (*place != domain)
        place = &(*place)->next;
    *place = domain->next;
    add_counters(&daemon->domains.departed, &domain->counters);
}

/* A guest's own domain goes with its guest; the operator's stay. */
static void idle(void *owner, struct trust_domain *domain)
{
    struct daemon *daemon = owner;

    if (!domain->own && config_domain_find(&daemon->config, domain->name))
        return;
    unlink_domain(daemon, domain);
    trust_domain_stop(domain, true);
}

static const struct trust_domain_ops ops = {event, park, idle};

/* ---- finding and making ---- */

static void start_neutral(struct daemon *daemon, struct trust_domain *domain)
{
    const struct config_domain *configured = config_domain_find(&daemon->config, domain->name);

    if (domain->neutral)
        ksm_neutral_stop(domain->neutral);
    domain->neutral = NULL;
    if (domain->own || !configured || !configured->neutral_count)
        return;
    if (ksm_neutral_start(&daemon->loop, &domain->secret, configured->neutral,
                          configured->neutral_count, &domain->neutral))
        log_error("domain '%s': no memory for its neutral files", domain->name);
}

static int make_domain(struct daemon *daemon, const char *name, bool own,
                       struct trust_domain **ret_domain)
{
    uint64_t now = loop_now(&daemon->loop), until = daemon->domains.settle_until_ns;
    struct trust_domain_setup setup = {
        .loop = &daemon->loop,
        .budget = &daemon->domains.budget,
        .ops = &ops,
        .owner = daemon,
        .record_dir = daemon->domains.dir,
        .settle_ns = until > now ? until - now : 0,
    };
    struct trust_domain *domain;
    int result = trust_domain_start(name, own, &setup, &domain);

    if (result) {
        log_error("domain '%s' can't be made: %s", name, strerror(-result));
        return result;
    }
    start_neutral(daemon, domain);
    domain->next = daemon->domains.first;
    daemon->domains.first = domain;
    *ret_domain = domain;
    return 0;
}

static int find_or_make(struct daemon *daemon, const char *name, bool own,
                        struct trust_domain **ret_domain)
{
    for (struct trust_domain *domain = daemon->domains.first; domain; domain = domain->next) {
        if (domain->own == own && strcmp(domain->name + own, name) == 0) {
            *ret_domain = domain;
            return 0;
        }
    }
    return make_domain(daemon, name, own, ret_domain);
}

const char *domains_refusal(const struct daemon *daemon, const char *name, uid_t uid)
{
    const struct config_domain *configured = config_domain_find(&daemon->config, name);

    if (!configured)
        return "there is no such domain in memd.conf; add [domain NAME] with uids";
    if (!config_domain_admits(configured, uid))
        return "it does not admit the uid of this guest's VMM; add it to uids in memd.conf";
    return NULL;
}

/* A guest of the same name is another guest: its process is part of the name of its own domain. */
static void name_own(const struct guest *guest, char *ret_name)
{
    snprintf(ret_name, TRUST_DOMAIN_NAME_BYTES - 1, "%s@%d.%" PRIu64, guest->name, (int)guest->pid,
             guest->start_time);
}

int domains_for_guest(struct guest *guest, uid_t uid, struct trust_domain **ret_domain)
{
    struct daemon *daemon = guest->daemon;
    const char *refusal = guest->domain[0] ? domains_refusal(daemon, guest->domain, uid) : NULL;
    char own[TRUST_DOMAIN_NAME_BYTES];

    guest->domain_note[0] = '\0';
    if (refusal) {
        snprintf(guest->domain_note, sizeof(guest->domain_note),
                 "domain '%s': %s (uid %d); it "
                 "shares within itself only",
                 guest->domain, refusal, (int)uid);
        log_warning("guest '%s': %s", guest->name, guest->domain_note);
    }
    if (guest->domain[0] && !refusal)
        return find_or_make(daemon, guest->domain, false, ret_domain);
    name_own(guest, own);
    return find_or_make(daemon, own, true, ret_domain);
}

/* ---- start, stop, change ---- */

static void set_budget(struct daemon *daemon)
{
    uint64_t bytes = daemon->config.store_budget_bytes;

    if (!bytes)
        bytes = procfs_host_memory_bytes() / 4;
    daemon->domains.budget.limit_pages = bytes / PAGE_BYTES;
}

int domains_start(struct daemon *daemon)
{
    daemon->domains.settle_until_ns =
        loop_now(&daemon->loop) + (uint64_t)(daemon->config.grace_s * (double)NS_PER_S);
    set_budget(daemon);
    return state_subdirectory(daemon->state_dir, "domains", &daemon->domains.dir);
}

void domains_stop(struct daemon *daemon)
{
    while (daemon->domains.first) {
        struct trust_domain *domain = daemon->domains.first;

        daemon->domains.first = domain->next;
        trust_domain_stop(domain, false);
    }
    if (daemon->domains.dir >= 0)
        close(daemon->domains.dir);
    daemon->domains.dir = -1;
}

/* Can somebody come back to the domain of this name? While its guest lives, or it is configured. */
static bool is_useful(const struct daemon *daemon, const char *name)
{
    char own[TRUST_DOMAIN_NAME_BYTES];

    if (name[0] != '~')
        return config_domain_find(&daemon->config, name) != NULL;
    for (const struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        name_own(guest, own);
        if (strcmp(own, name + 1) == 0)
            return true;
    }
    return false;
}

/* A descriptor that the service manager kept: "memd.SEGMENT.DOMAIN". Owns fd. */
static void take_parked(struct daemon *daemon, const char *words, int fd)
{
    const struct ksm_record_segment *recorded;
    char name[TRUST_DOMAIN_NAME_BYTES];
    struct trust_domain *domain;
    uint32_t segment;

    if (sscanf(words, "memd.%" SCNu32 ".%111s", &segment, name) == 2 && is_useful(daemon, name) &&
        find_or_make(daemon, name + (name[0] == '~'), name[0] == '~', &domain) == 0) {
        recorded = ksm_record_find(&domain->record, segment);
        if (recorded && trust_domain_take_back(domain, segment, recorded->pages, fd) == 0)
            return;
    }
    unpark(words);
    close(fd);
}

static void take_all_parked(struct daemon *daemon)
{
    char **names = NULL;
    int count = sd_listen_fds_with_names(1, &names);

    for (int i = 0; i < count; i++) {
        take_parked(daemon, names[i], SD_LISTEN_FDS_START + i);
        free(names[i]);
    }
    free(names);
}

/* The name of the domain whose record this file is; false: it is no record. */
static bool domain_of_file(const char *file, char *ret_name)
{
    size_t length = strlen(file);

    if (length < 8 || length - 7 >= TRUST_DOMAIN_NAME_BYTES ||
        strcmp(file + length - 7, ".domain") != 0)
        return false;
    snprintf(ret_name, TRUST_DOMAIN_NAME_BYTES, "%.*s", (int)(length - 7), file);
    return true;
}

void domains_tidy(struct daemon *daemon)
{
    int copy = openat(daemon->domains.dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = copy < 0 ? NULL : fdopendir(copy);
    char name[TRUST_DOMAIN_NAME_BYTES];
    const struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        if (entry->d_name[0] != '.' &&
            !(domain_of_file(entry->d_name, name) && is_useful(daemon, name)))
            unlinkat(daemon->domains.dir, entry->d_name, 0);
    }
    if (dir)
        closedir(dir);
    else if (copy >= 0)
        close(copy);
    take_all_parked(daemon);
}

static bool same_neutral(const struct config_domain *a, const struct config_domain *b)
{
    if (!a || !b || a->neutral_count != b->neutral_count)
        return false;
    for (size_t i = 0; i < a->neutral_count; i++) {
        if (strcmp(a->neutral[i], b->neutral[i]) != 0)
            return false;
    }
    return true;
}

/* Whom the domain does not admit any more, or who is meant for it now, joins again. */
static void move_members(struct daemon *daemon)
{
    for (struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        const struct ksm_member *member = guest->session ? agents_member(guest->session) : NULL;
        bool refused = guest->domain[0] && domains_refusal(daemon, guest->domain, guest->uid);

        if (member && guest->domain[0] && refused != member->domain->own)
            (void)agents_detach(guest, true, "the configuration of its domain has changed");
    }
}

void domains_reload(struct daemon *daemon, const struct config *old)
{
    set_budget(daemon);
    for (struct trust_domain *domain = daemon->domains.first; domain; domain = domain->next) {
        domain->missed = true; /* there may be room, or content, that was not allowed before */
        if (!domain->own && !same_neutral(config_domain_find(old, domain->name),
                                          config_domain_find(&daemon->config, domain->name)))
            start_neutral(daemon, domain);
    }
    move_members(daemon);
}

struct ksm_counters domains_counters(const struct daemon *daemon)
{
    struct ksm_counters sum = daemon->domains.departed;

    for (const struct trust_domain *domain = daemon->domains.first; domain; domain = domain->next)
        add_counters(&sum, &domain->counters);
    return sum;
}
