/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the parts of the source's half (outgoing.h) have of each other: outgoing.c opens and closes
 * it, outgoing_batch.c puts pages into frames, outgoing_urgent.c answers, outgoing_bulk.c pushes.
 */
#ifndef MEMD_POSTCOPY_AGENT_OUTGOING_PARTS_H
#define MEMD_POSTCOPY_AGENT_OUTGOING_PARTS_H

#include "outgoing.h"

/* Bulk hands this much to the kernel at once: 100 us at 2.5 GiB/s, so that the next batch can
 * already be another one. */
#define OUTGOING_BATCH_BYTES (256U << 10)

/* Pages of one block, `count` of them from `page` on, as they are read under its reading lock. */
struct run {
    const struct region *region;
    uint64_t page;
    uint32_t count;
};

static inline void outgoing_add(uint64_t *counter, uint64_t pages)
{
    __atomic_add_fetch(counter, pages, __ATOMIC_RELAXED);
}

/* Is this (MOVER_NO_...) switched off? */
static inline bool outgoing_is_off(const struct outgoing *outgoing, uint32_t what)
{
    return __atomic_load_n(&outgoing->switches, __ATOMIC_RELAXED) & what;
}

/* What bulk is at. */
static inline enum outgoing_task outgoing_at(const struct outgoing *outgoing)
{
    return (enum outgoing_task)__atomic_load_n(&outgoing->task, __ATOMIC_ACQUIRE);
}

/* Something in `outgoing` is new. */
void outgoing_tell(struct outgoing *outgoing);

/* ---- outgoing_batch.c ---- */

/* The region's part of [page, page + count). */
struct run outgoing_run(const struct outgoing *outgoing, uint64_t page, uint32_t count);
void outgoing_clear(struct outgoing_batch *batch);
/* Sends what is in it. 0 or -errno, as of stream_send; it is empty then. */
int outgoing_flush(struct stream *stream, struct outgoing_batch *batch);
/* A frame of which `inside` bytes of payload follow the header in its own buffer: they are where
 * this points to. */
uint8_t *outgoing_append(struct outgoing_batch *batch, enum wire_type type, uint32_t count,
                         uint64_t page, uint32_t inside);
/* Adds a run of at most WIRE_DATA_MAX pages. 0 or -errno, as of stream_send. */
int outgoing_send_run(struct outgoing *outgoing, struct stream *stream,
                      struct outgoing_batch *batch, const struct run *run);
/* The same on bulk, contents that are shared by reference. */
int outgoing_send_shared(struct outgoing *outgoing, const struct run *run);

/* ---- the threads ---- */

void *outgoing_run_urgent(void *context);
void *outgoing_run_bulk(void *context);

#endif
