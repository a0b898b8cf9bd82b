/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The machine: a VM of KVM's with its RAM, its vCPUs (one thread each) and its board.
 *
 * Threads
 *   main      sets up, starts the vCPUs, then brings input and signals, saves, ends
 *   vCPU      runs its guest; everything that a device does it does in here, under the board's lock
 *   the agent of memd, which may pause and resume the machine, and save and load its state
 *
 * The machine is *held*, and no vCPU runs, while somebody has paused it or (--incoming) its state
 * has not come yet.
 *
 * `lock` guards what is marked so. A vCPU looks at it before each entry into the guest. To make it
 * look, it is kicked: the signal's handler sets immediate_exit, so that KVM_RUN comes back with
 * EINTR, even when it had not been entered yet.
 */
#ifndef MEMVM_MACHINE_H
#define MEMVM_MACHINE_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>

#include "address_map.h"
#include "board.h"
#include "memory.h"

struct memd_vm;
struct machine;

struct vcpu {
    struct machine *machine;
    uint32_t index;
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    pthread_cond_t changed; /* something for this vCPU, under the machine's lock */

    /* Under the machine's lock. */
    bool parked;    /* held, and its last access to a device is complete */
    bool wake;      /* a HLT is to end */
    uint64_t alarm; /* when its next HLT ends at the latest (CLOCK_MONOTONIC, ns); 0: no alarm */

    /* Its thread's own. */
    bool halted;
    bool unfinished; /* KVM completes the last access to a device at the next entry */
};

/* How the machine ends. */
enum machine_exit {
    MACHINE_EXIT_FAILED = 3, /* a vCPU can't go on: said on standard error */
};

struct machine {
    int kvm_fd, vm_fd;
    struct guest_memory memory;
    struct board board;
    struct memd_vm *memd; /* NULL: runs without memd */
    uint32_t cpu_count;
    struct vcpu cpus[MACHINE_MAX_CPUS];

    pthread_mutex_t lock;
    pthread_cond_t parked; /* a vCPU has parked, or ended */
    int ended_fd;          /* eventfd: readable once it has ended */
    bool leaving; /* memd has its state for another host, and has not let it go on (atomic) */
    /* Under the lock. */
    uint32_t pauses; /* how many want it paused */
    bool incoming;   /* its state has still to come */
    bool started, ended;
    int exit_status;
};

/* Makes the VM, its vCPUs and its memory; nothing runs yet. 0 or -errno, after saying what failed.
 */
int machine_open(struct machine *machine, uint64_t memory_bytes, uint32_t cpus);

/* Sets a vCPU to the beginning described in address_map.h. The page tables are written by
 * machine_map_low(). 0 or -errno. */
int machine_boot_vcpu(struct vcpu *cpu, uint64_t entry);
void machine_map_low(struct machine *machine);

/* The vCPUs run from now on. 0 or -errno. */
int machine_start(struct machine *machine);

/* Returns when no vCPU runs and no device is at work; they stay so until as many machine_resume()
 * have come. Waits for some seconds at most: -EBUSY, all is as before (somebody waits for a page
 * that isn't there, see vcpu.c). -ESHUTDOWN: it has ended. Any thread but a vCPU's. */
int machine_pause(struct machine *machine);
void machine_resume(struct machine *machine);
/* Its state has come: it is held no longer for want of it. */
void machine_loaded(struct machine *machine);

bool machine_is_held(struct machine *machine);

/* Ends the HLT of this vCPU, or its next one. Any thread. */
void machine_wake(struct machine *machine, uint32_t cpu);

/* The machine ends with this status, if it had not before. Any thread. */
void machine_end(struct machine *machine, int exit_status);

/* After machine_end(): waits for the vCPUs' threads. Returns the exit status. */
int machine_join(struct machine *machine);

/* vcpu.c: the thread of a vCPU. */
void *vcpu_run(void *vcpu);
/* The signal that kicks; its handler is installed by machine_start(). */
#define VCPU_KICK SIGUSR1
void vcpu_on_kick(int number);

#endif
