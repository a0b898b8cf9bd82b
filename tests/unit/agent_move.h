/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two guests in one process, source and destination, each with its own blocks, userfaultfds and
 * fault handler, and the connections between them. The test is both VMMs and both movers.
 */
#ifndef TESTS_UNIT_AGENT_MOVE_H
#define TESTS_UNIT_AGENT_MOVE_H

#include "fault.h"
#include "incoming.h"
#include "outgoing.h"
#include "segments.h"

#define MOVE_BLOCKS 2U

struct move_guest {
    struct guest_ram ram;
    struct fault_handler handler;
    struct segments segments;
    struct ram_block *blocks[MOVE_BLOCKS];
    uint8_t *memory[MOVE_BLOCKS];
};

struct move_pair {
    struct move_guest from, to;
    struct outgoing outgoing;
    struct incoming incoming;
    int news_from, news_to;
    uint32_t epoch;
};

/* Pages of the two blocks; the second does not begin at a chunk, nor has it a multiple of 64 pages.
 */
#define MOVE_PAGES_0 1024U
#define MOVE_PAGES_1 700U
#define MOVE_PAGES   (MOVE_PAGES_0 + MOVE_PAGES_1)

/* Both guests, empty. Skips the test where there is no agent. */
void move_set_up(struct move_pair *pair);
void move_tear_down(struct move_pair *pair);

/* Opens both halves; nothing is linked yet. */
void move_open(struct move_pair *pair, const struct mover_tuning *tuning);
/* New connections for both, with the next epoch; the old ones are hung up. */
void move_link(struct move_pair *pair);
/* What a page is at the source: nothing for every 7th, zeros for every 5th, else its own bytes. */
bool move_is_empty(uint32_t page);
void move_fill(struct move_pair *pair);
uint8_t *move_at(const struct move_guest *guest, uint32_t page);
/* The bytes of content `content`, whatever page they are in. */
void move_write(uint8_t *at, uint32_t content);
bool move_holds(const uint8_t *at, uint32_t content);
bool move_is_zero(const uint8_t *at);
/* Does the destination's page hold what the source's had? */
bool move_is_right(const struct move_pair *pair, uint32_t page);

/* Pages that the map calls remote. hold: nothing is pushed until outgoing_release(). */
void move_stop(struct move_pair *pair, bool hold);
/* expect, link, stop; until the map has arrived, before which a guest does not run there, and a cut
 * is the end of the migration. */
void move_begin(struct move_pair *pair);
/* Waits until *word is not 0. */
void move_wait(const uint32_t *word);
/* Waits for the proof at both ends and asserts that it is good. */
void move_wait_proven(struct move_pair *pair);

#endif
