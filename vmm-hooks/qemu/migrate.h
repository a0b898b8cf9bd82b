/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moving a stock QEMU: the monitor's part of it. QEMU carries its device state only, through a
 * descriptor; the guest's RAM is the agent's. migrate.c says in which order, and why.
 *
 * Every call waits for QEMU, each with a limit (seconds for a command, half a minute for the
 * state): call it on a thread that has nothing else to do. 0 or -errno, and after an error
 * qemu_migrate_why() has a sentence for the operator. Not for several threads at once.
 */
#ifndef MEMD_QEMU_MIGRATE_H
#define MEMD_QEMU_MIGRATE_H

#include <stdbool.h>
#include <stdint.h>

struct qemu_migrate;

/* A QEMU with a monitor at this path; it is connected to when it is first asked something, and
 * again when the connection was lost. A monitor serves one client at a time: ours keeps it until
 * the close. 0, -ENOMEM or -ENAMETOOLONG. */
int qemu_migrate_open(const char *qmp_path, struct qemu_migrate **ret_vm);
/* The same with a connection that is there already, and ours from then on also when this fails; it
 * is not made again when it is lost. */
int qemu_migrate_open_fd(int qmp_fd, struct qemu_migrate **ret_vm);
void qemu_migrate_close(struct qemu_migrate *vm);
/* Why the latest call failed; "" when it did not. Valid until the next call. */
const char *qemu_migrate_why(const struct qemu_migrate *vm);

/* What can be done before the guest is stopped, or before its state has come: sets capabilities.
 * Both sides; left out, it is done when it is needed, and costs downtime. Put back by
 * qemu_migrate_resume(), or by unprepare, which leaves the guest alone. */
int qemu_migrate_prepare(struct qemu_migrate *vm);
void qemu_migrate_unprepare(struct qemu_migrate *vm);
/* Another process has prepared it, and died: unprepare and resume put QEMU's defaults back, so that
 * no migration of QEMU's own leaves the guest's RAM out. */
void qemu_migrate_inherit(struct qemu_migrate *vm);

/* ---- the source ---- */

/* Can it be moved at all? Changes nothing. -ENOTSUP: no, and why not. */
int qemu_migrate_check(struct qemu_migrate *vm);

/* Does it stand still, as after a save, or is it being saved? False also when QEMU does not say. */
bool qemu_migrate_is_stopped(struct qemu_migrate *vm);

/* The guest's device state into the descriptor: best a memfd, into which it is written from the
 * beginning; where it is a pipe or a socket, somebody must read it meanwhile. The guest runs until
 * nothing else is left to be saved. After 0 it stands still: no vCPU runs and no I/O to its memory
 * is under way. After an error nobody knows: qemu_migrate_resume(). *ret_stopped_ns is since when
 * it stands still, in nanoseconds of CLOCK_MONOTONIC. */
int qemu_migrate_save(struct qemu_migrate *vm, int fd, uint64_t *ret_stopped_ns);
/* Of what was saved. -EXDEV: QEMU has moved RAM too, so what it wrote must not be used. */
int qemu_migrate_check_saved(struct qemu_migrate *vm);

/* The guest runs on here, whatever was done before, also when that failed half-way. */
int qemu_migrate_resume(struct qemu_migrate *vm);

/* ---- the destination ---- */

/* Is it a QEMU that waits (-incoming defer) and has its RAM where it must be? Changes nothing.
 * -ENOTSUP. From its start until the load it has touched none of that RAM. */
int qemu_migrate_check_incoming(struct qemu_migrate *vm);

/* QEMU waits for the state's first byte. Left out, it is done by the load, and costs downtime. */
int qemu_migrate_await(struct qemu_migrate *vm);

/* Loads the state, which is all of this file. QEMU reads and writes guest RAM meanwhile, so its
 * pages must be there or be served. After 0 the guest is stopped, with all of its state.
 * -ECONNRESET: QEMU has ended over it, as it does when it can't load a state. */
int qemu_migrate_load(struct qemu_migrate *vm, int fd);

/* The guest runs, since *ret_began_ns of CLOCK_MONOTONIC. (To put the capabilities back is left to
 * the caller: a QEMU whose guest runs answers late.) */
int qemu_migrate_run(struct qemu_migrate *vm, uint64_t *ret_began_ns);

/* ---- either ---- */

/* QEMU ends; it has said yes, and may take a moment. */
int qemu_migrate_quit(struct qemu_migrate *vm);

#endif
