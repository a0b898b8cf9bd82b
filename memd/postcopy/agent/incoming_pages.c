/* SPDX-License-Identifier: Apache-2.0 */
/* What comes: pages are placed, the final map is applied, frames are judged. On the thread of the
 * connection that they came by; each piece under its block's lock. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "discard.h"
#include "incoming_parts.h"
#include "remap.h"
#include "uffd.h"

/* ---- placing ---- */

/* Pages that came: `count` from `first` on, with bytes or (NULL) without. */
struct arrival {
    uint64_t first;
    const uint8_t *bytes;
    const uint64_t *hashes; /* of their contents, one each */
};

/* Any place but remote becomes remote again; only before the guest runs. Caller holds the lock. */
static int make_remote(struct incoming *incoming, struct ram_block *block, uint32_t index,
                       uint32_t pages)
{
    uint32_t c = ram_chunk_of(block, index);
    uint32_t first = ram_chunk_first(block, c);
    int r = discard_pages(incoming->ram, block, index, pages, MADV_DONTNEED);

    if (r == 0 && block->chunks[c].state != CHUNK_ARMED) {
        r = remap_arm(incoming->ram, block, first, ram_chunk_end(block, c) - first);
        if (r == 0)
            block->chunks[c] = (struct chunk){.state = CHUNK_ARMED};
    }
    if (r == 0)
        ram_move_places(incoming->ram, block, index, pages, TRANSITION_EXPECT);
    return r;
}

/* How many pages from `index` on, below `end`, are remote (or are not). */
static uint32_t remote_run(const struct ram_block *block, uint32_t index, uint32_t end, bool remote)
{
    uint32_t run = 0;

    while (index + run < end && (ram_place(block, index + run) == PLACE_REMOTE) == remote)
        run++;
    return run;
}

/* Copies bytes under remote pages, and wakes who waits. Pages that were placed, or -errno. */
static int copy_run(struct incoming *incoming, struct ram_block *block, uint32_t index,
                    uint32_t pages, const uint8_t *bytes)
{
    int fd = incoming->ram->guest_fd;
    uint8_t *at = ram_address(block, index);
    long copied = uffd_copy(fd, at, bytes, (size_t)pages * PAGE_BYTES, true);

    /* It works within one VMA, and the VMM may have made several of the block. */
    if (copied == -ENOENT && pages > 1)
        copied = uffd_copy(fd, at, bytes, PAGE_BYTES, true);
    return copied < 0 ? (int)copied : (int)(copied / (long)PAGE_BYTES);
}

/* `hashes` are of the contents, one each; NULL: there is none. */
static void note_placed(struct incoming *incoming, uint64_t page, uint32_t pages,
                        const uint64_t *hashes)
{
    uint64_t word = 0;

    for (uint64_t at = page, end = page + pages; at < end; at++) {
        __atomic_store_n(&incoming->hashes[at],
                         proof_page(hashes ? hashes[at - page] : PROOF_EMPTY, at),
                         __ATOMIC_RELAXED);
        word |= regions_bit(at);
        if (at % 64 == 63 || at + 1 == end) {
            __atomic_fetch_or(&incoming->placed[at / 64], word, __ATOMIC_ACQ_REL);
            word = 0;
        }
    }
}

/* `pages` remote pages have left that place by `transition`. Caller holds the lock. */
static void settle(struct incoming *incoming, struct ram_block *block, uint32_t index,
                   uint32_t pages, uint64_t page, const uint64_t *hashes,
                   enum transition transition)
{
    uint32_t waited = 0;

    for (uint32_t i = 0; i < pages; i++) {
        if (ram_requested(block, index + i)) {
            incoming_end_wait(incoming, page + i);
            waited++;
        }
    }
    note_placed(incoming, page, pages, hashes);
    ram_move_places(incoming->ram, block, index, pages, transition);
    if (transition == TRANSITION_CLEAR && waited)
        uffd_wake(incoming->ram->guest_fd, ram_address(block, index), (size_t)pages * PAGE_BYTES);
}

