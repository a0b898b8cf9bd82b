/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The whole daemon under simulated VMMs (vmm-hooks/sim). A walk that fails prints its seed;
 * MEMD_SEED repeats it, and MEMD_TEST_LOG shows what memd said meanwhile.
 */
#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdlib.h>

#include "sim.h"

#define SHORT_STEPS 15000U
#define FULL_STEPS  1000000U

static struct sim sim;

static uint64_t from_environment(const char *name, uint64_t otherwise)
{
    const char *word = getenv(name);

    return word && *word ? strtoull(word, NULL, 10) : otherwise;
}

static uint64_t steps(void)
{
    return from_environment("MEMD_STEPS", getenv("MEMD_FULL") ? FULL_STEPS : SHORT_STEPS);
}

/* The walk's end, in figures: a walk in which nothing happens proves nothing. */
static void say_figures(void)
{
    fprintf(stderr,
            "seed %" PRIu64 ": %" PRIu64 " steps, %" PRIu64 " turns, %u guests, %" PRIu64
            " wanted, %" PRIu64 " merged, %" PRIu64 " remapped, %" PRIu64 " dropped, %" PRIu64
            " mismatched, %" PRIu64 " lies, %" PRIu64 " sessions lost, %u rests, trace %016" PRIx64
            "\n",
            sim.options.seed, sim.steps, sim.turns, sim.vmm_count, sim.wanted, sim.merged,
            sim.remapped, sim.dropped, sim.mismatched, sim.lies, sim.sessions_lost, sim.rests,
            sim.trace);
}

static void walk(struct sim_options options, uint64_t steps)
{
    options.seed = from_environment("MEMD_SEED", options.seed);
    options.verbose = getenv("MEMD_TEST_LOG") != NULL;
    sim_start(&sim, &options);
    sim_walk(&sim, steps);
    say_figures();
    sim_stop(&sim);
    cr_assert_eq(sim.wrong[0], 0, "%s (MEMD_SEED=%" PRIu64 " repeats it)", sim.wrong, options.seed);
    cr_assert_gt(sim.merged, 0);
    cr_assert_gt(sim.dropped, 0);
}

Test(sim, honest_agents_that_are_late_and_come_and_go)
{
    walk((struct sim_options){.seed = 1}, steps());
}

Test(sim, memd_is_started_again_and_again)
{
    walk((struct sim_options){.seed = 2, .restarts = true}, steps());
}

Test(sim, liars_among_the_honest)
{
    walk((struct sim_options){.seed = 3, .liars = true, .restarts = true}, steps());
}

Test(sim, contents_that_differ_have_one_hash)
{
    walk((struct sim_options){.seed = 4, .liars = true, .weak_hashes = true}, steps());
}

Test(sim, shares_move_to_other_segments)
{
    walk((struct sim_options){.seed = 5, .slow = true}, steps());
    cr_assert_gt(sim.remapped, 0);
}

Test(sim, agents_lose_patience_with_a_memd_that_stands_still)
{
    walk((struct sim_options){.seed = 7, .cuts = true, .restarts = true}, steps());
}

Test(sim, a_seed_that_does_not_repeat_its_walk)
{
    struct sim_options options = {.seed = 6, .liars = true, .restarts = true};
    uint64_t trace;

    walk(options, 4000);
    trace = sim.trace;
    walk(options, 4000);
    cr_assert_eq(sim.trace, trace);
    options.seed = sim.options.seed + 1;
    sim_start(&sim, &options);
    sim_walk(&sim, 4000);
    sim_stop(&sim);
    cr_assert_neq(sim.trace, trace);
}
