/* SPDX-License-Identifier: Apache-2.0 */
#include "loop.h"

#include "host.h"
#include "loop_kernel.h"

#define NS_PER_S 1000000000ULL
/* Nothing but a timer, a watch or a signal has to be waited for: this long is for ever. */
#define LONGEST_WAIT_NS (3600 * NS_PER_S)

int loop_start(struct loop *loop)
{
    *loop = (struct loop){.now_ns = host_clock_ns()};
    return loop_kernel_start(loop);
}

void loop_stop(struct loop *loop)
{
    loop_kernel_stop(loop);
}

uint64_t loop_now(const struct loop *loop)
{
    return loop->now_ns;
}

void loop_end(struct loop *loop)
{
    loop->stopping = true;
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

static uint64_t time_to_wait(const struct loop *loop, uint64_t wait_ns)
{
    uint64_t now = host_clock_ns();

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
    int result = loop_kernel_wait(loop, time_to_wait(loop, wait_ns));
    uint64_t spent;

    if (result)
        return result;
    loop->now_ns = host_clock_ns();
    loop->turns++;
    loop_kernel_complete(loop);
    expire_timers(loop);
    step_tasks(loop);
    spent = host_clock_ns() - loop->now_ns;
    if (spent > loop->longest_turn_ns)
        loop->longest_turn_ns = spent;
    return 0;
}

int loop_run(struct loop *loop)
{
    int result = 0;

    while (!loop->stopping && result == 0)
        result = loop_turn(loop, LONGEST_WAIT_NS);
    return result;
}
