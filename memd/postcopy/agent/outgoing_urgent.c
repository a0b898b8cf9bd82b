/* SPDX-License-Identifier: Apache-2.0 */
/* The urgent connection: requests are answered, with what comes next by their stride, and the
 * destination says what it has. A thread of its own. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>

#include "outgoing_parts.h"

/* A step between two faults that may be a stride. */
#define MAX_STEP   128
#define MAX_WINDOW 16U

/* Between two looks whether bulk has let go. */
#define HOLD_NS 50000L

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
        run = outgoing_run(outgoing, page, 1);
        r = outgoing_send_run(outgoing, &outgoing->urgent, &outgoing->urgent_batch, &run);
    }
    return r == 0 ? outgoing_flush(&outgoing->urgent, &outgoing->urgent_batch) : r;
}

static void give_hint(struct outgoing *outgoing, uint64_t page)
{
    uint32_t head = outgoing->hint_head;

    __atomic_store_n(&outgoing->hints[head % OUTGOING_HINTS], page, __ATOMIC_RELAXED);
    __atomic_store_n(&outgoing->hint_head, head + 1, __ATOMIC_RELEASE);
}

static int answer(struct outgoing *outgoing, uint64_t page)
{
    struct run run = outgoing_run(outgoing, page, 1);
    int r;

    outgoing_add(&outgoing->counts.demand, 1);
    give_hint(outgoing, page);
    if (outgoing_is_off(outgoing, MOVER_NO_URGENT)) {
        stream_wake(&outgoing->bulk);
        return 0;
    }
    regions_clear(outgoing->pending, page);
    r = outgoing_send_run(outgoing, &outgoing->urgent, &outgoing->urgent_batch, &run);
    if (r == 0)
        r = outgoing_flush(&outgoing->urgent, &outgoing->urgent_batch);
    if (r == 0 && !outgoing_is_off(outgoing, MOVER_NO_LOCALITY))
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

    outgoing_append(batch, WIRE_PROVEN, (uint32_t)-result, region, 0);
    if (!outgoing->proven) {
        outgoing->proven_result = result;
        outgoing->proven_region = region;
        outgoing->proven_pages = pages;
        __atomic_store_n(&outgoing->proven, 1, __ATOMIC_RELEASE);
    }
    result = outgoing_flush(&outgoing->urgent, batch);
    outgoing_tell(outgoing);
    return result;
}

static int take_frame(struct outgoing *outgoing, const struct wire_frame *frame,
                      const uint8_t *payload, const char **ret_reason)
{
    if (outgoing_at(outgoing) != OUTGOING_PUSH) {
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

void *outgoing_run_urgent(void *context)
{
    struct outgoing *outgoing = context;
    struct stream *stream = &outgoing->urgent;

    __atomic_store_n(&outgoing->urgent_tid, (uint32_t)sys_call0(SYS_gettid), __ATOMIC_RELEASE);
    while (!__atomic_load_n(&outgoing->stop, __ATOMIC_ACQUIRE)) {
        const char *reason = NULL;
        long got = 0;

        if (stream_adopt(stream)) {
            outgoing_clear(&outgoing->urgent_batch);
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
