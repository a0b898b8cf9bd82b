/* SPDX-License-Identifier: Apache-2.0 */
#include "fault.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "clock.h"
#include "freeze.h"
#include "remap.h"
#include "uffd.h"

/* How far ahead a run of faults may reach: zero pages to place, shares to break. A block of 16
 * broken at once costs 2.4 us a page instead of 15. */
#define MAX_WINDOW 16U

#define MESSAGES 16

/* Zeros for a whole window; never written, so that the kernel's zero page stands in for it. */
static uint8_t zeros[MAX_WINDOW * PAGE_BYTES] __attribute__((aligned(4096)));

void fault_record(struct fault_times *times, uint64_t ns)
{
    uint64_t us = ns / 1000;
    uint32_t whole = us ? 63 - (uint32_t)__builtin_clzll(us) : 0;
    uint32_t quarter = whole >= 2 ? (uint32_t)(us >> (whole - 2)) & 3 : 0;
    uint32_t bucket = whole * 4 + quarter;

    times->count++;
    times->buckets[bucket < FAULT_BUCKETS ? bucket : FAULT_BUCKETS - 1]++;
    if (us > times->max_us)
        times->max_us = us;
}

uint32_t fault_quantile_us(const struct fault_times *times, double fraction)
{
    uint64_t below = 0;
    double wanted = fraction * (double)times->count;

    for (uint32_t b = 0; b < FAULT_BUCKETS; b++) {
        below += times->buckets[b];
        if (times->buckets[b] && (double)below >= wanted) {
            uint64_t upper = (4ULL + b % 4 + 1) << (b / 4) >> 2;
            return (uint32_t)(upper < times->max_us ? upper : times->max_us);
        }
    }
    return (uint32_t)times->max_us;
}

/* Faults that follow each other are served in growing windows. */
static uint32_t next_window(struct fault_handler *handler, struct ram_block *block, uint32_t index)
{
    bool follows = handler->last_block == block && handler->last_end == index;

    handler->window = follows ? handler->window * 2 : 1;
    if (handler->window > MAX_WINDOW)
        handler->window = MAX_WINDOW;
    return handler->window;
}

static void remember(struct fault_handler *handler, struct ram_block *block, uint32_t end)
{
    handler->last_block = block;
    handler->last_end = end;
}

/* How many pages from `index` on, at most `window` and not beyond their chunk, are in `place`. */
static uint32_t same_place(const struct ram_block *block, uint32_t index, uint32_t window,
                           enum place place)
{
    uint32_t end = ram_chunk_end(block, ram_chunk_of(block, index));
    uint32_t run = 1;

    while (run < window && index + run < end && ram_place(block, index + run) == place &&
           !ram_captive(block, index + run))
        run++;
    return run;
}

static void place_zeros(struct fault_handler *handler, struct ram_block *block, uint32_t index)
{
    struct guest_ram *ram = handler->ram;
    uint32_t window = next_window(handler, block, index);
    uint32_t run = same_place(block, index, window, PLACE_ABSENT);
    uint8_t *at = ram_address(block, index);
    long placed = uffd_copy(ram->guest_fd, at, zeros, run * PAGE_BYTES, true);

    /* UFFDIO_COPY works within one VMA, and the window may reach beyond this one's end. */
    if (placed == -ENOENT && run > 1)
        placed = uffd_copy(ram->guest_fd, at, zeros, PAGE_BYTES, true);
    if (placed > 0) {
        ram_move_places(ram, block, index, (uint32_t)(placed / (long)PAGE_BYTES),
                        TRANSITION_POPULATE);
        remember(handler, block, index + (uint32_t)(placed / (long)PAGE_BYTES));
    } else {
        uffd_wake(ram->guest_fd, at, PAGE_BYTES);
    }
}

static void place_fetched(struct fault_handler *handler, struct ram_block *block, uint32_t index)
{
    struct guest_ram *ram = handler->ram;
    enum place place = ram_place(block, index);
    struct page_source *source = &ram->sources[place];
    uint8_t *at = ram_address(block, index);
    const void *bytes;
    long placed;
    int r = source->fetch ? source->fetch(source->self, block, index, 1, &bytes) : -ENOENT;

    handler->in_progress = r == -EINPROGRESS;
    if (r < 1)
        return; /* the guest waits on: there is no such page to show it, or not yet */
    placed = uffd_copy(ram->guest_fd, at, bytes, PAGE_BYTES, true);
    if (placed != (long)PAGE_BYTES)
        uffd_wake(ram->guest_fd, at, PAGE_BYTES);
    else if (place == PLACE_ZERO)
        ram_move_places(ram, block, index, 1, TRANSITION_WRITE);
    else if (place != PLACE_PRIVATE)
        ram_move_places(ram, block, index, 1, TRANSITION_FETCH);
}

