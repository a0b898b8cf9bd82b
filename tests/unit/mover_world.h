/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two movers as processes, between two agents and two memds that are no more than the protocols.
 * Nothing of theirs runs by itself: a test turns the world until what it waits for is there.
 */
#ifndef TESTS_UNIT_MOVER_WORLD_H
#define TESTS_UNIT_MOVER_WORLD_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "mover_protocol.h"
#include "orders.h"

/* One host: its memd, its mover, its agent. */
struct side {
    struct world *world;
    bool source;
    pid_t mover;
    int memd;          /* to the mover */
    int mover_listens; /* where it waits for the next memd; kept for tests of that */
    int agent;         /* the agent's end */
    int offered_agent; /* destination: the mover's end, until it asks for its guest */
    int links[MOVER_CHANNELS];
    struct order_start start;
    struct order_status status;
    uint32_t needs; /* NEED_GUESTs */
    enum mover_phase phase;
    uint32_t epoch, asked[32], cuts;
    uint64_t pages;
    bool proven, map_here, refuses_commit;
    uint8_t session[MOVER_SESSION_BYTES];
    char place[64]; /* of its certificate */
};

struct world {
    struct side source, destination;
    int listener, data_listener;
    uint16_t port, data_port;
    bool tls;
    char dir[64];
};

void world_open(struct world *world, bool tls);
void world_close(struct world *world);
/* Ends every mover that was started in this process. */
void world_kill_all(void);
/* Starts the source's mover towards the destination, whose memd takes what comes. */
void world_begin(struct world *world);
/* A second mover in the place of one that has died. */
void world_replace(struct side *side);
void world_turn(struct world *world, int wait_ms);
/* Turns until it is so, or fails after 20 s. */
void world_until(struct world *world, const char *what, bool (*so)(struct world *world));
/* The agent's data connections fail. */
void world_cut(struct side *side);
/* A certificate for `name`, of the world's authority or of another one. */
void world_certify(struct world *world, struct side *side, bool other_authority);

#endif
