/* SPDX-License-Identifier: Apache-2.0 */
#include "outgoing.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "hash.h"

#define URGENT_ROOM (2U * WIRE_FRAME_MAX)
#define BULK_ROOM   WIRE_FRAME_MAX /* nothing is read from bulk but its end */

/* Bulk hands this much to the kernel at once: 100 us at 2.5 GiB/s, so that the next batch can
 * already be another one. */
#define BATCH_BYTES (256U << 10)

/* The neighbourhood of a fault: 32 KiB before it, 224 KiB behind. */
#define DETOUR_BEFORE 8U
#define DETOUR_BEHIND 56U

/* A step between two faults that may be a stride. */
#define MAX_STEP   128
#define MAX_WINDOW 16U

/* Between two looks whether bulk has let go. */
#define HOLD_NS 50000L

/* How long a pass rests at least, so that a guest that writes nothing costs nothing. */
#define PASS_REST_NS 20000000LL

static uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ULL + (uint64_t)time.tv_nsec;
}

static void news(struct outgoing *outgoing)
{
    uint64_t one = 1;

    sys_call3(SYS_write, outgoing->news_fd, &one, sizeof(one));
}

static void add(uint64_t *counter, uint64_t pages)
{
    __atomic_add_fetch(counter, pages, __ATOMIC_RELAXED);
}

static uint32_t task(const struct outgoing *outgoing)
{
    return __atomic_load_n(&outgoing->task, __ATOMIC_ACQUIRE);
}

