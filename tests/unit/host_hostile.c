/* SPDX-License-Identifier: Apache-2.0 */
/* Agents that lie: each loses its session, and the daemon and its neighbour go on. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "host_world.h"
#include "session.h"

struct scene {
    struct world world;
    struct fake fakes[2]; /* 0 lies, 1 is honest */
};

static void set_up(struct scene *scene)
{
    world_start(&scene->world, world_web());
    for (int i = 0; i < 2; i++) {
        fake_join(&scene->fakes[i], &scene->world, i ? "honest" : "liar", "web", 100);
        for (uint32_t page = 0; page < 100; page++)
            fake_write(&scene->fakes[i], page, page + 1);
    }
}

/* The liar is out, the other one shares with itself as ever. */
static void must_be_out(struct scene *scene)
{
    struct fake *honest = &scene->fakes[1];
    const char *wrong;

    UNTIL(&scene->world, scene->fakes, 2, scene->fakes[0].ended);
    cr_assert_eq(scene->world.daemon.agents.ended_badly, 1);
    cr_assert_eq(registry_find(&scene->world.daemon, "liar")->presence, AGENT_LOST);
    for (uint32_t page = 0; page < 100; page++)
        fake_write(honest, page, 1000 + page / 2);
    fake_offer_all(honest);
    UNTIL(&scene->world, scene->fakes, 2, fake_shared(honest) == 100);
    registry_let_go(registry_find(&scene->world.daemon, "liar"));
    UNTIL(&scene->world, scene->fakes, 2, fake_domain(honest)->member_count == 1);
    wrong = ksm_member_check(fake_domain(honest));
    cr_assert_null(wrong, "%s", wrong);
    for (int i = 0; i < 2; i++)
        fake_close(&scene->fakes[i]);
    world_stop(&scene->world);
}

static void entry_is_a_lie(uint32_t op, uint32_t page, uint64_t arg)
{
    struct scene scene;

    set_up(&scene);
    fake_put(&scene.fakes[0], op, page, arg);
    fake_bell(&scene.fakes[0]);
    must_be_out(&scene);
}

Test(host_hostile, broken_for_a_share_that_never_was)
{
    entry_is_a_lie(RING_BROKEN, 5, SLOT(0, 0));
}

Test(host_hostile, have_after_the_greeting)
{
    entry_is_a_lie(RING_HAVE, 5, SLOT(0, 0));
}

Test(host_hostile, merged_without_merge)
{
    entry_is_a_lie(RING_MERGED, 5, SLOT(0, 0));
}

Test(host_hostile, not_merged_without_merge)
{
    entry_is_a_lie(RING_NOT_MERGED, 5, SLOT(0, 0) | (uint64_t)NOT_MERGED_BUSY << 32);
}

Test(host_hostile, content_that_nobody_wanted)
{
    entry_is_a_lie(RING_PAGE, 5, 3);
}

Test(host_hostile, a_page_buffer_outside_of_the_ring)
{
    entry_is_a_lie(RING_PAGE, 5, RING_PAGE_BUFFERS);
}

Test(host_hostile, stale_that_nobody_wanted)
{
    entry_is_a_lie(RING_STALE, 5, 0);
}

Test(host_hostile, an_offer_beyond_its_ram)
{
    entry_is_a_lie(RING_OFFER, 100, 1);
}

Test(host_hostile, an_entry_that_there_is_not)
{
    entry_is_a_lie(99, 0, 0);
}

Test(host_hostile, an_entry_that_only_memd_writes)
{
    entry_is_a_lie(RING_MERGE, 0, 0);
}

Test(host_hostile, a_head_that_is_further_than_the_ring_is_long)
{
    struct scene scene;

    set_up(&scene);
    __atomic_store_n(&scene.fakes[0].ring->to_memd.head, 70000, __ATOMIC_RELEASE);
    fake_bell(&scene.fakes[0]);
    must_be_out(&scene);
}

