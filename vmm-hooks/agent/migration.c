/* SPDX-License-Identifier: Apache-2.0 */
#include "migration.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "agent.h"

#define PROGRESS_NS 100000000ULL

/* What a save hook may write: far more than any VMM's devices have (QEMU: 0.3 MiB). */
#define STATE_MAX_BYTES (256UL << 20)

union request {
    struct mover_header header;
    struct mover_session session;
    struct mover_tune_message tune;
    struct mover_link link;
    struct mover_stop stop;
    struct mover_load load;
    uint8_t bytes[MOVER_MAX_MESSAGE];
};

/* What came with a request, and what goes with its answer. */
struct exchange {
    const union request *request;
    int fd;        /* that came, or -1; whoever keeps it sets it to -1 */
    int answer_fd; /* -1: none; closed when it was sent */
    uint64_t value, ns;
};

static void ring(int fd)
{
    uint64_t one = 1;

    sys_call3(SYS_write, fd, &one, sizeof(one));
}

/* ---- the scanner rests ---- */

bool migration_holds(const struct memd_vm *vm)
{
    return __atomic_load_n(&vm->migration.holds, __ATOMIC_SEQ_CST);
}

/* When it returns the turn that the scanner may be in has seen it. */
static void hold_scanner(struct memd_vm *vm)
{
    uint32_t turns;

    __atomic_store_n(&vm->migration.holds, 1, __ATOMIC_SEQ_CST);
    turns = __atomic_load_n(&vm->turns, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&vm->in_turn, __ATOMIC_SEQ_CST) &&
           __atomic_load_n(&vm->turns, __ATOMIC_SEQ_CST) == turns)
        sys_call0(SYS_sched_yield);
}

static void release_scanner(struct memd_vm *vm)
{
    __atomic_store_n(&vm->migration.holds, 0, __ATOMIC_SEQ_CST);
}

/* ---- saying ---- */

static void lose_mover(struct migration *migration)
{
    if (migration->fd >= 0)
        sys_close(migration->fd);
    migration->fd = -1;
    migration->committing = false; /* nobody has heard a yes: the next mover may abort */
    migration->alone_since_ns = clock_now_ns();
}

/* A mover that leaves so much unread that a message does not fit is as good as gone. */
static void send_to_mover(struct migration *migration, const void *message, uint32_t bytes, int fd)
{
    struct rpc rpc = {.fd = migration->fd};
    int r = migration->fd >= 0 ? rpc_send(&rpc, message, bytes, fd) : 0;

    if (r < 0)
        lose_mover(migration);
}

static uint64_t unmanaged_pages(const struct memd_vm *vm)
{
    uint64_t pages = 0;

    for (uint32_t i = 0; i < __atomic_load_n(&vm->left_alone_count, __ATOMIC_ACQUIRE); i++)
        pages += vm->left_alone[i].pages;
    return pages;
}

/* Why this guest can't be moved; empty when it can. */
static const char *hindrance(const struct memd_vm *vm)
{
    if (!vm->ram_open)
        return "the agent has no hold on the guest's memory";
    if (__atomic_load_n(&vm->state, __ATOMIC_ACQUIRE) != AGENT_ACTIVE)
        return "the agent has stood down";
    return "";
}

static uint64_t remote_pages(const struct migration *migration)
{
    return migration->have_incoming ? incoming_remote(&migration->incoming) : 0;
}

static uint32_t linked(const struct migration *migration)
{
    const struct stream *urgent =
        migration->have_incoming ? &migration->incoming.urgent : &migration->outgoing.urgent;
    const struct stream *bulk =
        migration->have_incoming ? &migration->incoming.bulk : &migration->outgoing.bulk;

    if (!migration->have_incoming && !migration->have_outgoing)
        return 0;
    return (__atomic_load_n(&urgent->up, __ATOMIC_ACQUIRE) ? 1U << MOVER_URGENT : 0) |
           (__atomic_load_n(&bulk->up, __ATOMIC_ACQUIRE) ? 1U << MOVER_BULK : 0);
}

static uint32_t hooks_of(const struct gate *gate)
{
    if (gate->quarantined)
        return 0;
    return (gate->ops.pause ? MOVER_CAN_PAUSE : 0) | (gate->ops.save ? MOVER_CAN_SAVE : 0);
}

static void say_regions(struct migration *migration, const struct regions *regions)
{
    for (uint32_t i = 0; i < regions->count; i++) {
        struct mover_region region = {.header = {MOVER_REGION, sizeof(region)},
                                      .index = i,
                                      .first_page = regions->at[i].first,
                                      .pages = regions->at[i].pages};

        send_to_mover(migration, &region, sizeof(region), -1);
    }
}

