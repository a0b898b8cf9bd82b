/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Proportional set sizes of the VMMs and of memd. Reading smaps_rollup takes the kernel time in
 * proportion to the memory of the process, so a kernel worker of io_uring does it; who wants to
 * know waits for the sample, and a sample serves everybody for a second.
 */
#ifndef MEMD_PSS_H
#define MEMD_PSS_H

#include "loop.h"

struct daemon;
struct guest;
struct pss_reading;

struct pss_waiter {
    void (*sampled)(struct pss_waiter *waiter);
    struct pss_waiter *next;
    bool queued;
};

struct pss {
    uint64_t sampled_ns;
    uint32_t out; /* readings that are not done */
    struct pss_waiter *waiters;
    struct pss_reading *readings;
    uint64_t own_bytes, own_shmem_bytes;
};

/* Calls waiter->sampled, at once when the sample is fresh (then true), or later. */
bool pss_sample(struct daemon *daemon, struct pss_waiter *waiter);
/* The guest is about to be freed. */
void pss_forget(struct daemon *daemon, const struct guest *guest);
void pss_cancel(struct daemon *daemon, struct pss_waiter *waiter);

#endif
