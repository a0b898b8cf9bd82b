/* SPDX-License-Identifier: Apache-2.0 */
/*
 * As much of memd as an agent needs to go on: a thread that greets it, reads all that it says, and
 * passes on what the test wants to be merged. The agent is the real one, with its threads.
 */
#ifndef TESTS_UNIT_AGENT_MEMD_H
#define TESTS_UNIT_AGENT_MEMD_H

#include <pthread.h>
#include <sys/types.h>

#include "protocol.h"

#define MEMD_END_PATH_BYTES 64U

struct memd_end {
    char path[MEMD_END_PATH_BYTES];
    int listener, fd; /* fd -1: no agent is here */
    pthread_t thread;
    pthread_mutex_t lock;
    bool stop;
    struct ring *ring;
    uint32_t head;
    char reason[PROTOCOL_TEXT_BYTES]; /* of the last STATS */
    uint32_t messages;                /* heard, ever */
};

void memd_end_start(struct memd_end *end);
void memd_end_stop(struct memd_end *end);
/* Removes what that of a process that was killed has left. */
void memd_end_forget(pid_t process);

/* Gives the agent a segment (fd stays the caller's). */
void memd_end_give(struct memd_end *end, uint32_t segment, uint32_t pages, int fd);
/* Tells it how often to look. */
void memd_end_tune(struct memd_end *end, uint32_t revisit_ms);
/* Tells it to merge pages with slots, both ascending. */
void memd_end_merge(struct memd_end *end, uint32_t page, uint32_t slot, uint32_t pages);
/* The same, page + i with slots[i]. */
void memd_end_merge_scattered(struct memd_end *end, uint32_t page, const uint32_t *slots,
                              uint32_t pages);
/* Gives the agent a mover (fd stays the caller's). */
void memd_end_give_mover(struct memd_end *end, uint32_t role, int fd);
/* Does the last reason that the agent gave contain these words? */
bool memd_end_heard(struct memd_end *end, const char *words);

#endif