/* At most 16 pages of one block. Caller holds the lock. How many were placed, or -errno. */
static int place_in_block(struct incoming *incoming, struct ram_block *block, uint32_t index,
                          uint32_t end, const struct arrival *arrival)
{
    uint64_t page = arrival->first;
    int sum = 0;

    for (uint32_t i = index, run; i < end; i += run) {
        uint32_t off = i - index;
        int placed = 0;

        run = remote_run(block, i, end, false);
        if (run > 0 && incoming_is_mapped(incoming)) {
            incoming_add(&incoming->counts.dropped, run);
            continue;
        }
        if (run > 0)
            placed = make_remote(incoming, block, i, run);
        run = remote_run(block, i, end, true);
        if (placed == 0)
            placed = copy_run(incoming, block, i, run, arrival->bytes + (size_t)off * PAGE_BYTES);
        if (placed < 0)
            return placed;
        run = (uint32_t)placed;
        settle(incoming, block, i, run, page + off, arrival->hashes + off, TRANSITION_FETCH);
        incoming_add(&incoming->counts.data, run);
        sum += placed;
    }
    return sum;
}

/* Pages that had come before, and hold nothing now; only before the guest runs. */
static int empty_run(struct incoming *incoming, struct ram_block *block, uint32_t index,
                     uint32_t pages, uint64_t page)
{
    int r = discard_pages(incoming->ram, block, index, pages, MADV_DONTNEED);

    note_placed(incoming, page, pages, NULL);
    return r;
}

/* Nobody is given a zero page here: an absent page of an armed chunk is filled by the handler when
 * it is touched, and who waits for it already is woken to do so. Caller holds the lock. */
static int clear_in_block(struct incoming *incoming, struct ram_block *block, uint32_t index,
                          uint32_t end, uint64_t page)
{
    int r = 0;

    for (uint32_t i = index, run; i < end && r == 0; i += run) {
        run = remote_run(block, i, end, false);
        if (run > 0 && incoming_is_mapped(incoming)) {
            incoming_add(&incoming->counts.dropped, run);
        } else if (run > 0) {
            r = empty_run(incoming, block, i, run, page + (i - index));
        } else {
            run = remote_run(block, i, end, true);
            settle(incoming, block, i, run, page + (i - index), NULL, TRANSITION_CLEAR);
            incoming_add(&incoming->counts.zero, run);
        }
    }
    return r;
}

static int place_data(struct incoming *incoming, uint64_t page, uint32_t count,
                      const uint8_t *bytes)
{
    uint64_t hashes[WIRE_DATA_MAX];
    uint64_t end = page + count;
    int r = 0;

    for (uint32_t i = 0; i < count; i++)
        hashes[i] = proof_content(bytes + (size_t)i * PAGE_BYTES);
    for (uint64_t at = page; at < end && r >= 0;) {
        struct piece piece = incoming_piece(incoming, at, end);
        struct arrival arrival = {at, bytes + (at - page) * PAGE_BYTES, hashes + (at - page)};

        lock_take(&piece.block->lock);
        if (piece.block->live)
            r = place_in_block(incoming, piece.block, piece.index, piece.end, &arrival);
        lock_release(&piece.block->lock);
        at += piece.end - piece.index;
    }
    return r < 0 ? r : 0;
}

static int place_nothing(struct incoming *incoming, uint64_t page, uint64_t count)
{
    uint64_t end = page + count;
    int r = 0;

    while (page < end && r == 0) {
        struct piece piece = incoming_piece(incoming, page, end);

        lock_take(&piece.block->lock);
        if (piece.block->live)
            r = clear_in_block(incoming, piece.block, piece.index, piece.end, page);
        lock_release(&piece.block->lock);
        page += piece.end - piece.index;
    }
    return r;
}

static int place_content(struct incoming *incoming, uint64_t page, uint32_t content)
{
    struct piece piece = incoming_piece(incoming, page, page + 1);
    struct arrival arrival = {page, incoming->contents + (size_t)content * PAGE_BYTES,
                              incoming->content_hashes + content};
    int r = 0;

    lock_take(&piece.block->lock);
    if (piece.block->live)
        r = place_in_block(incoming, piece.block, piece.index, piece.end, &arrival);
    lock_release(&piece.block->lock);
    incoming_add(&incoming->counts.slot, r > 0);
    return r < 0 ? r : 0;
}

