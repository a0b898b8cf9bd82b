/* SPDX-License-Identifier: Apache-2.0 */
/* memctl events: what happens, as it happens. Each line is written at once, so that it can be
 * piped into something that waits for it. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "ctl.h"

enum { EVENTS_COUNT };

const struct ctl_option ctl_events_options[] = {
    [EVENTS_COUNT] = {.name = "count", .value = "NUMBER", .help = "stop after so many events"},
    {0},
};

struct reader {
    bool json;
    uint64_t left; /* 0: no end */
};

static void print_time(double seconds)
{
    time_t whole = (time_t)seconds;
    struct tm parts;
    char text[32];

    localtime_r(&whole, &parts);
    strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S", &parts);
    printf("%s.%03d", text, (int)((seconds - (double)whole) * 1000));
}

/* "2026-01-31 12:00:00.123  guest_gone  web1  key=value ..." */
static void print_plain(json_t *event)
{
    const char *key, *guest = ctl_json_text(event, "guest");
    json_t *value;

    print_time(ctl_json_real(event, "time"));
    printf("  %-20s  %-16s", ctl_json_text(event, "event"), *guest ? guest : "-");
    json_object_foreach(event, key, value)
    {
        if (strcmp(key, "time") == 0 || strcmp(key, "event") == 0 || strcmp(key, "guest") == 0)
            continue;
        printf("  %s=", key);
        if (json_is_string(value))
            fputs(json_string_value(value), stdout);
        else
            json_dumpf(value, stdout, JSON_ENCODE_ANY | JSON_COMPACT);
    }
    putchar('\n');
}

static bool on_line(void *context, char *text)
{
    struct reader *reader = context;
    json_t *event = json_loads(text, 0, NULL);

    if (!event) {
        ctl_say("left out a line that is no JSON: %s", text);
        return true;
    }
    if (reader->json)
        puts(text);
    else
        print_plain(event);
    json_decref(event);
    fflush(stdout);
    return reader->left == 0 || --reader->left > 0;
}

enum ctl_status ctl_events_run(const struct ctl_arguments *arguments)
{
    struct reader reader = {.json = arguments->json};
    const char *count = arguments->value[EVENTS_COUNT];

    if (count && ctl_value_number(count, UINT64_MAX, &reader.left) < 0) {
        ctl_say("--count: '%s' is no number above 0", count);
        return CTL_USAGE;
    }
    return ctl_http_stream(arguments->socket, "/v1/events", on_line, &reader);
}
