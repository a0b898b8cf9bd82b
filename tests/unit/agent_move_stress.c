/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The destination's guest reads, writes and gives up pages at random while they come, and while the
 * connections are cut: each page belongs to one thread, which knows at every moment what it must
 * hold. Round after round, until there were enough operations.
 */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent_move.h"
#include "discard.h"

#define THREADS 4U

/* What a page must hold. */
#define AS_SENT  UINT32_MAX
#define GIVEN_UP (UINT32_MAX - 1)

static struct move_pair pair;
static uint32_t holds[MOVE_PAGES];
static uint32_t over; /* the round is */

struct worker {
    pthread_t thread;
    uint64_t seed;
    uint32_t number;
    uint64_t operations;
    uint32_t wrong; /* a page + 1 */
};

static uint32_t next_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005ULL + 1442695040888963407ULL;
    return (uint32_t)(*seed >> 33);
}

static bool is_as_it_must(uint32_t page)
{
    const uint8_t *at = move_at(&pair.to, page);

    if (holds[page] == GIVEN_UP)
        return move_is_zero(at);
    return holds[page] == AS_SENT ? move_is_right(&pair, page) : move_holds(at, holds[page]);
}

static void give_up(uint32_t page)
{
    struct ram_block *block = ram_find(&pair.to.ram, move_at(&pair.to, page));

    lock_take(&block->lock);
    discard_pages(&pair.to.ram, block,
                  (uint32_t)((move_at(&pair.to, page) - block->base) / (long)PAGE_BYTES), 1,
                  MADV_DONTNEED);
    lock_release(&block->lock);
    holds[page] = GIVEN_UP;
}

static void *work(void *context)
{
    struct worker *worker = context;

    while (!__atomic_load_n(&over, __ATOMIC_ACQUIRE) && !worker->wrong) {
        uint32_t what = next_random(&worker->seed);
        uint32_t page =
            next_random(&worker->seed) % (MOVE_PAGES / THREADS) * THREADS + worker->number;

        worker->operations++;
        if (what % 16 == 0) {
            give_up(page);
        } else if (what % 16 == 1) {
            holds[page] = what % 1000000;
            move_write(move_at(&pair.to, page), holds[page]);
        } else if (!is_as_it_must(page)) {
            worker->wrong = page + 1;
        }
    }
    return NULL;
}

/* One migration; returns how many operations there were. */
static uint64_t move_once(uint64_t seed)
{
    struct mover_tuning tuning = {.bandwidth = 16 << 20};
    struct worker workers[THREADS];
    uint64_t operations = 0;

    for (uint32_t page = 0; page < MOVE_PAGES; page++)
        holds[page] = AS_SENT;
    over = 0;
    move_set_up(&pair);
    move_fill(&pair);
    move_open(&pair, &tuning);
    move_begin(&pair);
    for (uint32_t i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){.seed = seed + i, .number = i};
        pthread_create(&workers[i].thread, NULL, work, &workers[i]);
    }
    for (uint32_t cut = 0; cut < seed % 8; cut++) {
        usleep((useconds_t)(next_random(&seed) % 4000));
        move_link(&pair);
    }
    move_wait_proven(&pair);
    usleep(2000);
    __atomic_store_n(&over, 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < THREADS; i++) {
        pthread_join(workers[i].thread, NULL);
        cr_assert_eq(workers[i].wrong, 0, "seed %lu: page %u", (unsigned long)seed,
                     workers[i].wrong - 1);
        operations += workers[i].operations;
    }
    for (uint32_t page = 0; page < MOVE_PAGES; page++)
        cr_assert(is_as_it_must(page), "seed %lu: page %u at the end", (unsigned long)seed, page);
    cr_assert_eq(pair.to.ram.refused_transitions, 0);
    move_tear_down(&pair);
    return operations;
}

Test(agent_move_stress, a_guest_that_gives_pages_up_while_they_come, .timeout = 3000)
{
    uint64_t wanted = getenv("MEMD_FULL") ? 10000000 : 1000000;
    uint64_t operations = 0;

    for (uint64_t seed = 1; operations < wanted; seed++)
        operations += move_once(seed * 7919);
}

/* ---- a source that says what it likes ---- */

static const enum wire_type types[] = {WIRE_DATA,   WIRE_ZERO,         WIRE_CONTENT, WIRE_REF,
                                       WIRE_PASS,   WIRE_MAP,          WIRE_MAP_END, WIRE_DATA,
                                       WIRE_PROVEN, WIRE_NOTHING_LEFT, WIRE_DATA,    WIRE_REF};

