/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether KVM works, by booting: a guest of one page writes a letter to a port and halts. It runs
 * in a child with a time limit, so that a KVM that hangs costs ten seconds and no more.
 *
 * A machine may have /dev/kvm without VMX or SVM (a nested host with a software MMU): such a tiny
 * guest runs there, a distribution's kernel doesn't, so the processor's flags are looked at too.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "doctor.h"

#ifdef __x86_64__

#define BOOT_LIMIT_S 10
#define GUEST_START  0x1000
#define GUEST_PORT   0x3f8
#define GUEST_LETTER 'm'
#define EXITS_MAX    100

enum boot_end {
    BOOT_RAN,
    BOOT_NO_DEVICE,
    BOOT_NO_RIGHTS,
    BOOT_NO_VM,
    BOOT_NO_MEMORY,
    BOOT_NO_CPU,
    BOOT_NOT_RUN,
    BOOT_OTHER_RESULT,
    BOOT_COUNT,
};

static const char *const boot_words[] = {
    "booted a tiny guest",
    "not there",
    "there, but this user may not open it",
    "there, but makes no virtual machine",
    "there, but takes no guest memory",
    "there, but makes no virtual CPU",
    "there, but its virtual CPU does not run",
    "there, but a tiny guest did something else than it should",
};
static_assert(sizeof(boot_words) / sizeof(boot_words[0]) == BOOT_COUNT, "each end has its words");

/* mov $0x3f8, %dx; mov $'m', %al; out %al, (%dx); hlt -- in real mode */
static const unsigned char guest_code[] = {
    0xba, GUEST_PORT & 0xff, GUEST_PORT >> 8, 0xb0, GUEST_LETTER, 0xee, 0xf4};

static int add_memory(int vm)
{
    void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {
        .guest_phys_addr = GUEST_START,
        .memory_size = PAGE_BYTES,
        .userspace_addr = (uintptr_t)page,
    };

    if (page == MAP_FAILED)
        return -errno;
    memcpy(page, guest_code, sizeof(guest_code));
    return ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;
}

static int set_registers(int cpu)
{
    struct kvm_sregs special;
    struct kvm_regs general = {.rip = GUEST_START, .rflags = 2};

    if (ioctl(cpu, KVM_GET_SREGS, &special) < 0)
        return -errno;
    special.cs.base = 0;
    special.cs.selector = 0;
    if (ioctl(cpu, KVM_SET_SREGS, &special) < 0 || ioctl(cpu, KVM_SET_REGS, &general) < 0)
        return -errno;
    return 0;
}

/* Runs until the guest halts; it must have written its letter by then. */
static enum boot_end run_guest(int cpu, const struct kvm_run *run)
{
    bool wrote = false;

    for (int i = 0; i < EXITS_MAX; i++) {
        if (ioctl(cpu, KVM_RUN, 0) < 0 && errno != EINTR)
            return BOOT_NOT_RUN;
        if (run->exit_reason == KVM_EXIT_HLT)
            return wrote ? BOOT_RAN : BOOT_OTHER_RESULT;
        if (run->exit_reason != KVM_EXIT_IO)
            return BOOT_OTHER_RESULT;
        wrote |=
            run->io.port == GUEST_PORT && ((const char *)run)[run->io.data_offset] == GUEST_LETTER;
    }
    return BOOT_OTHER_RESULT;
}

/* The child's whole life: its end closes and frees everything. */
static enum boot_end boot(void)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    struct kvm_run *run;
    int vm, cpu, bytes;

    if (kvm < 0)
        return errno == EACCES || errno == EPERM ? BOOT_NO_RIGHTS : BOOT_NO_DEVICE;
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0)
        return BOOT_NO_VM;
    if (add_memory(vm) < 0)
        return BOOT_NO_MEMORY;
    cpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (cpu < 0 || bytes < (int)sizeof(*run) || set_registers(cpu) < 0)
        return BOOT_NO_CPU;
    run = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
    return run == MAP_FAILED ? BOOT_NO_CPU : run_guest(cpu, run);
}

static bool has_virtualization_flags(void)
{
    FILE *file = fopen("/proc/cpuinfo", "re");
    char line[8192];
    bool found = false;

    while (file && !found && fgets(line, sizeof(line), file)) {
        if (strncmp(line, "flags", 5) == 0)
            found = strstr(line, " vmx") || strstr(line, " svm");
    }
    if (file)
        fclose(file);
    return found;
}

static void report(struct finding *finding, int wait_status)
{
    enum boot_end end = WIFEXITED(wait_status) ? (enum boot_end)WEXITSTATUS(wait_status) : 0;

    finding->cost = "guests run under QEMU's TCG, many times slower (sharing works the same)";
    finding->mend = "switch virtualization on in the firmware or, in a virtual machine, nesting in "
                    "its host; then: modprobe kvm_intel || modprobe kvm_amd";
    if (end == BOOT_NO_RIGHTS)
        finding->mend = "usermod -aG kvm USER, and log in anew (where /dev/kvm belongs to that "
                        "group), or run the VMM as root";
    if (WIFSIGNALED(wait_status))
        ctl_finding_set(finding, FINDING_NOTE, "there, but a tiny guest did not end in %d s",
                        BOOT_LIMIT_S);
    else if (end != BOOT_RAN)
        ctl_finding_set(finding, FINDING_NOTE, "%s",
                        end < BOOT_COUNT ? boot_words[end] : "not tried");
    else if (!has_virtualization_flags())
        ctl_finding_set(finding, FINDING_NOTE,
                        "%s, but the processor has no VMX or SVM: a whole kernel may not boot",
                        boot_words[end]);
    else
        ctl_finding_set(finding, FINDING_OK, "%s", boot_words[end]);
}

void ctl_doctor_kvm(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    int wait_status;
    pid_t child;

    (void)arguments;
    fflush(NULL);
    child = fork();
    if (child == 0) {
        alarm(BOOT_LIMIT_S);
        _exit(boot());
    }
    if (child < 0 || waitpid(child, &wait_status, 0) < 0)
        wait_status = 0xff << 8; /* as if it had exited with 255 */
    report(ret_finding, wait_status);
}

#else

void ctl_doctor_kvm(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    (void)arguments;
    ctl_finding_set(ret_finding, FINDING_OK, "not tried on this kind of machine");
}

#endif