/* Of the thread that a fault waits for on this side. */
static uint32_t urgent_tid(const struct migration *migration)
{
    if (migration->role == MOVER_DESTINATION)
        return migration->vm->handler.tid;
    return migration->have_outgoing ? migration->outgoing.urgent_tid : 0;
}

static void say_hello(struct migration *migration)
{
    struct memd_vm *vm = migration->vm;
    struct regions now;
    const struct regions *regions = migration->have_outgoing   ? &migration->outgoing.regions
                                    : migration->have_incoming ? &migration->incoming.regions
                                                               : &now;
    struct mover_hello hello = {
        .header = {MOVER_HELLO, sizeof(hello)},
        .version = MOVER_VERSION,
        .role = migration->role,
        .phase = migration->phase,
        .hooks = hooks_of(&vm->gate),
        .page_bytes = PAGE_BYTES,
        .unmanaged_pages = unmanaged_pages(vm),
        .epoch = migration->epoch,
        .linked = linked(migration),
        .paused = migration->paused,
        .proven = migration->told_proven,
        .proven_result = migration->proven.result,
        .urgent_tid = urgent_tid(migration),
        .remote_pages = remote_pages(migration),
    };

    regions_take(&now, &vm->ram);
    hello.region_count = regions->count;
    hello.pages = regions->pages;
    memcpy(hello.session, migration->session, sizeof(hello.session));
    strncpy(hello.reason, hindrance(vm), sizeof(hello.reason) - 1);
    send_to_mover(migration, &hello, sizeof(hello), -1);
    say_regions(migration, regions);
}

static void say_done(struct migration *migration, uint32_t what, int result,
                     struct exchange *exchange)
{
    struct mover_done done = {.header = {MOVER_DONE, sizeof(done)},
                              .what = what,
                              .result = result,
                              .value = exchange->value,
                              .ns = exchange->ns};

    send_to_mover(migration, &done, sizeof(done), exchange->answer_fd);
    if (exchange->answer_fd >= 0)
        sys_close(exchange->answer_fd);
    exchange->answer_fd = -1;
}

/* ---- giving up, ending ---- */

/* memd gives that thread its priority. */
static void tell_urgent(struct migration *migration, uint32_t tid)
{
    if (__atomic_exchange_n(&migration->urgent_tid, tid, __ATOMIC_ACQ_REL) != tid)
        ring(migration->scanner_fd);
}

static void resume_guest(struct migration *migration)
{
    if (!migration->paused)
        return;
    lock_take(&migration->gate);
    gate_resume(&migration->vm->gate);
    lock_release(&migration->gate);
    migration->paused = false;
}

static void close_engine(struct migration *migration)
{
    tell_urgent(migration, 0);
    if (migration->have_outgoing)
        outgoing_close(&migration->outgoing);
    if (migration->have_incoming)
        incoming_close(&migration->incoming);
    migration->have_outgoing = migration->have_incoming = false;
}

/* Before anything has begun: what was there is forgotten. */
static void reset(struct migration *migration)
{
    migration->phase = MOVER_PHASE_FRESH;
    memset(migration->session, 0, sizeof(migration->session));
    migration->epoch = 0;
    migration->told_mapped = migration->told_proven = false;
    migration->pass_told = 0;
    memset(&migration->proven, 0, sizeof(migration->proven));
}

static bool is_zero(const uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (bytes[i])
            return false;
    return true;
}

/* ---- requests: both ---- */

static bool dirty_log(void *self, const void *addr, size_t bytes, uint64_t *bitmap)
{
    struct migration *migration = self;
    bool logged;

    lock_take(&migration->gate);
    logged = gate_dirty_log(&migration->vm->gate, addr, bytes, bitmap);
    lock_release(&migration->gate);
    return logged;
}

static int open_engine(struct migration *migration, const struct mover_tuning *tuning)
{
    struct memd_vm *vm = migration->vm;
    struct passes_log log = {.ask = vm->gate.ops.dirty_log ? dirty_log : NULL, .self = migration};
    int r;

    if (migration->role == MOVER_SOURCE) {
        r = outgoing_open(&migration->outgoing, &vm->ram, tuning, migration->news_fd, &log);
        migration->have_outgoing = r == 0;
    } else {
        r = incoming_open(&migration->incoming, &vm->ram, &vm->handler, tuning, migration->news_fd);
        migration->have_incoming = r == 0;
    }
    return r;
}

