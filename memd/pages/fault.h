/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fault handler: one thread that serves every fault of this guest that the kernel hands to us.
 *
 *   - MISSING, in armed memory: the page is where its place says; the page source of that place
 *     brings the bytes. A page that is frozen is missing too: the handler waits for the block's
 *     lock, finds the page back, and wakes.
 *   - write-protect, in a mapping of the store: the share is broken, by a copy that is prepared in
 *     the shadow and moved over. Where that can't be had (no memory, no VMA) the protection is
 *     lifted and the kernel copies: right as well, but the page is captive then.
 *
 * It never touches guest RAM, never waits for another thread but for a block's lock, takes no
 * signal, and allocates nothing.
 */
#ifndef MEMD_PAGES_FAULT_H
#define MEMD_PAGES_FAULT_H

#include <pthread.h>
#include <time.h>

#include "ram.h"

/* Service times in powers of two of a quarter: bucket b holds times below 2^((b+1)/4) us. */
#define FAULT_BUCKETS 96U

struct fault_handler {
    struct guest_ram *ram;
    int stop_fd;
    pthread_t thread;
    uint32_t tid;
    uint32_t open; /* futex: 0 until fault_open or fault_stop */
    uint64_t count;
    uint64_t max_us;
    uint64_t buckets[FAULT_BUCKETS];
    clockid_t cpu_clock;          /* of the thread, for clock_gettime */
    struct ram_block *last_block; /* where the last fault was, for runs of them */
    uint32_t last_end;
    uint32_t window;
};

/* Starts the thread, which then waits for fault_open (so that memd can be told its id before there
 * is a userfaultfd). 0 or -errno; `handler` and `ram` must outlive fault_stop. */
int fault_start(struct fault_handler *handler, struct guest_ram *ram);

/* `ram` is open: faults are served from now on. */
void fault_open(struct fault_handler *handler);

/* Ends the thread. Every fault that waits must have been made impossible before (un-shared,
 * unregistered). */
void fault_stop(struct fault_handler *handler);

/* The time, in microseconds, that `fraction` (0 to 1) of all faults were served in. */
uint32_t fault_quantile_us(const struct fault_handler *handler, double fraction);

/* Serves one fault at `address`; for the thread, and for tests. */
void fault_serve_missing(struct fault_handler *handler, uintptr_t address);
void fault_serve_write(struct fault_handler *handler, uintptr_t address);

#endif
