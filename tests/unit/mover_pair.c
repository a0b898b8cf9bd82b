/* SPDX-License-Identifier: Apache-2.0 */
/* Two movers as processes, in their sandboxes, over real connections. */
#include <criterion/criterion.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mover_world.h"

TestSuite(mover_pair, .fini = world_kill_all);

static bool both_completed(struct world *world)
{
    return world->source.status.outcome == ORDER_COMPLETED &&
           world->destination.status.outcome == ORDER_COMPLETED;
}

static bool both_failed(struct world *world)
{
    return world->source.status.outcome == ORDER_SOURCE_RUNS &&
           world->destination.status.outcome == ORDER_SOURCE_RUNS;
}

static bool source_failed(struct world *world)
{
    return world->source.status.outcome == ORDER_SOURCE_RUNS;
}

static bool destination_runs(struct world *world)
{
    return world->destination.phase == MOVER_PHASE_RUNNING &&
           world->source.phase == MOVER_PHASE_COMMITTED;
}

/* The pages move: the destination wants, the source gives. */
static void want(struct world *world)
{
    cr_assert_eq(send(world->destination.links[MOVER_URGENT], "want", 4, MSG_NOSIGNAL), 4);
}

static void complete(struct world *world)
{
    world_until(world, "the guest runs at the destination", destination_runs);
    want(world);
    world_until(world, "both sides completed", both_completed);
    cr_assert_eq(world->destination.needs, 1);
    cr_assert_eq(world->source.asked[MOVER_ABORT], 0);
    cr_assert_eq(world->destination.asked[MOVER_RUN], 1);
    cr_assert_gt(world->source.status.downtime_ns, 0);
    cr_assert_eq(world->source.status.fault_max_us, 900);
}

Test(mover_pair, guest_moves_in_the_clear, .timeout = 60)
{
    struct world world;

    world_open(&world, false);
    world_begin(&world);
    complete(&world);
    cr_assert_eq(world.source.status.reconnects, 0);
    cr_assert_gt(world.source.status.bytes_sent, 200000);
    world_close(&world);
}

Test(mover_pair, guest_moves_under_tls, .timeout = 60)
{
    struct world world;

    world_open(&world, true);
    world_begin(&world);
    complete(&world);
    cr_assert_eq(world.source.status.reconnects, 0);
    world_close(&world);
}

Test(mover_pair, certificates_of_another_authority_are_refused, .timeout = 60)
{
    for (int who = 0; who < 2; who++) {
        struct world world;

        world_open(&world, true);
        world_certify(&world, who ? &world.source : &world.destination, true);
        world_begin(&world);
        world_until(&world, "both gave up", both_failed);
        cr_assert_eq(world.destination.needs, 0);
        world_close(&world);
    }
}

Test(mover_pair, host_that_is_not_the_one_that_was_named_is_refused, .timeout = 60)
{
    struct world world;

    world_open(&world, true);
    strcpy(world.source.start.host, "localhost"); /* its certificate says 127.0.0.1 */
    world_begin(&world);
    world_until(&world, "both gave up", both_failed);
    cr_assert_eq(world.destination.needs, 0);
    cr_assert(strstr(world.source.status.words, "certificate is not good"), "%s",
              world.source.status.words);
    world_close(&world);
}

Test(mover_pair, other_ram_is_refused_by_name, .timeout = 60)
{
    struct world world;

    world_open(&world, false);
    world.destination.pages++;
    world_begin(&world);
    world_until(&world, "both gave up", both_failed);
    cr_assert(strstr(world.source.status.words, "has 4096 pages"), "%s", world.source.status.words);
    cr_assert_eq(world.source.asked[MOVER_STOP], 0);
    world_close(&world);
}

static void cut_after_commit(bool tls, bool at_source)
{
    struct world world;

    world_open(&world, tls);
    world_begin(&world);
    world_until(&world, "the guest runs at the destination", destination_runs);
    world_cut(at_source ? &world.source : &world.destination);
    world_until(&world, "both sides completed", both_completed);
    cr_assert_geq(world.source.status.reconnects, 1);
    cr_assert_eq(world.destination.asked[MOVER_RUN], 1);
    world_close(&world);
}

Test(mover_pair, cut_after_commit_is_repaired, .timeout = 60)
{
    cut_after_commit(false, true);
    cut_after_commit(false, false);
    cut_after_commit(true, true);
    cut_after_commit(true, false);
}

static bool source_is_cut_off(struct world *world)
{
    return !world->source.status.linked && world->source.status.stage == ORDER_STAGE_POSTCOPY;
}

Test(mover_pair, silence_is_noticed_and_repaired, .timeout = 60)
{
    struct world world;

    world_open(&world, false);
    world_begin(&world);
    world_until(&world, "the guest runs at the destination", destination_runs);
    kill(world.destination.mover, SIGSTOP);
    world_until(&world, "the source has noticed", source_is_cut_off);
    kill(world.destination.mover, SIGCONT);
    world_until(&world, "both sides completed", both_completed);
    cr_assert_eq(world.destination.asked[MOVER_RUN], 1);
    world_close(&world);
}

static void kill_mover_after_commit(bool tls, bool at_source)
{
    struct world world;
    struct side *side;

    world_open(&world, tls);
    side = at_source ? &world.source : &world.destination;
    world_begin(&world);
    world_until(&world, "the guest runs at the destination", destination_runs);
    world_replace(side);
    world_until(&world, "both sides completed", both_completed);
    cr_assert_eq(world.destination.asked[MOVER_RUN], 1);
    cr_assert_eq(world.source.asked[MOVER_ABORT], 0);
    world_close(&world);
}

Test(mover_pair, killed_movers_are_replaced, .timeout = 60)
{
    kill_mover_after_commit(false, true);
    kill_mover_after_commit(false, false);
    kill_mover_after_commit(true, true);
    kill_mover_after_commit(true, false);
}

static bool is_in_precopy(struct world *world)
{
    return world->source.asked[MOVER_START_PRECOPY] > 0;
}

Test(mover_pair, mover_killed_before_commit_leaves_the_guest_at_the_source, .timeout = 60)
{
    struct world world;

    world_open(&world, false);
    world_begin(&world);
    world_until(&world, "pre-copy", is_in_precopy);
    world.source.phase = MOVER_PHASE_PRECOPY;
    world_replace(&world.source);
    world_until(&world, "both gave up", both_failed);
    cr_assert_eq(world.source.asked[MOVER_ABORT], 1);
    cr_assert_eq(world.destination.asked[MOVER_RUN], 0);
    world_close(&world);
}

Test(mover_pair, refused_commit_ends_it_and_tells_the_destination, .timeout = 60)
{
    struct world world;

    world_open(&world, false);
    world.source.refuses_commit = true;
    world_begin(&world);
    world_until(&world, "both gave up", both_failed);
    cr_assert_eq(world.destination.asked[MOVER_RUN], 0);
    world_close(&world);
}

Test(mover_pair, nobody_listens_there, .timeout = 60)
{
    struct world world;

    world_open(&world, false);
    close(world.listener);
    world.listener = -1;
    world_begin(&world);
    world_until(&world, "the source gave up", source_failed);
    cr_assert_eq(world.source.asked[MOVER_STOP], 0);
    world_close(&world);
}
