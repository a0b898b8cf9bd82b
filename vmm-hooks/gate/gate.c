/* SPDX-License-Identifier: Apache-2.0 */
#include "gate.h"

#include <errno.h>
#include <string.h>

void gate_open(struct gate *gate, const struct memd_ops *ops, void *opaque)
{
    size_t bytes;

    memset(gate, 0, sizeof(*gate));
    gate->opaque = opaque;
    if (!ops)
        return;
    bytes = ops->size < sizeof(gate->ops) ? ops->size : sizeof(gate->ops);
    memcpy(&gate->ops, ops, bytes);
}

static void quarantine(struct gate *gate, const char *offence)
{
    gate->quarantined = true;
    gate->offence = offence;
}

bool gate_may_freeze(struct gate *gate, const void *addr, size_t bytes)
{
    int answer;

    if (!gate->ops.pinned)
        return true;
    if (gate->quarantined)
        return false;
    answer = gate->ops.pinned(gate->opaque, addr, bytes);
    if (answer > 1)
        quarantine(gate, "its hook 'pinned' answered neither 0, 1 nor an error");
    return answer == 0;
}

int gate_pause(struct gate *gate)
{
    int r;

    if (!gate->ops.pause || !gate->ops.resume || gate->quarantined)
        return -ENOTSUP;
    if (gate->paused)
        return -EALREADY;
    r = gate->ops.pause(gate->opaque);
    if (r > 0) {
        quarantine(gate, "its hook 'pause' answered neither 0 nor an error");
        return -EPROTO;
    }
    gate->paused = r == 0;
    return r;
}

int gate_resume(struct gate *gate)
{
    int r;

    if (!gate->paused)
        return -EALREADY;
    gate->paused = false;
    r = gate->ops.resume(gate->opaque);
    if (r > 0) {
        quarantine(gate, "its hook 'resume' answered neither 0 nor an error");
        return -EPROTO;
    }
    return r;
}