/* ---- the final map ---- */

/* Caller holds the lock, as for the next two. */
static int expect_piece(struct incoming *incoming, const struct piece *piece, uint64_t page)
{
    int r = 0;

    for (uint32_t i = piece->index, run; i < piece->end && r == 0; i += run) {
        run = remote_run(piece->block, i, piece->end, true);
        if (run > 0)
            continue;
        run = remote_run(piece->block, i, piece->end, false);
        r = make_remote(incoming, piece->block, i, run);
    }
    for (uint64_t end = page + (piece->end - piece->index);
         (page = regions_next(incoming->placed, page, end)) < end; page++)
        regions_clear(incoming->placed, page);
    return r;
}

/* Did it come, and is it as it came? The VMM may have emptied it since. */
static bool is_there(const struct incoming *incoming, const struct ram_block *block, uint32_t index,
                     uint64_t page)
{
    enum place place = ram_place(block, index);

    if (place == PLACE_REMOTE || !regions_test(incoming->placed, page))
        return false;
    return place != PLACE_ABSENT || incoming->hashes[page] == proof_page(PROOF_EMPTY, page);
}

/* What the source has sent is right, if it came and is still there; else it is asked for. */
static int keep_piece(struct incoming *incoming, const struct piece *piece, uint64_t page)
{
    struct ram_block *block = piece->block;

    for (uint32_t i = piece->index; i < piece->end; i++) {
        uint64_t number = page + (i - piece->index);
        int r = 0;

        if (is_there(incoming, block, i, number))
            continue;
        regions_clear(incoming->placed, number);
        if (ram_place(block, i) != PLACE_REMOTE)
            r = make_remote(incoming, block, i, 1);
        if (r < 0)
            return r;
        block->table[i] |= TABLE_REQUESTED;
    }
    incoming->pages_have += piece->end - piece->index;
    return 0;
}

/* A chunk that is empty all through stays armed, and the scanner gives it back to the kernel's own
 * fault path: the guest stands still now, and that takes the kernel as long as all the rest. */
static int empty_piece(struct incoming *incoming, const struct piece *piece, uint64_t page)
{
    struct ram_block *block = piece->block;
    int r = 0;

    for (uint32_t i = piece->index, run; i < piece->end && r == 0; i += run) {
        uint64_t number = page + (i - piece->index);

        run = remote_run(block, i, piece->end, true);
        if (run > 0) {
            settle(incoming, block, i, run, number, NULL, TRANSITION_CLEAR);
            continue;
        }
        run = remote_run(block, i, piece->end, false);
        r = empty_run(incoming, block, i, run, number);
    }
    incoming->pages_empty += piece->end - piece->index;
    return r;
}

static int apply_run(struct incoming *incoming, const struct wire_run *run)
{
    uint64_t end = run->page + run->pages;
    int r = 0;

    for (uint64_t page = run->page; page < end && r == 0;) {
        struct piece piece = incoming_piece(incoming, page, end);

        lock_take(&piece.block->lock);
        if (piece.block->live)
            r = run->kind == WIRE_KIND_REMOTE ? expect_piece(incoming, &piece, page)
                : run->kind == WIRE_KIND_HAVE ? keep_piece(incoming, &piece, page)
                                              : empty_piece(incoming, &piece, page);
        lock_release(&piece.block->lock);
        page += piece.end - piece.index;
    }
    return r;
}

static int take_map(struct incoming *incoming, const struct wire_frame *frame,
                    const uint8_t *payload, const char **ret_reason)
{
    struct wire_run run;
    int r = 0;

    for (uint32_t i = 0; i < frame->count && r == 0; i++) {
        r = wire_read_run(&incoming->bulk.limits, payload, i, incoming->map_at, &run, ret_reason);
        if (r == 0)
            r = apply_run(incoming, &run);
        if (r == 0)
            incoming->map_at += run.pages;
    }
    return r;
}

static int end_map(struct incoming *incoming, const char **ret_reason)
{
    if (incoming->map_at != incoming->regions.pages) {
        *ret_reason = "a map that ends too early";
        return -EPROTO;
    }
    __atomic_store_n(&incoming->mapped, 1, __ATOMIC_RELEASE);
    __atomic_store_n(&incoming->rescan, 1, __ATOMIC_RELEASE);
    fault_nudge(incoming->handler);
    incoming_tell(incoming);
    return 0;
}

