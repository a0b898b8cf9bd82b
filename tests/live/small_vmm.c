/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The smallest thing that looks like a VMM: announces 32 MiB of "guest RAM" with MADV_MERGEABLE,
 * fills it with four copies of known content, and verifies that for ever. Ends with 7 on SIGTERM,
 * with 1 when a byte was wrong. Built twice: statically linked it can't be preloaded.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#define RAM_BYTES  (32UL << 20)
#define RAM_WORDS  (RAM_BYTES / sizeof(uint64_t))
#define PART_WORDS (RAM_WORDS / 4)

static volatile sig_atomic_t told_to_end;

static void on_term(int number)
{
    (void)number;
    told_to_end = 1;
}

static uint64_t expected(size_t word)
{
    return (word % PART_WORDS + 1) * 0x9e3779b97f4a7c15ULL;
}

static size_t wrong_words(const volatile uint64_t *ram)
{
    size_t wrong = 0;

    for (size_t i = 0; i < RAM_WORDS; i++)
        wrong += ram[i] != expected(i);
    return wrong;
}

int main(void)
{
    uint64_t *ram =
        mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (ram == MAP_FAILED)
        return 2;
    signal(SIGTERM, on_term);
    madvise(ram, RAM_BYTES, MADV_MERGEABLE); /* fails on a kernel without KSM: nobody merges then */
    for (size_t i = 0; i < RAM_WORDS; i++)
        ram[i] = expected(i);
    printf("small_vmm: ready\n");
    fflush(stdout);
    while (!told_to_end) {
        if (wrong_words(ram)) {
            printf("small_vmm: CORRUPT\n");
            return 1;
        }
        usleep(200000);
    }
    return 7;
}
