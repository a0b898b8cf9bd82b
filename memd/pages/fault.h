/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fault handler: one thread that serves every fault of this guest that the kernel hands to us.
 *
 *   - MISSING, in armed memory: the page is where its place says; the page source of that place
 *     brings the bytes, or has asked for them and places them when they come. A page that is frozen
 *     is missing too: the handler waits for the block's lock, finds the page back, and wakes.
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

struct fault_times {
    uint64_t count;
    uint64_t max_us;
    uint64_t buckets[FAULT_BUCKETS];
};

/* One more descriptor that the handler's thread waits for: the connection that remote pages come
 * by, so that nobody stands between the fault and the wire. Both are called on that thread, without
 * locks, and must not wait. */
struct fault_side {
    void *self;
    /* Before each wait: the descriptor (-1: none now) and what to wait for. */
    int (*prepare)(void *self, short *ret_events);
    /* After each wait, with what there is on it. */
    void (*ready)(void *self, short events);
};

struct fault_handler {
    struct guest_ram *ram;
    int nudge_fd; /* an eventfd */
    pthread_t thread;
    uint32_t tid;
    uint32_t open; /* futex: 0 until fault_open or fault_stop */
    uint32_t stop;
    uint32_t turns; /* of the thread's loop: one that ended after a change has seen it */
    const struct fault_side *side; /* NULL: none */
    struct fault_times times;      /* of those that were served here and now */
    bool in_progress;              /* the last one was not: its page was asked for */
    clockid_t cpu_clock;           /* of the thread, for clock_gettime */
    struct ram_block *last_block;  /* where the last fault was, for runs of them */
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

/* Any thread but the handler's: from now on this side, which must stay where it is, or none (NULL).
 * When it returns the thread no longer uses the one before. */
void fault_set_side(struct fault_handler *handler, const struct fault_side *side);
/* Any thread: the side has something new to prepare. */
void fault_nudge(struct fault_handler *handler);

void fault_record(struct fault_times *times, uint64_t ns);
/* The time, in microseconds, that `fraction` (0 to 1) of all faults were served in. */
uint32_t fault_quantile_us(const struct fault_times *times, double fraction);

/* Serves one fault at `address`; for the thread, and for tests. */
void fault_serve_missing(struct fault_handler *handler, uintptr_t address);
void fault_serve_write(struct fault_handler *handler, uintptr_t address);

#endif
