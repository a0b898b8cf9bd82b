/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Save and load. The file: a header, the vCPUs, the board, then RAM at its own offset, so that RAM
 * page N is where it can be mapped; pages of zeros are holes. Numbers are this machine's own: a
 * file fits the build of memvm that wrote it, and a processor and KVM that know the same state.
 *
 * A vCPU is a list of parts, each with the ioctl that gets and the one that sets it. Parts and
 * model-specific registers that this KVM does not have are left out, and noted as such.
 */
#include "snapshot.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define MAGIC          0x6d656d766d207361ULL /* "memvm sa" */
#define FORMAT_VERSION 1U
#define RAM_AT         (1UL << 20)
#define TEXT_CHARS     200U

struct header {
    uint64_t magic;
    uint32_t version, cpus;
    uint64_t memory_bytes;
    uint32_t cpu_bytes, board_bytes; /* sizes of the structs that follow */
};

/* The registers that 64-bit guests use; EFER is in kvm_sregs. */
static const uint32_t msr_indices[] = {
    0x10,                               /* TSC */
    0x174,      0x175,      0x176,      /* SYSENTER_CS, _ESP, _EIP */
    0x277,                              /* PAT */
    0xc0000081, 0xc0000082, 0xc0000083, /* STAR, LSTAR, CSTAR */
    0xc0000084, 0xc0000102, 0xc0000103, /* FMASK, KERNEL_GS_BASE, TSC_AUX */
};
#define MSR_COUNT (sizeof(msr_indices) / sizeof(msr_indices[0]))

struct vcpu_state {
    uint32_t parts; /* bitmap: which are here */
    uint32_t msrs;  /* likewise */
    uint8_t halted;
    struct kvm_sregs sregs;
    struct kvm_regs regs;
    struct kvm_xcrs xcrs;
    _Alignas(64) uint8_t xsave[sizeof(struct kvm_xsave)];
    struct kvm_fpu fpu;
    struct kvm_debugregs debugregs;
    struct kvm_vcpu_events events;
    uint64_t msr_values[MSR_COUNT];
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

static int complain(const char *path, int error)
{
    fprintf(stderr, "memvm: %s: %s\n", path,
            error == -ENOEXEC ? "no machine that this memvm has saved" : strerror(-error));
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
    memset(state, 0, sizeof(*state));
    state->halted = cpu->halted;
    for (uint32_t i = 0; i < PART_COUNT; i++) {
        if (ioctl(cpu->fd, parts[i].get, (char *)state + parts[i].at) == 0)
            state->parts |= 1U << i;
        else if (parts[i].needed)
            return complain(parts[i].name, -errno);
    }
    for (uint32_t i = 0; i < MSR_COUNT; i++)
        if (access_msr(cpu->fd, KVM_GET_MSRS, msr_indices[i], &state->msr_values[i]))
            state->msrs |= 1U << i;
    return 0;
}

static int load_vcpu(struct vcpu *cpu, struct vcpu_state *state)
{
    cpu->halted = state->halted;
    cpu->wake = true; /* its alarm was set on another clock: HLT may end for no reason */
    for (uint32_t i = 0; i < PART_COUNT; i++)
        if (state->parts & 1U << i && ioctl(cpu->fd, parts[i].set, (char *)state + parts[i].at) < 0)
            return complain(parts[i].name, -errno);
    for (uint32_t i = 0; i < MSR_COUNT; i++)
        if (state->msrs & 1U << i &&
            !access_msr(cpu->fd, KVM_SET_MSRS, msr_indices[i], &state->msr_values[i]))
            return complain("a model-specific register", -EINVAL);
    return 0;
}

/* ---- RAM ---- */

static bool is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, MEMORY_PAGE_BYTES - 1) == 0;
}

static int write_all(int fd, const void *from, size_t bytes, off_t at)
{
    ssize_t done = pwrite(fd, from, bytes, at);

    if (done < 0)
        return -errno;
    return (size_t)done == bytes ? 0 : -ENOSPC;
}

/* Page by page, as the kernel's page cache would do it anyway. */
static int save_memory(int fd, const struct guest_memory *memory)
{
    int r = ftruncate(fd, (off_t)(RAM_AT + memory->bytes)) < 0 ? -errno : 0;

    for (uint64_t at = 0; r == 0 && at < memory->bytes; at += MEMORY_PAGE_BYTES)
        if (!is_zero(memory->base + at))
            r = write_all(fd, memory->base + at, MEMORY_PAGE_BYTES, (off_t)(RAM_AT + at));
    return r;
}

static int read_all(int fd, void *to, size_t bytes, off_t at)
{
    ssize_t done = pread(fd, to, bytes, at);

    if (done < 0)
        return -errno;
    return (size_t)done == bytes ? 0 : -ENOEXEC; /* it ends too early */
}

