/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One mover: everything it holds, and what its parts call each other for. main.c has the theory.
 *
 *   orders.c      memd: what it wants, what it is told
 *   agent.c       the agent: requests and answers
 *   connect.c     the other mover: connections, and who may have them
 *   talk.c        the other mover: frames of the control connection
 *   precopy.c     when pre-copy has done what it can (pure)
 *   session.c     what follows from what (pure)
 */
#ifndef MEMD_POSTCOPY_MOVER_MOVER_H
#define MEMD_POSTCOPY_MOVER_MOVER_H

#include <netinet/in.h>

#include "clock.h"
#include "link.h"
#include "mover_protocol.h"
#include "orders.h"
#include "precopy.h"
#include "relay.h"
#include "session.h"

#define NS_PER_MS 1000000ULL
#define NS_PER_S  1000000000ULL

#define GREETED_MAX 8U /* connections that have not said yet what they are for */

struct transfer { /* of the state of vCPUs and devices */
    int fd;
    uint64_t bytes, done;
};

struct mover {
    struct order_start start;
    struct session session;
    struct session_event waiting[16];
    uint32_t waiting_count;
    bool in_event;
    uint64_t now_ns; /* the clock is read once a turn */
    uint64_t began_ns;
    bool forget;                 /* memd has noted the outcome */
    char words[PEER_TEXT_BYTES]; /* what went wrong, for people */

    /* memd */
    int memd, memd_listener;
    uint64_t status_due_ns;
    bool status_news;

    /* the agent */
    int agent;
    int monitor;         /* QEMU's, until the driver has it; -1 */
    bool agent_is_known; /* HELLO and all regions have come */
    struct mover_hello hello;
    struct mover_region regions[PEER_REGIONS_MAX];
    uint32_t region_count;
    struct mover_progress progress;
    struct mover_proven proof;

    /* the other mover */
    struct link_tls *tls;
    struct sockaddr_storage address; /* source: of the other memd, then of its mover */
    socklen_t address_bytes;
    int listener; /* destination */
    int first;    /* destination: the connection that memd has taken, until the sandbox is closed */
    struct link control, data[MOVER_CHANNELS];
    struct link greeted[GREETED_MAX]; /* destination */
    struct relay relays[MOVER_CHANNELS];
    int held[MOVER_CHANNELS]; /* copies of the data connections' sockets, to cut and to count by */
    uint32_t epoch;
    uint8_t session_id[PEER_SESSION_BYTES];
    uint8_t print[LINK_PRINT_BYTES]; /* of the certificate that the session began with */
    bool has_print;
    struct peer_hello peer; /* destination: what the source said */
    struct peer_figures peer_figures;
    uint32_t data_port;
    bool connecting;       /* source: control is to be made */
    uint64_t retry_due_ns; /* the next try */
    uint64_t backoff_ns;
    uint32_t reconnects;

    struct transfer state;
    struct precopy precopy;
    uint64_t linger_ns; /* it is over, and the last words are given so long to arrive */
    bool said_all;
    uint64_t late_ns;  /* the present state has lasted too long then; 0: it may last */
    uint64_t asked_ns; /* the agent, the latest request */
    uint64_t stop_ns, run_ns, precopy_ns, end_ns;
    uint64_t past_bytes; /* of connections that have ended, both directions */
};

/* Turns until memd has noted how it ended. 0, or -errno when polling fails. */
int mover_run(struct mover *mover);

/* Tells the session, and does what it says. NULL: only what it has said already. Called within
 * itself it waits for its turn. */
void mover_event(struct mover *mover, const struct session_event *event);
/* It ends before it has begun: the guest runs where it is. */
void mover_fail(struct mover *mover);
/* A connection has ended: the others end with it. */
void mover_cut(struct mover *mover, int error, const char *why);
/* What somebody says was `ago_ns`: not before `least_ns`, whatever he says. */
uint64_t mover_time(const struct mover *mover, uint64_t least_ns, uint64_t ago_ns);
/* The words that the operator sees; the first ones stay. */
void mover_say_why(struct mover *mover, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* ---- orders.c ---- */

/* What memd-mover was started for; the descriptors go where they belong. -EPROTO. */
int orders_receive_start(struct mover *mover);
/* Where there are an agent and a monitor, the two become one. 0 or -errno: the agent is gone. */
int orders_drive_monitor(struct mover *mover);
/* Each reads all there is. */
void orders_read(struct mover *mover);
void orders_accept(struct mover *mover);
void orders_send_status(struct mover *mover);
void orders_need_guest(struct mover *mover);

/* ---- agent.c ---- */

void agent_read(struct mover *mover);
/* A request; what it needs besides is in the mover. */
void agent_ask(struct mover *mover, uint32_t what);
/* Both data connections, as they are. */
void agent_link(struct mover *mover);

/* ---- connect.c ---- */

void connect_control(struct mover *mover);
void connect_data(struct mover *mover);
void connect_reset_backoff(struct mover *mover);
void connect_drop(struct mover *mover);
/* Nothing is connected yet. */
void connect_init(struct mover *mover);
/* Destination: the first connection, which memd has accepted. */
int connect_take_first(struct mover *mover, int fd);
void connect_accept(struct mover *mover);
/* Steps every connection that is not greeted yet, and looks at times. */
void connect_step(struct mover *mover);
/* Bytes in both directions, as the network sees them. */
uint64_t connect_bytes(const struct mover *mover);

/* ---- talk.c ---- */

void talk_say(struct mover *mover, enum peer_type type, int value);
/* Reads frames, sends heartbeats and pieces of the state. */
void talk_step(struct mover *mover);
/* It is over: until the other has heard the last words, or had time enough. */
void talk_linger(struct mover *mover);
/* NULL, or why the regions of both sides do not fit. */
const char *talk_compare(const struct mover *mover);

#endif
