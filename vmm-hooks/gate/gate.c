/* SPDX-License-Identifier: Apache-2.0 */
#include "gate.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "clock.h"

/* A struct that says it is larger than this has not been initialized. */
#define SIZE_MAX_BELIEVED 4096U

/* Behind the bitmap that a hook is given: nothing there is its to write. */
#define CANARY 0x6d656d642d6e6f21ULL

static bool pairs_are_whole(const struct memd_ops *ops)
{
    return !ops->pause == !ops->resume && !ops->save == !ops->load && !ops->vouch == !ops->unvouch;
}

int gate_open(struct gate *gate, const struct memd_ops *ops, void *opaque)
{
    size_t bytes;

    memset(gate, 0, sizeof(*gate));
    gate->opaque = opaque;
    if (!ops)
        return 0;
    if (ops->size < sizeof(ops->size) || ops->size > SIZE_MAX_BELIEVED ||
        ops->size % sizeof(void *) != 0)
        return -EINVAL;
    bytes = ops->size < sizeof(gate->ops) ? ops->size : sizeof(gate->ops);
    memcpy(&gate->ops, ops, bytes);
    if (!pairs_are_whole(&gate->ops)) {
        memset(&gate->ops, 0, sizeof(gate->ops));
        return -EINVAL;
    }
    return 0;
}

static void quarantine(struct gate *gate, const char *offence)
{
    gate->quarantined = true;
    if (!gate->offence)
        gate->offence = offence;
}

static void check_duration(struct gate *gate, uint64_t begun_ns, uint64_t limit_ns,
                           const char *offence)
{
    if (clock_now_ns() - begun_ns > limit_ns)
        quarantine(gate, offence);
}

/* Whole pages, of which there are some, and no more than are asked about at once. */
static bool is_a_range(const void *addr, size_t bytes)
{
    return addr && (uintptr_t)addr % PAGE_BYTES == 0 && bytes > 0 && bytes % PAGE_BYTES == 0 &&
           bytes <= GATE_RANGE_PAGES * PAGE_BYTES;
}

bool gate_may_freeze(struct gate *gate, const void *addr, size_t bytes)
{
    uint64_t begun = clock_now_ns();
    int answer;

    if (!gate->ops.pinned)
        return true;
    if (gate->quarantined)
        return false;
    answer = gate->ops.pinned(gate->opaque, addr, bytes);
    if (answer > 1)
        quarantine(gate, "its hook 'pinned' answered neither 0, 1 nor an error");
    check_duration(gate, begun, GATE_QUICK_NS, "its hook 'pinned' took longer than a second");
    return answer == 0 && !gate->quarantined;
}

/* ---- pause and resume ---- */

int gate_pause(struct gate *gate)
{
    uint64_t begun = clock_now_ns();
    int r;

    if (!gate->ops.pause || gate->quarantined)
        return -ENOTSUP;
    if (gate->paused)
        return -EALREADY;
    r = gate->ops.pause(gate->opaque);
    if (r > 0) {
        quarantine(gate, "its hook 'pause' answered neither 0 nor an error");
        return -EPROTO;
    }
    gate->paused = r == 0;
    check_duration(gate, begun, GATE_SLOW_NS, "its hook 'pause' took longer than a minute");
    return r;
}

int gate_resume(struct gate *gate)
{
    uint64_t begun = clock_now_ns();
    int r;

    if (!gate->paused)
        return -EALREADY;
    gate->paused = false;
    r = gate->ops.resume(gate->opaque);
    if (r > 0) {
        quarantine(gate, "its hook 'resume' answered neither 0 nor an error");
        return -EPROTO;
    }
    check_duration(gate, begun, GATE_SLOW_NS, "its hook 'resume' took longer than a minute");
    return r;
}

/* ---- save and load ---- */

int memd_stream_write(struct memd_stream *stream, const void *data, size_t bytes)
{
    if (!stream || (!data && bytes))
        return -EINVAL;
    if (!stream->writes)
        return -EBADF;
    if (bytes > stream->bytes - stream->at) {
        stream->failed = true;
        return -ENOSPC;
    }
    if (bytes)
        memcpy(stream->data + stream->at, data, bytes);
    stream->at += bytes;
    return 0;
}

int memd_stream_read(struct memd_stream *stream, void *ret_data, size_t bytes)
{
    if (!stream || (!ret_data && bytes))
        return -EINVAL;
    if (!stream->reads)
        return -EBADF;
    if (bytes > stream->bytes - stream->at)
        return -ENODATA;
    if (bytes)
        memcpy(ret_data, stream->data + stream->at, bytes);
    stream->at += bytes;
    return 0;
}

/* What hinders a call that wants the VM paused. */
static int want_paused(const struct gate *gate, bool has_hook)
{
    if (!has_hook || gate->quarantined)
        return -ENOTSUP;
    return gate->paused ? 0 : -EBUSY;
}

