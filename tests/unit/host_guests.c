/* SPDX-License-Identifier: Apache-2.0 */
/* Guests: how they come, what they are promised, how they go; and what the control API says. */
#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host_http.h"
#include "session.h"
#include "status.h"

static char *registration(const char *name, const char *more)
{
    static char body[512];

    snprintf(body, sizeof(body),
             "{\"name\":\"%s\",\"pid\":%d,\"vmm\":\"qemu\",\"max_bytes\":1048576%s}", name,
             (int)getpid(), more);
    return body;
}

Test(host_guests, registering_asks_for_what_is_needed_and_refuses_the_rest)
{
    struct world world;

    world_start(&world, "budget = 1G\n[domain web]\nuids = 4711\n");
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", "nonsense"), 400);
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", "{\"name\":\"a\"}"), 400);
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("../a", "")), 400);
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("a", ",\"x\":1")), 400);
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("a", ",\"shares\":0")),
                 400);
    cr_assert_eq(
        http_status(&world, "POST", "/v1/guests", registration("a", ",\"min_bytes\":\"2M\"")), 400,
        "can't be guaranteed more than it is promised");
    cr_assert_eq(http_status(&world, "POST", "/v1/guests",
                             "{\"name\":\"a\",\"pid\":2147483647,\"max_bytes\":4096}"),
                 400, "no such process");
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("a", "")), 201);
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("a", "")), 409);
    cr_assert_eq(
        http_status(&world, "POST", "/v1/guests",
                    "{\"name\":\"b\",\"pid\":1,\"max_bytes\":\"4G\",\"min_bytes\":\"2G\"}"),
        409, "the guarantee is more than the budget");
    cr_assert_eq(
        http_status(&world, "POST", "/v1/guests", registration("b", ",\"domain\":\"none\"")), 409,
        "no such domain");
    cr_assert_eq(http_status(&world, "PATCH", "/v1/guests/a", "{\"domain\":\"web\"}"), 409);
    cr_assert_eq(http_status(&world, "PATCH", "/v1/guests/a", "{\"domain\":\"none\"}"), 409);
    cr_assert_eq(http_status(&world, "PATCH", "/v1/guests/a", "{\"shares\":12}"), 200);
    cr_assert_eq(http_status(&world, "PATCH", "/v1/guests/b", "{\"shares\":12}"), 404);
    cr_assert_eq(http_status(&world, "GET", "/v1/guests/b", ""), 404);
    cr_assert_eq(http_status(&world, "GET", "/v1/nothing", ""), 404);
    cr_assert_eq(http_status(&world, "DELETE", "/v1/status", ""), 405);
    world_stop(&world);
}

Test(host_guests, status_has_every_field_that_the_interface_names)
{
    static const char *const host[] = {"budget_bytes",     "used_bytes",       "promised_bytes",
                                       "guaranteed_bytes", "overcommit_ratio", "state"};
    static const char *const sharing[] = {"pages_shared", "pages_sharing", "zero_pages",
                                          "broken_pages", "saved_bytes",   "stored_pages",
                                          "stored_bytes", "spilled_pages", "merges",
                                          "unmerges",     "mismatches",    "cpu_seconds"};
    static const char *const guest[] = {"name",          "pid",
                                        "vmm",           "engine",
                                        "agent",         "domain",
                                        "max_bytes",     "min_bytes",
                                        "shares",        "target_bytes",
                                        "balloon_bytes", "resident_bytes",
                                        "places",        "working_set_bytes",
                                        "faults"};
    struct world world;
    struct fake fake;
    json_t *status, *one;
    int code;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 64);
    for (uint32_t page = 0; page < 64; page++)
        fake_write(&fake, page, page / 2 + 1);
    fake_offer_all(&fake);
    UNTIL(&world, &fake, 1, fake_shared(&fake) == 64);
    fake_stats(&fake);
    status = http_ask(&world, &fake, 1, "GET", "/v1/status", "", &code);
    cr_assert_eq(code, 200);
    for (size_t i = 0; i < sizeof(host) / sizeof(host[0]); i++)
        cr_assert_not_null(json_object_get(json_object_get(status, "host"), host[i]), "%s",
                           host[i]);
    for (size_t i = 0; i < sizeof(sharing) / sizeof(sharing[0]); i++)
        cr_assert_not_null(json_object_get(json_object_get(status, "sharing"), sharing[i]), "%s",
                           sharing[i]);
    one = json_array_get(json_object_get(status, "guests"), 0);
    for (size_t i = 0; i < sizeof(guest) / sizeof(guest[0]); i++)
        cr_assert_not_null(json_object_get(one, guest[i]), "%s", guest[i]);
    cr_assert_eq(
        json_integer_value(json_object_get(json_object_get(status, "sharing"), "pages_shared")),
        32);
    cr_assert_eq(
        json_integer_value(json_object_get(json_object_get(status, "sharing"), "pages_sharing")),
        32);
    cr_assert_eq(json_integer_value(json_object_get(json_object_get(one, "places"), "shared")), 64);
    cr_assert_gt(json_integer_value(json_object_get(one, "resident_bytes")), 0);
    json_decref(status);
    fake_close(&fake);
    world_stop(&world);
}