/* ---- frames ---- */

static void take_content(struct incoming *incoming, uint64_t number, const uint8_t *bytes)
{
    uint32_t known = incoming->contents_known;

    if (regions_test(incoming->content_here, number))
        return; /* again, after a cut */
    memcpy(incoming->contents + number * PAGE_BYTES, bytes, PAGE_BYTES);
    incoming->content_hashes[number] = proof_content(bytes);
    regions_set(incoming->content_here, number);
    while (known < incoming->contents_max && regions_test(incoming->content_here, known))
        known++;
    __atomic_store_n(&incoming->contents_known, known, __ATOMIC_RELEASE);
}

static int take_refs(struct incoming *incoming, const struct wire_frame *frame,
                     const uint8_t *payload, const char **ret_reason)
{
    int r = 0;

    for (uint32_t i = 0; i < frame->count && r == 0; i++) {
        uint32_t content = wire_read_u32(payload, i);

        if (content >= incoming->contents_max || !regions_test(incoming->content_here, content)) {
            *ret_reason = "a reference to a content that was not sent";
            return -EPROTO;
        }
        r = place_content(incoming, frame->page + i, content);
    }
    return r;
}

/* The map comes once, and what belongs before or behind it comes there. */
static int check_order(const struct incoming *incoming, uint16_t type, const char **ret_reason)
{
    bool mapped = incoming_is_mapped(incoming);
    bool early = type == WIRE_NOTHING_LEFT || type == WIRE_PROVEN;
    bool late = type == WIRE_PASS || type == WIRE_MAP || type == WIRE_MAP_END;

    if ((mapped && late) || (!mapped && early) ||
        (!mapped && incoming->map_at > 0 && type != WIRE_MAP && type != WIRE_MAP_END)) {
        *ret_reason = "a frame out of order";
        return -EPROTO;
    }
    return 0;
}

static int take_pages(struct incoming *incoming, const struct wire_frame *frame,
                      const uint8_t *payload, const char **ret_reason)
{
    switch (frame->type) {
    case WIRE_DATA: return place_data(incoming, frame->page, frame->count, payload);
    case WIRE_ZERO: return place_nothing(incoming, frame->page, frame->count);
    case WIRE_CONTENT: take_content(incoming, frame->page, payload); return 0;
    case WIRE_REF: return take_refs(incoming, frame, payload, ret_reason);
    case WIRE_MAP: return take_map(incoming, frame, payload, ret_reason);
    case WIRE_MAP_END: return end_map(incoming, ret_reason);
    default: return 0; /* PASS, NOTHING_LEFT: for whoever listens in */
    }
}

static void take_proven(struct incoming *incoming, const struct wire_frame *frame)
{
    if (!__atomic_load_n(&incoming->complete, __ATOMIC_ACQUIRE) || incoming->proven)
        return;
    incoming->proven_result = -(int32_t)frame->count;
    incoming->proven_region = (uint32_t)frame->page;
    __atomic_store_n(&incoming->proven, 1, __ATOMIC_RELEASE);
    incoming_tell(incoming);
}

/* Takes all whole frames that were read. 0, or -errno: the connection is to end. */
static int take_frames(struct incoming *incoming, struct stream *stream, const char **ret_reason)
{
    struct wire_frame frame;
    const uint8_t *payload;
    int r;

    while ((r = stream_next(stream, &frame, &payload, ret_reason)) > 0) {
        r = check_order(incoming, frame.type, ret_reason);
        if (r == 0 && frame.type == WIRE_PROVEN)
            take_proven(incoming, &frame);
        else if (r == 0)
            r = take_pages(incoming, &frame, payload, ret_reason);
        if (r < 0)
            return r;
    }
    return r;
}

void incoming_read(struct incoming *incoming, struct stream *stream)
{
    const char *reason = NULL;
    long got = stream_fill(stream);

    if (got > 0)
        got = take_frames(incoming, stream, &reason);
    if (got < 0)
        stream_fail(stream, (int)got, reason);
}
