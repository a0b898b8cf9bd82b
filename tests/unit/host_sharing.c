/* SPDX-License-Identifier: Apache-2.0 */
/* Sharing through the whole daemon, with agents that speak the protocol and hold arrays. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host_world.h"

#define UIDS "[domain web]\nuids = 0 %u\n"

static void must_hold(const struct fake *fake)
{
    const char *wrong = ksm_member_check(fake_domain(fake));

    cr_assert_null(wrong, "%s", wrong);
}

Test(host_sharing, two_guests_share_what_is_equal_and_nothing_else)
{
    struct world world;
    struct fake fakes[2];

    world_start(&world, world_web());
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", 1000);
        for (uint32_t page = 0; page < 1000; page++)
            fake_write(&fakes[i], page,
                       page < 600 ? page + 1 : (uint32_t)(10000 + i * 10000) + page);
        fake_offer_all(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) == 600 && fake_shared(&fakes[1]) == 600);
    must_hold(&fakes[0]);
    cr_assert_eq(fakes[0].pages[599].slot, fakes[1].pages[599].slot);
    for (uint32_t page = 600; page < 1000; page++)
        cr_assert_eq(fakes[0].pages[page].slot, SLOT_NONE);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, equal_pages_of_one_guest_share_within_it)
{
    struct world world;
    struct fake fake;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 500);
    for (uint32_t page = 0; page < 500; page++)
        fake_write(&fake, page, page % 100 + 1);
    fake_offer_all(&fake);
    UNTIL(&world, &fake, 1, fake_shared(&fake) == 500);
    must_hold(&fake);
    cr_assert_eq(fake_domain(&fake)->store.used, 100);
    fake_close(&fake);
    world_stop(&world);
}

Test(host_sharing, runs_of_pages_become_runs_of_slots)
{
    struct world world;
    struct fake fakes[2];
    uint32_t broken_runs = 0;

    world_start(&world, world_web());
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", 512);
        for (uint32_t page = 0; page < 512; page++)
            fake_write(&fakes[i], page, page + 1);
    }
    fake_offer_all(&fakes[0]);
    fake_offer_all(&fakes[1]);
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) == 512 && fake_shared(&fakes[1]) == 512);
    for (uint32_t page = 1; page < 512; page++)
        broken_runs += fakes[1].pages[page].slot != fakes[1].pages[page - 1].slot + 1;
    cr_assert_leq(broken_runs, 4, "%u breaks in 512 pages", broken_runs);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, guests_of_different_domains_share_nothing)
{
    struct world world;
    struct fake fakes[2];

    world_start(&world, world_web());
    fake_join(&fakes[0], &world, "a", "web", 200);
    fake_join(&fakes[1], &world, "b", NULL, 200);
    for (int i = 0; i < 2; i++) {
        for (uint32_t page = 0; page < 200; page++)
            fake_write(&fakes[i], page, page + 1);
        fake_offer_all(&fakes[i]);
    }
    cr_assert_neq(fake_domain(&fakes[0]), fake_domain(&fakes[1]));
    cr_assert_neq(memcmp(&fakes[0].secret, &fakes[1].secret, sizeof(fakes[0].secret)), 0);
    UNTIL(&world, fakes, 2, fake_domain(&fakes[1])->counters.offers == 200);
    for (int i = 0; i < 1500; i++)
        fakes_turn(&world, fakes, 2);
    cr_assert_eq(fake_shared(&fakes[0]) + fake_shared(&fakes[1]), 0);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, a_uid_that_the_domain_does_not_list_gets_a_domain_of_its_own)
{
    struct world world;
    struct fake fake;
    struct guest_wish wish = {.has_domain = true, .domain = "web"};
    char words[256];

    world_start(&world, "[domain web]\nuids = 12345\n");
    fake_join(&fake, &world, "a", "web", 10);
    cr_assert(fake_domain(&fake)->own);
    cr_assert_not_null(strstr(fake.guest->domain_note, "does not admit"));
    cr_assert_eq(registry_wish(fake.guest, &wish, words, sizeof(words)), -EPERM);
    fake_close(&fake);
    world_stop(&world);
}

Test(host_sharing, a_source_that_changes_before_it_is_published_loses_nothing)
{
    struct world world;
    struct fake fakes[3];

    world_start(&world, world_web());
    for (int i = 0; i < 3; i++) {
        fake_join(&fakes[i], &world, (const char *[]){"a", "b", "c"}[i], "web", 50);
        for (uint32_t page = 0; page < 50; page++)
            fake_write(&fakes[i], page, page + 1);
    }
    fake_offer_all(&fakes[0]);
    fakes[0].answers = false;
    for (int i = 0; i < 10; i++)
        world_turn(&world);
    fake_offer_all(&fakes[1]);
    fake_offer_all(&fakes[2]);
    for (int i = 0; i < 20; i++)
        fakes_turn(&world, fakes, 3);
    /* It was asked, and has written everything meanwhile. */
    for (uint32_t page = 0; page < 50; page++)
        fake_write(&fakes[0], page, 5000 + page);
    fakes[0].answers = true;
    UNTIL(&world, fakes, 3, fake_shared(&fakes[1]) == 50 && fake_shared(&fakes[2]) == 50);
    cr_assert_eq(fake_shared(&fakes[0]), 0);
    cr_assert_eq(fake_domain(&fakes[0])->counters.timeouts, 0, "the first waiter took its place");
    must_hold(&fakes[0]);
    for (int i = 0; i < 3; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, content_that_has_lost_its_second_user_is_not_published)
{
    struct world world;
    struct fake fakes[2];

    world_start(&world, world_web());
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", 50);
        for (uint32_t page = 0; page < 50; page++)
            fake_write(&fakes[i], page, page + 1);
        fake_offer_all(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, fake_domain(&fakes[0])->round.filled == 50);
    for (uint32_t page = 0; page < 50; page++)
        fake_write(&fakes[1], page, 7000 + page);
    fake_offer_all(&fakes[1]);
    UNTIL(&world, fakes, 2, fake_domain(&fakes[0])->round.filled == 0);
    for (int i = 0; i < 50; i++)
        fakes_turn(&world, fakes, 2);
    cr_assert_eq(fake_domain(&fakes[0])->store.published, 0);
    must_hold(&fakes[0]);
    /* and the first one's content is remembered */
    for (uint32_t page = 0; page < 50; page++)
        fake_write(&fakes[1], page, page + 1);
    fake_offer_all(&fakes[1]);
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) == 50 && fake_shared(&fakes[1]) == 50);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, a_source_that_never_answers_is_not_waited_for)
{
    struct world world;
    struct fake fakes[3];

    world_start(&world, world_web());
    for (int i = 0; i < 3; i++) {
        fake_join(&fakes[i], &world, (const char *[]){"a", "b", "c"}[i], "web", 20);
        for (uint32_t page = 0; page < 20; page++)
            fake_write(&fakes[i], page, page + 1);
    }
    fake_offer_all(&fakes[0]);
    for (int i = 0; i < 10; i++)
        world_turn(&world);
    fakes[0].answers = false;
    fake_offer_all(&fakes[1]);
    fake_offer_all(&fakes[2]);
    UNTIL(&world, fakes, 3, fake_shared(&fakes[1]) == 20 && fake_shared(&fakes[2]) == 20);
    cr_assert_eq(fake_domain(&fakes[1])->counters.timeouts, 20);
    fakes[0].answers = true;
    UNTIL(&world, fakes, 3, fake_domain(&fakes[0])->round.asked == 0);
    for (int i = 0; i < 50; i++)
        fakes_turn(&world, fakes, 3);
    cr_assert_not(fakes[0].ended, "a late answer is no lie");
    must_hold(&fakes[0]);
    for (int i = 0; i < 3; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, a_segment_goes_when_its_last_user_has_dropped_it)
{
    struct world world;
    struct fake fakes[2];

    world_start(&world, world_web());
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", 100);
        for (uint32_t page = 0; page < 100; page++)
            fake_write(&fakes[i], page, page + 1);
        fake_offer_all(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 200);
    cr_assert_gt(world.daemon.domains.budget.used_pages, 0);
    for (int i = 0; i < 2; i++) {
        for (uint32_t page = 0; page < 100; page++)
            fake_write(&fakes[i], page, (uint32_t)(1000 + i * 1000) + page);
        fake_bell(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, world.daemon.domains.budget.used_pages == 0);
    cr_assert_eq(fakes[0].drops, fakes[1].drops);
    cr_assert_gt(fakes[0].drops, 0);
    must_hold(&fakes[0]);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, a_guest_that_dies_leaves_no_use_behind)
{
    struct world world;
    struct fake fakes[2];

    world_start(&world, world_web());
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", 300);
        for (uint32_t page = 0; page < 300; page++)
            fake_write(&fakes[i], page, page + 1);
        fake_offer_all(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 600);
    registry_remove(fakes[0].guest, "guest_gone", "test");
    UNTIL(&world, &fakes[1], 1, fake_domain(&fakes[1])->store.users == 300);
    must_hold(&fakes[1]);
    registry_remove(fakes[1].guest, "guest_gone", "test");
    UNTIL(&world, NULL, 0, world.daemon.domains.budget.used_pages == 0);
    cr_assert_eq(world.daemon.domains.first->index.used, 0);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, a_full_store_refuses_and_what_is_shared_stays)
{
    struct world world;
    struct fake fakes[2];
    char lines[400];

    snprintf(lines, sizeof(lines), "%s[store]\nbudget = 256K\n", world_web());
    world_start(&world, lines);
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", 200);
        for (uint32_t page = 0; page < 200; page++)
            fake_write(&fakes[i], page, page + 1);
        fake_offer_all(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 128);
    UNTIL(&world, fakes, 2, world.daemon.domains.budget.full);
    for (int i = 0; i < 500; i++)
        fakes_turn(&world, fakes, 2);
    cr_assert_eq(fake_shared(&fakes[0]) + fake_shared(&fakes[1]), 128);
    cr_assert_gt(world.daemon.domains.budget.refused_pages, 0);
    cr_assert_leq(world.daemon.domains.budget.used_pages, 64);
    must_hold(&fakes[0]);
    /* Room comes back: what found none is tried again. */
    world.daemon.domains.budget.limit_pages = 1000;
    fake_domain(&fakes[0])->missed = true;
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 400);
    must_hold(&fakes[0]);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

Test(host_sharing, more_users_than_a_slot_may_have_get_another_copy)
{
    struct world world;
    struct fake fake;
    const struct ksm_segment *segment;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 9000);
    for (uint32_t page = 0; page < 9000; page++)
        fake_write(&fake, page, 7);
    fake_offer_all(&fake);
    UNTIL(&world, &fake, 1, fake_shared(&fake) >= 8999);
    must_hold(&fake);
    for (segment = fake_domain(&fake)->store.first; segment; segment = segment->next) {
        for (uint32_t page = 0; page < segment->pages; page++)
            cr_assert_leq(segment->users_of[page], KSM_SLOT_USERS_MAX);
    }
    fake_close(&fake);
    world_stop(&world);
}

Test(host_sharing, only_neutral_content_is_shared_where_the_operator_says_so)
{
    struct world world;
    struct fake fakes[2];
    char lines[512], path[64] = "/tmp/memd-neutral-XXXXXX";
    uint8_t page_bytes[PAGE_BYTES];
    int fd = mkstemp(path);

    for (uint32_t color = 1; color <= 40; color++) {
        fake_content(color, page_bytes);
        cr_assert_eq(write(fd, page_bytes, PAGE_BYTES), (ssize_t)PAGE_BYTES);
    }
    snprintf(lines, sizeof(lines), "%sneutral = %s\n", world_web(), path);
    world_start(&world, lines);
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", 100);
        for (uint32_t page = 0; page < 100; page++)
            fake_write(&fakes[i], page, page + 1);
    }
    for (int i = 0; i < 50; i++)
        fakes_turn(&world, fakes, 2);
    for (int i = 0; i < 2; i++)
        fake_offer_all(&fakes[i]);
    UNTIL(&world, fakes, 2, fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 80);
    UNTIL(&world, fakes, 2, fake_domain(&fakes[0])->counters.not_neutral == 120);
    cr_assert_eq(fake_shared(&fakes[0]), 40);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    close(fd);
    unlink(path);
    world_stop(&world);
}

