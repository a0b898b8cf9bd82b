/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop's lower half: what it wants from the kernel. There are two of it, one file each, chosen
 * when a program is linked: io_uring (loop_uring.c), and the simulated one of vmm-hooks/sim. Each
 * also has loop_watch_add, loop_watch_remove and the jobs of loop.h.
 */
#ifndef MEMD_LOOP_KERNEL_H
#define MEMD_LOOP_KERNEL_H

#include "loop.h"

/* Makes loop->kernel. */
int loop_kernel_start(struct loop *loop);
void loop_kernel_stop(struct loop *loop);

/* Until something is complete, for at most wait_ns (0: hands over what is queued and returns). 0,
 * also when nothing came; -errno when the kernel's side is broken. */
int loop_kernel_wait(struct loop *loop, uint64_t wait_ns);
/* Calls ready() and done() for what is complete: a bounded number of them. */
void loop_kernel_complete(struct loop *loop);

#endif
