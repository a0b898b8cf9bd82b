/* SPDX-License-Identifier: Apache-2.0 */
#include "host.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "procfs.h"

#define NS_PER_S 1000000000ULL

/* Fields of /proc/PID/stat, numbered as in proc(5). */
#define STAT_FLAGS      9
#define STAT_START_TIME 22
#define PF_EXITING      4U

static uint64_t read_clock(clockid_t which)
{
    struct timespec now;

    clock_gettime(which, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

uint64_t host_clock_ns(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

double host_wall_seconds(void)
{
    return (double)read_clock(CLOCK_REALTIME) / 1e9;
}

uint64_t host_own_cpu_ns(void)
{
    return read_clock(CLOCK_PROCESS_CPUTIME_ID);
}

int host_random(void *into, size_t bytes)
{
    return getrandom(into, bytes, 0) == (ssize_t)bytes ? 0 : -EIO;
}

int host_process_open(pid_t pid)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);

    return fd < 0 ? -errno : fd;
}

void host_process_end(int process)
{
    (void)syscall(SYS_pidfd_send_signal, process, SIGKILL, NULL, 0);
}

int host_process_start_time(pid_t pid, uint64_t *ret_ticks)
{
    return procfs_stat_field(pid, STAT_START_TIME, ret_ticks);
}

bool host_process_is_exiting(pid_t pid)
{
    uint64_t flags = 0;

    return procfs_stat_field(pid, STAT_FLAGS, &flags) || flags & PF_EXITING;
}

bool host_process_has_thread(pid_t pid, pid_t tid)
{
    char path[64];

    snprintf(path, sizeof(path), "/proc/%d/task/%d", (int)pid, (int)tid);
    return pid > 0 && tid > 0 && access(path, F_OK) == 0;
}

int host_thread_cpu_ns(pid_t pid, pid_t tid, uint64_t *ret_ns)
{
    char path[64], text[128];
    uint64_t ns;
    int result;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/schedstat", (int)pid, (int)tid);
    result = procfs_text(path, text, sizeof(text));
    if (result)
        return result;
    if (sscanf(text, "%" SCNu64, &ns) != 1)
        return -EIO;
    *ret_ns = ns;
    return 0;
}

int host_peer(int socket, uid_t *ret_uid, pid_t *ret_pid)
{
    struct ucred peer;
    socklen_t bytes = sizeof(peer);

    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes))
        return -errno;
    *ret_uid = peer.uid;
    *ret_pid = peer.pid;
    return 0;
}

const char *host_ksm_directory(void)
{
    return "/sys/kernel/mm/ksm";
}