Test(host_hostile, a_tail_before_its_head)
{
    struct scene scene;

    set_up(&scene);
    scene.fakes[0].answers = false;
    __atomic_store_n(&scene.fakes[0].ring->to_agent.tail, 5, __ATOMIC_RELEASE);
    for (uint32_t page = 0; page < 100; page++)
        fake_put(&scene.fakes[0], RING_OFFER, page, 77 + page % 2);
    fake_bell(&scene.fakes[0]);
    for (int i = 0; i < 50; i++)
        world_turn(&scene.world);
    scene.fakes[0].answers = true;
    free(scene.fakes[0].pages);
    scene.fakes[0].pages = NULL;
    must_be_out(&scene);
}

/* The content that comes is not the content that was promised: it must not be published. */
Test(host_hostile, content_that_is_not_what_the_hash_said)
{
    struct scene scene;
    struct fake *liar = &scene.fakes[0], *honest = &scene.fakes[1];

    set_up(&scene);
    liar->lies = true;
    fake_offer_all(liar);
    for (int i = 0; i < 20; i++)
        fakes_turn(&scene.world, scene.fakes, 2);
    fake_offer_all(honest);
    UNTIL(&scene.world, scene.fakes, 2, liar->wants == 100);
    UNTIL(&scene.world, scene.fakes, 2, fake_domain(honest)->counters.stale == 100);
    cr_assert_eq(fake_domain(honest)->round.filled, 0);
    cr_assert_eq(fake_domain(honest)->store.published, 0);
    /* What the honest one offered is known still, and serves the next who has it. */
    liar->lies = false;
    for (uint32_t page = 0; page < 100; page++)
        fake_write(liar, page, page + 1);
    fake_offer_all(liar);
    UNTIL(&scene.world, scene.fakes, 2, fake_shared(honest) == 100 && fake_shared(liar) == 100);
    for (int i = 0; i < 2; i++)
        fake_close(&scene.fakes[i]);
    world_stop(&scene.world);
}

static void message_is_a_lie(const void *message, uint32_t bytes, int fd)
{
    struct scene scene;

    set_up(&scene);
    fakes_turn(&scene.world, scene.fakes, 2);
    fake_send(&scene.fakes[0], message, bytes, fd);
    must_be_out(&scene);
}

Test(host_hostile, a_message_of_another_size)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram) - 4}};

    message_is_a_lie(&ram, sizeof(ram) - 4, -1);
}

Test(host_hostile, a_message_that_lies_about_its_size)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, 8}, .pages = 1};

    message_is_a_lie(&ram, sizeof(ram), -1);
}

Test(host_hostile, a_message_larger_than_any)
{
    static uint8_t large[5000];

    message_is_a_lie(large, sizeof(large), -1);
}

Test(host_hostile, a_message_smaller_than_its_header)
{
    message_is_a_lie("abc", 3, -1);
}

Test(host_hostile, a_descriptor_where_none_belongs)
{
    struct message_plain bell = {{MESSAGE_DOORBELL, sizeof(bell)}};

    message_is_a_lie(&bell, sizeof(bell), 0);
}

Test(host_hostile, a_second_hello)
{
    struct message_hello hello = {.header = {MESSAGE_HELLO, sizeof(hello)}};

    message_is_a_lie(&hello, sizeof(hello), -1);
}

Test(host_hostile, a_message_that_only_memd_sends)
{
    struct message_segment segment = {{MESSAGE_SEGMENT, sizeof(segment)}, 0, 1};

    message_is_a_lie(&segment, sizeof(segment), -1);
}

Test(host_hostile, ram_that_overlaps)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)},
                              .first_page = 100,
                              .pages = 10,
                              .hva = 0x7f0000000000 + 99 * PAGE_BYTES,
                              .managed = 1};

    message_is_a_lie(&ram, sizeof(ram), -1);
}

Test(host_hostile, ram_with_a_gap_before_it)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)},
                              .first_page = 101,
                              .pages = 10,
                              .hva = 0x7e0000000000,
                              .managed = 1};

    message_is_a_lie(&ram, sizeof(ram), -1);
}

