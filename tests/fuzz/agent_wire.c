/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page wire: a stream of frames as the other host may send it. The first bytes say who reads
 * and how much RAM there is; what follows is read frame by frame, as a stream is, until the reader
 * refuses. What it accepts must lie within the RAM.
 */
#include "fuzz.h"
#include "wire.h"

static const uint8_t seed_data[] = {2, 0, 40, 1, 1, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0};
static const uint8_t seed_map[] = {2, 0, 40, 1, 6, 0, 0, 0, 1, 0, 0,  0, 0, 0, 0, 0, 0, 0,
                                   0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 2, 0, 0, 0};
static const uint8_t seed_have[] = {0, 0, 40, 1, 33, 0, 0, 0, 40, 0, 0, 0, 0, 0,
                                    0, 0, 0,  0, 0,  0, 1, 2, 3,  4, 5, 6, 7, 8};
static const uint8_t seed_done[] = {0, 0, 40, 2, 36, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                    0, 0, 1,  2, 3,  4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8};

static const struct {
    const uint8_t *bytes;
    size_t length;
} seeds[] = {{seed_data, sizeof(seed_data)},
             {seed_map, sizeof(seed_map)},
             {seed_have, sizeof(seed_have)},
             {seed_done, sizeof(seed_done)}};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    size_t length;

    if (number >= sizeof(seeds) / sizeof(seeds[0]))
        return 0;
    length = seeds[number].length < room ? seeds[number].length : room;
    memcpy(into, seeds[number].bytes, length);
    return length;
}

static void check_map(const struct wire_limits *limits, const struct wire_frame *frame,
                      const uint8_t *payload)
{
    const char *reason = NULL;
    struct wire_run run;
    uint64_t at = 0;

    for (uint32_t i = 0; i < frame->count; i++) {
        if (wire_read_run(limits, payload, i, at, &run, &reason) < 0) {
            FUZZ_REQUIRE(reason && *reason);
            return;
        }
        FUZZ_REQUIRE(run.page == at && run.pages > 0);
        at += run.pages;
        FUZZ_REQUIRE(at <= limits->pages);
    }
}

static void check_frame(const struct wire_limits *limits, const struct wire_frame *frame,
                        const uint8_t *payload, uint32_t payload_bytes)
{
    uint64_t words = (frame->count + 63ULL) / 64;

    FUZZ_REQUIRE(payload_bytes <= WIRE_FRAME_MAX - WIRE_HEADER_BYTES);
    FUZZ_REQUIRE(strcmp(wire_type_name(frame->type), "unknown") != 0);
    switch (frame->type) {
    case WIRE_DATA:
        FUZZ_REQUIRE(payload_bytes == frame->count * WIRE_PAGE_BYTES);
        FUZZ_REQUIRE(frame->page + frame->count <= limits->pages);
        break;
    case WIRE_ZERO:
    case WIRE_REF:
    case WIRE_WANT: FUZZ_REQUIRE(frame->page + frame->count <= limits->pages); break;
    case WIRE_HAVE:
    case WIRE_PLACED:
        FUZZ_REQUIRE(payload_bytes == words * 8);
        FUZZ_REQUIRE(frame->page / 64 + words <= (limits->pages + 63) / 64);
        break;
    case WIRE_MAP: check_map(limits, frame, payload); break;
    case WIRE_DONE: FUZZ_REQUIRE(payload_bytes == limits->regions * 8); break;
    default: break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static const enum wire_reader readers[] = {WIRE_AT_SOURCE, WIRE_AT_DESTINATION_URGENT,
                                               WIRE_AT_DESTINATION_BULK};
    struct fuzz_input input = {data, data + bytes};
    struct wire_limits limits = {.reader = readers[fuzz_take_u8(&input) % 3]};

    limits.pages = (uint64_t)fuzz_take_u8(&input) << 20 | (1 + fuzz_take_u8(&input));
    limits.regions = fuzz_take_u8(&input) % WIRE_SUMS_MAX;
    limits.contents = (uint32_t)limits.pages / 2;
    while ((size_t)(input.end - input.at) >= WIRE_HEADER_BYTES) {
        struct wire_frame frame;
        const char *reason = NULL;
        uint32_t payload;

        if (wire_read_header(&limits, input.at, &frame, &payload, &reason) < 0) {
            FUZZ_REQUIRE(reason && *reason);
            return 0;
        }
        input.at += WIRE_HEADER_BYTES;
        if ((size_t)(input.end - input.at) < payload)
            return 0;
        check_frame(&limits, &frame, input.at, payload);
        input.at += payload;
    }
    return 0;
}
