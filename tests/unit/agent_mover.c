/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest moves from one process to another. Each has the real agent with all its threads; the test
 * is memd, both movers, and the VMM on either side. The destination's VMM runs in a child, which
 * ends with 0 when the memory that it was given is right.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "agent_memd.h"

#define PAGES          1536U
#define FIRMWARE_PAGES 8U /* which the VMM moves by itself */

static const uint8_t session[MOVER_SESSION_BYTES] = "sixteen bytes...";

/* ---- a VMM ---- */

struct vmm {
    struct memd_end memd;
    struct memd_vm *vm;
    uint8_t *ram;
    uint8_t *firmware;
    int mover; /* the agent's end */
    uint32_t pauses, resumes;
    uint32_t state, loaded; /* what is saved and loaded */
};

static struct vmm vmm;
static uint32_t *may_read; /* in memory of both processes: the destination reads when it is 1 */

static int on_pause(void *opaque)
{
    (void)opaque;
    __atomic_add_fetch(&vmm.pauses, 1, __ATOMIC_RELEASE);
    return 0;
}

static int on_resume(void *opaque)
{
    (void)opaque;
    __atomic_add_fetch(&vmm.resumes, 1, __ATOMIC_RELEASE);
    return 0;
}

static int on_save(void *opaque, struct memd_stream *stream)
{
    (void)opaque;
    return memd_stream_write(stream, &vmm.state, sizeof(vmm.state));
}

/* A load may touch guest memory: its bytes come from the source. */
static int on_load(void *opaque, struct memd_stream *stream)
{
    (void)opaque;
    return vmm.ram[5 * PAGE_BYTES] == 6 ? memd_stream_read(stream, &vmm.loaded, sizeof(vmm.loaded))
                                        : -EIO;
}

static const struct memd_ops ops = {
    .size = sizeof(ops), .pause = on_pause, .resume = on_resume, .save = on_save, .load = on_load};

