/* SPDX-License-Identifier: Apache-2.0 */
/* Things that cross on their way, and claims that cost nothing to make: what the simulation found.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "host_world.h"

#define PAGES 100U

/* Two guests of one domain that share everything. */
static void share(struct world *world, struct fake *fakes)
{
    char config[128];

    snprintf(config, sizeof(config), "[domain web]\nuids = 0 %u\n", (unsigned)getuid());
    world_start(world, config);
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], world, i ? "b" : "a", "web", PAGES);
        for (uint32_t page = 0; page < PAGES; page++)
            fake_write(&fakes[i], page, page + 1);
        fake_offer_all(&fakes[i]);
    }
    UNTIL(world, fakes, 2, fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 2 * PAGES);
}

static void write_all(struct fake *fake)
{
    for (uint32_t page = 0; page < PAGES; page++)
        fake_write(fake, page, 9000 + page);
}

static void clean_up(struct world *world, struct fake *fakes)
{
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(world);
}

/* The connection has broken; the guest has written to all its pages before there is a new one. */
static void come_back_with_segments(struct fake *fake, struct world *world)
{
    struct message_plain end = {{MESSAGE_HELD_END, sizeof(end)}};
    struct fake before = *fake;

    fake_connect(fake, world, before.token);
    memcpy(fake->segments, before.segments, sizeof(fake->segments));
    memcpy(fake->segment_pages, before.segment_pages, sizeof(fake->segment_pages));
    fake->pages = before.pages;
    fake->page_count = before.page_count;
    cr_assert(fake_hello(fake, true));
    fake_ram(fake, 0, PAGES, 0x7f0000000000);
    for (uint32_t segment = 0; segment < FAKE_SEGMENTS; segment++) {
        struct message_segment held = {
            {MESSAGE_HELD, sizeof(held)}, segment, fake->segment_pages[segment]};

        if (fake->segments[segment] >= 0)
            fake_send(fake, &held, sizeof(held), fake->segments[segment]);
    }
    for (uint32_t page = 0; page < PAGES; page++) {
        if (fake->pages[page].slot != SLOT_NONE)
            fake_put(fake, RING_HAVE, page, fake->pages[page].slot);
    }
    fake_bell(fake);
    fake_send(fake, &end, sizeof(end), -1);
}

/* The shares of b were let go, and a was told to drop the segment, which it has not answered. */
static struct trust_domain *begin_dropping(struct world *world, struct fake *fakes)
{
    struct trust_domain *domain;

    share(world, fakes);
    domain = fake_domain(&fakes[0]);
    fake_disconnect(&fakes[1]);
    UNTIL(world, fakes, 1, world->daemon.agents.count == 1);
    registry_let_go(registry_find(&world->daemon, "b"));
    UNTIL(world, fakes, 1, domain->member_count == 1);
    write_all(&fakes[0]);
    fake_bell(&fakes[0]);
    fakes[0].answers = false;
    UNTIL(world, fakes, 1, domain->store.first->state == SEGMENT_DROPPING);
    return domain;
}

Test(host_crossed, a_segment_on_its_way_out_is_dropped_by_who_comes_back_with_it)
{
    struct world world;
    struct fake fakes[2];
    struct trust_domain *domain = begin_dropping(&world, fakes);

    for (uint32_t page = 0; page < PAGES; page++)
        fakes[1].pages[page].slot = SLOT_NONE;
    come_back_with_segments(&fakes[1], &world);
    UNTIL(&world, fakes, 2, domain->store.first->holders == 2);
    fakes[0].answers = true;
    UNTIL(&world, fakes, 2, !domain->store.first);
    cr_assert_eq(fakes[1].drops, 1);
    clean_up(&world, fakes);
}

static void say_dropped(struct fake *fake)
{
    struct message_segment dropped = {
        {MESSAGE_DROPPED, sizeof(dropped)}, 0, fake->segment_pages[0]};

    fake_send(fake, &dropped, sizeof(dropped), -1);
}

/* The ring and the socket are two ways: what was written first is read first all the same. */
Test(host_crossed, dropped_does_not_overtake_the_end_of_shares)
{
    struct world world;
    struct fake fakes[2];
    struct trust_domain *domain = begin_dropping(&world, fakes);

    come_back_with_segments(&fakes[1], &world);
    fakes[1].answers = false;
    write_all(&fakes[1]);
    say_dropped(&fakes[1]);
    fakes[0].answers = true;
    UNTIL(&world, fakes, 1, !domain->store.first);
    cr_assert_eq(world.daemon.agents.ended_badly, 0);
    clean_up(&world, fakes);
}

