/* SPDX-License-Identifier: Apache-2.0 */
/* The urgent connection: what is said to the source. All on the fault handler's thread. */
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "incoming_parts.h"

int incoming_fetch(void *self, const struct ram_block *block, uint32_t index, uint32_t pages,
                   const void **ret_bytes)
{
    struct incoming *incoming = self;
    uint64_t page;

    (void)pages;
    (void)ret_bytes;
    if (!regions_number(&incoming->regions, block, index, &page))
        return -ENOENT;
    if (ram_requested(block, index))
        return -EINPROGRESS;
    block->table[index] |= TABLE_REQUESTED;
    incoming_add(&incoming->counts.demand, 1);
    incoming_begin_wait(incoming, page);
    if (!incoming_is_mapped(incoming))
        return -EINPROGRESS;
    if (incoming->wants_to - incoming->wants_from == INCOMING_WANTS)
        incoming->rescan_at = 0;
    else
        incoming->wants[incoming->wants_to++ % INCOMING_WANTS] = page;
    return -EINPROGRESS;
}

static bool is_requested(const struct incoming *incoming, uint64_t page)
{
    struct piece piece = incoming_piece(incoming, page, page + 1);
    bool requested;

    lock_take(&piece.block->lock);
    requested = piece.block->live && ram_requested(piece.block, piece.index);
    lock_release(&piece.block->lock);
    return requested;
}

/* The first page from `from` on that somebody waits for; a lock is held for 8,192 pages at most. */
static uint64_t find_requested(const struct incoming *incoming, uint64_t from)
{
    while (from < incoming->regions.pages) {
        const struct region *region = regions_find(&incoming->regions, from);
        struct ram_block *block = region->block;
        uint32_t i = (uint32_t)(from - region->first);
        uint32_t end = region->pages - i < 8192 ? region->pages : i + 8192;
        bool found = false;

        lock_take(&block->lock);
        if (!block->live || block->counts[PLACE_REMOTE] == 0)
            i = end = region->pages;
        while (i < end && !(found = ram_requested(block, i)))
            i++;
        lock_release(&block->lock);
        from = region->first + i;
        if (found)
            break;
    }
    return from;
}

/* A bit for each of `count` (at most 64) pages that is remote. */
static uint64_t remote_bits(const struct incoming *incoming, uint64_t page, uint32_t count)
{
    uint64_t bits = 0;

    for (uint32_t b = 0; b < count;) {
        struct piece piece = incoming_piece(incoming, page + b, page + count);

        lock_take(&piece.block->lock);
        for (uint32_t i = piece.index; i < piece.end; i++, b++)
            if (piece.block->live && ram_place(piece.block, i) == PLACE_REMOTE)
                bits |= 1ULL << b;
        lock_release(&piece.block->lock);
    }
    return bits;
}

/* The next request that was not written yet. */
static bool next_want(struct incoming *incoming, uint64_t *ret_page)
{
    while (incoming->wants_from != incoming->wants_to) {
        *ret_page = incoming->wants[incoming->wants_from++ % INCOMING_WANTS];
        if (is_requested(incoming, *ret_page))
            return true;
    }
    *ret_page = find_requested(incoming, incoming->rescan_at);
    incoming->rescan_at = *ret_page;
    if (*ret_page >= incoming->regions.pages)
        return false;
    incoming->rescan_at++;
    return true;
}

static bool may_ask(const struct incoming *incoming)
{
    return !(incoming->tuning.switches & MOVER_NO_PIPELINE) || !incoming->is_asked ||
           !is_requested(incoming, incoming->asked);
}

static uint8_t *append(struct incoming *incoming, uint32_t bytes)
{
    uint8_t *at = incoming->out + incoming->out_to;

    incoming->out_to += bytes;
    return at;
}

/* A frame of bits: HAVE (not remote) or PLACED, from `page` on. Returns where the next begins. */
static uint64_t append_bits(struct incoming *incoming, enum wire_type type, uint64_t page)
{
    uint64_t left = incoming->regions.pages - page;
    uint32_t count = left < WIRE_BITS_MAX ? (uint32_t)left : WIRE_BITS_MAX;
    uint32_t words = (count + 63) / 64;
    uint8_t *at = append(incoming, WIRE_HEADER_BYTES + words * 8);

    wire_write_header(at, type, count, page);
    for (uint32_t w = 0; w < words; w++) {
        uint64_t first = page + (uint64_t)w * 64;
        uint32_t pages = count - w * 64 < 64 ? count - w * 64 : 64;
        uint64_t mask = pages == 64 ? ~0ULL : (1ULL << pages) - 1;
        uint64_t bits =
            type == WIRE_HAVE
                ? ~remote_bits(incoming, first, pages) & mask
                : __atomic_load_n(&incoming->placed[first / 64], __ATOMIC_ACQUIRE) & mask;

        wire_write_u64(at + WIRE_HEADER_BYTES, w, bits);
    }
    return page + count;
}

