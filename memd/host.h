/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What memd takes from the machine that it runs on: time, chance, and what is known about other
 * processes. This is the one door for all of it, so that a simulated machine (vmm-hooks/sim) can
 * stand in at link time and a run can be repeated to the byte.
 *
 * Not here: what memd makes itself (memfds, sockets, files), which is the same everywhere, and
 * readiness, which is the loop's (loop_kernel.h).
 */
#ifndef MEMD_HOST_H
#define MEMD_HOST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* CLOCK_MONOTONIC. The loop reads it once a turn (loop_now); who else does has a reason beside it.
 */
uint64_t host_clock_ns(void);
/* Seconds since 1970, for people. */
double host_wall_seconds(void);
/* CPU time that memd itself has had. */
uint64_t host_own_cpu_ns(void);

/* Bytes that nobody can guess. -EIO: this machine has none; nothing useful is in `into` then. */
int host_random(void *into, size_t bytes);

/* A descriptor that gets readable when the process has ended; the caller's. -ESRCH: no such one. */
int host_process_open(pid_t pid);
/* Kills it, by that descriptor. */
void host_process_end(int process);
/* Start time in clock ticks since boot: with the pid it names one process for good. */
int host_process_start_time(pid_t pid, uint64_t *ret_ticks);
/* True when the process has ended, or is about to (its main thread is on its way out). */
bool host_process_is_exiting(pid_t pid);
/* Does this thread belong to this process? */
bool host_process_has_thread(pid_t pid, pid_t tid);
/* CPU time that a thread has had. */
int host_thread_cpu_ns(pid_t pid, pid_t tid, uint64_t *ret_ns);

/* Who is at the other end of a connected unix socket, by the kernel's word. */
int host_peer(int socket, uid_t *ret_uid, pid_t *ret_pid);

/* Where the knobs of kernel KSM are. Static storage. */
const char *host_ksm_directory(void);

#endif
