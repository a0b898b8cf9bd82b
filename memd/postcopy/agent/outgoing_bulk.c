/* SPDX-License-Identifier: Apache-2.0 */
/* The bulk connection: passes while the guest runs, the final map, the push. A thread of its own.
 */
#include <errno.h>
#include <poll.h>

#include "clock.h"
#include "outgoing_parts.h"

/* The neighbourhood of a fault: 32 KiB before it, 224 KiB behind. */
#define DETOUR_BEFORE 8U
#define DETOUR_BEHIND 56U

/* A part of the final map: 64 MiB of the guest. */
#define MAP_PART_PAGES 16384U

/* How long a pass rests at least, so that a guest that writes nothing costs nothing. */
#define PASS_REST_NS 20000000LL

/* ---- what is sent next ---- */

/* Takes the bits of the next pages that are to be sent, at most 16 in a row. */
static bool take_run(struct outgoing *outgoing, uint64_t from, uint64_t end, struct run *ret_run)
{
    bool passing = outgoing_at(outgoing) == OUTGOING_PASS;
    uint64_t page = regions_next(outgoing->pending, from, end);

    if (page >= end)
        return false;
    *ret_run = outgoing_run(outgoing, page, WIRE_DATA_MAX);
    for (uint32_t i = 0; i < ret_run->count; i++) {
        if (page + i >= end || !regions_test(outgoing->pending, page + i)) {
            ret_run->count = i;
            break;
        }
        /* Before it is read: a write that comes now is found by the next pass. */
        if (passing)
            regions_set(outgoing->sent, page + i);
        /* The other thread was faster: what it takes, it sends. */
        if (!regions_clear(outgoing->pending, page + i))
            ret_run->count = i;
    }
    return true;
}

/* A fault since the last look: its neighbourhood comes next, and then what lies behind it. */
static void follow_hint(struct outgoing *outgoing)
{
    uint32_t head = __atomic_load_n(&outgoing->hint_head, __ATOMIC_ACQUIRE);
    uint64_t page;

    if (head == outgoing->hint_tail || outgoing_is_off(outgoing, MOVER_NO_LOCALITY))
        return;
    outgoing->hint_tail = head;
    page = __atomic_load_n(&outgoing->hints[(head - 1) % OUTGOING_HINTS], __ATOMIC_RELAXED);
    outgoing->detour_at = page > DETOUR_BEFORE ? page - DETOUR_BEFORE : 0;
    outgoing->detour_end = page + DETOUR_BEHIND;
    if (outgoing->detour_end > outgoing->regions.pages)
        outgoing->detour_end = outgoing->regions.pages;
    outgoing->cursor = outgoing->detour_end;
}

static bool next_run(struct outgoing *outgoing, struct run *ret_run)
{
    uint64_t pages = outgoing->regions.pages;

    if (take_run(outgoing, outgoing->detour_at, outgoing->detour_end, ret_run)) {
        outgoing->detour_at = ret_run->page + ret_run->count;
        return true;
    }
    outgoing->detour_at = outgoing->detour_end = 0;
    if (!take_run(outgoing, outgoing->cursor, pages, ret_run) &&
        !take_run(outgoing, 0, outgoing->cursor, ret_run))
        return false;
    outgoing->cursor = ret_run->page + ret_run->count;
    return true;
}

/* The bandwidth limit: how long to wait before the next batch. */
static int64_t wait_of_limit(struct outgoing *outgoing, uint64_t bytes)
{
    uint64_t bandwidth = __atomic_load_n(&outgoing->bandwidth, __ATOMIC_RELAXED);
    uint64_t now = clock_now_ns();

    if (bandwidth == 0)
        return 0;
    if (outgoing->paid_until_ns < now)
        outgoing->paid_until_ns = now;
    outgoing->paid_until_ns += (uint64_t)((__uint128_t)bytes * 1000000000 / bandwidth);
    return (int64_t)(outgoing->paid_until_ns - now);
}