/* Holes are not read: untouched memory reads as zeros. */
static int load_memory(int fd, const struct guest_memory *memory)
{
    off_t end = (off_t)(RAM_AT + memory->bytes);
    off_t at = lseek(fd, RAM_AT, SEEK_DATA);

    while (at >= 0 && at < end) {
        off_t hole = lseek(fd, at, SEEK_HOLE), stop = hole < end ? hole : end;

        while (at < stop) {
            ssize_t got = pread(fd, memory->base + (at - (off_t)RAM_AT), (size_t)(stop - at), at);

            if (got <= 0)
                return got < 0 ? -errno : -ENOEXEC;
            at += got;
        }
        at = lseek(fd, at, SEEK_DATA);
    }
    return at < 0 && errno != ENXIO ? -errno : 0; /* ENXIO: nothing but holes from here on */
}

/* ---- the file ---- */

static struct header make_header(const struct machine *machine)
{
    return (struct header){
        .magic = MAGIC,
        .version = FORMAT_VERSION,
        .cpus = machine->cpu_count,
        .memory_bytes = machine->memory.bytes,
        .cpu_bytes = sizeof(struct vcpu_state),
        .board_bytes = sizeof(struct board_state),
    };
}

static off_t vcpu_at(uint32_t index)
{
    return (off_t)(sizeof(struct header) + index * sizeof(struct vcpu_state));
}

static_assert(sizeof(struct header) + MACHINE_MAX_CPUS * sizeof(struct vcpu_state) +
                      sizeof(struct board_state) <=
                  RAM_AT,
              "everything else lies in front of RAM");

static int save(struct machine *machine, int fd)
{
    struct header header = make_header(machine);
    struct board_state board;
    struct vcpu_state state;
    int r = write_all(fd, &header, sizeof(header), 0);

    for (uint32_t i = 0; r == 0 && i < machine->cpu_count; i++) {
        r = save_vcpu(&machine->cpus[i], &state);
        if (r == 0)
            r = write_all(fd, &state, sizeof(state), vcpu_at(i));
    }
    board_save(machine, &board);
    if (r == 0)
        r = write_all(fd, &board, sizeof(board), vcpu_at(machine->cpu_count));
    if (r == 0)
        r = save_memory(fd, &machine->memory);
    return r == 0 && fsync(fd) < 0 ? -errno : r;
}

int snapshot_save(struct machine *machine, const char *path)
{
    char temporary[4096];
    int fd;
    int r;

    if (snprintf(temporary, sizeof(temporary), "%s.new", path) >= (int)sizeof(temporary))
        return complain(path, -ENAMETOOLONG);
    fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return complain(temporary, -errno);
    r = save(machine, fd);
    close(fd);
    if (r == 0 && rename(temporary, path) < 0)
        r = -errno;
    if (r < 0)
        unlink(temporary);
    return r < 0 ? complain(path, r) : 0;
}

static bool is_ours(const struct header *header)
{
    return header->magic == MAGIC && header->version == FORMAT_VERSION &&
           header->cpu_bytes == sizeof(struct vcpu_state) &&
           header->board_bytes == sizeof(struct board_state) && header->cpus >= 1 &&
           header->cpus <= MACHINE_MAX_CPUS && header->memory_bytes % MEMORY_PAGE_BYTES == 0 &&
           header->memory_bytes > ADDRESS_KERNEL && header->memory_bytes <= ADDRESS_RAM_END;
}

int snapshot_open(const char *path, struct snapshot *ret_snapshot)
{
    struct header header = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int r = fd < 0 ? -errno : read_all(fd, &header, sizeof(header), 0);

    if (r == 0 &&
        (!is_ours(&header) || lseek(fd, 0, SEEK_END) != (off_t)(RAM_AT + header.memory_bytes)))
        r = -ENOEXEC;
    if (r < 0) {
        if (fd >= 0)
            close(fd);
        return complain(path, r);
    }
    *ret_snapshot =
        (struct snapshot){.fd = fd, .memory_bytes = header.memory_bytes, .cpus = header.cpus};
    return 0;
}

int snapshot_load(struct snapshot *snapshot, struct machine *machine)
{
    struct board_state board;
    struct vcpu_state state;
    int r = load_memory(snapshot->fd, &machine->memory);

    for (uint32_t i = 0; r == 0 && i < machine->cpu_count; i++) {
        r = read_all(snapshot->fd, &state, sizeof(state), vcpu_at(i));
        if (r == 0)
            r = load_vcpu(&machine->cpus[i], &state);
    }
    if (r == 0)
        r = read_all(snapshot->fd, &board, sizeof(board), vcpu_at(machine->cpu_count));
    if (r == 0)
        r = board_load(machine, &board);
    close(snapshot->fd);
    return r < 0 ? complain("loading", r) : 0;
}
