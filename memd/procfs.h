/* SPDX-License-Identifier: Apache-2.0 */
/* What memd reads under /proc about other processes. All of these are short reads that do not grow
 * with the size of the process. */
#ifndef MEMD_PROCFS_H
#define MEMD_PROCFS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Start time in clock ticks since boot: with the pid it names one process for good. */
int procfs_start_time(pid_t pid, uint64_t *ret_ticks);
/* True when the process has ended, or is about to (its main thread is on its way out). */
bool procfs_is_exiting(pid_t pid);
/* Does this thread belong to this process? */
bool procfs_has_thread(pid_t pid, pid_t tid);
/* CPU time that a thread has had. */
int procfs_thread_cpu_ns(pid_t pid, pid_t tid, uint64_t *ret_ns);
/* User and system time of a process, in ns (to the clock tick). */
int procfs_process_cpu_ns(pid_t pid, uint64_t *ret_ns);
/* One number from a "Name: number" or "Name number" file, in the file's own unit. */
int procfs_field(const char *path, const char *name, uint64_t *ret_value);
/* The process of this name (a kernel thread), or 0. */
pid_t procfs_find_kernel_thread(const char *name);
uint64_t procfs_host_memory_bytes(void);
/* The same from text that was read already: the number behind "name", 0 when it is not there. */
uint64_t procfs_number_in(const char *text, const char *name);

#endif
