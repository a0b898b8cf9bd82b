/* SPDX-License-Identifier: Apache-2.0 */
#include "incoming.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "discard.h"
#include "remap.h"
#include "uffd.h"

/* What bulk reads at once: enough that a system call costs little beside what it brings, and little
 * enough to stay in a core's second cache. */
#define BULK_ROOM   (8U * WIRE_FRAME_MAX)
#define URGENT_ROOM (2U * WIRE_FRAME_MAX)

/* How often the bulk thread looks whether discards have ended the waiting. */
#define TICK_NS 50000000LL

static uint64_t now_ns(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ULL + (uint64_t)time.tv_nsec;
}

static void news(struct incoming *incoming)
{
    uint64_t one = 1;

    sys_call3(SYS_write, incoming->news_fd, &one, sizeof(one));
}

static void add(uint64_t *counter, uint64_t pages)
{
    __atomic_add_fetch(counter, pages, __ATOMIC_RELAXED);
}

static bool is_mapped(const struct incoming *incoming)
{
    return __atomic_load_n(&incoming->mapped, __ATOMIC_ACQUIRE);
}

/* ---- times from fault to page ---- */

static void begin_wait(struct incoming *incoming, uint64_t page)
{
    struct incoming_timed *timed = &incoming->timed[page % INCOMING_TIMED];

    lock_take(&incoming->timing);
    *timed = (struct incoming_timed){page, now_ns()};
    lock_release(&incoming->timing);
}

static void end_wait(struct incoming *incoming, uint64_t page)
{
    struct incoming_timed *timed = &incoming->timed[page % INCOMING_TIMED];

    lock_take(&incoming->timing);
    if (timed->since_ns && timed->page == page) {
        fault_record(&incoming->times, now_ns() - timed->since_ns);
        timed->since_ns = 0;
    }
    lock_release(&incoming->timing);
    if (incoming->tuning.switches & MOVER_NO_PIPELINE)
        fault_nudge(incoming->handler);
}

struct fault_times incoming_times(struct incoming *incoming)
{
    struct fault_times times;

    lock_take(&incoming->timing);
    times = incoming->times;
    lock_release(&incoming->timing);
    return times;
}

/* ---- what is left ---- */

/* Right for one block at a time: whoever brings it to 0 looks again. */
uint64_t incoming_remote(const struct incoming *incoming)
{
    uint64_t remote = 0;

    for (uint32_t i = 0; i < incoming->regions.count; i++) {
        struct ram_block *block = incoming->regions.at[i].block;

        lock_take(&block->lock);
        remote += block->live ? block->counts[PLACE_REMOTE] : 0;
        lock_release(&block->lock);
    }
    return remote;
}

uint64_t incoming_placed(const struct incoming *incoming)
{
    uint64_t words = (incoming->regions.pages + 63) / 64;
    uint64_t placed = 0;

    for (uint64_t w = 0; w < words; w++)
        placed +=
            (uint64_t)__builtin_popcountll(__atomic_load_n(&incoming->placed[w], __ATOMIC_RELAXED));
    return placed;
}

static void look_whether_complete(struct incoming *incoming)
{
    if (!is_mapped(incoming) || __atomic_load_n(&incoming->complete, __ATOMIC_ACQUIRE) ||
        incoming_remote(incoming) > 0)
        return;
    __atomic_store_n(&incoming->complete, 1, __ATOMIC_RELEASE);
    /* What still refers to one of them comes for a page that is settled, and is dropped. */
    sys_madvise(incoming->contents, (size_t)incoming->contents_max * PAGE_BYTES, MADV_DONTNEED);
    fault_nudge(incoming->handler);
    news(incoming);
}

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

static void note_placed(struct incoming *incoming, uint64_t page, uint64_t content)
{
    __atomic_store_n(&incoming->hashes[page], proof_page(content, page), __ATOMIC_RELAXED);
    regions_set(incoming->placed, page);
}

/* `pages` remote pages have left that place by `transition`. Caller holds the lock. */
static void settle(struct incoming *incoming, struct ram_block *block, uint32_t index,
                   uint32_t pages, uint64_t page, const uint64_t *hashes,
                   enum transition transition)
{
    uint32_t waited = 0;

