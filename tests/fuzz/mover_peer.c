/* SPDX-License-Identifier: Apache-2.0 */
/* What another host's mover says: the greeting, then frames one after the other. What is taken for
 * a frame must say the same again when it is written and read once more. */
#include "peer.h"

#include "fuzz.h"

static size_t put_u32(uint8_t *into, uint32_t value)
{
    memcpy(into, &value, sizeof(value));
    return sizeof(value);
}

static size_t seed_hello(uint8_t *into)
{
    struct peer_frame frame = {.type = PEER_HELLO,
                               .hello = {.version = PEER_VERSION,
                                         .machine = 62,
                                         .page_bytes = 4096,
                                         .vmm = "memvm",
                                         .name = "web1",
                                         .region_count = 2,
                                         .regions = {{0, 4096}, {4096, 512}}}};

    return peer_frame_encode(&frame, into);
}

static size_t seed_words(uint8_t *into)
{
    struct peer_frame frame = {.type = PEER_ABORT, .words = {5, "it does not fit"}};
    size_t used = peer_frame_encode(&frame, into);

    frame = (struct peer_frame){.type = PEER_PING};
    return used + peer_frame_encode(&frame, into + used);
}

static size_t seed_state(uint8_t *into)
{
    struct peer_frame frame = {.type = PEER_STATE, .state = {0, 5, (const uint8_t *)"state", 5}};

    return peer_frame_encode(&frame, into);
}

static size_t seed_small(uint8_t *into)
{
    struct peer_frame frame = {.type = PEER_OK, .port = 700};
    size_t used = peer_frame_encode(&frame, into);

    frame = (struct peer_frame){.type = PEER_RESUME, .stand = PEER_WAITS};
    used += peer_frame_encode(&frame, into + used);
    frame = (struct peer_frame){.type = PEER_PROVEN, .figures = {.pages_placed = 9}};
    return used + peer_frame_encode(&frame, into + used);
}

static size_t seed_huge(uint8_t *into)
{
    size_t used = put_u32(into, PEER_STATE);

    return used + put_u32(into + used, UINT32_MAX);
}

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    static size_t (*const seeds[])(uint8_t * into) = {seed_hello, seed_words, seed_state,
                                                      seed_small, seed_huge};
    static uint8_t frame[2 * PEER_FRAME_MAX];
    struct peer_greeting greeting = {.channel = PEER_CONTROL, .epoch = 1};
    size_t bytes;

    if (number >= sizeof(seeds) / sizeof(seeds[0]))
        return 0;
    bytes = seeds[number](frame);
    if (room < PEER_GREETING_BYTES + bytes)
        return 0;
    peer_greeting_encode(&greeting, into);
    memcpy(into + PEER_GREETING_BYTES, frame, bytes);
    return PEER_GREETING_BYTES + bytes;
}

static void check_hello(const struct peer_hello *hello)
{
    uint64_t next = 0;

    FUZZ_REQUIRE(hello->region_count > 0 && hello->region_count <= PEER_REGIONS_MAX);
    FUZZ_REQUIRE(strlen(hello->name) > 0 && strlen(hello->name) < PEER_NAME_BYTES);
    for (uint32_t i = 0; i < hello->region_count; i++) {
        FUZZ_REQUIRE(hello->regions[i].first_page >= next && hello->regions[i].pages > 0);
        next = hello->regions[i].first_page + hello->regions[i].pages;
    }
    FUZZ_REQUIRE(next <= GUEST_MAX_PAGES);
}

static void check(const struct peer_frame *frame, const uint8_t *from, size_t bytes)
{
    static uint8_t again[PEER_FRAME_MAX];

    if (frame->type == PEER_HELLO)
        check_hello(&frame->hello);
    if (frame->type == PEER_STATE) {
        FUZZ_REQUIRE(frame->state.bytes >= from &&
                     frame->state.bytes + frame->state.count == from + bytes);
        FUZZ_REQUIRE(frame->state.offset + frame->state.count <= frame->state.total);
    }
    FUZZ_REQUIRE(peer_frame_encode(frame, again) == bytes);
    FUZZ_REQUIRE(memcmp(again, from, bytes) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct peer_greeting greeting;
    static struct peer_frame frame;

    if (bytes < PEER_GREETING_BYTES)
        return 0;
    if (peer_greeting_decode(data, &greeting) == 0)
        FUZZ_REQUIRE(greeting.channel < PEER_CHANNEL_COUNT);
    for (size_t at = PEER_GREETING_BYTES; at < bytes;) {
        int size = peer_frame_size(data + at, bytes - at);

        if (size <= 0)
            break;
        FUZZ_REQUIRE((size_t)size <= bytes - at && (size_t)size <= PEER_FRAME_MAX);
        if (peer_frame_decode(data + at, (size_t)size, &frame))
            break;
        check(&frame, data + at, (size_t)size);
        at += (size_t)size;
    }
    return 0;
}
