/* SPDX-License-Identifier: Apache-2.0 */
#include "peer.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

/* ---- numbers in buffers ---- */

struct cursor {
    const uint8_t *at;
    size_t left;
    bool short_of; /* more was asked for than there is */
};

static uint64_t take(struct cursor *cursor, size_t bytes)
{
    uint64_t value = 0;

    if (cursor->left < bytes) {
        cursor->short_of = true;
        return 0;
    }
    memcpy(&value, cursor->at, bytes);
    cursor->at += bytes;
    cursor->left -= bytes;
    return le64toh(value);
}

static uint32_t take_u32(struct cursor *cursor)
{
    return (uint32_t)take(cursor, 4);
}

static void take_bytes(struct cursor *cursor, void *into, size_t bytes)
{
    if (cursor->left < bytes) {
        cursor->short_of = true;
        return;
    }
    memcpy(into, cursor->at, bytes);
    cursor->at += bytes;
    cursor->left -= bytes;
}

/* Text of a fixed size that ends with a zero byte, of printable ASCII: it goes into logs. */
static bool take_text(struct cursor *cursor, char *into, size_t bytes)
{
    take_bytes(cursor, into, bytes);
    if (cursor->short_of || into[bytes - 1])
        return false;
    for (const char *at = into; *at; at++) {
        if (*at < ' ' || *at > '~')
            return false;
    }
    return true;
}

static uint8_t *put(uint8_t *at, uint64_t value, size_t bytes)
{
    value = htole64(value);
    memcpy(at, &value, bytes);
    return at + bytes;
}

static uint8_t *put_bytes(uint8_t *at, const void *bytes, size_t count)
{
    memcpy(at, bytes, count);
    return at + count;
}

/* ---- the greeting ---- */

void peer_greeting_encode(const struct peer_greeting *greeting, uint8_t into[PEER_GREETING_BYTES])
{
    uint8_t *at = into;

    memset(into, 0, PEER_GREETING_BYTES);
    at = put(at, PEER_MAGIC, 8);
    at = put(at, PEER_VERSION, 4);
    at = put(at, greeting->channel, 4);
    at = put(at, greeting->verdict, 4);
    at = put(at, greeting->epoch, 4);
    put_bytes(at, greeting->session, PEER_SESSION_BYTES);
}

int peer_greeting_decode(const uint8_t from[PEER_GREETING_BYTES],
                         struct peer_greeting *ret_greeting)
{
    struct cursor cursor = {from, PEER_GREETING_BYTES, false};
    struct peer_greeting greeting;
    uint32_t version, channel;

    if (take(&cursor, 8) != PEER_MAGIC)
        return -EPROTO;
    version = take_u32(&cursor);
    channel = take_u32(&cursor);
    greeting.verdict = take_u32(&cursor);
    greeting.epoch = take_u32(&cursor);
    take_bytes(&cursor, greeting.session, PEER_SESSION_BYTES);
    if (version != PEER_VERSION)
        return -EPROTONOSUPPORT;
    if (channel >= PEER_CHANNEL_COUNT || greeting.verdict >= PEER_VERDICT_COUNT ||
        take(&cursor, 8) != 0)
        return -EPROTO;
    greeting.channel = (enum peer_channel)channel;
    *ret_greeting = greeting;
    return 0;
}

const char *peer_verdict_words(uint32_t verdict)
{
    static const char *const words[PEER_VERDICT_COUNT] = {
        "welcome", "the other host knows no such session",
        "the connection belongs to the time before the last cut",
        "the other host's mover is of another version", "the other host is busy"};

    return verdict < PEER_VERDICT_COUNT ? words[verdict] : "an unknown verdict";
}

/* ---- frames: in ---- */