    for (uint32_t i = 0; i < pages; i++) {
        if (ram_requested(block, index + i)) {
            end_wait(incoming, page + i);
            waited++;
        }
        note_placed(incoming, page + i, hashes ? hashes[i] : PROOF_EMPTY);
    }
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
        if (run > 0 && is_mapped(incoming)) {
            add(&incoming->counts.dropped, run);
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
        add(&incoming->counts.data, run);
        sum += placed;
    }
    return sum;
}

/* Pages that had come before, and hold nothing now; only before the guest runs. */
static int empty_run(struct incoming *incoming, struct ram_block *block, uint32_t index,
                     uint32_t pages, uint64_t page)
{
    int r = discard_pages(incoming->ram, block, index, pages, MADV_DONTNEED);

    for (uint32_t i = 0; i < pages; i++)
        note_placed(incoming, page + i, PROOF_EMPTY);
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
        if (run > 0 && is_mapped(incoming)) {
            add(&incoming->counts.dropped, run);
        } else if (run > 0) {
            r = empty_run(incoming, block, i, run, page + (i - index));
        } else {
            run = remote_run(block, i, end, true);
            settle(incoming, block, i, run, page + (i - index), NULL, TRANSITION_CLEAR);
            add(&incoming->counts.zero, run);
        }
    }
    return r;
}

/* The next piece of [*page, end) that lies in one chunk of one block. */
struct piece {
    struct ram_block *block;
    uint32_t index, end;
};

static struct piece next_piece(const struct incoming *incoming, uint64_t page, uint64_t end)
{
    const struct region *region = regions_find(&incoming->regions, page);
    struct piece piece = {.block = region->block, .index = (uint32_t)(page - region->first)};
    uint64_t left = end - page;

    piece.end = ram_chunk_end(piece.block, ram_chunk_of(piece.block, piece.index));
    if (piece.end - piece.index > left)
        piece.end = piece.index + (uint32_t)left;
    return piece;
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
        struct piece piece = next_piece(incoming, at, end);
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
        struct piece piece = next_piece(incoming, page, end);

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
    struct piece piece = next_piece(incoming, page, page + 1);
    struct arrival arrival = {page, incoming->contents + (size_t)content * PAGE_BYTES,
                              incoming->content_hashes + content};
    int r = 0;