Test(host_guests, detaching_answers_when_every_page_is_private)
{
    struct world world;
    struct fake fake;
    json_t *json;
    int code;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 64);
    for (uint32_t page = 0; page < 64; page++)
        fake_write(&fake, page, page / 2 + 1);
    fake_offer_all(&fake);
    UNTIL(&world, &fake, 1, fake_shared(&fake) == 64);
    json = http_ask(&world, &fake, 1, "DELETE", "/v1/guests/a", "", &code);
    cr_assert_eq(code, 200);
    cr_assert_eq(fake_shared(&fake), 0);
    cr_assert_eq(fake.detach.rejoin, 0);
    cr_assert_null(registry_find(&world.daemon, "a"));
    UNTIL(&world, &fake, 1, world.daemon.domains.budget.used_pages == 0);
    UNTIL(&world, &fake, 1, world.daemon.domains.first == NULL);
    json_decref(json);
    fake_close(&fake);
    world_stop(&world);
}

/* Whoever closes with something unread resets the connection; what it had said counts all the same.
 */
Test(host_guests, the_last_words_of_an_agent_that_has_not_read_all_are_heard)
{
    struct message_plain detached = {{MESSAGE_DETACHED, sizeof(detached)}};
    struct world world;
    struct fake fake;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 64);
    for (int i = 0; i < 20; i++)
        fakes_turn(&world, &fake, 1);
    fake.answers = false;
    cr_assert_eq(agents_detach(fake.guest, false, "test"), 0);
    (void)send(fake.fd, &detached, sizeof(detached), MSG_NOSIGNAL);
    fake_close(&fake);
    UNTIL(&world, NULL, 0, registry_find(&world.daemon, "a") == NULL);
    world_stop(&world);
}

Test(host_guests, a_change_of_domain_makes_the_agent_rejoin)
{
    struct world world;
    struct fake fake, again;
    char lines[128];
    int code;

    snprintf(lines, sizeof(lines), "[domain web]\nuids = 0 %u\n", (unsigned)getuid());
    world_start(&world, lines);
    fake_join(&fake, &world, "a", NULL, 64);
    json_decref(http_ask(&world, &fake, 1, "PATCH", "/v1/guests/a", "{\"domain\":\"web\"}", &code));
    cr_assert_eq(code, 200);
    UNTIL(&world, &fake, 1, fake.ended);
    cr_assert_eq(fake.detach.rejoin, 1);
    fake_connect(&again, &world, fake.token);
    cr_assert(fake_hello(&again, false));
    cr_assert_str_eq(fake_domain(&again)->name, "web");
    cr_assert_neq(memcmp(&again.secret, &fake.secret, sizeof(fake.secret)), 0);
    fake_close(&fake);
    fake_close(&again);
    world_stop(&world);
}