/* Sends the batch and rests as long as it has cost. */
static int pay_and_flush(struct outgoing *outgoing)
{
    uint64_t bytes = outgoing->bulk_batch.bytes;
    int r = outgoing_flush(&outgoing->bulk, &outgoing->bulk_batch);
    uint64_t until = clock_now_ns();
    int64_t left = r == 0 ? wait_of_limit(outgoing, bytes) : 0;

    until += (uint64_t)left;
    while (left > 0 && !stream_is_called(&outgoing->bulk)) {
        stream_wait(&outgoing->bulk, 0, left);
        left = (int64_t)(until - clock_now_ns());
    }
    return r;
}

/* With a limit a batch is no more than 5 ms of it, so that a change of mind is not held up. */
static uint64_t batch_bytes(const struct outgoing *outgoing)
{
    uint64_t bandwidth = __atomic_load_n(&outgoing->bandwidth, __ATOMIC_RELAXED);
    uint64_t bytes = bandwidth / 200;

    return bandwidth == 0 || bytes > OUTGOING_BATCH_BYTES ? OUTGOING_BATCH_BYTES : bytes;
}

/* One batch of pending pages. 1: sent; 0: there is none; -errno. */
static int send_batch(struct outgoing *outgoing)
{
    struct run run;
    bool any = false;
    int r = 0;

    follow_hint(outgoing);
    while (r == 0 && outgoing->bulk_batch.bytes < batch_bytes(outgoing) &&
           next_run(outgoing, &run)) {
        any = true;
        if (run.count > 0)
            r = outgoing_send_shared(outgoing, &run);
    }
    if (r == 0)
        r = pay_and_flush(outgoing);
    else
        outgoing_clear(&outgoing->bulk_batch);
    return r < 0 ? r : any;
}

/* MOVER_NO_URGENT: the requests themselves, on bulk. */
static int answer_on_bulk(struct outgoing *outgoing)
{
    uint32_t head = __atomic_load_n(&outgoing->hint_head, __ATOMIC_ACQUIRE);
    int r = 0;

    if (head - outgoing->hint_tail > OUTGOING_HINTS)
        outgoing->hint_tail = head - OUTGOING_HINTS;
    for (; r == 0 && outgoing->hint_tail != head; outgoing->hint_tail++) {
        uint64_t page = __atomic_load_n(&outgoing->hints[outgoing->hint_tail % OUTGOING_HINTS],
                                        __ATOMIC_RELAXED);
        struct run run = outgoing_run(outgoing, page, 1);

        regions_clear(outgoing->pending, run.page);
        r = outgoing_send_run(outgoing, &outgoing->bulk, &outgoing->bulk_batch, &run);
    }
    return r == 0 ? outgoing_flush(&outgoing->bulk, &outgoing->bulk_batch) : r;
}

static int say_nothing_left(struct outgoing *outgoing)
{
    outgoing_append(&outgoing->bulk_batch, WIRE_NOTHING_LEFT, 0, 0, 0);
    return outgoing_flush(&outgoing->bulk, &outgoing->bulk_batch);
}

/* A step of the push. 1: more at once; 0: nothing to do; -errno. */
static int push(struct outgoing *outgoing)
{
    bool waits = __atomic_load_n(&outgoing->push_waits, __ATOMIC_ACQUIRE);
    uint32_t epoch = outgoing->bulk.epoch;
    int r = 0;

    __atomic_store_n(&outgoing->pushing, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&outgoing->push_epoch, __ATOMIC_SEQ_CST) == epoch) {
        if (outgoing_is_off(outgoing, MOVER_NO_URGENT))
            r = answer_on_bulk(outgoing);
        if (r == 0 && !waits)
            r = send_batch(outgoing);
        if (r == 0 && !waits && !__atomic_load_n(&outgoing->all_pushed, __ATOMIC_ACQUIRE)) {
            r = say_nothing_left(outgoing);
            __atomic_store_n(&outgoing->all_pushed, 1, __ATOMIC_RELEASE);
            outgoing_tell(outgoing);
        }
    }
    __atomic_store_n(&outgoing->pushing, 0, __ATOMIC_SEQ_CST);
    return r;
}

