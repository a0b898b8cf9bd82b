/* SPDX-License-Identifier: Apache-2.0 */
/* The whole machine in a file: see snapshot.c. */
#ifndef MEMVM_SNAPSHOT_H
#define MEMVM_SNAPSHOT_H

#include "state.h"

#define SNAPSHOT_RAM_AT (1UL << 20) /* where RAM lies in the file */

/* Writes the machine, which must be paused, into a new file at `path`; an older one is replaced
 * only when all is written. 0 or -errno; says why. */
int snapshot_save(struct machine *machine, const char *path);

struct snapshot {
    int fd;
    struct machine_state state;
};

/* First half of loading: what kind of machine is in the file. 0 or -errno; says why. */
int snapshot_open(const char *path, struct snapshot *ret_snapshot);

/* Second half: into a machine of that kind that was never started. With `lazy` its memory comes
 * while it runs, where that can be had. Closes the file. 0 or -errno; says why. */
int snapshot_load(struct snapshot *snapshot, struct machine *machine, bool lazy);

#endif
