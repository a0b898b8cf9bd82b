/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gate: the only file that calls a VMM's hooks. It checks range and state before, and answer,
 * side effects and duration behind each call, and after the first offence asks the VMM no more.
 * Exceptions are what ends something that has begun: a pause that returned 0 is resumed, a promise
 * is given back.
 *
 * It does not protect against a hook that never returns (the thread that called is gone then, and
 * the guest runs on without sharing), nor against one that writes where it has no business.
 *
 * One thread at a time.
 */
#ifndef MEMD_GATE_GATE_H
#define MEMD_GATE_GATE_H

#include <memd/memd.h>
#include <stdbool.h>

#include "units.h"

/* What dirty_log and vouch are asked about at once. */
#define GATE_RANGE_PAGES  512U
#define GATE_BITMAP_WORDS (GATE_RANGE_PAGES / 64)

/* Longer than that a hook may not take; ten times what a busy host makes of a quick one. */
#define GATE_QUICK_NS 1000000000ULL
#define GATE_SLOW_NS  60000000000ULL

/* What a save hook has written, or a load hook is given: a piece of memory of the caller's. */
struct memd_stream {
    uint8_t *data;
    size_t bytes; /* write: what there is room for; read: what there is */
    size_t at;
    bool writes, reads; /* at most one; neither: no hook is being called */
    bool failed;        /* a write did not fit */
};

struct gate {
    struct memd_ops ops;
    void *opaque;
    struct memd_stream stream; /* here, so that a hook that kept it gets -EBADF later */
    const void *vouched;       /* NULL: no promise is out */
    size_t vouched_bytes;
    bool paused;
    bool quarantined;    /* a hook has lied: none is called again */
    const char *offence; /* in words, once quarantined */
};

/* Copies the ops as far as the caller's version of them goes; what is behind them in a newer
 * version is not called. 0; -EINVAL: a size that no version has, or half of a pair. */
int gate_open(struct gate *gate, const struct memd_ops *ops, void *opaque);

/* False when the VMM says that the range must be left alone, or can't tell. */
bool gate_may_freeze(struct gate *gate, const void *addr, size_t bytes);

/* Quiesces the VM: 0, or -errno (-ENOTSUP without the hook, -EALREADY when it is paused). */
int gate_pause(struct gate *gate);
/* Ends a gate_pause that returned 0. */
int gate_resume(struct gate *gate);

/* While it is paused: its state into `into`, of which `room` bytes may be used; how many were in
 * *ret_bytes. -ENOTSUP, -EBUSY: it is not paused; -ENOSPC: it is more; -EPROTO: an offence; what
 * the hook answered. */
int gate_save(struct gate *gate, void *into, size_t room, size_t *ret_bytes);
/* While it is paused: a state that gate_save got. Errors as above. */
int gate_load(struct gate *gate, const void *from, size_t bytes);

/* Adds the pages of the range that the VMM knows to be written to bitmap (a bit a page, as many
 * words as the range needs). True also when the VMM can't tell or has lied: then all of the range
 * is added. False: the VMM has no such log; nothing was added. */
bool gate_dirty_log(struct gate *gate, const void *addr, size_t bytes, uint64_t *bitmap);

/* True: the VMM has promised that nothing pins the range, until gate_unvouch. */
bool gate_vouch(struct gate *gate, const void *addr, size_t bytes);
/* Gives the promise back; nothing when none is out. */
void gate_unvouch(struct gate *gate);

#endif
