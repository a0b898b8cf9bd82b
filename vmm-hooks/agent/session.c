/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One connection to memd: greeting, messages, the ring, and what is told of our own accord.
 *
 * What an agent has (segments, shares) outlives the connection. After memd was restarted it offers
 * them again; a memd that does not know them (another session) makes it un-share them.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>

#include "agent.h"
#include "discard.h"
#include "freeze.h"
#include "procfs.h"

#define CONNECT_RETRY_NS 1000000000ULL
/* memd answers a full ring within milliseconds; a memd that does not for this long is stuck. */
#define PUT_PATIENCE_NS 5000000000ULL
/* memd reads what is in the ring in much less; a wait shorter than this costs more than it gives.
 * On a busy host it does not: each wait is twice as long as the last, up to 16 times this. */
#define MOMENT_NS      200000L
#define MOMENT_DOUBLES 4U
/* A second for a page buffer. */
#define BUFFER_TRIES 320U
/* After so many passes memd is told of what it knows already, but for the time that was used. */
#define TOLD_PASSES 8U
/* How long the beginning of a huge page waits for the rest of it: memd sends what belongs together
 * within milliseconds. */
#define REST_NS 5000000ULL

static uint64_t told_bit(uint32_t index)
{
    return 1ULL << (index % 64);
}

static void set_told(struct ram_block *block, uint32_t index, bool told)
{
    if (told)
        block->told[index / 64] |= told_bit(index);
    else
        block->told[index / 64] &= ~told_bit(index);
}

/* A moment in which memd can read from the ring. Not woken by what memd says meanwhile: that stays
 * unread until the ring's turn is over, and would wake at once each time. `waits` is how many such
 * moments have just gone by in vain. */
static void wait_for_memd(struct memd_vm *vm, uint32_t waits)
{
    struct pollfd polled = {.fd = vm->stop_fd, .events = POLLIN};
    struct timespec moment = {.tv_nsec = MOMENT_NS
                                         << (waits < MOMENT_DOUBLES ? waits : MOMENT_DOUBLES)};

    sys_call5(SYS_ppoll, &polled, 1, &moment, NULL, 8);
}

bool session_put(struct memd_vm *vm, uint32_t op, uint32_t page, uint64_t arg)
{
    uint64_t give_up = 0;
    uint32_t waits = 0;

    while (vm->rpc.fd >= 0 && !rpc_put(&vm->rpc, op, page, arg)) {
        uint64_t now = clock_now_ns();
        if (!give_up)
            give_up = now + PUT_PATIENCE_NS;
        if (now >= give_up || __atomic_load_n(&vm->stop, __ATOMIC_ACQUIRE)) {
            session_close(vm);
            break;
        }
        rpc_ring(&vm->rpc);
        wait_for_memd(vm, waits++);
    }
    return vm->rpc.fd >= 0;
}

void session_wait(struct memd_vm *vm, uint64_t ns)
{
    struct pollfd polled[3] = {{.fd = vm->stop_fd, .events = POLLIN},
                               {.fd = vm->rpc.fd, .events = POLLIN},
                               {.fd = migration_wakes(vm), .events = POLLIN}};
    uint64_t count;
    struct timespec timeout = {.tv_sec = (time_t)(ns / 1000000000ULL),
                               .tv_nsec = (long)(ns % 1000000000ULL)};

    sys_call5(SYS_ppoll, polled, 3, &timeout, NULL, 8);
    if (polled[2].revents & POLLIN)
        sys_read(polled[2].fd, &count, sizeof(count));
}

/* ---- opening ---- */

/* A message that memd must get: waits for room in the socket as long as memd may need, and gives
 * the connection up before it loses one (the next connection says everything anew). */
