/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop's lower half on the simulated machine. It never waits. Descriptors are real, so it asks
 * the kernel what is ready (epoll for what is told once, poll for what is told as long as it lasts:
 * the same readiness that io_uring's polls report), tells it in an order that chance decides, and
 * sometimes tells it a turn later. A job is done at once and told in a later turn.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "loop_kernel.h"
#include "sim_host.h"

#define SLOTS   4096U
#define BATCH   256U
#define LATE_IN 8U /* once in so many times something is told a turn later */

enum slot_kind { SLOT_FREE, SLOT_WATCH, SLOT_JOB };

struct slot {
    enum slot_kind kind;
    void *target;
    uint32_t events; /* that are still to be told */
    int result;      /* of a job */
};

struct loop_kernel {
    int epoll;
    struct slot slots[SLOTS];
    uint32_t top; /* slots below this have been in use */
};

int loop_kernel_start(struct loop *loop)
{
    struct loop_kernel *kernel = calloc(1, sizeof(*kernel));

    if (!kernel)
        return -ENOMEM;
    kernel->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (kernel->epoll < 0) {
        free(kernel);
        return -errno;
    }
    loop->kernel = kernel;
    return 0;
}

void loop_kernel_stop(struct loop *loop)
{
    close(loop->kernel->epoll);
    free(loop->kernel);
    loop->kernel = NULL;
}

static int take_slot(struct loop_kernel *kernel, enum slot_kind kind, void *target,
                     uint32_t *ret_slot)
{
    for (uint32_t i = 0; i < SLOTS; i++) {
        if (kernel->slots[i].kind != SLOT_FREE)
            continue;
        kernel->slots[i] = (struct slot){.kind = kind, .target = target};
        if (i >= kernel->top)
            kernel->top = i + 1;
        *ret_slot = i;
        return 0;
    }
    return -ENOMEM;
}

int loop_watch_add(struct loop *loop, struct loop_watch *watch)
{
    struct epoll_event event = {.events = watch->events | (uint32_t)EPOLLET};
    uint32_t slot;
    int result = take_slot(loop->kernel, SLOT_WATCH, watch, &slot);

    if (result)
        return result;
    event.data.u32 = slot;
    if (!watch->level && epoll_ctl(loop->kernel->epoll, EPOLL_CTL_ADD, watch->fd, &event)) {
        loop->kernel->slots[slot].kind = SLOT_FREE;
        return -errno;
    }
    watch->op = slot;
    return 0;
}

void loop_watch_remove(struct loop *loop, struct loop_watch *watch)
{
    if (watch->op == LOOP_NOT_QUEUED)
        return;
    if (!watch->level)
        (void)epoll_ctl(loop->kernel->epoll, EPOLL_CTL_DEL, watch->fd, NULL);
    loop->kernel->slots[watch->op] = (struct slot){.kind = SLOT_FREE};
    watch->op = LOOP_NOT_QUEUED;
}

/* ---- jobs ---- */

static void keep_result(struct loop *loop, const struct loop_job *job, ssize_t result)
{
    loop->kernel->slots[job->op].result = result < 0 ? -errno : (int)result;
}

int loop_read_start(struct loop *loop, struct loop_job *job, int fd, void *buffer, uint32_t bytes)
{
    int result = take_slot(loop->kernel, SLOT_JOB, job, &job->op);

    if (!result)
        keep_result(loop, job, pread(fd, buffer, bytes, 0));
    return result;
}

int loop_write_start(struct loop *loop, struct loop_job *job, int fd, const void *buffer,
                     uint32_t bytes)
{
    int result = take_slot(loop->kernel, SLOT_JOB, job, &job->op);

    if (!result)
        keep_result(loop, job, pwrite(fd, buffer, bytes, 0));
    return result;
}

int loop_open_start(struct loop *loop, struct loop_job *job, int dir, const char *name, int flags)
{
    int result = take_slot(loop->kernel, SLOT_JOB, job, &job->op);

    if (!result)
        keep_result(loop, job, openat(dir, name, flags, 0600));
    return result;
}

/* The machine under the simulation does not lose its disk. */
int loop_sync_start(struct loop *loop, struct loop_job *job, int fd)
{
    int result = take_slot(loop->kernel, SLOT_JOB, job, &job->op);

    (void)fd;
    if (!result)
        keep_result(loop, job, 0);
    return result;
}

int loop_rename_start(struct loop *loop, struct loop_job *job, int dir, const char *from,
                      const char *to)
{
    int result = take_slot(loop->kernel, SLOT_JOB, job, &job->op);

    if (!result)
        keep_result(loop, job, renameat(dir, from, dir, to));
    return result;
}

/* ---- a turn ---- */

static void look_at_edges(struct loop_kernel *kernel)
{
    struct epoll_event events[BATCH];
    int count = epoll_wait(kernel->epoll, events, BATCH, 0);

    for (int i = 0; i < count; i++)
        kernel->slots[events[i].data.u32].events |= events[i].events;
}

static void look_at_levels(struct loop_kernel *kernel)
{
    struct pollfd polled[SLOTS];
    uint32_t slots[SLOTS], count = 0;

    for (uint32_t i = 0; i < kernel->top; i++) {
        const struct loop_watch *watch = kernel->slots[i].target;

        if (kernel->slots[i].kind != SLOT_WATCH || !watch->level)
            continue;
        polled[count] = (struct pollfd){.fd = watch->fd, .events = (short)watch->events};
        slots[count++] = i;
    }
    if (poll(polled, count, 0) <= 0)
        return;
    for (uint32_t i = 0; i < count; i++)
        kernel->slots[slots[i]].events |= (uint32_t)polled[i].revents;
}

int loop_kernel_wait(struct loop *loop, uint64_t wait_ns)
{
    struct sim_host *host = sim_host_current();

    (void)wait_ns;
    host->turn_hashes = host->turn_callbacks = 0;
    look_at_edges(loop->kernel);
    look_at_levels(loop->kernel);
    return 0;
}

static bool is_due(const struct slot *slot)
{
    return slot->kind == SLOT_JOB || (slot->kind == SLOT_WATCH && slot->events);
}

static void tell(struct loop_kernel *kernel, uint32_t number)
{
    struct slot slot = kernel->slots[number];

    if (!is_due(&slot))
        return; /* somebody who was told before has removed it */
    kernel->slots[number].events = 0;
    if (slot.kind == SLOT_JOB) {
        struct loop_job *job = slot.target;

        kernel->slots[number].kind = SLOT_FREE;
        job->done(job, slot.result);
    } else {
        struct loop_watch *watch = slot.target;

        watch->ready(watch, slot.events);
    }
}

void loop_kernel_complete(struct loop *loop)
{
    struct sim_host *host = sim_host_current();
    struct loop_kernel *kernel = loop->kernel;
    uint32_t due[BATCH], count = 0;

    for (uint32_t i = 0; i < kernel->top && count < BATCH; i++) {
        if (is_due(&kernel->slots[i]) && !sim_host_once_in(host, LATE_IN))
            due[count++] = i;
    }
    host->turn_callbacks = count;
    while (count) {
        uint32_t pick = sim_host_below(host, count);

        tell(kernel, due[pick]);
        due[pick] = due[--count];
    }
}