static int set_session(struct migration *migration, struct exchange *exchange)
{
    const struct mover_session *message = &exchange->request->session;
    bool same = !memcmp(message->session, migration->session, sizeof(migration->session));
    int r;

    if (is_zero(message->session, sizeof(message->session)))
        return -EINVAL;
    if (migration->have_outgoing || migration->have_incoming)
        return same ? 0 : -EPERM;
    if (*hindrance(migration->vm))
        return -EBUSY;
    reset(migration);
    r = open_engine(migration, &message->tuning);
    if (r < 0)
        return r;
    memcpy(migration->session, message->session, sizeof(migration->session));
    exchange->value = urgent_tid(migration);
    if (migration->have_outgoing)
        tell_urgent(migration, urgent_tid(migration));
    return 0;
}

static void post_link(struct migration *migration, uint32_t channel, int fd)
{
    if (migration->have_outgoing)
        outgoing_link(&migration->outgoing, channel, fd, migration->epoch);
    else if (migration->have_incoming)
        incoming_link(&migration->incoming, channel, fd, migration->epoch);
    else if (fd >= 0)
        sys_close(fd);
}

static int take_link(struct migration *migration, struct exchange *exchange)
{
    const struct mover_link *message = &exchange->request->link;

    if (!migration->have_outgoing && !migration->have_incoming)
        return -EPERM;
    if (exchange->fd < 0 || message->channel >= MOVER_CHANNELS || message->epoch == 0)
        return -EINVAL;
    if (message->epoch < migration->epoch)
        return -ESTALE;
    migration->epoch = message->epoch;
    post_link(migration, message->channel, exchange->fd);
    exchange->fd = -1;
    return 0;
}

static int unlink_all(struct migration *migration, struct exchange *exchange)
{
    if (exchange->request->link.epoch != migration->epoch)
        return -ESTALE;
    post_link(migration, MOVER_URGENT, -1);
    post_link(migration, MOVER_BULK, -1);
    return 0;
}

/* The destination's memory is no guest's any more: who waits in it waits until the VMM is ended. */
static int abort_destination(struct migration *migration)
{
    if (migration->phase == MOVER_PHASE_RUNNING)
        return -EPERM;
    close_engine(migration);
    resume_guest(migration);
    reset(migration);
    return 0;
}

static int abort_source(struct migration *migration)
{
    if (migration->phase == MOVER_PHASE_COMMITTED)
        return -EPERM;
    close_engine(migration);
    migration->mapping = migration->committing = false;
    resume_guest(migration);
    release_scanner(migration->vm);
    reset(migration);
    return 0;
}

static int abort_it(struct migration *migration, struct exchange *exchange)
{
    (void)exchange;
    return migration->role == MOVER_SOURCE ? abort_source(migration) : abort_destination(migration);
}

/* ---- requests: source ---- */

static int start_precopy(struct migration *migration, struct exchange *exchange)
{
    (void)exchange;
    if (!migration->have_outgoing || migration->phase != MOVER_PHASE_FRESH)
        return -EPERM;
    hold_scanner(migration->vm);
    outgoing_precopy(&migration->outgoing);
    migration->phase = MOVER_PHASE_PRECOPY;
    return 0;
}

static int pause_guest(struct migration *migration, uint64_t *ret_ns)
{
    uint64_t begun = clock_now_ns();
    int r;

    lock_take(&migration->gate);
    r = gate_pause(&migration->vm->gate);
    lock_release(&migration->gate);
    *ret_ns = clock_now_ns() - begun;
    migration->paused |= r == 0;
    return r;
}

/* The final map is written while the state is saved. */
static int stop_guest(struct migration *migration, struct exchange *exchange)
{
    int r = 0;

    if (!migration->have_outgoing ||
        (migration->phase != MOVER_PHASE_FRESH && migration->phase != MOVER_PHASE_PRECOPY))
        return -EPERM;
    hold_scanner(migration->vm);
    if (exchange->request->stop.pause)
        r = pause_guest(migration, &exchange->ns);
    if (r < 0)
        return r;
    migration->phase = MOVER_PHASE_STOPPED;
    migration->mapping = true;
    outgoing_stop(&migration->outgoing, exchange->request->stop.hold);
    return 0;
}

