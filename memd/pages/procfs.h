/* SPDX-License-Identifier: Apache-2.0 */
/* What /proc/self says about our own address space; read by raw system calls, nothing allocated. */
#ifndef MEMD_PAGES_PROCFS_H
#define MEMD_PAGES_PROCFS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What is mapped at a range: each flag is true when it holds for any VMA in it. */
struct procfs_range {
    bool covered; /* mapped without a gap */
    bool file;    /* a file is behind it */
    bool shared;  /* MAP_SHARED */
    bool hugetlb;
    bool special; /* VM_IO, VM_PFNMAP, VM_MIXEDMAP */
    bool locked;  /* mlock */
    bool userfaultfd;
    bool read_write; /* readable and writable all through */
    bool dontfork, dontdump, hugepage, nohugepage;
};

/* Reads /proc/self/smaps. 0 or -errno. */
int procfs_inspect(const void *base, size_t bytes, struct procfs_range *ret_range);

/* How many VMAs this process has, or -errno. */
int procfs_count_vmas(void);

/* The first number in a file such as /proc/sys/vm/max_map_count, or -errno. */
long procfs_number(const char *path);

/* Is the running kernel older than this? (/proc/sys/kernel/osrelease; false when it can't be read.)
 */
bool procfs_kernel_below(unsigned major, unsigned minor);

/* Is this process within its RLIMIT_AS and RLIMIT_DATA, as far as can be told? */
bool procfs_within_limits(void);

/* Is there any swap space? True when that can't be read. */
bool procfs_swap_is_on(void);

/*
 * Lines of a file, without libc. `line` is called for each with a terminated copy of at most 511
 * bytes of it; a false answer ends the reading. Returns 0 or -errno.
 */
int procfs_lines(const char *path, bool (*line)(void *context, const char *text), void *context);

#endif