static void send_surely(struct memd_vm *vm, const void *message, uint32_t bytes, int fd)
{
    uint64_t give_up = clock_now_ns() + PUT_PATIENCE_NS;
    int r = -EPIPE;

    while (vm->rpc.fd >= 0) {
        struct pollfd polled = {.fd = vm->rpc.fd, .events = POLLOUT};
        struct timespec moment = {.tv_nsec = 2000000};
        r = rpc_send(&vm->rpc, message, bytes, fd);
        /* ETOOMANYREFS: memd has not yet taken the descriptors that were sent before. */
        if (r != -EAGAIN && r != -ETOOMANYREFS && r != -EINTR && r != -ENOBUFS)
            break;
        if (clock_now_ns() >= give_up || __atomic_load_n(&vm->stop, __ATOMIC_ACQUIRE))
            break;
        sys_call5(SYS_ppoll, r == -EAGAIN ? &polled : NULL, r == -EAGAIN, &moment, NULL, 8);
    }
    if (r < 0 && vm->rpc.fd >= 0)
        session_close(vm);
}

static void send_ram(struct memd_vm *vm, uint32_t first_page, uint64_t pages, uint64_t hva,
                     const char *reason)
{
    struct message_ram message = {
        .header = {MESSAGE_RAM, sizeof(message)},
        .first_page = first_page,
        .pages = (uint32_t)pages,
        .hva = hva,
        .managed = !reason,
    };

    if (reason)
        strncpy(message.reason, reason, sizeof(message.reason) - 1);
    send_surely(vm, &message, sizeof(message), -1);
}

static void send_gone(struct memd_vm *vm, uint32_t number)
{
    const struct ram_block *block = &vm->ram.blocks[number];
    struct message_ram_gone message = {
        .header = {MESSAGE_RAM_GONE, sizeof(message)},
        .first_page = block->first_page,
        .pages = block->pages,
    };

    vm->gone |= 1ULL << number;
    send_surely(vm, &message, sizeof(message), -1);
}

/* One that has left before memd heard of it is announced too, and its leaving: page numbers have
 * no gaps. */
static void announce_blocks(struct memd_vm *vm)
{
    uint32_t count = __atomic_load_n(&vm->ram.block_count, __ATOMIC_ACQUIRE);

    for (; vm->announced < count; vm->announced++) {
        const struct ram_block *block = &vm->ram.blocks[vm->announced];
        bool live = __atomic_load_n(&block->live, __ATOMIC_ACQUIRE);
        send_ram(vm, block->first_page, block->pages, (uintptr_t)block->base, NULL);
        if (!live)
            send_gone(vm, vm->announced);
    }
    for (; vm->alone_told < __atomic_load_n(&vm->left_alone_count, __ATOMIC_ACQUIRE);
         vm->alone_told++) {
        const struct left_alone *alone = &vm->left_alone[vm->alone_told];
        send_ram(vm, 0, alone->pages, alone->hva, alone->reason);
    }
}

static void announce_gone(struct memd_vm *vm)
{
    for (uint32_t i = 0; i < vm->announced; i++)
        if (!vm->ram.blocks[i].live && !(vm->gone >> i & 1))
            send_gone(vm, i);
}

/* Everything in the store becomes private again; the segments go. */
static void lose_store(struct memd_vm *vm)
{
    for (uint32_t b = 0; b < vm->ram.block_count; b++) {
        struct ram_block *block = &vm->ram.blocks[b];
        /* A chunk at a time: who writes to a shared page meanwhile waits for the lock. */
        for (uint32_t c = 0; c < block->chunk_count; c++) {
            lock_take(&block->lock);
            if (block->live)
                discard_shares(&vm->ram, block, c);
            lock_release(&block->lock);
        }
        lock_take(&block->lock);
        if (block->live)
            memset(block->told, 0, ((size_t)block->pages + 63) / 64 * 8);
        lock_release(&block->lock);
    }
    for (uint32_t s = 0; s < SEGMENTS_HELD_MAX; s++)
        if (vm->segments.table[s].view)
            segments_remove(&vm->segments, vm->segments.table[s].id);
}

static void offer_held_pages(struct memd_vm *vm, struct ram_block *block)
{
    for (uint32_t i = 0; block->live && i < block->pages && vm->rpc.fd >= 0; i++) {
        bool shared;
        uint32_t slot;
        lock_take(&block->lock);
        shared = block->live && ram_place(block, i) == PLACE_SHARED;
        slot = shared ? block->slots[i] : SLOT_NONE;
        if (block->live)
            set_told(block, i, shared);
        lock_release(&block->lock);
        if (shared)
            session_put(vm, RING_HAVE, block->first_page + i, slot);
    }
}

