/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The destination's guest reads, writes and gives up pages at random while they come, and while the
 * connections are cut: each page belongs to one thread, which knows at every moment what it must
 * hold. Round after round, until there were enough operations.
 */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "agent_move.h"
#include "discard.h"

#define THREADS 4U

/* What a page must hold. */
#define AS_SENT  UINT32_MAX
#define GIVEN_UP (UINT32_MAX - 1)

static struct move_pair pair;
static uint32_t holds[MOVE_PAGES];
static uint32_t over; /* the round is */

struct worker {
    pthread_t thread;
    uint64_t seed;
    uint32_t number;
    uint64_t operations;
    uint32_t wrong; /* a page + 1 */
};

static uint32_t next_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005ULL + 1442695040888963407ULL;
    return (uint32_t)(*seed >> 33);
}

static bool is_as_it_must(uint32_t page)
{
    const uint8_t *at = move_at(&pair.to, page);

    if (holds[page] == GIVEN_UP)
        return move_is_zero(at);
    return holds[page] == AS_SENT ? move_is_right(&pair, page) : move_holds(at, holds[page]);
}

static void give_up(uint32_t page)
{
    struct ram_block *block = ram_find(&pair.to.ram, move_at(&pair.to, page));

    lock_take(&block->lock);
    discard_pages(&pair.to.ram, block,
                  (uint32_t)((move_at(&pair.to, page) - block->base) / (long)PAGE_BYTES), 1,
                  MADV_DONTNEED);
    lock_release(&block->lock);
    holds[page] = GIVEN_UP;
}

static void *work(void *context)
{
    struct worker *worker = context;

    while (!__atomic_load_n(&over, __ATOMIC_ACQUIRE) && !worker->wrong) {
        uint32_t what = next_random(&worker->seed);
        uint32_t page =
            next_random(&worker->seed) % (MOVE_PAGES / THREADS) * THREADS + worker->number;

        worker->operations++;
        if (what % 16 == 0) {
            give_up(page);
        } else if (what % 16 == 1) {
            holds[page] = what % 1000000;
            move_write(move_at(&pair.to, page), holds[page]);
        } else if (!is_as_it_must(page)) {
            worker->wrong = page + 1;
        }
    }
    return NULL;
}

/* One migration; returns how many operations there were. */
static uint64_t move_once(uint64_t seed)
{
    struct mover_tuning tuning = {.bandwidth = 16 << 20};
    struct worker workers[THREADS];
    uint64_t operations = 0;

    for (uint32_t page = 0; page < MOVE_PAGES; page++)
        holds[page] = AS_SENT;
    over = 0;
    move_set_up(&pair);
    move_fill(&pair);
    move_open(&pair, &tuning);
    move_begin(&pair);
    move_wait(&pair.incoming.mapped); /* before that no guest runs there */
    for (uint32_t i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){.seed = seed + i, .number = i};
        pthread_create(&workers[i].thread, NULL, work, &workers[i]);
    }
    for (uint32_t cut = 0; cut < seed % 8; cut++) {
        usleep((useconds_t)(next_random(&seed) % 4000));
        move_link(&pair);
    }
    move_wait_proven(&pair);
    usleep(2000);
    __atomic_store_n(&over, 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < THREADS; i++) {
        pthread_join(workers[i].thread, NULL);
        cr_assert_eq(workers[i].wrong, 0, "seed %lu: page %u", (unsigned long)seed,
                     workers[i].wrong - 1);
        operations += workers[i].operations;
    }
    for (uint32_t page = 0; page < MOVE_PAGES; page++)
        cr_assert(is_as_it_must(page), "seed %lu: page %u at the end", (unsigned long)seed, page);
    cr_assert_eq(pair.to.ram.refused_transitions, 0);
    move_tear_down(&pair);
    return operations;
}

Test(agent_move_stress, a_guest_that_gives_pages_up_while_they_come, .timeout = 3000)
{
    uint64_t wanted = getenv("MEMD_FULL") ? 10000000 : 1000000;
    uint64_t operations = 0;

    for (uint64_t seed = 1; operations < wanted; seed++)
        operations += move_once(seed * 7919);
}
