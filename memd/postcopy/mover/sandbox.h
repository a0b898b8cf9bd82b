/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a mover can still do once it talks to strangers: move bytes between the descriptors that it
 * has, make and take TCP connections, have memory and threads. It opens no file, starts no program,
 * signals and traces nobody, and is a user that owns nothing.
 *
 * Stages, in order: limits; no new privileges, no core; the user; no file system (Landlock, where
 * the kernel has it); the filter of system calls. What is refused fails with EPERM.
 */
#ifndef MEMD_POSTCOPY_MOVER_SANDBOX_H
#define MEMD_POSTCOPY_MOVER_SANDBOX_H

#include <sys/types.h>

/* As root the process becomes uid and gid; another user stays what it is. -errno: the mover must
 * not go on. `ret_stage` says which stage failed (static storage). */
int sandbox_enter(uid_t uid, gid_t gid, const char **ret_stage);

#endif
