/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest moves: the agent's end of what a mover asks for (mover_protocol.h).
 *
 * A thread of its own serves the mover, since the VMM's hooks may take long. It begins with the
 * first mover that memd sends and ends with the agent. The engine (outgoing, incoming) has threads
 * of its own and goes on without a mover; what a new mover must know is kept here.
 *
 * While pages are sent or expected the scanner neither scans nor merges: it would consume the marks
 * of written pages, move a written page where it has no mark, or read pages that are not here.
 * Shares that there are stay.
 *
 * Before COMMIT everything can be taken back, and is, if no mover is there for MOVER_PATIENCE_S:
 * the destination runs only after COMMIT was answered, so that a source that gives up by itself
 * refuses it from then on. After COMMIT nothing is ever taken back.
 */
#ifndef MEMD_AGENT_MIGRATION_H
#define MEMD_AGENT_MIGRATION_H

#include "incoming.h"
#include "mover_protocol.h"
#include "outgoing.h"

struct memd_vm;

struct migration {
    /* Any thread. */
    uint32_t holds;   /* 1: the scanner neither scans nor merges */
    struct lock gate; /* hooks are called by one thread at a time */
    struct lock posting;
    bool posted; /* a mover came */
    int next_fd;
    uint32_t next_role;
    uint32_t stop;
    bool started;        /* the scanner's thread: there is a thread */
    uint32_t urgent_tid; /* of a source; 0: none */
    int scanner_fd;      /* an eventfd: the scanner has something to tell memd */
    int wake_fd;         /* eventfds */
    int news_fd;
    pthread_t thread;

    /* The thread's own. */
    struct memd_vm *vm;
    int fd; /* the mover; -1: none */
    uint32_t role;
    uint32_t phase; /* enum mover_phase */
    uint8_t session[MOVER_SESSION_BYTES];
    uint32_t epoch;
    bool have_outgoing, have_incoming;
    bool mapping;    /* the final map is being written */
    bool committing; /* COMMIT was asked for and not answered */
    bool paused;     /* by us */
    bool told_mapped, told_proven;
    struct mover_proven proven; /* what was told, once */
    uint32_t pass_told;
    uint64_t alone_since_ns;
    uint64_t told_ns; /* the last PROGRESS */
    uint64_t told_pages;
    struct outgoing outgoing;
    struct incoming incoming;
};

/* Scanner's thread: a mover came, on this descriptor, which is taken over. */
void migration_take_mover(struct memd_vm *vm, uint32_t role, int fd);

/* Any thread: must scans and merges wait? */
bool migration_holds(const struct memd_vm *vm);

/* Scanner's thread: which thread answers the faults of a guest that has moved away (0: none), and
 * what to poll to hear that this has changed (-1: it can't). */
uint32_t migration_urgent_tid(const struct memd_vm *vm);
int migration_wakes(const struct memd_vm *vm);

/* Is the calling thread one of its own (a hook that wants to detach)? */
bool migration_is_caller(const struct memd_vm *vm);

/* The agent ends: what can be given up is, and the thread ends. No page may be remote. */
void migration_close(struct memd_vm *vm);

#endif