static void offer_held(struct memd_vm *vm)
{
    struct message_plain end = {.header = {MESSAGE_HELD_END, sizeof(end)}};

    for (uint32_t s = 0; s < SEGMENTS_HELD_MAX; s++) {
        struct held_segment *held = &vm->segments.table[s];
        struct message_segment message = {
            .header = {MESSAGE_HELD, sizeof(message)}, .segment = held->id, .pages = held->pages};
        held->to_be_dropped = false; /* memd asks again, if it still wants that */
        if (held->view)
            send_surely(vm, &message, sizeof(message), held->fd);
    }
    for (uint32_t b = 0; b < vm->ram.block_count; b++)
        if (vm->ram.blocks[b].live)
            offer_held_pages(vm, &vm->ram.blocks[b]);
    if (vm->rpc.fd >= 0)
        rpc_ring(&vm->rpc);
    send_surely(vm, &end, sizeof(end), -1);
}

static void fill_hello(struct memd_vm *vm, struct message_hello *hello)
{
    bool can_share =
        vm->setup_result == 0 || vm->setup_result == -EPERM || vm->setup_result == -EACCES;

    *hello = (struct message_hello){
        .header = {MESSAGE_HELLO, sizeof(*hello)},
        .magic = PROTOCOL_MAGIC,
        .version = PROTOCOL_VERSION,
        .features = can_share ? FEATURE_SHARE | FEATURE_MOVE : 0,
        .scanner_tid = vm->scanner_tid,
        .handler_tid = vm->handler.tid,
        .page_bytes = PAGE_BYTES,
        .held = vm->held,
    };
    memcpy(hello->token, vm->token, sizeof(hello->token));
    memcpy(hello->vmm, vm->vmm, sizeof(hello->vmm));
    if (!can_share)
        memcpy(hello->reason, vm->reason, sizeof(hello->reason));
}

/* Where userfaultfd is withheld from this process, memd's descriptor of /dev/userfaultfd helps. */
static void try_descriptor(struct memd_vm *vm, int dev)
{
    const char *reason = "";

    if (!vm->ram_open && (vm->setup_result == -EPERM || vm->setup_result == -EACCES)) {
        vm->setup_result = dev >= 0 ? ram_open(&vm->ram, dev, &reason) : vm->setup_result;
        if (vm->setup_result == 0) {
            vm->ram_open = true;
            vm->ram.sources[PLACE_SHARED] = segments_source(&vm->segments);
            fault_open(&vm->handler);
        } else {
            __atomic_store_n(&vm->state, AGENT_GAVE_UP, __ATOMIC_RELEASE);
            agent_say(vm, *reason ? reason : "userfaultfd is withheld from this process");
        }
    }
    if (dev >= 0)
        sys_close(dev);
}

int session_open(struct memd_vm *vm)
{
    struct message_hello hello;
    struct message_welcome welcome;
    char words[PROTOCOL_TEXT_BYTES] = "";
    int dev = -1;
    int r;

    vm->next_connect_ns = clock_now_ns() + CONNECT_RETRY_NS;
    fill_hello(vm, &hello);
    r = rpc_greet(&vm->rpc, vm->socket, &hello, &welcome, &dev, words);
    if (r < 0) {
        agent_say(vm, r == -EACCES ? words : "memd is not reachable: nothing new is shared");
        return r;
    }
    agent_say(vm, "");
    try_descriptor(vm, dev);
    vm->features = welcome.features;
    vm->revisit_ms = welcome.revisit_ms;
    vm->cpu_permille = welcome.cpu_permille;
    vm->scanner.secret = welcome.secret;
    vm->announced = 0;
    vm->alone_told = 0;
    vm->urgent_told = 0;
    vm->gone = 0;
    announce_blocks(vm);
    if (vm->held && welcome.session != vm->session)
        lose_store(vm);
    if (vm->held)
        offer_held(vm);
    vm->session = welcome.session;
    vm->held = true;
    scan_forget(&vm->scanner);
    vm->in_pass = false;
    vm->next_pass_ns = 0;
    session_send_stats(vm);
    return vm->rpc.fd >= 0 ? 0 : -EPIPE;
}