static void start_vmm(uint32_t role, int mover)
{
    struct memd_options options = {.size = sizeof(options), .vmm = "unit", .ops = &ops};

    vmm = (struct vmm){.mover = mover};
    memd_end_start(&vmm.memd);
    options.socket = vmm.memd.path;
    if (memd_attach(&options, &vmm.vm) < 0)
        cr_skip_test("no agent on this kernel");
    vmm.ram =
        mmap(NULL, PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    vmm.firmware = mmap(NULL, FIRMWARE_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert_eq(memd_ram_add(vmm.vm, vmm.firmware, FIRMWARE_PAGES * PAGE_BYTES,
                              MEMD_RAM_FRESH | MEMD_RAM_VMM_MOVES),
                 0);
    memset(vmm.firmware, (int)role, FIRMWARE_PAGES * PAGE_BYTES);
    cr_assert_eq(memd_ram_add(vmm.vm, vmm.ram, PAGES * PAGE_BYTES, MEMD_RAM_FRESH), 0);
    memd_end_give_mover(&vmm.memd, role, mover);
}

static void fill(void)
{
    for (uint32_t page = 0; page < PAGES; page++)
        if (page % 3)
            memset(vmm.ram + page * PAGE_BYTES, (int)(page + 1) & 0xff, PAGE_BYTES);
}

static bool is_right(void)
{
    for (uint32_t page = 0; page < PAGES; page++)
        for (uint32_t i = 0; i < PAGE_BYTES; i += 511)
            if (vmm.ram[page * PAGE_BYTES + i] != (page % 3 ? (uint8_t)(page + 1) : 0))
                return false;
    return true;
}

/* The destination: waits until it may run, and looks. */
static int be_destination(int mover)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    start_vmm(MOVER_DESTINATION, mover);
    close(mover);
    while (__atomic_load_n(&vmm.resumes, __ATOMIC_ACQUIRE) == 0)
        usleep(500);
    while (!__atomic_load_n(may_read, __ATOMIC_ACQUIRE))
        usleep(500);
    if (!is_right())
        return 2;
    for (uint32_t i = 0; i < FIRMWARE_PAGES * PAGE_BYTES; i++)
        if (vmm.firmware[i] != MOVER_DESTINATION)
            return 4;
    while (!__atomic_load_n(&vmm.vm->migration.told_proven, __ATOMIC_ACQUIRE))
        usleep(500); /* the test still has to do with this agent */
    return vmm.loaded == 4711 ? 0 : 3;
}

/* ---- the movers ---- */

struct mover {
    int fd;
    struct mover_hello hello;
    struct mover_mapped mapped;
    struct mover_proven proven;
    struct mover_cut cut;
    uint32_t passes;
    uint64_t pages_left;
    int state; /* the memfd of SAVE */
    uint64_t state_bytes;
};

static struct mover source, destination;
static pid_t child;

/* One message; *ret_fd is a descriptor that came with it, or -1. Its type. */
static uint32_t hear(struct mover *mover, union rpc_message *ret_message, int *ret_fd)
{
    struct rpc rpc = {.fd = mover->fd};
    struct pollfd polled = {.fd = mover->fd, .events = POLLIN};

    cr_assert_eq(poll(&polled, 1, 20000), 1, "the agent says nothing");
    cr_assert_eq(rpc_receive(&rpc, ret_message, ret_fd), 1);
    return ret_message->header.type;
}

#define TAKE(field) memcpy(&mover->field, &message, sizeof(mover->field))

/* Hears until a message of this type came. */
static void hear_until(struct mover *mover, uint32_t wanted, struct mover_done *ret_done)
{
    union rpc_message message;
    struct mover_progress progress;
    uint32_t type;
    int fd;

    do {
        fd = -1;
        type = hear(mover, &message, &fd);
        switch (type) {
        case MOVER_HELLO: TAKE(hello); break;
        case MOVER_MAPPED: TAKE(mapped); break;
        case MOVER_PROVEN: TAKE(proven); break;
        case MOVER_CUT: TAKE(cut); break;
        case MOVER_DONE: memcpy(ret_done, &message, sizeof(*ret_done)); break;
        case MOVER_PROGRESS:
            memcpy(&progress, &message, sizeof(progress));
            mover->passes = progress.pass_ended ? progress.pass : mover->passes;
            mover->pages_left = progress.pages_left;
            break;
        default: break;
        }
        if (fd >= 0)
            mover->state = fd;
    } while (type != wanted);
}

static int ask_with(struct mover *mover, const void *request, size_t bytes, int fd)
{
    const struct mover_header *header = request;
    struct mover_done done = {0};
    struct rpc rpc = {.fd = mover->fd};

    cr_assert_eq(rpc_send(&rpc, request, (uint32_t)bytes, fd), 0);
    hear_until(mover, MOVER_DONE, &done);
    cr_assert_eq(done.what, header->type);
    mover->state_bytes = done.value;
    return done.result;
}

static int ask(struct mover *mover, uint32_t type)
{
    struct mover_plain plain = {{type, sizeof(plain)}};

    return ask_with(mover, &plain, sizeof(plain), -1);
}

static void set_session(struct mover *mover, uint64_t bandwidth)
{
    struct mover_session message = {.header = {MOVER_SET_SESSION, sizeof(message)},
                                    .tuning = {.bandwidth = bandwidth}};

    memcpy(message.session, session, sizeof(session));
    cr_assert_eq(ask_with(mover, &message, sizeof(message), -1), 0);
}

static void link_both(uint32_t epoch)
{
    for (uint32_t channel = 0; channel < MOVER_CHANNELS; channel++) {
        struct mover_link link = {{MOVER_LINK, sizeof(link)}, channel, epoch};
        int ends[2];

        cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
        cr_assert_eq(ask_with(&source, &link, sizeof(link), ends[0]), 0);
        cr_assert_eq(ask_with(&destination, &link, sizeof(link), ends[1]), 0);
        close(ends[0]);
        close(ends[1]);
    }
}

static void unlink_both(uint32_t epoch)
{
    struct mover_link link = {{MOVER_UNLINK, sizeof(link)}, 0, epoch};

    cr_assert_eq(ask_with(&source, &link, sizeof(link), -1), 0);
    cr_assert_eq(ask_with(&destination, &link, sizeof(link), -1), 0);
}

static int stop(uint32_t pause)
{
    struct mover_stop message = {{MOVER_STOP, sizeof(message)}, pause, 1};

    return ask_with(&source, &message, sizeof(message), -1);
}

static int load(void)
{
    struct mover_load message = {{MOVER_LOAD, sizeof(message)}, source.state_bytes};

    return ask_with(&destination, &message, sizeof(message), source.state);
}

static void set_up(void)
{
    int at_source[2], at_destination[2];

    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, at_source), 0);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, at_destination), 0);
    may_read = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    *may_read = 1;
    child = fork();
    if (child == 0) {
        /* What the test closes must be closed. */
        close(at_source[0]);
        close(at_source[1]);
        close(at_destination[0]);
        _exit(be_destination(at_destination[1]));
    }
    close(at_destination[1]);
    start_vmm(MOVER_SOURCE, at_source[1]);
    close(at_source[1]);
    vmm.state = 4711;
    fill();
    source = (struct mover){.fd = at_source[0], .state = -1};
    destination = (struct mover){.fd = at_destination[0], .state = -1};
    hear_until(&source, MOVER_REGION, NULL);
    hear_until(&destination, MOVER_REGION, NULL);
}