static bool is_off(const struct outgoing *outgoing, uint32_t what)
{
    return __atomic_load_n(&outgoing->switches, __ATOMIC_RELAXED) & what;
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

/* ---- batches ---- */

static void clear_batch(struct outgoing_batch *batch)
{
    batch->part_count = batch->frame_count = batch->content_count = 0;
    batch->bytes = 0;
    batch->block = NULL;
}

/* Sends what is in it. 0 or -errno, as of stream_send; it is empty then. */
static int flush(struct stream *stream, struct outgoing_batch *batch)
{
    int r =
        batch->part_count ? stream_send(stream, batch->parts, batch->part_count, batch->block) : 0;

    clear_batch(batch);
    return r;
}

/* A frame of which `inside` bytes of payload follow the header in its own buffer. */
static uint8_t *append(struct outgoing_batch *batch, enum wire_type type, uint32_t count,
                       uint64_t page, uint32_t inside)
{
    uint8_t *header = batch->headers[batch->frame_count++];

    wire_write_header(header, type, count, page);
    batch->parts[batch->part_count++] = (struct iovec){header, WIRE_HEADER_BYTES + inside};
    batch->bytes += WIRE_HEADER_BYTES + inside;
    return header + WIRE_HEADER_BYTES;
}

static void append_bytes(struct outgoing_batch *batch, const void *bytes, size_t length)
{
    batch->parts[batch->part_count++] = (struct iovec){(void *)bytes, length};
    batch->bytes += length;
}

/* ---- what a page is sent as ---- */

static void note_sent(struct outgoing *outgoing, uint64_t page, uint64_t content)
{
    uint64_t hash = proof_page(content, page);

    if (__atomic_exchange_n(&outgoing->hashes[page], hash, __ATOMIC_RELAXED))
        add(&outgoing->counts.resent, 1);
}

/* Pages of one block, `count` of them from `page` on, as they are read under its reading lock. */
struct run {
    const struct region *region;
    uint64_t page;
    uint32_t count;
};

static uint8_t *address_of(const struct run *run, uint32_t i)
{
    return ram_address(run->region->block, (uint32_t)(run->page - run->region->first) + i);
}

/* Appends DATA and ZERO frames for the run: at most one for each page. Caller holds the reading
 * lock. */
static void append_run(struct outgoing *outgoing, struct outgoing_batch *batch,
                       const struct run *run)
{
    for (uint32_t i = 0, n; i < run->count; i += n) {
        bool zero = hash_page_is_zero(address_of(run, i));

        n = 0;
        do {
            note_sent(outgoing, run->page + i + n,
                      zero ? PROOF_EMPTY : proof_content(address_of(run, i + n)));
            n++;
        } while (i + n < run->count && hash_page_is_zero(address_of(run, i + n)) == zero);
        append(batch, zero ? WIRE_ZERO : WIRE_DATA, n, run->page + i, 0);
        if (!zero)
            append_bytes(batch, address_of(run, i), (size_t)n * PAGE_BYTES);
        add(zero ? &outgoing->counts.zero : &outgoing->counts.data, n);
    }
}

/* Room for `frames` more, with bytes of this block? */
static bool has_room(const struct outgoing_batch *batch, const struct ram_block *block,
                     uint32_t frames)
{
    return batch->frame_count + frames <= OUTGOING_FRAMES && batch->bytes < BATCH_BYTES &&
           (!batch->block || !block || batch->block == block);
}

/* Adds a run of at most WIRE_DATA_MAX pages. 0 or -errno, as of stream_send. */
static int send_run(struct outgoing *outgoing, struct stream *stream, struct outgoing_batch *batch,
                    const struct run *run)
{
    struct ram_block *block = run->region->block;
    bool live;
    int r = 0;

    if (!has_room(batch, block, run->count))
        r = flush(stream, batch);
    if (r < 0)
        return r;
    batch->block = block;
    lock_take(&block->reading);
    live = __atomic_load_n(&block->live, __ATOMIC_ACQUIRE);
    if (live)
        append_run(outgoing, batch, run);
    lock_release(&block->reading);
    return live ? 0 : -EFAULT;
}

/* ---- shared pages ---- */

/* Which pages of the run are a content that is sent once? */
static void find_contents(struct outgoing *outgoing, const struct run *run,
                          struct slot_entry **ret_entries)
{
    struct ram_block *block = run->region->block;
    uint32_t index = (uint32_t)(run->page - run->region->first);

    for (uint32_t i = 0; i < run->count; i++)
        ret_entries[i] = NULL;
    if (outgoing->slots.room == 0)
        return;
    lock_take(&block->lock);
    for (uint32_t i = 0; block->live && i < run->count; i++)
        if (ram_place(block, index + i) == PLACE_SHARED)
            ret_entries[i] = slots_find(&outgoing->slots, block->slots[index + i]);
    lock_release(&block->lock);
}

/* The bytes of the store, not those of the guest, who may be writing a copy of its own just now.
 * False: it is shared no more. */
static bool copy_content(struct outgoing *outgoing, const struct run *run, uint32_t i,
                         const struct slot_entry *entry, uint8_t *to)
{
    struct ram_block *block = run->region->block;
    uint32_t index = (uint32_t)(run->page - run->region->first) + i;
    struct page_source *source = &outgoing->ram->sources[PLACE_SHARED];
    const void *bytes;
    bool good;

    lock_take(&block->lock);
    good = block->live && ram_place(block, index) == PLACE_SHARED &&
           block->slots[index] == entry->slot && source->fetch &&
           source->fetch(source->self, block, index, 1, &bytes) >= 1;
    if (good)
        memcpy(to, bytes, PAGE_BYTES);
    lock_release(&block->lock);
    return good;
}

/* Sends the content of the run's page `i`, unless it was sent. 0, or 1: it is no content any more,
 * or -errno. */
static int send_content(struct outgoing *outgoing, const struct run *run, uint32_t i,
                        struct slot_entry *entry)
{
    struct outgoing_batch *batch = &outgoing->bulk_batch;
    uint8_t *content;
    int r = 0;

    if (entry->sent)
        return 0;
    if (!has_room(batch, NULL, 1) || batch->content_count == OUTGOING_CONTENTS)
        r = flush(&outgoing->bulk, batch);
    if (r < 0)
        return r;
    content = batch->contents[batch->content_count];
    if (!copy_content(outgoing, run, i, entry, content))
        return 1;
    batch->content_count++;
    if (entry->content == SLOT_NONE) {
        entry->hash = proof_content(content);
        entry->content = outgoing->slots.contents++;
    }
    entry->sent = true;
    append(batch, WIRE_CONTENT, 1, entry->content, 0);
    append_bytes(batch, content, PAGE_BYTES);
    return 0;
}

static int send_ref(struct outgoing *outgoing, uint64_t page, const struct slot_entry *entry)
{
    struct outgoing_batch *batch = &outgoing->bulk_batch;
    uint8_t *payload;
    int r = has_room(batch, NULL, 1) ? 0 : flush(&outgoing->bulk, batch);

    if (r < 0)
        return r;
    payload = append(batch, WIRE_REF, 1, page, 4);
    wire_write_u32(payload, 0, entry->content);
    note_sent(outgoing, page, entry->hash);
    add(&outgoing->counts.slot, 1);
    return 0;
}

/* A run on bulk: contents by reference, everything between them by bytes. */
static int send_bulk(struct outgoing *outgoing, const struct run *run)
{
    struct slot_entry *entries[WIRE_DATA_MAX];
    int r = 0;

    find_contents(outgoing, run, entries);
    for (uint32_t i = 0, n; i < run->count && r >= 0; i += n) {
        struct run part = {run->region, run->page + i, 0};

        n = 1;
        r = entries[i] ? send_content(outgoing, run, i, entries[i]) : 1;
        if (r == 0) {
            r = send_ref(outgoing, run->page + i, entries[i]);
            continue;
        }
        while (i + n < run->count && !entries[i + n])
            n++;
        part.count = n;
        if (r > 0)
            r = send_run(outgoing, &outgoing->bulk, &outgoing->bulk_batch, &part);
    }
    return r;
}

/* ---- urgent: requests, and what the destination has ---- */

/* The region's part of [page, page + count). */
static struct run make_run(const struct outgoing *outgoing, uint64_t page, uint32_t count)
{
    const struct region *region = regions_find(&outgoing->regions, page);
    uint64_t left = region->first + region->pages - page;

    return (struct run){region, page, count < left ? count : (uint32_t)left};
}

/* The stride that this request continues. What was answered ahead is not asked for, unless the
 * request was faster than the answer. */
static struct outgoing_stride *continue_stride(struct outgoing *outgoing, uint64_t page)
{
    for (uint32_t i = 0; i < OUTGOING_STRIDES; i++) {
        struct outgoing_stride *stride = &outgoing->strides[i];
        int64_t step = (int64_t)(page - stride->last);

        if (stride->step && step % stride->step == 0 && step / stride->step >= 1 &&
            step / stride->step <= (int64_t)stride->ahead + 1)
            return stride;
    }
    return NULL;
}

/* One that begins with it: it is near another request, or alone. */
static struct outgoing_stride *begin_stride(struct outgoing *outgoing, uint64_t page)
{
    for (uint32_t i = 0; i < OUTGOING_STRIDES; i++) {
        struct outgoing_stride *stride = &outgoing->strides[i];
        int64_t step = (int64_t)(page - stride->last);

        if (stride->used && step && step <= MAX_STEP && step >= -MAX_STEP) {
            *stride = (struct outgoing_stride){.used = true, .step = step};
            return stride;
        }
    }
    outgoing->strides[outgoing->stride_next % OUTGOING_STRIDES] =
        (struct outgoing_stride){.used = true};
    return &outgoing->strides[outgoing->stride_next++ % OUTGOING_STRIDES];
}

static void note_request(struct outgoing *outgoing, uint64_t page)
{
    struct outgoing_stride *stride = continue_stride(outgoing, page);

    if (stride) {
        stride->window = stride->window ? stride->window * 2 : 2;
        if (stride->window > MAX_WINDOW)
            stride->window = MAX_WINDOW;
    } else {
        stride = begin_stride(outgoing, page);
        stride->window = stride->step == 1; /* two in sequence: a third is likely */
    }
    stride->last = page;
    stride->ahead = 0;
    outgoing->plan = stride;
}

/* Answers what will be asked for next. Pages that are not pending any more are there or will be. */
static int send_ahead(struct outgoing *outgoing)
{
    struct outgoing_stride *stride = outgoing->plan;
    int r = 0;

    outgoing->plan = NULL;
    for (uint32_t i = 0; i < stride->window && r == 0; i++) {
        uint64_t page = stride->last + (uint64_t)(stride->step * (int64_t)(i + 1));
        struct run run;

        if (page >= outgoing->regions.pages)
            break;
        stride->ahead++;
        if (!regions_clear(outgoing->pending, page))
            continue;
        run = make_run(outgoing, page, 1);
        r = send_run(outgoing, &outgoing->urgent, &outgoing->urgent_batch, &run);
    }
    return r == 0 ? flush(&outgoing->urgent, &outgoing->urgent_batch) : r;
}

static void give_hint(struct outgoing *outgoing, uint64_t page)
{
    uint32_t head = outgoing->hint_head;

    __atomic_store_n(&outgoing->hints[head % OUTGOING_HINTS], page, __ATOMIC_RELAXED);
    __atomic_store_n(&outgoing->hint_head, head + 1, __ATOMIC_RELEASE);
}

static int answer(struct outgoing *outgoing, uint64_t page)
{
    struct run run = make_run(outgoing, page, 1);
    int r;

    add(&outgoing->counts.demand, 1);
    give_hint(outgoing, page);
    if (is_off(outgoing, MOVER_NO_URGENT)) {
        stream_wake(&outgoing->bulk);
        return 0;
    }
    regions_clear(outgoing->pending, page);
    r = send_run(outgoing, &outgoing->urgent, &outgoing->urgent_batch, &run);
    if (r == 0)
        r = flush(&outgoing->urgent, &outgoing->urgent_batch);
    if (r == 0 && !is_off(outgoing, MOVER_NO_LOCALITY))
        note_request(outgoing, page);
    return r;
}

/* Until bulk has let go of the connection before: a page that it takes now would be lost. It waits
 * asleep: this thread has a real-time priority and bulk has none, and they may share a CPU. */
static void hold_push(struct outgoing *outgoing)
{
    struct timespec moment = {.tv_nsec = HOLD_NS};

    __atomic_store_n(&outgoing->push_epoch, 0, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&outgoing->pushing, __ATOMIC_SEQ_CST) &&
           !stream_is_called(&outgoing->urgent)) {
        stream_wake(&outgoing->bulk);
        sys_call5(SYS_ppoll, NULL, 0, &moment, NULL, 8);
        moment.tv_nsec = HOLD_NS; /* the kernel writes what was left */
    }
}

