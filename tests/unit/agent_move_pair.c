/* SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent_move.h"
#include "discard.h"
#include "remap.h"

static void *reserve(size_t bytes)
{
    uint8_t *at =
        mmap(NULL, bytes + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return (uint8_t *)(((uintptr_t)at + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
}

static void open_guest(struct move_guest *guest)
{
    static const uint32_t pages[MOVE_BLOCKS] = {MOVE_PAGES_0, MOVE_PAGES_1};
    static const uint32_t offset[MOVE_BLOCKS] = {0, 37};
    const char *reason = "";

    memset(guest, 0, sizeof(*guest));
    if (ram_open(&guest->ram, -1, &reason) < 0)
        cr_skip_test("no agent on this kernel: %s", reason);
    guest->ram.sources[PLACE_SHARED] = segments_source(&guest->segments);
    cr_assert_eq(fault_start(&guest->handler, &guest->ram), 0);
    fault_open(&guest->handler);
    for (uint32_t b = 0; b < MOVE_BLOCKS; b++) {
        guest->memory[b] =
            (uint8_t *)reserve((pages[b] + offset[b]) * PAGE_BYTES) + offset[b] * PAGE_BYTES;
        cr_assert_eq(ram_add(&guest->ram, guest->memory[b], pages[b] * PAGE_BYTES, 0, true,
                             &guest->blocks[b]),
                     0);
    }
}

static void close_guest(struct move_guest *guest)
{
    fault_stop(&guest->handler);
    for (uint32_t b = 0; b < MOVE_BLOCKS; b++) {
        struct ram_block *block = guest->blocks[b];

        ram_forget(&guest->ram, block);
        munmap(guest->memory[b], (size_t)block->pages * PAGE_BYTES);
    }
    ram_close(&guest->ram);
}

void move_set_up(struct move_pair *pair)
{
    memset(pair, 0, sizeof(*pair));
    open_guest(&pair->from);
    open_guest(&pair->to);
    pair->news_from = eventfd(0, EFD_NONBLOCK);
    pair->news_to = eventfd(0, EFD_NONBLOCK);
}

void move_tear_down(struct move_pair *pair)
{
    outgoing_close(&pair->outgoing);
    incoming_close(&pair->incoming);
    close_guest(&pair->from);
    close_guest(&pair->to);
    close(pair->news_from);
    close(pair->news_to);
}

void move_open(struct move_pair *pair, const struct mover_tuning *tuning)
{
    static const struct mover_tuning normal;

    tuning = tuning ? tuning : &normal;
    cr_assert_eq(outgoing_open(&pair->outgoing, &pair->from.ram, tuning, pair->news_from, NULL), 0);
    cr_assert_eq(
        incoming_open(&pair->incoming, &pair->to.ram, &pair->to.handler, tuning, pair->news_to), 0);
    pair->epoch = 0;
}

void move_link(struct move_pair *pair)
{
    pair->epoch++;
    for (uint32_t channel = 0; channel < MOVER_CHANNELS; channel++) {
        int ends[2];

        cr_assert_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
        outgoing_link(&pair->outgoing, channel, ends[0], pair->epoch);
        incoming_link(&pair->incoming, channel, ends[1], pair->epoch);
    }
}

uint8_t *move_at(const struct move_guest *guest, uint32_t page)
{
    return page < MOVE_PAGES_0 ? guest->memory[0] + page * PAGE_BYTES
                               : guest->memory[1] + (page - MOVE_PAGES_0) * PAGE_BYTES;
}

void move_write(uint8_t *at, uint32_t content)
{
    uint32_t *words = (uint32_t *)at;

    for (uint32_t i = 0; i < PAGE_BYTES / 4; i++)
        words[i] = content * 2654435761U + i;
}

bool move_holds(const uint8_t *at, uint32_t content)
{
    uint8_t want[PAGE_BYTES];

    move_write(want, content);
    return memcmp(at, want, PAGE_BYTES) == 0;
}

bool move_is_zero(const uint8_t *at)
{
    static const uint8_t zeros[PAGE_BYTES];

    return memcmp(at, zeros, PAGE_BYTES) == 0;
}

bool move_is_empty(uint32_t page)
{
    return page % 7 == 3 || page % 5 == 4;
}

void move_fill(struct move_pair *pair)
{
    for (uint32_t page = 0; page < MOVE_PAGES; page++) {
        if (page % 7 == 3)
            continue;
        move_write(move_at(&pair->from, page), page + 1);
        if (page % 5 == 4)
            memset(move_at(&pair->from, page), 0, PAGE_BYTES);
    }
}

bool move_is_right(const struct move_pair *pair, uint32_t page)
{
    const uint8_t *at = move_at(&pair->to, page);

    return move_is_empty(page) ? move_is_zero(at) : move_holds(at, page + 1);
}

void move_begin(struct move_pair *pair)
{
    cr_assert_eq(incoming_expect(&pair->incoming), 0);
    move_link(pair);
    move_stop(pair, false);
    move_wait(&pair->incoming.mapped);
}

void move_stop(struct move_pair *pair, bool hold)
{
    int r;

    outgoing_stop(&pair->outgoing, hold);
    while ((r = outgoing_stopped(&pair->outgoing)) == -EINPROGRESS)
        usleep(200);
    cr_assert_eq(r, 0);
}

void move_wait(const uint32_t *word)
{
    while (!__atomic_load_n(word, __ATOMIC_ACQUIRE))
        usleep(200);
}

void move_wait_proven(struct move_pair *pair)
{
    move_wait(&pair->outgoing.proven);
    move_wait(&pair->incoming.proven);
    cr_assert_eq(pair->outgoing.proven_result, 0, "region %u", pair->outgoing.proven_region);
    cr_assert_eq(pair->incoming.proven_result, 0);
    cr_assert_eq(incoming_remote(&pair->incoming), 0);
}