static void tear_down(void)
{
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    memd_end_forget(child);
    close(source.fd);
    close(destination.fd);
    if (source.state >= 0)
        close(source.state);
    memd_detach(vmm.vm);
    memd_end_stop(&vmm.memd);
}

TestSuite(agent_mover, .init = set_up, .fini = tear_down, .timeout = 60);

static void begin(uint64_t bandwidth)
{
    set_session(&source, bandwidth);
    set_session(&destination, bandwidth);
    link_both(1);
    cr_assert_eq(ask(&destination, MOVER_EXPECT), 0);
}

static void hand_over(void)
{
    cr_assert_eq(stop(1), 0);
    cr_assert_eq(ask(&source, MOVER_SAVE), 0);
    if (destination.mapped.header.type == 0)
        hear_until(&destination, MOVER_MAPPED, NULL);
    cr_assert_eq(load(), 0);
    cr_assert_eq(ask(&source, MOVER_PUSH), -EPERM, "the guest stands still");
    cr_assert_eq(ask(&source, MOVER_COMMIT), 0);
    cr_assert_eq(ask(&destination, MOVER_RUN), 0);
    cr_assert_eq(ask(&source, MOVER_PUSH), 0);
}

static void assert_moved(void)
{
    int status = 0;

    if (source.proven.header.type == 0)
        hear_until(&source, MOVER_PROVEN, NULL);
    if (destination.proven.header.type == 0)
        hear_until(&destination, MOVER_PROVEN, NULL);
    cr_assert_eq(source.proven.result, 0);
    cr_assert_eq(destination.proven.result, 0);
    cr_assert_eq(source.proven.pages_placed, PAGES);
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert_eq(status, 0, "the destination ended with %d", WEXITSTATUS(status));
}

Test(agent_mover, what_an_agent_says_of_itself)
{
    cr_assert_eq(source.hello.version, MOVER_VERSION);
    cr_assert_eq(source.hello.role, MOVER_SOURCE);
    cr_assert_eq(source.hello.hooks, MOVER_CAN_PAUSE | MOVER_CAN_SAVE);
    cr_assert_eq(source.hello.pages, PAGES);
    cr_assert_eq(source.hello.region_count, 1);
    cr_assert_eq(source.hello.unmanaged_pages, 0);
    cr_assert_eq(source.hello.reason[0], 0);
    cr_assert_eq(destination.hello.role, MOVER_DESTINATION);
}

Test(agent_mover, a_guest_moves)
{
    begin(0);
    hand_over();
    assert_moved();
    cr_assert_eq(vmm.pauses, 1);
    cr_assert_eq(vmm.resumes, 0);
}

Test(agent_mover, what_is_left_is_told_before_the_guest_goes)
{
    begin(0);
    cr_assert_eq(stop(1), 0);
    hear_until(&source, MOVER_PROGRESS, NULL);
    cr_assert_gt(source.pages_left, PAGES / 2);
}

Test(agent_mover, a_guest_moves_after_passes)
{
    begin(0);
    cr_assert_eq(ask(&source, MOVER_START_PRECOPY), 0);
    while (source.passes < 2)
        hear_until(&source, MOVER_PROGRESS, NULL);
    vmm.ram[0] = 0;
    hand_over();
    cr_assert_gt(destination.mapped.pages_have, PAGES / 2);
    assert_moved();
}

Test(agent_mover, a_link_is_cut_after_the_commit)
{
    *may_read = 0;
    begin(2 << 20);
    hand_over();
    for (uint32_t epoch = 1; epoch < 6; epoch++) {
        usleep(20000);
        unlink_both(epoch);
        link_both(epoch + 1);
    }
    __atomic_store_n(may_read, 1, __ATOMIC_RELEASE);
    assert_moved();
}

Test(agent_mover, a_migration_is_called_off_before_the_commit)
{
    begin(0);
    cr_assert_eq(stop(1), 0);
    cr_assert_eq(ask(&source, MOVER_SAVE), 0);
    cr_assert_eq(ask(&source, MOVER_ABORT), 0);
    cr_assert_eq(vmm.resumes, 1);
    cr_assert(is_right());
    cr_assert_eq(ask(&source, MOVER_COMMIT), -EPERM);
    cr_assert(!migration_holds(vmm.vm));
}

Test(agent_mover, nothing_is_called_off_after_the_commit)
{
    begin(0);
    hand_over();
    cr_assert_eq(ask(&source, MOVER_ABORT), -EPERM);
    cr_assert_eq(ask(&source, MOVER_COMMIT), 0);
    cr_assert_eq(vmm.resumes, 0);
    assert_moved();
}

