/* SPDX-License-Identifier: Apache-2.0 */
/* Batches of frames: what a page is sent as. */
#include <errno.h>
#include <string.h>

#include "hash.h"
#include "outgoing_parts.h"

/* ---- batches ---- */

void outgoing_clear(struct outgoing_batch *batch)
{
    batch->part_count = batch->frame_count = batch->content_count = 0;
    batch->bytes = 0;
    batch->block = NULL;
}

int outgoing_flush(struct stream *stream, struct outgoing_batch *batch)
{
    int r =
        batch->part_count ? stream_send(stream, batch->parts, batch->part_count, batch->block) : 0;

    outgoing_clear(batch);
    return r;
}

uint8_t *outgoing_append(struct outgoing_batch *batch, enum wire_type type, uint32_t count,
                         uint64_t page, uint32_t inside)
{
    uint8_t *header = batch->headers[batch->frame_count++];

    wire_write_header(header, type, count, page);
    batch->parts[batch->part_count++] = (struct iovec){header, WIRE_HEADER_BYTES + inside};
    batch->bytes += WIRE_HEADER_BYTES + inside;
    return header + WIRE_HEADER_BYTES;
}

static void append_bytes(struct outgoing_batch *batch, const void *bytes, size_t length)
{
    batch->parts[batch->part_count++] = (struct iovec){(void *)bytes, length};
    batch->bytes += length;
}

/* ---- what a page is sent as ---- */

struct run outgoing_run(const struct outgoing *outgoing, uint64_t page, uint32_t count)
{
    const struct region *region = regions_find(&outgoing->regions, page);
    uint64_t left = region->first + region->pages - page;

    return (struct run){region, page, count < left ? count : (uint32_t)left};
}

static void note_sent(struct outgoing *outgoing, uint64_t page, uint64_t content)
{
    uint64_t hash = proof_page(content, page);

    if (__atomic_exchange_n(&outgoing->hashes[page], hash, __ATOMIC_RELAXED))
        outgoing_add(&outgoing->counts.resent, 1);
}

static uint8_t *address_of(const struct run *run, uint32_t i)
{
    return ram_address(run->region->block, (uint32_t)(run->page - run->region->first) + i);
}

/* Appends DATA and ZERO frames for the run: at most one for each page. Caller holds the reading
 * lock. */
static void append_run(struct outgoing *outgoing, struct outgoing_batch *batch,
                       const struct run *run)
{
    for (uint32_t i = 0, n; i < run->count; i += n) {
        bool zero = hash_page_is_zero(address_of(run, i));

        n = 0;
        do {
            note_sent(outgoing, run->page + i + n,
                      zero ? PROOF_EMPTY : proof_content(address_of(run, i + n)));
            n++;
        } while (i + n < run->count && hash_page_is_zero(address_of(run, i + n)) == zero);
        outgoing_append(batch, zero ? WIRE_ZERO : WIRE_DATA, n, run->page + i, 0);
        if (!zero)
            append_bytes(batch, address_of(run, i), (size_t)n * PAGE_BYTES);
        outgoing_add(zero ? &outgoing->counts.zero : &outgoing->counts.data, n);
    }
}

/* Room for `frames` more, with bytes of this block? */
static bool has_room(const struct outgoing_batch *batch, const struct ram_block *block,
                     uint32_t frames)
{
    return batch->frame_count + frames <= OUTGOING_FRAMES && batch->bytes < OUTGOING_BATCH_BYTES &&
           (!batch->block || !block || batch->block == block);
}

int outgoing_send_run(struct outgoing *outgoing, struct stream *stream,
                      struct outgoing_batch *batch, const struct run *run)
{
    struct ram_block *block = run->region->block;
    bool live;
    int r = 0;

    if (!has_room(batch, block, run->count))
        r = outgoing_flush(stream, batch);
    if (r < 0)
        return r;
    batch->block = block;
    lock_take(&block->reading);
    live = __atomic_load_n(&block->live, __ATOMIC_ACQUIRE);
    if (live)
        append_run(outgoing, batch, run);
    lock_release(&block->reading);
    return live ? 0 : -EFAULT;
}