Test(host_sharing, a_segment_can_not_be_changed_by_who_has_it)
{
    struct world world;
    struct fake fake;
    char path[64];
    int fd, again;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 20);
    for (uint32_t page = 0; page < 20; page++)
        fake_write(&fake, page, page / 2 + 1);
    fake_offer_all(&fake);
    UNTIL(&world, &fake, 1, fake_shared(&fake) == 20);
    fd = fake.segments[SLOT_SEGMENT(fake.pages[0].slot)];
    cr_assert_neq(pwrite(fd, "x", 1, 0), 1);
    cr_assert_neq(ftruncate(fd, 0), 0);
    cr_assert_neq(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), 0);
    cr_assert_eq(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    again = open(path, O_RDWR);
    cr_assert(again < 0 || pwrite(again, "x", 1, 0) != 1);
    if (again >= 0)
        close(again);
    fake_close(&fake);
    world_stop(&world);
}

/* Everything at once: writes, discards, refusals and re-offers in any order, then rest. */
Test(host_sharing, nothing_is_lost_or_counted_wrong_in_a_long_random_run, .timeout = 120)
{
    enum { GUESTS = 4, PAGES = 800, COLORS = 900, STEPS = 400 };
    struct world world;
    struct fake fakes[GUESTS];
    static uint32_t holders[COLORS + 1];
    uint32_t wanted = 0, shared = 0;

    srand(3);
    world_start(&world, world_web());
    for (int i = 0; i < GUESTS; i++) {
        char name[2] = {(char)('a' + i), 0};

        fake_join(&fakes[i], &world, name, "web", PAGES);
        fakes[i].busy_percent = 5;
        for (uint32_t page = 0; page < PAGES; page++)
            fake_write(&fakes[i], page, 1 + (uint32_t)rand() % COLORS);
    }
    for (int step = 0; step < STEPS; step++) {
        struct fake *fake = &fakes[rand() % GUESTS];

        for (int i = 0; i < 20; i++)
            fake_write(fake, (uint32_t)rand() % PAGES, 1 + (uint32_t)rand() % COLORS);
        if (rand() % 4 == 0)
            fake_offer_all(fake);
        fake_bell(fake);
        fakes_turn(&world, fakes, GUESTS);
        if (step % 50 == 0)
            must_hold(&fakes[0]);
    }
    for (int i = 0; i < GUESTS; i++)
        fakes[i].busy_percent = 0;
    for (int i = 0; i < GUESTS; i++) {
        for (uint32_t page = 0; page < PAGES; page++)
            holders[fakes[i].pages[page].color]++;
    }
    for (uint32_t color = 1; color <= COLORS; color++)
        wanted += holders[color] > 1 ? holders[color] : 0;
    /* A page whose twins have all left keeps its share for itself: a little more than wanted. */
    for (int turn = 0; turn < 15000 && shared < wanted; turn++) {
        if (turn % 100 == 0) {
            for (int i = 0; i < GUESTS; i++)
                fake_offer_all(&fakes[i]);
        }
        fakes_turn(&world, fakes, GUESTS);
        shared = 0;
        for (int i = 0; i < GUESTS; i++) {
            for (uint32_t page = 0; page < PAGES; page++)
                shared += fakes[i].pages[page].slot != SLOT_NONE &&
                          holders[fakes[i].pages[page].color] > 1;
        }
    }
    cr_assert_eq(shared, wanted, "%u of %u pages with a twin are shared", shared, wanted);
    must_hold(&fakes[0]);
    for (int i = 0; i < GUESTS; i++) {
        cr_assert_not(fakes[i].ended);
        fake_close(&fakes[i]);
    }
    world_stop(&world);
}

Test(host_sharing, many_small_segments_become_one, .timeout = 120)
{
    struct world world;
    struct fake fakes[2];

    world_start(&world, world_web());
    for (int i = 0; i < 2; i++)
        fake_join(&fakes[i], &world, i ? "b" : "a", "web", 400);
    for (uint32_t round = 0; round < 18; round++) {
        for (int i = 0; i < 2; i++) {
            for (uint32_t page = round * 20; page < round * 20 + 20; page++)
                fake_write(&fakes[i], page, page + 1);
            fake_offer_all(&fakes[i]);
        }
        UNTIL(&world, fakes, 2,
              fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 40 * (round + 1));
    }
    UNTIL(&world, fakes, 2, fake_domain(&fakes[0])->store.segment_count <= 3);
    cr_assert_gt(fakes[0].remaps, 0);
    cr_assert_eq(fake_shared(&fakes[0]) + fake_shared(&fakes[1]), 720);
    must_hold(&fakes[0]);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}
