/* SPDX-License-Identifier: Apache-2.0 */
/* Things that cross on their way, and claims that cost nothing to make: what the simulation found.
 */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "host_http.h"
#include "host_world.h"
#include "match.h"

#define PAGES 100U

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

static void say_end(struct fake *fake)
{
    struct message_plain end = {{MESSAGE_HELD_END, sizeof(end)}};

    fake_bell(fake);
    fake_send(fake, &end, sizeof(end), -1);
}

/* Everything that comes before HELD_END. */
static void say_held(struct fake *fake)
{
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
}

static void come_back(struct fake *fake, struct world *world)
{
    struct fake before = *fake;

    fake_connect(fake, world, before.token);
    memcpy(fake->segments, before.segments, sizeof(fake->segments));
    memcpy(fake->segment_pages, before.segment_pages, sizeof(fake->segment_pages));
    fake->pages = before.pages;
    fake->page_count = before.page_count;
    cr_assert(fake_hello(fake, true));
}

/* The connection has broken; the guest has written to all its pages before there is a new one. */
static void come_back_with_segments(struct fake *fake, struct world *world)
{
    come_back(fake, world);
    say_held(fake);
    say_end(fake);
}

/* The shares of b were let go, and a was told to drop the segment, which it has not answered. */
static struct trust_domain *begin_dropping(struct world *world, struct fake *fakes)
{
    struct trust_domain *domain;

    fakes_share(world, fakes, PAGES);
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

    fakes_share(&world, fakes, PAGES);
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

/* ---- who hangs up before memd has read what it says ---- */

/* The segment is not what it was, and the agent that holds it is gone when memd finds out. */
Test(host_crossed, who_hangs_up_before_it_is_told_to_start_afresh_is_no_liar)
{
    struct world world;
    struct fake fakes[2];

    fakes_share(&world, fakes, PAGES);
    fake_disconnect(&fakes[1]);
    UNTIL(&world, fakes, 1, world.daemon.agents.count == 1);
    close(fakes[1].segments[0]);
    fakes[1].segments[0] = open("/dev/null", O_RDWR | O_CLOEXEC);
    come_back_with_segments(&fakes[1], &world);
    fake_disconnect(&fakes[1]);
    UNTIL(&world, fakes, 1, world.daemon.agents.count == 1);
    cr_assert_eq(world.daemon.agents.ended_badly, 0);
    clean_up(&world, fakes);
}

/* Its segment is on its way out: memd has a DROP for it, and nobody to send it to. */
Test(host_crossed, who_hangs_up_before_a_drop_is_no_liar)
{
    struct world world;
    struct fake fakes[2];

    (void)begin_dropping(&world, fakes);
    come_back_with_segments(&fakes[1], &world);
    fake_disconnect(&fakes[1]);
    UNTIL(&world, fakes, 1, world.daemon.agents.count == 1);
    cr_assert_eq(world.daemon.agents.ended_badly, 0);
    fakes[0].answers = true;
    clean_up(&world, fakes);
}

/* A greeting that breaks off says little about what the agent has: what memd knew holds. */
Test(host_crossed, a_greeting_that_breaks_off_takes_no_shares_away)
{
    struct world world;
    struct fake fakes[2];
    struct trust_domain *domain;

    fakes_share(&world, fakes, PAGES);
    domain = fake_domain(&fakes[0]);
    fake_disconnect(&fakes[1]);
    UNTIL(&world, fakes, 1, world.daemon.agents.count == 1);
    for (int i = 0; i < 3; i++) {
        come_back(&fakes[1], &world);
        fake_disconnect(&fakes[1]);
        UNTIL(&world, fakes, 1, world.daemon.agents.count == 1);
    }
    UNTIL(&world, fakes, 1, domain->member_count == 2);
    write_all(&fakes[0]);
    fake_bell(&fakes[0]);
    UNTIL(&world, fakes, 1, domain->store.users == PAGES);
    for (int i = 0; i < 20; i++)
        world_turn(&world);
    cr_assert_eq(domain->store.first->state, SEGMENT_LIVE);
    come_back_with_segments(&fakes[1], &world);
    UNTIL(&world, fakes, 2, domain->member_count == 2 && domain->store.users == PAGES);
    cr_assert_eq(fakes[1].drops, 0);
    cr_assert_eq(world.daemon.agents.ended_badly, 0);
    clean_up(&world, fakes);
}

/* HELD_END waits for the ring; what is offered there by now is of RAM that was plugged behind it,
 * in a message that memd has not read. */
Test(host_crossed, ram_that_is_plugged_behind_a_message_that_waits_is_known)
{
    struct world world;
    struct fake fakes[2];

    fakes_share(&world, fakes, PAGES);
    fake_disconnect(&fakes[1]);
    UNTIL(&world, fakes, 1, world.daemon.agents.count == 1);
    come_back_with_segments(&fakes[1], &world);
    fake_ram(&fakes[1], PAGES, 8, 0x7e0000000000);
    fake_put(&fakes[1], RING_OFFER, PAGES + 7, 42);
    fake_bell(&fakes[1]);
    UNTIL(&world, fakes, 2, fakes[1].ring->to_memd.tail == fakes[1].own_head);
    cr_assert_eq(world.daemon.agents.ended_badly, 0);
    cr_assert_not(fakes[1].ended);
    clean_up(&world, fakes);
}

/* What everybody says it has is so, however many they are. */
Test(host_crossed, a_slot_that_a_liar_claims_for_all_its_pages_is_the_neighbours_too)
{
    struct world world;
    struct fake fakes[2];
    uint32_t slot, count = (1U << 16) + 10;

    fakes_share(&world, fakes, PAGES);
    slot = fakes[0].pages[0].slot;
    for (int i = 0; i < 2; i++)
        fake_disconnect(&fakes[i]);
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 0);
    come_back(&fakes[0], &world);
    say_held(&fakes[0]);
    fakes[0].answers = false;
    fake_ram(&fakes[0], PAGES, count, 0x7e0000000000);
    for (uint32_t page = PAGES; page < PAGES + count; page++)
        fake_put(&fakes[0], RING_HAVE, page, slot);
    say_end(&fakes[0]);
    UNTIL(&world, NULL, 0, fakes[0].ring->to_memd.tail == fakes[0].own_head);
    come_back_with_segments(&fakes[1], &world);
    UNTIL(&world, &fakes[1], 1, fakes[1].ring->to_memd.tail == fakes[1].own_head);
    cr_assert_eq(world.daemon.agents.ended_badly, 0);
    cr_assert_not(fakes[1].ended);
    clean_up(&world, fakes);
}