/* Words of a bitmap: HAVE into pending (turned round), PLACED into placed. */
static void take_bits(struct outgoing *outgoing, const struct wire_frame *frame,
                      const uint8_t *payload)
{
    bool have = frame->type == WIRE_HAVE;

    for (uint32_t w = 0; w * 64 < frame->count; w++) {
        uint64_t bits = wire_read_u64(payload, w);
        uint32_t pages = frame->count - w * 64;
        uint64_t mask = pages >= 64 ? ~0ULL : (1ULL << pages) - 1;

        __atomic_store_n(&(have ? outgoing->pending : outgoing->placed)[frame->page / 64 + w],
                         (have ? ~bits : bits) & mask, __ATOMIC_RELEASE);
    }
}

static void end_have(struct outgoing *outgoing, uint32_t contents)
{
    slots_forget(&outgoing->slots, contents);
    __atomic_store_n(&outgoing->all_pushed, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&outgoing->push_epoch, outgoing->urgent.epoch, __ATOMIC_SEQ_CST);
    stream_wake(&outgoing->bulk);
}

/* Compares the sums; -EBADMSG and the region, or 0. */
static int compare(struct outgoing *outgoing, const uint8_t *payload, uint32_t *ret_region,
                   uint64_t *ret_pages)
{
    *ret_pages = 0;
    for (uint32_t i = 0; i < outgoing->regions.count; i++) {
        uint64_t pages;
        uint64_t sum =
            proof_sum(&outgoing->regions.at[i], outgoing->placed, outgoing->hashes, &pages);

        *ret_pages += pages;
        *ret_region = i;
        if (sum != wire_read_u64(payload, i))
            return -EBADMSG;
    }
    *ret_region = 0;
    return 0;
}

