/* SPDX-License-Identifier: Apache-2.0 */
/* memd ends, by SIGTERM or by kill -9, and another one takes over: nothing is lost, nothing leaks,
 * and what is not on record is not believed. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host_http.h"
#include "host_world.h"
#include "state.h"

#define PAGES 200U

/* Two guests that share everything; then memd stops and starts. */
static void share_and_restart(struct world *world, struct fake *fakes)
{
    fakes_share(world, fakes, PAGES);
    daemon_stop(&world->daemon);
    for (int i = 0; i < 2; i++)
        fake_disconnect(&fakes[i]);
    world_restart(world, world_web());
}

/* The same agent comes again: its memory, its segments, a new connection. */
static void come_back(struct fake *fake, struct world *world)
{
    struct fake before = *fake;

    fake_connect(fake, world, before.token);
    memcpy(fake->segments, before.segments, sizeof(fake->segments));
    memcpy(fake->segment_pages, before.segment_pages, sizeof(fake->segment_pages));
    cr_assert(fake_hello(fake, true));
    cr_assert_eq(fake->session, before.session, "the domain's session has changed");
    cr_assert_eq(memcmp(&fake->secret, &before.secret, sizeof(before.secret)), 0);
    fake->pages = before.pages;
    fake->page_count = before.page_count;
    fake_ram(fake, 0, fake->page_count, 0x7f0000000000);
}

static void say_held(struct fake *fake, uint32_t segment, int fd)
{
    struct message_segment held = {
        {MESSAGE_HELD, sizeof(held)}, segment, fake->segment_pages[segment]};

    fake_send(fake, &held, sizeof(held), fd);
}

static void say_all_held(struct fake *fake)
{
    struct message_plain end = {{MESSAGE_HELD_END, sizeof(end)}};

    for (uint32_t segment = 0; segment < FAKE_SEGMENTS; segment++) {
        if (fake->segments[segment] >= 0)
            say_held(fake, segment, fake->segments[segment]);
    }
    for (uint32_t page = 0; page < fake->page_count; page++) {
        if (fake->pages[page].slot != SLOT_NONE)
            fake_put(fake, RING_HAVE, page, fake->pages[page].slot);
    }
    fake_bell(fake);
    fake_send(fake, &end, sizeof(end), -1);
}

static void clean_up(struct world *world, struct fake *fakes)
{
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(world);
}

Test(host_restart, what_agents_held_is_counted_again)
{
    struct world world;
    struct fake fakes[2];
    struct trust_domain *domain;
    const char *wrong;

    share_and_restart(&world, fakes);
    cr_assert_eq(world.daemon.registry.count, 2);
    for (int i = 0; i < 2; i++) {
        come_back(&fakes[i], &world);
        say_all_held(&fakes[i]);
    }
    domain = fake_domain(&fakes[0]);
    UNTIL(&world, fakes, 2, domain->store.users == 2 * PAGES);
    wrong = ksm_member_check(domain);
    cr_assert_null(wrong, "%s", wrong);
    /* The slots are found again: a third guest joins them. */
    struct fake third;
    fake_join(&third, &world, "c", "web", PAGES);
    for (uint32_t page = 0; page < PAGES; page++)
        fake_write(&third, page, page + 1);
    for (int i = 0; i < 100; i++)
        fakes_turn(&world, fakes, 2);
    fake_offer_all(&third);
    UNTIL(&world, &third, 1, fake_shared(&third) == PAGES);
    cr_assert_eq(domain->store.used, PAGES, "nothing was published twice");
    fake_close(&third);
    clean_up(&world, fakes);
}

Test(host_restart, shares_of_who_does_not_come_back_are_let_go)
{
    struct world world;
    struct fake fakes[2];

    share_and_restart(&world, fakes);
    come_back(&fakes[0], &world);
    say_all_held(&fakes[0]);
    UNTIL(&world, fakes, 1, fake_domain(&fakes[0])->store.users == PAGES);
    for (uint32_t page = 0; page < PAGES; page++)
        fake_write(&fakes[0], page, 9000 + page);
    fake_bell(&fakes[0]);
    /* grace_s is 2 here: until then b might still need them. */
    UNTIL(&world, fakes, 1, world.daemon.domains.budget.used_pages == 0);
    clean_up(&world, fakes);
}

