/* SPDX-License-Identifier: Apache-2.0 */
/* Everything that memvm has to do with memd: see hook.c. */
#ifndef MEMVM_HOOK_H
#define MEMVM_HOOK_H

#include <memd/memd.h>
#include <stdbool.h>

struct machine;

/* What memd may ask of this VMM; each is given the struct machine. */
extern const struct memd_ops hook_ops;

/* Attaches to memd where the environment says so, and registers guest RAM, which must be empty
 * yet. Never fails: without memd the guest runs as it would have, and standard error says why. */
void hook_attach(struct machine *machine);

/* Guest RAM, registered and empty, gets its content from the file from `offset` on, while the
 * machine runs. The descriptor is ours from now on. False: that can't be had (without memd it
 * can't), nothing was done, and standard error says why. When it fails later the process ends. */
bool hook_restore(struct machine *machine, int fd, uint64_t offset);

/* These pages of guest RAM (whole ones) are empty from now on. Any thread. */
void hook_discard(struct machine *machine, void *at, size_t bytes);

#endif
