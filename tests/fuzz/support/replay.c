/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs a fuzz target without libFuzzer.
 *
 *   replay_NAME              every seed, and mutations of them for about two seconds, at most
 *                            MUTATIONS and always in the same order
 *   replay_NAME --seeds DIR  writes the seeds into DIR, for fuzz_NAME to begin with
 *   replay_NAME FILE...      these inputs, as fuzz_NAME leaves them (crash-*)
 */
#include <time.h>

#include "fuzz.h"

#define MUTATIONS  4000U
#define INPUT_MAX  4096U
#define PATIENCE_S 2

__attribute__((weak)) size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    (void)number;
    (void)into;
    (void)room;
    return 0;
}

/* xorshift64, always from the same state. */
static uint64_t random_state = 0x9e3779b97f4a7c15ULL;

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static size_t below(size_t limit)
{
    return limit ? next_random() % limit : 0;
}

/* One change: a byte, a bit, a piece removed, doubled or filled with a number that is often wrong.
 */
static size_t mutate(uint8_t *input, size_t bytes)
{
    static const uint8_t telling[] = {0, 1, 0x7f, 0x80, 0xff, '\n', '"', ',', '=', '%'};
    size_t at = below(bytes), length = 1 + below(8);

    if (length > bytes - at)
        length = bytes - at;
    switch (below(5)) {
    case 0:
        if (bytes)
            input[at] = (uint8_t)next_random();
        break;
    case 1:
        if (bytes)
            input[at] ^= (uint8_t)(1U << below(8));
        break;
    case 2: memmove(input + at, input + at + length, bytes - at - length); return bytes - length;
    case 3:
        if (bytes + length > INPUT_MAX)
            break;
        memmove(input + at + length, input + at, bytes - at);
        return bytes + length;
    default: memset(input + at, telling[below(sizeof(telling))], length);
    }
    return bytes;
}

static size_t count_seeds(void)
{
    static uint8_t seed[INPUT_MAX];
    size_t count = 0;

    while (fuzz_seed(count, seed, sizeof(seed)) > 0)
        count++;
    return count;
}

static double now_s(void)
{
    struct timespec now;

    clock_gettime(CLOCK_BOOTTIME, &now); /* the other one may be the target's own */
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static int replay_seeds(void)
{
    static uint8_t input[INPUT_MAX];
    size_t seeds = count_seeds(), done = 0;
    double end;

    for (size_t i = 0; i < seeds; i++)
        LLVMFuzzerTestOneInput(input, fuzz_seed(i, input, sizeof(input)));
    end = now_s() + PATIENCE_S;
    for (; done < MUTATIONS && now_s() < end; done++) {
        size_t bytes = fuzz_seed(seeds ? done % seeds : 0, input, sizeof(input));

        for (size_t changes = 1 + below(6); changes > 0; changes--)
            bytes = mutate(input, bytes);
        LLVMFuzzerTestOneInput(input, bytes);
    }
    printf("%zu seeds, %zu mutations\n", seeds, done);
    return 0;
}

static int write_seeds(const char *directory)
{
    static uint8_t seed[INPUT_MAX];
    size_t bytes;

    for (size_t i = 0; (bytes = fuzz_seed(i, seed, sizeof(seed))) > 0; i++) {
        char path[4096];
        FILE *file;

        snprintf(path, sizeof(path), "%s/seed-%zu", directory, i);
        file = fopen(path, "wb");
        if (!file || fwrite(seed, 1, bytes, file) != bytes || fclose(file)) {
            perror(path);
            return 1;
        }
    }
    return 0;
}

static int replay_file(const char *path)
{
    static uint8_t input[1 << 20];
    FILE *file = fopen(path, "rb");
    size_t bytes;

    if (!file) {
        perror(path);
        return 1;
    }
    bytes = fread(input, 1, sizeof(input), file);
    fclose(file);
    return LLVMFuzzerTestOneInput(input, bytes);
}

int main(int count, char **words)
{
    int result = 0;

    if (count == 3 && strcmp(words[1], "--seeds") == 0)
        return write_seeds(words[2]);
    if (count == 1)
        return replay_seeds();
    for (int i = 1; i < count; i++)
        result |= replay_file(words[i]);
    return result;
}