void session_close(struct memd_vm *vm)
{
    rpc_close(&vm->rpc);
    vm->sink_full = false;
    vm->merge_count = 0;
}

/* ---- messages ---- */

static void send_plain(struct memd_vm *vm, uint32_t type)
{
    struct message_plain message = {.header = {type, sizeof(message)}};

    send_surely(vm, &message, sizeof(message), -1);
}

static void take_segment(struct memd_vm *vm, const struct message_segment *message, int fd)
{
    int r = fd < 0 ? -EBADF : segments_add(&vm->segments, message->segment, message->pages, fd);

    if (r < 0 && fd >= 0)
        sys_close(fd);
    if (r == -EPERM)
        agent_say(vm, "memd offered a segment that is not sealed: refused");
    else if (r < 0 && r != -EEXIST)
        agent_say(vm, "a segment of the store can't be mapped here");
}

/* Returns how many pages still share with it. */
static uint32_t leave_segment(struct memd_vm *vm, uint32_t segment)
{
    uint32_t left = 0;

    for (uint32_t b = 0; b < vm->ram.block_count; b++) {
        struct ram_block *block = &vm->ram.blocks[b];
        for (uint32_t c = 0; c < block->chunk_count; c++) {
            lock_take(&block->lock);
            if (block->live)
                left += discard_segment(&vm->ram, block, c, segment);
            lock_release(&block->lock);
        }
    }
    return left;
}

/* What can't be dropped now is tried again after each pass: memd waits for the answer. */
static void drop_segment(struct memd_vm *vm, uint32_t segment, uint32_t pages)
{
    struct message_segment done = {
        .header = {MESSAGE_DROPPED, sizeof(done)}, .segment = segment, .pages = pages};
    struct held_segment *held = segments_find(&vm->segments, segment);

    if (leave_segment(vm, segment) > 0) {
        if (held)
            held->to_be_dropped = true;
        agent_say(vm, "no memory to make pages private: a segment of the store is kept");
        return;
    }
    segments_remove(&vm->segments, segment);
    session_report(vm);
    send_surely(vm, &done, sizeof(done), -1);
}

void session_drop_again(struct memd_vm *vm)
{
    for (uint32_t s = 0; s < SEGMENTS_HELD_MAX && vm->rpc.fd >= 0; s++) {
        struct held_segment *held = &vm->segments.table[s];
        if (held->view && held->to_be_dropped)
            drop_segment(vm, held->id, held->pages);
    }
}

static void detach(struct memd_vm *vm, const struct message_words *message)
{
    if (message->rejoin) {
        lose_store(vm);
        vm->held = false;
    } else {
        agent_stand_down(vm, AGENT_GAVE_UP, message->text[0] ? message->text : "detached");
        vm->detached = true;
        lose_store(vm);
    }
    session_send_stats(vm);
    send_plain(vm, MESSAGE_DETACHED);
    session_close(vm);
    vm->next_connect_ns = 0;
}

static void tune(struct memd_vm *vm, const struct message_tune *message)
{
    vm->revisit_ms = message->revisit_ms;
    vm->cpu_permille = message->cpu_permille;
    vm->paused = message->flags & TUNE_PAUSE;
    if (message->flags & TUNE_REPORT)
        session_send_stats(vm);
}

static bool big_enough(const union rpc_message *message, size_t bytes)
{
    return message->header.bytes >= bytes;
}

static void take_message(struct memd_vm *vm, union rpc_message *message, int fd)
{
    bool used = false;

    message->bytes[sizeof(message->bytes) - 1] = 0;
    switch (message->header.type) {
    case MESSAGE_SEGMENT:
        used = big_enough(message, sizeof(message->segment));
        if (used)
            take_segment(vm, &message->segment, fd);
        break;
    case MESSAGE_DROP:
        if (big_enough(message, sizeof(message->segment)))
            drop_segment(vm, message->segment.segment, message->segment.pages);
        break;
    case MESSAGE_TUNE:
        if (big_enough(message, sizeof(message->tune)))
            tune(vm, &message->tune);
        break;
    case MESSAGE_DETACH:
        if (big_enough(message, sizeof(message->words))) {
            message->words.text[sizeof(message->words.text) - 1] = 0;
            detach(vm, &message->words);
        }
        break;
    case MESSAGE_MOVER:
        used = big_enough(message, sizeof(message->mover)) && fd >= 0 && vm->ram_open;
        if (used)
            migration_take_mover(vm, message->mover.role, fd);
        break;
    default: break; /* DOORBELL; and what a newer memd may say */
    }
    if (!used && fd >= 0)
        sys_close(fd);
}