Test(host_restart, segments_wait_for_who_still_may_come_back)
{
    struct world world;
    struct fake fakes[2];
    uint64_t pages;

    share_and_restart(&world, fakes);
    daemon_stop(&world.daemon);
    world.grace_s = 600;
    world_restart(&world, world_web());
    come_back(&fakes[0], &world);
    say_all_held(&fakes[0]);
    UNTIL(&world, fakes, 1, fake_domain(&fakes[0])->store.users == PAGES);
    pages = world.daemon.domains.budget.used_pages;
    for (uint32_t page = 0; page < PAGES; page++)
        fake_write(&fakes[0], page, 9000 + page);
    fake_bell(&fakes[0]);
    UNTIL(&world, fakes, 1, fake_domain(&fakes[0])->store.users == 0);
    for (int i = 0; i < 50; i++)
        fakes_turn(&world, fakes, 1);
    cr_assert_eq(world.daemon.domains.budget.used_pages, pages);
    come_back(&fakes[1], &world);
    say_all_held(&fakes[1]);
    UNTIL(&world, fakes, 2, fake_domain(&fakes[0])->store.users == PAGES);
    cr_assert_not(fakes[1].detach_came);
    clean_up(&world, fakes);
}

Test(host_restart, have_for_a_slot_that_is_not_held_ends_the_session)
{
    struct world world;
    struct fake fakes[2];

    share_and_restart(&world, fakes);
    come_back(&fakes[1], &world);
    say_all_held(&fakes[1]);
    UNTIL(&world, &fakes[1], 1, fake_domain(&fakes[1])->store.users == PAGES);
    come_back(&fakes[0], &world);
    fake_put(&fakes[0], RING_HAVE, 0, fakes[0].pages[0].slot);
    fake_bell(&fakes[0]);
    UNTIL(&world, fakes, 2, fakes[0].ended);
    cr_assert_eq(world.daemon.agents.ended_badly, 1);
    clean_up(&world, fakes);
}

Test(host_restart, have_twice_for_a_page_ends_the_session)
{
    struct world world;
    struct fake fakes[2];

    share_and_restart(&world, fakes);
    come_back(&fakes[0], &world);
    say_held(&fakes[0], SLOT_SEGMENT(fakes[0].pages[0].slot),
             fakes[0].segments[SLOT_SEGMENT(fakes[0].pages[0].slot)]);
    fake_put(&fakes[0], RING_HAVE, 0, fakes[0].pages[0].slot);
    fake_put(&fakes[0], RING_HAVE, 0, fakes[0].pages[0].slot);
    fake_bell(&fakes[0]);
    UNTIL(&world, fakes, 1, fakes[0].ended);
    clean_up(&world, fakes);
}

