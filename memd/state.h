/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state directory: JSON files that are replaced as a whole (a new file, then rename), so that a
 * kill at any moment leaves the old one or the new one. A lock keeps a second memd out.
 */
#ifndef MEMD_STATE_H
#define MEMD_STATE_H

#include <jansson.h>
#include <stdbool.h>

#include "loop.h"

/* Opens (and makes, 0700) the directory and takes its lock. -EBUSY: another memd has it. */
int state_open(const char *path, int *ret_dir, int *ret_lock);
/* Makes and opens a directory inside it. */
int state_subdirectory(int dir, const char *name, int *ret_dir);

/* durable: on the disk when it returns (a word given to an operator); else it survives memd only.
 */
int state_write(int dir, const char *name, const json_t *json, bool durable);
/*
 * A file that is replaced in the background: kernel workers write a new one, wait for the disk, and
 * rename it, while the loop goes on. One replacement is under way at a time; what is asked for
 * meanwhile is one more, which takes the content as it is when that one begins.
 */
struct state_saver {
    struct loop *loop;
    int dir;
    const char *name; /* static storage */
    /* The content as it is now; a new reference, or NULL: no memory. */
    json_t *(*content)(void *owner);
    /* Everything up to `written` is there, or could not be (the log says so). May be NULL. */
    void (*saved)(void *owner);
    void *owner;
    uint64_t asked, written; /* counts of state_saver_ask() */

    struct loop_job job;
    uint32_t step;  /* of the replacement that is under way */
    uint64_t taken; /* what was asked for when it began; 0: none is under way */
    char fresh[64];
    char *text;
    uint32_t bytes;
    int fd;
    bool ending; /* none begins any more */
};

/* Asks for the file to be written; returns the count to compare with `written`. */
uint64_t state_saver_ask(struct state_saver *saver);
/* Waits, turn by turn of the loop, for what is under way; from now on nothing begins. */
void state_saver_settle(struct state_saver *saver);
/* What was asked for and did not begin is written at once. Nothing is under way. */
void state_saver_end(struct state_saver *saver);

/* A new reference, or NULL when there is none or it can't be read. */
json_t *state_read(int dir, const char *name);

#endif
