/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop's lower half on io_uring: polls and jobs are requests to the kernel, each with an *op*,
 * the slot of a table whose number travels with the request as its user_data. An op is freed by its
 * last completion, never before: until then the kernel may still speak of it.
 */
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>

#include "loop_kernel.h"

#define QUEUE_ENTRIES 256U
#define OPS_AT_FIRST  64U
#define NS_PER_S      1000000000ULL
#define NO_OP         UINT64_MAX /* user_data of requests whose answer nobody waits for */

enum op_kind { OP_FREE, OP_WATCH, OP_JOB };

struct op {
    uint8_t kind;
    uint32_t next_free;
    void *target; /* NULL: its owner has gone; the op waits for its last completion */
};

struct loop_kernel {
    struct io_uring ring;
    struct op *ops;
    uint32_t op_count, free_op;
};

int loop_kernel_start(struct loop *loop)
{
    struct loop_kernel *kernel = calloc(1, sizeof(*kernel));
    int result;

    if (!kernel)
        return -ENOMEM;
    kernel->free_op = LOOP_NOT_QUEUED;
    result = io_uring_queue_init(QUEUE_ENTRIES, &kernel->ring, 0);
    if (result) {
        free(kernel);
        return result;
    }
    loop->kernel = kernel;
    return 0;
}

void loop_kernel_stop(struct loop *loop)
{
    io_uring_queue_exit(&loop->kernel->ring);
    free(loop->kernel->ops);
    free(loop->kernel);
    loop->kernel = NULL;
}

/* ---- requests ---- */

static int grow_ops(struct loop_kernel *kernel)
{
    uint32_t count = kernel->op_count ? kernel->op_count * 2 : OPS_AT_FIRST;
    struct op *ops = realloc(kernel->ops, count * sizeof(*ops));

    if (!ops)
        return -ENOMEM;
    for (uint32_t i = kernel->op_count; i < count; i++)
        ops[i] = (struct op){.next_free = i + 1 < count ? i + 1 : LOOP_NOT_QUEUED};
    kernel->free_op = kernel->op_count;
    kernel->ops = ops;
    kernel->op_count = count;
    return 0;
}

static int take_op(struct loop_kernel *kernel, enum op_kind kind, void *target, uint32_t *ret_op)
{
    uint32_t op;

    if (kernel->free_op == LOOP_NOT_QUEUED) {
        int result = grow_ops(kernel);
        if (result)
            return result;
    }
    op = kernel->free_op;
    kernel->free_op = kernel->ops[op].next_free;
    kernel->ops[op] = (struct op){.kind = (uint8_t)kind, .target = target};
    *ret_op = op;
    return 0;
}

static void free_op(struct loop_kernel *kernel, uint32_t op)
{
    kernel->ops[op] = (struct op){.kind = OP_FREE, .next_free = kernel->free_op};
    kernel->free_op = op;
}

/* A full submission queue is handed to the kernel and is empty then. */
static struct io_uring_sqe *next_sqe(struct loop_kernel *kernel)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&kernel->ring);

    for (int tries = 0; !sqe && tries < 3; tries++) {
        io_uring_submit(&kernel->ring);
        sqe = io_uring_get_sqe(&kernel->ring);
    }
    return sqe;
}

