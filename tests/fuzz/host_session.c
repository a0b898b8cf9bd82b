/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memd's decoder of an agent: messages, descriptors, ring entries, the ring's own counters. The
 * input is a program of small steps, honest and dishonest, so that lies come in the middle of
 * something. Whatever happens, memd's own books must add up, and nothing is left afterwards.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "host.h"
#include "member.h"
#include "send_with.h"
#include "session.h"

#define PAGES 64U

struct agent {
    int fd;
    struct ring *ring;
    uint32_t head, tail;
    struct hash_secret secret;
    struct guest *guest;
    uint32_t buffer;
    uint64_t last_slot;
    uint32_t last_page;
};

enum step {
    STEP_RAW_MESSAGE,
    STEP_RAW_ENTRY,
    STEP_OFFER,
    STEP_ANSWER,
    STEP_RAM,
    STEP_STATS,
    STEP_HEAD,
    STEP_DESCRIPTOR,
    STEP_BROKEN,
    STEP_RAM_GONE,
    STEP_HELD,
    STEP_TURN,
    STEP_OFFER_ALL,
    STEP_COUNT
};

static const uint8_t seed_steps[][8] = {
    {STEP_RAM, STEP_OFFER_ALL, STEP_ANSWER, STEP_ANSWER, STEP_TURN, STEP_ANSWER, STEP_STATS,
     STEP_ANSWER},
    {STEP_RAM, STEP_OFFER_ALL, STEP_ANSWER, STEP_ANSWER, STEP_ANSWER, STEP_BROKEN, STEP_ANSWER,
     STEP_RAM_GONE},
    {STEP_RAM, STEP_OFFER, 1, 7, STEP_OFFER, 2, 7, STEP_ANSWER},
    {STEP_RAM, STEP_RAW_ENTRY, RING_PASS, 0, 0, 0, 0, STEP_HELD},
    {STEP_RAM, STEP_DESCRIPTOR, STEP_HEAD, 1, 0, 0, 0, STEP_TURN},
};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    if (number >= sizeof(seed_steps) / sizeof(seed_steps[0]) || room < sizeof(seed_steps[0]))
        return 0;
    memcpy(into, seed_steps[number], sizeof(seed_steps[0]));
    return sizeof(seed_steps[0]);
}

/* ---- the agent ---- */

static void content_of(uint32_t color, uint8_t *into)
{
    memset(into, 0, PAGE_BYTES);
    for (size_t i = 0; i < PAGE_BYTES; i += 64)
        memcpy(into + i, &color, sizeof(color));
}

static uint64_t hash_of(const struct agent *agent, uint32_t color)
{
    _Alignas(64) uint8_t page[PAGE_BYTES];

    content_of(color, page);
    return hash_page(&agent->secret, page);
}

static void say(const struct agent *agent, const void *message, size_t bytes, int fd)
{
    (void)send_with(agent->fd, message, bytes, &fd, fd >= 0, 0);
    fuzz_turn();
}

static void ring_bell(const struct agent *agent)
{
    struct message_plain bell = {{MESSAGE_DOORBELL, sizeof(bell)}};

    say(agent, &bell, sizeof(bell), -1);
}

static void put(struct agent *agent, uint32_t op, uint32_t page, uint64_t arg)
{
    uint32_t room = ring_room(&agent->ring->to_memd, agent->head);

    if (room == 0 || room > RING_ENTRIES)
        ring_bell(agent);
    ring_put(&agent->ring->to_memd, &agent->head, (struct ring_entry){op, page, arg});
}

/* One message of memd's; false: there is none. */
static bool receive(struct agent *agent, struct message_welcome *ret_welcome, int *ret_ring)
{
    _Alignas(8) uint8_t message[1024];
    char control[CMSG_SPACE(sizeof(int) * 4)];
    struct iovec piece = {message, sizeof(message)};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = control,
                            .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(agent->fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    const struct message_header *front = (const void *)message;
    int fds[4] = {-1, -1, -1, -1};

    if (got <= 0)
        return false;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&header); part; part = CMSG_NXTHDR(&header, part))
        memcpy(fds, CMSG_DATA(part), part->cmsg_len - CMSG_LEN(0));
    FUZZ_REQUIRE(front->bytes == (uint32_t)got);
    if (front->type == MESSAGE_WELCOME && ret_welcome) {
        memcpy(ret_welcome, message, sizeof(*ret_welcome));
        *ret_ring = fds[0];
        fds[0] = -1;
    }
    for (int i = 0; i < 4; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
    }
    return true;
}