/* Same size, sealed alike, other file: the agent made it and knows what is in it. */
Test(host_restart, a_forged_segment_is_not_taken)
{
    struct world world;
    struct fake fakes[2];
    uint32_t segment;
    int forged;

    share_and_restart(&world, fakes);
    segment = SLOT_SEGMENT(fakes[0].pages[0].slot);
    forged = memfd_create("forged", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    cr_assert_eq(ftruncate(forged, (off_t)fakes[0].segment_pages[segment] * (off_t)PAGE_BYTES), 0);
    cr_assert_eq(
        fcntl(forged, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
    come_back(&fakes[0], &world);
    say_held(&fakes[0], segment, forged);
    UNTIL(&world, fakes, 1, fakes[0].detach_came);
    cr_assert_eq(fakes[0].detach.rejoin, 1);
    cr_assert_eq(world.daemon.domains.first->store.segment_count, 0);
    UNTIL(&world, fakes, 1, fakes[0].ended);
    cr_assert_not_null(registry_find(&world.daemon, "a"), "the guest itself is not forgotten");
    close(forged);
    clean_up(&world, fakes);
}

Test(host_restart, a_lost_record_makes_everything_private_again)
{
    struct world world;
    struct fake fakes[2];
    char path[128];

    share_and_restart(&world, fakes);
    daemon_stop(&world.daemon);
    snprintf(path, sizeof(path), "%s/state/domains/web.domain", world.dir);
    cr_assert_eq(unlink(path), 0);
    world_restart(&world, world_web());
    struct fake before = fakes[0];
    fake_connect(&fakes[0], &world, before.token);
    cr_assert(fake_hello(&fakes[0], true));
    cr_assert_neq(fakes[0].session, before.session, "the agent sees that it holds in vain");
    fake_close(&before);
    fake_close(&fakes[0]);
    fake_close(&fakes[1]);
    world_stop(&world);
}

/* The connection breaks and memd is the same: until HELD_END the old shares count. */
Test(host_restart, an_agent_that_reconnects_keeps_its_shares)
{
    struct world world;
    struct fake fakes[2];
    uint64_t retired;
    const char *wrong;

    share_and_restart(&world, fakes);
    for (int i = 0; i < 2; i++) {
        come_back(&fakes[i], &world);
        say_all_held(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, fake_domain(&fakes[0])->store.users == 2 * PAGES);
    retired = fake_domain(&fakes[0])->store.retired;
    for (int i = 0; i < 2; i++)
        fake_disconnect(&fakes[i]);
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 0);
    for (int i = 0; i < 2; i++) {
        come_back(&fakes[i], &world);
        say_all_held(&fakes[i]);
    }
    UNTIL(&world, fakes, 2,
          fake_domain(&fakes[0])->member_count == 2 &&
              fake_domain(&fakes[0])->store.users == 2 * PAGES);
    cr_assert_eq(fake_domain(&fakes[0])->store.retired, retired);
    wrong = ksm_member_check(fake_domain(&fakes[0]));
    cr_assert_null(wrong, "%s", wrong);
    clean_up(&world, fakes);
}

/* When the list of guests was written last. (Inodes come back.) */
static uint64_t guests_written_ns(const struct world *world)
{
    char path[128];
    struct stat status;

    snprintf(path, sizeof(path), "%s/state/guests.json", world->dir);
    cr_assert(stat(path, &status) == 0);
    return (uint64_t)status.st_mtim.tv_sec * 1000000000U + (uint64_t)status.st_mtim.tv_nsec;
}

/* A hundred agents that come back at once must not wait for a hundred files. */
Test(host_restart, agents_that_come_back_without_news_replace_no_file)
{
    struct world world;
    struct fake fakes[2];
    uint64_t before;

    share_and_restart(&world, fakes);
    before = guests_written_ns(&world);
    for (int i = 0; i < 2; i++) {
        come_back(&fakes[i], &world);
        say_all_held(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, fake_domain(&fakes[0])->store.users == 2 * PAGES);
    cr_expect_eq(guests_written_ns(&world), before, "the list of guests was written again");
    clean_up(&world, fakes);
}

/* ---- kill -9: the daemon is another process, and dies in the middle of things ---- */

static pid_t start_victim(struct world *world)
{
    pid_t pid = fork();

    cr_assert_geq(pid, 0);
    if (pid == 0) {
        world_restart(world, world_web());
        daemon_run(&world->daemon);
        _exit(0);
    }
    return pid;
}

Test(host_restart, a_killed_memd_leaves_a_directory_that_the_next_one_can_use, .timeout = 60)
{
    struct world world;

    world_start(&world, world_web());
    world_register(&world, "a", NULL);
    daemon_stop(&world.daemon);
    for (int round = 0; round < 8; round++) {
        pid_t pid = start_victim(&world);

        usleep((useconds_t)(1000 + round * 3000));
        kill(pid, SIGKILL);
        cr_assert_eq(waitpid(pid, NULL, 0), pid);
    }
    world_restart(&world, world_web());
    cr_assert_not_null(registry_find(&world.daemon, "a"));
    world_stop(&world);
}

static bool answers(const struct world *world)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool connected;

    snprintf(address.sun_path, sizeof(address.sun_path), "%s/memd.sock", world->dir);
    connected = connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
    close(fd);
    return connected;
}

/* What io_uring polls lives on for a moment after a kill, where that comes early. */
Test(host_restart, a_killed_memd_does_not_answer_any_more, .timeout = 60)
{
    struct world world;

    world_start(&world, world_web());
    daemon_stop(&world.daemon);
    world.running = false;
    for (int round = 0; round < 24; round++) {
        pid_t pid = start_victim(&world);

        usleep((useconds_t)(1000 + round * 1000));
        kill(pid, SIGKILL);
        cr_assert_eq(waitpid(pid, NULL, 0), pid);
        cr_assert_not(answers(&world));
    }
    world_stop(&world);
}

Test(host_restart, a_second_memd_on_the_same_state_is_refused)
{
    struct world world;
    struct daemon second;
    struct config parsed;
    char path[128], error[CONFIG_ERROR_BYTES];

    world_start(&world, "");
    snprintf(path, sizeof(path), "%s/memd.conf", world.dir);
    cr_assert_eq(config_load(path, &parsed, error), 0);
    cr_assert_eq(daemon_start(&second, &parsed, path), -EBUSY);
    /* and with its own state, on the same socket: */
    cr_assert_eq(config_load(path, &parsed, error), 0);
    strcat(parsed.state_dir, "2");
    cr_assert_eq(daemon_start(&second, &parsed, path), -EADDRINUSE);
    world_turn(&world);
    world_stop(&world);
}

Test(host_restart, what_memctl_set_said_is_kept_above_the_file)
{
    struct world world;
    struct guest_wish wish = {.has_min = true, .min_bytes = 3 << 20};
    struct guest *guest;
    char words[256];

    world_start(&world, "[guest a]\nmin = 1M\nshares = 5\n");
    guest = world_register(&world, "a", NULL);
    cr_assert_eq(guest->account.min_bytes, 1 << 20);
    cr_assert_eq(registry_wish(guest, &wish, words, sizeof(words)), 0);
    cr_assert_eq(guest->account.min_bytes, 3 << 20);
    daemon_stop(&world.daemon);
    world_restart(&world, "[guest a]\nmin = 2M\nshares = 6\n");
    guest = registry_find(&world.daemon, "a");
    cr_assert_eq(guest->account.min_bytes, 3 << 20);
    cr_assert_eq(guest->account.shares, 6);
    world_stop(&world);
}

/* ---- the list of guests is written while the loop goes on ---- */

static bool is_listed(const struct world *world, const char *name)
{
    json_t *list = state_read(world->daemon.state_dir, "guests.json"), *guest;
    bool found = false;
    size_t i;

    json_array_foreach(list, i, guest)
    {
        found |= strcmp(json_string_value(json_object_get(guest, "name")), name) == 0;
    }
    json_decref(list);
    return found;
}

static int post(struct world *world, const char *name)
{
    char body[128];

    snprintf(body, sizeof(body), "{\"name\":\"%s\",\"pid\":%d,\"max_bytes\":4096}", name,
             (int)getpid());
    return http_status(world, "POST", "/v1/guests", body);
}

/* Whoever kills memd now: the next one knows the guest. */
Test(host_restart, who_is_told_that_it_is_registered_is_on_the_list)
{
    struct world world;

    world_start(&world, "");
    cr_assert_eq(post(&world, "a"), 201);
    cr_assert(is_listed(&world, "a"));
    world_stop(&world);
}

Test(host_restart, guests_that_come_and_go_while_the_list_is_written_are_in_the_next_one)
{
    static const char *const names[] = {"a", "b", "c", "d"};
    struct world world;
    const struct state_saver *saver = &world.daemon.registry.saver;

    world_start(&world, "");
    for (int i = 0; i < 4; i++)
        (void)world_register(&world, names[i], NULL);
    registry_remove(registry_find(&world.daemon, "b"), "guest_gone", "test");
    cr_assert_eq(saver->asked, 5);
    cr_assert_eq(saver->written, 0, "the loop waited for a file");
    UNTIL(&world, NULL, 0, saver->written);
    cr_assert_eq(saver->written, 1);
    UNTIL(&world, NULL, 0, saver->written == 5);
    for (int i = 0; i < 4; i++)
        cr_assert_eq(is_listed(&world, names[i]), i != 1);
    world_stop(&world);
}

Test(host_restart, a_list_that_cannot_be_written_stops_nobody)
{
    struct world world;
    char path[128];

    world_start(&world, "");
    snprintf(path, sizeof(path), "%s/state/guests.json.new", world.dir);
    cr_assert_eq(mkdir(path, 0700), 0);
    freopen("/dev/null", "w", stderr); /* it says so */
    cr_assert_eq(post(&world, "a"), 201);
    cr_assert_not(is_listed(&world, "a"));
    cr_assert_eq(rmdir(path), 0);
    cr_assert_eq(post(&world, "b"), 201);
    cr_assert(is_listed(&world, "a") && is_listed(&world, "b"));
    world_stop(&world);
}

static int register_as(struct world *world, pid_t pid, uid_t uid)
{
    struct guest_request request = {.name = "a", .pid = pid, .uid = uid, .engine = ENGINE_AGENT};
    struct guest *guest;
    char words[256] = "";

    request.wish.has_max = true;
    return registry_add(&world->daemon, &request, &guest, words, sizeof(words));
}

/* memd was killed before it could say that it had registered it. */
Test(host_restart, a_process_that_registers_once_more_is_no_second_guest)
{
    struct world world;

    world_start(&world, "");
    cr_assert_eq(register_as(&world, getpid(), 7), 0);
    cr_assert_eq(register_as(&world, getpid(), 7), -EEXIST, "it was told");
    daemon_stop(&world.daemon);
    world_restart(&world, "");
    cr_assert_eq(register_as(&world, getpid(), 8), -EEXIST, "somebody else");
    cr_assert_eq(register_as(&world, getppid(), 7), -EEXIST, "another process");
    cr_assert_eq(register_as(&world, getpid(), 7), 0);
    cr_assert_eq(world.daemon.registry.count, 1);
    cr_assert_eq(register_as(&world, getpid(), 7), -EEXIST, "it was told");
    world_stop(&world);
}

/* The one that was registered has ended while there was no memd; the other one says hello. */
Test(host_restart, a_vmm_that_daemonizes_while_memd_is_away_is_waited_for)
{
    struct guest_request request = {.pid = fork(), .engine = ENGINE_AGENT};
    struct guest *guest;
    struct world world;
    struct fake fake;
    char words[256];

    if (request.pid == 0) {
        pause();
        _exit(0);
    }
    world_start(&world, "");
    request.wish.has_max = true;
    strcpy(request.name, "b");
    request.daemonizes = false;
    cr_assert_eq(registry_add(&world.daemon, &request, &guest, words, sizeof(words)), 0);
    strcpy(request.name, "a");
    request.daemonizes = true;
    cr_assert_eq(registry_add(&world.daemon, &request, &guest, words, sizeof(words)), 0);
    daemon_stop(&world.daemon);
    kill(request.pid, SIGKILL);
    waitpid(request.pid, NULL, 0);
    world_restart(&world, "");
    cr_assert_null(registry_find(&world.daemon, "b"));
    guest = registry_find(&world.daemon, "a");
    cr_assert_not_null(guest);
    fake_connect(&fake, &world, guest->token);
    cr_assert(fake_hello(&fake, false));
    cr_assert_eq(guest->pid, getpid());
    cr_assert_geq(guest->death.fd, 0);
    fake_close(&fake);
    world_stop(&world);
}
