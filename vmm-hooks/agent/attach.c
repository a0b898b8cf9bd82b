/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The public interface, and what the VMM's own threads do in the agent: attach, register, discard,
 * take away, detach.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "agent.h"
#include "discard.h"
#include "freeze.h"
#include "procfs.h"
#include "uffd.h"

/* The one agent of this process, for fork and to know a handle by. */
static struct memd_vm *the_vm;
/* 1 from the beginning of an attach to the end of its detach. */
static uint32_t taken;

void agent_say(struct memd_vm *vm, const char *reason)
{
    lock_take(&vm->words);
    if (strncmp(vm->reason, reason, sizeof(vm->reason) - 1) != 0) {
        strncpy(vm->reason, reason, sizeof(vm->reason) - 1);
        __atomic_store_n(&vm->news, 1, __ATOMIC_RELEASE);
    }
    lock_release(&vm->words);
}

/* ---- fork: no page table may be copied in the middle of a freeze ---- */

static void before_fork(void)
{
    if (the_vm)
        ram_lock_all(&the_vm->ram);
}

static void after_fork(void)
{
    if (the_vm)
        ram_unlock_all(&the_vm->ram);
}

/* The child has copies of the mappings, without our registrations and without our threads. */
static void in_child(void)
{
    if (!the_vm)
        return;
    ram_reset_locks(&the_vm->ram);
    lock_reset(&the_vm->words);
    the_vm->forked = 1;
}

/* ---- attach ---- */

/* The first version of the struct ended here. */
#define OPTIONS_FIRST_BYTES (offsetof(struct memd_options, opaque) + sizeof(void *))
/* A struct that says it is larger than this has not been initialized. */
#define OPTIONS_MAX_BYTES 4096U

/* The caller's options as this library knows them. What it doesn't know must not have been set. */
static int take_options(const struct memd_options *given, struct memd_options *ret_options)
{
    const uint8_t *bytes = (const uint8_t *)given;

    if (!given || given->size < OPTIONS_FIRST_BYTES)
        return -EINVAL;
    if (given->size > OPTIONS_MAX_BYTES)
        return -E2BIG;
    for (size_t i = sizeof(*ret_options); i < given->size; i++)
        if (bytes[i])
            return -E2BIG;
    memset(ret_options, 0, sizeof(*ret_options));
    memcpy(ret_options, given,
           given->size < sizeof(*ret_options) ? given->size : sizeof(*ret_options));
    return 0;
}

static bool is_token(const char *token)
{
    return strlen(token) == PROTOCOL_TOKEN_BYTES &&
           strspn(token, "0123456789abcdefABCDEF") == PROTOCOL_TOKEN_BYTES;
}

static int copy_options(struct memd_vm *vm, const struct memd_options *given)
{
    struct memd_options options;
    const char *socket;
    int r = take_options(given, &options);

    if (r < 0)
        return r;
    socket = options.socket ? options.socket : "/run/memd/memd.sock.agent";
    if (strlen(socket) >= sizeof(vm->socket) || (options.token && !is_token(options.token)))
        return -EINVAL;
    memcpy(vm->socket, socket, strlen(socket) + 1);
    strncpy(vm->vmm, options.vmm ? options.vmm : "linked", sizeof(vm->vmm) - 1);
    if (options.token)
        memcpy(vm->token, options.token, PROTOCOL_TOKEN_BYTES);
    return gate_open(&vm->gate, options.ops, options.opaque);
}

static void read_vma_limit(struct memd_vm *vm)
{
    long limit = procfs_number("/proc/sys/vm/max_map_count");

    /* A quarter stays the VMM's. */
    vm->vma_limit = (uint32_t)(limit > 0 ? limit : 65530) / 4 * 3;
}

/* A page that the kernel empties in a child, however that was made. Without it, only what libc
 * tells is known. */
static void map_mark(struct memd_vm *vm)
{
    uint32_t *mark =
        sys_mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (sys_failed(mark))
        return;
    if (sys_madvise(mark, PAGE_BYTES, MADV_WIPEONFORK) < 0) {
        sys_munmap(mark, PAGE_BYTES);
        return;
    }
    *mark = 1;
    vm->mark = mark;
}

static int start_threads(struct memd_vm *vm)
{
    sigset_t all;
    sigset_t old;
    int r = fault_start(&vm->handler, &vm->ram);

    if (r < 0)
        return r;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = -pthread_create(&vm->thread, NULL, run_scanner, vm);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r < 0) {
        fault_stop(&vm->handler);
        return r;
    }
    while (!__atomic_load_n(&vm->ready, __ATOMIC_ACQUIRE))
        sys_call4(SYS_futex, &vm->ready, FUTEX_WAIT_PRIVATE, 0, NULL);
    return 0;
}

