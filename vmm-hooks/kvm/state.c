/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state of the machine. Numbers are this machine's own: a state fits the build of memvm that
 * wrote it, and a processor and KVM that know the same registers.
 *
 * A vCPU is a list of parts, each with the ioctl that gets and the one that sets it. Parts and
 * model-specific registers that this KVM does not have are left out, and noted as such.
 *
 * A state that is loaded is a stranger's word. What is ours to understand (sizes, indices, queues)
 * is checked here and in the devices; what goes into KVM is checked by KVM, which takes worse from
 * any VMM. Whatever a state holds, it makes a guest, and touches nothing but that guest's RAM.
 */
#include "state.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define MAGIC          0x6d656d766d207361ULL /* "memvm sa" */
#define FORMAT_VERSION 2U

/* EFER is in kvm_sregs. */
static const uint32_t msr_indices[STATE_MSRS] = {
    0x10,                               /* TSC */
    0x174,      0x175,      0x176,      /* SYSENTER_CS, _ESP, _EIP */
    0x277,                              /* PAT */
    0xc0000081, 0xc0000082, 0xc0000083, /* STAR, LSTAR, CSTAR */
    0xc0000084, 0xc0000102, 0xc0000103, /* FMASK, KERNEL_GS_BASE, TSC_AUX */
};

/* In the order in which they are set. */
static const struct part {
    const char *name;
    unsigned long get, set;
    size_t at;
    bool needed;
} parts[] = {
    {"sregs", KVM_GET_SREGS, KVM_SET_SREGS, offsetof(struct vcpu_state, sregs), true},
    {"regs", KVM_GET_REGS, KVM_SET_REGS, offsetof(struct vcpu_state, regs), true},
    {"xcrs", KVM_GET_XCRS, KVM_SET_XCRS, offsetof(struct vcpu_state, xcrs), false},
    {"fpu", KVM_GET_FPU, KVM_SET_FPU, offsetof(struct vcpu_state, fpu), true},
    {"xsave", KVM_GET_XSAVE, KVM_SET_XSAVE, offsetof(struct vcpu_state, xsave), false},
    {"debugregs", KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, offsetof(struct vcpu_state, debugregs),
     false},
    {"events", KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, offsetof(struct vcpu_state, events),
     false},
};
#define PART_COUNT (sizeof(parts) / sizeof(parts[0]))

static int complain(const char *what, int error)
{
    fprintf(stderr, "memvm: %s: %s\n", what, strerror(-error));
    return error;
}

/* ---- a vCPU ---- */

static bool access_msr(int fd, unsigned long request, uint32_t index, uint64_t *value)
{
    _Alignas(8) uint8_t room[sizeof(struct kvm_msrs) + sizeof(struct kvm_msr_entry)] = {0};
    struct kvm_msrs *msrs = (struct kvm_msrs *)room;

    msrs->nmsrs = 1;
    msrs->entries[0].index = index;
    msrs->entries[0].data = *value;
    if (ioctl(fd, request, msrs) != 1)
        return false;
    *value = msrs->entries[0].data;
    return true;
}

static int save_vcpu(const struct vcpu *cpu, struct vcpu_state *state)
{
    state->halted = cpu->halted;
    for (uint32_t i = 0; i < PART_COUNT; i++) {
        if (ioctl(cpu->fd, parts[i].get, (char *)state + parts[i].at) == 0)
            state->parts |= 1U << i;
        else if (parts[i].needed)
            return complain(parts[i].name, -errno);
    }
    for (uint32_t i = 0; i < STATE_MSRS; i++)
        if (access_msr(cpu->fd, KVM_GET_MSRS, msr_indices[i], &state->msr_values[i]))
            state->msrs |= 1U << i;
    return 0;
}

