/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs a fuzz target without libFuzzer: on files as they are, and on each of them spoilt in ways
 * that follow from a number, the same every time.
 *
 * usage: replay_NAME SPOILT FILE...      SPOILT: how many spoilt copies of each
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "target.h"

#define FILE_BYTES_MAX (1U << 20)

static uint64_t state;

/* xorshift64 */
static uint64_t random_number(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* Writes something over a place: a bit, a byte, or a number that readers trip over. */
static void spoil(uint8_t *bytes, size_t count)
{
    static const uint64_t numbers[] = {
        0,         1, 0xffff, 4095, 4096, UINT32_MAX, UINT64_MAX, 1ULL << 60, UINT64_MAX - 4095,
        1ULL << 63};
    size_t at = random_number() % count, width = (size_t)1 << random_number() % 4;
    uint64_t number = numbers[random_number() % (sizeof(numbers) / sizeof(numbers[0]))];

    switch (random_number() % 3) {
    case 0: bytes[at] ^= (uint8_t)(1 << random_number() % 8); break;
    case 1: bytes[at] = (uint8_t)random_number(); break;
    default:
        at -= at % width;
        memcpy(bytes + at, &number, at + width <= count ? width : count - at);
    }
}

/* A copy of the exact size, so that AddressSanitizer and valgrind see every byte too far. */
static void run_spoilt(const uint8_t *bytes, size_t count)
{
    size_t kept = random_number() % 8 ? count : random_number() % (count + 1);
    uint8_t *copy = malloc(kept ? kept : 1);

    if (!copy)
        abort();
    memcpy(copy, bytes, kept);
    for (uint64_t i = random_number() % 4; kept && i < 4; i++)
        spoil(copy, kept);
    LLVMFuzzerTestOneInput(copy, kept);
    free(copy);
}

static int run_file(const char *path, unsigned long spoilt)
{
    static uint8_t bytes[FILE_BYTES_MAX];
    FILE *file = fopen(path, "rbe");
    size_t count;

    if (!file) {
        perror(path);
        return 1;
    }
    count = fread(bytes, 1, sizeof(bytes), file);
    fclose(file);
    state = 88172645463325252ULL;
    LLVMFuzzerTestOneInput(bytes, count);
    for (unsigned long i = 0; count && i < spoilt; i++)
        run_spoilt(bytes, count);
    return 0;
}

int main(int argc, char **argv)
{
    int failed = argc < 3;

    if (failed)
        fprintf(stderr, "usage: %s SPOILT FILE...\n", argv[0]);
    for (int i = 2; i < argc; i++)
        failed |= run_file(argv[i], strtoul(argv[1], NULL, 10));
    return failed;
}