static bool greet(struct agent *agent)
{
    struct message_hello hello = {.header = {MESSAGE_HELLO, sizeof(hello)},
                                  .magic = PROTOCOL_MAGIC,
                                  .version = PROTOCOL_VERSION,
                                  .features = FEATURE_SHARE,
                                  .page_bytes = PAGE_BYTES,
                                  .vmm = "fuzz"};
    struct message_welcome welcome = {.ring_bytes = 0};
    int ring_fd = -1;

    *agent = (struct agent){.guest = fuzz_register("fuzzed")};
    agent->fd = fuzz_connect(SOCK_SEQPACKET, ".agent");
    memcpy(hello.token, agent->guest->token, PROTOCOL_TOKEN_BYTES);
    say(agent, &hello, sizeof(hello), -1);
    for (int i = 0; i < 100 && ring_fd < 0; i++) {
        fuzz_turn();
        (void)receive(agent, &welcome, &ring_fd);
    }
    FUZZ_REQUIRE(ring_fd >= 0);
    agent->secret = welcome.secret;
    agent->ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, ring_fd, 0);
    FUZZ_REQUIRE(agent->ring != MAP_FAILED);
    close(ring_fd);
    return true;
}

/* ---- steps ---- */

static void raw_message(struct agent *agent, struct fuzz_input *input)
{
    static const uint32_t sizes[] = {0,
                                     4,
                                     sizeof(struct message_plain),
                                     sizeof(struct message_segment),
                                     sizeof(struct message_ram_gone),
                                     sizeof(struct message_ram),
                                     sizeof(struct message_stats),
                                     sizeof(struct message_hello),
                                     1024,
                                     1025,
                                     2000};
    static uint8_t message[2048];
    struct message_header header;
    size_t bytes = sizes[fuzz_take_u8(input) % (sizeof(sizes) / sizeof(sizes[0]))];
    uint8_t flags = fuzz_take_u8(input);

    memset(message, 0, sizeof(message));
    fuzz_take(input, message, bytes < 64 ? bytes : 64);
    header.type = flags & 1 ? MESSAGE_HELLO + (flags >> 1) % 16 : flags;
    header.bytes = flags & 0x40 ? fuzz_take_u32(input) : (uint32_t)bytes;
    memcpy(message, &header, bytes < sizeof(header) ? bytes : sizeof(header));
    say(agent, message, bytes, -1);
}

/* To everything that memd has written, the answer that an honest agent gives, or nearly. */
static void answer(struct agent *agent, struct fuzz_input *input)
{
    uint8_t honesty = fuzz_take_u8(input);

    fuzz_turn();
    while (receive(agent, NULL, NULL))
        ;
    for (int i = 0; i < 64 && ring_filled(&agent->ring->to_agent, agent->tail); i++) {
        struct ring_entry entry = ring_peek(&agent->ring->to_agent, agent->tail);

        ring_release(&agent->ring->to_agent, &agent->tail);
        FUZZ_REQUIRE(entry.op == RING_WANT || entry.op == RING_MERGE || entry.op == RING_REMAP);
        agent->last_page = entry.page;
        if (entry.op == RING_WANT) {
            agent->buffer = (agent->buffer + 1) % RING_PAGE_BUFFERS;
            content_of(entry.page / 2 + 1, agent->ring->pages[agent->buffer]);
            put(agent, honesty & 1 ? RING_STALE : RING_PAGE, entry.page, agent->buffer);
        } else {
            agent->last_slot = entry.arg;
            put(agent, honesty & 2 ? RING_NOT_MERGED : RING_MERGED, entry.page,
                honesty & 2 ? entry.arg | (uint64_t)(honesty >> 2) << 32 : entry.arg);
        }
        if (i % 8 == 7)
            ring_bell(agent);
    }
    ring_bell(agent);
    for (int i = 0; i < 4; i++)
        fuzz_let_pass(60000000);
}

static void say_ram(struct agent *agent, struct fuzz_input *input)
{
    uint8_t odd = fuzz_take_u8(input);
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)},
                              .first_page = 0,
                              .pages = PAGES,
                              .hva = 0x7f0000000000,
                              .managed = 1};

    if (odd & 1)
        ram.first_page = fuzz_take_u32(input);
    if (odd & 2)
        ram.pages = fuzz_take_u32(input) & 0x800fffff;
    if (odd & 4)
        ram.hva = fuzz_take_u64(input);
    if (odd & 8)
        ram.managed = fuzz_take_u8(input);
    fuzz_take(input, ram.reason, odd & 16 ? sizeof(ram.reason) : 0);
    say(agent, &ram, sizeof(ram), -1);
}

