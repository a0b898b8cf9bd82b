/* SPDX-License-Identifier: Apache-2.0 */
#include "loop.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <time.h>

#define QUEUE_ENTRIES 256U
#define OPS_AT_FIRST  64U
#define NS_PER_S      1000000000ULL
#define NO_OP         UINT64_MAX /* user_data of requests whose answer nobody waits for */

enum op_kind { OP_FREE, OP_WATCH, OP_READ };

static uint64_t clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

int loop_start(struct loop *loop)
{
    *loop = (struct loop){.free_op = LOOP_NOT_QUEUED};
    loop->now_ns = clock_ns();
    return io_uring_queue_init(QUEUE_ENTRIES, &loop->ring, 0);
}

void loop_stop(struct loop *loop)
{
    io_uring_queue_exit(&loop->ring);
    free(loop->ops);
    loop->ops = NULL;
}

uint64_t loop_now(const struct loop *loop)
{
    return loop->now_ns;
}

void loop_end(struct loop *loop)
{
    loop->stopping = true;
}

/* ---- requests to the kernel ---- */

static int grow_ops(struct loop *loop)
{
    uint32_t count = loop->op_count ? loop->op_count * 2 : OPS_AT_FIRST;
    struct loop_op *ops = realloc(loop->ops, count * sizeof(*ops));

    if (!ops)
        return -ENOMEM;
    for (uint32_t i = loop->op_count; i < count; i++)
        ops[i] = (struct loop_op){.next_free = i + 1 < count ? i + 1 : LOOP_NOT_QUEUED};
    loop->free_op = loop->op_count;
    loop->ops = ops;
    loop->op_count = count;
    return 0;
}

static int take_op(struct loop *loop, enum op_kind kind, void *target, uint32_t *ret_op)
{
    uint32_t op;

    if (loop->free_op == LOOP_NOT_QUEUED) {
        int result = grow_ops(loop);
        if (result)
            return result;
    }
    op = loop->free_op;
    loop->free_op = loop->ops[op].next_free;
    loop->ops[op] = (struct loop_op){.kind = (uint8_t)kind, .target = target};
    *ret_op = op;
    return 0;
}

static void free_op(struct loop *loop, uint32_t op)
{
    loop->ops[op] = (struct loop_op){.kind = OP_FREE, .next_free = loop->free_op};
    loop->free_op = op;
}

/* A full submission queue is handed to the kernel and is empty then. */
static struct io_uring_sqe *next_sqe(struct loop *loop)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&loop->ring);

    for (int tries = 0; !sqe && tries < 3; tries++) {
        io_uring_submit(&loop->ring);
        sqe = io_uring_get_sqe(&loop->ring);
    }
    return sqe;
}

static int arm(struct loop *loop, const struct loop_watch *watch)
{
    struct io_uring_sqe *sqe = next_sqe(loop);

    if (!sqe)
        return -EBUSY;
    if (watch->level)
        io_uring_prep_poll_add(sqe, watch->fd, watch->events);
    else
        io_uring_prep_poll_multishot(sqe, watch->fd, watch->events);
    sqe->user_data = watch->op;
    return 0;
}

int loop_watch_add(struct loop *loop, struct loop_watch *watch)
{
    int result = take_op(loop, OP_WATCH, watch, &watch->op);

    if (result) {
        watch->op = LOOP_NOT_QUEUED;
        return result;
    }
    result = arm(loop, watch);
    if (result) {
        free_op(loop, watch->op);
        watch->op = LOOP_NOT_QUEUED;
    }
    return result;
}

void loop_watch_remove(struct loop *loop, struct loop_watch *watch)
{
    struct io_uring_sqe *sqe;

    if (watch->op == LOOP_NOT_QUEUED)
        return;
    /* The op is freed by the poll's last completion, which the removal brings about. */
    loop->ops[watch->op].target = NULL;
    sqe = next_sqe(loop);
    if (sqe) {
        io_uring_prep_poll_remove(sqe, watch->op);
        sqe->user_data = NO_OP;
    }
    watch->op = LOOP_NOT_QUEUED;
}

int loop_read_start(struct loop *loop, struct loop_read *read, int fd, void *buffer, uint32_t bytes)
{
    int result = take_op(loop, OP_READ, read, &read->op);
    struct io_uring_sqe *sqe;

    if (result)
        return result;
    sqe = next_sqe(loop);
    if (!sqe) {
        free_op(loop, read->op);
        return -EBUSY;
    }
    io_uring_prep_read(sqe, fd, buffer, bytes, 0);
    io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    sqe->user_data = read->op;
    return 0;
}

/* ---- timers ---- */

void loop_timer_set(struct loop *loop, struct loop_timer *timer, uint64_t delay_ns)
{
    struct loop_timer **place = &loop->timers;

    loop_timer_cancel(loop, timer);
    timer->due_ns = loop->now_ns + (delay_ns ? delay_ns : 1);
    while (*place && (*place)->due_ns <= timer->due_ns)
        place = &(*place)->next;
    timer->next = *place;
    *place = timer;
}