/* ---- two answers for one page and slot ---- */

struct both {
    struct world world;
    struct fake fakes[2];
    struct ksm_member *member;
    uint32_t slot, other;
};

/* The share of page 0 was to move to `other`; it broke, and the page shall share `other` anew. */
static void ask_for_both(struct both *both)
{
    fakes_share(&both->world, both->fakes, PAGES);
    both->member = agents_member(both->fakes[0].guest->session);
    UNTIL(&both->world, both->fakes, 2, both->member->shared == PAGES);
    both->slot = both->fakes[0].pages[0].slot;
    both->other = both->fakes[0].pages[1].slot;
    both->member->remaps[both->member->remap_count++] = (struct ksm_remap){0, both->other};
    both->member->asked++;
    ksm_member_use(both->member, both->other);
    cr_assert_eq(ksm_match_broken(both->member, 0, both->slot), 0);
    ksm_match_merge(both->member->domain, ksm_ref_of(both->member, 0), both->other,
                    ksm_store_tag(&both->member->domain->store, both->other));
    cr_assert_eq(both->member->asked, 2);
}

static void check_and_clean_up(struct both *both, enum ksm_page_state state)
{
    struct trust_domain *domain = both->member->domain;
    const char *wrong = ksm_member_check(domain);

    cr_assert_null(wrong, "%s", wrong);
    cr_assert_eq(ksm_ref_state(domain, ksm_ref_of(both->member, 0)), state);
    cr_assert_eq(both->member->remap_count, 0);
    cr_assert_eq(both->member->asked, 0);
    clean_up(&both->world, both->fakes);
}

Test(host_crossed, the_first_of_two_answers_is_that_of_the_remap)
{
    struct both both;

    ask_for_both(&both);
    cr_assert_eq(ksm_match_not_merged(both.member, 0, both.other, NOT_MERGED_GONE), 0);
    cr_assert_eq(ksm_match_merged(both.member, 0, both.other), 0);
    check_and_clean_up(&both, PAGE_SHARED);
}

Test(host_crossed, both_of_two_answers_may_be_no)
{
    struct both both;

    ask_for_both(&both);
    cr_assert_eq(ksm_match_not_merged(both.member, 0, both.other, NOT_MERGED_GONE), 0);
    cr_assert_eq(ksm_match_not_merged(both.member, 0, both.other, NOT_MERGED_BUSY), 0);
    check_and_clean_up(&both, PAGE_UNKNOWN);
}

/* ---- RAM that comes and goes ---- */

static void say_gone(struct fake *fake, uint32_t first, uint32_t pages)
{
    struct message_ram_gone gone = {{MESSAGE_RAM_GONE, sizeof(gone)}, first, pages};

    fake_send(fake, &gone, sizeof(gone), -1);
}