int gate_save(struct gate *gate, void *into, size_t room, size_t *ret_bytes)
{
    uint64_t begun = clock_now_ns();
    int r = want_paused(gate, gate->ops.save);
    bool failed;

    if (r < 0)
        return r;
    gate->stream = (struct memd_stream){.data = into, .bytes = room, .writes = true};
    r = gate->ops.save(gate->opaque, &gate->stream);
    gate->stream.writes = false;
    failed = gate->stream.failed;
    if (r > 0)
        quarantine(gate, "its hook 'save' answered neither 0 nor an error");
    else if (r == 0 && failed)
        quarantine(gate, "its hook 'save' said that all was well after a write had failed");
    check_duration(gate, begun, GATE_SLOW_NS, "its hook 'save' took longer than a minute");
    if (gate->quarantined)
        return -EPROTO;
    if (r == 0)
        *ret_bytes = gate->stream.at;
    return failed ? -ENOSPC : r;
}

int gate_load(struct gate *gate, const void *from, size_t bytes)
{
    uint64_t begun = clock_now_ns();
    int r = want_paused(gate, gate->ops.load);

    if (r < 0)
        return r;
    gate->stream = (struct memd_stream){.data = (uint8_t *)from, .bytes = bytes, .reads = true};
    r = gate->ops.load(gate->opaque, &gate->stream);
    gate->stream.reads = false;
    if (r > 0)
        quarantine(gate, "its hook 'load' answered neither 0 nor an error");
    else if (r == 0 && gate->stream.at != bytes)
        quarantine(gate, "its hook 'load' said that all was well and had not read all");
    check_duration(gate, begun, GATE_SLOW_NS, "its hook 'load' took longer than a minute");
    return gate->quarantined ? -EPROTO : r;
}

/* ---- the dirty log ---- */

static void add_all(uint64_t *bitmap, size_t pages)
{
    for (size_t i = 0; i < pages; i++)
        bitmap[i / 64] |= 1ULL << (i % 64);
}

/* Has the hook set bits of pages that it was not asked about, or written behind the bitmap? */
static bool wrote_too_far(const uint64_t *bitmap, size_t pages)
{
    if (bitmap[GATE_BITMAP_WORDS] != CANARY)
        return true;
    for (size_t i = pages; i < GATE_RANGE_PAGES; i++) {
        if (bitmap[i / 64] >> (i % 64) & 1)
            return true;
    }
    return false;
}

bool gate_dirty_log(struct gate *gate, const void *addr, size_t bytes, uint64_t *bitmap)
{
    uint64_t told[GATE_BITMAP_WORDS + 1] = {0}, begun = clock_now_ns();
    size_t pages = bytes / PAGE_BYTES;
    int r = -EINVAL;

    if (!gate->ops.dirty_log)
        return false;
    told[GATE_BITMAP_WORDS] = CANARY;
    if (!gate->quarantined && is_a_range(addr, bytes)) {
        r = gate->ops.dirty_log(gate->opaque, addr, bytes, told);
        if (r > 0)
            quarantine(gate, "its hook 'dirty_log' answered neither 0 nor an error");
        if (wrote_too_far(told, pages))
            quarantine(gate, "its hook 'dirty_log' told of pages that it was not asked about");
        check_duration(gate, begun, GATE_QUICK_NS,
                       "its hook 'dirty_log' took longer than a second");
    }
    if (r != 0 || gate->quarantined) {
        add_all(bitmap, pages);
        return true;
    }
    for (size_t word = 0; word < (pages + 63) / 64; word++)
        bitmap[word] |= told[word];
    return true;
}

/* ---- the promise that nothing pins a range ---- */

bool gate_vouch(struct gate *gate, const void *addr, size_t bytes)
{
    uint64_t begun = clock_now_ns();
    int answer;

    if (!gate->ops.vouch || gate->quarantined || gate->vouched || !is_a_range(addr, bytes))
        return false;
    answer = gate->ops.vouch(gate->opaque, addr, bytes);
    if (answer == 1) {
        gate->vouched = addr;
        gate->vouched_bytes = bytes;
    }
    if (answer > 1)
        quarantine(gate, "its hook 'vouch' answered neither 0, 1 nor an error");
    check_duration(gate, begun, GATE_QUICK_NS, "its hook 'vouch' took longer than a second");
    /* A promise of somebody who broke another one is worth nothing. */
    if (gate->quarantined)
        gate_unvouch(gate);
    return gate->vouched;
}

void gate_unvouch(struct gate *gate)
{
    const void *addr = gate->vouched;
    uint64_t begun = clock_now_ns();

    if (!addr)
        return;
    gate->vouched = NULL;
    gate->ops.unvouch(gate->opaque, addr, gate->vouched_bytes);
    check_duration(gate, begun, GATE_QUICK_NS, "its hook 'unvouch' took longer than a second");
}
