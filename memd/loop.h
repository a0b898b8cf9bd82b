/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon's loop: one thread, one io_uring.
 *
 * A turn: wait for completions or the next timer, call who is concerned, then let each queued task
 * do one step. Nobody blocks in a turn, and nobody's share of a turn grows with the size of a
 * guest: long work is a task that does a bounded step and asks to be called again. The clock is
 * read once a turn (loop_now).
 *
 * Everything here is called from the loop's thread. The structs belong to their owners and must
 * stay where they are until they are removed; after the removal nothing of them is touched any
 * more, so an owner may free itself inside its own callback.
 */
#ifndef MEMD_LOOP_H
#define MEMD_LOOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LOOP_NOT_QUEUED UINT32_MAX

struct loop_watch {
    int fd;
    uint32_t events; /* POLLIN, POLLOUT, ... */
    /* false: called once for each time something new happens (one multishot poll), so the callback
     * takes all there is or goes on in a task. true: called as long as the state lasts. */
    bool level;
    void (*ready)(struct loop_watch *watch, uint32_t events);
    void *owner;
    uint32_t op; /* the loop's own: LOOP_NOT_QUEUED when not watched */
};

struct loop_timer {
    void (*expired)(struct loop_timer *timer);
    void *owner;
    uint64_t due_ns; /* 0: not running */
    struct loop_timer *next;
};

struct loop_task {
    /* One bounded step. true: there is more to do, call again in the next turn. */
    bool (*step)(struct loop_task *task);
    void *owner;
    bool queued;
    struct loop_task *next, *previous;
};

/* One system call on a file that a kernel worker makes, whatever it takes (IOSQE_ASYNC). */
struct loop_job {
    void (*done)(struct loop_job *job, int result); /* what the call returned, or -errno */
    void *owner;
    uint32_t op;
};

struct loop_kernel; /* the lower half: loop_kernel.h */

struct loop {
    struct loop_kernel *kernel;
    uint64_t now_ns;
    bool stopping;
    struct loop_timer *timers;
    struct loop_task *first_task, *last_task;
    uint32_t task_count;
    uint64_t turns;
    uint64_t longest_turn_ns;
};

/* -ENOSYS or -EPERM: this kernel has no io_uring, or forbids it. Logs nothing. */
int loop_start(struct loop *loop);
void loop_stop(struct loop *loop);

/* Runs turns until loop_end. Returns 0, or -errno when the ring is broken. */
int loop_run(struct loop *loop);
/* One turn that waits for at most wait_ns. For tests, and for loop_run. */
int loop_turn(struct loop *loop, uint64_t wait_ns);
void loop_end(struct loop *loop);

/* The time of this turn on CLOCK_MONOTONIC. */
uint64_t loop_now(const struct loop *loop);

int loop_watch_add(struct loop *loop, struct loop_watch *watch);
void loop_watch_remove(struct loop *loop, struct loop_watch *watch);

/* (Re)starts a timer that expires once, delay_ns from now. */
void loop_timer_set(struct loop *loop, struct loop_timer *timer, uint64_t delay_ns);
void loop_timer_cancel(struct loop *loop, struct loop_timer *timer);

/* Queues a task; nothing when it is queued already. */
void loop_task_add(struct loop *loop, struct loop_task *task);
void loop_task_cancel(struct loop *loop, struct loop_task *task);

/* Each starts one job. What they are given stays untouched by the caller until done() was called,
 * which happens exactly once, in a later turn. -ENOMEM, -EBUSY: not started. */

/* Reads from the start of fd. */
int loop_read_start(struct loop *loop, struct loop_job *job, int fd, void *buffer, uint32_t bytes);
/* Writes at the start of fd. */
int loop_write_start(struct loop *loop, struct loop_job *job, int fd, const void *buffer,
                     uint32_t bytes);
/* openat(2), for the owner alone where it makes the file. */
int loop_open_start(struct loop *loop, struct loop_job *job, int dir, const char *name, int flags);
int loop_sync_start(struct loop *loop, struct loop_job *job, int fd);
/* renameat(2) within one directory. */
int loop_rename_start(struct loop *loop, struct loop_job *job, int dir, const char *from,
                      const char *to);

#endif