static uint32_t take_messages(struct memd_vm *vm)
{
    union rpc_message message;
    uint32_t count = 0;
    int fd = -1;
    int r = 0;

    while (vm->rpc.fd >= 0 && (r = rpc_receive(&vm->rpc, &message, &fd)) > 0) {
        take_message(vm, &message, fd);
        count++;
    }
    if (r < 0 && vm->rpc.fd >= 0) {
        session_close(vm);
        agent_say(vm, "memd is not reachable: nothing new is shared");
    }
    return count;
}

/* ---- the ring ---- */

/* The content of a page, if it is still what was offered. */
static void answer_want(struct memd_vm *vm, const struct ring_entry *entry)
{
    struct ram_block *block = ram_find_page(&vm->ram, entry->page);
    uint32_t index = block ? entry->page - block->first_page : 0;
    uint32_t buffer = 0;
    uint8_t *to = NULL;
    bool good = false;

    for (uint32_t tries = 0; block && tries < BUFFER_TRIES && vm->rpc.fd >= 0; tries++) {
        to = rpc_room(&vm->rpc, 2) ? rpc_page_buffer(&vm->rpc, &buffer) : NULL;
        if (to)
            break;
        rpc_ring(&vm->rpc);
        wait_for_memd(vm, tries);
    }
    if (to) {
        lock_take(&block->reading);
        if (block->live && !block->resting && ram_place(block, index) == PLACE_PRIVATE) {
            memcpy(to, ram_address(block, index), PAGE_BYTES);
            good = hash_tag(hash_page(&vm->scanner.secret, to)) == hash_tag(entry->arg);
        }
        lock_release(&block->reading);
    }
    session_put(vm, good ? RING_PAGE : RING_STALE, entry->page, good ? buffer : 0);
}

/* memd forgets a page that was not merged. It is offered again after some quiet passes: soon when
 * it was in use, late when what stood in the way is not its own. */
static void offer_again(struct ram_block *block, uint32_t index, uint8_t outcome)
{
    lock_take(&block->lock);
    if (block->live && ram_place(block, index) == PLACE_PRIVATE) {
        ram_set_young(block, index, true);
        if (outcome != NOT_MERGED_MISMATCH && outcome != NOT_MERGED_BUSY)
            block->table[index] |= TABLE_WAIT_MASK;
    }
    lock_release(&block->lock);
}

static void report_outcome(struct memd_vm *vm, struct ram_block *block, uint32_t page,
                           uint32_t slot, uint8_t outcome)
{
    if (outcome == 0) {
        if (!session_put(vm, RING_MERGED, page, slot))
            return;
        lock_take(&block->lock);
        if (block->live)
            set_told(block, page - block->first_page, true);
        lock_release(&block->lock);
    } else {
        session_put(vm, RING_NOT_MERGED, page, slot | (uint64_t)outcome << 32);
        offer_again(block, page - block->first_page, outcome);
    }
}

/* Is a run of so many pages not worth the VMAs that it takes? */
static bool is_too_short(struct memd_vm *vm, uint32_t pages)
{
    uint32_t shortest = run_shortest_run(vm);

    if ((shortest == 0 || pages < shortest) && run_count_again(vm))
        shortest = run_shortest_run(vm);
    return shortest == 0 || pages < shortest;
}

