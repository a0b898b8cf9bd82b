/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pieces of sources that the walk has at hand (chunks), and what LZ4 makes of pages in them,
 * found out beside the walk by threads of its own.
 *
 * The walk takes a chunk, has a file's bytes looked at through it, marks pages whose compressed
 * size is wanted, and gives it back. All functions are for the one thread that walks.
 */
#ifndef MEMD_CTL_ANALYZE_COMPRESS_H
#define MEMD_CTL_ANALYZE_COMPRESS_H

#include "analyze_source.h"
#include "units.h"

/* A chunk is what is dropped at once when it is behind: 512 KiB, against which a system call and
 * a wake-up cost little. */
#define ANALYZE_CHUNK_PAGES 128U

struct analyze_chunk {
    const struct analyze_file *file;
    uint8_t *buffer; /* as large as a chunk, for what can't be looked at in place */
    /* Set by the walk: */
    const uint8_t *bytes;  /* of the file, as ctl_analyze_view() says */
    uint32_t first, pages; /* numbered over all sources */
    uint32_t wanted_count;
    uint8_t wanted[ANALYZE_CHUNK_PAGES]; /* pages of the chunk, ascending */
    /* The compressor's: */
    struct analyze_chunk *next;
};

struct analyze_compressor;

/* `sizes`, borrowed, gets the compressed bytes of each page that is wanted, at the page's number.
 * NULL: no page will be wanted, and there are no threads. 0 or -ENOMEM. */
int ctl_analyze_compressor_open(uint16_t *sizes, struct analyze_compressor **ret_compressor);

/* A chunk for pages of `file`: none yet, none wanted. May compress others until one is free. */
struct analyze_chunk *ctl_analyze_chunk_take(struct analyze_compressor *compressor,
                                             const struct analyze_file *file);

/* Gives it back: its view is dropped as soon as the wanted pages' sizes are known. */
void ctl_analyze_chunk_give(struct analyze_compressor *compressor, struct analyze_chunk *chunk);

/* Waits for all chunks that were given, whose sizes are in `sizes` from now on. Their sum since the
 * last call. */
uint64_t ctl_analyze_compressor_settle(struct analyze_compressor *compressor);

/* Ends the threads; what they have not begun is not compressed any more. NULL is nothing. */
void ctl_analyze_compressor_close(struct analyze_compressor *compressor);

#endif
