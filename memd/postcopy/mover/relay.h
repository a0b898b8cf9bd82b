/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Carries one data connection between TLS and an agent, which sees the clear end of a socketpair.
 * (Kernel TLS would let the agent hold the socket itself. Hosts are not sure to have it, and two
 * ways would have to be tested; the copy costs less than the cipher.)
 *
 * A thread for each connection, so that a demand fault never waits for the cipher of the bulk
 * connection. When either end is over, both are: the agent sees end of file, which it never takes
 * for success.
 */
#ifndef MEMD_POSTCOPY_MOVER_RELAY_H
#define MEMD_POSTCOPY_MOVER_RELAY_H

#include <pthread.h>

#include "link.h"

struct relay {
    struct link link; /* the thread's while it runs */
    int clear;        /* our end of the pair */
    pthread_t thread;
    bool runs;
};

/* Takes over a link that is up (it is empty afterwards). *ret_agent_fd: the agent's end, the
 * caller's. -errno: the link is closed. */
int relay_start(struct relay *relay, struct link *link, int *ret_agent_fd);
/* Cuts both ends and waits for the thread. Nothing when it does not run. */
void relay_stop(struct relay *relay);

#endif
