/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agents' side of memd: accepts connections, greets, receives messages and ring entries, and
 * hands each to who it concerns, by tables (session.c). A session is one connection.
 */
#ifndef MEMD_AGENTS_H
#define MEMD_AGENTS_H

#include "registry.h"

struct daemon;
struct session;

struct agents {
    struct loop_watch listener;
    char path[120];
    struct session *first;
    uint32_t count;   /* sessions whose connection is open */
    uint32_t sharing; /* of those: welcomed, with FEATURE_SHARE */
    int userfaultfd;  /* /dev/userfaultfd, or -1 */
    uint64_t ended_badly;
    uint64_t turned_away; /* connections for which there was no room */
    uint64_t turned_away_ns;
};

int agents_start(struct daemon *daemon);
void agents_stop(struct daemon *daemon);

/* revisit and CPU limit of every scanner, again. */
void agents_tune(struct daemon *daemon);
uint32_t agents_cpu_permille(const struct daemon *daemon);

/* After SIGHUP: another engine holds for the guests that are there, too. */
void agents_reload(struct daemon *daemon, const struct config *old);

/* Makes every page of the guest private. rejoin: it says hello again afterwards (another domain).
 */
int agents_detach(struct guest *guest, bool rejoin, const char *words);

/* Can the agent move its guest? */
bool agents_can_move(const struct session *session);
/* Gives the agent the socket of a mover (enum mover_role); it stays the caller's, too. -ENOTCONN,
 * -EOPNOTSUPP. */
int agents_give_mover(struct guest *guest, uint32_t role, int socket);

/* DETACHED came: ends the session; the guest rejoins or is forgotten. */
void agents_detached(struct session *session);
/* Two sessions of one guest that have ended, `now` within its own end: the one that stands for more
 * shares of the agent, which may come back, is kept (`before` may be NULL); the other is let go.
 * A connection that breaks before the agent has said what it has stands for little. */
struct session *agents_keep_one(struct session *before, struct session *now);
/* Gives up the shares of a session that has ended. */
void agents_let_go(struct session *session);
/* The guest is about to be freed: the session, living or lost, ends without it. */
void agents_forget_guest(struct session *session);
/* CPU time of the agent's two threads since memd knows them. */
uint64_t agents_cpu_ns(struct session *session);
bool agents_is_leaving(const struct session *session);
struct ksm_member *agents_member(const struct session *session);

#endif