Test(host_guests, a_count_of_memds_own_that_is_wrong_stops_admission)
{
    struct world world;
    struct fake fake;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 64);
    UNTIL(&world, &fake, 1, fake.guest->account.managed_pages == 64);
    freopen("/dev/null", "w", stderr); /* it says so */
    fake.guest->account.managed_pages--;
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("b", "")), 503);
    fake.guest->account.managed_pages++;
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("b", "")), 201);
    fake_close(&fake);
    world_stop(&world);
}

static pid_t start_process(void)
{
    pid_t pid = fork();

    if (pid == 0) {
        pause();
        _exit(0);
    }
    return pid;
}

static struct guest *register_pid(struct world *world, const char *name, pid_t pid)
{
    struct guest *guest = world_register(world, name, NULL);

    registry_remove(guest, "guest_gone", "test");
    struct guest_request request = {.pid = pid, .engine = ENGINE_AGENT};
    char words[256];
    strcpy(request.name, name);
    request.wish.has_max = true;
    cr_assert_eq(registry_add(&world->daemon, &request, &guest, words, sizeof(words)), 0);
    return guest;
}

static void arrived(struct events_subscriber *subscriber)
{
    (void)subscriber;
}

/* grace_s has nothing to do with it. */
Test(host_guests, a_vmm_that_dies_before_hello_is_forgotten_at_once)
{
    struct events_subscriber ear = {.arrived = arrived};
    static char text[EVENTS_BUFFER_BYTES + 1];
    pid_t pid = start_process();
    struct world world;

    world_start(&world, "");
    world.daemon.config.grace_s = 86400;
    register_pid(&world, "a", pid);
    cr_assert_eq(events_subscribe(&world.daemon.events, &ear), 0);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    UNTIL(&world, NULL, 0, registry_find(&world.daemon, "a") == NULL);
    text[events_take(&ear, text, sizeof(text) - 1)] = '\0';
    cr_assert_not_null(strstr(text, "\"guest_gone\",\"guest\":\"a\""), "%s", text);
    cr_assert_not_null(strstr(text, "before its agent came"));
    events_unsubscribe(&world.daemon.events, &ear);
    world_stop(&world);
}

Test(host_guests, a_vmm_that_daemonizes_and_does_not_come_is_forgotten_after_the_grace)
{
    struct world world;
    pid_t pid = start_process();

    world_start(&world, "");
    register_pid(&world, "a", pid)->daemonizes = true;
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    UNTIL(&world, NULL, 0, registry_find(&world.daemon, "a")->death.fd < 0);
    /* It may have daemonized: the name is free for who asks, and goes by itself. */
    UNTIL(&world, NULL, 0, registry_find(&world.daemon, "a") == NULL);
    world_stop(&world);
}

Test(host_guests, a_vmm_that_daemonizes_is_another_process_afterwards)
{
    struct world world;
    struct fake fake;
    struct guest *guest;
    pid_t pid = start_process();

    world_start(&world, "");
    guest = register_pid(&world, "a", pid);
    guest->daemonizes = true;
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    UNTIL(&world, NULL, 0, guest->death.fd < 0);
    fake_connect(&fake, &world, guest->token);
    cr_assert(fake_hello(&fake, false));
    cr_assert_eq(guest->pid, getpid());
    cr_assert_geq(guest->death.fd, 0);
    fake_close(&fake);
    world_stop(&world);
}

Test(host_guests, ram_that_goes_takes_its_shares_along)
{
    struct world world;
    struct fake fake;
    struct message_ram_gone gone = {{MESSAGE_RAM_GONE, sizeof(gone)}, 64, 64};
    const char *wrong;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 64);
    fake_ram(&fake, 64, 64, 0x7e0000000000);
    free(fake.pages);
    fake.pages = calloc(128, sizeof(*fake.pages));
    fake.page_count = 128;
    for (uint32_t page = 0; page < 128; page++) {
        fake.pages[page].slot = SLOT_NONE;
        fake_write(&fake, page, page % 32 + 1);
    }
    fake_offer_all(&fake);
    UNTIL(&world, &fake, 1, fake_shared(&fake) == 128);
    fake_send(&fake, &gone, sizeof(gone), -1);
    UNTIL(&world, &fake, 1, fake_domain(&fake)->store.users == 64);
    /* What was on its way meanwhile is no lie. */
    fake_put(&fake, RING_BROKEN, 100, fake.pages[100].slot);
    fake_put(&fake, RING_OFFER, 101, 1);
    fake_bell(&fake);
    for (int i = 0; i < 50; i++)
        fakes_turn(&world, &fake, 1);
    cr_assert_not(fake.ended);
    cr_assert_eq(fake.guest->account.managed_pages, 64);
    wrong = ksm_member_check(fake_domain(&fake));
    cr_assert_null(wrong, "%s", wrong);
    fake_close(&fake);
    world_stop(&world);
}

