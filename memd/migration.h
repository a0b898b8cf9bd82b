/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guests that move: memd's part. A migration is a process of its own (memd-mover) and the two
 * agents; memd starts and watches it, tells who asks how far it is, and does what only memd may do:
 * start the VMM that a guest arrives in, by its own configuration, and end the one that it has
 * left.
 *
 * A mover that dies is replaced: the agent knows where things stand. A memd that dies is not
 * missed: the record in the state directory says which movers there are, and the next memd takes
 * them up.
 *
 * What the other host says comes as far as memd in two forms: the name of a guest, which the
 * configuration must have a section for, and words that are only shown.
 */
#ifndef MEMD_MIGRATION_H
#define MEMD_MIGRATION_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "config.h"
#include "loop.h"
#include "orders.h"
#include "state.h"

struct daemon;
struct guest;

struct migration {
    struct daemon *daemon;
    struct order_start start; /* what its mover was or will be told */
    struct order_status status;
    struct order_status before; /* of the mover that this one took over from */
    bool source, over;
    bool got_far; /* source: the destination has taken the guest once */
    bool again;   /* source: it is begun again when the present mover has ended */
    bool called_off;
    uint32_t tries;
    bool arrived;                     /* destination: its VMM was started */
    double began_s;                   /* wall clock, for people */
    uint64_t kept;                    /* over: the record with that in it has to be written first */
    uint16_t listen_port;             /* destination: of its mover */
    char peer[ORDERS_WORD_BYTES + 8]; /* HOST:PORT */
    char socket[16];                  /* the name of its mover's own socket */
    char words[200];                  /* memd's own, when it failed before there was a mover */

    pid_t pid; /* the mover; 0: there is none */
    uint64_t start_time;
    struct loop_watch death, orders;
    struct loop_timer retry; /* a mover is to be started, or looked for */
    uint32_t deaths;         /* movers that died one after the other */
    int no_mover;            /* why none could be started when that was last tried */
    bool untold;             /* it began here, and none of its movers has said a word yet */

    /* destination: the guest's VMM is being started */
    struct loop_timer arrival;
    uint64_t arrival_pages, arrived_pages, arrival_deadline_ns;

    struct migration *next;
};

struct migrations {
    struct migration *first;
    struct state_saver saver;
    int dir; /* of the movers' sockets */
    int listener;
    /* Through an epoll of its own: what io_uring polls outlives a memd that was killed for a
     * moment, and would keep the port from the next one. */
    struct loop_watch arrivals;
    char listens_at[CONFIG_WORD_BYTES];
    uint64_t next_stranger_ns; /* when one is worth a line again */
    bool full;                 /* and it has been said */
    uint32_t unknown;          /* destinations whose mover has not said yet which guest it is */
};

/* One that nothing is known of yet, listed; NULL: no memory. */
struct migration *migration_new(struct daemon *daemon, bool source);
/* It is listed no more, and freed; its mover goes on. */
void migration_forget(struct migration *migration);

int migration_start(struct daemon *daemon);
void migration_stop(struct daemon *daemon);
void migration_reload(struct daemon *daemon);

struct migration_request {
    char to[CONFIG_WORD_BYTES];
    bool precopy_only, postcopy_only;
    uint64_t bandwidth_bytes; /* 0: what the configuration says */
};

/* Starts to move the guest. -EINVAL, -EBUSY (it moves already), -EPERM (the configuration or the
 * VMM does not allow it), -EAGAIN (no agent). words: for people. */
int migration_begin(struct guest *guest, const struct migration_request *request, char *words,
                    size_t words_bytes);
/* -ENOENT: this guest does not move; -EBUSY: it can't be called off any more. */
int migration_cancel(struct daemon *daemon, const char *name, char *words, size_t words_bytes);
/* Does it move, to this host or from it? */
bool migration_moves(const struct daemon *daemon, const char *name);
/* The latest migration of the guest, a new reference; NULL: there is none. */
json_t *migration_status(const struct daemon *daemon, const char *name);

/* ---- mover_process.c ---- */

/* Starts its mover and gives it START. Owns first (the peer's connection, or -1). A result below 0
 * is told by mover_process_why(). */
int mover_process_start(struct migration *migration, int first);
const char *mover_process_why(int result);
/* Looks for the mover of an earlier memd. -ECONNREFUSED: it is gone. */
int mover_process_find(struct migration *migration);
void mover_process_say(struct migration *migration, uint32_t order);
/* Stops watching it. The mover goes on. */
void mover_process_let_go(struct migration *migration);
void mover_process_give_guest(struct migration *migration, int result, const char *words,
                              int agent_fd);
/* A socket to the guest's agent that speaks mover_protocol.h. -ENOTCONN, -EOPNOTSUPP. */
int mover_process_reach_agent(struct guest *guest, uint32_t role, int *ret_fd);

/* A message of the mover's, which hears strangers and is not believed. False: it is of no form that
 * there is. */
bool mover_process_take(struct migration *migration, const uint8_t *message, size_t bytes);

/* What it hears. */
void migration_heard_status(struct migration *migration, const struct order_status *status);
void migration_heard_need(struct migration *migration, const struct order_need_guest *need);
void migration_lost_mover(struct migration *migration);

/* ---- incoming.c ---- */

/* Starts the VMM that the configuration has for a guest that arrives, registered as that guest.
 * words: for the other host's operator, too. */
int incoming_start(struct daemon *daemon, const char *name, struct guest **ret_guest, char *words,
                   size_t words_bytes);

#endif
