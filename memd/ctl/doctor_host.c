/* SPDX-License-Identifier: Apache-2.0 */
/* How the host is set up: nothing here keeps memd from sharing, most of it costs something. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "doctor.h"

#define CGROUP2_SUPER 0x63677270 /* CGROUP2_SUPER_MAGIC */
#define TMPFS_SUPER   0x01021994 /* TMPFS_MAGIC */

/* A scattered shared page costs a mapping of its own: with this many, a guest of 4 GiB may have
 * every fourth page in one. */
#define MAP_COUNT_ENOUGH 262144

/* First line of a small file into `text`, without its end; false when it can't be read. */
static bool read_line(const char *path, char *text, int size)
{
    FILE *file = fopen(path, "re");
    bool got = file && fgets(text, size, file);

    if (file)
        fclose(file);
    if (got)
        text[strcspn(text, "\n")] = '\0';
    return got;
}

static long read_number(const char *path)
{
    char text[64];

    return read_line(path, text, sizeof(text)) ? strtol(text, NULL, 10) : -1;
}

void ctl_doctor_map_count(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    long count = read_number("/proc/sys/vm/max_map_count");

    (void)arguments;
    ctl_finding_set(ret_finding, count >= MAP_COUNT_ENOUGH ? FINDING_OK : FINDING_NOTE, "%ld",
                    count);
    ret_finding->cost = "each run of shared pages needs a mapping of its own: a guest whose "
                        "duplicates are scattered stops sharing at three quarters of this";
    ret_finding->mend = "sysctl -w vm.max_map_count=1048576";
}

void ctl_doctor_commit(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    long mode = read_number("/proc/sys/vm/overcommit_memory");

    (void)arguments;
    ctl_finding_set(ret_finding, mode == 2 ? FINDING_NOTE : FINDING_OK, "%ld", mode);
    ret_finding->cost = "the kernel counts every private mapping as if it were full: guests that "
                        "together are promised more than the host has don't start";
    ret_finding->mend = "sysctl -w vm.overcommit_memory=0";
}

/* memd runs ksmd itself for guests without an agent: then there is nothing to mend. */
static void judge_running_ksm(const struct ctl_arguments *arguments, struct finding *finding)
{
    json_t *status, *steers;
    bool reachable = ctl_http_reachable(arguments->socket, &status);

    steers = json_object_get(json_object_get(status, "sharing"), "steers_ksmd");
    finding->cost = "ksmd spends CPU time on memory that others offered to it";
    finding->mend = "find out who started it (ksmtuned?), then: echo 0 > /sys/kernel/mm/ksm/run";
    if (json_is_true(steers)) {
        ctl_finding_set(finding, FINDING_OK, "running; memd steers it for guests without an agent");
    } else if (reachable && !status) {
        ctl_finding_set(finding, FINDING_NOTE,
                        "running, and memd does not tell this user whether that is its doing");
        finding->mend = "run 'memctl doctor' as root: there is nothing to mend if memd steers it";
    } else {
        ctl_finding_set(finding, FINDING_NOTE, "running, and not because of memd");
    }
    json_decref(status);
}

void ctl_doctor_ksm(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    long run = read_number("/sys/kernel/mm/ksm/run");

    if (run < 0) {
        ctl_finding_set(ret_finding, FINDING_NOTE, "not in this kernel");
        ret_finding->cost =
            "VMMs that the agent can't be preloaded into (static, set-uid) don't share";
        ret_finding->mend = "boot a kernel with CONFIG_KSM=y";
    } else if (run == 1) {
        judge_running_ksm(arguments, ret_finding);
    } else {
        ctl_finding_set(ret_finding, FINDING_OK, "there, and not running");
    }
}

void ctl_doctor_pressure(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    bool there = access("/proc/pressure/memory", R_OK) == 0;

    (void)arguments;
    ctl_finding_set(ret_finding, there ? FINDING_OK : FINDING_NOTE, there ? "there" : "not there");
    ret_finding->cost = "memory pressure is seen late";
    ret_finding->mend = "boot with psi=1 on the kernel's command line";
}

void ctl_doctor_huge_pages(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    char text[128];
    bool never;

    (void)arguments;
    if (!read_line("/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof(text)))
        strcpy(text, "not in this kernel");
    never = !strchr(text, '[') || strstr(text, "[never]");
    ctl_finding_set(ret_finding, never ? FINDING_NOTE : FINDING_OK, "%s", text);
    ret_finding->cost = "guests run on small pages only: more misses in the address translation";
    ret_finding->mend = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
}

void ctl_doctor_cgroup(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    struct statfs status;
    bool second = statfs("/sys/fs/cgroup", &status) == 0 && status.f_type == CGROUP2_SUPER;

    (void)arguments;
    ctl_finding_set(ret_finding, second ? FINDING_OK : FINDING_NOTE,
                    second ? "version 2" : "no version 2 at /sys/fs/cgroup");
    ret_finding->cost = "a guest's memory and CPU time can't be limited or read by group";
    ret_finding->mend = "mount -t cgroup2 none /sys/fs/cgroup (or boot with "
                        "systemd.unified_cgroup_hierarchy=1)";
}

void ctl_doctor_shm(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    struct statvfs space;
    struct statfs status;
    char text[CTL_SIZE_CHARS];
    bool sound = statfs("/dev/shm", &status) == 0 && status.f_type == TMPFS_SUPER &&
                 statvfs("/dev/shm", &space) == 0;

    (void)arguments;
    if (sound)
        ctl_finding_set(ret_finding, FINDING_OK, "tmpfs, %s free",
                        ctl_format_size((uint64_t)space.f_bavail * space.f_frsize, text));
    else
        ctl_finding_set(ret_finding, FINDING_NOTE, "no tmpfs");
    ret_finding->cost =
        "QEMU guests are started without the shared backend that live migration needs";
    ret_finding->mend = "mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /dev/shm";
}

void ctl_doctor_memd(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    json_t *status;
    bool reachable = ctl_http_reachable(arguments->socket, &status);

    json_decref(status);
    ctl_finding_set(ret_finding, reachable ? FINDING_OK : FINDING_NOTE, "%s at %s",
                    reachable ? "answers" : "does not answer", arguments->socket);
    ret_finding->cost = "nothing is shared until it runs";
    ret_finding->mend = "systemctl start memd (or: memd)";
}