static bool is_name(const char *name)
{
    static const char good[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";

    return name[0] && !strchr("._-", name[0]) && strspn(name, good) == strlen(name);
}

/* Regions come in the order of their pages, none is empty, none overlaps, and all fit a guest. */
static bool take_regions(struct cursor *cursor, struct peer_hello *hello)
{
    uint64_t next = 0;

    if (hello->region_count == 0 || hello->region_count > PEER_REGIONS_MAX)
        return false;
    for (uint32_t i = 0; i < hello->region_count; i++) {
        struct peer_region *region = &hello->regions[i];

        region->first_page = take(cursor, 8);
        region->pages = take(cursor, 8);
        if (cursor->short_of || region->first_page < next || region->pages == 0 ||
            region->first_page > GUEST_MAX_PAGES ||
            region->pages > GUEST_MAX_PAGES - region->first_page)
            return false;
        next = region->first_page + region->pages;
    }
    return true;
}

static bool take_hello(struct cursor *cursor, struct peer_frame *frame)
{
    struct peer_hello *hello = &frame->hello;

    hello->version = take_u32(cursor);
    hello->machine = take_u32(cursor);
    hello->page_bytes = take_u32(cursor);
    hello->features = take_u32(cursor);
    if (!take_text(cursor, hello->vmm, sizeof(hello->vmm)) ||
        !take_text(cursor, hello->name, sizeof(hello->name)) || !is_name(hello->name))
        return false;
    hello->region_count = take_u32(cursor);
    return take_regions(cursor, hello);
}

static bool take_ok(struct cursor *cursor, struct peer_frame *frame)
{
    frame->port = take_u32(cursor);
    return frame->port > 0 && frame->port <= UINT16_MAX;
}

static bool take_ago(struct cursor *cursor, struct peer_frame *frame)
{
    frame->ago_ns = take(cursor, 8);
    return true;
}

static bool take_words(struct cursor *cursor, struct peer_frame *frame)
{
    frame->words.code = take_u32(cursor);
    return take_text(cursor, frame->words.text, sizeof(frame->words.text));
}

static bool take_state(struct cursor *cursor, struct peer_frame *frame)
{
    struct peer_state *state = &frame->state;

    state->offset = take(cursor, 8);
    state->total = take(cursor, 8);
    state->bytes = cursor->at;
    state->count = (uint32_t)cursor->left;
    cursor->left = 0;
    return !cursor->short_of && state->count > 0 && state->total <= PEER_STATE_MAX &&
           state->offset < state->total && state->count <= state->total - state->offset;
}

static bool take_stand(struct cursor *cursor, struct peer_frame *frame)
{
    uint32_t stand = take_u32(cursor);

    frame->stand = (enum peer_stand)stand;
    return stand < PEER_STAND_COUNT;
}

static bool take_figures(struct cursor *cursor, struct peer_frame *frame)
{
    struct peer_figures *figures = &frame->figures;

    figures->pages_demand = take(cursor, 8);
    figures->pages_placed = take(cursor, 8);
    figures->bytes = take(cursor, 8);
    figures->fault_p50_us = take_u32(cursor);
    figures->fault_p99_us = take_u32(cursor);
    figures->fault_p999_us = take_u32(cursor);
    figures->fault_max_us = take_u32(cursor);
    return figures->pages_demand <= GUEST_MAX_PAGES && figures->pages_placed <= GUEST_MAX_PAGES;
}

static bool take_nothing(struct cursor *cursor, struct peer_frame *frame)
{
    (void)cursor;
    (void)frame;
    return true;
}

#define HELLO_MOST (16 + PEER_VMM_BYTES + PEER_NAME_BYTES + 4 + 16 * PEER_REGIONS_MAX)

/* Payloads: how large one may be, and who reads it. A payload is read to its end. */
static const struct kind {
    uint32_t least, most;
    bool (*take)(struct cursor *cursor, struct peer_frame *frame);
} kinds[PEER_TYPE_END] = {
    [PEER_HELLO] = {HELLO_MOST - 16 * PEER_REGIONS_MAX, HELLO_MOST, take_hello},
    [PEER_OK] = {4, 4, take_ok},
    [PEER_REFUSED] = {4 + PEER_TEXT_BYTES, 4 + PEER_TEXT_BYTES, take_words},
    [PEER_EXPECTING] = {0, 0, take_nothing},
    [PEER_STATE] = {17, 16 + PEER_CHUNK_BYTES, take_state},
    [PEER_READY] = {0, 0, take_nothing},
    [PEER_GO] = {0, 0, take_nothing},
    [PEER_RUNNING] = {8, 8, take_ago},
    [PEER_ABORT] = {4 + PEER_TEXT_BYTES, 4 + PEER_TEXT_BYTES, take_words},
    [PEER_PING] = {0, 0, take_nothing},
    [PEER_RESUME] = {4, 4, take_stand},
    [PEER_PROVEN] = {40, 40, take_figures},
    [PEER_BYE] = {0, 0, take_nothing},
};

/* The header: type (32 bits), bytes of the payload (32 bits). */
static int read_header(const uint8_t *from, uint32_t *ret_type, uint32_t *ret_bytes)
{
    struct cursor cursor = {from, PEER_HEADER_BYTES, false};
    uint32_t type = take_u32(&cursor), bytes = take_u32(&cursor);

    if (type >= PEER_TYPE_END || !kinds[type].take || bytes < kinds[type].least ||
        bytes > kinds[type].most)
        return -EPROTO;
    *ret_type = type;
    *ret_bytes = bytes;
    return 0;
}

int peer_frame_size(const uint8_t *from, size_t have)
{
    uint32_t type, bytes;

    if (have < PEER_HEADER_BYTES)
        return 0;
    if (read_header(from, &type, &bytes))
        return -EPROTO;
    return have < PEER_HEADER_BYTES + bytes ? 0 : (int)(PEER_HEADER_BYTES + bytes);
}

int peer_frame_decode(const uint8_t *from, size_t bytes, struct peer_frame *ret_frame)
{
    struct cursor cursor = {from + PEER_HEADER_BYTES, 0, false};
    uint32_t type, payload;

    if (bytes < PEER_HEADER_BYTES || read_header(from, &type, &payload) ||
        bytes != PEER_HEADER_BYTES + payload)
        return -EPROTO;
    cursor.left = payload;
    ret_frame->type = (enum peer_type)type;
    if (!kinds[type].take(&cursor, ret_frame) || cursor.short_of || cursor.left)
        return -EPROTO;
    return 0;
}

/* ---- frames: out ---- */

static uint8_t *put_hello(uint8_t *at, const struct peer_hello *hello)
{
    at = put(at, hello->version, 4);
    at = put(at, hello->machine, 4);
    at = put(at, hello->page_bytes, 4);
    at = put(at, hello->features, 4);
    at = put_bytes(at, hello->vmm, sizeof(hello->vmm));
    at = put_bytes(at, hello->name, sizeof(hello->name));
    at = put(at, hello->region_count, 4);
    for (uint32_t i = 0; i < hello->region_count; i++) {
        at = put(at, hello->regions[i].first_page, 8);
        at = put(at, hello->regions[i].pages, 8);
    }
    return at;
}

static uint8_t *put_state(uint8_t *at, const struct peer_state *state)
{
    at = put(at, state->offset, 8);
    at = put(at, state->total, 8);
    return put_bytes(at, state->bytes, state->count);
}

static uint8_t *put_figures(uint8_t *at, const struct peer_figures *figures)
{
    at = put(at, figures->pages_demand, 8);
    at = put(at, figures->pages_placed, 8);
    at = put(at, figures->bytes, 8);
    at = put(at, figures->fault_p50_us, 4);
    at = put(at, figures->fault_p99_us, 4);
    at = put(at, figures->fault_p999_us, 4);
    return put(at, figures->fault_max_us, 4);
}

static uint8_t *put_payload(uint8_t *at, const struct peer_frame *frame)
{
    switch (frame->type) {
    case PEER_HELLO: return put_hello(at, &frame->hello);
    case PEER_OK: return put(at, frame->port, 4);
    case PEER_RUNNING: return put(at, frame->ago_ns, 8);
    case PEER_REFUSED:
    case PEER_ABORT:
        at = put(at, frame->words.code, 4);
        return put_bytes(at, frame->words.text, sizeof(frame->words.text));
    case PEER_STATE: return put_state(at, &frame->state);
    case PEER_RESUME: return put(at, frame->stand, 4);
    case PEER_PROVEN: return put_figures(at, &frame->figures);
    default: return at;
    }
}

size_t peer_frame_encode(const struct peer_frame *frame, uint8_t *into)
{
    uint8_t *end = put_payload(into + PEER_HEADER_BYTES, frame);

    put(put(into, frame->type, 4), (size_t)(end - into) - PEER_HEADER_BYTES, 4);
    return (size_t)(end - into);
}