/* Is the page in memory that is registered with guest_fd now? A fault may be told of after the hole
 * that it ran into is gone, and UFFDIO_COPY fills whatever is registered with any userfaultfd, be
 * it a mapping of the store or memory that the VMM has registered itself by now. */
static bool is_armed(const struct ram_block *block, uint32_t index)
{
    enum place place = ram_place(block, index);

    return block->chunks[ram_chunk_of(block, index)].state == CHUNK_ARMED &&
           place != PLACE_SHARED && (place == PLACE_ABSENT || !ram_captive(block, index));
}

void fault_serve_missing(struct fault_handler *handler, uintptr_t address)
{
    void *page = (void *)(address / PAGE_BYTES * PAGE_BYTES);
    struct ram_block *block = ram_find(handler->ram, page);
    uint32_t index;

    if (!block) {
        /* A frozen page that the VMM had given up with MADV_FREE may be dropped by the kernel at
         * any moment. Its bytes are zeros then; who looks at it holds a block's lock. */
        if (!freeze_is_staging(handler->ram, page) ||
            uffd_copy(handler->ram->guest_fd, page, zeros, PAGE_BYTES, true) < 0)
            uffd_wake(handler->ram->guest_fd, page, PAGE_BYTES);
        return;
    }
    lock_take(&block->lock);
    index = (uint32_t)(((uint8_t *)page - block->base) / (long)PAGE_BYTES);
    if (!block->live || !is_armed(block, index))
        uffd_wake(handler->ram->guest_fd, page, PAGE_BYTES);
    else if (ram_place(block, index) == PLACE_ABSENT)
        place_zeros(handler, block, index);
    else
        place_fetched(handler, block, index);
    lock_release(&block->lock);
}

/* A page whose share was broken is asked to be quiet for longer before it is shared again. */
static void lose_patience(struct ram_block *block, uint32_t index, uint32_t pages)
{
    for (uint32_t i = index; i < index + pages; i++)
        if ((block->table[i] & TABLE_PATIENCE_MASK) != TABLE_PATIENCE_MASK)
            block->table[i] += TABLE_PATIENCE_UNIT;
}

static void break_share(struct fault_handler *handler, struct ram_block *block, uint32_t index)
{
    struct guest_ram *ram = handler->ram;
    uint32_t window = next_window(handler, block, index);
    uint32_t run = same_place(block, index, window, PLACE_SHARED);
    int broken = -ENOMEM;

    if (ram_may_spend(ram, ram_split_cost(block, index, run)))
        broken = remap_to_private(ram, block, index, run, true);
    if (broken < 0) {
        ram_move_places(ram, block, index, 1, TRANSITION_BREAK);
        ram_set_captive(block, index, true);
        uffd_protect(ram->store_fd, ram_address(block, index), PAGE_BYTES, false);
        broken = 1;
    }
    /* Only the page that was written to has shown that it changes. */
    lose_patience(block, index, 1);
    ram_note_broken(ram, block, index, (uint32_t)broken);
    remember(handler, block, index + (uint32_t)broken);
}

/* Like the above, this may come late: the protection is lifted only from what is in the store's
 * mappings, never from memory that the VMM has protected itself by now. */
void fault_serve_write(struct fault_handler *handler, uintptr_t address)
{
    void *page = (void *)(address / PAGE_BYTES * PAGE_BYTES);
    struct guest_ram *ram = handler->ram;
    struct ram_block *block = ram_find(ram, page);
    uint32_t index;

    if (!block) {
        uffd_wake(ram->store_fd, page, PAGE_BYTES);
        return;
    }
    lock_take(&block->lock);
    index = (uint32_t)(((uint8_t *)page - block->base) / (long)PAGE_BYTES);
    if (block->live && ram_place(block, index) == PLACE_SHARED)
        break_share(handler, block, index);
    else if (block->live && ram_captive(block, index))
        uffd_protect(ram->store_fd, page, PAGE_BYTES, false);
    uffd_wake(ram->store_fd, page, PAGE_BYTES);
    lock_release(&block->lock);
}