static void free_vm(struct memd_vm *vm)
{
    sys_close(vm->stop_fd);
    if (vm->mark)
        sys_munmap(vm->mark, PAGE_BYTES);
    sys_munmap(vm, sizeof(*vm));
    __atomic_store_n(&taken, 0, __ATOMIC_RELEASE);
}

int agent_attach(const struct memd_options *options, struct memd_vm **ret_vm)
{
    static const struct memd_vm *registered_fork;
    struct memd_vm *vm;
    int r;

    if (__atomic_exchange_n(&taken, 1, __ATOMIC_ACQ_REL))
        return -EBUSY;
    vm = sys_mmap(NULL, sizeof(*vm), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (sys_failed(vm)) {
        __atomic_store_n(&taken, 0, __ATOMIC_RELEASE);
        return (int)(intptr_t)vm;
    }
    vm->rpc.fd = -1;
    vm->stop_fd = (int)sys_call2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    r = copy_options(vm, options);
    read_vma_limit(vm);
    map_mark(vm);
    if (r == 0)
        r = start_threads(vm);
    if (r < 0) {
        free_vm(vm);
        return r;
    }
    if (!registered_fork && pthread_atfork(before_fork, after_fork, in_child) == 0)
        registered_fork = vm;
    the_vm = vm;
    *ret_vm = vm;
    return 0;
}

int memd_attach(const struct memd_options *options, struct memd_vm **ret_vm)
{
    struct memd_vm *vm = NULL;
    int r = ret_vm ? agent_attach(options, &vm) : -EINVAL;

    if (!vm)
        return r;
    r = vm->setup_result;
    if (r < 0) {
        memd_detach(vm);
        return r;
    }
    *ret_vm = vm;
    return 0;
}

/* ---- RAM ---- */

/* Is it the handle of this process's agent, in the process that attached? 0 or -errno. */
static int check_handle(const struct memd_vm *vm)
{
    if (!vm || vm != the_vm)
        return -EBADF;
    /* The userfaultfds of a child are its parent's, and work on the parent's memory. */
    return agent_is_child(vm) ? -EAGAIN : 0;
}

static bool is_a_range(const void *addr, size_t bytes)
{
    return addr && (uintptr_t)addr % PAGE_BYTES == 0 && bytes > 0 &&
           bytes <= UINTPTR_MAX - (uintptr_t)addr - PAGE_BYTES;
}

static void leave_alone(struct memd_vm *vm, void *addr, size_t bytes, const char *reason)
{
    lock_take(&vm->words);
    if (vm->left_alone_count < AGENT_MAX_LEFT_ALONE)
        vm->left_alone[vm->left_alone_count++] = (struct left_alone){
            .hva = (uintptr_t)addr, .pages = bytes / PAGE_BYTES, .reason = reason};
    lock_release(&vm->words);
}

static bool covers(const struct ram_block *block, const uint8_t *addr, size_t bytes)
{
    return addr <= block->base && addr + bytes >= ram_address(block, block->pages);
}

static bool overlaps(const struct ram_block *block, const uint8_t *addr, size_t bytes)
{
    return addr < ram_address(block, block->pages) && addr + bytes > block->base;
}

/* Looks without locks: two threads that register the same RAM at once are told apart by ram_add. */
static bool is_registered(const struct memd_vm *vm, const uint8_t *addr, size_t bytes)
{
    uint32_t count = __atomic_load_n(&vm->ram.block_count, __ATOMIC_ACQUIRE);

    for (uint32_t i = 0; i < count; i++)
        if (__atomic_load_n(&vm->ram.blocks[i].live, __ATOMIC_ACQUIRE) &&
            overlaps(&vm->ram.blocks[i], addr, bytes))
            return true;
    return false;
}

int memd_ram_add(struct memd_vm *vm, void *addr, size_t bytes, unsigned flags)
{
    const char *reason = "memd has no room for another block of RAM";
    uint32_t attributes = 0;
    struct ram_block *block;
    int r = check_handle(vm);

    if (r < 0)
        return r;
    if (!is_a_range(addr, bytes) || bytes % PAGE_BYTES ||
        flags & ~(MEMD_RAM_FRESH | MEMD_RAM_VMM_MOVES))
        return -EINVAL;
    if (is_registered(vm, addr, bytes))
        return -EEXIST;
    if (__atomic_load_n(&vm->state, __ATOMIC_ACQUIRE) != AGENT_ACTIVE)
        r = -EAGAIN, reason = "the agent has stood down";
    else
        r = ram_inspect(addr, bytes, &attributes, &reason);
    if (r == 0 && flags & MEMD_RAM_VMM_MOVES)
        attributes |= RAM_VMM_MOVES;
    if (r == 0)
        r = ram_add(&vm->ram, addr, bytes, attributes, flags & MEMD_RAM_FRESH, &block);
    if (r == -EEXIST)
        return r;
    if (r < 0)
        leave_alone(vm, addr, bytes, r == -ENOMEM ? "no memory for its tables" : reason);
    return r;
}

/* Nobody needs the fault handler in this block. */
static bool is_at_rest(const struct ram_block *block)
{
    for (uint32_t c = 0; c < block->chunk_count; c++)
        if (block->chunks[c].state == CHUNK_ARMED)
            return false;
    return block->counts[PLACE_SHARED] == 0;
}

/* Nothing of the block is in the store's mappings or registered: it can be forgotten. */
static bool is_private(const struct ram_block *block)
{
    return is_at_rest(block) && block->captives == 0;
}

/* Caller holds both locks. The block is forgotten unless something of it is still in the store. */
static void let_go(struct memd_vm *vm, struct ram_block *block)
{
    block->resting = block->given_back = true;
    for (uint32_t c = 0; c < block->chunk_count; c++)
        discard_stand_down(&vm->ram, block, c);
    if (is_private(block))
        ram_forget(&vm->ram, block);
}

/* The part of [addr, addr + bytes) that lies in the block has another mapping soon. */
static void forget_part(struct memd_vm *vm, struct ram_block *block, const uint8_t *addr,
                        size_t bytes)
{
    const uint8_t *block_end = ram_address(block, block->pages);
    const uint8_t *from = addr > block->base ? addr : block->base;
    const uint8_t *to = addr + bytes < block_end ? addr + bytes : block_end;

    discard_forget(&vm->ram, block, (uint32_t)((from - block->base) / (long)PAGE_BYTES),
                   (uint32_t)((to - from + (long)PAGE_BYTES - 1) / (long)PAGE_BYTES));
}

static bool ends_whole(const struct agent_leaving *leaving, const struct ram_block *block)
{
    return leaving->whole && covers(block, leaving->ended, leaving->ended_bytes);
}

static bool touches(const struct agent_leaving *leaving, const struct ram_block *block)
{
    return overlaps(block, leaving->changed, leaving->changed_bytes) ||
           overlaps(block, leaving->ended, leaving->ended_bytes);
}

void agent_leave_begin(struct memd_vm *vm, struct agent_leaving *leaving)
{
    leaving->count = 0;
    /* All of the reading locks before the first block lock: whoever holds the one may be waiting
     * for the fault handler, and that for the other. */
    for (uint32_t i = 0; i < vm->ram.block_count; i++) {
        struct ram_block *block = &vm->ram.blocks[i];
        if (!block->live || !touches(leaving, block))
            continue;
        lock_take(&block->reading);
        leaving->blocks[leaving->count++] = block;
    }
    for (uint32_t i = 0; i < leaving->count; i++) {
        struct ram_block *block = leaving->blocks[i];
        lock_take(&block->lock);
        if (block->live && !ends_whole(leaving, block))
            let_go(vm, block);
    }
}

/* What the block has in `ended` is not in the store's mappings any more. */
static void forget_ended(struct memd_vm *vm, struct ram_block *block,
                         const struct agent_leaving *leaving)
{
    if (covers(block, leaving->ended, leaving->ended_bytes))
        ram_forget(&vm->ram, block);
    else if (overlaps(block, leaving->ended, leaving->ended_bytes))
        forget_part(vm, block, leaving->ended, leaving->ended_bytes);
}

void agent_leave_end(struct memd_vm *vm, struct agent_leaving *leaving, bool done)
{
    while (leaving->count > 0) {
        struct ram_block *block = leaving->blocks[--leaving->count];
        if (done && block->live)
            forget_ended(vm, block, leaving);
        lock_release(&block->lock);
        lock_release(&block->reading);
    }
}

bool agent_leave_is_partial(const struct agent_leaving *leaving)
{
    for (uint32_t i = 0; i < leaving->count; i++)
        if (leaving->blocks[i]->live &&
            overlaps(leaving->blocks[i], leaving->changed, leaving->changed_bytes))
            return true;
    return false;
}

int memd_ram_remove(struct memd_vm *vm, void *addr, size_t bytes)
{
    struct ram_block *block;
    struct agent_leaving leaving = {.changed = addr, .changed_bytes = bytes};
    int r = check_handle(vm);
    bool remote;
    bool gone;

    if (r < 0)
        return r;
    block = ram_find(&vm->ram, addr);
    if (!block || block->base != addr || (size_t)block->pages * PAGE_BYTES != bytes)
        return -ENOENT;
    lock_take(&block->lock);
    remote = block->live && block->counts[PLACE_REMOTE] > 0;
    lock_release(&block->lock);
    if (remote)
        return -EBUSY;
    agent_leave_begin(vm, &leaving);
    /* With its captives: what is mapped here next is not ours to discard. */
    if (block->live && is_at_rest(block))
        ram_forget(&vm->ram, block);
    gone = !block->live;
    agent_leave_end(vm, &leaving, true);
    return gone ? 0 : -ENOMEM;
}

/* The part of [addr, addr + bytes) that lies in the block, in whole pages. */
static int discard_in_block(struct memd_vm *vm, struct ram_block *block, uint8_t *addr,
                            size_t bytes, int advice)
{
    uint8_t *end = addr + bytes;
    uint8_t *block_end = ram_address(block, block->pages);
    uint8_t *from = addr > block->base ? addr : block->base;
    uint8_t *to = end < block_end ? end : block_end;
    bool live;
    int r = 0;

    lock_take(&block->lock);
    live = block->live;
    if (live)
        r = discard_pages(&vm->ram, block, (uint32_t)((from - block->base) / (long)PAGE_BYTES),
                          (uint32_t)((to - from) / (long)PAGE_BYTES), advice);
    lock_release(&block->lock);
    return live ? r : sys_madvise(from, (size_t)(to - from), advice);
}

int agent_discard(struct memd_vm *vm, void *addr, size_t bytes, int advice)
{
    uint8_t *at = addr;
    uint8_t *end;
    int result = 0;

    bytes = (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    if ((uintptr_t)addr % PAGE_BYTES)
        return -EINVAL;
    end = at + bytes;
    while (at < end) {
        struct ram_block *block = ram_find(&vm->ram, at);
        uint8_t *stop = end;
        int r;

        if (block && ram_address(block, block->pages) < end)
            stop = ram_address(block, block->pages);
        for (uint32_t i = 0; !block && i < vm->ram.block_count; i++)
            if (vm->ram.blocks[i].live && vm->ram.blocks[i].base > at &&
                vm->ram.blocks[i].base < stop)
                stop = vm->ram.blocks[i].base;
        r = block ? discard_in_block(vm, block, at, (size_t)(stop - at), advice)
                  : sys_madvise(at, (size_t)(stop - at), advice);
        if (r < 0)
            result = r;
        at = stop;
    }
    return result;
}

int agent_discard_in_child(struct memd_vm *vm, void *addr, size_t bytes, int advice)
{
    uint8_t *end = (uint8_t *)addr + bytes;
    int result = 0;

    for (uint8_t *at = addr; at < end; at += PAGE_BYTES) {
        struct ram_block *block = ram_find(&vm->ram, at);
        uint32_t index = block ? (uint32_t)((at - block->base) / (long)PAGE_BYTES) : 0;
        int r = 0;
        /* RAM that the child did not get is not there, but what it has mapped since may be. */
        if (block && !(block->attributes & RAM_DONTFORK) &&
            (ram_place(block, index) == PLACE_SHARED || ram_captive(block, index))) {
            void *fresh = sys_mmap(at, PAGE_BYTES, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            r = sys_failed(fresh) ? (int)(intptr_t)fresh : 0;
        } else {
            r = sys_madvise(at, PAGE_BYTES, advice);
        }
        if (r < 0)
            result = r;
    }
    return result;
}

int memd_ram_discard(struct memd_vm *vm, void *addr, size_t bytes)
{
    int r = check_handle(vm);

    if (r == -EBADF)
        return r;
    if (!is_a_range(addr, bytes))
        return -EINVAL;
    return r == 0 ? agent_discard(vm, addr, bytes, MADV_DONTNEED)
                  : agent_discard_in_child(vm, addr, bytes, MADV_DONTNEED);
}

int memd_ram_restore(struct memd_vm *vm, void *addr, size_t bytes, int fd, uint64_t offset)
{
    struct ram_block *block;
    int r = check_handle(vm);

    if (r < 0)
        return r;
    block = ram_find(&vm->ram, addr);
    if (!block || block->base != addr || (size_t)block->pages * PAGE_BYTES != bytes)
        return -ENOENT;
    return restore_begin(&vm->restore, &vm->ram, block, fd, offset);
}

int memd_ram_restore_wait(struct memd_vm *vm)
{
    int r = check_handle(vm);

    return r < 0 ? r : restore_wait(&vm->restore);
}

/* ---- standing down, detaching ---- */

uint32_t agent_stand_down(struct memd_vm *vm, enum agent_state state, const char *reason)
{
    uint32_t left = 0;

    if (__atomic_load_n(&vm->state, __ATOMIC_ACQUIRE) != AGENT_GAVE_UP) {
        __atomic_store_n(&vm->state, state, __ATOMIC_RELEASE);
        agent_say(vm, reason);
    }
    for (uint32_t i = 0; i < vm->ram.block_count; i++) {
        struct ram_block *block = &vm->ram.blocks[i];
        lock_take(&block->lock);
        block->resting = true;
        lock_release(&block->lock);
        for (uint32_t c = 0; c < block->chunk_count; c++) {
            lock_take(&block->lock);
            if (block->live)
                left += discard_stand_down(&vm->ram, block, c);
            lock_release(&block->lock);
        }
    }
    return left;
}

void agent_give_up(struct memd_vm *vm, const char *reason)
{
    agent_stand_down(vm, AGENT_GAVE_UP, reason);
    agent_say(vm, reason);
    for (uint32_t i = 0; i < vm->ram.block_count; i++) {
        struct ram_block *block = &vm->ram.blocks[i];
        lock_take(&block->reading);
        lock_take(&block->lock);
        if (block->live && is_private(block))
            ram_forget(&vm->ram, block);
        else if (block->live)
            /* Stays for its discards. Nobody would fill the holes of its shadow. */
            uffd_unregister(vm->ram.shadow_fd, block->shadow,
                            (size_t)(block->pages + 1) * PAGE_BYTES);
        lock_release(&block->lock);
        lock_release(&block->reading);
    }
    if (vm->ram_open)
        freeze_disarm(&vm->ram);
}

static void fill_status(const struct memd_vm *vm, struct memd_status *status)
{
    *status = (struct memd_status){
        .merges = vm->merge.merges,
        .unmerges = vm->ram.unmerges,
        .zero_merges = vm->scanner.zero_merges,
        .connected = vm->rpc.fd >= 0,
        .passes = vm->scanner.passes,
    };
    for (uint32_t i = 0; i < vm->ram.block_count; i++) {
        const struct ram_block *block = &vm->ram.blocks[i];
        if (!block->live)
            continue;
        status->pages += block->pages;
        status->shared += block->counts[PLACE_SHARED];
        status->zero += block->counts[PLACE_ZERO];
        status->captives += block->captives;
    }
}

/* The first version of the struct ended here. */
#define STATUS_FIRST_BYTES (offsetof(struct memd_status, passes) + sizeof(uint32_t))

int memd_get_status(struct memd_vm *vm, struct memd_status *ret_status)
{
    struct memd_status status;
    size_t known = sizeof(status);
    int r = check_handle(vm);

    if (r < 0)
        return r;
    if (!ret_status || ret_status->size < STATUS_FIRST_BYTES ||
        ret_status->size > OPTIONS_MAX_BYTES)
        return -EINVAL;
    fill_status(vm, &status);
    if (ret_status->size < known)
        known = ret_status->size;
    status.size = known;
    memset((uint8_t *)ret_status + known, 0, ret_status->size - known);
    memcpy(ret_status, &status, known);
    return 0;
}

int memd_detach(struct memd_vm *vm)
{
    uint64_t one = 1;
    int r = check_handle(vm);

    if (r < 0)
        return r;
    if (pthread_equal(vm->thread, pthread_self()) || migration_is_caller(vm))
        return -EDEADLK;
    if (agent_stand_down(vm, AGENT_GAVE_UP, "the VMM detached") > 0)
        return -ENOMEM;
    __atomic_store_n(&vm->stop, 1, __ATOMIC_RELEASE);
    sys_call3(SYS_write, vm->stop_fd, &one, sizeof(one));
    pthread_join(vm->thread, NULL);
    migration_close(vm);
    fault_stop(&vm->handler);
    restore_close(&vm->restore);
    the_vm = NULL;
    for (uint32_t i = 0; i < vm->ram.block_count; i++)
        if (vm->ram.blocks[i].live)
            ram_forget(&vm->ram, &vm->ram.blocks[i]);
    if (vm->ram_open)
        ram_close(&vm->ram);
    free_vm(vm);
    return 0;
}
