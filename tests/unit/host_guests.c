/* SPDX-License-Identifier: Apache-2.0 */
/* Guests: how they come, what they are promised, how they go; and what the control API says. */
#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host_http.h"
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
        "min is more than max");
    cr_assert_eq(http_status(&world, "POST", "/v1/guests",
                             "{\"name\":\"a\",\"pid\":2147483647,\"max_bytes\":4096}"),
                 400, "no such process");
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("a", "")), 201);
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("a", "")), 409);
    cr_assert_eq(
        http_status(&world, "POST", "/v1/guests",
                    "{\"name\":\"b\",\"pid\":1,\"max_bytes\":\"4G\",\"min_bytes\":\"2G\"}"),
        409, "the guarantee is more than the budget");
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

Test(host_guests, places_that_do_not_sum_stop_admission)
{
    struct world world;
    struct fake fake;

    world_start(&world, "");
    fake_join(&fake, &world, "a", NULL, 64);
    fake.page_count = 63;
    fake_stats(&fake);
    UNTIL(&world, &fake, 1, world.daemon.ledger.mismatches_now == 1);
    cr_assert_eq(http_status(&world, "POST", "/v1/guests", registration("b", "")), 503);
    fake.page_count = 64;
    fake_stats(&fake);
    UNTIL(&world, &fake, 1, world.daemon.ledger.mismatches_now == 0);
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

Test(host_guests, a_vmm_that_dies_before_hello_is_forgotten_after_the_grace)
{
    struct world world;
    pid_t pid = start_process();

    world_start(&world, "");
    register_pid(&world, "a", pid);
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

/* ---- events ---- */

static void arrived(struct events_subscriber *subscriber)
{
    (void)subscriber;
}

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