static void say_stats(struct agent *agent, struct fuzz_input *input)
{
    struct message_stats stats = {.header = {MESSAGE_STATS, sizeof(stats)}};

    fuzz_take(input, (uint8_t *)&stats + sizeof(stats.header), 24);
    stats.state %= 4;
    fuzz_take(input, stats.reason, 16);
    say(agent, &stats, sizeof(stats), -1);
}

static void move_head(struct agent *agent, struct fuzz_input *input)
{
    agent->head = fuzz_take_u32(input);
    __atomic_store_n(&agent->ring->to_memd.head, agent->head, __ATOMIC_RELEASE);
    if (fuzz_take_u8(input) & 1)
        __atomic_store_n(&agent->ring->to_agent.tail, fuzz_take_u32(input), __ATOMIC_RELEASE);
    ring_bell(agent);
}

static void send_descriptor(struct agent *agent, struct fuzz_input *input)
{
    uint32_t types[] = {MESSAGE_HELD, MESSAGE_DOORBELL, MESSAGE_HELLO, fuzz_take_u8(input)};
    struct message_segment held = {.header = {types[fuzz_take_u8(input) % 4], sizeof(held)},
                                   .segment = fuzz_take_u8(input),
                                   .pages = fuzz_take_u8(input)};
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);

    say(agent, &held, sizeof(held), fd);
    close(fd);
}

static void say_segment(struct agent *agent, struct fuzz_input *input)
{
    struct message_segment message = {{MESSAGE_DROPPED, sizeof(message)}, fuzz_take_u8(input), 1};
    struct message_plain end = {
        {fuzz_take_u8(input) & 1 ? MESSAGE_HELD_END : MESSAGE_DETACHED, sizeof(end)}};

    say(agent, &message, sizeof(message), -1);
    say(agent, &end, sizeof(end), -1);
}

static void take_step(struct agent *agent, struct fuzz_input *input)
{
    struct message_ram_gone gone = {{MESSAGE_RAM_GONE, sizeof(gone)}, 0, PAGES};

    switch (fuzz_take_u8(input) % STEP_COUNT) {
    case STEP_RAW_MESSAGE: raw_message(agent, input); break;
    case STEP_RAW_ENTRY: {
        uint32_t op = fuzz_take_u8(input), page = fuzz_take_u16(input);
        put(agent, op, page, fuzz_take_u64(input));
        break;
    }
    case STEP_OFFER: {
        uint32_t page = fuzz_take_u8(input);
        put(agent, RING_OFFER, page, hash_of(agent, fuzz_take_u8(input)));
        break;
    }
    case STEP_OFFER_ALL:
        for (uint32_t page = 0; page < PAGES; page++)
            put(agent, RING_OFFER, page, hash_of(agent, page / 2 + 1));
        ring_bell(agent);
        break;
    case STEP_ANSWER: answer(agent, input); break;
    case STEP_RAM: say_ram(agent, input); break;
    case STEP_STATS: say_stats(agent, input); break;
    case STEP_HEAD: move_head(agent, input); break;
    case STEP_DESCRIPTOR: send_descriptor(agent, input); break;
    case STEP_BROKEN: put(agent, RING_BROKEN, agent->last_page, agent->last_slot); break;
    case STEP_RAM_GONE: say(agent, &gone, sizeof(gone), -1); break;
    case STEP_HELD: say_segment(agent, input); break;
    default: ring_bell(agent); fuzz_let_pass((uint64_t)fuzz_take_u8(input) * 40000000);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct fuzz_input input = {data, data + bytes};
    const struct daemon *daemon = fuzz_daemon();
    struct agent agent;

    if (bytes > 4096 || !greet(&agent))
        return 0;
    while (input.at < input.end) {
        take_step(&agent, &input);
        for (const struct trust_domain *domain = daemon->domains.first; domain;
             domain = domain->next) {
            const char *wrong = ksm_member_check(domain);

            if (wrong)
                fprintf(stderr, "%s\n", wrong);
            FUZZ_REQUIRE(!wrong);
        }
    }
    munmap(agent.ring, RING_BYTES);
    close(agent.fd);
    fuzz_remove_guests();
    return 0;
}
