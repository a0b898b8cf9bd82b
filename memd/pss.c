/* SPDX-License-Identifier: Apache-2.0 */
#include "pss.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon.h"
#include "procfs.h"

#define FRESH_NS   1000000000ULL
#define TEXT_BYTES 4096U

/* One smaps_rollup that a kernel worker reads. */
struct pss_reading {
    struct loop_job job;
    struct daemon *daemon;
    struct guest *guest; /* NULL: memd itself, or the guest is gone */
    bool own;
    int fd;
    struct pss_reading *next;
    char text[TEXT_BYTES];
};

static void finish(struct daemon *daemon)
{
    struct pss *pss = &daemon->pss;
    struct pss_waiter *waiter;

    pss->sampled_ns = loop_now(&daemon->loop);
    while ((waiter = pss->waiters)) {
        pss->waiters = waiter->next;
        waiter->queued = false;
        waiter->sampled(waiter);
    }
}

static void take_figures(struct pss_reading *reading)
{
    uint64_t bytes = procfs_number_in(reading->text, "Pss") * 1024;
    uint64_t shmem = procfs_number_in(reading->text, "Pss_Shmem") * 1024;

    if (reading->own) {
        reading->daemon->pss.own_bytes = bytes;
        reading->daemon->pss.own_shmem_bytes = shmem;
    } else if (reading->guest) {
        reading->guest->resident_bytes = bytes;
        reading->guest->shmem_bytes = shmem;
    }
}

static void done(struct loop_job *job, int result)
{
    struct pss_reading *reading = job->owner;
    struct daemon *daemon = reading->daemon;
    struct pss *pss = &daemon->pss;
    struct pss_reading **place = &pss->readings;

    if (result > 0) {
        reading->text[result] = '\0';
        take_figures(reading);
    }
    while (*place != reading)
        place = &(*place)->next;
    *place = reading->next;
    close(reading->fd);
    free(reading);
    if (--pss->out == 0)
        finish(daemon);
}

static void start_reading(struct daemon *daemon, pid_t pid, struct guest *guest)
{
    struct pss_reading *reading = calloc(1, sizeof(*reading));
    char path[64];

    if (!reading)
        return;
    snprintf(path, sizeof(path), "/proc/%d/smaps_rollup", (int)pid);
    reading->daemon = daemon;
    reading->guest = guest;
    reading->own = !guest;
    reading->job = (struct loop_job){.done = done, .owner = reading};
    reading->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (reading->fd < 0 ||
        loop_read_start(&daemon->loop, &reading->job, reading->fd, reading->text, TEXT_BYTES - 1)) {
        if (reading->fd >= 0)
            close(reading->fd);
        free(reading);
        return;
    }
    reading->next = daemon->pss.readings;
    daemon->pss.readings = reading;
    daemon->pss.out++;
}

bool pss_sample(struct daemon *daemon, struct pss_waiter *waiter)
{
    struct pss *pss = &daemon->pss;

    if (!pss->out && pss->sampled_ns && loop_now(&daemon->loop) - pss->sampled_ns < FRESH_NS) {
        waiter->sampled(waiter);
        return true;
    }
    if (!waiter->queued) {
        waiter->queued = true;
        waiter->next = pss->waiters;
        pss->waiters = waiter;
    }
    if (pss->out)
        return false;
    start_reading(daemon, getpid(), NULL);
    for (struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        if (guest->pid > 0 && guest->death.fd >= 0)
            start_reading(daemon, guest->pid, guest);
    }
    if (!pss->out)
        finish(daemon);
    return pss->out == 0;
}

void pss_cancel(struct daemon *daemon, struct pss_waiter *waiter)
{
    for (struct pss_waiter **place = &daemon->pss.waiters; *place; place = &(*place)->next) {
        if (*place == waiter) {
            *place = waiter->next;
            break;
        }
    }
    waiter->queued = false;
}

void pss_forget(struct daemon *daemon, const struct guest *guest)
{
    for (struct pss_reading *reading = daemon->pss.readings; reading; reading = reading->next) {
        if (reading->guest == guest)
            reading->guest = NULL;
    }
}
