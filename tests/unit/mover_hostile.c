/* SPDX-License-Identifier: Apache-2.0 */
/* What another host may say to a mover that it should not: garbage, lies, what was said before,
 * and too much of everything. */
#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mover_world.h"
#include "peer.h"

#define MACHINE 62U /* EM_X86_64 */

TestSuite(mover_hostile, .fini = world_kill_all);

static int dial(uint16_t port)
{
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    cr_assert_eq(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static void say(int fd, const void *bytes, size_t count)
{
    (void)send(fd, bytes, count, MSG_NOSIGNAL);
}

static void greet(int fd, enum peer_channel channel, uint32_t epoch, uint8_t session)
{
    struct peer_greeting greeting = {.channel = channel, .epoch = epoch};
    uint8_t bytes[PEER_GREETING_BYTES];

    memset(greeting.session, session, sizeof(greeting.session));
    peer_greeting_encode(&greeting, bytes);
    say(fd, bytes, sizeof(bytes));
}

/* The verdict, or -1: the connection has ended without one. */
static int hear_verdict(struct world *world, int fd)
{
    uint8_t bytes[PEER_GREETING_BYTES];
    struct peer_greeting greeting;
    size_t have = 0;

    for (int i = 0; i < 5000; i++) {
        ssize_t got = recv(fd, bytes + have, sizeof(bytes) - have, MSG_DONTWAIT);

        if (got == 0 || (got < 0 && errno != EAGAIN))
            return -1;
        have += got > 0 ? (size_t)got : 0;
        if (have == sizeof(bytes))
            return peer_greeting_decode(bytes, &greeting) ? -1 : (int)greeting.verdict;
        world_turn(world, 2);
    }
    cr_assert_fail("no answer to a greeting");
    return -1;
}

static void say_frame(int fd, const struct peer_frame *frame)
{
    static uint8_t bytes[PEER_FRAME_MAX];

    say(fd, bytes, peer_frame_encode(frame, bytes));
}

static struct peer_frame good_hello(void)
{
    return (struct peer_frame){.type = PEER_HELLO,
                               .hello = {.version = PEER_VERSION,
                                         .machine = MACHINE,
                                         .page_bytes = 4096,
                                         .vmm = "test",
                                         .name = "moved",
                                         .region_count = 1,
                                         .regions = {{0, 4096}}}};
}

static bool destination_gave_up(struct world *world)
{
    return world->destination.status.outcome == ORDER_SOURCE_RUNS;
}

Test(mover_hostile, garbage_begins_nothing, .timeout = 60)
{
    for (unsigned seed = 0; seed < 8; seed++) {
        struct world world;
        uint8_t garbage[4096];
        int fd;

        srandom(seed);
        for (size_t i = 0; i < sizeof(garbage); i++)
            garbage[i] = (uint8_t)random();
        world_open(&world, seed % 2);
        fd = dial(world.port);
        say(fd, garbage, sizeof(garbage));
        world_until(&world, "it gave up", destination_gave_up);
        cr_assert_eq(world.destination.needs, 0);
        close(fd);
        world_close(&world);
    }
}

/* After a good greeting: frames that have no place there. None starts a VMM or lets a guest run. */
Test(mover_hostile, frames_out_of_their_place_end_it, .timeout = 120)
{
    for (enum peer_type type = PEER_OK; type < PEER_TYPE_END; type++) {
        struct peer_frame frame = {.type = type, .port = 1};
        struct world world;
        int fd;

        if (type == PEER_PING)
            continue;
        if (type == PEER_STATE)
            frame.state = (struct peer_state){0, 1, (const uint8_t *)"x", 1};
        if (type == PEER_RESUME)
            frame.stand = PEER_COMMITTED;
        if (type == PEER_REFUSED || type == PEER_ABORT || type == PEER_PROVEN)
            memset(&frame.words, 0, sizeof(frame.words));
        world_open(&world, false);
        fd = dial(world.port);
        greet(fd, PEER_CONTROL, 1, 7);
        cr_assert_eq(hear_verdict(&world, fd), PEER_WELCOME);
        say_frame(fd, &frame);
        world_until(&world, "it gave up", destination_gave_up);
        cr_assert_eq(world.destination.needs, 0, "frame %u", type);
        cr_assert_eq(world.destination.asked[MOVER_RUN], 0);
        close(fd);
        world_close(&world);
    }
}

static bool refused_with(struct world *world, int fd, const char *words)
{
    static uint8_t bytes[4 * PEER_FRAME_MAX];
    static struct peer_frame frame;
    size_t have = 0;

    for (int i = 0; i < 5000; i++) {
        ssize_t got = recv(fd, bytes + have, sizeof(bytes) - have, MSG_DONTWAIT);
        int size;

        if (got == 0 || (got < 0 && errno != EAGAIN))
            return false;
        have += got > 0 ? (size_t)got : 0;
        while ((size = peer_frame_size(bytes, have)) > 0) {
            if (peer_frame_decode(bytes, (size_t)size, &frame) == 0 && frame.type == PEER_REFUSED)
                return strstr(frame.words.text, words) != NULL;
            have -= (size_t)size;
            memmove(bytes, bytes + size, have);
        }
        world_turn(world, 2);
    }
    return false;
}

Test(mover_hostile, other_kinds_of_host_are_refused_by_name, .timeout = 60)
{
    static const struct {
        uint32_t version, machine, page_bytes;
        const char *words;
    } others[] = {{PEER_VERSION + 1, MACHINE, 4096, "versions"},
                  {PEER_VERSION, MACHINE + 1, 4096, "architectures"},
                  {PEER_VERSION, MACHINE, 65536, "pages of different sizes"}};

    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
        struct peer_frame hello = good_hello();
        struct world world;
        int fd;

        hello.hello.version = others[i].version;
        hello.hello.machine = others[i].machine;
        hello.hello.page_bytes = others[i].page_bytes;
        world_open(&world, false);
        fd = dial(world.port);
        greet(fd, PEER_CONTROL, 1, 7);
        cr_assert_eq(hear_verdict(&world, fd), PEER_WELCOME);
        say_frame(fd, &hello);
        cr_assert(refused_with(&world, fd, others[i].words), "%s", others[i].words);
        world_until(&world, "it gave up", destination_gave_up);
        cr_assert_eq(world.destination.needs, 0);
        close(fd);
        world_close(&world);
    }
}

static bool destination_links(struct world *world)
{
    return world->destination.asked[MOVER_SET_SESSION] > 0;
}

/* It has a VMM, and is told to run a guest of which nothing has come. */
Test(mover_hostile, go_without_a_guest_runs_nothing, .timeout = 60)
{
    struct peer_frame hello = good_hello(), go = {.type = PEER_GO};
    struct world world;
    int fd;

    world_open(&world, false);
    fd = dial(world.port);
    greet(fd, PEER_CONTROL, 1, 7);
    cr_assert_eq(hear_verdict(&world, fd), PEER_WELCOME);
    say_frame(fd, &hello);
    world_until(&world, "its VMM is there", destination_links);
    say_frame(fd, &go);
    world_until(&world, "it gave up", destination_gave_up);
    cr_assert_eq(world.destination.asked[MOVER_RUN], 0);
    close(fd);
    world_close(&world);
}

static bool destination_runs(struct world *world)
{
    return world->destination.phase == MOVER_PHASE_RUNNING;
}

static bool both_completed(struct world *world)
{
    return world->source.status.outcome == ORDER_COMPLETED &&
           world->destination.status.outcome == ORDER_COMPLETED;
}

/* Whoever does not know the session, or repeats what was heard of it, gets no connection, and the
 * migration goes on as if nobody had come. */
Test(mover_hostile, strangers_and_replays_get_no_connection, .timeout = 60)
{
    static const struct {
        enum peer_channel channel;
        uint32_t epoch;
        uint8_t session;
        enum peer_verdict verdict;
    } tries[] = {{PEER_CONTROL, 2, 8, PEER_OTHER_SESSION}, {PEER_URGENT, 1, 8, PEER_OTHER_SESSION},
                 {PEER_CONTROL, 1, 7, PEER_OLD_EPOCH},     {PEER_URGENT, 1, 7, PEER_OLD_EPOCH},
                 {PEER_BULK, 1, 7, PEER_OLD_EPOCH},        {PEER_BULK, 0, 7, PEER_OLD_EPOCH},
                 {PEER_URGENT, 9, 7, PEER_OLD_EPOCH}};
    struct world world;

    world_open(&world, false);
    world_begin(&world);
    world_until(&world, "the guest runs at the destination", destination_runs);
    for (size_t i = 0; i < sizeof(tries) / sizeof(tries[0]); i++) {
        int fd = dial(world.data_port);

        greet(fd, tries[i].channel, tries[i].epoch, tries[i].session);
        cr_assert_eq(hear_verdict(&world, fd), (int)tries[i].verdict, "try %zu", i);
        close(fd);
    }
    say(world.destination.links[MOVER_URGENT], "want", 4);
    world_until(&world, "both sides completed", both_completed);
    cr_assert_eq(world.source.status.reconnects, 0);
    world_close(&world);
}

/* More connections than there is room for say nothing, and a cut is repaired nevertheless. */
Test(mover_hostile, flood_of_silent_connections_keeps_nobody_out, .timeout = 60)
{
    struct world world;
    int fds[12];

    world_open(&world, false);
    world_begin(&world);
    world_until(&world, "the guest runs at the destination", destination_runs);
    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
        fds[i] = dial(world.data_port);
    world_cut(&world.source);
    world_until(&world, "both sides completed", both_completed);
    cr_assert_geq(world.source.status.reconnects, 1);
    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
        close(fds[i]);
    world_close(&world);
}
