/* SPDX-License-Identifier: Apache-2.0 */
#include "discard.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "protocol.h"
#include "remap.h"
#include "uffd.h"

/* Pages un-shared by one prepared move. */
#define UNSHARE_RUN 64U

static bool in_store(const struct ram_block *block, uint32_t index)
{
    return ram_place(block, index) == PLACE_SHARED || ram_captive(block, index);
}

static uint32_t store_run(const struct ram_block *block, uint32_t index, uint32_t end, bool store)
{
    uint32_t run = 1;

    while (index + run < end && in_store(block, index + run) == store)
        run++;
    return run;
}

static uint32_t count_shared(const struct ram_block *block, uint32_t index, uint32_t pages)
{
    uint32_t shared = 0;

    for (uint32_t i = index; i < index + pages; i++)
        shared += ram_place(block, i) == PLACE_SHARED;
    return shared;
}

static uint32_t count_remote(const struct ram_block *block, uint32_t index, uint32_t end)
{
    uint32_t remote = 0;

    if (block->counts[PLACE_REMOTE] == 0)
        return 0;
    for (uint32_t i = index; i < end; i++)
        remote += ram_place(block, i) == PLACE_REMOTE;
    return remote;
}

/* Where nothing else can be mapped: the kernel copies each page as the zeros are written to it.
 * Only on a thread of the VMM, which may touch guest RAM. Page by page: not all may be registered,
 * and who writes to a page that is still protected waits for the lock that we hold. */
static int zero_in_place(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                         uint32_t pages)
{
    for (uint32_t i = index; i < index + pages; i++) {
        int r = uffd_protect(ram->store_fd, ram_address(block, i), PAGE_BYTES, false);

        if (r < 0 && r != -ENOENT) /* not registered: it is not protected */
            return r;
        memset(ram_address(block, i), 0, PAGE_BYTES);
        if (ram_place(block, i) == PLACE_SHARED)
            ram_move_places(ram, block, i, 1, TRANSITION_BREAK);
        ram_set_captive(block, i, true);
        uffd_wake(ram->store_fd, ram_address(block, i), PAGE_BYTES);
    }
    return 0;
}

static int discard_in_store(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                            uint32_t pages)
{
    bool arm = block->chunks[ram_chunk_of(block, index)].state == CHUNK_ARMED;
    uint32_t ended = count_shared(block, index, pages);
    int r = -ENOMEM;

    if (ram_may_spend(ram, ram_split_cost(block, index, pages)))
        r = remap_to_absent(ram, block, index, pages, arm);
    if (r < 0)
        r = zero_in_place(ram, block, index, pages);
    ended -= count_shared(block, index, pages);
    if (ended) {
        ram_note_broken(ram, block, index, pages);
        /* Captives had ended before, and after an error some have not. */
        __atomic_sub_fetch(&ram->unmerges, pages - ended, __ATOMIC_RELAXED);
        __atomic_add_fetch(&ram->discards, ended, __ATOMIC_RELAXED);
    }
    return r;
}

static int discard_private(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                           uint32_t pages, int advice)
{
    bool had_remote = count_remote(block, index, index + pages) > 0;
    int r = sys_madvise(ram_address(block, index), (size_t)pages * PAGE_BYTES, advice);

    /* After MADV_FREE the bytes may still be there: the next scan finds out. */
    if (r < 0 || advice == MADV_FREE)
        return r;
    ram_move_places(ram, block, index, pages, TRANSITION_DISCARD);
    if (had_remote) /* who waits for one of them gets zeros; its bytes, should they come, nobody */
        uffd_wake(ram->guest_fd, ram_address(block, index), (size_t)pages * PAGE_BYTES);
    return 0;
}

/* Some of the chunk may have been let go, and a hole there would read as zeros: what can't be
 * registered again must not be frozen any more. Page by page where a run is refused: a captive page
 * must not be registered either, or it could be a hole that waits for the handler while zeros are
 * written to it. */
static void stay_armed(struct guest_ram *ram, struct ram_block *block, uint32_t first, uint32_t end)
{
    for (uint32_t i = first, run; i < end; i += run) {
        bool store = in_store(block, i);
        run = store_run(block, i, end, store);
        if (store || remap_arm(ram, block, i, run) == 0)
            continue;
        for (uint32_t k = i; k < i + run; k++)
            if (remap_arm(ram, block, k, 1) < 0)
                ram_set_captive(block, k, true);
    }
}

void discard_disarm(struct guest_ram *ram, struct ram_block *block, uint32_t c,
                    enum chunk_state state)
{
    struct chunk *chunk = &block->chunks[c];
    uint32_t first = ram_chunk_first(block, c);
    uint32_t end = ram_chunk_end(block, c);

