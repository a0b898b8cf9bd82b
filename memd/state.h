/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state directory: JSON files that are replaced as a whole (a new file, then rename), so that a
 * kill at any moment leaves the old one or the new one. A lock keeps a second memd out.
 */
#ifndef MEMD_STATE_H
#define MEMD_STATE_H

#include <jansson.h>
#include <stdbool.h>

/* Opens (and makes, 0700) the directory and takes its lock. -EBUSY: another memd has it. */
int state_open(const char *path, int *ret_dir, int *ret_lock);
/* Makes and opens a directory inside it. */
int state_subdirectory(int dir, const char *name, int *ret_dir);

/* durable: on the disk when it returns (a word given to an operator); else it survives memd only.
 */
int state_write(int dir, const char *name, const json_t *json, bool durable);
/* A new reference, or NULL when there is none or it can't be read. */
json_t *state_read(int dir, const char *name);

#endif