static int answer_done(struct outgoing *outgoing, const uint8_t *payload)
{
    uint32_t region = 0;
    uint64_t pages;
    int result = compare(outgoing, payload, &region, &pages);
    struct outgoing_batch *batch = &outgoing->urgent_batch;

    append(batch, WIRE_PROVEN, (uint32_t)-result, region, 0);
    if (!outgoing->proven) {
        outgoing->proven_result = result;
        outgoing->proven_region = region;
        outgoing->proven_pages = pages;
        __atomic_store_n(&outgoing->proven, 1, __ATOMIC_RELEASE);
    }
    result = flush(&outgoing->urgent, batch);
    news(outgoing);
    return result;
}

static int take_frame(struct outgoing *outgoing, const struct wire_frame *frame,
                      const uint8_t *payload, const char **ret_reason)
{
    if (task(outgoing) != OUTGOING_PUSH) {
        *ret_reason = "a frame out of order";
        return -EPROTO;
    }
    switch (frame->type) {
    case WIRE_WANT: return answer(outgoing, frame->page);
    case WIRE_HAVE:
        hold_push(outgoing);
        take_bits(outgoing, frame, payload);
        return 0;
    case WIRE_HAVE_END: end_have(outgoing, (uint32_t)frame->page); return 0;
    case WIRE_PLACED: take_bits(outgoing, frame, payload); return 0;
    default: return answer_done(outgoing, payload);
    }
}