    if (count_remote(block, first, end) > 0)
        return; /* they would become zeros */
    for (uint32_t i = first, run; i < end; i += run) {
        bool store = in_store(block, i);
        int r;
        run = store_run(block, i, end, store);
        r = uffd_unregister(store ? ram->store_fd : ram->guest_fd, ram_address(block, i),
                            (size_t)run * PAGE_BYTES);
        if (r == -ENOMEM) {
            stay_armed(ram, block, first, end);
            return;
        }
    }
    memset(chunk, 0, sizeof(*chunk));
    chunk->state = (uint8_t)state;
}

/* A chunk that has become empty goes back to the kernel's own fault path, where it can get a huge
 * page again. */
static void release_empty_chunks(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                                 uint32_t pages)
{
    uint32_t last = ram_chunk_of(block, index + pages - 1);

    for (uint32_t c = ram_chunk_of(block, index); c <= last; c++) {
        uint32_t first = ram_chunk_first(block, c);
        uint32_t end = ram_chunk_end(block, c);
        if (block->chunks[c].state == CHUNK_ARMED && index <= first && index + pages >= end)
            discard_disarm(ram, block, c, CHUNK_EMPTY);
    }
}

int discard_pages(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages,
                  int advice)
{
    uint32_t end = index + pages;
    int result = 0;

    for (uint32_t i = index, run; i < end; i += run) {
        uint32_t chunk_end = ram_chunk_end(block, ram_chunk_of(block, i));
        bool store = in_store(block, i);
        int r;
        run = store_run(block, i, store && chunk_end < end ? chunk_end : end, store);
        r = store ? discard_in_store(ram, block, i, run)
                  : discard_private(ram, block, i, run, advice);
        if (r < 0)
            result = r;
    }
    if (result == 0 && advice != MADV_FREE)
        release_empty_chunks(ram, block, index, pages);
    return result;
}

/* Un-shares [index, end) where `segment` is the slot's or SLOT_NONE. Returns pages that stayed. */
static uint32_t unshare(struct guest_ram *ram, struct ram_block *block, uint32_t index,
                        uint32_t end, uint32_t segment)
{
    uint32_t left = 0;

    for (uint32_t i = index; i < end;) {
        uint32_t chunk_end = ram_chunk_end(block, ram_chunk_of(block, i));
        uint32_t run = 0;
        int done;
        while (i + run < end && i + run < chunk_end && run < UNSHARE_RUN &&
               ram_place(block, i + run) == PLACE_SHARED &&
               (segment == SLOT_NONE || SLOT_SEGMENT(block->slots[i + run]) == segment))
            run++;
        if (run == 0) {
            i++;
            continue;
        }
        done = remap_to_private(ram, block, i, run, true);
        if (done < 0) {
            left += run;
            done = (int)run;
        } else {
            ram_note_broken(ram, block, i, (uint32_t)done);
        }
        i += (uint32_t)done;
    }
    return left;
}

uint32_t discard_segment(struct guest_ram *ram, struct ram_block *block, uint32_t c,
                         uint32_t segment)
{
    return unshare(ram, block, ram_chunk_first(block, c), ram_chunk_end(block, c), segment);
}

void discard_forget(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages)
{
    for (uint32_t i = index; i < index + pages; i++) {
        if (!in_store(block, i) && ram_place(block, i) != PLACE_REMOTE)
            continue;
        if (ram_place(block, i) == PLACE_SHARED)
            ram_note_broken(ram, block, i, 1);
        ram_set_captive(block, i, false);
        ram_move_places(ram, block, i, 1, TRANSITION_DISCARD);
    }
}

void discard_shares(struct guest_ram *ram, struct ram_block *block, uint32_t c)
{
    uint32_t first = ram_chunk_first(block, c);
    uint32_t end = ram_chunk_end(block, c);

    if (unshare(ram, block, first, end, SLOT_NONE) == 0)
        return;
    for (uint32_t i = first; i < end; i++) {
        if (ram_place(block, i) != PLACE_SHARED)
            continue;
        ram_move_places(ram, block, i, 1, TRANSITION_BREAK);
        ram_set_captive(block, i, true);
        ram_note_broken(ram, block, i, 1);
    }
}

uint32_t discard_stand_down(struct guest_ram *ram, struct ram_block *block, uint32_t c)
{
    /* Armed, though that is taken back below: where some can't be made private the chunk stays
     * armed, and in an armed chunk everything that may be frozen is registered. */
    uint32_t first = ram_chunk_first(block, c);
    uint32_t end = ram_chunk_end(block, c);
    uint32_t left = unshare(ram, block, first, end, SLOT_NONE) + count_remote(block, first, end);

    if (left == 0 && block->chunks[c].state == CHUNK_ARMED)
        discard_disarm(ram, block, c, CHUNK_EMPTY);
    return left;
}