/* Every other block leaves at once, the rest later and backwards. */
Test(host_crossed, blocks_that_come_and_go_cost_no_more_than_those_that_stay)
{
    enum { ROUNDS = 20, BLOCKS = 100, SIZE = 4 };
    const struct ksm_member *member;
    struct world world;
    struct fake fake;
    uint32_t page = PAGES;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, PAGES);
    member = agents_member(fake.guest->session);
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t first = page;

        for (int i = 0; i < BLOCKS; i++, page += SIZE) {
            fake_ram(&fake, page, SIZE, 0x7e0000000000 + (uint64_t)page * PAGE_BYTES);
            if (i % 2)
                say_gone(&fake, page, SIZE);
        }
        UNTIL(&world, NULL, 0, member->gone_count == BLOCKS / 2 + (round > 0));
        cr_assert(ksm_member_page_is_gone(member, first + SIZE));
        cr_assert_not(ksm_member_page_is_gone(member, first + 2 * SIZE));
        cr_assert_not(ksm_member_page_is_gone(member, 0));
        for (int i = BLOCKS - 2; i >= 0; i -= 2)
            say_gone(&fake, first + (uint32_t)i * SIZE, SIZE);
        UNTIL(&world, NULL, 0, member->gone_count == 1);
    }
    cr_assert_eq(member->gone[0].first, PAGES);
    cr_assert_eq(member->gone[0].end, page);
    cr_assert_not(fake.ended);
    fake_close(&fake);
    world_stop(&world);
}

/* Blocks of one page, all of them shared, that leave in the worst order. */
Test(host_crossed, shares_of_every_block_that_left_end)
{
    struct world world;
    struct fake fake;
    struct trust_domain *domain;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 1);
    free(fake.pages);
    fake.pages = calloc(PAGES, sizeof(*fake.pages));
    fake.page_count = PAGES;
    for (uint32_t page = 0; page < PAGES; page++) {
        if (page)
            fake_ram(&fake, page, 1, 0x7e0000000000 + page * PAGE_BYTES);
        fake.pages[page].slot = SLOT_NONE;
        fake_write(&fake, page, page / 2 + 1);
    }
    fake_offer_all(&fake);
    UNTIL(&world, &fake, 1, fake_shared(&fake) == PAGES);
    domain = fake_domain(&fake);
    UNTIL(&world, &fake, 1, domain->store.users == PAGES);
    for (uint32_t i = 0; i < PAGES; i++)
        say_gone(&fake, i * 37 % PAGES, 1);
    UNTIL(&world, NULL, 0, domain->store.users == 0);
    cr_assert_eq(agents_member(fake.guest->session)->gone_count, 1);
    fake_close(&fake);
    world_stop(&world);
}

/* Two claims of 4 TiB were the whole of a domain's page numbers. */
Test(host_crossed, claims_without_end_leave_room_for_neighbours)
{
    enum { LIARS = 6 };
    struct world world;
    struct fake liars[LIARS], fakes[2];
    char name[16];

    world_start(&world, world_web());
    for (int i = 0; i < LIARS; i++) {
        snprintf(name, sizeof(name), "liar%d", i);
        fake_join(&liars[i], &world, name, "web", 1);
        fake_ram(&liars[i], 1, GUEST_MAX_PAGES - 1, 0x100000000000);
        UNTIL(&world, NULL, 0,
              agents_member(liars[i].guest->session)->announced == GUEST_MAX_PAGES);
    }
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", PAGES);
        for (uint32_t page = 0; page < PAGES; page++)
            fake_write(&fakes[i], page, page + 1);
        fake_offer_all(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 2 * PAGES);
    /* What there was no room for may be spoken of, and means nothing. */
    fake_put(&liars[LIARS - 1], RING_OFFER, GUEST_MAX_PAGES - 1, 42);
    fake_put(&liars[LIARS - 1], RING_STALE, GUEST_MAX_PAGES - 1, 0);
    fake_bell(&liars[LIARS - 1]);
    UNTIL(&world, fakes, 2, liars[LIARS - 1].ring->to_memd.tail == liars[LIARS - 1].own_head);
    cr_assert_eq(world.daemon.agents.ended_badly, 0);
    for (int i = 0; i < LIARS; i++)
        fake_close(&liars[i]);
    clean_up(&world, fakes);
}

/* ---- places that do not sum ---- */

Test(host_crossed, an_agent_whose_places_do_not_sum_loses_its_session_and_nobody_else_anything)
{
    static const char body[] = "{\"name\":\"c\",\"pid\":%d,\"max_bytes\":4096}";
    struct world world;
    struct fake fakes[2];
    struct message_stats stats = {.header = {MESSAGE_STATS, sizeof(stats)},
                                  .places = {UINT64_MAX, PAGES}};
    char request[128];

    fakes_share(&world, fakes, PAGES);
    fake_send(&fakes[1], &stats, sizeof(stats), -1);
    UNTIL(&world, fakes, 2, fakes[1].ended);
    cr_assert_not(fakes[0].ended);
    cr_assert_eq(world.daemon.ledger.mismatches, 1);
    cr_assert_eq(registry_find(&world.daemon, "b")->presence, AGENT_LOST);
    snprintf(request, sizeof(request), body, (int)getpid());
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", request), 201);
    clean_up(&world, fakes);
}
