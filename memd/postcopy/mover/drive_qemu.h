/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A stock QEMU has no hooks: what its agent can't do for a mover, its monitor can. This stands
 * between the two and makes of both an agent that has hooks.
 */
#ifndef MEMD_POSTCOPY_MOVER_DRIVE_QEMU_H
#define MEMD_POSTCOPY_MOVER_DRIVE_QEMU_H

#include <stdbool.h>

/*
 * Starts a thread that passes on what the agent and the mover say to each other (mover_protocol.h),
 * and does by QEMU's monitor what the agent has no hooks for. `agent` is the agent's socket, `qmp`
 * a connection to the monitor; both are the thread's from then on (also after an error).
 * takes_over: an earlier mover has died, and nobody knows what it has done to QEMU. *ret_mover is
 * the socket that the mover takes for the agent's; when it is closed, or the agent goes, the
 * thread ends. 0 or -errno.
 */
int drive_qemu_start(int agent, int qmp, bool takes_over, int *ret_mover);

#endif