static int arm(struct loop_kernel *kernel, const struct loop_watch *watch)
{
    struct io_uring_sqe *sqe = next_sqe(kernel);

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
    int result = take_op(loop->kernel, OP_WATCH, watch, &watch->op);

    if (result) {
        watch->op = LOOP_NOT_QUEUED;
        return result;
    }
    result = arm(loop->kernel, watch);
    if (result) {
        free_op(loop->kernel, watch->op);
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
    loop->kernel->ops[watch->op].target = NULL;
    sqe = next_sqe(loop->kernel);
    if (sqe) {
        io_uring_prep_poll_remove(sqe, watch->op);
        sqe->user_data = NO_OP;
    }
    watch->op = LOOP_NOT_QUEUED;
}

/* ---- jobs ---- */

static int take_job(struct loop *loop, struct loop_job *job, struct io_uring_sqe **ret_sqe)
{
    int result = take_op(loop->kernel, OP_JOB, job, &job->op);
    struct io_uring_sqe *sqe;

    if (result)
        return result;
    sqe = next_sqe(loop->kernel);
    if (!sqe) {
        free_op(loop->kernel, job->op);
        return -EBUSY;
    }
    *ret_sqe = sqe;
    return 0;
}

/* The request is prepared. */
static int hand_over(struct io_uring_sqe *sqe, const struct loop_job *job)
{
    io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    sqe->user_data = job->op;
    return 0;
}

int loop_read_start(struct loop *loop, struct loop_job *job, int fd, void *buffer, uint32_t bytes)
{
    struct io_uring_sqe *sqe;
    int result = take_job(loop, job, &sqe);

    if (result)
        return result;
    io_uring_prep_read(sqe, fd, buffer, bytes, 0);
    return hand_over(sqe, job);
}

int loop_write_start(struct loop *loop, struct loop_job *job, int fd, const void *buffer,
                     uint32_t bytes)
{
    struct io_uring_sqe *sqe;
    int result = take_job(loop, job, &sqe);

    if (result)
        return result;
    io_uring_prep_write(sqe, fd, buffer, bytes, 0);
    return hand_over(sqe, job);
}

int loop_open_start(struct loop *loop, struct loop_job *job, int dir, const char *name, int flags)
{
    struct io_uring_sqe *sqe;
    int result = take_job(loop, job, &sqe);

    if (result)
        return result;
    io_uring_prep_openat(sqe, dir, name, flags, 0600);
    return hand_over(sqe, job);
}

int loop_sync_start(struct loop *loop, struct loop_job *job, int fd)
{
    struct io_uring_sqe *sqe;
    int result = take_job(loop, job, &sqe);

    if (result)
        return result;
    io_uring_prep_fsync(sqe, fd, 0);
    return hand_over(sqe, job);
}

int loop_rename_start(struct loop *loop, struct loop_job *job, int dir, const char *from,
                      const char *to)
{
    struct io_uring_sqe *sqe;
    int result = take_job(loop, job, &sqe);

    if (result)
        return result;
    io_uring_prep_renameat(sqe, dir, from, dir, to, 0);
    return hand_over(sqe, job);
}

/* ---- completions ---- */

static void complete_watch(struct loop *loop, uint32_t op, int result, bool more)
{
    struct loop_watch *watch = loop->kernel->ops[op].target;

    if (!watch) {
        if (!more)
            free_op(loop->kernel, op);
        return;
    }
    watch->ready(watch, result >= 0 ? (uint32_t)result : POLLERR);
    if (more)
        return;
    if (loop->kernel->ops[op].target != watch) /* removed meanwhile; this was its last completion */
        free_op(loop->kernel, op);
    else if (arm(loop->kernel, watch))
        loop_end(loop);
}

static void complete_job(struct loop *loop, uint32_t op, int result)
{
    struct loop_job *job = loop->kernel->ops[op].target;

    free_op(loop->kernel, op);
    job->done(job, result);
}

static void complete(struct loop *loop, uint64_t user_data, int result, bool more)
{
    uint32_t op = (uint32_t)user_data;

    if (user_data >= loop->kernel->op_count)
        return;
    if (loop->kernel->ops[op].kind == OP_WATCH)
        complete_watch(loop, op, result, more);
    else if (loop->kernel->ops[op].kind == OP_JOB)
        complete_job(loop, op, result);
}

void loop_kernel_complete(struct loop *loop)
{
    struct io_uring_cqe *cqe;

    /* At most a queue's worth a turn: timers and tasks come to their turn under any flood. */
    for (unsigned i = 0; i < QUEUE_ENTRIES && io_uring_peek_cqe(&loop->kernel->ring, &cqe) == 0;
         i++) {
        uint64_t user_data = cqe->user_data;
        int result = cqe->res;
        bool more = cqe->flags & IORING_CQE_F_MORE;

        io_uring_cqe_seen(&loop->kernel->ring, cqe);
        complete(loop, user_data, result, more);
    }
}

int loop_kernel_wait(struct loop *loop, uint64_t wait_ns)
{
    struct __kernel_timespec timeout = {(long long)(wait_ns / NS_PER_S),
                                        (long long)(wait_ns % NS_PER_S)};
    struct io_uring_cqe *cqe;
    int result;

    if (wait_ns)
        result = io_uring_submit_and_wait_timeout(&loop->kernel->ring, &cqe, 1, &timeout, NULL);
    else
        result = io_uring_submit(&loop->kernel->ring);
    if (result < 0 && result != -ETIME && result != -EINTR && result != -EBUSY && result != -EAGAIN)
        return result;
    return 0;
}
