/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A vCPU's thread: into the guest, out of it, do what it asked for, and again.
 *
 * Under memd KVM_RUN may meet a page that is frozen or not there, and then waits for it in the
 * kernel: microseconds, or as long as the page's way here takes. A kick in that moment makes
 * KVM_RUN come back with EINTR where KVM gets the page for the guest. Where KVM reads the guest's
 * memory itself (an instruction that it interprets), or a device of ours does, nothing calls the
 * thread away until the page is there. EFAULT would mean that guest RAM is not mapped: nothing may
 * do that, so it ends the machine instead of being tried again.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#include "machine.h"

static __thread struct vcpu *this_vcpu;

void vcpu_on_kick(int number)
{
    (void)number;
    if (this_vcpu)
        this_vcpu->run->immediate_exit = 1;
}

/* ---- the guest stops by itself ---- */

/* PORT_ALARM's time has come, or somebody wants this vCPU. Ends too when the machine does. */
static void wait_halted(struct vcpu *cpu)
{
    struct machine *machine = cpu->machine;
    int r = 0;

    pthread_mutex_lock(&machine->lock);
    while (r == 0 && !cpu->wake && !machine->pauses && !machine->ended) {
        struct timespec until = {.tv_sec = (time_t)(cpu->alarm / 1000000000),
                                 .tv_nsec = (long)(cpu->alarm % 1000000000)};
        if (cpu->alarm)
            r = pthread_cond_timedwait(&cpu->changed, &machine->lock, &until);
        else
            pthread_cond_wait(&cpu->changed, &machine->lock);
    }
    cpu->wake = false;
    cpu->alarm = 0;
    pthread_mutex_unlock(&machine->lock);
    cpu->halted = false;
}

static void fail(const struct vcpu *cpu, const char *what, const char *why)
{
    struct kvm_regs regs = {0};

    ioctl(cpu->fd, KVM_GET_REGS, &regs);
    fprintf(stderr, "memvm: vCPU %u can't go on: %s: %s (rip %#llx)\n", cpu->index, what, why,
            regs.rip);
    machine_end(cpu->machine, MACHINE_EXIT_FAILED);
}

static void fail_with_number(const struct vcpu *cpu, const char *what, uint64_t number)
{
    char text[32];

    snprintf(text, sizeof(text), "%#llx", (unsigned long long)number);
    fail(cpu, what, text);
}

/* ---- exits ---- */

static void on_port(struct vcpu *cpu)
{
    struct kvm_run *run = cpu->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;

    for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size)
        board_port(cpu, run->io.port, run->io.direction == KVM_EXIT_IO_OUT, data, run->io.size);
    cpu->unfinished = true;
}

static void on_mmio(struct vcpu *cpu)
{
    struct kvm_run *run = cpu->run;

    board_mmio(cpu, run->mmio.phys_addr, run->mmio.is_write, run->mmio.data, run->mmio.len);
    cpu->unfinished = true;
}

static void handle_exit(struct vcpu *cpu)
{
    const struct kvm_run *run = cpu->run;

    switch (run->exit_reason) {
    case KVM_EXIT_IO: on_port(cpu); break;
    case KVM_EXIT_MMIO: on_mmio(cpu); break;
    case KVM_EXIT_HLT: cpu->halted = true; break;
    case KVM_EXIT_INTR: break;
    case KVM_EXIT_SHUTDOWN: fail(cpu, "the guest", "triple fault"); break;
    case KVM_EXIT_FAIL_ENTRY:
        fail_with_number(cpu, "entry into the guest failed",
                         run->fail_entry.hardware_entry_failure_reason);
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        fail_with_number(cpu, "KVM's internal error", run->internal.suberror);
        break;
    default: fail_with_number(cpu, "unknown exit", run->exit_reason); break;
    }
}

static void enter(struct vcpu *cpu)
{
    if (ioctl(cpu->fd, KVM_RUN, 0) == 0) {
        cpu->unfinished = false;
        handle_exit(cpu);
    } else if (errno == EINTR || errno == EAGAIN) {
        cpu->unfinished = false;
        /* The requests behind a kick are looked at after this, so none is missed. */
        cpu->run->immediate_exit = 0;
    } else {
        fail(cpu, "KVM_RUN", strerror(errno));
    }
}

/* KVM completes an access to a device when it is entered again: without running the guest here. */
static void finish_access(struct vcpu *cpu)
{
    while (cpu->unfinished) {
        cpu->run->immediate_exit = 1;
        enter(cpu);
    }
}

/* ---- the loop ---- */

static void park(struct vcpu *cpu)
{
    struct machine *machine = cpu->machine;

    finish_access(cpu);
    pthread_mutex_lock(&machine->lock);
    cpu->parked = true;
    pthread_cond_broadcast(&machine->parked);
    while ((machine->pauses || machine->incoming) && !machine->ended)
        pthread_cond_wait(&cpu->changed, &machine->lock);
    cpu->parked = false;
    pthread_mutex_unlock(&machine->lock);
}

static bool has_ended(struct machine *machine)
{
    bool ended;

    pthread_mutex_lock(&machine->lock);
    ended = machine->ended;
    pthread_mutex_unlock(&machine->lock);
    return ended;
}

void *vcpu_run(void *context)
{
    struct vcpu *cpu = context;
    struct machine *machine = cpu->machine;
    char name[16];
    sigset_t signals;

    snprintf(name, sizeof(name), "vcpu%u", cpu->index);
    pthread_setname_np(pthread_self(), name);
    this_vcpu = cpu;
    sigemptyset(&signals);
    sigaddset(&signals, VCPU_KICK);
    pthread_sigmask(SIG_UNBLOCK, &signals, NULL);
    while (!has_ended(machine)) {
        if (machine_is_held(machine))
            park(cpu);
        else if (cpu->halted)
            wait_halted(cpu);
        else
            enter(cpu);
    }
    return NULL;
}