/* ---- shared pages ---- */

/* Which pages of the run are a content that is sent once? */
static void find_contents(struct outgoing *outgoing, const struct run *run,
                          struct slot_entry **ret_entries)
{
    struct ram_block *block = run->region->block;
    uint32_t index = (uint32_t)(run->page - run->region->first);

    for (uint32_t i = 0; i < run->count; i++)
        ret_entries[i] = NULL;
    if (outgoing->slots.room == 0)
        return;
    lock_take(&block->lock);
    for (uint32_t i = 0; block->live && i < run->count; i++)
        if (ram_place(block, index + i) == PLACE_SHARED)
            ret_entries[i] = slots_find(&outgoing->slots, block->slots[index + i]);
    lock_release(&block->lock);
}

/* The bytes of the store, not those of the guest, who may be writing a copy of its own just now.
 * False: it is shared no more. */
static bool copy_content(struct outgoing *outgoing, const struct run *run, uint32_t i,
                         const struct slot_entry *entry, uint8_t *to)
{
    struct ram_block *block = run->region->block;
    uint32_t index = (uint32_t)(run->page - run->region->first) + i;
    struct page_source *source = &outgoing->ram->sources[PLACE_SHARED];
    const void *bytes;
    bool good;

    lock_take(&block->lock);
    good = block->live && ram_place(block, index) == PLACE_SHARED &&
           block->slots[index] == entry->slot && source->fetch &&
           source->fetch(source->self, block, index, 1, &bytes) >= 1;
    if (good)
        memcpy(to, bytes, PAGE_BYTES);
    lock_release(&block->lock);
    return good;
}

/* Sends the content of the run's page `i`, unless it was sent. 0, or 1: it is no content any more,
 * or -errno. */
static int send_content(struct outgoing *outgoing, const struct run *run, uint32_t i,
                        struct slot_entry *entry)
{
    struct outgoing_batch *batch = &outgoing->bulk_batch;
    uint8_t *content;
    int r = 0;

    if (entry->sent)
        return 0;
    if (!has_room(batch, NULL, 1) || batch->content_count == OUTGOING_CONTENTS)
        r = outgoing_flush(&outgoing->bulk, batch);
    if (r < 0)
        return r;
    content = batch->contents[batch->content_count];
    if (!copy_content(outgoing, run, i, entry, content))
        return 1;
    batch->content_count++;
    if (entry->content == SLOT_NONE) {
        entry->hash = proof_content(content);
        entry->content = outgoing->slots.contents++;
    }
    entry->sent = true;
    outgoing_append(batch, WIRE_CONTENT, 1, entry->content, 0);
    append_bytes(batch, content, PAGE_BYTES);
    return 0;
}

static int send_ref(struct outgoing *outgoing, uint64_t page, const struct slot_entry *entry)
{
    struct outgoing_batch *batch = &outgoing->bulk_batch;
    uint8_t *payload;
    int r = has_room(batch, NULL, 1) ? 0 : outgoing_flush(&outgoing->bulk, batch);

    if (r < 0)
        return r;
    payload = outgoing_append(batch, WIRE_REF, 1, page, 4);
    wire_write_u32(payload, 0, entry->content);
    note_sent(outgoing, page, entry->hash);
    outgoing_add(&outgoing->counts.slot, 1);
    return 0;
}

int outgoing_send_shared(struct outgoing *outgoing, const struct run *run)
{
    struct slot_entry *entries[WIRE_DATA_MAX];
    int r = 0;

    find_contents(outgoing, run, entries);
    for (uint32_t i = 0, n; i < run->count && r >= 0; i += n) {
        struct run part = {run->region, run->page + i, 0};

        n = 1;
        r = entries[i] ? send_content(outgoing, run, i, entries[i]) : 1;
        if (r == 0) {
            r = send_ref(outgoing, run->page + i, entries[i]);
            continue;
        }
        while (i + n < run->count && !entries[i + n])
            n++;
        part.count = n;
        if (r > 0)
            r = outgoing_send_run(outgoing, &outgoing->bulk, &outgoing->bulk_batch, &part);
    }
    return r;
}
