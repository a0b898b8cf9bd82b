/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's decoder of memd: messages, descriptors, ring entries. The agent trusts memd with its
 * time, but never with the guest's bytes: whatever the input makes memd say, every page of the
 * guest holds afterwards what it held before. The scanner's turns are taken by this thread, the
 * fault handler is the real one.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "discard.h"
#include "fuzz.h"
#include "guest.h"
#include "remap.h"
#include "send_with.h"

enum step {
    STEP_RAW_MESSAGE,
    STEP_RAW_ENTRY,
    STEP_SEGMENT,
    STEP_MERGE_RUN,
    STEP_WANT,
    STEP_REMAP,
    STEP_DROP,
    STEP_DETACH,
    STEP_WRITE,
    STEP_HEAD,
    STEP_TURN,
    STEP_COUNT
};

static const uint8_t seed_steps[][10] = {
    {STEP_SEGMENT, 1, 64, 3, STEP_MERGE_RUN, 0, 0, 1, 16, STEP_TURN},
    {STEP_SEGMENT, 1, 64, 3, STEP_MERGE_RUN, 9, 0, 1, 60, STEP_DETACH},
    {STEP_SEGMENT, 2, 30, 3, STEP_MERGE_RUN, 0, 0, 2, 8, STEP_REMAP},
    {STEP_SEGMENT, 1, 8, 0, STEP_SEGMENT, 1, 9, 3, STEP_DROP, 1},
    {STEP_WANT, 3, STEP_RAW_ENTRY, RING_MERGE, 1, 1, 1, 1, 1, STEP_TURN},
};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    if (number >= sizeof(seed_steps) / sizeof(seed_steps[0]) || room < sizeof(seed_steps[0]))
        return 0;
    memcpy(into, seed_steps[number], sizeof(seed_steps[0]));
    return sizeof(seed_steps[0]);
}

static struct memd_vm *const vm = &fuzz_guest.vm;
static int memd_fd;
static struct ring *ring;
static uint32_t head;

static void arm(void)
{
    for (uint32_t c = 0; c < fuzz_guest.block->chunk_count; c++) {
        lock_take(&fuzz_guest.block->lock);
        fuzz_guest.block->resting = false;
        if (fuzz_guest.block->chunks[c].state != CHUNK_ARMED &&
            remap_arm(&vm->ram, fuzz_guest.block, ram_chunk_first(fuzz_guest.block, c),
                      HUGE_PAGES) == 0)
            fuzz_guest.block->chunks[c].state = CHUNK_ARMED;
        lock_release(&fuzz_guest.block->lock);
    }
}

/* A new connection, with a new ring. */
static void connect_them(void)
{
    int fds[2];

    FUZZ_REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    FUZZ_REQUIRE(ring != MAP_FAILED);
    memd_fd = fds[1];
    head = 0;
    vm->rpc = (struct rpc){.fd = fds[0], .ring = ring};
    vm->announced = 0;
    vm->state = AGENT_ACTIVE;
    vm->detached = false;
}

/* What an honest memd does all the time: it reads. */
static void read_all(void)
{
    uint8_t message[1024];

    while (recv(memd_fd, message, sizeof(message), MSG_DONTWAIT) > 0)
        ;
    if (vm->rpc.fd >= 0)
        __atomic_store_n(&ring->to_memd.tail, ring->to_memd.head, __ATOMIC_RELEASE);
}

static void turn(void)
{
    for (int i = 0; i < 4 && vm->rpc.fd >= 0; i++) {
        read_all();
        (void)session_turn(vm);
    }
    read_all();
}

static void say(const void *message, size_t bytes, int fd)
{
    (void)send_with(memd_fd, message, bytes, &fd, fd >= 0, 0);
}

/* The ring goes with the connection. */
static void put(uint32_t op, uint32_t page, uint64_t arg)
{
    if (vm->rpc.fd < 0)
        return;
    if (ring_room(&ring->to_agent, head) - 1 >= RING_ENTRIES)
        turn();
    if (vm->rpc.fd >= 0)
        ring_put(&ring->to_agent, &head, (struct ring_entry){op, page, arg});
    /* Who asks for contents takes them, too: else the agent waits for a buffer. */
    if (op == RING_WANT)
        turn();
}

/* A head that can't be; afterwards the right one, or there would be nothing more to hear. */
static void lie_about_head(struct fuzz_input *input)
{
    if (vm->rpc.fd < 0)
        return;
    __atomic_store_n(&ring->to_agent.head,
                     vm->rpc.tail + RING_ENTRIES + 1 + fuzz_take_u32(input) / 2, __ATOMIC_RELEASE);
    turn();
    if (vm->rpc.fd >= 0)
        __atomic_store_n(&ring->to_agent.head, head, __ATOMIC_RELEASE);
}

