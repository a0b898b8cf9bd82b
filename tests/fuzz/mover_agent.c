/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the agent of a VMM and memd say to a mover, before it has met the other host: START, the
 * agent's greeting, and whatever else comes. It may give up, but keeps no descriptor that it was
 * given and has no use for.
 */
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"
#include "mover.h"
#include "send_with.h"

enum step { STEP_HELLO, STEP_REGION, STEP_DONE, STEP_RAW, STEP_ORDER, STEP_COUNT };

static const uint8_t seed_source[] = {0,           STEP_HELLO, 1,         0,  3, 1,
                                      STEP_REGION, 4,          STEP_DONE, 21, 0, 1};
static const uint8_t seed_takes_over[] = {3, STEP_HELLO, 2, 6, 3, 1, STEP_REGION, 4, STEP_ORDER, 3};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    const uint8_t *seed = number == 0 ? seed_source : seed_takes_over;
    size_t bytes = number == 0 ? sizeof(seed_source) : sizeof(seed_takes_over);

    if (number > 1 || bytes > room)
        return 0;
    memcpy(into, seed, bytes);
    return bytes;
}

static struct mover mover;
static int memd, agent; /* our ends */

#define DESCRIPTORS 64 /* more than there can be here */

static uint32_t count_open(void)
{
    uint32_t count = 0;

    for (int fd = 0; fd < DESCRIPTORS; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void make_pair(int *ret_ours, int *ret_movers)
{
    int fds[2];

    FUZZ_REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    *ret_ours = fds[0];
    *ret_movers = fds[1];
}

/* With as many descriptors as it says; they are all one. */
static void say(int to, const void *message, size_t bytes, uint32_t fd_count)
{
    int fds[] = {memd, memd, memd, memd};

    (void)send_with(to, message, bytes, fds, fd_count % 5, MSG_DONTWAIT);
}

/* START, and where it is good what the agent's connection is made of. */
static bool start(struct fuzz_input *input)
{
    struct order_start order = {.header = {ORDER_START, sizeof(order)}, .version = ORDERS_VERSION};
    uint8_t flags = fuzz_take_u8(input);
    int fds[2];

    order.role = flags & 1 ? MOVER_DESTINATION : MOVER_SOURCE;
    order.takes_over = flags >> 1 & 1;
    order.plain = 1;
    if (flags & 4)
        memset(order.host, 'x', sizeof(order.host));
    make_pair(&memd, &mover.memd);
    make_pair(&agent, &fds[0]);
    fds[1] = memd;
    (void)send_with(memd, &order, flags & 8 ? flags : sizeof(order),
                    flags & 1 ? (int[]){memd, fds[0], memd} : (int[]){memd, fds[0]},
                    flags & 16 ? flags % 3 : (flags & 1 ? 3 : 2), MSG_DONTWAIT);
    close(fds[0]);
    return orders_receive_start(&mover) == 0 && mover.agent >= 0;
}

static void say_hello(struct fuzz_input *input)
{
    struct mover_hello hello = {
        .header = {MOVER_HELLO, sizeof(hello)}, .version = MOVER_VERSION, .page_bytes = PAGE_BYTES};
    uint8_t odd;

    hello.role = fuzz_take_u8(input);
    hello.phase = fuzz_take_u8(input);
    hello.hooks = fuzz_take_u8(input);
    hello.region_count = fuzz_take_u8(input);
    odd = fuzz_take_u8(input);
    if (odd & 1)
        memset(hello.reason, 'x', sizeof(hello.reason));
    if (odd & 2)
        hello.region_count = fuzz_take_u32(input);
    hello.proven = odd >> 2 & 1;
    say(agent, &hello, sizeof(hello), odd >> 4 & 3);
}

static void say_region(struct fuzz_input *input)
{
    struct mover_region region = {.header = {MOVER_REGION, sizeof(region)}};

    region.index = fuzz_take_u8(input);
    region.pages = fuzz_take_u8(input);
    say(agent, &region, sizeof(region), region.index >> 4);
}

static void say_done(struct fuzz_input *input)
{
    struct mover_done done = {.header = {MOVER_DONE, sizeof(done)}};
    uint8_t odd;

    done.what = fuzz_take_u8(input);
    done.result = -(int32_t)fuzz_take_u8(input);
    odd = fuzz_take_u8(input);
    done.value = odd & 4 ? fuzz_take_u64(input) : 100;
    say(agent, &done, sizeof(done), odd & 3);
}

static void say_raw(struct fuzz_input *input, int to)
{
    static uint8_t message[MOVER_MAX_MESSAGE];
    struct mover_header header = {.type = fuzz_take_u8(input) % 10};
    size_t bytes = fuzz_take_u16(input) % sizeof(message);
    uint8_t count = fuzz_take_u8(input);

    memset(message, 0, sizeof(message));
    fuzz_take(input, message, 64);
    header.bytes = (uint32_t)bytes;
    memcpy(message, &header, sizeof(header));
    say(to, message, bytes, count % 4);
}

static void take_step(struct fuzz_input *input)
{
    switch (fuzz_take_u8(input) % STEP_COUNT) {
    case STEP_HELLO: say_hello(input); break;
    case STEP_REGION: say_region(input); break;
    case STEP_DONE: say_done(input); break;
    case STEP_ORDER: say_raw(input, memd); break;
    default: say_raw(input, agent);
    }
    agent_read(&mover);
    orders_read(&mover);
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct fuzz_input input = {data, data + bytes};
    uint32_t before = count_open();

    if (bytes > 1024)
        return 0;
    mover = (struct mover){.memd = -1,
                           .memd_listener = -1,
                           .agent = -1,
                           .monitor = -1,
                           .listener = -1,
                           .first = -1,
                           .state = {.fd = -1}};
    connect_init(&mover);
    mover.began_ns = mover.now_ns = 1000000000;
    if (start(&input))
        while (input.at < input.end)
            take_step(&input);
    FUZZ_REQUIRE(memchr(mover.words, 0, sizeof(mover.words)));
    connect_drop(&mover);
    close_fd(mover.memd);
    close_fd(mover.memd_listener);
    close_fd(mover.agent);
    close_fd(mover.monitor);
    close_fd(mover.listener);
    close_fd(mover.first);
    close_fd(mover.state.fd);
    close(memd);
    close(agent);
    FUZZ_REQUIRE(count_open() == before);
    return 0;
}