/* All that was read, then what will be asked for next. 0 or -errno: the connection is to end. */
static int take_frames(struct outgoing *outgoing, const char **ret_reason)
{
    struct wire_frame frame;
    const uint8_t *payload;
    int r;

    while ((r = stream_next(&outgoing->urgent, &frame, &payload, ret_reason)) > 0) {
        r = take_frame(outgoing, &frame, payload, ret_reason);
        if (r < 0)
            return r;
    }
    if (r == 0 && outgoing->plan)
        r = send_ahead(outgoing);
    return r;
}

static void *run_urgent(void *context)
{
    struct outgoing *outgoing = context;
    struct stream *stream = &outgoing->urgent;

    __atomic_store_n(&outgoing->urgent_tid, (uint32_t)sys_call0(SYS_gettid), __ATOMIC_RELEASE);
    while (!__atomic_load_n(&outgoing->stop, __ATOMIC_ACQUIRE)) {
        const char *reason = NULL;
        long got = 0;

        if (stream_adopt(stream)) {
            clear_batch(&outgoing->urgent_batch);
            outgoing->plan = NULL;
        }
        if (stream_wait(stream, POLLIN, -1))
            got = stream_fill(stream);
        if (got > 0)
            got = take_frames(outgoing, &reason);
        if (got < 0 && got != -ECANCELED)
            stream_fail(stream, (int)got, reason);
    }
    return NULL;
}

/* ---- bulk: what is sent next ---- */

/* Takes the bits of the next pages that are to be sent, at most 16 in a row. */
static bool take_run(struct outgoing *outgoing, uint64_t from, uint64_t end, struct run *ret_run)
{
    bool passing = task(outgoing) == OUTGOING_PASS;
    uint64_t page = regions_next(outgoing->pending, from, end);

    if (page >= end)
        return false;
    *ret_run = make_run(outgoing, page, WIRE_DATA_MAX);
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

    if (head == outgoing->hint_tail || is_off(outgoing, MOVER_NO_LOCALITY))
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
    uint64_t now = now_ns();

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
    int r = flush(&outgoing->bulk, &outgoing->bulk_batch);
    uint64_t until = now_ns();
    int64_t left = r == 0 ? wait_of_limit(outgoing, bytes) : 0;

    until += (uint64_t)left;
    while (left > 0 && !stream_is_called(&outgoing->bulk)) {
        stream_wait(&outgoing->bulk, 0, left);
        left = (int64_t)(until - now_ns());
    }
    return r;
}