Test(host_hostile, ram_that_wraps)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)},
                              .first_page = 100,
                              .pages = UINT32_MAX,
                              .hva = UINT64_MAX - 4095,
                              .managed = 1};

    message_is_a_lie(&ram, sizeof(ram), -1);
}

Test(host_hostile, more_ram_than_a_guest_can_have)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)},
                              .first_page = 100,
                              .pages = GUEST_MAX_PAGES,
                              .hva = 0x100000000,
                              .managed = 1};

    message_is_a_lie(&ram, sizeof(ram), -1);
}

Test(host_hostile, ram_gone_that_was_never_there)
{
    struct message_ram_gone gone = {{MESSAGE_RAM_GONE, sizeof(gone)}, 10, 10};

    message_is_a_lie(&gone, sizeof(gone), -1);
}

Test(host_hostile, dropped_without_drop)
{
    struct message_segment dropped = {{MESSAGE_DROPPED, sizeof(dropped)}, 0, 1};

    message_is_a_lie(&dropped, sizeof(dropped), -1);
}

Test(host_hostile, detached_without_detach)
{
    struct message_plain detached = {{MESSAGE_DETACHED, sizeof(detached)}};

    message_is_a_lie(&detached, sizeof(detached), -1);
}

Test(host_hostile, a_state_that_there_is_not)
{
    struct message_stats stats = {.header = {MESSAGE_STATS, sizeof(stats)}, .state = 9};

    message_is_a_lie(&stats, sizeof(stats), -1);
}

Test(host_hostile, held_by_an_agent_that_held_nothing)
{
    struct message_segment held = {{MESSAGE_HELD, sizeof(held)}, 0, 1};

    message_is_a_lie(&held, sizeof(held), 0);
}

Test(host_hostile, a_token_that_was_not_given_is_refused)
{
    struct world world;
    struct fake fake;

    world_start(&world, "");
    world_register(&world, "a", NULL);
    fake_connect(&fake, &world, "00000000000000000000000000000000");
    cr_assert_not(fake_hello(&fake, false));
    cr_assert_eq(fake.detach.header.type, MESSAGE_REFUSED);
    cr_assert_eq(registry_find(&world.daemon, "a")->presence, AGENT_NONE);
    fake_close(&fake);
    world_stop(&world);
}

/* Connects as this user, and says nothing. */
static void stay_silent(struct fake *fake, struct world *world, uid_t uid)
{
    cr_assert_eq(seteuid(uid), 0);
    fake_connect(fake, world, "00000000000000000000000000000000");
    cr_assert_eq(seteuid(0), 0);
    world_turn(world);
}

/* 32 of a user are let in, 256 of all but root. */
Test(host_hostile, users_whose_connections_say_nothing_keep_nobody_out)
{
    struct world world;
    struct fake *silent = calloc(300, sizeof(*silent));
    struct fake honest;
    struct message_words words = {0};
    uint32_t silents = 0;

    if (geteuid() != 0)
        cr_skip_test("needs root to be other users");
    world_start(&world, "");
    cr_assert_eq(chmod(world.dir, 0711), 0);
    for (int i = 0; i < 33; i++)
        stay_silent(&silent[silents++], &world, 5001);
    UNTIL(&world, NULL, 0, world.daemon.agents.turned_away == 1);
    cr_assert_eq(world.daemon.agents.count, 32);
    cr_assert_eq(recv(silent[32].fd, &words, sizeof(words), 0), (ssize_t)sizeof(words));
    cr_assert_eq(words.header.type, MESSAGE_REFUSED);
    stay_silent(&silent[silents++], &world, 5002);
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 33);
    for (uid_t uid = 5003; uid < 5011; uid++)
        for (int i = 0; i < 31; i++)
            stay_silent(&silent[silents++], &world, uid);
    UNTIL(&world, NULL, 0, world.daemon.agents.turned_away == 26);
    cr_assert_eq(world.daemon.agents.count, 256);
    fake_join(&honest, &world, "a", NULL, 10);
    /* Who has gone leaves its place. */
    fake_close(&silent[0]);
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 256);
    stay_silent(&silent[silents++], &world, 5001);
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 257);
    fake_close(&honest);
    for (uint32_t i = 1; i < silents; i++)
        fake_close(&silent[i]);
    world_stop(&world);
    free(silent);
}