Test(agent_mover, requests_out_of_order_are_refused)
{
    cr_assert_eq(ask(&source, MOVER_START_PRECOPY), -EPERM);
    cr_assert_eq(stop(0), -EPERM);
    cr_assert_eq(ask(&source, MOVER_SAVE), -EPERM);
    cr_assert_eq(ask(&source, MOVER_COMMIT), -EPERM);
    cr_assert_eq(ask(&source, MOVER_EXPECT), -EPERM);
    cr_assert_eq(ask(&source, 99), -EOPNOTSUPP);
    cr_assert_eq(ask(&source, MOVER_SET_SESSION), -EINVAL);
    cr_assert_eq(ask(&destination, MOVER_RUN), -EPERM);
    cr_assert_eq(ask(&destination, MOVER_START_PRECOPY), -EPERM);
    begin(0);
    cr_assert_eq(ask(&destination, MOVER_EXPECT), -EPERM);
    cr_assert_eq(ask(&destination, MOVER_RUN), -EPERM);
}

/* The mover dies, and the links with it or not: the next one learns where things stand. */
Test(agent_mover, another_mover_takes_over)
{
    int ends[2];

    begin(1 << 20);
    hand_over();
    close(source.fd);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    memd_end_give_mover(&vmm.memd, MOVER_SOURCE, ends[1]);
    close(ends[1]);
    source.fd = ends[0];
    hear_until(&source, MOVER_HELLO, NULL);
    cr_assert_eq(source.hello.phase, MOVER_PHASE_COMMITTED);
    cr_assert_eq(source.hello.epoch, 1);
    cr_assert_eq(source.hello.paused, 1);
    cr_assert_arr_eq(source.hello.session, session, sizeof(session));
    assert_moved();
}

Test(agent_mover, without_all_of_the_map_there_is_no_commit)
{
    set_session(&source, 0);
    cr_assert_eq(stop(1), 0);
    cr_assert_lt(ask(&source, MOVER_COMMIT), 0, "there is no link for the map to go by");
    cr_assert_eq(ask(&source, MOVER_ABORT), 0);
    cr_assert_eq(vmm.resumes, 1);
}

/* A link of the source alone, into which the map does not fit while nobody reads. The other end. */
static int link_narrow(void)
{
    struct mover_link link = {{MOVER_LINK, sizeof(link)}, MOVER_BULK, 1};
    int ends[2], least = 0;

    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    cr_assert_eq(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &least, sizeof(least)), 0);
    cr_assert_eq(ask_with(&source, &link, sizeof(link), ends[0]), 0);
    close(ends[0]);
    return ends[1];
}

static void say_plain(uint32_t type)
{
    struct mover_plain plain = {{type, sizeof(plain)}};
    struct rpc rpc = {.fd = source.fd};

    cr_assert_eq(rpc_send(&rpc, &plain, sizeof(plain), -1), 0);
}

Test(agent_mover, a_commit_that_waits_for_the_map_is_overtaken)
{
    struct mover_done done = {0};
    int reader;

    set_session(&source, 0);
    reader = link_narrow();
    cr_assert_eq(stop(1), 0);
    say_plain(MOVER_COMMIT);
    say_plain(MOVER_ABORT);
    hear_until(&source, MOVER_DONE, &done);
    cr_assert_eq(done.what, MOVER_ABORT, "it has committed to what the destination has not got");
    cr_assert_eq(done.result, 0);
    cr_assert_eq(vmm.resumes, 1);
    close(reader);
}

/* Its mover has died with the question: nobody has heard an answer, and the next one may abort. */
Test(agent_mover, a_commit_that_nobody_waits_for_is_none)
{
    char room[4096];
    int ends[2], reader;

    set_session(&source, 0);
    reader = link_narrow();
    cr_assert_eq(stop(1), 0);
    say_plain(MOVER_COMMIT);
    close(source.fd);
    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    memd_end_give_mover(&vmm.memd, MOVER_SOURCE, ends[1]);
    close(ends[1]);
    source.fd = ends[0];
    hear_until(&source, MOVER_REGION, NULL);
    cr_assert_eq(source.hello.phase, MOVER_PHASE_STOPPED);
    while (__atomic_load_n(&vmm.vm->migration.mapping, __ATOMIC_ACQUIRE))
        (void)!recv(reader, room, sizeof(room), MSG_DONTWAIT);
    cr_assert_eq(ask(&source, MOVER_ABORT), 0, "the guest can run nowhere any more");
    cr_assert_eq(vmm.resumes, 1);
    close(reader);
}

/* Nobody is there to end it: the guest is not left paused. (It takes MOVER_PATIENCE_S.) */
Test(agent_mover, a_mover_that_is_gone_before_the_commit)
{
    begin(0);
    cr_assert_eq(stop(1), 0);
    close(source.fd);
    while (__atomic_load_n(&vmm.resumes, __ATOMIC_ACQUIRE) == 0)
        usleep(10000);
    cr_assert(is_right());
    source.fd = -1;
}