void loop_timer_cancel(struct loop *loop, struct loop_timer *timer)
{
    if (!timer->due_ns)
        return;
    for (struct loop_timer **place = &loop->timers; *place; place = &(*place)->next) {
        if (*place == timer) {
            *place = timer->next;
            break;
        }
    }
    timer->due_ns = 0;
}

static void expire_timers(struct loop *loop)
{
    while (loop->timers && loop->timers->due_ns <= loop->now_ns) {
        struct loop_timer *timer = loop->timers;

        loop->timers = timer->next;
        timer->due_ns = 0;
        timer->expired(timer);
    }
}

/* ---- tasks ---- */

void loop_task_add(struct loop *loop, struct loop_task *task)
{
    if (task->queued)
        return;
    task->queued = true;
    task->next = NULL;
    task->previous = loop->last_task;
    if (loop->last_task)
        loop->last_task->next = task;
    else
        loop->first_task = task;
    loop->last_task = task;
    loop->task_count++;
}

void loop_task_cancel(struct loop *loop, struct loop_task *task)
{
    if (!task->queued)
        return;
    task->queued = false;
    if (task->previous)
        task->previous->next = task->next;
    else
        loop->first_task = task->next;
    if (task->next)
        task->next->previous = task->previous;
    else
        loop->last_task = task->previous;
    loop->task_count--;
}

/* One step of each task that is queued now. A step may cancel any task, its own included. */
static void step_tasks(struct loop *loop)
{
    for (uint32_t left = loop->task_count; left && loop->first_task; left--) {
        struct loop_task *task = loop->first_task;

        loop_task_cancel(loop, task);
        if (task->step(task))
            loop_task_add(loop, task);
    }
}

/* ---- a turn ---- */

static void complete_watch(struct loop *loop, uint32_t op, int result, bool more)
{
    struct loop_watch *watch = loop->ops[op].target;

    if (!watch) {
        if (!more)
            free_op(loop, op);
        return;
    }
    watch->ready(watch, result >= 0 ? (uint32_t)result : POLLERR);
    if (more)
        return;
    if (loop->ops[op].target != watch) /* removed meanwhile; this was its last completion */
        free_op(loop, op);
    else if (arm(loop, watch))
        loop_end(loop);
}

static void complete_read(struct loop *loop, uint32_t op, int result)
{
    struct loop_read *read = loop->ops[op].target;

    free_op(loop, op);
    read->done(read, result);
}

static void complete(struct loop *loop, uint64_t user_data, int result, bool more)
{
    uint32_t op = (uint32_t)user_data;

    if (user_data >= loop->op_count)
        return;
    if (loop->ops[op].kind == OP_WATCH)
        complete_watch(loop, op, result, more);
    else if (loop->ops[op].kind == OP_READ)
        complete_read(loop, op, result);
}

static void drain_completions(struct loop *loop)
{
    struct io_uring_cqe *cqe;

    /* At most a queue's worth a turn: timers and tasks come to their turn under any flood. */
    for (unsigned i = 0; i < QUEUE_ENTRIES && io_uring_peek_cqe(&loop->ring, &cqe) == 0; i++) {
        uint64_t user_data = cqe->user_data;
        int result = cqe->res;
        bool more = cqe->flags & IORING_CQE_F_MORE;

        io_uring_cqe_seen(&loop->ring, cqe);
        complete(loop, user_data, result, more);
    }
}

static uint64_t time_to_wait(const struct loop *loop, uint64_t wait_ns)
{
    uint64_t now = clock_ns();

    if (loop->first_task)
        return 0;
    if (!loop->timers)
        return wait_ns;
    if (loop->timers->due_ns <= now)
        return 0;
    return loop->timers->due_ns - now < wait_ns ? loop->timers->due_ns - now : wait_ns;
}

int loop_turn(struct loop *loop, uint64_t wait_ns)
{
    uint64_t wait = time_to_wait(loop, wait_ns);
    struct __kernel_timespec timeout = {(long long)(wait / NS_PER_S), (long long)(wait % NS_PER_S)};
    struct io_uring_cqe *cqe;
    int result;

    if (wait)
        result = io_uring_submit_and_wait_timeout(&loop->ring, &cqe, 1, &timeout, NULL);
    else
        result = io_uring_submit(&loop->ring);
    if (result < 0 && result != -ETIME && result != -EINTR && result != -EBUSY && result != -EAGAIN)
        return result;
    loop->now_ns = clock_ns();
    loop->turns++;
    drain_completions(loop);
    expire_timers(loop);
    step_tasks(loop);
    uint64_t spent = clock_ns() - loop->now_ns;
    if (spent > loop->longest_turn_ns)
        loop->longest_turn_ns = spent;
    return 0;
}

int loop_run(struct loop *loop)
{
    int result = 0;

    while (!loop->stopping && result == 0)
        result = loop_turn(loop, NS_PER_S);
    return result;
}
