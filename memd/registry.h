/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guests: who is registered, which process it is, what it was promised, how it shares.
 *
 * A guest comes by POST (memctl run), belongs to the caller's uid until its agent says HELLO with
 * the token it was given, and goes when its process dies (seen through a pidfd) or when it is
 * detached. A VMM that daemonizes is another process than the one that was registered: its guest
 * goes when that one died before any agent said hello, and none does within grace_s.
 *
 * What is promised comes from three places; the first that says something counts: `memctl set`
 * (kept in the state directory, by name), the configuration file's [guest NAME], the request.
 *
 * The list of guests is kept too, so that a memd that was killed finds the living again. It is
 * written in the background; who registers a guest is answered when that guest is in it.
 */
#ifndef MEMD_REGISTRY_H
#define MEMD_REGISTRY_H

#include <jansson.h>

#include "config.h"
#include "ledger.h"
#include "loop.h"
#include "protocol.h"
#include "state.h"

struct daemon;
struct session;
struct trust_domain;

#define GUEST_BLOCKS_MAX 256U
#define SHARES_DEFAULT   1000U
#define GUEST_WORDS      256U

enum guest_engine { ENGINE_NONE, ENGINE_AGENT, ENGINE_KERNEL, ENGINE_XEN, ENGINE_COUNT };
enum guest_presence { AGENT_NONE, AGENT_CONNECTED, AGENT_LOST, AGENT_PRESENCE_COUNT };

/* What somebody said about a guest; absent values are not set. */
struct guest_wish {
    bool has_max, has_min, has_shares, has_domain;
    uint64_t max_bytes, min_bytes;
    uint32_t shares;
    char domain[NAME_BYTES]; /* "": its own */
};

struct guest_block {
    uint32_t first_page, pages;
    uint64_t hva;
    bool managed;
    char reason[PROTOCOL_TEXT_BYTES];
};

struct guest {
    struct daemon *daemon;
    char name[NAME_BYTES];
    char token[PROTOCOL_TOKEN_BYTES + 1];
    uid_t uid;
    pid_t pid; /* 0: not known (another pid namespace) */
    uint64_t start_time;
    struct loop_watch death; /* on its pidfd */
    char vmm[32];
    char qmp[GUEST_WORDS];
    enum guest_engine engine;
    bool waiting_for_hello;
    bool found_again; /* by a memd that was started since: it may not know that it is registered */
    bool daemonizes;  /* another process may say hello when the one that was registered is gone */
    char reason[GUEST_WORDS];      /* why the engine is not the agent, or what is wrong with it */
    char domain_note[GUEST_WORDS]; /* why it is not in the domain that it was meant for */

    struct guest_wish asked; /* by the request */
    char domain[NAME_BYTES]; /* what follows from wish, file and request; "": its own */
    struct ledger_account account;

    enum guest_presence presence;
    struct session *session; /* the one that lives, or NULL */
    struct session *lost;    /* one that ended while its shares may come back */
    struct message_stats stats;
    bool has_stats;
    bool places_stated; /* since its RAM changed last */
    struct guest_block blocks[GUEST_BLOCKS_MAX];
    uint32_t block_count;
    uint64_t agent_cpu_ns;                /* of its agents' threads, up to the last look */
    uint64_t resident_bytes, shmem_bytes; /* PSS of the VMM, and the shmem part of it */
    bool over;                            /* about to be freed: being detached */

    struct loop_timer hello_timer, grace_timer;
    struct guest *next;
};

struct registry {
    struct guest *first;
    uint32_t count;
    json_t *wishes;           /* what memctl set said: name -> {max_bytes, ...} */
    struct state_saver saver; /* of the list of guests */
    /* Of agents of guests that have gone. */
    uint64_t departed_cpu_ns, departed_merges, departed_unmerges, departed_mismatches;
};

/* What a request to register says. */
struct guest_request {
    char name[NAME_BYTES];
    pid_t pid;
    uid_t uid;
    char vmm[32];
    enum guest_engine engine;
    bool daemonizes;
    char reason[GUEST_WORDS];
    char qmp[GUEST_WORDS];
    struct guest_wish wish;
};

/* Takes back what the state directory knows of living guests. */
int registry_start(struct daemon *daemon);
void registry_stop(struct daemon *daemon);

/* -EEXIST: a living guest has the name. -ENOSPC: the guarantee does not fit. -ESRCH: no such
 * process. -EBUSY: the ledger does not add up. words: for people. */
int registry_add(struct daemon *daemon, const struct guest_request *request,
                 struct guest **ret_guest, char *words, size_t words_bytes);
/* Forgets the guest; its session, if any, is ended. event: what is said about it. */
void registry_remove(struct guest *guest, const char *event, const char *why);

/* Ends its VMM; the guest goes when that is seen. */
void registry_end_process(struct guest *guest, const char *why);

struct guest *registry_find(const struct daemon *daemon, const char *name);
struct guest *registry_find_token(const struct daemon *daemon, const char *token);

/* memctl set: kept durably, then applied. -ENOSPC, -ENOENT (no such domain), -EPERM (the domain
 * does not admit the guest's uid); nothing has changed then. */
int registry_wish(struct guest *guest, const struct guest_wish *wish, char *words,
                  size_t words_bytes);
/* The configuration has changed: promises and domains follow. */
void registry_reload(struct daemon *daemon, const struct config *old);

/* The agent of this process has said hello. */
int registry_agent_came(struct guest *guest, struct session *session, pid_t pid, uid_t uid);
/* Its session is over; the process may live on. */
void registry_agent_left(struct guest *guest, const char *why);
/* Shares of a session that ended are let go now. */
void registry_let_go(struct guest *guest);
void registry_set_engine(struct guest *guest, enum guest_engine engine, const char *reason);
/* The list of guests has changed: it is going to be written. */
void registry_save(struct daemon *daemon);
/* The answer goes to who registered the guest: from now on its agent is waited for. */
void registry_expect_hello(struct guest *guest);

const char *registry_engine_name(enum guest_engine engine);
const char *registry_presence_name(enum guest_presence presence);

/* CPU time of all agents there are and were. Reads two small files for each agent. */
uint64_t registry_agents_cpu_ns(struct daemon *daemon);

#endif