static int load_vcpu(struct vcpu *cpu, const struct vcpu_state *state)
{
    for (uint32_t i = 0; i < PART_COUNT; i++)
        if (state->parts & 1U << i &&
            ioctl(cpu->fd, parts[i].set, (const char *)state + parts[i].at) < 0)
            return complain(parts[i].name, -errno);
    for (uint32_t i = 0; i < STATE_MSRS; i++) {
        uint64_t value = state->msr_values[i];

        if (state->msrs & 1U << i && !access_msr(cpu->fd, KVM_SET_MSRS, msr_indices[i], &value))
            return complain("a model-specific register", -EINVAL);
    }
    cpu->halted = state->halted;
    cpu->wake = true; /* its alarm was set on another clock: HLT may end for no reason */
    return 0;
}

static bool is_vcpu(const struct vcpu_state *state)
{
    for (uint32_t i = 0; i < PART_COUNT; i++)
        if (parts[i].needed && !(state->parts & 1U << i))
            return false;
    return state->parts >> PART_COUNT == 0 && state->msrs >> STATE_MSRS == 0 && state->halted <= 1;
}

/* ---- the machine ---- */

size_t state_bytes(uint32_t cpus)
{
    return offsetof(struct machine_state, vcpus) + cpus * sizeof(struct vcpu_state);
}

int state_check(const struct machine_state *state, size_t bytes)
{
    if (bytes < state_bytes(1) || state->magic != MAGIC || state->version != FORMAT_VERSION ||
        state->vcpu_bytes != sizeof(struct vcpu_state) ||
        state->board_bytes != sizeof(struct board_state))
        return -ENOEXEC;
    if (state->cpu_count < 1 || state->cpu_count > MACHINE_MAX_CPUS ||
        bytes != state_bytes(state->cpu_count) || state->memory_bytes % MEMORY_PAGE_BYTES != 0 ||
        state->memory_bytes <= ADDRESS_KERNEL || state->memory_bytes > ADDRESS_RAM_END)
        return -ENOEXEC;
    for (uint32_t i = 0; i < state->cpu_count; i++)
        if (!is_vcpu(&state->vcpus[i]))
            return -ENOEXEC;
    return 0;
}

int state_save(struct machine *machine, struct machine_state *ret_state)
{
    int r = 0;

    memset(ret_state, 0, sizeof(*ret_state));
    ret_state->magic = MAGIC;
    ret_state->version = FORMAT_VERSION;
    ret_state->cpu_count = machine->cpu_count;
    ret_state->memory_bytes = machine->memory.bytes;
    ret_state->vcpu_bytes = sizeof(struct vcpu_state);
    ret_state->board_bytes = sizeof(struct board_state);
    board_save(machine, &ret_state->board);
    for (uint32_t i = 0; r == 0 && i < machine->cpu_count; i++)
        r = save_vcpu(&machine->cpus[i], &ret_state->vcpus[i]);
    return r;
}

static int apply(struct machine *machine, const struct machine_state *state)
{
    int r = board_load(machine, &state->board);

    for (uint32_t i = 0; r == 0 && i < machine->cpu_count; i++)
        r = load_vcpu(&machine->cpus[i], &state->vcpus[i]);
    return r;
}

static int apply_or_go_back(struct machine *machine, const struct machine_state *state)
{
    struct machine_state *before = malloc(sizeof(*before));
    int r = before ? state_save(machine, before) : -ENOMEM;

    if (r == 0) {
        r = apply(machine, state);
        if (r < 0 && apply(machine, before) < 0)
            machine_end(machine, MACHINE_EXIT_FAILED);
    }
    free(before);
    return r;
}

int state_load(struct machine *machine, const struct machine_state *state, size_t bytes)
{
    int r = state_check(state, bytes);

    if (r == 0 &&
        (state->cpu_count != machine->cpu_count || state->memory_bytes != machine->memory.bytes))
        r = -EXDEV;
    if (r == 0)
        r = apply_or_go_back(machine, state);
    if (r == 0)
        machine_loaded(machine);
    return r;
}
