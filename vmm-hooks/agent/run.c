/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The scanner's thread: set up, then turn after turn: what memd says, a slice of the scan, sleep.
 *
 * It starts its passes a second apart while they find much, and slows down to memd's revisit time
 * when they don't. It stays within its share of CPU: every slice is paid from a budget that grows
 * with time.
 */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "agent.h"
#include "descriptors.h"
#include "freeze.h"
#include "procfs.h"

#define FIRST_INTERVAL_MS 1000U
/* A pass in which more than one page in this many became a candidate is followed soon. */
#define BUSY_FRACTION 512U
#define BUDGET_CAP_NS 50000000LL
/* A turn scans for so long before it hears memd again: a quiet step costs less than to ask whether
 * memd has said anything. */
#define SLICE_NS 200000ULL
/* How long one look at the VMM's descriptors and at swap holds (besides: an open by the VMM ends
 * it). */
#define LOOK_NS 100000000ULL

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec time = {0};

    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000ULL + (uint64_t)time.tv_nsec;
}

uint64_t run_cpu_ns(const struct memd_vm *vm)
{
    return clock_ns(CLOCK_THREAD_CPUTIME_ID) + clock_ns(vm->handler.cpu_clock);
}

/* UFFDIO_MOVE's races with swap and with large folios in swap were fixed up to 6.16. */
static bool swap_forbids_freezing(void)
{
    return procfs_kernel_below(6, 16) && procfs_swap_is_on();
}

static bool nothing_forbids_freezing(struct memd_vm *vm)
{
    char reason[PROTOCOL_TEXT_BYTES];

    if (swap_forbids_freezing()) {
        agent_say(vm, "swap is on, and this kernel (below 6.16) may lose pages that are moved and "
                      "swapped at once: swapoff, or a newer kernel");
        return false;
    }
    if (!descriptors_check(vm->unpinned_kvm, reason)) {
        agent_say(vm, reason);
        return false;
    }
    if (!vm->freeze_allowed)
        agent_say(vm, "");
    return true;
}

bool run_may_freeze(void *context, struct ram_block *block, uint32_t index, uint32_t pages)
{
    struct memd_vm *vm = context;
    uint64_t now = clock_now_ns();
    bool free;

    if (__atomic_exchange_n(&vm->ram.direct_io_changed, 0, __ATOMIC_ACQ_REL) ||
        now - vm->looked_at_ns > LOOK_NS) {
        vm->looked_at_ns = now;
        vm->freeze_allowed = nothing_forbids_freezing(vm);
    }
    if (!vm->freeze_allowed)
        return false;
    lock_take(&vm->migration.gate);
    free = gate_may_freeze(&vm->gate, ram_address(block, index), (size_t)pages * PAGE_BYTES);
    lock_release(&vm->migration.gate);
    return free;
}

/* So many VMAs there are at most: those that were counted, what merges have added since, and two
 * for each share that ended (a page broken or discarded in the middle of a run). */
static uint64_t vma_bound(const struct memd_vm *vm)
{
    uint64_t ended = __atomic_load_n(&vm->ram.unmerges, __ATOMIC_RELAXED) - vm->unmerges_counted;

    return (uint64_t)vm->vmas + vm->merge.vmas_added + 2 * ended;
}

static uint32_t shortest_run_at(const struct memd_vm *vm, uint64_t vmas)
{
    uint64_t limit = vm->vma_limit;

    if (vmas + 2 > limit)
        return 0;
    if (vmas < limit / 2)
        return 1;
    if (vmas < limit / 4 * 3)
        return 2;
    return vmas < limit / 8 * 7 ? 4 : 16;
}

uint32_t run_shortest_run(const struct memd_vm *vm)
{
    return shortest_run_at(vm, vma_bound(vm));
}

bool run_may_scatter(const struct memd_vm *vm, uint32_t runs)
{
    return shortest_run_at(vm, vma_bound(vm) + 2 * (uint64_t)runs) == 1;
}

static bool offer(void *context, uint32_t page, uint64_t hash)
{
    struct memd_vm *vm = context;

    return vm->rpc.fd >= 0 && rpc_put(&vm->rpc, RING_OFFER, page, hash);
}

/* Shares that end may go into the VMM's quarter, but only by half: behind that the kernel's silent
 * copies are the lesser evil. */
static void allow_splits(struct memd_vm *vm)
{
    int64_t allowed = (int64_t)vm->vma_limit + vm->vma_limit / 6 - vm->vmas;

    __atomic_store_n(&vm->ram.vmas_spent, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&vm->ram.vmas_allowed, allowed > 0 ? allowed : 1, __ATOMIC_RELAXED);
}

static void count_vmas(struct memd_vm *vm)
{
    /* Before it is counted: a share that ends meanwhile is in both. */
    uint64_t unmerges = __atomic_load_n(&vm->ram.unmerges, __ATOMIC_RELAXED);
    int vmas = procfs_count_vmas();

    if (vmas > 0) {
        vm->vmas = (uint32_t)vmas;
        vm->merge.vmas_added = 0;
        vm->unmerges_counted = unmerges;
        allow_splits(vm);
    }
}

