/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Everything that makes up the machine but its RAM, as bytes: what --save puts in front of RAM in
 * its file, and what the hook `save` gives memd to carry to another host. state.c says more.
 */
#ifndef MEMVM_STATE_H
#define MEMVM_STATE_H

#include "machine.h"

/* The registers that 64-bit guests use and that KVM keeps outside of its structs. */
#define STATE_MSRS 11U

struct vcpu_state {
    uint32_t parts; /* bitmap: which are here */
    uint32_t msrs;  /* likewise */
    uint8_t halted;
    struct kvm_sregs sregs;
    struct kvm_regs regs;
    struct kvm_xcrs xcrs;
    uint8_t xsave[sizeof(struct kvm_xsave)]; /* the struct may grow, and then stands alone */
    struct kvm_fpu fpu;
    struct kvm_debugregs debugregs;
    struct kvm_vcpu_events events;
    uint64_t msr_values[STATE_MSRS];
};

struct machine_state {
    uint64_t magic;
    uint32_t version, cpu_count;
    uint64_t memory_bytes;
    uint32_t vcpu_bytes, board_bytes; /* sizes of the structs below */
    struct board_state board;
    struct vcpu_state vcpus[MACHINE_MAX_CPUS]; /* only so many as there are count */
};

/* How many bytes the state of a machine with so many vCPUs has. */
size_t state_bytes(uint32_t cpus);

/* Looks whether these are all bytes of a state of some machine that this memvm could be; they may
 * come from anybody. 0 or -ENOEXEC. */
int state_check(const struct machine_state *state, size_t bytes);

/* Only while the machine does not run. 0 or -errno, after saying on standard error what failed. */
int state_save(struct machine *machine, struct machine_state *ret_state);

/*
 * Puts a state into a machine that does not run, and has as much memory and as many vCPUs. Checks
 * it first. 0; -ENOEXEC: it is none; -EXDEV: of a machine of another kind; or what KVM or a device
 * says against it. After an error all is as it was; a machine that could not go back ends.
 */
int state_load(struct machine *machine, const struct machine_state *state, size_t bytes);

#endif
