/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's decoder of a mover, and of the host behind it, at the source of a migration. A mover
 * hears strangers, so the agent trusts it with its time and with whether the guest goes on, but
 * never with the guest's bytes: whatever the input makes mover and peer say, every page of the
 * guest holds afterwards what it held before. The migration's threads and the fault handler are the
 * real ones.
 */
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"
#include "guest.h"
#include "remap.h"
#include "send_with.h"
#include "wire.h"

#define ANSWER 20 /* ms; what is no request gets none */

enum step {
    STEP_RAW,
    STEP_SESSION,
    STEP_LINK,
    STEP_PLAIN,
    STEP_STOP,
    STEP_TUNE,
    STEP_PEER,
    STEP_CUT,
    STEP_WRITE,
    STEP_MOVER,
    STEP_COUNT
};

/* Session, both links, stop, commit; a request of the peer in between. */
static const uint8_t seed_moves[] = {STEP_SESSION, 1, 0, STEP_LINK, 0, 1, STEP_LINK, 1, 1,
                                     STEP_STOP,    0, 1, STEP_PEER, 0, 0, 3,         0, STEP_PLAIN,
                                     MOVER_COMMIT};
static const uint8_t seed_precopy[] = {STEP_SESSION,
                                       1,
                                       0,
                                       STEP_LINK,
                                       1,
                                       1,
                                       STEP_LINK,
                                       0,
                                       1,
                                       STEP_PLAIN,
                                       MOVER_START_PRECOPY,
                                       STEP_WRITE,
                                       9,
                                       0,
                                       4,
                                       STEP_CUT,
                                       1,
                                       STEP_PLAIN,
                                       MOVER_ABORT};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    const uint8_t *seed = number == 0 ? seed_moves : seed_precopy;
    size_t bytes = number == 0 ? sizeof(seed_moves) : sizeof(seed_precopy);

    if (number > 1 || bytes > room)
        return 0;
    memcpy(into, seed, bytes);
    return bytes;
}

static struct memd_vm *const vm = &fuzz_guest.vm;
static int mover_fd;
static int peers[MOVER_CHANNELS] = {-1, -1}; /* the other host's ends */

/* ---- the mover ---- */

static void come(void)
{
    int fds[2];

    FUZZ_REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    mover_fd = fds[1];
    migration_take_mover(vm, MOVER_SOURCE, fds[0]);
}

/* Reads until the answer to `what` (0: whatever there is). The peer reads as well, or the agent's
 * bulk waits for it for ever. */
