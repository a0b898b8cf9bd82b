/* SPDX-License-Identifier: Apache-2.0 */
/* What memd reads under /proc. All of these are short reads that do not grow with the size of a
 * process. */
#ifndef MEMD_PROCFS_H
#define MEMD_PROCFS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The text of a small file, ended by a zero byte; what does not fit is cut off. */
int procfs_text(const char *path, char *text, size_t bytes);
/* Field number (from 3 on, as in proc(5)) of /proc/PID/stat. */
int procfs_stat_field(pid_t pid, int number, uint64_t *ret_value);
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
