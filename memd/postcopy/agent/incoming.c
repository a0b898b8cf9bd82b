/* SPDX-License-Identifier: Apache-2.0 */
#include "incoming_parts.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

#include "clock.h"
#include "discard.h"
#include "remap.h"
#include "uffd.h"

/* What bulk reads at once: enough that a system call costs little beside what it brings, and little
 * enough to stay in a core's second cache. */
#define BULK_ROOM   (8U * WIRE_FRAME_MAX)
#define URGENT_ROOM (2U * WIRE_FRAME_MAX)

/* How often the bulk thread looks whether discards have ended the waiting. */
#define TICK_NS 50000000LL

void incoming_tell(struct incoming *incoming)
{
    uint64_t one = 1;

    sys_call3(SYS_write, incoming->news_fd, &one, sizeof(one));
}

/* ---- times from fault to page ---- */

void incoming_begin_wait(struct incoming *incoming, uint64_t page)
{
    struct incoming_timed *timed = &incoming->timed[page % INCOMING_TIMED];

    lock_take(&incoming->timing);
    *timed = (struct incoming_timed){page, clock_now_ns()};
    lock_release(&incoming->timing);
}

void incoming_end_wait(struct incoming *incoming, uint64_t page)
{
    struct incoming_timed *timed = &incoming->timed[page % INCOMING_TIMED];

    lock_take(&incoming->timing);
    if (timed->since_ns && timed->page == page) {
        fault_record(&incoming->times, clock_now_ns() - timed->since_ns);
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

void incoming_look_whether_complete(struct incoming *incoming)
{
    if (!incoming_is_mapped(incoming) || __atomic_load_n(&incoming->complete, __ATOMIC_ACQUIRE) ||
        incoming_remote(incoming) > 0)
        return;
    __atomic_store_n(&incoming->complete, 1, __ATOMIC_RELEASE);
    /* What still refers to one of them comes for a page that is settled, and is dropped. */
    sys_madvise(incoming->contents, (size_t)incoming->contents_max * PAGE_BYTES, MADV_DONTNEED);
    fault_nudge(incoming->handler);
    incoming_tell(incoming);
}

struct piece incoming_piece(const struct incoming *incoming, uint64_t page, uint64_t end)
{
    const struct region *region = regions_find(&incoming->regions, page);
    struct piece piece = {.block = region->block, .index = (uint32_t)(page - region->first)};
    uint64_t left = end - page;

    piece.end = ram_chunk_end(piece.block, ram_chunk_of(piece.block, piece.index));
    if (piece.end - piece.index > left)
        piece.end = piece.index + (uint32_t)left;
    return piece;
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
            incoming_read(incoming, stream);
        incoming_look_whether_complete(incoming);
    }
    return NULL;
}

/* ---- opening, expecting, closing ---- */

static int map_arrays(struct incoming *incoming)
{
    uint64_t pages = incoming->regions.pages;

    /* A content is sent for two pages at least. */
    incoming->contents_max = (uint32_t)(pages / 2 + 1);
    incoming->hashes = regions_map_ready(pages * 8);
    incoming->placed = regions_map_ready(regions_bitmap_bytes(&incoming->regions));
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
    incoming->side = (struct fault_side){incoming, incoming_prepare_urgent, incoming_urgent_ready};
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
        (struct page_source){.name = "migration", .fetch = incoming_fetch, .self = incoming};
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