static void drain(struct fault_handler *handler, int fd,
                  void (*serve)(struct fault_handler *, uintptr_t))
{
    struct uffd_msg messages[MESSAGES];
    long got = sys_read(fd, messages, sizeof(messages));
    uint64_t start = clock_now_ns();

    for (long i = 0; i < got / (long)sizeof(messages[0]); i++) {
        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        handler->in_progress = false;
        serve(handler, messages[i].arg.pagefault.address);
        if (!handler->in_progress)
            fault_record(&handler->times, clock_now_ns() - start);
    }
}

static void *run(void *context)
{
    struct fault_handler *handler = context;
    struct pollfd polled[4];
    uint64_t nudges;

    __atomic_store_n(&handler->tid, (uint32_t)sys_call0(SYS_gettid), __ATOMIC_RELEASE);
    while (!__atomic_load_n(&handler->open, __ATOMIC_ACQUIRE))
        sys_call4(SYS_futex, &handler->open, FUTEX_WAIT_PRIVATE, 0, NULL);
    polled[0] = (struct pollfd){.fd = handler->ram->store_fd, .events = POLLIN};
    polled[1] = (struct pollfd){.fd = handler->ram->guest_fd, .events = POLLIN};
    polled[2] = (struct pollfd){.fd = handler->nudge_fd, .events = POLLIN};
    while (!__atomic_load_n(&handler->stop, __ATOMIC_ACQUIRE)) {
        const struct fault_side *side = __atomic_load_n(&handler->side, __ATOMIC_SEQ_CST);

        polled[3] = (struct pollfd){.fd = -1};
        if (side)
            polled[3].fd = side->prepare(side->self, &polled[3].events);
        sys_call5(SYS_ppoll, polled, 4, NULL, NULL, 8);
        if (polled[2].revents & POLLIN)
            sys_read(handler->nudge_fd, &nudges, sizeof(nudges));
        if (polled[0].revents & POLLIN)
            drain(handler, polled[0].fd, fault_serve_write);
        if (polled[1].revents & POLLIN)
            drain(handler, polled[1].fd, fault_serve_missing);
        if (side && polled[3].revents)
            side->ready(side->self, polled[3].revents);
        __atomic_add_fetch(&handler->turns, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

void fault_nudge(struct fault_handler *handler)
{
    uint64_t one = 1;

    sys_call3(SYS_write, handler->nudge_fd, &one, sizeof(one));
}

void fault_set_side(struct fault_handler *handler, const struct fault_side *side)
{
    uint32_t turns;

    __atomic_store_n(&handler->side, side, __ATOMIC_SEQ_CST);
    turns = __atomic_load_n(&handler->turns, __ATOMIC_SEQ_CST);
    /* The turn that is under way may have the old one, the next one has not. */
    while (__atomic_load_n(&handler->turns, __ATOMIC_SEQ_CST) == turns) {
        fault_nudge(handler);
        sys_call0(SYS_sched_yield);
    }
}

int fault_start(struct fault_handler *handler, struct guest_ram *ram)
{
    sigset_t all;
    sigset_t old;
    int r;

    handler->ram = ram;
    handler->nudge_fd = (int)sys_call2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (handler->nudge_fd < 0)
        return handler->nudge_fd;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = pthread_create(&handler->thread, NULL, run, handler);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r) {
        sys_close(handler->nudge_fd);
        return -r;
    }
    pthread_getcpuclockid(handler->thread, &handler->cpu_clock);
    while (!__atomic_load_n(&handler->tid, __ATOMIC_ACQUIRE))
        sys_call0(SYS_sched_yield);
    return 0;
}

void fault_open(struct fault_handler *handler)
{
    __atomic_store_n(&handler->open, 1, __ATOMIC_RELEASE);
    sys_call3(SYS_futex, &handler->open, FUTEX_WAKE_PRIVATE, 1);
}

void fault_stop(struct fault_handler *handler)
{
    __atomic_store_n(&handler->stop, 1, __ATOMIC_RELEASE);
    fault_nudge(handler);
    fault_open(handler);
    pthread_join(handler->thread, NULL);
    sys_close(handler->nudge_fd);
}