/* With a limit a batch is no more than 5 ms of it, so that a change of mind is not held up. */
static uint64_t batch_bytes(const struct outgoing *outgoing)
{
    uint64_t bandwidth = __atomic_load_n(&outgoing->bandwidth, __ATOMIC_RELAXED);
    uint64_t bytes = bandwidth / 200;

    return bandwidth == 0 || bytes > BATCH_BYTES ? BATCH_BYTES : bytes;
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
            r = send_bulk(outgoing, &run);
    }
    if (r == 0)
        r = pay_and_flush(outgoing);
    else
        clear_batch(&outgoing->bulk_batch);
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
        struct run run = make_run(outgoing, page, 1);

        regions_clear(outgoing->pending, run.page);
        r = send_run(outgoing, &outgoing->bulk, &outgoing->bulk_batch, &run);
    }
    return r == 0 ? flush(&outgoing->bulk, &outgoing->bulk_batch) : r;
}

static int say_nothing_left(struct outgoing *outgoing)
{
    append(&outgoing->bulk_batch, WIRE_NOTHING_LEFT, 0, 0, 0);
    return flush(&outgoing->bulk, &outgoing->bulk_batch);
}

/* A step of the push. 1: more at once; 0: nothing to do; -errno. */
static int push(struct outgoing *outgoing)
{
    uint32_t epoch = outgoing->bulk.epoch;
    int r = 0;

    __atomic_store_n(&outgoing->pushing, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&outgoing->push_epoch, __ATOMIC_SEQ_CST) == epoch) {
        if (is_off(outgoing, MOVER_NO_URGENT))
            r = answer_on_bulk(outgoing);
        if (r == 0)
            r = send_batch(outgoing);
        if (r == 0 && !__atomic_load_n(&outgoing->all_pushed, __ATOMIC_ACQUIRE)) {
            r = say_nothing_left(outgoing);
            __atomic_store_n(&outgoing->all_pushed, 1, __ATOMIC_RELEASE);
            news(outgoing);
        }
    }
    __atomic_store_n(&outgoing->pushing, 0, __ATOMIC_SEQ_CST);
    return r;
}

/* ---- bulk: passes ---- */

/* 1 or -errno. */
static int begin_pass(struct outgoing *outgoing)
{
    uint64_t now = now_ns();
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
    news(outgoing);
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
    append(&outgoing->bulk_batch, WIRE_PASS, outgoing->pass, 0, 0);
    r = flush(&outgoing->bulk, &outgoing->bulk_batch);
    if (r == 0 && now_ns() - outgoing->pass_began_ns < PASS_REST_NS)
        stream_wait(&outgoing->bulk, 0, PASS_REST_NS);
    return r == 0 ? begin_pass(outgoing) : r;
}

/* ---- bulk: the final map ---- */

static uint32_t kind_of(const struct outgoing *outgoing, uint64_t page)
{
    if (regions_test(outgoing->pending, page))
        return WIRE_KIND_REMOTE;
    return regions_test(outgoing->sent, page) ? WIRE_KIND_HAVE : WIRE_KIND_EMPTY;
}

/* The run of one kind that begins at `page`. */
static struct wire_run run_of_kind(const struct outgoing *outgoing, uint64_t page)
{
    struct wire_run run = {.page = page, .pages = 0, .kind = kind_of(outgoing, page)};

    while (page < outgoing->regions.pages && run.pages < WIRE_RUN_MAX &&
           kind_of(outgoing, page) == run.kind) {
        if (run.kind == WIRE_KIND_EMPTY)
            __atomic_store_n(&outgoing->hashes[page], proof_page(PROOF_EMPTY, page),
                             __ATOMIC_RELAXED);
        run.pages++;
        page++;
    }
    return run;
}