/* A file that can't change any more, with what the hook wrote. */
static int save_into(struct migration *migration, int fd, size_t *ret_bytes)
{
    uint8_t *at;
    int r = (int)sys_call2(SYS_ftruncate, fd, STATE_MAX_BYTES);

    if (r < 0)
        return r;
    at = sys_mmap(NULL, STATE_MAX_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (sys_failed(at))
        return (int)(intptr_t)at;
    sys_madvise(at, STATE_MAX_BYTES, MADV_DONTFORK);
    lock_take(&migration->gate);
    r = gate_save(&migration->vm->gate, at, STATE_MAX_BYTES, ret_bytes);
    lock_release(&migration->gate);
    sys_munmap(at, STATE_MAX_BYTES);
    if (r == 0)
        r = (int)sys_call2(SYS_ftruncate, fd, *ret_bytes);
    if (r == 0)
        r = (int)sys_call3(SYS_fcntl, fd, F_ADD_SEALS,
                           F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    return r;
}

static int save_state(struct migration *migration, struct exchange *exchange)
{
    uint64_t begun = clock_now_ns();
    size_t bytes = 0;
    int fd;
    int r;

    if (migration->phase != MOVER_PHASE_STOPPED)
        return -EPERM;
    fd = (int)sys_call2(SYS_memfd_create, "memd-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return fd;
    r = save_into(migration, fd, &bytes);
    if (r < 0) {
        sys_close(fd);
        return r;
    }
    exchange->answer_fd = fd;
    exchange->value = bytes;
    exchange->ns = clock_now_ns() - begun;
    return 0;
}

/* A destination that does not have all of the map is no place to go to. -EINPROGRESS: answered when
 * it is written (look_at_final_map). */
static int commit(struct migration *migration, struct exchange *exchange)
{
    int r;

    (void)exchange;
    if (migration->phase == MOVER_PHASE_COMMITTED)
        return 0;
    if (migration->phase != MOVER_PHASE_STOPPED)
        return -EPERM;
    r = outgoing_stopped(&migration->outgoing);
    migration->committing = r == -EINPROGRESS;
    if (r == 0)
        migration->phase = MOVER_PHASE_COMMITTED;
    return r;
}

static int push(struct migration *migration, struct exchange *exchange)
{
    (void)exchange;
    if (migration->phase != MOVER_PHASE_COMMITTED)
        return -EPERM;
    outgoing_release(&migration->outgoing);
    return 0;
}

static int tune(struct migration *migration, struct exchange *exchange)
{
    if (!migration->have_outgoing)
        return -EPERM;
    outgoing_tune(&migration->outgoing, &exchange->request->tune.tuning);
    return 0;
}

/* ---- requests: destination ---- */

static int expect(struct migration *migration, struct exchange *exchange)
{
    int r;

    (void)exchange;
    if (!migration->have_incoming || migration->phase != MOVER_PHASE_FRESH)
        return -EPERM;
    if (*hindrance(migration->vm))
        return -EBUSY;
    hold_scanner(migration->vm);
    r = incoming_expect(&migration->incoming);
    if (r == 0)
        migration->phase = MOVER_PHASE_EXPECTING;
    return r;
}

static int load_from(struct migration *migration, int fd, size_t bytes)
{
    uint64_t ns;
    struct stat stat;
    void *at;
    int r = (int)sys_call2(SYS_fstat, fd, &stat);

    if (r < 0 || (uint64_t)stat.st_size < bytes || bytes == 0 || bytes > STATE_MAX_BYTES)
        return -EINVAL;
    /* Nobody makes it shorter while it is read. */
    r = (int)sys_call2(SYS_fcntl, fd, F_GET_SEALS);
    if (r < 0 || !(r & F_SEAL_SHRINK))
        return -EINVAL;
    at = sys_mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (sys_failed(at))
        return (int)(intptr_t)at;
    r = migration->paused ? 0 : pause_guest(migration, &ns);
    if (r == 0) {
        lock_take(&migration->gate);
        r = gate_load(&migration->vm->gate, at, bytes);
        lock_release(&migration->gate);
    }
    sys_munmap(at, bytes);
    return r;
}

static int load_state(struct migration *migration, struct exchange *exchange)
{
    uint64_t begun = clock_now_ns();
    int r = 0;

    if (migration->phase != MOVER_PHASE_MAPPED)
        return -EPERM;
    if (exchange->fd >= 0)
        r = load_from(migration, exchange->fd, exchange->request->load.bytes);
    else if (hooks_of(&migration->vm->gate) & MOVER_CAN_SAVE)
        return -EINVAL;
    exchange->ns = clock_now_ns() - begun;
    if (r == 0)
        migration->phase = MOVER_PHASE_LOADED;
    return r;
}

static int go_on(struct migration *migration, uint64_t *ret_ns)
{
    uint64_t begun = clock_now_ns();
    int r = 0;

    if (migration->paused) {
        lock_take(&migration->gate);
        r = gate_resume(&migration->vm->gate);
        lock_release(&migration->gate);
        migration->paused = false;
    }
    *ret_ns = clock_now_ns() - begun;
    return r;
}

static int run_guest(struct migration *migration, struct exchange *exchange)
{
    int r;

    if (migration->phase == MOVER_PHASE_RUNNING)
        return 0;
    if (migration->phase != MOVER_PHASE_LOADED)
        return -EPERM;
    r = go_on(migration, &exchange->ns);
    if (r == 0)
        migration->phase = MOVER_PHASE_RUNNING;
    return r;
}

static int hold(struct migration *migration, struct exchange *exchange)
{
    if (migration->phase != MOVER_PHASE_RUNNING)
        return -EPERM;
    return migration->paused ? 0 : pause_guest(migration, &exchange->ns);
}

static int let_go_on(struct migration *migration, struct exchange *exchange)
{
    if (migration->phase != MOVER_PHASE_RUNNING)
        return -EPERM;
    if (!migration->paused)
        return migration->vm->gate.ops.pause ? 0 : -ENOTSUP;
    return go_on(migration, &exchange->ns);
}

/* Nothing is remote any more: the guest is here, and the scanner may have it. What the engine still
 * keeps is for the proof. */
static void finish_destination(struct migration *migration)
{
    close_engine(migration);
    release_scanner(migration->vm);
}

static int forget(struct migration *migration, struct exchange *exchange)
{
    (void)exchange;
    if (migration->phase != MOVER_PHASE_RUNNING || remote_pages(migration) > 0)
        return -EPERM;
    finish_destination(migration);
    return 0;
}

/* ---- requests ---- */

#define SOURCE      (1U << MOVER_SOURCE)
#define DESTINATION (1U << MOVER_DESTINATION)

static const struct {
    uint32_t type;
    uint32_t bytes;
    uint32_t roles;
    int (*serve)(struct migration *migration, struct exchange *exchange);
} requests[] = {
    {MOVER_SET_SESSION, sizeof(struct mover_session), SOURCE | DESTINATION, set_session},
    {MOVER_LINK, sizeof(struct mover_link), SOURCE | DESTINATION, take_link},
    {MOVER_UNLINK, sizeof(struct mover_link), SOURCE | DESTINATION, unlink_all},
    {MOVER_START_PRECOPY, sizeof(struct mover_plain), SOURCE, start_precopy},
    {MOVER_STOP, sizeof(struct mover_stop), SOURCE, stop_guest},
    {MOVER_SAVE, sizeof(struct mover_plain), SOURCE, save_state},
    {MOVER_COMMIT, sizeof(struct mover_plain), SOURCE, commit},
    {MOVER_PUSH, sizeof(struct mover_plain), SOURCE, push},
    {MOVER_ABORT, sizeof(struct mover_plain), SOURCE | DESTINATION, abort_it},
    {MOVER_EXPECT, sizeof(struct mover_plain), DESTINATION, expect},
    {MOVER_LOAD, sizeof(struct mover_load), DESTINATION, load_state},
    {MOVER_RUN, sizeof(struct mover_plain), DESTINATION, run_guest},
    {MOVER_HOLD, sizeof(struct mover_plain), DESTINATION, hold},
    {MOVER_GO, sizeof(struct mover_plain), DESTINATION, let_go_on},
    {MOVER_TUNE, sizeof(struct mover_tune_message), SOURCE, tune},
    {MOVER_FORGET, sizeof(struct mover_plain), DESTINATION, forget},
};

static int serve(struct migration *migration, struct exchange *exchange)
{
    const struct mover_header *header = &exchange->request->header;

    for (uint32_t i = 0; i < sizeof(requests) / sizeof(requests[0]); i++) {
        if (requests[i].type != header->type)
            continue;
        if (header->bytes < requests[i].bytes)
            return -EINVAL;
        if (!(requests[i].roles & 1U << migration->role))
            return -EPERM;
        return requests[i].serve(migration, exchange);
    }
    return -EOPNOTSUPP;
}

static void take_request(struct migration *migration)
{
    union {
        union rpc_message message;
        union request request;
    } received;
    struct rpc rpc = {.fd = migration->fd};
    struct exchange exchange = {.request = &received.request, .fd = -1, .answer_fd = -1};
    int r = rpc_receive(&rpc, &received.message, &exchange.fd);

    if (r < 0)
        lose_mover(migration);
    if (r <= 0)
        return;
    r = serve(migration, &exchange);
    if (exchange.fd >= 0)
        sys_close(exchange.fd);
    if (!migration->committing || received.request.header.type != MOVER_COMMIT)
        say_done(migration, received.request.header.type, r, &exchange);
}

/* ---- what is said of its own accord ---- */

static void say_cut(struct migration *migration, uint32_t channel, struct stream *stream)
{
    struct stream_cut cut;
    struct mover_cut message = {.header = {MOVER_CUT, sizeof(message)}, .channel = channel};

    if (!stream_take_cut(stream, &cut))
        return;
    message.epoch = cut.epoch;
    message.result = cut.result;
    memcpy(message.reason, cut.reason, sizeof(message.reason));
    send_to_mover(migration, &message, sizeof(message), -1);
}

static uint64_t read_count(const uint64_t *counter)
{
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
}

static void fill_outgoing(const struct outgoing *outgoing, struct mover_progress *progress)
{
    progress->pass = __atomic_load_n(&outgoing->pass, __ATOMIC_ACQUIRE);
    progress->pages_left = outgoing_pending(outgoing);
    progress->bytes_sent =
        read_count(&outgoing->urgent.bytes_out) + read_count(&outgoing->bulk.bytes_out);
    progress->bytes_received =
        read_count(&outgoing->urgent.bytes_in) + read_count(&outgoing->bulk.bytes_in);
    progress->dirty_rate = read_count(&outgoing->dirty_rate);
    progress->pages_data = read_count(&outgoing->counts.data);
    progress->pages_zero = read_count(&outgoing->counts.zero);
    progress->pages_slot = read_count(&outgoing->counts.slot);
    progress->pages_demand = read_count(&outgoing->counts.demand);
    progress->pages_resent = read_count(&outgoing->counts.resent);
}

static void fill_incoming(const struct incoming *incoming, struct mover_progress *progress)
{
    progress->pages_left = incoming_remote(incoming);
    progress->bytes_sent =
        read_count(&incoming->urgent.bytes_out) + read_count(&incoming->bulk.bytes_out);
    progress->bytes_received =
        read_count(&incoming->urgent.bytes_in) + read_count(&incoming->bulk.bytes_in);
    progress->pages_data = read_count(&incoming->counts.data);
    progress->pages_zero = read_count(&incoming->counts.zero);
    progress->pages_slot = read_count(&incoming->counts.slot);
    progress->pages_demand = read_count(&incoming->counts.demand);
    progress->pages_dropped = read_count(&incoming->counts.dropped);
}

static void fill_progress(const struct migration *migration, struct mover_progress *progress)
{
    progress->phase = migration->phase;
    if (migration->have_outgoing)
        fill_outgoing(&migration->outgoing, progress);
    else if (migration->have_incoming)
        fill_incoming(&migration->incoming, progress);
}

static void say_progress(struct migration *migration, uint64_t now, bool pass_ended)
{
    struct mover_progress progress = {.header = {MOVER_PROGRESS, sizeof(progress)}};
    uint64_t pages;

    fill_progress(migration, &progress);
    pages = progress.pages_data + progress.pages_zero + progress.pages_slot;
    progress.rate = (pages - migration->told_pages) * 1000000000 / (now - migration->told_ns + 1);
    if (pass_ended) {
        progress.pass_ended = 1;
        progress.pass = migration->pass_told;
        progress.pages_left = read_count(&migration->outgoing.pass_dirty);
    }
    migration->told_pages = pages;
    migration->told_ns = now;
    send_to_mover(migration, &progress, sizeof(progress), -1);
}

static void look_at_final_map(struct migration *migration)
{
    struct exchange exchange = {.answer_fd = -1};
    int r;

    if (!migration->mapping || outgoing_stopped(&migration->outgoing) == -EINPROGRESS)
        return;
    migration->mapping = false;
    say_progress(migration, clock_now_ns(), false); /* what is still to come */
    if (!migration->committing)
        return;
    r = commit(migration, &exchange);
    say_done(migration, MOVER_COMMIT, r, &exchange);
}

static void look_at_passes(struct migration *migration)
{
    uint32_t ended;

    if (!migration->have_outgoing || migration->phase != MOVER_PHASE_PRECOPY)
        return;
    ended = __atomic_load_n(&migration->outgoing.passes_ended, __ATOMIC_ACQUIRE);
    if (ended == migration->pass_told)
        return;
    migration->pass_told = ended;
    say_progress(migration, clock_now_ns(), true);
}

static void look_at_map(struct migration *migration)
{
    const struct incoming *incoming = &migration->incoming;
    struct mover_mapped mapped = {.header = {MOVER_MAPPED, sizeof(mapped)}};

    if (!migration->have_incoming || migration->told_mapped ||
        !__atomic_load_n(&incoming->mapped, __ATOMIC_ACQUIRE))
        return;
    migration->told_mapped = true;
    migration->phase = MOVER_PHASE_MAPPED;
    mapped.pages_remote = incoming_remote(incoming);
    mapped.pages_have = incoming->pages_have;
    mapped.pages_empty = incoming->pages_empty;
    send_to_mover(migration, &mapped, sizeof(mapped), -1);
}

static void fill_proven_source(const struct outgoing *outgoing, struct mover_proven *proven)
{
    proven->result = outgoing->proven_result;
    proven->region = outgoing->proven_region;
    proven->pages_placed = outgoing->proven_pages;
    proven->pages_removed = outgoing->regions.pages - outgoing->proven_pages;
}

static void fill_proven_destination(struct incoming *incoming, struct mover_proven *proven)
{
    struct fault_times times = incoming_times(incoming);

    proven->result = incoming->proven_result;
    proven->region = incoming->proven_region;
    proven->pages_placed = incoming_placed(incoming);
    proven->pages_removed = incoming->regions.pages - proven->pages_placed;
    proven->faults.count = times.count;
    proven->faults.p50_us = fault_quantile_us(&times, 0.50);
    proven->faults.p99_us = fault_quantile_us(&times, 0.99);
    proven->faults.p999_us = fault_quantile_us(&times, 0.999);
    proven->faults.max_us = (uint32_t)times.max_us;
}

static bool is_proven(const struct migration *migration)
{
    return (migration->have_outgoing &&
            __atomic_load_n(&migration->outgoing.proven, __ATOMIC_ACQUIRE)) ||
           (migration->have_incoming &&
            __atomic_load_n(&migration->incoming.proven, __ATOMIC_ACQUIRE));
}

static void look_at_proof(struct migration *migration)
{
    struct mover_proven *proven = &migration->proven;
    struct mover_progress progress = {0};

    if (migration->told_proven || !is_proven(migration))
        return;
    fill_progress(migration, &progress);
    *proven = (struct mover_proven){.header = {MOVER_PROVEN, sizeof(*proven)}};
    if (migration->have_outgoing)
        fill_proven_source(&migration->outgoing, proven);
    else
        fill_proven_destination(&migration->incoming, proven);
    proven->pages.bytes_sent = progress.bytes_sent;
    proven->pages.bytes_received = progress.bytes_received;
    proven->pages.data = progress.pages_data;
    proven->pages.zero = progress.pages_zero;
    proven->pages.slot = progress.pages_slot;
    proven->pages.demand = progress.pages_demand;
    proven->pages.resent = progress.pages_resent;
    proven->pages.dropped = progress.pages_dropped;
    migration->told_proven = true;
    send_to_mover(migration, proven, sizeof(*proven), -1);
}

/* What has changed in the engine, in the order in which the mover must hear of it. */
static void look_at_engine(struct migration *migration)
{
    if (migration->have_outgoing) {
        say_cut(migration, MOVER_URGENT, &migration->outgoing.urgent);
        say_cut(migration, MOVER_BULK, &migration->outgoing.bulk);
    }
    look_at_final_map(migration);
    look_at_passes(migration);
    look_at_map(migration);
    look_at_proof(migration);
    if (migration->have_incoming) {
        say_cut(migration, MOVER_URGENT, &migration->incoming.urgent);
        say_cut(migration, MOVER_BULK, &migration->incoming.bulk);
        /* All is here: the scanner may have it, though the proof is still to come. */
        if (migration->phase == MOVER_PHASE_RUNNING && migration_holds(migration->vm) &&
            remote_pages(migration) == 0)
            release_scanner(migration->vm);
    }
}

/* ---- the thread ---- */

static void adopt_mover(struct migration *migration)
{
    uint32_t role;
    int fd;

    lock_take(&migration->posting);
    fd = migration->posted ? migration->next_fd : -1;
    role = migration->next_role;
    migration->posted = false;
    migration->next_fd = -1;
    lock_release(&migration->posting);
    if (fd < 0)
        return;
    lose_mover(migration);
    /* One that came here may leave again. */
    if (role != migration->role && migration->phase == MOVER_PHASE_RUNNING &&
        remote_pages(migration) == 0)
        finish_destination(migration);
    if (role != migration->role && (migration->have_outgoing || migration->have_incoming)) {
        sys_close(fd); /* it is the other way round already */
        return;
    }
    if (role != migration->role)
        reset(migration);
    migration->role = role;
    migration->fd = fd;
    say_hello(migration);
}

/* Nobody asks for anything any more. */
static void look_whether_alone(struct migration *migration, uint64_t now)
{
    bool late = now - migration->alone_since_ns > MOVER_PATIENCE_S * 1000000000ULL;

    if (migration->fd >= 0)
        return;
    if (migration->have_incoming && migration->told_proven && migration->proven.result == 0 &&
        migration->phase == MOVER_PHASE_RUNNING)
        finish_destination(migration);
    if (migration->have_outgoing && late && migration->phase != MOVER_PHASE_COMMITTED) {
        abort_source(migration);
        agent_say(migration->vm, "a migration was given up: its mover is gone");
    }
}

static void drain(int fd)
{
    uint64_t count;

    sys_read(fd, &count, sizeof(count));
}

static void wait_for_something(struct migration *migration)
{
    struct pollfd polled[3] = {{.fd = migration->wake_fd, .events = POLLIN},
                               {.fd = migration->news_fd, .events = POLLIN},
                               {.fd = migration->fd, .events = POLLIN}};
    bool busy = migration->have_outgoing || migration->have_incoming;
    struct timespec timeout = {.tv_nsec = PROGRESS_NS};

    sys_call5(SYS_ppoll, polled, 3, busy ? &timeout : NULL, NULL, 8);
    if (polled[0].revents & POLLIN)
        drain(migration->wake_fd);
    if (polled[1].revents & POLLIN)
        drain(migration->news_fd);
    if (migration->fd >= 0 && polled[2].revents)
        take_request(migration);
}

static void *run_migration(void *context)
{
    struct migration *migration = context;

    while (!__atomic_load_n(&migration->stop, __ATOMIC_ACQUIRE)) {
        uint64_t now;

        adopt_mover(migration);
        wait_for_something(migration);
        look_at_engine(migration);
        now = clock_now_ns();
        if (now - migration->told_ns >= PROGRESS_NS && !migration->told_proven &&
            (migration->have_outgoing || migration->have_incoming))
            say_progress(migration, now, false);
        look_whether_alone(migration, now);
    }
    return NULL;
}

static int start_thread(struct memd_vm *vm)
{
    struct migration *migration = &vm->migration;
    sigset_t all;
    sigset_t old;
    int r;

    migration->vm = vm;
    migration->fd = -1;
    migration->wake_fd = (int)sys_call2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    migration->news_fd = (int)sys_call2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    migration->scanner_fd = (int)sys_call2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    r = migration->wake_fd < 0 || migration->news_fd < 0 || migration->scanner_fd < 0
            ? -EMFILE
            : -pthread_create(&migration->thread, NULL, run_migration, migration);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r == 0) {
        migration->started = true;
        return 0;
    }
    if (migration->wake_fd >= 0)
        sys_close(migration->wake_fd);
    if (migration->news_fd >= 0)
        sys_close(migration->news_fd);
    if (migration->scanner_fd >= 0)
        sys_close(migration->scanner_fd);
    return r;
}

void migration_take_mover(struct memd_vm *vm, uint32_t role, int fd)
{
    struct migration *migration = &vm->migration;

    if ((role != MOVER_SOURCE && role != MOVER_DESTINATION) ||
        (!migration->started && start_thread(vm) < 0)) {
        sys_close(fd); /* the mover reads an end of file before a HELLO */
        return;
    }
    lock_take(&migration->posting);
    if (migration->posted && migration->next_fd >= 0)
        sys_close(migration->next_fd);
    migration->posted = true;
    migration->next_fd = fd;
    migration->next_role = role;
    lock_release(&migration->posting);
    ring(migration->wake_fd);
}

uint32_t migration_urgent_tid(const struct memd_vm *vm)
{
    return __atomic_load_n(&vm->migration.urgent_tid, __ATOMIC_ACQUIRE);
}

int migration_wakes(const struct memd_vm *vm)
{
    return vm->migration.started ? vm->migration.scanner_fd : -1;
}

bool migration_is_caller(const struct memd_vm *vm)
{
    const struct migration *migration = &vm->migration;

    if (!migration->started)
        return false;
    return pthread_equal(migration->thread, pthread_self()) ||
           (migration->have_outgoing &&
            pthread_equal(migration->outgoing.bulk_thread, pthread_self()));
}

void migration_close(struct memd_vm *vm)
{
    struct migration *migration = &vm->migration;

    if (!migration->started)
        return;
    __atomic_store_n(&migration->stop, 1, __ATOMIC_RELEASE);
    ring(migration->wake_fd);
    pthread_join(migration->thread, NULL);
    close_engine(migration);
    if (migration->fd >= 0)
        sys_close(migration->fd);
    if (migration->posted && migration->next_fd >= 0)
        sys_close(migration->next_fd);
    migration->started = false;
    sys_close(migration->wake_fd);
    sys_close(migration->news_fd);
    sys_close(migration->scanner_fd);
}
