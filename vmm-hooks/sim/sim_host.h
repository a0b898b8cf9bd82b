/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulated machine: the whole of memd runs on it, in one process and one thread, and does the
 * same again for the same seed.
 *
 * It stands in at link time for three files of the real one: memd/host.c (clock, chance,
 * processes), memd/loop_uring.c (readiness) and memd/common/hash.c (hashes that can be made to
 * collide). Time passes only by sim_host_pass(), and by a few nanoseconds each time that somebody
 * looks at the clock. What the kernel does for memd itself is real: sockets, memfds and their
 * seals, files.
 *
 * These three have no argument that could tell one machine from another, so there is one machine in
 * a process: the last one that was started.
 */
#ifndef SIM_HOST_H
#define SIM_HOST_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define SIM_PROCESSES_MAX 512U
#define SIM_PEERS_MAX     64U

struct sim_process {
    pid_t pid;
    uint64_t start_time;
    int death; /* an eventfd; readable when the process has ended */
    bool alive;
};

struct sim_peer {
    uid_t uid;
    pid_t pid;
};

struct sim_host {
    uint64_t now_ns;
    uint64_t chance;
    uint64_t hash_mask; /* all ones: hashes as they are; fewer: different contents collide */
    struct sim_process processes[SIM_PROCESSES_MAX];
    uint32_t process_count;
    pid_t next_pid;
    struct sim_peer peers[SIM_PEERS_MAX]; /* of connections that memd has not accepted yet */
    uint32_t peer_first, peer_count;
    /* What one turn of the loop cost; the loop starts anew with each. */
    uint64_t turn_hashes, turn_callbacks;
    char ksm_directory[64];
};

void sim_host_start(struct sim_host *host, uint64_t seed);
void sim_host_stop(struct sim_host *host);
void sim_host_pass(struct sim_host *host, uint64_t ns);

/* Chance for the simulation itself: one stream for everything, so that a seed says it all. */
uint64_t sim_host_chance(struct sim_host *host);
/* 0 to below - 1. */
uint32_t sim_host_below(struct sim_host *host, uint32_t below);
/* True once in `times`. */
bool sim_host_once_in(struct sim_host *host, uint32_t times);

pid_t sim_host_spawn(struct sim_host *host);
void sim_host_kill(struct sim_host *host, pid_t pid);
/* The next connection that memd accepts comes from there. */
void sim_host_connects(struct sim_host *host, uid_t uid, pid_t pid);

/* The machine of this process. */
struct sim_host *sim_host_current(void);

#endif