Test(host_guests, a_bad_configuration_changes_nothing)
{
    struct world world;
    char path[128];
    FILE *file;

    world_start(&world, "[sharing]\ncpu_percent = 40\n");
    snprintf(path, sizeof(path), "%s/memd.conf", world.dir);
    file = fopen(path, "w");
    fputs("[sharing]\ncpu_percent = 80\nnonsense = 1\n", file);
    fclose(file);
    freopen("/dev/null", "w", stderr);
    daemon_reload(&world.daemon);
    cr_assert_eq(world.daemon.config.cpu_percent, 40);
    file = fopen(path, "w");
    fputs("[sharing]\ncpu_percent = 80\n", file);
    fclose(file);
    daemon_reload(&world.daemon);
    cr_assert_eq(world.daemon.config.cpu_percent, 80);
    cr_assert_str_neq(world.daemon.config.socket, "/run/memd/memd.sock",
                      "the socket stays where it is until memd is started again");
    world_stop(&world);
}

Test(host_guests, scanners_share_the_cpu_that_they_may_have)
{
    struct world world;
    struct fake fakes[3];

    world_start(&world, "[sharing]\ncpu_percent = 60\nrevisit_s = 2.5\n");
    for (int i = 0; i < 3; i++)
        fake_join(&fakes[i], &world, (const char *[]){"a", "b", "c"}[i], NULL, 10);
    UNTIL(&world, fakes, 3, fakes[0].tune.cpu_permille == 200);
    cr_assert_eq(fakes[0].tune.revisit_ms, 2500);
    registry_remove(fakes[2].guest, "guest_gone", "test");
    UNTIL(&world, fakes, 2, fakes[0].tune.cpu_permille == 300);
    for (int i = 0; i < 3; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

/* ---- agents that do not come, and what they say ---- */

/* The time that a timer stands for has passed. */
static void let_expire(struct world *world, struct loop_timer *timer)
{
    cr_assert_neq(timer->due_ns, 0, "the timer does not run");
    loop_timer_cancel(&world->daemon.loop, timer);
    timer->expired(timer);
}

Test(host_guests, an_agent_that_never_comes_is_reported_and_its_guest_stays)
{
    struct events_subscriber ear = {.arrived = arrived};
    static char text[EVENTS_BUFFER_BYTES + 1];
    struct world world;
    struct guest *guest;
    json_t *json;
    int code;

    world_start(&world, "");
    freopen("/dev/null", "w", stderr);
    guest = world_register(&world, "a", NULL);
    cr_assert_eq(events_subscribe(&world.daemon.events, &ear), 0);
    let_expire(&world, &guest->hello_timer);
    text[events_take(&ear, text, sizeof(text) - 1)] = '\0';
    cr_assert_not_null(strstr(text, "\"agent_missing\",\"guest\":\"a\""), "%s", text);
    cr_assert_not_null(strstr(text, "no agent said hello"));
    json = http_ask(&world, NULL, 0, "GET", "/v1/guests/a", "", &code);
    cr_assert_eq(code, 200);
    cr_assert_str_eq(json_string_value(json_object_get(json, "agent")), "none");
    cr_assert_not_null(strstr(json_string_value(json_object_get(json, "reason")), "said hello"));
    json_decref(json);
    events_unsubscribe(&world.daemon.events, &ear);
    world_stop(&world);
}

Test(host_guests, an_agent_that_comes_late_is_welcome)
{
    struct world world;
    struct fake fake;
    struct guest *guest;

    world_start(&world, "");
    freopen("/dev/null", "w", stderr);
    guest = world_register(&world, "a", NULL);
    let_expire(&world, &guest->hello_timer);
    fake_connect(&fake, &world, guest->token);
    cr_assert(fake_hello(&fake, false));
    cr_assert_eq(guest->engine, ENGINE_AGENT);
    cr_assert_str_empty(guest->reason);
    fake_close(&fake);
    world_stop(&world);
}

Test(host_guests, a_connection_that_says_nothing_is_closed)
{
    struct world world;
    struct fake fake;

    world_start(&world, "");
    freopen("/dev/null", "w", stderr);
    fake_connect(&fake, &world, "");
    UNTIL(&world, NULL, 0, world.daemon.agents.count == 1);
    let_expire(&world, &world.daemon.agents.first->greeting);
    UNTIL(&world, &fake, 1, fake.ended);
    cr_assert_eq(world.daemon.agents.count, 0);
    fake_close(&fake);
    world_stop(&world);
}

Test(host_guests, words_of_an_agent_that_are_no_text_break_no_answer)
{
    struct message_hello hello = {.header = {MESSAGE_HELLO, sizeof(hello)},
                                  .magic = PROTOCOL_MAGIC,
                                  .version = PROTOCOL_VERSION,
                                  .page_bytes = PAGE_BYTES};
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)}, .pages = 1, .hva = 4096};
    struct message_stats stats = {.header = {MESSAGE_STATS, sizeof(stats)}};
    struct world world;
    struct guest *guest;
    struct fake fake;
    json_t *json;
    int code;

    world_start(&world, "");
    freopen("/dev/null", "w", stderr);
    guest = world_register(&world, "a", NULL);
    fake_connect(&fake, &world, guest->token);
    memcpy(hello.token, guest->token, PROTOCOL_TOKEN_BYTES);
    memset(hello.vmm, 0xfe, sizeof(hello.vmm));
    memset(hello.reason, '\n', sizeof(hello.reason));
    memset(ram.reason, 0x80, sizeof(ram.reason));
    memset(stats.reason, 0xff, sizeof(stats.reason));
    fake_send(&fake, &hello, sizeof(hello), -1);
    fake_send(&fake, &ram, sizeof(ram), -1);
    fake_send(&fake, &stats, sizeof(stats), -1);
    UNTIL(&world, &fake, 1, guest->has_stats);
    json = http_ask(&world, &fake, 1, "GET", "/v1/guests/a", "", &code);
    cr_assert_eq(code, 200);
    cr_assert_str_eq(json_string_value(json_object_get(json, "vmm")),
                     "???????????????????????????????");
    cr_assert_null(strchr(json_string_value(json_object_get(json, "reason")), '\n'));
    cr_assert_not_null(
        json_object_get(json_array_get(json_object_get(json, "blocks"), 0), "reason"));
    json_decref(json);
    daemon_stop(&world.daemon);
    fake_close(&fake);
    world_restart(&world, "");
    cr_assert_not_null(registry_find(&world.daemon, "a"), "it is not on record");
    world_stop(&world);
}