/* ---- passes ---- */

/* 1 or -errno. */
static int begin_pass(struct outgoing *outgoing)
{
    uint64_t now = clock_now_ns();
    uint64_t took = now - outgoing->pass_began_ns;
    int64_t pages = passes_begin(&outgoing->passes);

    if (pages < 0)
        return (int)pages;
    outgoing->pass_began_ns = now;
    __atomic_store_n(&outgoing->pass_dirty, (uint64_t)pages, __ATOMIC_RELAXED);
    if (outgoing->pass > 0)
        __atomic_store_n(&outgoing->dirty_rate,
                         (uint64_t)((__uint128_t)(uint64_t)pages * 1000000000 / (took + 1)),
                         __ATOMIC_RELAXED);
    __atomic_store_n(&outgoing->passes_ended, outgoing->pass, __ATOMIC_RELEASE);
    __atomic_store_n(&outgoing->pass, outgoing->pass + 1, __ATOMIC_RELEASE);
    outgoing->cursor = 0;
    outgoing_tell(outgoing);
    return 1;
}

/* A step of a pass; when nothing is pending it has ended, and the next one begins. */
static int go_on_with_pass(struct outgoing *outgoing)
{
    int r;

    if (outgoing->pass == 0)
        return begin_pass(outgoing);
    r = send_batch(outgoing);
    if (r != 0)
        return r;
    outgoing_append(&outgoing->bulk_batch, WIRE_PASS, outgoing->pass, 0, 0);
    r = outgoing_flush(&outgoing->bulk, &outgoing->bulk_batch);
    if (r == 0 && clock_now_ns() - outgoing->pass_began_ns < PASS_REST_NS)
        stream_wait(&outgoing->bulk, 0, PASS_REST_NS);
    return r == 0 ? begin_pass(outgoing) : r;
}

/* ---- the final map ---- */

/* Which of the 64 pages of a word are of this kind. */
static uint64_t of_kind(const struct outgoing *outgoing, uint64_t word, uint32_t kind)
{
    uint64_t pending = __atomic_load_n(&outgoing->pending[word], __ATOMIC_RELAXED);
    uint64_t sent = __atomic_load_n(&outgoing->sent[word], __ATOMIC_RELAXED);

    if (kind == WIRE_KIND_REMOTE)
        return pending;
    return kind == WIRE_KIND_HAVE ? sent & ~pending : ~sent & ~pending;
}

static uint32_t kind_of(const struct outgoing *outgoing, uint64_t page)
{
    if (regions_test(outgoing->pending, page))
        return WIRE_KIND_REMOTE;
    return regions_test(outgoing->sent, page) ? WIRE_KIND_HAVE : WIRE_KIND_EMPTY;
}

/* The first page behind `page` that is of another kind, or `most`. */
static uint64_t end_of_kind(const struct outgoing *outgoing, uint64_t page, uint64_t most,
                            uint32_t kind)
{
    while (page < most) {
        uint64_t others = ~of_kind(outgoing, page / 64, kind) >> page % 64;

        if (others) {
            page += (uint64_t)__builtin_ctzll(others);
            break;
        }
        page = (page / 64 + 1) * 64;
    }
    return page < most ? page : most;
}

/* The run of one kind that begins at `page`, as far as `most`. */
static struct wire_run run_of_kind(const struct outgoing *outgoing, uint64_t page, uint64_t most)
{
    uint32_t kind = kind_of(outgoing, page);
    uint64_t left = most - page;
    uint64_t end =
        end_of_kind(outgoing, page, page + (left < WIRE_RUN_MAX ? left : WIRE_RUN_MAX), kind);

    for (uint64_t i = page; kind == WIRE_KIND_EMPTY && i < end; i++)
        __atomic_store_n(&outgoing->hashes[i], proof_page(PROOF_EMPTY, i), __ATOMIC_RELAXED);
    return (struct wire_run){.page = page, .pages = (uint32_t)(end - page), .kind = kind};
}

/* The map on its way: it is sent while it is made, so that both ends work at it. */
struct map_writer {
    struct outgoing *outgoing;
    uint64_t written; /* pages */
};