bool run_count_again(struct memd_vm *vm)
{
    if (vma_bound(vm) <= (uint64_t)vm->vmas + vm->vma_limit / 8)
        return false;
    count_vmas(vm);
    return true;
}

/* Counting reads /proc/self/maps, a microsecond a line. The upper bound is enough while it is far
 * from the budget and more is added all the time, or hardly any. */
static bool is_worth_counting(const struct memd_vm *vm, bool busy)
{
    uint64_t bound = vma_bound(vm);

    return bound > vm->vmas &&
           ((!busy && bound - vm->vmas > vm->vmas / 16) || bound > vm->vma_limit / 4);
}

/* ---- setting up ---- */

static void set_up(struct memd_vm *vm)
{
    const char *reason = "";

    vm->scanner_tid = (uint32_t)sys_call0(SYS_gettid);
    vm->freeze_allowed = true;
    vm->unpinned_kvm = descriptors_kvm_is_unpinned();
    vm->interval_ms = FIRST_INTERVAL_MS;
    vm->setup_result = ram_open(&vm->ram, -1, &reason);
    vm->ram_open = vm->setup_result == 0;
    if (vm->ram_open) {
        vm->ram.sources[PLACE_SHARED] = segments_source(&vm->segments);
        fault_open(&vm->handler);
    } else {
        agent_say(vm, reason);
    }
    vm->scanner.ram = &vm->ram;
    vm->scanner.sink = (struct scan_sink){.offer = offer, .may_freeze = run_may_freeze, .self = vm};
    session_open(vm);
    if (!vm->ram_open)
        __atomic_store_n(&vm->state, AGENT_GAVE_UP, __ATOMIC_RELEASE);
    count_vmas(vm);
    vm->budget_at_ns = clock_now_ns();
    vm->cpu_at_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    __atomic_store_n(&vm->ready, 1, __ATOMIC_RELEASE);
    sys_call3(SYS_futex, &vm->ready, FUTEX_WAKE_PRIVATE, 1);
}

/* ---- the VMM used userfaultfd itself; is that over? ---- */

/* Has the VMM registered something since `begun`? */
static bool registers_since(const struct memd_vm *vm, uint32_t begun)
{
    return __atomic_load_n(&vm->registers_begun, __ATOMIC_SEQ_CST) != begun;
}

/* A register of the VMM's that comes in meanwhile wins: it counts itself before it stands us down,
 * so that it is seen here or takes the blocks' locks after us. */
