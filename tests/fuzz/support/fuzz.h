/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every fuzz target has: tests/fuzz/NAME.c becomes fuzz_NAME (libFuzzer, preset `fuzz`) and
 * replay_NAME (every compiler: the seeds, and the same few thousand mutations of them each time).
 *
 * A target must not depend on time or on what it was given before: what it builds it takes down.
 */
#ifndef TESTS_FUZZ_FUZZ_H
#define TESTS_FUZZ_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The target: 0; a mistake that it finds ends the process. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

/* The number-th input to begin with, as text or bytes that `into` has room for. Its length; 0:
 * there are no more. A target without seeds leaves it out. */
size_t fuzz_seed(size_t number, uint8_t *into, size_t room);

#define FUZZ_REQUIRE(condition)                                                     \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

/* Seeds that are strings. */
static inline size_t fuzz_seed_of(const char *const *strings, size_t count, size_t number,
                                  uint8_t *into, size_t room)
{
    size_t length = number < count ? strlen(strings[number]) : 0;

    if (length > room)
        length = room;
    memcpy(into, number < count ? strings[number] : "", length);
    return length;
}

/* Takes numbers off the front of an input; zeros behind its end. */
struct fuzz_input {
    const uint8_t *at, *end;
};

static inline void fuzz_take(struct fuzz_input *input, void *into, size_t bytes)
{
    size_t left = (size_t)(input->end - input->at);

    memset(into, 0, bytes);
    if (bytes > left)
        bytes = left;
    memcpy(into, input->at, bytes);
    input->at += bytes;
}

static inline uint8_t fuzz_take_u8(struct fuzz_input *input)
{
    uint8_t value;

    fuzz_take(input, &value, sizeof(value));
    return value;
}

static inline uint16_t fuzz_take_u16(struct fuzz_input *input)
{
    uint16_t value;

    fuzz_take(input, &value, sizeof(value));
    return value;
}

static inline uint32_t fuzz_take_u32(struct fuzz_input *input)
{
    uint32_t value;

    fuzz_take(input, &value, sizeof(value));
    return value;
}

static inline uint64_t fuzz_take_u64(struct fuzz_input *input)
{
    uint64_t value;

    fuzz_take(input, &value, sizeof(value));
    return value;
}

#endif
