/* SPDX-License-Identifier: Apache-2.0 */
/* memd's part of a migration: who may ask, what is refused, and what is made of a record. The
 * movers themselves are tested in pairs (mover_pair.c), the whole by the live tests. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host_http.h"
#include "host_world.h"
#include "migration.h"

static void write_records(const struct world *world, const char *text)
{
    char path[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/state/migrations.json", world->dir);
    file = fopen(path, "w");
    cr_assert(file);
    fputs(text, file);
    fclose(file);
}

static void stop_daemon(struct world *world)
{
    daemon_stop(&world->daemon);
    world->running = false;
}

Test(host_migration, records_that_are_none_are_left_out, .timeout = 60)
{
    static const char *const records[] = {
        "[]",
        "{",
        "[1, null, {}, {\"guest\": \"a\"}]",
        "[{\"guest\":\"../"
        "a\",\"peer\":\"h:1\",\"source\":true,\"over\":false,\"session\":\"00\",\"socket\":\"x\","
        "\"pid\":1,\"start_time\":1,\"host\":\"h\",\"port\":1,\"data_port\":1,\"listen_port\":1,"
        "\"bandwidth\":0,\"precopy_only\":false,\"began\":1.0,\"outcome\":\"running\"}]",
        "[{\"guest\":\"a\",\"peer\":\"h:1\",\"source\":true,\"over\":false,"
        "\"session\":\"00000000000000000000000000000000\",\"socket\":\"../x\","
        "\"pid\":1,\"start_time\":1,\"host\":\"h\",\"port\":1,\"data_port\":1,\"listen_port\":1,"
        "\"bandwidth\":0,\"precopy_only\":false,\"began\":1.0,\"outcome\":\"running\"}]",
    };
    struct world world;

    world_start(&world, "");
    for (size_t i = 0; i < sizeof(records) / sizeof(records[0]); i++) {
        stop_daemon(&world);
        write_records(&world, records[i]);
        world_restart(&world, "");
        cr_assert_null(world.daemon.migrations.first, "record %zu", i);
    }
    world_stop(&world);
}

Test(host_migration, record_that_is_over_is_shown_and_starts_nothing, .timeout = 60)
{
    struct world world;
    json_t *status;

    world_start(&world, "");
    stop_daemon(&world);
    write_records(&world, "[{\"guest\":\"a\",\"peer\":\"h:1\",\"source\":true,\"over\":true,"
                          "\"session\":\"00000000000000000000000000000000\",\"socket\":\"\","
                          "\"pid\":0,\"start_time\":1,\"host\":\"h\",\"port\":1,\"data_port\":1,"
                          "\"listen_port\":1,\"bandwidth\":0,\"precopy_only\":false,\"began\":1.0,"
                          "\"outcome\":\"completed\"}]");
    world_restart(&world, "");
    status = migration_status(&world.daemon, "a");
    cr_assert_str_eq(json_string_value(json_object_get(status, "status")), "completed");
    cr_assert_str_eq(json_string_value(json_object_get(status, "peer")), "h:1");
    json_decref(status);
    cr_assert_eq(world.daemon.migrations.first->pid, 0);
    world_stop(&world);
}

Test(host_migration, arrival_is_refused_where_the_configuration_names_no_vmm, .timeout = 60)
{
    struct world world;
    struct guest *guest = NULL;
    char words[200] = "";

    world_start(&world, "[guest a]\nmax = 16M\n");
    cr_assert_eq(incoming_start(&world.daemon, "a", &guest, words, sizeof(words)), -EPERM);
    cr_assert(strstr(words, "names no VMM"));
    cr_assert_eq(incoming_start(&world.daemon, "b", &guest, words, sizeof(words)), -EPERM);
    cr_assert(strstr(words, "has no [guest] section"));
    cr_assert_null(guest);
    cr_assert_eq(world.daemon.registry.count, 0);
    world_stop(&world);
}

static bool vmm_has_written(struct world *world)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/said", world->dir);
    return access(path, F_OK) == 0;
}

/* It is registered before it runs, knows the way to memd, and nothing else of memd's surroundings.
 */
Test(host_migration, vmm_of_an_arrival_gets_its_token_and_nothing_else, .timeout = 60)
{
    char config[512], path[128], said[4096] = "", words[200];
    struct guest *guest;
    struct world world;
    int fd;

    setenv("SECRET_OF_MEMD", "1", 1);
    world_start(&world, "");
    stop_daemon(&world);
    snprintf(config, sizeof(config),
             "[guest a]\nmax = 16M\nincoming_user = %u\nincoming = /bin/sh -c\n"
             "    \"env > %s/new; mv %s/new %s/said; exec sleep 600\"\n",
             geteuid(), world.dir, world.dir, world.dir);
    world_restart(&world, config);
    cr_assert_eq(incoming_start(&world.daemon, "a", &guest, words, sizeof(words)), 0, "%s", words);
    cr_assert_eq(guest->account.max_bytes, 16U << 20);
    cr_assert(guest->waiting_for_hello);
    cr_assert_eq(incoming_start(&world.daemon, "a", &guest, words, sizeof(words)), -EPERM);
    UNTIL(&world, NULL, 0, vmm_has_written(&world));
    snprintf(path, sizeof(path), "%s/said", world.dir);
    fd = open(path, O_RDONLY);
    cr_assert_gt(read(fd, said, sizeof(said) - 1), 0);
    close(fd);
    cr_assert(strstr(said, guest->token), "%s", said);
    cr_assert(strstr(said, "MEMD_AGENT_SOCKET="));
    cr_assert_null(strstr(said, "SECRET_OF_MEMD"));
    registry_end_process(guest, "the test is over");
    UNTIL(&world, NULL, 0, !registry_find(&world.daemon, "a") || guest->death.fd < 0);
    unlink(path);
    world_stop(&world);
}