static void append_done(struct incoming *incoming)
{
    const struct regions *regions = &incoming->regions;
    uint8_t *at = append(incoming, WIRE_HEADER_BYTES + regions->count * 8);
    uint64_t pages;

    wire_write_header(at, WIRE_DONE, regions->count, 0);
    for (uint32_t i = 0; i < regions->count; i++)
        wire_write_u64(at + WIRE_HEADER_BYTES, i,
                       proof_sum(&regions->at[i], incoming->placed, incoming->hashes, &pages));
}

/* Puts the next frames into `out`: requests before anything else. False: there is nothing to say.
 */
static bool write_more(struct incoming *incoming)
{
    uint64_t pages = incoming->regions.pages;
    uint64_t page;

    incoming->out_from = incoming->out_to = 0;
    while (incoming->out_to < INCOMING_OUT_BYTES / 4 && may_ask(incoming) &&
           next_want(incoming, &page)) {
        wire_write_header(append(incoming, WIRE_HEADER_BYTES), WIRE_WANT, 1, page);
        incoming->asked = page;
        incoming->is_asked = true;
    }
    if (incoming->out_to > 0)
        return true;
    if (incoming->have_at < pages) {
        incoming->have_at = append_bits(incoming, WIRE_HAVE, incoming->have_at);
    } else if (incoming->have_end_due) {
        wire_write_header(append(incoming, WIRE_HEADER_BYTES), WIRE_HAVE_END, 0,
                          __atomic_load_n(&incoming->contents_known, __ATOMIC_ACQUIRE));
        incoming->have_end_due = false;
    } else if (incoming->done_due && incoming->placed_at < pages) {
        incoming->placed_at = append_bits(incoming, WIRE_PLACED, incoming->placed_at);
    } else if (incoming->done_due) {
        append_done(incoming);
        incoming->done_due = false;
    }
    return incoming->out_to > 0;
}

static void write_out(struct incoming *incoming)
{
    while (incoming->urgent.fd >= 0 &&
           (incoming->out_from < incoming->out_to || write_more(incoming))) {
        struct iovec part = {incoming->out + incoming->out_from,
                             incoming->out_to - incoming->out_from};
        long sent = stream_try_send(&incoming->urgent, &part, 1);

        if (sent == -EAGAIN || sent == -EINTR)
            return;
        if (sent < 0)
            stream_fail(&incoming->urgent, (int)sent, NULL);
        else
            incoming->out_from += (uint32_t)sent;
    }
}

/* A new connection: all requests again, and what is here. */
static void begin_anew(struct incoming *incoming)
{
    bool mapped = incoming_is_mapped(incoming);

    incoming->out_from = incoming->out_to = 0;
    incoming->wants_from = incoming->wants_to;
    incoming->rescan_at = mapped ? 0 : incoming->regions.pages;
    incoming->have_at = mapped ? 0 : incoming->regions.pages;
    incoming->have_end_due = mapped;
    incoming->is_asked = false;
    incoming->done_due = false;
    incoming->done_said = false;
}

/* The handler's side, before each wait. */
int incoming_prepare_urgent(void *self, short *ret_events)
{
    struct incoming *incoming = self;

    if (stream_adopt(&incoming->urgent))
        begin_anew(incoming);
    if (__atomic_exchange_n(&incoming->rescan, 0, __ATOMIC_ACQ_REL))
        incoming->rescan_at = 0;
    if (__atomic_load_n(&incoming->complete, __ATOMIC_ACQUIRE) && !incoming->done_said &&
        incoming->urgent.fd >= 0) {
        incoming->done_due = incoming->done_said = true;
        incoming->placed_at = 0;
    }
    write_out(incoming);
    *ret_events = POLLIN;
    if (incoming->out_from < incoming->out_to)
        *ret_events |= POLLOUT;
    return incoming->urgent.fd;
}

void incoming_urgent_ready(void *self, short events)
{
    struct incoming *incoming = self;

    if (incoming->urgent.fd >= 0 && events & ~POLLOUT) {
        incoming_read(incoming, &incoming->urgent);
        incoming_look_whether_complete(incoming);
    }
}
