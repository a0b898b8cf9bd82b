/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The second merge engine: the kernel's own ksmd, for guests without an agent.
 *
 * ksmd runs only while such a guest lives. Before anything is touched the found settings are
 * written to the state directory; they are put back when the last such guest has gone, when memd
 * stops, and by the next memd when this one was killed. Meanwhile pages_to_scan follows a CPU
 * budget, by what ksmd really used (its own CPU time), and ksmd sleeps 20 ms between two batches.
 *
 * Not promised: a time by which pages are merged. ksmd needs two passes, and rehashes everything.
 */
#ifndef MEMD_KSM_KERNEL_KSM_H
#define MEMD_KSM_KERNEL_KSM_H

#include <sys/types.h>

#include "units.h"

#define KERNEL_KSM_WORDS 160

struct kernel_ksm {
    char sysfs[128]; /* /sys/kernel/mm/ksm, or a test's */
    int state_dir;
    bool available;
    char reason[KERNEL_KSM_WORDS]; /* why not */
    bool running;                  /* our settings are in force */
    uint32_t guests;
    uint32_t cpu_percent;
    uint64_t pages_to_scan;
    pid_t ksmd;
    uint64_t ksmd_cpu_ns, looked_ns; /* at the last look */
    uint64_t cpu_ns;                 /* ksmd's, while the engine was on */
    /* ksmd's CPU time; tests have their own. */
    int (*cpu_of)(pid_t pid, uint64_t *ret_ns);
};

/* Finds out whether there is a ksmd to steer, and restores what a killed memd left changed. */
void kernel_ksm_start(struct kernel_ksm *ksm, const char *sysfs, int state_dir,
                      uint32_t cpu_percent);
void kernel_ksm_stop(struct kernel_ksm *ksm);

/* One guest more, one less that needs it. */
int kernel_ksm_add(struct kernel_ksm *ksm, uint64_t now_ns);
void kernel_ksm_remove(struct kernel_ksm *ksm, uint64_t now_ns);
/* Once a second: steers. */
void kernel_ksm_tick(struct kernel_ksm *ksm, uint64_t now_ns);

struct kernel_ksm_figures {
    uint64_t pages_shared, pages_sharing, zero_pages;
};
struct kernel_ksm_figures kernel_ksm_figures(const struct kernel_ksm *ksm);
/* Of one process: pages that ksmd merged, and zero pages it dropped. 0 where the kernel won't say.
 */
void kernel_ksm_of_process(pid_t pid, uint64_t *ret_merged_pages, uint64_t *ret_zero_pages);

#endif
