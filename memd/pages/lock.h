/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A lock with priority inheritance: one word, no libc, usable by the VMM's threads inside
 * interposed calls and by the agent's from freeze to thaw. Not recursive. Nobody waits for anybody
 * while holding one.
 *
 * Inheritance is what keeps a guest's wait short: a vCPU that runs into a hole wakes the fault
 * handler, which has a real-time priority; that waits for the block's lock, and the scanner, who
 * holds it and may have been preempted by other vCPUs in the middle of a freeze, runs at once with
 * the handler's priority (without it: waits of 30 ms with two busy guests on two cores).
 */
#ifndef MEMD_PAGES_LOCK_H
#define MEMD_PAGES_LOCK_H

#include <linux/futex.h>
#include <stdbool.h>

#include "sys.h"

struct lock {
    uint32_t word; /* futex(2), PI: 0 free, else the holder's thread id and FUTEX_WAITERS */
};

static inline bool lock_swap(struct lock *lock, uint32_t from, uint32_t to)
{
    return __atomic_compare_exchange_n(&lock->word, &from, to, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED);
}

/*
 * This thread's id, or 0 when it was not asked for yet (in this process: lock_reset). Initial-exec:
 * no call into the dynamic linker, whatever locks of libc's are held.
 *
 * A child of vfork() runs on its parent's thread-local memory and would take a lock by the parent's
 * id; if somebody waited for it then, the kernel would not let the child release it. That can be
 * borne: such a child may do nothing but execve and _exit, and of what else is done in practice
 * before them (open, fcntl, dup2) nothing takes a lock of ours. One that changed the mappings of
 * guest RAM would change them for its parent as well. To ask the kernel each time costs two system
 * calls a lock, and a broken share takes two locks.
 */
extern __thread uint32_t lock_thread_id __attribute__((tls_model("initial-exec")));

static inline uint32_t lock_self(void)
{
    if (lock_thread_id == 0)
        lock_thread_id = (uint32_t)sys_call0(SYS_gettid);
    return lock_thread_id;
}

/* A page is placed or a share broken under it: most waits are over after some microseconds, and to
 * sleep and to be woken costs both sides more than that. */
#define LOCK_SPINS 400U /* 5 to 15 us */

static inline bool lock_spin(struct lock *lock, uint32_t self)
{
    for (uint32_t i = 0; i < LOCK_SPINS; i++) {
        if (__atomic_load_n(&lock->word, __ATOMIC_RELAXED) == 0 && lock_swap(lock, 0, self))
            return true;
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
    }
    return false;
}

static inline void lock_take(struct lock *lock)
{
    uint32_t self = lock_self();

    if (lock_swap(lock, 0, self) || lock_spin(lock, self))
        return;

    /* FUTEX_LOCK_PI answers 0 when we have it, and an error when it is to be tried again (the
     * holder is just letting go or ending). */
    while (!lock_swap(lock, 0, self) &&
           sys_call4(SYS_futex, &lock->word, FUTEX_LOCK_PI_PRIVATE, 0, NULL) != 0)
        sys_call0(SYS_sched_yield); /* a kernel without PI futexes: slow, and right */
}

static inline void lock_release(struct lock *lock)
{
    if (!lock_swap(lock, lock_self(), 0))
        sys_call2(SYS_futex, &lock->word, FUTEX_UNLOCK_PI_PRIVATE);
}

/* In a child after fork: the holder was a thread of the parent. */
static inline void lock_reset(struct lock *lock)
{
    __atomic_store_n(&lock->word, 0, __ATOMIC_RELEASE);
    lock_thread_id = 0; /* the thread that forked has another one here */
}

#endif