static void try_to_resume(struct memd_vm *vm)
{
    uint32_t ended = __atomic_load_n(&vm->registers_ended, __ATOMIC_SEQ_CST);
    uint32_t begun = __atomic_load_n(&vm->registers_begun, __ATOMIC_SEQ_CST);
    uint32_t expected = AGENT_STANDING_DOWN;
    struct procfs_range range;

    if (begun != ended)
        return;

    for (uint32_t b = 0; b < vm->ram.block_count; b++) {
        struct ram_block *block = &vm->ram.blocks[b];
        if (!block->live)
            continue;
        if (procfs_inspect(block->base, (size_t)block->pages * PAGE_BYTES, &range) < 0 ||
            range.userfaultfd)
            return;
    }
    if (!__atomic_compare_exchange_n(&vm->state, &expected, AGENT_ACTIVE, false, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST))
        return;
    for (uint32_t b = 0; b < vm->ram.block_count; b++) {
        struct ram_block *block = &vm->ram.blocks[b];
        lock_take(&block->lock);
        block->resting = block->given_back || registers_since(vm, begun);
        lock_release(&block->lock);
    }
    expected = AGENT_ACTIVE;
    if (registers_since(vm, begun))
        __atomic_compare_exchange_n(&vm->state, &expected, AGENT_STANDING_DOWN, false,
                                    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    else
        agent_say(vm, "");
}

/* A look costs a walk over all page tables (smaps): 1, 2, 4, then 8 seconds apart. */
static uint64_t next_resume_wait(uint64_t wait_ns)
{
    if (wait_ns == 0)
        return FIRST_INTERVAL_MS * 1000000ULL;
    return wait_ns < 8000000000ULL ? wait_ns * 2 : wait_ns;
}

/* ---- a turn ---- */

/* How long to wait until the next step may be paid for. */
static uint64_t budget_wait_ns(struct memd_vm *vm)
{
    uint64_t now = clock_now_ns();
    uint64_t cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    int64_t budget = (int64_t)vm->budget_ns;

    if (vm->cpu_permille == 0)
        return 0;
    budget += (int64_t)((now - vm->budget_at_ns) * vm->cpu_permille / 1000);
    budget -= (int64_t)(cpu - vm->cpu_at_ns);
    if (budget > BUDGET_CAP_NS)
        budget = BUDGET_CAP_NS;
    vm->budget_ns = (uint64_t)budget;
    vm->budget_at_ns = now;
    vm->cpu_at_ns = cpu;
    return budget >= 0 ? 0 : (uint64_t)(-budget) * 1000 / vm->cpu_permille;
}

static uint64_t total_pages(const struct memd_vm *vm)
{
    uint64_t pages = 0;

    for (uint32_t b = 0; b < vm->ram.block_count; b++)
        pages += vm->ram.blocks[b].live ? vm->ram.blocks[b].pages : 0;
    return pages;
}

static void end_pass(struct memd_vm *vm)
{
    bool busy = vm->scanner.pass_candidates > total_pages(vm) / BUSY_FRACTION;

    vm->in_pass = false;
    if (busy || vm->scanner.passes < 4)
        vm->interval_ms = FIRST_INTERVAL_MS;
    else
        vm->interval_ms *= 2;
    if (vm->interval_ms > vm->revisit_ms)
        vm->interval_ms = vm->revisit_ms ? vm->revisit_ms : 1;
    vm->next_pass_ns = clock_now_ns() + vm->interval_ms * 1000000ULL;
    if (is_worth_counting(vm, busy))
        count_vmas(vm);
    session_drop_again(vm);
    if (vm->scanner.pass_candidates > 0)
        session_put(vm, RING_PASS, 0, vm->scanner.passes);
    session_end_pass(vm);
}

static bool may_scan(const struct memd_vm *vm)
{
    return vm->rpc.fd >= 0 && vm->features & FEATURE_SHARE && vm->ram_open && !vm->paused &&
           !vm->detached && !migration_holds(vm) &&
           __atomic_load_n(&vm->state, __ATOMIC_ACQUIRE) == AGENT_ACTIVE;
}

static enum scan_result scan_slice(struct scanner *scanner, uint64_t start)
{
    enum scan_result result;

    do
        result = scan_step(scanner);
    while (result == SCAN_MORE && clock_now_ns() - start < SLICE_NS);
    return result;
}

/* A slice of the scan, if it is time. Returns how long nothing is to be done. */
static uint64_t scan_turn(struct memd_vm *vm)
{
    uint64_t now = clock_now_ns();
    uint64_t wait;

    if (!vm->in_pass && now < vm->next_pass_ns)
        return vm->next_pass_ns - now;
    if (!may_scan(vm)) {
        if (vm->state == AGENT_STANDING_DOWN)
            try_to_resume(vm);
        else
            vm->resume_wait_ns = 0;
        vm->resume_wait_ns = next_resume_wait(vm->resume_wait_ns);
        vm->next_pass_ns = now + vm->resume_wait_ns;
        return vm->resume_wait_ns;
    }
    vm->resume_wait_ns = 0;
    wait = budget_wait_ns(vm);
    if (wait > 0)
        return wait;
    if (!vm->in_pass) {
        vm->in_pass = true;
        vm->scanner.now_ms = (uint32_t)(now / 1000000);
        vm->scanner.settle_ms = vm->revisit_ms;
        vm->scanner.lazy = vm->interval_ms > FIRST_INTERVAL_MS && vm->interval_ms >= vm->revisit_ms;
        vm->scanner.pass_candidates = 0;
        vm->scanner.pass_written = 0;
    }
    switch (scan_slice(&vm->scanner, now)) {
    case SCAN_PASS_END: end_pass(vm); return 0;
    case SCAN_FULL: rpc_ring(&vm->rpc); return 2000000;
    case SCAN_MORE: break;
    }
    return 0;
}

static void turn(struct memd_vm *vm)
{
    uint32_t done;
    uint64_t wait;

    __atomic_store_n(&vm->in_turn, 1, __ATOMIC_SEQ_CST);
    done = session_turn(vm);
    if (vm->rpc.fd < 0 && !vm->detached && clock_now_ns() >= vm->next_connect_ns)
        session_open(vm);
    wait = scan_turn(vm);
    freeze_empty(&vm->ram);
    /* A pass at rest is short: its end is soon enough for memd to hear of it, at once of all. */
    if (vm->rpc.fd >= 0) {
        if (wait > 0 || done > 0 || !vm->scanner.lazy)
            rpc_ring(&vm->rpc);
    } else if (!vm->detached && wait > 1000000000ULL) {
        wait = 1000000000ULL;
    }
    if (wait > session_patience_ns(vm))
        wait = session_patience_ns(vm);
    __atomic_store_n(&vm->in_turn, 0, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&vm->turns, 1, __ATOMIC_SEQ_CST);
    if (done == 0 && wait > 0)
        session_wait(vm, wait);
}

void *run_scanner(void *context)
{
    struct memd_vm *vm = context;

    set_up(vm);
    while (!__atomic_load_n(&vm->stop, __ATOMIC_ACQUIRE))
        turn(vm);
    session_close(vm);
    return NULL;
}