Test(host_crossed, dropped_by_who_still_shares_takes_no_slot_away)
{
    struct world world;
    struct fake fakes[2];
    struct trust_domain *domain = begin_dropping(&world, fakes);

    come_back_with_segments(&fakes[1], &world);
    fakes[1].answers = false;
    UNTIL(&world, fakes, 1, domain->store.users == PAGES);
    say_dropped(&fakes[1]);
    fakes[0].answers = true;
    UNTIL(&world, fakes, 1, domain->store.first->holders == 0);
    for (int i = 0; i < 20; i++)
        world_turn(&world);
    cr_assert_not_null(domain->store.first);
    write_all(&fakes[1]); /* BROKEN, for slots that must be there */
    fake_bell(&fakes[1]);
    UNTIL(&world, fakes, 1, !domain->store.first);
    clean_up(&world, fakes);
}

/* memd does not take the segment back, and by the time that the agent hears of it the guest has
 * written to pages that memd has not heard of either. */
Test(host_crossed, shares_end_that_were_not_taken_back)
{
    struct world world;
    struct fake fakes[2];

    share(&world, fakes);
    fake_disconnect(&fakes[1]);
    UNTIL(&world, fakes, 1, world.daemon.agents.count == 1);
    close(fakes[1].segments[0]);
    fakes[1].segments[0] = open("/dev/null", O_RDWR | O_CLOEXEC);
    come_back_with_segments(&fakes[1], &world);
    fakes[1].answers = false;
    UNTIL(&world, fakes, 1, agents_is_leaving(fakes[1].guest->session));
    write_all(&fakes[1]);
    fake_bell(&fakes[1]);
    UNTIL(&world, fakes, 1, fakes[1].ring->to_memd.tail == fakes[1].own_head);
    fakes[1].answers = true;
    UNTIL(&world, fakes, 2, fakes[1].detach_came && fakes[1].ended);
    cr_assert_eq(world.daemon.agents.ended_badly, 0);
    clean_up(&world, fakes);
}

/* As many descriptors as are open now, and not one more. */
static struct rlimit stop_descriptors(void)
{
    struct rlimit before, none;
    int next = dup(0);

    close(next);
    cr_assert_eq(getrlimit(RLIMIT_NOFILE, &before), 0);
    none = before;
    none.rlim_cur = (rlim_t)next;
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &none), 0);
    return before;
}

Test(host_crossed, an_agent_that_there_is_no_descriptor_for_may_come_again)
{
    struct world world;
    struct fake fake;
    struct guest *guest;
    struct rlimit before;

    world_start(&world, "");
    guest = world_register(&world, "a", NULL);
    fake_connect(&fake, &world, guest->token);
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 1);
    before = stop_descriptors();
    cr_assert_not(fake_hello(&fake, false));
    cr_assert_eq(setrlimit(RLIMIT_NOFILE, &before), 0);
    fake_close(&fake);
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 0);
    fake_connect(&fake, &world, guest->token);
    cr_assert(fake_hello(&fake, false));
    fake_close(&fake);
    world_stop(&world);
}

/* Leaving it page by page would take 32768 turns, and 1.2 GB of page tables. */
Test(host_crossed, ram_that_nobody_speaks_of_costs_nothing)
{
    struct world world;
    struct fake fake;
    uint64_t turns;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 1U << 28);
    fake_put(&fake, RING_OFFER, (1U << 28) - 1, 42);
    fake_bell(&fake);
    UNTIL(&world, NULL, 0, fake.guest->session && fake_domain(&fake)->counters.offers == 1);
    cr_assert_leq(trust_domain_table_bytes(fake_domain(&fake)), 1U << 20);
    fake_disconnect(&fake);
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 0);
    turns = world.daemon.loop.turns;
    registry_let_go(fake.guest);
    UNTIL(&world, NULL, 0, !world.daemon.agents.first);
    cr_assert_leq(world.daemon.loop.turns - turns, 50);
    fake_close(&fake);
    world_stop(&world);
}