/* Pages that follow each other, in one block. */
static void merge_run(struct memd_vm *vm, const struct ring_entry *entries, uint32_t pages)
{
    uint32_t page = entries[0].page;
    struct ram_block *block = ram_find_page(&vm->ram, page);
    uint8_t outcomes[AGENT_MAX_MERGES];
    uint32_t slots[AGENT_MAX_MERGES];
    uint32_t index;

    for (uint32_t i = 0; i < pages; i++)
        slots[i] = (uint32_t)entries[i].arg;
    if (!block || page - block->first_page + pages > block->pages) {
        for (uint32_t i = 0; i < pages; i++)
            session_put(vm, RING_NOT_MERGED, page + i, slots[i] | (uint64_t)NOT_MERGED_GONE << 32);
        return;
    }
    index = page - block->first_page;
    if (is_too_short(vm, pages)) {
        memset(outcomes, NOT_MERGED_BUDGET, pages);
        agent_say(vm, "the VMA budget is reached: raise vm.max_map_count to share more");
    } else if (migration_holds(vm) || !run_may_freeze(vm, block, index, pages)) {
        memset(outcomes, NOT_MERGED_REFUSED, pages);
    } else {
        merge_pages(&vm->ram, &vm->segments, block, index, slots, pages, outcomes, &vm->merge);
    }
    for (uint32_t i = 0; i < pages; i++)
        report_outcome(vm, block, page + i, slots[i], outcomes[i]);
}

static bool follows(const struct ring_entry *entry)
{
    return merge_slot_follows((uint32_t)entry[-1].arg, (uint32_t)entry->arg);
}

/* Pages that follow each other are merged together; where VMAs are short, or would be before the
 * last of them, only those in slots that follow each other as well. */
static void merge_entries(struct memd_vm *vm, const struct ring_entry *entries, uint32_t count)
{
    for (uint32_t i = 0, run; i < count; i += run) {
        uint32_t mappings = 1;
        run = 1;
        while (i + run < count && entries[i + run].page == entries[i].page + run &&
               (follows(&entries[i + run]) || run_may_scatter(vm, mappings)) &&
               ram_find_page(&vm->ram, entries[i].page) ==
                   ram_find_page(&vm->ram, entries[i].page + run)) {
            mappings += !follows(&entries[i + run]);
            run++;
        }
        merge_run(vm, entries + i, run);
    }
}

static void remap_entry(struct memd_vm *vm, const struct ring_entry *entry)
{
    struct ram_block *block = ram_find_page(&vm->ram, entry->page);
    uint32_t slot = (uint32_t)entry->arg;
    uint8_t outcome = NOT_MERGED_GONE;

    if (block && is_too_short(vm, UINT32_MAX)) /* not for being short: no VMA is left */
        outcome = NOT_MERGED_BUDGET;
    else if (block)
        outcome = merge_remap(&vm->ram, &vm->segments, block, entry->page - block->first_page, slot,
                              &vm->merge);
    session_put(vm, outcome ? RING_NOT_MERGED : RING_MERGED, entry->page,
                slot | (uint64_t)outcome << 32);
}

/* How many of the last merges are the beginning of a huge page, the rest of which may be on its
 * way. */
static uint32_t count_begun(struct memd_vm *vm)
{
    const struct ring_entry *last = &vm->merges[vm->merge_count - 1];
    const struct ram_block *block = ram_find_page(&vm->ram, last->page);
    uint32_t index, first, begun;

    if (!block)
        return 0;
    index = last->page - block->first_page;
    first = ram_chunk_first(block, ram_chunk_of(block, index));
    begun = index - first + 1;
    if (begun >= HUGE_PAGES || begun > vm->merge_count)
        return 0;
    last -= begun - 1;
    for (uint32_t i = 1; i < begun; i++)
        if (last[i].page != last->page + i)
            return 0;
    return freeze_is_huge(&vm->ram, block, first) ? begun : 0;
}

/* Does what was asked; with `all`, also what might be done better together with more. */
static void do_merges(struct memd_vm *vm, bool all)
{
    uint32_t kept = vm->merge_count > 0 && !all ? count_begun(vm) : 0;
    uint32_t count = vm->merge_count - kept;

    merge_entries(vm, vm->merges, count);
    if (vm->rpc.fd < 0)
        return; /* it broke meanwhile: nobody waits for the answers */
    memmove(vm->merges, vm->merges + count, kept * sizeof(vm->merges[0]));
    vm->merge_count = kept;
}

static void take_merge(struct memd_vm *vm, const struct ring_entry *entry)
{
    if (vm->merge_count == AGENT_MAX_MERGES)
        do_merges(vm, false);
    if (vm->rpc.fd < 0)
        return;
    vm->merges[vm->merge_count++] = *entry;
}