static void read_answers(uint32_t what)
{
    static uint8_t bytes[65536];
    struct pollfd polled = {.fd = mover_fd, .events = POLLIN};

    do {
        struct mover_done done = {.what = 0};
        ssize_t got;

        for (int c = 0; c < MOVER_CHANNELS; c++)
            while (peers[c] >= 0 && recv(peers[c], bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
                ;
        got = recv(mover_fd, bytes, sizeof(bytes), MSG_DONTWAIT);
        if (got == 0)
            return;
        if (got < 0)
            continue;
        memcpy(&done, bytes, (size_t)got < sizeof(done) ? (size_t)got : sizeof(done));
        if (done.header.type == MOVER_DONE && done.what == what)
            return;
    } while (poll(&polled, 1, what ? ANSWER : 0) > 0);
}

static void say(const void *message, size_t bytes, int fd)
{
    uint32_t what = 0;

    memcpy(&what, message, bytes < sizeof(what) ? bytes : sizeof(what));
    (void)send_with(mover_fd, message, bytes, &fd, fd >= 0, 0);
    read_answers(what);
}

static void say_raw(struct fuzz_input *input)
{
    uint8_t message[MOVER_MAX_MESSAGE + 64] = {0};
    struct mover_header header = {.type = fuzz_take_u8(input) % 36};
    size_t bytes = fuzz_take_u16(input) % sizeof(message);
    uint8_t lies = fuzz_take_u8(input);

    fuzz_take(input, message + sizeof(header), 24);
    header.bytes = lies & 1 ? fuzz_take_u32(input) : (uint32_t)bytes;
    memcpy(message, &header, sizeof(header));
    say(message, bytes, lies & 2 ? vm->stop_fd : -1);
}

static void say_session(struct fuzz_input *input)
{
    struct mover_session session = {.header = {MOVER_SET_SESSION, sizeof(session)}};

    session.session[0] = fuzz_take_u8(input);
    session.tuning.switches = fuzz_take_u8(input);
    say(&session, sizeof(session), -1);
}

static void hang_up(uint32_t channel)
{
    if (peers[channel] >= 0)
        close(peers[channel]);
    peers[channel] = -1;
}

static void say_link(struct fuzz_input *input)
{
    struct mover_link link = {{MOVER_LINK, sizeof(link)}, fuzz_take_u8(input), fuzz_take_u8(input)};
    int fds[2];

    FUZZ_REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    if (link.channel < MOVER_CHANNELS) {
        hang_up(link.channel);
        peers[link.channel] = fds[1];
    } else {
        close(fds[1]);
    }
    say(&link, sizeof(link), fds[0]);
    close(fds[0]);
}

static void say_plain(struct fuzz_input *input)
{
    struct mover_plain plain = {{fuzz_take_u8(input), sizeof(plain)}};

    say(&plain, sizeof(plain), -1);
}

static void say_stop(struct fuzz_input *input)
{
    struct mover_stop stop = {
        {MOVER_STOP, sizeof(stop)}, fuzz_take_u8(input) % 2, fuzz_take_u8(input) % 2};

    say(&stop, sizeof(stop), -1);
}

static void say_tuning(struct fuzz_input *input)
{
    struct mover_tune_message tune = {.header = {MOVER_TUNE, sizeof(tune)}};

    tune.tuning.bandwidth = fuzz_take_u8(input) ? 64ULL << 20 : 0;
    tune.tuning.switches = fuzz_take_u8(input);
    say(&tune, sizeof(tune), -1);
}

/* ---- the other host ---- */

/* A frame on one of the connections, or bytes that are none. */
static void say_as_peer(struct fuzz_input *input)
{
    uint32_t channel = fuzz_take_u8(input) % MOVER_CHANNELS;
    uint8_t kind = fuzz_take_u8(input);
    uint8_t frame[WIRE_HEADER_BYTES + 32] = {0};
    uint32_t count = fuzz_take_u8(input);
    uint64_t page = fuzz_take_u8(input) * 5U;

    wire_write_header(frame, (enum wire_type)(WIRE_WANT + kind % 5), count, page);
    fuzz_take(input, frame + WIRE_HEADER_BYTES, kind & 64 ? 16 : 0);
    if (kind & 128)
        fuzz_take(input, frame, WIRE_HEADER_BYTES);
    if (peers[channel] >= 0)
        (void)send(peers[channel], frame, WIRE_HEADER_BYTES + (kind & 64 ? 16 : 0), MSG_NOSIGNAL);
    read_answers(0);
}

static void write_page(struct fuzz_input *input)
{
    uint32_t page = fuzz_take_u16(input) % PAGES;

    fuzz_guest_write(page, 1U + fuzz_take_u8(input));
}

static void take_step(struct fuzz_input *input)
{
    switch (fuzz_take_u8(input) % STEP_COUNT) {
    case STEP_RAW: say_raw(input); break;
    case STEP_SESSION: say_session(input); break;
    case STEP_LINK: say_link(input); break;
    case STEP_PLAIN: say_plain(input); break;
    case STEP_STOP: say_stop(input); break;
    case STEP_TUNE: say_tuning(input); break;
    case STEP_PEER: say_as_peer(input); break;
    case STEP_CUT: hang_up(fuzz_take_u8(input) % MOVER_CHANNELS); break;
    case STEP_WRITE: write_page(input); break;
    default: close(mover_fd); come();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct fuzz_input input = {data, data + bytes};

    if (bytes > 256)
        return 0;
    /* A fifth of the pages was never touched. */
    if (fuzz_guest_start())
        for (uint32_t i = 0; i < PAGES; i++)
            if (i % 5)
                fuzz_guest_write(i, i + 1);
    come();
    while (input.at < input.end)
        take_step(&input);
    for (uint32_t c = 0; c < MOVER_CHANNELS; c++)
        hang_up(c);
    close(mover_fd);
    /* The agent ends, and another one has the same guest. */
    migration_close(vm);
    FUZZ_REQUIRE(!vm->migration.have_outgoing && !vm->migration.have_incoming);
    memset(&vm->migration, 0, sizeof(vm->migration));
    fuzz_guest_check();
    FUZZ_REQUIRE(fuzz_guest.block->counts[PLACE_REMOTE] == 0);
    return 0;
}
