/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memd's decoder of a mover, which hears strangers and is believed nothing that can't be. What it
 * says may end its own migration and none of another guest.
 */
#include "host.h"
#include "migration.h"

#define NAME "moves"

enum step { STEP_STATUS, STEP_NEED, STEP_RAW, STEP_COUNT };

static const uint8_t seed_steps[][40] = {
    {1, STEP_STATUS, 2, 0, 1, 0, 1, STEP_STATUS, 5, 2, 0, 0, 1},
    {0, STEP_NEED, 0, 'm', 'o', 'v', 'e', 's', 0, STEP_STATUS, 3, 4, 1},
    {1, STEP_RAW, 8, 1, 0, 0, 0, 8},
};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    if (number >= sizeof(seed_steps) / sizeof(seed_steps[0]) || room < sizeof(seed_steps[0]))
        return 0;
    memcpy(into, seed_steps[number], sizeof(seed_steps[0]));
    return sizeof(seed_steps[0]);
}

static bool say_status(struct migration *migration, struct fuzz_input *input)
{
    struct order_status status = {.header = {ORDER_STATUS, sizeof(status)}};
    uint8_t fields[40];

    status.stage = fuzz_take_u8(input) % (ORDER_STAGE_COUNT + 1);
    status.outcome = fuzz_take_u8(input) % (ORDER_OUTCOME_COUNT + 1);
    status.was_cut = fuzz_take_u8(input) % 2;
    status.may_cancel = fuzz_take_u8(input) % 2;
    status.data_port = fuzz_take_u8(input) * 300U;
    fuzz_take(input, fields, fuzz_take_u8(input) % sizeof(fields));
    memcpy(&status.reconnects, fields, 4);
    memcpy(&status.pages, fields + 4, 32);
    memset(status.words, fields[36], sizeof(status.words) - fields[37] % 2);
    return mover_process_take(migration, (const uint8_t *)&status, sizeof(status));
}

static bool say_need(struct migration *migration, struct fuzz_input *input)
{
    struct order_need_guest need = {.header = {ORDER_NEED_GUEST, sizeof(need)}};

    need.pages = fuzz_take_u8(input);
    for (size_t i = 0; i < sizeof(need.name); i++) {
        need.name[i] = (char)fuzz_take_u8(input);
        if (!need.name[i])
            break;
    }
    return mover_process_take(migration, (const uint8_t *)&need, sizeof(need));
}

static bool say_raw(struct migration *migration, struct fuzz_input *input)
{
    _Alignas(8) uint8_t message[600];
    size_t bytes = fuzz_take_u16(input) % sizeof(message);

    fuzz_take(input, message, sizeof(message));
    return mover_process_take(migration, message, bytes);
}

/* Whatever was said, there is an answer for who asks. */
static void check_status(const struct daemon *daemon, const char *name)
{
    json_t *json = migration_status(daemon, name);
    const char *reason = json_string_value(json_object_get(json, "reason"));

    FUZZ_REQUIRE(json && reason);
    for (; *reason; reason++)
        FUZZ_REQUIRE(*reason >= ' ' && *reason <= '~');
    json_decref(json);
}

/* Who says what can't be is ended, and may have ended itself before. */
static bool is_listed(const struct daemon *daemon, const struct migration *migration)
{
    const struct migration *one = daemon->migrations.first;

    while (one && one != migration)
        one = one->next;
    return one;
}

static void check_other(const struct migration *other)
{
    FUZZ_REQUIRE(!other->over && other->status.outcome == ORDER_GOES_ON && !other->again);
    FUZZ_REQUIRE(strcmp(other->start.name, "other") == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct daemon *daemon = fuzz_daemon();
    struct migration *other = migration_new(daemon, true), *migration;
    struct fuzz_input input = {data, data + bytes};
    bool source = fuzz_take_u8(&input) % 2, good = true;

    if (bytes > 1024)
        return 0;
    strcpy(other->start.name, "other");
    migration = migration_new(daemon, source);
    if (source)
        strcpy(migration->start.name, NAME);
    else
        daemon->migrations.unknown++;
    while (good && input.at < input.end && is_listed(daemon, migration)) {
        switch (fuzz_take_u8(&input) % STEP_COUNT) {
        case STEP_STATUS: good = say_status(migration, &input); break;
        case STEP_NEED: good = say_need(migration, &input); break;
        default: good = say_raw(migration, &input);
        }
        fuzz_turn();
    }
    check_other(other);
    if (is_listed(daemon, migration) && migration->start.name[0])
        check_status(daemon, migration->start.name);
    while (daemon->migrations.first)
        migration_forget(daemon->migrations.first);
    FUZZ_REQUIRE(daemon->migrations.unknown == 0);
    FUZZ_REQUIRE(daemon->registry.count == 0);
    fuzz_turn();
    return 0;
}