static void take_entry(struct memd_vm *vm, const struct ring_entry *entry)
{
    /* Its segment was sent before it, perhaps since the socket was last read. */
    if ((entry->op == RING_MERGE || entry->op == RING_REMAP) &&
        !segments_find(&vm->segments, SLOT_SEGMENT((uint32_t)entry->arg)))
        take_messages(vm);
    if (entry->op == RING_MERGE) {
        take_merge(vm, entry);
    } else if (entry->op == RING_WANT) {
        answer_want(vm, entry); /* of a page for which no merge is out */
    } else if (entry->op == RING_REMAP) {
        do_merges(vm, true); /* in order: what was asked before is done before */
        remap_entry(vm, entry);
    }
}

static uint32_t take_entries(struct memd_vm *vm)
{
    struct ring_entry entry;
    uint32_t taken = 0;
    uint64_t now;

    while (taken < AGENT_MAX_MERGES && vm->rpc.fd >= 0 && rpc_take(&vm->rpc, &entry)) {
        taken++;
        take_entry(vm, &entry);
    }
    if (vm->rpc.fd < 0 || vm->merge_count == 0)
        return taken;
    now = clock_now_ns();
    if (taken > 0)
        vm->merges_at_ns = now;
    do_merges(vm, now - vm->merges_at_ns >= REST_NS);
    return taken;
}

uint64_t session_patience_ns(const struct memd_vm *vm)
{
    return vm->merge_count > 0 ? REST_NS : UINT64_MAX;
}

/* Which thread answers faults, if that has changed. */
static void report_urgent(struct memd_vm *vm)
{
    struct message_urgent message = {.header = {MESSAGE_URGENT, sizeof(message)},
                                     .tid = migration_urgent_tid(vm)};

    if (!(vm->features & FEATURE_MOVE) || message.tid == vm->urgent_told)
        return;
    vm->urgent_told = message.tid;
    send_surely(vm, &message, sizeof(message), -1);
}

uint32_t session_turn(struct memd_vm *vm)
{
    uint32_t done;

    if (vm->rpc.fd < 0)
        return 0;
    done = take_messages(vm);
    if (vm->rpc.fd >= 0 && vm->ram_open) {
        session_report(vm);
        report_urgent(vm);
        done += take_entries(vm);
    }
    if (__atomic_load_n(&vm->news, __ATOMIC_ACQUIRE))
        session_send_stats(vm);
    return done;
}

/* ---- what memd must know ---- */

static void report_page(struct memd_vm *vm, struct ram_block *block, uint32_t index)
{
    bool ended;
    uint32_t slot = 0;

    lock_take(&block->lock);
    ended = block->live && (block->told[index / 64] & told_bit(index)) &&
            ram_place(block, index) != PLACE_SHARED;
    if (ended) {
        slot = block->slots[index];
        set_told(block, index, false);
    }
    lock_release(&block->lock);
    if (ended)
        session_put(vm, RING_BROKEN, block->first_page + index, slot);
}

static void report_everywhere(struct memd_vm *vm)
{
    for (uint32_t b = 0; b < vm->ram.block_count; b++) {
        struct ram_block *block = &vm->ram.blocks[b];
        for (uint32_t i = 0; block->live && i < block->pages; i++)
            report_page(vm, block, i);
    }
}

static void report_broken(struct memd_vm *vm)
{
    struct broken_queue *queue = &vm->ram.broken;
    uint32_t pages[BROKEN_QUEUE];
    uint32_t count;
    bool overflow;

    if (__atomic_load_n(&queue->count, __ATOMIC_ACQUIRE) == 0)
        return;
    lock_take(&queue->lock);
    count = queue->count;
    overflow = queue->overflow;
    memcpy(pages, queue->pages, count * sizeof(pages[0]));
    queue->count = 0;
    queue->overflow = false;
    lock_release(&queue->lock);
    if (overflow) {
        report_everywhere(vm);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        struct ram_block *block = ram_find_page(&vm->ram, pages[i]);
        if (block)
            report_page(vm, block, pages[i] - block->first_page);
    }
}