    lock_take(&piece.block->lock);
    if (piece.block->live)
        r = place_in_block(incoming, piece.block, piece.index, piece.end, &arrival);
    lock_release(&piece.block->lock);
    add(&incoming->counts.slot, r > 0);
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
    for (uint32_t i = piece->index; i < piece->end; i++)
        regions_clear(incoming->placed, page + (i - piece->index));
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

static int empty_piece(struct incoming *incoming, const struct piece *piece, uint64_t page)
{
    struct ram_block *block = piece->block;
    uint32_t c = ram_chunk_of(block, piece->index);
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
    /* All of a chunk: back to the kernel's own fault path, where it can get a huge page. */
    if (r == 0 && block->chunks[c].state == CHUNK_ARMED &&
        piece->index == ram_chunk_first(block, c) && piece->end == ram_chunk_end(block, c))
        discard_disarm(incoming->ram, block, c, CHUNK_EMPTY);
    incoming->pages_empty += piece->end - piece->index;
    return r;
}

static int apply_run(struct incoming *incoming, const struct wire_run *run)
{
    uint64_t end = run->page + run->pages;
    int r = 0;

    for (uint64_t page = run->page; page < end && r == 0;) {
        struct piece piece = next_piece(incoming, page, end);

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
    news(incoming);
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
    bool mapped = is_mapped(incoming);
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
    news(incoming);
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

static void read_stream(struct incoming *incoming, struct stream *stream)
{
    const char *reason = NULL;
    long got = stream_fill(stream);

    if (got > 0)
        got = take_frames(incoming, stream, &reason);
    if (got < 0)
        stream_fail(stream, (int)got, reason);
}

/* ---- bulk ---- */

static void *run_bulk(void *context)
{
    struct incoming *incoming = context;
    struct stream *stream = &incoming->bulk;

    while (!__atomic_load_n(&incoming->stop, __ATOMIC_ACQUIRE)) {
        short wanted = __atomic_load_n(&incoming->expecting, __ATOMIC_ACQUIRE) ? POLLIN : 0;

        stream_adopt(stream);
        if (stream_wait(stream, wanted, TICK_NS) && wanted)
            read_stream(incoming, stream);
        look_whether_complete(incoming);
    }
    return NULL;
}

/* ---- urgent: what is said to the source ---- */

/* The page source of remote pages: asks, and places when the answer comes. Handler's thread, with
 * the block's lock. */
static int fetch_remote(void *self, const struct ram_block *block, uint32_t index, uint32_t pages,
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
    add(&incoming->counts.demand, 1);
    begin_wait(incoming, page);
    if (!is_mapped(incoming))
        return -EINPROGRESS;
    if (incoming->wants_to - incoming->wants_from == INCOMING_WANTS)
        incoming->rescan_at = 0;
    else
        incoming->wants[incoming->wants_to++ % INCOMING_WANTS] = page;
    return -EINPROGRESS;
}

static bool is_requested(const struct incoming *incoming, uint64_t page)
{
    struct piece piece = next_piece(incoming, page, page + 1);
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
        struct piece piece = next_piece(incoming, page + b, page + count);

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
    bool mapped = is_mapped(incoming);

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
static int prepare_urgent(void *self, short *ret_events)
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

static void urgent_ready(void *self, short events)
{
    struct incoming *incoming = self;

    if (incoming->urgent.fd >= 0 && events & ~POLLOUT) {
        read_stream(incoming, &incoming->urgent);
        look_whether_complete(incoming);
    }
}

/* ---- opening, expecting, closing ---- */

static int map_arrays(struct incoming *incoming)
{
    uint64_t pages = incoming->regions.pages;

    /* A content is sent for two pages at least. */
    incoming->contents_max = (uint32_t)(pages / 2 + 1);
    incoming->hashes = regions_map(pages * 8);
    incoming->placed = regions_map(regions_bitmap_bytes(&incoming->regions));
    incoming->contents = regions_map((size_t)incoming->contents_max * PAGE_BYTES);
    incoming->content_hashes = regions_map((size_t)incoming->contents_max * 8);
    incoming->content_here = regions_map(((size_t)incoming->contents_max + 63) / 64 * 8);
    return incoming->hashes && incoming->placed && incoming->contents && incoming->content_hashes &&
                   incoming->content_here
               ? 0
               : -ENOMEM;
}

static void unmap_arrays(struct incoming *incoming)
{
    uint64_t pages = incoming->regions.pages;

    regions_unmap(incoming->hashes, pages * 8);
    regions_unmap(incoming->placed, regions_bitmap_bytes(&incoming->regions));
    regions_unmap(incoming->contents, (size_t)incoming->contents_max * PAGE_BYTES);
    regions_unmap(incoming->content_hashes, (size_t)incoming->contents_max * 8);
    regions_unmap(incoming->content_here, ((size_t)incoming->contents_max + 63) / 64 * 8);
}

static int open_streams(struct incoming *incoming)
{
    struct wire_limits limits = {.reader = WIRE_AT_DESTINATION_URGENT,
                                 .pages = incoming->regions.pages,
                                 .regions = incoming->regions.count,
                                 .contents = incoming->contents_max};
    int r =
        stream_open(&incoming->urgent, URGENT_ROOM, &limits, &incoming->stop, incoming->news_fd);

    if (r < 0)
        return r;
    limits.reader = WIRE_AT_DESTINATION_BULK;
    r = stream_open(&incoming->bulk, BULK_ROOM, &limits, &incoming->stop, incoming->news_fd);
    if (r < 0)
        stream_close(&incoming->urgent);
    return r;
}

static int start_thread(struct incoming *incoming)
{
    sigset_t all;
    sigset_t old;
    int r;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = -pthread_create(&incoming->thread, NULL, run_bulk, incoming);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return r;
}

int incoming_open(struct incoming *incoming, struct guest_ram *ram, struct fault_handler *handler,
                  const struct mover_tuning *tuning, int news_fd)
{
    int r;

    memset(incoming, 0, sizeof(*incoming));
    incoming->ram = ram;
    incoming->handler = handler;
    incoming->tuning = *tuning;
    incoming->news_fd = news_fd;
    regions_take(&incoming->regions, ram);
    if (incoming->regions.pages == 0)
        return -ENODATA;
    incoming->rescan_at = incoming->have_at = incoming->regions.pages;
    r = map_arrays(incoming);
    if (r == 0)
        r = open_streams(incoming);
    if (r < 0) {
        unmap_arrays(incoming);
        return r;
    }
    r = start_thread(incoming);
    if (r < 0) {
        stream_close(&incoming->urgent);
        stream_close(&incoming->bulk);
        unmap_arrays(incoming);
        return r;
    }
    incoming->side = (struct fault_side){incoming, prepare_urgent, urgent_ready};
    return 0;
}

static int expect_block(struct incoming *incoming, struct ram_block *block)
{
    size_t bytes = (size_t)block->pages * PAGE_BYTES;
    int r;

    if (!block->live || block->resting)
        return -EBUSY;
    r = discard_pages(incoming->ram, block, 0, block->pages, MADV_DONTNEED);
    if (r == 0)
        r = remap_arm(incoming->ram, block, 0, block->pages);
    if (r < 0)
        return r;
    for (uint32_t c = 0; c < block->chunk_count; c++)
        block->chunks[c] = (struct chunk){.state = CHUNK_ARMED};
    memset(block->young, 0, ((size_t)block->pages + 63) / 64 * 8);
    ram_move_places(incoming->ram, block, 0, block->pages, TRANSITION_EXPECT);
    sys_madvise(block->base, bytes, MADV_DONTFORK);
    return 0;
}

int incoming_expect(struct incoming *incoming)
{
    int r = 0;

    incoming->ram->sources[PLACE_REMOTE] =
        (struct page_source){.name = "migration", .fetch = fetch_remote, .self = incoming};
    for (uint32_t i = 0; i < incoming->regions.count && r == 0; i++) {
        struct ram_block *block = incoming->regions.at[i].block;

        lock_take(&block->reading);
        lock_take(&block->lock);
        r = expect_block(incoming, block);
        lock_release(&block->lock);
        lock_release(&block->reading);
    }
    if (r < 0)
        return r;
    fault_set_side(incoming->handler, &incoming->side);
    __atomic_store_n(&incoming->expecting, 1, __ATOMIC_RELEASE);
    stream_wake(&incoming->bulk);
    return 0;
}

void incoming_link(struct incoming *incoming, enum mover_channel channel, int fd, uint32_t epoch)
{
    stream_post(channel == MOVER_URGENT ? &incoming->urgent : &incoming->bulk, fd, epoch);
    fault_nudge(incoming->handler);
}

/* Children may have the RAM again, as the VMM wanted it. */
static void allow_fork(struct ram_block *block)
{
    lock_take(&block->lock);
    if (block->live && block->counts[PLACE_REMOTE] == 0 && !(block->attributes & RAM_DONTFORK))
        sys_madvise(block->base, (size_t)block->pages * PAGE_BYTES, MADV_DOFORK);
    lock_release(&block->lock);
}

void incoming_close(struct incoming *incoming)
{
    __atomic_store_n(&incoming->stop, 1, __ATOMIC_RELEASE);
    stream_wake(&incoming->bulk);
    pthread_join(incoming->thread, NULL);
    if (incoming->expecting)
        fault_set_side(incoming->handler, NULL);
    if (incoming->ram->sources[PLACE_REMOTE].self == incoming) {
        incoming->ram->sources[PLACE_REMOTE] = (struct page_source){0};
        for (uint32_t i = 0; i < incoming->regions.count; i++)
            allow_fork(incoming->regions.at[i].block);
    }
    stream_close(&incoming->urgent);
    stream_close(&incoming->bulk);
    unmap_arrays(incoming);
    memset(incoming, 0, sizeof(*incoming));
}