/* What is judged and was not written yet, as far as `end`. */
static int write_part(struct map_writer *writer, uint64_t end)
{
    struct outgoing *outgoing = writer->outgoing;
    uint8_t *payload = outgoing->bulk_batch.contents[0];
    int r = 0;

    while (writer->written < end && r == 0) {
        uint8_t header[WIRE_HEADER_BYTES];
        struct iovec parts[2] = {{header, sizeof(header)}, {payload, 0}};
        uint32_t count = 0;

        for (; writer->written < end && count < WIRE_MAP_MAX; count++) {
            struct wire_run run = run_of_kind(outgoing, writer->written, end);
            wire_write_run(payload, count, &run);
            writer->written += run.pages;
        }
        wire_write_header(header, WIRE_MAP, count, 0);
        parts[1].iov_len = count * sizeof(struct wire_run);
        r = stream_send(&outgoing->bulk, parts, 2, NULL);
    }
    return r;
}

static int hear_judged(void *self, uint64_t end)
{
    struct map_writer *writer = self;

    return end - writer->written < MAP_PART_PAGES ? 0 : write_part(writer, end);
}

static int make_map(struct outgoing *outgoing)
{
    struct map_writer writer = {.outgoing = outgoing};
    struct passes_listener listener = {.hear = hear_judged, .self = &writer};
    int r = passes_stop(&outgoing->passes, outgoing->passes.begun, &listener);

    if (r == 0)
        r = write_part(&writer, outgoing->regions.pages);
    if (r < 0)
        return r;
    outgoing->cursor = 0;
    /* Requests come as soon as the map has arrived. */
    __atomic_store_n(&outgoing->task, OUTGOING_PUSH, __ATOMIC_RELEASE);
    __atomic_store_n(&outgoing->push_epoch, outgoing->bulk.epoch, __ATOMIC_SEQ_CST);
    outgoing_append(&outgoing->bulk_batch, WIRE_MAP_END, 0, outgoing->regions.pages, 0);
    return outgoing_flush(&outgoing->bulk, &outgoing->bulk_batch);
}

static void answer_stop(struct outgoing *outgoing, int result)
{
    __atomic_store_n(&outgoing->map_result, result, __ATOMIC_RELEASE);
    outgoing_tell(outgoing);
}

/* ---- the thread ---- */

/* 1: go on at once; 0: wait; -errno: the connection is over. */
static int work(struct outgoing *outgoing)
{
    int r;

    switch (outgoing_at(outgoing)) {
    case OUTGOING_PASS: return outgoing->bulk.fd < 0 ? 0 : go_on_with_pass(outgoing);
    case OUTGOING_MAP:
        r = outgoing->bulk.fd < 0 ? -ENOTCONN : make_map(outgoing);
        if (r < 0)
            __atomic_store_n(&outgoing->task, OUTGOING_REST, __ATOMIC_RELEASE);
        answer_stop(outgoing, r);
        return r < 0 ? r : 1;
    case OUTGOING_PUSH: return outgoing->bulk.fd < 0 ? 0 : push(outgoing);
    default: return 0;
    }
}

/* Nothing is ever said on bulk by the destination: what can be read there is its end. */
static int look_for_end(struct outgoing *outgoing)
{
    long got = stream_fill(&outgoing->bulk);

    return got > 0 ? -EPROTO : (int)got;
}

void *outgoing_run_bulk(void *context)
{
    struct outgoing *outgoing = context;
    struct stream *stream = &outgoing->bulk;

    while (!__atomic_load_n(&outgoing->stop, __ATOMIC_ACQUIRE)) {
        int r;

        if (stream_adopt(stream))
            outgoing_clear(&outgoing->bulk_batch);
        r = work(outgoing);
        if (r == 0 && stream_wait(stream, POLLIN, -1))
            r = look_for_end(outgoing);
        if (r < 0 && r != -ECANCELED)
            stream_fail(stream, r, r == -EFAULT ? "RAM of the guest has left" : NULL);
    }
    return NULL;
}
