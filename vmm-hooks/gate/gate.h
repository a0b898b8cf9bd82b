/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gate: the only file that calls a VMM's hooks. It checks the state before and the answer
 * behind each call, and after the first impossible answer asks that hook no more.
 */
#ifndef MEMD_GATE_GATE_H
#define MEMD_GATE_GATE_H

#include <memd/memd.h>
#include <stdbool.h>

struct gate {
    struct memd_ops ops;
    void *opaque;
    bool paused;
    bool quarantined;    /* a hook has lied: none is called again */
    const char *offence; /* in words, once quarantined */
};

/* Copies the ops as far as the caller's version of them goes. */
void gate_open(struct gate *gate, const struct memd_ops *ops, void *opaque);

/* False when the VMM says that the range must be left alone, or can't tell. */
bool gate_may_freeze(struct gate *gate, const void *addr, size_t bytes);

/* Quiesces the VM: 0, or -errno (-ENOTSUP without the hook, -EALREADY when it is paused). */
int gate_pause(struct gate *gate);
/* Ends a gate_pause that returned 0. */
int gate_resume(struct gate *gate);

#endif
