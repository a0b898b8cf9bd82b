/* SPDX-License-Identifier: Apache-2.0 */
#include "sim_host.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "host.h"

#define NS_PER_S   1000000000ULL
#define FIRST_PID  1000
#define LOOK_NS    50U              /* what a look at the clock may take, at most */
#define BOOTED_NS  (100 * NS_PER_S) /* memd starts on a machine that has run for a while */
#define WALL_START 1700000000.0

/* The door (host.h) has no argument for it: see sim_host.h. */
static struct sim_host *machine;

struct sim_host *sim_host_current(void)
{
    return machine;
}

void sim_host_start(struct sim_host *host, uint64_t seed)
{
    *host = (struct sim_host){.now_ns = BOOTED_NS,
                              .chance = seed * 2 + 1,
                              .hash_mask = UINT64_MAX,
                              .next_pid = FIRST_PID,
                              .ksm_directory = "/nonexistent/ksm"};
    machine = host;
}

void sim_host_stop(struct sim_host *host)
{
    for (uint32_t i = 0; i < host->process_count; i++)
        close(host->processes[i].death);
    host->process_count = 0;
}

void sim_host_pass(struct sim_host *host, uint64_t ns)
{
    host->now_ns += ns;
}

/* ---- chance ---- */

/* splitmix64 (Steele, Lea, Flood 2014): one addition and a mix, any start is as good as another. */
uint64_t sim_host_chance(struct sim_host *host)
{
    uint64_t mixed = host->chance += 0x9e3779b97f4a7c15ULL;

    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9ULL;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebULL;
    return mixed ^ mixed >> 31;
}

uint32_t sim_host_below(struct sim_host *host, uint32_t below)
{
    return (uint32_t)((sim_host_chance(host) >> 32) * below >> 32);
}

bool sim_host_once_in(struct sim_host *host, uint32_t times)
{
    return sim_host_below(host, times) == 0;
}

/* ---- processes ---- */

static struct sim_process *find(struct sim_host *host, pid_t pid)
{
    for (uint32_t i = 0; i < host->process_count; i++) {
        if (host->processes[i].pid == pid)
            return &host->processes[i];
    }
    return NULL;
}

/* The oldest dead process makes room when the table is full. */
static struct sim_process *free_place(struct sim_host *host)
{
    if (host->process_count < SIM_PROCESSES_MAX)
        return &host->processes[host->process_count++];
    for (uint32_t i = 0; i < host->process_count; i++) {
        if (!host->processes[i].alive) {
            close(host->processes[i].death);
            return &host->processes[i];
        }
    }
    return NULL;
}

pid_t sim_host_spawn(struct sim_host *host)
{
    struct sim_process *process = free_place(host);

    if (!process)
        return -EAGAIN;
    *process = (struct sim_process){.pid = host->next_pid++,
                                    .start_time = host->now_ns / 10000000,
                                    .death = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                                    .alive = true};
    return process->pid;
}

void sim_host_kill(struct sim_host *host, pid_t pid)
{
    struct sim_process *process = find(host, pid);

    if (process && process->alive) {
        process->alive = false;
        (void)eventfd_write(process->death, 1);
    }
}

void sim_host_connects(struct sim_host *host, uid_t uid, pid_t pid)
{
    host->peers[(host->peer_first + host->peer_count++) % SIM_PEERS_MAX] =
        (struct sim_peer){uid, pid};
}

/* ---- the door ---- */

uint64_t host_clock_ns(void)
{
    machine->now_ns += sim_host_below(machine, LOOK_NS);
    return machine->now_ns;
}

double host_wall_seconds(void)
{
    return WALL_START + (double)machine->now_ns / 1e9;
}

uint64_t host_own_cpu_ns(void)
{
    return 0;
}

int host_random(void *into, size_t bytes)
{
    uint8_t *at = into;

    for (size_t i = 0; i < bytes; i++)
        at[i] = (uint8_t)sim_host_chance(machine);
    return 0;
}

int host_process_open(pid_t pid)
{
    const struct sim_process *process = find(machine, pid);
    int fd;

    if (!process || !process->alive)
        return -ESRCH;
    fd = fcntl(process->death, F_DUPFD_CLOEXEC, 3);
    return fd < 0 ? -errno : fd;
}

/* A descriptor of it is a copy of its eventfd: that is not enough to find it by, and no simulated
 * guest moves. */
void host_process_end(int process)
{
    (void)process;
}

int host_process_start_time(pid_t pid, uint64_t *ret_ticks)
{
    const struct sim_process *process = find(machine, pid);

    if (!process || !process->alive)
        return -ESRCH;
    *ret_ticks = process->start_time;
    return 0;
}

bool host_process_is_exiting(pid_t pid)
{
    const struct sim_process *process = find(machine, pid);

    return !process || !process->alive;
}

/* Simulated agents have no threads. */
bool host_process_has_thread(pid_t pid, pid_t tid)
{
    (void)pid;
    (void)tid;
    return false;
}

int host_thread_cpu_ns(pid_t pid, pid_t tid, uint64_t *ret_ns)
{
    (void)pid;
    (void)tid;
    (void)ret_ns;
    return -ESRCH;
}

int host_peer(int socket, uid_t *ret_uid, pid_t *ret_pid)
{
    struct sim_peer peer = machine->peers[machine->peer_first];

    (void)socket;
    if (!machine->peer_count)
        return -ENOTCONN;
    machine->peer_first = (machine->peer_first + 1) % SIM_PEERS_MAX;
    machine->peer_count--;
    *ret_uid = peer.uid;
    *ret_pid = peer.pid;
    return 0;
}

const char *host_ksm_directory(void)
{
    return machine->ksm_directory;
}
