/* SPDX-License-Identifier: Apache-2.0 */
/* The workload: see workload.c. */
#ifndef BARE_WORKLOAD_H
#define BARE_WORKLOAD_H

#include "address_map.h"
#include "boot.h"

/* What a vCPU has done. Each writes its own; anybody may read. */
struct work {
    _Alignas(64) uint64_t rounds;
    uint64_t verified; /* pages looked at */
    uint64_t hot_writes;
    uint64_t flips;
    uint64_t given_up;
    uint64_t errors;
    uint32_t reports; /* the last report that it took part in */
    uint32_t turn;    /* the last generation that it gave */
};

extern struct work work[MACHINE_MAX_CPUS];
extern uint32_t workload_quiet; /* 1: only verify, write nothing */

/* One round of this vCPU over its part of everything; `pause_here` is called after each burst. */
void workload_round(const struct boot_info *boot, uint32_t cpu, void (*pause_here)(uint32_t cpu));

/* This vCPU's part of everything is looked at, and nothing written. */
void workload_verify(const struct boot_info *boot, uint32_t cpu);

#endif
