/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where analyze takes pages from: raw dumps, ELF cores and live guests. All become an open file
 * and a list of the extents in it that hold pages; what lies between them is zeros.
 *
 * A file is mapped as a whole, because hashing pages where they lie in the page cache is a fifth
 * faster than copying them out; who walks through it drops what lies behind him, so that memory
 * stays what it is however large the file is. A mapped file that shrinks raises SIGBUS.
 */
#ifndef MEMD_CTL_ANALYZE_SOURCE_H
#define MEMD_CTL_ANALYZE_SOURCE_H

#include <sys/stat.h>

#include "analyze_elf.h"
#include "units.h"

struct analyze_file {
    int fd; /* -1: none */
    uint64_t pages;
    const uint8_t *map;             /* the whole file; NULL where that did not work */
    struct analyze_extent *extents; /* owned; ascending by page, and not overlapping */
    size_t extent_count;
    bool live;          /* a living guest's, which has these: */
    uint64_t unsettled; /* pages that changed while they were copied */
    uint64_t absent;    /* pages that its VMM does not have, which count as zeros */
    struct stat status; /* as it was when it was opened */
};

/* A block of a live guest's RAM. */
struct analyze_block {
    uint64_t hva;
    uint64_t pages;
};

#define ANALYZE_NO_DOMAIN UINT32_MAX

struct analyze_source {
    const char *name; /* borrowed */
    uint32_t domain;  /* for what-if: sources with the same number could share */
    struct analyze_file now;
    struct analyze_file earlier; /* fd -1: none */
};

/* Opens the raw dump or ELF core at `path`. 0, or -errno with the words in `why`: no such file, no
 * regular file, empty, damaged, or of a format that is not read. */
int ctl_analyze_open_dump(const char *path, struct analyze_file *ret_file,
                          char why[ANALYZE_WHY_CHARS]);

/* Takes over `fd`, a raw dump of `pages` pages; on failure it is still the caller's. 0 or -errno.
 */
int ctl_analyze_open_raw(int fd, uint64_t pages, struct analyze_file *ret_file);

/* Copies the RAM of process `pid` into a file without a name and takes that. Pages that the process
 * does not have count as zeros and are not touched; the process runs on meanwhile, so that pages
 * are of slightly different ages: `unsettled` says how many differ from their copy when all are
 * looked at once more. 0, or -errno with the words in `why`. */
int ctl_analyze_open_blocks(int pid, const struct analyze_block *blocks, size_t count,
                            struct analyze_file *ret_file, char why[ANALYZE_WHY_CHARS]);

/* Reads `count` pages from page `page` on, all of which the file must have. 0, or -EIO where the
 * file has shrunk, or -errno. */
int ctl_analyze_read(const struct analyze_file *file, uint64_t page, uint64_t count,
                     uint8_t *buffer);

/* The same, without a copy if that can be: *ret_bytes is in the mapping, at any alignment, or else
 * `buffer`. */
int ctl_analyze_view(const struct analyze_file *file, uint64_t page, uint64_t count,
                     uint8_t *buffer, const uint8_t **ret_bytes);

/* Gives back the memory of a view that will not be looked at again, nor the last page of the view
 * before it. Any thread. */
void ctl_analyze_drop(const struct analyze_file *file, const uint8_t *bytes, uint64_t count);

/* How many pages from `page` on are zeros without a look at the file. */
uint64_t ctl_analyze_hole(const struct analyze_file *file, uint64_t page);

/* Pages that are in the file: not more than these can be anything but zeros. */
uint64_t ctl_analyze_data_pages(const struct analyze_file *file);

/* True when the file is still what was opened: same size, not written since. */
bool ctl_analyze_file_is_same(const struct analyze_file *file);

void ctl_analyze_close(struct analyze_file *file);

#endif