/* A frame whose header is mostly right and whose payload is anything. */
static size_t make_frame(uint64_t *seed, uint8_t *into)
{
    enum wire_type type = types[next_random(seed) % (sizeof(types) / sizeof(types[0]))];
    uint32_t count = 1 + next_random(seed) % 3;
    uint64_t page = next_random(seed) % MOVE_PAGES;
    size_t payload = 0;

    switch (type) {
    case WIRE_DATA: payload = count * PAGE_BYTES; break;
    case WIRE_CONTENT: count = 1, page %= 8, payload = PAGE_BYTES; break;
    case WIRE_REF: payload = count * 4; break;
    case WIRE_MAP: page = 0, payload = count * 16; break;
    case WIRE_PASS: page = 0; break;
    case WIRE_MAP_END: count = 0, page = MOVE_PAGES; break;
    case WIRE_NOTHING_LEFT: count = 0, page = 0; break;
    case WIRE_PROVEN: count = 0, page = 0; break;
    default: break;
    }
    if (next_random(seed) % 64 == 0)
        page = next_random(seed);
    wire_write_header(into, type, count, page);
    for (size_t i = 0; i < payload; i += 4)
        wire_write_u32(into + WIRE_HEADER_BYTES, (uint32_t)(i / 4), next_random(seed) % 4);
    return WIRE_HEADER_BYTES + payload;
}

static void send_map(uint32_t epoch)
{
    uint8_t payload[16], header[WIRE_HEADER_BYTES];
    struct wire_run run = {0, MOVE_PAGES, WIRE_KIND_REMOTE};
    int ends[2];

    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    incoming_link(&pair.incoming, MOVER_BULK, ends[1], epoch);
    wire_write_run(payload, 0, &run);
    wire_write_header(header, WIRE_MAP, 1, 0);
    cr_assert_eq(send(ends[0], header, sizeof(header), 0), (ssize_t)sizeof(header));
    cr_assert_eq(send(ends[0], payload, sizeof(payload), 0), (ssize_t)sizeof(payload));
    wire_write_header(header, WIRE_MAP_END, 0, MOVE_PAGES);
    cr_assert_eq(send(ends[0], header, sizeof(header), 0), (ssize_t)sizeof(header));
    move_wait(&pair.incoming.mapped);
    close(ends[0]);
}

/* One connection with some frames, until the destination has hung up. */
static void lie(uint64_t *seed, uint32_t epoch)
{
    static uint8_t frame[WIRE_FRAME_MAX];
    uint32_t channel = next_random(seed) % 4 ? MOVER_BULK : MOVER_URGENT;
    struct stream *stream = channel == MOVER_BULK ? &pair.incoming.bulk : &pair.incoming.urgent;
    struct stream_cut cut;
    int ends[2];

    cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    incoming_link(&pair.incoming, channel, ends[1], epoch);
    for (uint32_t i = 0; i < 8; i++)
        if (send(ends[0], frame, make_frame(seed, frame), MSG_NOSIGNAL) < 0)
            break;
    shutdown(ends[0], SHUT_WR);
    while (!stream_take_cut(stream, &cut) || cut.epoch != epoch)
        usleep(50);
    close(ends[0]);
}

/* Whatever comes: the books are right, and what was given up stays zero. */
static void hear_lies(bool mapped)
{
    uint32_t rounds = getenv("MEMD_FULL") ? 10000 : 500;
    uint64_t seed = 11;

    move_set_up(&pair);
    move_open(&pair, NULL);
    cr_assert_eq(incoming_expect(&pair.incoming), 0);
    if (mapped) {
        send_map(1);
        give_up(5);
    }
    for (uint32_t round = 0; round < rounds; round++)
        lie(&seed, round + 2);
    for (uint32_t b = 0; b < MOVE_BLOCKS; b++) {
        uint64_t sum = 0;

        for (int p = 0; p < PLACE_COUNT; p++)
            sum += pair.to.blocks[b]->counts[p];
        cr_assert_eq(sum, pair.to.blocks[b]->pages);
    }
    cr_assert(!mapped || move_is_zero(move_at(&pair.to, 5)));
    cr_assert_eq(pair.to.ram.refused_transitions, 0);
    cr_assert_eq(mapped, pair.incoming.mapped);
    outgoing_close(&pair.outgoing);
    incoming_close(&pair.incoming);
}

Test(agent_move_stress, a_source_that_says_what_it_likes_before_the_map, .timeout = 300)
{
    hear_lies(false);
}

Test(agent_move_stress, a_source_that_says_what_it_likes_after_the_map, .timeout = 300)
{
    hear_lies(true);
}