/* ---- SIGHUP ---- */

static void rewrite(const struct world *world, const char *lines)
{
    char path[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/memd.conf", world->dir);
    file = fopen(path, "w");
    fputs(lines, file);
    fclose(file);
}

static void reload(struct world *world, struct fake *fakes, size_t count, const char *lines)
{
    uint64_t before = world->daemon.events.emitted;

    rewrite(world, lines);
    kill(getpid(), SIGHUP);
    UNTIL(world, fakes, count, world->daemon.events.emitted > before);
    for (int i = 0; i < 50; i++)
        fakes_turn(world, fakes, count);
}

Test(host_guests, a_reload_changes_what_has_changed_in_the_file_and_nothing_else)
{
    struct world world;
    struct fake fakes[2];
    struct guest *a, *b;
    char lines[512];
    int code;

    snprintf(lines, sizeof(lines), "[domain web]\nuids = 0 %u\n[domain db]\nuids = 0 %u\n",
             (unsigned)getuid(), (unsigned)getuid());
    world_start(&world, lines);
    fake_join(&fakes[0], &world, "a", "web", 8);
    fake_join(&fakes[1], &world, "b", "db", 8);
    a = fakes[0].guest;
    b = fakes[1].guest;
    json_decref(http_ask(&world, fakes, 2, "PATCH", "/v1/guests/a", "{\"shares\":7}", &code));
    cr_assert_eq(code, 200);
    strcat(lines, "[guest a]\nshares = 5\nmax = 2M\n[guest b]\nshares = 6\n");
    reload(&world, fakes, 2, lines);
    cr_assert_eq(a->account.shares, 7, "what memctl set said ranks above the file");
    cr_assert_eq(a->account.max_bytes, 2 << 20);
    cr_assert_eq(b->account.shares, 6);
    cr_assert_eq(b->account.max_bytes, 1 << 30);
    cr_assert(!fakes[0].detach_came && !fakes[1].detach_came, "nobody had to say hello again");
    snprintf(lines, sizeof(lines), "[domain web]\nuids = 12345\n[domain db]\nuids = 0 %u\n",
             (unsigned)getuid());
    freopen("/dev/null", "w", stderr);
    reload(&world, fakes, 2, lines);
    UNTIL(&world, fakes, 2, fakes[0].ended);
    cr_assert_eq(fakes[0].detach.rejoin, 1);
    cr_assert_not(fakes[1].detach_came, "its domain is as it was");
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

static void say_hello_again(struct fake *fake, struct world *world)
{
    struct fake before = *fake;

    UNTIL(world, fake, 1, fake->ended);
    fake_disconnect(fake);
    fake_connect(fake, world, before.token);
    cr_assert(fake_hello(fake, false));
    fake->pages = before.pages;
    fake->page_count = before.page_count;
    fake_ram(fake, 0, fake->page_count, 0x7f0000000000);
    for (uint32_t page = 0; page < fake->page_count; page++)
        fake_write(fake, page, page / 2 + 1);
    fake_offer_all(fake);
    for (int i = 0; i < 200; i++)
        fakes_turn(world, fake, 1);
}

Test(host_guests, sharing_that_is_switched_off_ends_and_comes_back)
{
    struct world world;
    struct fake fake;

    world_start(&world, "");
    freopen("/dev/null", "w", stderr);
    fake_join(&fake, &world, "a", NULL, 64);
    for (uint32_t page = 0; page < 64; page++)
        fake_write(&fake, page, page / 2 + 1);
    fake_offer_all(&fake);
    UNTIL(&world, &fake, 1, fake_shared(&fake) == 64);
    reload(&world, &fake, 1, "[sharing]\nengine = off\n");
    say_hello_again(&fake, &world);
    cr_assert_eq(fake_shared(&fake), 0);
    cr_assert_eq(fake.wants + fake.merges, 0, "memd asks for nothing although sharing is off");
    cr_assert_eq(fake.guest->engine, ENGINE_NONE);
    reload(&world, &fake, 1, "[sharing]\nengine = agent\n");
    say_hello_again(&fake, &world);
    UNTIL(&world, &fake, 1, fake_shared(&fake) == 64);
    fake_close(&fake);
    world_stop(&world);
}

/* ---- events ---- */

Test(host_guests, a_slow_listener_loses_events_and_is_told)
{
    struct events events = {.first = NULL};
    struct events_subscriber slow = {.arrived = arrived};
    static char text[2 * EVENTS_BUFFER_BYTES];
    size_t got;

    cr_assert_eq(events_subscribe(&events, &slow), 0);
    for (int i = 0; i < 10000; i++)
        events_emit(&events, "test_event", "a-guest-with-a-name", NULL);
    cr_assert_gt(slow.lost, 0);
    got = events_take(&slow, text, sizeof(text));
    cr_assert_eq(text[got - 1], '\n', "only whole lines");
    events_emit(&events, "another", NULL, NULL);
    text[events_take(&slow, text, sizeof(text) - 1)] = '\0';
    cr_assert_not_null(strstr(text, "events_lost"));
    cr_assert_not_null(strstr(text, "another"));
    events_unsubscribe(&events, &slow);
}
