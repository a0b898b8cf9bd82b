/* SPDX-License-Identifier: Apache-2.0 */
#include "outgoing_parts.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>

#define URGENT_ROOM (2U * WIRE_FRAME_MAX)
#define BULK_ROOM   WIRE_FRAME_MAX /* nothing is read from bulk but its end */

void outgoing_tell(struct outgoing *outgoing)
{
    uint64_t one = 1;

    sys_call3(SYS_write, outgoing->news_fd, &one, sizeof(one));
}

uint64_t outgoing_pending(const struct outgoing *outgoing)
{
    uint64_t words = (outgoing->regions.pages + 63) / 64;
    uint64_t pages = 0;

    for (uint64_t w = 0; w < words; w++)
        pages += (uint64_t)__builtin_popcountll(
            __atomic_load_n(&outgoing->pending[w], __ATOMIC_RELAXED));
    return pages;
}

/* ---- opening, closing, and what is asked of it ---- */

void outgoing_link(struct outgoing *outgoing, enum mover_channel channel, int fd, uint32_t epoch)
{
    stream_post(channel == MOVER_URGENT ? &outgoing->urgent : &outgoing->bulk, fd, epoch);
}

void outgoing_tune(struct outgoing *outgoing, const struct mover_tuning *tuning)
{
    __atomic_store_n(&outgoing->bandwidth, tuning->bandwidth, __ATOMIC_RELAXED);
    __atomic_store_n(&outgoing->switches, tuning->switches, __ATOMIC_RELAXED);
}

static void set_task(struct outgoing *outgoing, enum outgoing_task next)
{
    __atomic_store_n(&outgoing->task, next, __ATOMIC_RELEASE);
    stream_wake(&outgoing->bulk);
}

void outgoing_precopy(struct outgoing *outgoing)
{
    set_task(outgoing, OUTGOING_PASS);
}

void outgoing_stop(struct outgoing *outgoing, bool hold)
{
    __atomic_store_n(&outgoing->push_waits, hold, __ATOMIC_RELEASE);
    __atomic_store_n(&outgoing->map_result, -EINPROGRESS, __ATOMIC_RELEASE);
    set_task(outgoing, OUTGOING_MAP);
}

void outgoing_release(struct outgoing *outgoing)
{
    __atomic_store_n(&outgoing->push_waits, 0, __ATOMIC_RELEASE);
    stream_wake(&outgoing->bulk);
}

int outgoing_stopped(const struct outgoing *outgoing)
{
    return __atomic_load_n(&outgoing->map_result, __ATOMIC_ACQUIRE);
}

static uint32_t count_chunks(const struct regions *regions)
{
    uint32_t chunks = 0;

    for (uint32_t i = 0; i < regions->count; i++)
        chunks += regions->at[i].block->chunk_count;
    return chunks;
}

static int map_arrays(struct outgoing *outgoing)
{
    size_t bitmap = regions_bitmap_bytes(&outgoing->regions);

    outgoing->sent = regions_map_ready(bitmap);
    outgoing->pending = regions_map_ready(bitmap);
    outgoing->placed = regions_map(bitmap);
    outgoing->hashes = regions_map_ready(outgoing->regions.pages * 8);
    outgoing->passes.full = regions_map(count_chunks(&outgoing->regions));
    outgoing->bulk_batch.contents = regions_map(OUTGOING_CONTENTS * PAGE_BYTES);
    return outgoing->sent && outgoing->pending && outgoing->passes.full && outgoing->placed &&
                   outgoing->hashes && outgoing->bulk_batch.contents
               ? 0
               : -ENOMEM;
}

static void unmap_arrays(struct outgoing *outgoing)
{
    size_t bitmap = regions_bitmap_bytes(&outgoing->regions);

    regions_unmap(outgoing->sent, bitmap);
    regions_unmap(outgoing->pending, bitmap);
    regions_unmap(outgoing->placed, bitmap);
    regions_unmap(outgoing->hashes, outgoing->regions.pages * 8);
    regions_unmap(outgoing->passes.full, count_chunks(&outgoing->regions));
    regions_unmap(outgoing->bulk_batch.contents, OUTGOING_CONTENTS * PAGE_BYTES);
    slots_close(&outgoing->slots);
}

