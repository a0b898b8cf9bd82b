/* SPDX-License-Identifier: Apache-2.0 */
/* QEMU's monitor, as far as moving a guest goes, in a thread of the test: it answers well, but
 * where the test wants it otherwise. */
#ifndef TESTS_UNIT_SCRIPTED_QEMU_H
#define TESTS_UNIT_SCRIPTED_QEMU_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DONE  "{\"return\": {}}\n"
#define CLOSE "close" /* the monitor's connection ends instead of an answer */

#define SCRIPTED_LINES_MAX 64U

struct scripted_answer {
    const char *command, *text;
};

struct scripted_qemu {
    char path[64];
    int listener;
    pthread_t thread;
    const struct scripted_answer *odd; /* what it answers in another way */
    size_t odd_count;
    const char *until; /* such a command: from then on nothing is odd any more */
    const char *status;
    char commands[SCRIPTED_LINES_MAX][32]; /* what it was asked, in order */
    char arguments[SCRIPTED_LINES_MAX][256];
    size_t asked;
    bool writes_nothing; /* to the descriptor, when it is told to */
    int given;           /* the descriptor that came with getfd, -1 */
    char loaded[8];      /* what it has read from there */
    uint64_t stopped_after_ns,
        stopped_before_ns; /* CLOCK_MONOTONIC; where it says by itself when */
};

extern struct scripted_qemu scripted_qemu;

void scripted_qemu_start(const char *status, const struct scripted_answer *odd, size_t odd_count);
/* When every client has closed its connection. */
void scripted_qemu_stop(void);

/* The arguments that the number-th use of this command came with, "" when there was none. */
const char *scripted_qemu_asked(const char *command, size_t number);
bool scripted_qemu_was_asked(const char *command);

#endif
