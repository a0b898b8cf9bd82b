/* SPDX-License-Identifier: Apache-2.0 */
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Three pages that Intel without "unrestricted guest" needs for itself, outside of RAM. */
#define TSS_ADDRESS 0xfffbd000UL

#define ENTRY_PRESENT  1U
#define ENTRY_WRITE    2U
#define ENTRY_HUGE     0x80U
#define TABLE_ENTRIES  512U
#define GIB_MAPPED     4UL
#define CR0_BITS       0x80010033U /* PG, WP, NE, ET, MP, PE */
#define CR4_BITS       0x20U       /* PAE */
#define EFER_BITS      0x500U      /* LMA, LME */
#define FLAGS_RESERVED 2U          /* always set */
#define CPUID_ENTRIES  100U

/* So long a pause waits at most; a guest's access to a device takes milliseconds. */
#define PAUSE_LIMIT_S 3

/* ---- making it ---- */

static int complain(const char *what)
{
    int error = errno;

    fprintf(stderr, "memvm: %s: %s\n", what, strerror(error));
    return -error;
}

static int open_kvm(struct machine *machine)
{
    machine->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (machine->kvm_fd < 0)
        return complain("/dev/kvm");
    if (ioctl(machine->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0) {
        errno = ENOSYS;
        return complain("this kernel's KVM has no immediate_exit (Linux 4.11)");
    }
    machine->vm_fd = ioctl(machine->kvm_fd, KVM_CREATE_VM, 0);
    if (machine->vm_fd < 0)
        return complain("KVM_CREATE_VM");
    ioctl(machine->vm_fd, KVM_SET_TSS_ADDR, TSS_ADDRESS); /* only Intel knows it */
    return 0;
}

static int add_memory(struct machine *machine, uint64_t bytes)
{
    struct kvm_userspace_memory_region slot = {.memory_size = bytes};
    int r = memory_open(&machine->memory, bytes);

    if (r < 0) {
        errno = -r;
        return complain("guest RAM");
    }
    slot.userspace_addr = (uintptr_t)machine->memory.base;
    return ioctl(machine->vm_fd, KVM_SET_USER_MEMORY_REGION, &slot) < 0
               ? complain("KVM_SET_USER_MEMORY_REGION")
               : 0;
}

/* The guest sees the processor as KVM would show it, each vCPU with an APIC id of its own. */
static int set_cpuid(const struct machine *machine, const struct vcpu *cpu)
{
    struct kvm_cpuid2 *cpuid =
        calloc(1, sizeof(*cpuid) + CPUID_ENTRIES * sizeof(cpuid->entries[0]));
    int r;

    if (!cpuid)
        return -ENOMEM;
    cpuid->nent = CPUID_ENTRIES;
    r = ioctl(machine->kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid);
    for (uint32_t i = 0; r == 0 && i < cpuid->nent; i++)
        if (cpuid->entries[i].function == 1)
            cpuid->entries[i].ebx = (cpuid->entries[i].ebx & 0xffffff) | cpu->index << 24;
    if (r == 0)
        r = ioctl(cpu->fd, KVM_SET_CPUID2, cpuid);
    free(cpuid);
    return r < 0 ? complain("CPUID") : 0;
}

static int make_condition(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    return -pthread_cond_init(condition, &attributes);
}

static int add_vcpu(struct machine *machine, uint32_t index)
{
    struct vcpu *cpu = &machine->cpus[index];
    int bytes = ioctl(machine->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);

    cpu->machine = machine;
    cpu->index = index;
    cpu->fd = ioctl(machine->vm_fd, KVM_CREATE_VCPU, index);
    if (cpu->fd < 0 || bytes < (int)sizeof(*cpu->run))
        return complain("KVM_CREATE_VCPU");
    cpu->run = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, cpu->fd, 0);
    if (cpu->run == MAP_FAILED)
        return complain("a vCPU's page");
    make_condition(&cpu->changed);
    return set_cpuid(machine, cpu);
}

int machine_open(struct machine *machine, uint64_t memory_bytes, uint32_t cpus)
{
    int r = open_kvm(machine);

    if (r == 0)
        r = add_memory(machine, memory_bytes);
    for (uint32_t i = 0; r == 0 && i < cpus; i++)
        r = add_vcpu(machine, i);
    machine->cpu_count = cpus;
    pthread_mutex_init(&machine->lock, NULL);
    make_condition(&machine->parked);
    machine->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return r == 0 && machine->ended_fd < 0 ? complain("eventfd") : r;
}

/* ---- how a vCPU begins ---- */

void machine_map_low(struct machine *machine)
{
    uint64_t *tables = memory_at(&machine->memory, ADDRESS_PAGE_TABLES, 6 * MEMORY_PAGE_BYTES);
    uint64_t *pointers = tables + TABLE_ENTRIES, *directory = pointers + TABLE_ENTRIES;

    tables[0] = (ADDRESS_PAGE_TABLES + MEMORY_PAGE_BYTES) | ENTRY_PRESENT | ENTRY_WRITE;
    for (uint64_t i = 0; i < GIB_MAPPED; i++)
        pointers[i] =
            (ADDRESS_PAGE_TABLES + (2 + i) * MEMORY_PAGE_BYTES) | ENTRY_PRESENT | ENTRY_WRITE;
    for (uint64_t i = 0; i < GIB_MAPPED * TABLE_ENTRIES; i++)
        directory[i] = i << 21 | ENTRY_PRESENT | ENTRY_WRITE | ENTRY_HUGE;
}

