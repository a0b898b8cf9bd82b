/* SPDX-License-Identifier: Apache-2.0 */
/* Where analyze takes pages from: raw dumps and live guests, both as one stretch of memory. */
#ifndef MEMD_CTL_ANALYZE_SOURCE_H
#define MEMD_CTL_ANALYZE_SOURCE_H

#include <sys/stat.h>

#include "units.h"

#define ANALYZE_WHY_CHARS 256

/* A file, mapped for reading. */
struct analyze_file {
    int fd;
    const uint8_t *bytes;
    uint64_t pages;
    struct stat status; /* as it was when it was opened */
};

/* A block of a live guest's RAM. */
struct analyze_block {
    uint64_t hva;
    uint64_t pages;
};

struct analyze_source {
    const char *name; /* borrowed */
    struct analyze_file now;
    struct analyze_file earlier; /* fd -1: none */
};

/* Maps the raw dump at `path`. 0, or -errno with the words in `why`: no such file, no regular
 * file, empty, not whole pages, an ELF core. */
int ctl_analyze_open_dump(const char *path, struct analyze_file *ret_file,
                          char why[ANALYZE_WHY_CHARS]);

/* Copies the RAM of process `pid` into a file without a name and maps that. Pages that the process
 * does not have count as zeros and are not touched; the process runs on meanwhile, so that pages
 * are of slightly different ages. 0, or -errno with the words in `why`. */
int ctl_analyze_open_blocks(int pid, const struct analyze_block *blocks, size_t count,
                            struct analyze_file *ret_file, char why[ANALYZE_WHY_CHARS]);

/* True when the file is still what was opened: same size, not written since. */
bool ctl_analyze_file_is_same(const struct analyze_file *file);

void ctl_analyze_close(struct analyze_file *file);

#endif