void session_report(struct memd_vm *vm)
{
    if (vm->rpc.fd < 0)
        return;
    announce_blocks(vm);
    report_broken(vm);
    announce_gone(vm);
}

static void fill_places(struct memd_vm *vm, struct message_stats *stats)
{
    /* The blocks that memd knows, whatever came or went since it was told. */
    for (uint32_t b = 0; b < vm->announced; b++) {
        struct ram_block *block = &vm->ram.blocks[b];
        bool live;
        lock_take(&block->lock);
        live = block->live;
        for (int p = 0; live && p < PLACE_COUNT; p++)
            stats->places[p] += block->counts[p];
        stats->broken += live ? block->captives : 0;
        lock_release(&block->lock);
        if (!live && !(vm->gone >> b & 1))
            send_gone(vm, b);
    }
}

static void fill_stats(struct memd_vm *vm, struct message_stats *ret_stats)
{
    *ret_stats = (struct message_stats){
        .header = {MESSAGE_STATS, sizeof(*ret_stats)},
        .state = __atomic_load_n(&vm->state, __ATOMIC_ACQUIRE),
        .passes = vm->scanner.passes,
        .merges = vm->merge.merges,
        .zero_merges = vm->scanner.zero_merges,
        .unmerges = vm->ram.unmerges,
        .mismatches = vm->merge.mismatches,
        .busy = vm->merge.busy + vm->scanner.busy,
        .hashed = vm->scanner.hashed,
        .discards = vm->ram.discards,
        .huge_pages = vm->scanner.huge_chunks,
        .vmas = vm->vmas,
        .vma_budget = vm->vma_limit,
    };
    fill_places(vm, ret_stats);
    lock_take(&vm->words);
    memcpy(ret_stats->reason, vm->gate.quarantined ? vm->gate.offence : vm->reason,
           vm->gate.quarantined ? strlen(vm->gate.offence) + 1 : sizeof(ret_stats->reason));
    lock_release(&vm->words);
}

/* What changes although nothing happens. */
static void fill_times(struct memd_vm *vm, struct message_stats *stats)
{
    stats->cpu_ns = run_cpu_ns(vm);
    stats->fault_count = vm->handler.times.count;
    stats->fault_p50_us = fault_quantile_us(&vm->handler.times, 0.50);
    stats->fault_p99_us = fault_quantile_us(&vm->handler.times, 0.99);
    stats->fault_p999_us = fault_quantile_us(&vm->handler.times, 0.999);
    stats->fault_max_us = (uint32_t)vm->handler.times.max_us;
}

static void send_stats(struct memd_vm *vm, struct message_stats *stats)
{
    fill_times(vm, stats);
    if (rpc_send(&vm->rpc, stats, sizeof(*stats), -1) < 0)
        return;
    vm->told = *stats;
    vm->rpc.dirty = false; /* they ring too */
}

void session_send_stats(struct memd_vm *vm)
{
    struct message_stats stats;

    if (vm->rpc.fd < 0)
        return;
    __atomic_store_n(&vm->news, 0, __ATOMIC_RELEASE);
    session_report(vm);
    fill_stats(vm, &stats);
    if (vm->rpc.fd >= 0)
        send_stats(vm, &stats);
}

/* Do these say what memd knows already? Passes and times don't count. */
static bool is_told(const struct memd_vm *vm, const struct message_stats *stats)
{
    struct message_stats told = vm->told;

    told.passes = stats->passes;
    told.hashed = stats->hashed;
    told.cpu_ns = stats->cpu_ns;
    told.fault_count = stats->fault_count;
    told.fault_p50_us = stats->fault_p50_us;
    told.fault_p99_us = stats->fault_p99_us;
    told.fault_p999_us = stats->fault_p999_us;
    told.fault_max_us = stats->fault_max_us;
    return memcmp(&told, stats, sizeof(told)) == 0;
}

void session_end_pass(struct memd_vm *vm)
{
    struct message_stats stats;

    if (vm->rpc.fd < 0)
        return;
    session_report(vm);
    fill_stats(vm, &stats);
    if (vm->rpc.fd >= 0 &&
        (vm->scanner.passes - vm->told.passes >= TOLD_PASSES || !is_told(vm, &stats)))
        send_stats(vm, &stats);
}