static void raw_message(struct fuzz_input *input)
{
    static uint8_t message[1200];
    struct message_header header = {.type = fuzz_take_u8(input) % 20};
    size_t bytes = fuzz_take_u16(input) % sizeof(message);
    uint8_t lies = fuzz_take_u8(input);

    memset(message, 0, sizeof(message));
    fuzz_take(input, message, bytes < 32 ? bytes : 32);
    header.bytes = lies & 1 ? fuzz_take_u32(input) : (uint32_t)bytes;
    memcpy(message, &header, bytes < sizeof(header) ? bytes : sizeof(header));
    say(message, bytes, -1);
}

/* A segment whose slot n has the content n + 1, or other content; sealed, or not. */
static void give_segment(struct fuzz_input *input)
{
    uint32_t id = fuzz_take_u8(input) % 8, pages = 1 + fuzz_take_u8(input);
    uint8_t flags = fuzz_take_u8(input);
    struct message_segment message = {{MESSAGE_SEGMENT, sizeof(message)}, id, pages};
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t page[PAGE_BYTES];

    for (uint32_t i = 0; i < pages; i++) {
        fuzz_guest_content(flags & 4 ? i + 2 : i + 1, page);
        FUZZ_REQUIRE(pwrite(fd, page, PAGE_BYTES, i * (off_t)PAGE_BYTES) == (ssize_t)PAGE_BYTES);
    }
    if (flags & 1)
        (void)fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
    if (flags & 2)
        (void)fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SEAL);
    if (flags & 8)
        message.pages = fuzz_take_u32(input);
    if (flags & 16)
        message.segment = fuzz_take_u32(input);
    say(&message, sizeof(message), flags & 32 ? -1 : fd);
    close(fd);
}

static void merge_run(struct fuzz_input *input)
{
    uint32_t page = fuzz_take_u16(input), segment = fuzz_take_u8(input) % 8;
    uint32_t count = fuzz_take_u8(input), off = fuzz_take_u8(input);

    for (uint32_t i = 0; i < count; i++)
        put(RING_MERGE, page + i, SLOT(segment, page + i + off));
    turn();
}

static void drop_segment(struct fuzz_input *input)
{
    struct message_segment drop = {
        {MESSAGE_DROP, sizeof(drop)}, fuzz_take_u8(input) % 8, fuzz_take_u8(input)};

    say(&drop, sizeof(drop), -1);
    turn();
}

static void ask_to_detach(uint32_t rejoin)
{
    struct message_words words = {{MESSAGE_DETACH, sizeof(words)}, 0, rejoin, ""};

    say(&words, sizeof(words), -1);
    turn();
}

static void write_page(struct fuzz_input *input)
{
    uint32_t page = fuzz_take_u16(input) % PAGES;

    fuzz_guest_write(page, fuzz_take_u8(input));
}

static void take_step(struct fuzz_input *input)
{
    uint32_t op, page;

    switch (fuzz_take_u8(input) % STEP_COUNT) {
    case STEP_RAW_MESSAGE: raw_message(input); break;
    case STEP_RAW_ENTRY:
        op = fuzz_take_u8(input);
        page = fuzz_take_u32(input);
        put(op, page, fuzz_take_u64(input));
        break;
    case STEP_SEGMENT: give_segment(input); break;
    case STEP_MERGE_RUN: merge_run(input); break;
    case STEP_WANT:
        page = fuzz_take_u16(input) % (PAGES + 1);
        put(RING_WANT, page,
            page < PAGES ? hash_page(&vm->scanner.secret, fuzz_guest.memory + page * PAGE_BYTES)
                         : 0);
        break;
    case STEP_REMAP:
        page = fuzz_take_u16(input) % (PAGES + 1);
        put(RING_REMAP, page, SLOT(fuzz_take_u8(input) % 8, page));
        break;
    case STEP_DROP: drop_segment(input); break;
    case STEP_DETACH: ask_to_detach(fuzz_take_u8(input)); break;
    case STEP_WRITE: write_page(input); break;
    case STEP_HEAD: lie_about_head(input); break;
    default: turn();
    }
}

static void clean_up(void)
{
    session_close(vm);
    close(memd_fd);
    /* A connection that says: everything private again. */
    connect_them();
    ask_to_detach(1);
    FUZZ_REQUIRE(vm->rpc.fd < 0 && fuzz_guest.block->counts[PLACE_SHARED] == 0);
    for (uint32_t i = 0; i < SEGMENTS_HELD_MAX; i++)
        FUZZ_REQUIRE(!vm->segments.table[i].view);
    close(memd_fd);
    fuzz_guest_check();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct fuzz_input input = {data, data + bytes};

    if (bytes > 1024)
        return 0;
    (void)fuzz_guest_start();
    arm();
    for (uint32_t i = 0; i < PAGES; i++)
        fuzz_guest_write(i, i + 1);
    connect_them();
    while (input.at < input.end)
        take_step(&input);
    turn();
    fuzz_guest_check();
    clean_up();
    return 0;
}