static int open_streams(struct outgoing *outgoing)
{
    struct wire_limits limits = {.reader = WIRE_AT_SOURCE,
                                 .pages = outgoing->regions.pages,
                                 .regions = outgoing->regions.count,
                                 .contents = UINT32_MAX};
    int r =
        stream_open(&outgoing->urgent, URGENT_ROOM, &limits, &outgoing->stop, outgoing->news_fd);

    if (r < 0)
        return r;
    r = stream_open(&outgoing->bulk, BULK_ROOM, &limits, &outgoing->stop, outgoing->news_fd);
    if (r < 0)
        stream_close(&outgoing->urgent);
    return r;
}

static int start_threads(struct outgoing *outgoing)
{
    sigset_t all;
    sigset_t old;
    int r;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = -pthread_create(&outgoing->urgent_thread, NULL, outgoing_run_urgent, outgoing);
    if (r == 0) {
        r = -pthread_create(&outgoing->bulk_thread, NULL, outgoing_run_bulk, outgoing);
        if (r < 0) {
            __atomic_store_n(&outgoing->stop, 1, __ATOMIC_RELEASE);
            stream_wake(&outgoing->urgent);
            pthread_join(outgoing->urgent_thread, NULL);
        }
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    while (r == 0 && !__atomic_load_n(&outgoing->urgent_tid, __ATOMIC_ACQUIRE))
        sys_call0(SYS_sched_yield);
    return r;
}

/* RAM whose bytes are elsewhere themselves can't be sent. */
static bool is_all_here(const struct regions *regions)
{
    uint64_t elsewhere = 0;

    for (uint32_t i = 0; i < regions->count; i++) {
        struct ram_block *block = regions->at[i].block;

        lock_take(&block->lock);
        if (block->live)
            elsewhere += block->counts[PLACE_REMOTE] + block->counts[PLACE_STORED] +
                         block->counts[PLACE_SPILLED];
        lock_release(&block->lock);
    }
    return elsewhere == 0;
}

static int prepare(struct outgoing *outgoing, const struct passes_log *log)
{
    int r;

    regions_take(&outgoing->regions, outgoing->ram);
    if (outgoing->regions.pages == 0)
        return -ENODATA;
    if (!is_all_here(&outgoing->regions))
        return -EBUSY;
    r = map_arrays(outgoing);
    if (r == 0 && !(outgoing->switches & MOVER_NO_SLOTS))
        r = slots_open(&outgoing->slots, &outgoing->regions);
    outgoing->passes.ram = outgoing->ram;
    outgoing->passes.regions = &outgoing->regions;
    outgoing->passes.sent = outgoing->sent;
    outgoing->passes.pending = outgoing->pending;
    if (log)
        outgoing->passes.log = *log;
    return r;
}

int outgoing_open(struct outgoing *outgoing, struct guest_ram *ram,
                  const struct mover_tuning *tuning, int news_fd, const struct passes_log *log)
{
    int r;

    memset(outgoing, 0, sizeof(*outgoing));
    outgoing->ram = ram;
    outgoing->news_fd = news_fd;
    outgoing_tune(outgoing, tuning);
    r = prepare(outgoing, log);
    if (r == 0) {
        passes_foresee(&outgoing->passes);
        r = open_streams(outgoing);
    }
    if (r < 0) {
        unmap_arrays(outgoing);
        return r;
    }
    r = start_threads(outgoing);
    if (r < 0) {
        stream_close(&outgoing->urgent);
        stream_close(&outgoing->bulk);
        unmap_arrays(outgoing);
    }
    return r;
}

void outgoing_close(struct outgoing *outgoing)
{
    __atomic_store_n(&outgoing->stop, 1, __ATOMIC_RELEASE);
    stream_wake(&outgoing->urgent);
    stream_wake(&outgoing->bulk);
    pthread_join(outgoing->urgent_thread, NULL);
    pthread_join(outgoing->bulk_thread, NULL);
    passes_end(&outgoing->passes);
    stream_close(&outgoing->urgent);
    stream_close(&outgoing->bulk);
    unmap_arrays(outgoing);
    memset(outgoing, 0, sizeof(*outgoing));
}
