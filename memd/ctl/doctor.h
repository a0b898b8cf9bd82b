/* SPDX-License-Identifier: Apache-2.0 */
/* The checks of memctl doctor: each looks at one thing on this host. */
#ifndef MEMD_CTL_DOCTOR_H
#define MEMD_CTL_DOCTOR_H

#include "ctl.h"

enum finding_status {
    FINDING_OK,
    FINDING_NOTE,    /* costs something; sharing works in full */
    FINDING_PROBLEM, /* sharing does not work, or not in full */
    FINDING_UNKNOWN, /* this user may not try it */
    FINDING_COUNT
};

struct finding {
    enum finding_status status;
    char found[200];
    /* When not OK. Static text; `mend` is a command or, where there is none, what to do. */
    const char *cost, *mend;
};

void ctl_finding_set(struct finding *finding, enum finding_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Each check fills *ret_finding, prints nothing, and leaves the host as it was. */

/* doctor_kernel.c: what the agent and memd need of the kernel, by trying it */
void ctl_doctor_kernel(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_userfaultfd(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_device(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_features(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_move(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_scan(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_swap(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_io_uring(const struct ctl_arguments *arguments, struct finding *ret_finding);

/* doctor_host.c: how the host is set up */
void ctl_doctor_map_count(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_commit(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_ksm(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_pressure(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_huge_pages(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_cgroup(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_shm(const struct ctl_arguments *arguments, struct finding *ret_finding);
void ctl_doctor_memd(const struct ctl_arguments *arguments, struct finding *ret_finding);

/* doctor_kvm.c */
void ctl_doctor_kvm(const struct ctl_arguments *arguments, struct finding *ret_finding);

/* The running kernel is at least this version. */
bool ctl_doctor_kernel_is(int major, int minor);

#endif