static void set_segments(struct kvm_sregs *special)
{
    struct kvm_segment code = {
        .selector = 0x08, .limit = ~0U, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {
        .selector = 0x10, .limit = ~0U, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};

    special->cs = code;
    special->ds = special->es = special->fs = special->gs = special->ss = data;
}

int machine_boot_vcpu(struct vcpu *cpu, uint64_t entry)
{
    struct kvm_regs general = {
        .rip = entry, .rflags = FLAGS_RESERVED, .rdi = ADDRESS_BOOT_INFO, .rsi = cpu->index};
    struct kvm_sregs special;

    if (ioctl(cpu->fd, KVM_GET_SREGS, &special) < 0)
        return complain("KVM_GET_SREGS");
    set_segments(&special);
    special.cr0 = CR0_BITS;
    special.cr3 = ADDRESS_PAGE_TABLES;
    special.cr4 = CR4_BITS;
    special.efer = EFER_BITS;
    if (ioctl(cpu->fd, KVM_SET_SREGS, &special) < 0 || ioctl(cpu->fd, KVM_SET_REGS, &general) < 0)
        return complain("a vCPU's registers");
    return 0;
}

/* ---- running ---- */

static void kick(struct vcpu *cpu)
{
    pthread_cond_signal(&cpu->changed);
    pthread_kill(cpu->thread, VCPU_KICK);
}

static void kick_all(struct machine *machine)
{
    for (uint32_t i = 0; machine->started && i < machine->cpu_count; i++)
        kick(&machine->cpus[i]);
}

int machine_start(struct machine *machine)
{
    struct sigaction action = {.sa_handler = vcpu_on_kick};
    int r = 0;

    sigaction(VCPU_KICK, &action, NULL);
    pthread_mutex_lock(&machine->lock); /* no vCPU runs before all have their threads */
    for (uint32_t i = 0; r == 0 && i < machine->cpu_count; i++)
        r = -pthread_create(&machine->cpus[i].thread, NULL, vcpu_run, &machine->cpus[i]);
    machine->started = r == 0;
    pthread_cond_broadcast(&machine->parked);
    pthread_mutex_unlock(&machine->lock);
    if (r < 0)
        fprintf(stderr, "memvm: a vCPU's thread: %s\n", strerror(-r));
    return r;
}

/* Nothing of the guest's is at work. One that is not started yet is being loaded, unless its state
 * is to come from elsewhere. */
static bool is_quiet(const struct machine *machine)
{
    for (uint32_t i = 0; machine->started && i < machine->cpu_count; i++)
        if (!machine->cpus[i].parked)
            return false;
    return machine->started || machine->incoming;
}

/* Caller holds the lock. */
static void let_go(struct machine *machine)
{
    for (uint32_t i = 0; i < machine->cpu_count; i++)
        pthread_cond_signal(&machine->cpus[i].changed);
}

int machine_pause(struct machine *machine)
{
    struct timespec until;
    int r = 0;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += PAUSE_LIMIT_S;
    pthread_mutex_lock(&machine->lock);
    machine->pauses++;
    kick_all(machine);
    while (!machine->ended && !is_quiet(machine) && r == 0)
        r = -pthread_cond_timedwait(&machine->parked, &machine->lock, &until);
    r = machine->ended ? -ESHUTDOWN : is_quiet(machine) ? 0 : -EBUSY;
    if (r < 0) {
        machine->pauses--;
        let_go(machine);
    }
    pthread_mutex_unlock(&machine->lock);
    return r;
}

void machine_resume(struct machine *machine)
{
    pthread_mutex_lock(&machine->lock);
    machine->pauses--;
    let_go(machine);
    pthread_mutex_unlock(&machine->lock);
}

void machine_loaded(struct machine *machine)
{
    pthread_mutex_lock(&machine->lock);
    machine->incoming = false;
    let_go(machine);
    pthread_mutex_unlock(&machine->lock);
}

bool machine_is_held(struct machine *machine)
{
    bool held;

    pthread_mutex_lock(&machine->lock);
    held = (machine->pauses || machine->incoming) && !machine->ended;
    pthread_mutex_unlock(&machine->lock);
    return held;
}

void machine_wake(struct machine *machine, uint32_t cpu)
{
    pthread_mutex_lock(&machine->lock);
    machine->cpus[cpu].wake = true;
    pthread_cond_signal(&machine->cpus[cpu].changed);
    pthread_mutex_unlock(&machine->lock);
}

void machine_end(struct machine *machine, int exit_status)
{
    uint64_t one = 1;

    pthread_mutex_lock(&machine->lock);
    if (!machine->ended) {
        machine->ended = true;
        machine->exit_status = exit_status;
        kick_all(machine);
        pthread_cond_broadcast(&machine->parked);
        if (write(machine->ended_fd, &one, sizeof(one)) < 0)
            abort(); /* an eventfd takes a first 1 */
    }
    pthread_mutex_unlock(&machine->lock);
}

int machine_join(struct machine *machine)
{
    for (uint32_t i = 0; machine->started && i < machine->cpu_count; i++)
        pthread_join(machine->cpus[i].thread, NULL);
    return machine->exit_status;
}