static int write_map(struct outgoing *outgoing)
{
    uint8_t *payload = outgoing->bulk_batch.contents[0];
    uint64_t page = 0;
    int r = 0;

    while (page < outgoing->regions.pages && r == 0) {
        uint8_t header[WIRE_HEADER_BYTES];
        struct iovec parts[2] = {{header, sizeof(header)}, {payload, 0}};
        uint32_t count = 0;

        for (; page < outgoing->regions.pages && count < WIRE_MAP_MAX; count++) {
            struct wire_run run = run_of_kind(outgoing, page);
            wire_write_run(payload, count, &run);
            page += run.pages;
        }
        wire_write_header(header, WIRE_MAP, count, 0);
        parts[1].iov_len = count * sizeof(struct wire_run);
        r = stream_send(&outgoing->bulk, parts, 2, NULL);
    }
    if (r == 0) {
        append(&outgoing->bulk_batch, WIRE_MAP_END, 0, outgoing->regions.pages, 0);
        r = flush(&outgoing->bulk, &outgoing->bulk_batch);
    }
    return r;
}

static int make_map(struct outgoing *outgoing)
{
    int64_t pages = passes_stop(&outgoing->passes, outgoing->passes.begun);

    if (pages < 0)
        return (int)pages;
    outgoing->map_pending = pages;
    outgoing->cursor = 0;
    /* Requests come as soon as the map has arrived. */
    __atomic_store_n(&outgoing->task, OUTGOING_PUSH, __ATOMIC_RELEASE);
    __atomic_store_n(&outgoing->push_epoch, outgoing->bulk.epoch, __ATOMIC_SEQ_CST);
    return write_map(outgoing);
}

static void answer_stop(struct outgoing *outgoing, int result)
{
    __atomic_store_n(&outgoing->map_result, result, __ATOMIC_RELEASE);
    news(outgoing);
}

/* ---- bulk: the thread ---- */

/* 1: go on at once; 0: wait; -errno: the connection is over. */
static int work(struct outgoing *outgoing)
{
    int r;

    switch (task(outgoing)) {
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

static void *run_bulk(void *context)
{
    struct outgoing *outgoing = context;
    struct stream *stream = &outgoing->bulk;

    while (!__atomic_load_n(&outgoing->stop, __ATOMIC_ACQUIRE)) {
        int r;

        if (stream_adopt(stream))
            clear_batch(&outgoing->bulk_batch);
        r = work(outgoing);
        if (r == 0 && stream_wait(stream, POLLIN, -1))
            r = look_for_end(outgoing);
        if (r < 0 && r != -ECANCELED)
            stream_fail(stream, r, r == -EFAULT ? "RAM of the guest has left" : NULL);
    }
    return NULL;
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

void outgoing_stop(struct outgoing *outgoing)
{
    __atomic_store_n(&outgoing->map_result, -EINPROGRESS, __ATOMIC_RELEASE);
    set_task(outgoing, OUTGOING_MAP);
}

int outgoing_stopped(const struct outgoing *outgoing, uint64_t *ret_pending)
{
    int result = __atomic_load_n(&outgoing->map_result, __ATOMIC_ACQUIRE);

    if (result == 0)
        *ret_pending = (uint64_t)outgoing->map_pending;
    return result;
}

static int map_arrays(struct outgoing *outgoing)
{
    size_t bitmap = regions_bitmap_bytes(&outgoing->regions);

    outgoing->sent = regions_map(bitmap);
    outgoing->pending = regions_map(bitmap);
    outgoing->placed = regions_map(bitmap);
    outgoing->hashes = regions_map(outgoing->regions.pages * 8);
    outgoing->bulk_batch.contents = regions_map(OUTGOING_CONTENTS * PAGE_BYTES);
    return outgoing->sent && outgoing->pending && outgoing->placed && outgoing->hashes &&
                   outgoing->bulk_batch.contents
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
    r = -pthread_create(&outgoing->urgent_thread, NULL, run_urgent, outgoing);
    if (r == 0) {
        r = -pthread_create(&outgoing->bulk_thread, NULL, run_bulk, outgoing);
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
    if (r == 0)
        r = open_streams(outgoing);
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