Test(host_hostile, a_second_agent_for_one_guest_is_refused)
{
    struct world world;
    struct fake first, second;

    world_start(&world, "");
    fake_join(&first, &world, "a", NULL, 10);
    fake_connect(&second, &world, first.token);
    cr_assert_not(fake_hello(&second, false));
    cr_assert_eq(registry_find(&world.daemon, "a")->presence, AGENT_CONNECTED);
    fake_close(&first);
    fake_close(&second);
    world_stop(&world);
}

Test(host_hostile, an_agent_that_reads_nothing_costs_nobody_anything)
{
    struct scene scene;
    struct fake *mute = &scene.fakes[0], *honest = &scene.fakes[1];

    set_up(&scene);
    mute->answers = false;
    for (int round = 0; round < 40; round++) {
        for (uint32_t page = 0; page < 100; page++)
            fake_put(mute, RING_OFFER, page, (uint64_t)(round * 50) + page % 50 + 1);
        fake_bell(mute);
        world_turn(&scene.world);
    }
    for (uint32_t page = 0; page < 100; page++)
        fake_write(honest, page, 2000 + page / 2);
    fake_offer_all(honest);
    UNTIL(&scene.world, scene.fakes, 2, fake_shared(honest) == 100);
    for (int i = 0; i < 2; i++)
        fake_close(&scene.fakes[i]);
    world_stop(&scene.world);
}

Test(host_hostile, one_hash_offered_for_every_page_fills_no_table)
{
    struct world world;
    struct fake fake;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 20000);
    fake.answers = false;
    world.daemon.domains.budget.limit_pages = 0; /* no match finds room: all are remembered */
    for (uint32_t page = 0; page < 20000; page++)
        fake_put(&fake, RING_OFFER, page, 42);
    fake_bell(&fake);
    UNTIL(&world, NULL, 0, fake.guest->session && fake_domain(&fake)->counters.offers == 20000);
    cr_assert_leq(fake_domain(&fake)->index.used, 1);
    fake_close(&fake);
    world_stop(&world);
}

static pid_t waiting_tid;

static void *wait_for_release(void *released)
{
    __atomic_store_n(&waiting_tid, gettid(), __ATOMIC_RELEASE);
    while (!__atomic_load_n((bool *)released, __ATOMIC_ACQUIRE))
        usleep(1000);
    return NULL;
}

/* A thread of somebody else's, and then one of its own; told that it is over, it has none. */
Test(host_hostile, a_priority_for_another_processs_thread)
{
    struct message_urgent urgent = {{MESSAGE_URGENT, sizeof(urgent)}, 1, 0};
    const struct session *session;
    struct scene scene;
    bool released = false;
    pthread_t thread;
    pid_t tid;

    set_up(&scene);
    session = registry_find(&scene.world.daemon, "liar")->session;
    fake_send(&scene.fakes[0], &urgent, sizeof(urgent), -1);
    fakes_turn(&scene.world, scene.fakes, 2);
    cr_assert_eq(session->urgent, 0);
    cr_assert_eq(sched_getscheduler(1), SCHED_OTHER);
    pthread_create(&thread, NULL, wait_for_release, &released);
    while ((tid = __atomic_load_n(&waiting_tid, __ATOMIC_ACQUIRE)) == 0)
        usleep(1000);
    urgent.tid = (uint32_t)tid;
    fake_send(&scene.fakes[0], &urgent, sizeof(urgent), -1);
    UNTIL(&scene.world, scene.fakes, 2, session->urgent == tid);
    urgent.tid = 0;
    fake_send(&scene.fakes[0], &urgent, sizeof(urgent), -1);
    UNTIL(&scene.world, scene.fakes, 2, session->urgent == 0);
    cr_assert_eq(sched_getscheduler(tid), SCHED_OTHER);
    __atomic_store_n(&released, true, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    for (int i = 0; i < 2; i++)
        fake_close(&scene.fakes[i]);
    world_stop(&scene.world);
}
