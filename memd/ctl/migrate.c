/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memctl migrate: moves a guest to another host and waits until that is over, one way or the other.
 * What moves it are memd and its movers: to end this command, or memd, ends nothing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ctl.h"

#define MEMD_WAIT_S 60 /* for a memd that is started again meanwhile */

enum { MIGRATE_PRECOPY_ONLY, MIGRATE_POSTCOPY_ONLY, MIGRATE_BANDWIDTH, MIGRATE_CANCEL };

const struct ctl_option ctl_migrate_options[] = {
    [MIGRATE_PRECOPY_ONLY] = {.name = "precopy-only",
                              .help = "let it run there only when all of its memory is there"},
    [MIGRATE_POSTCOPY_ONLY] = {.name = "postcopy-only",
                               .help = "let it run there at once; its memory follows"},
    [MIGRATE_BANDWIDTH] = {.name = "bandwidth",
                           .value = "SIZE",
                           .help = "bytes a second; a page that is waited for is never held back"},
    [MIGRATE_CANCEL] = {.name = "cancel", .help = "call it off, if that can still be"},
    {0},
};

/* ---- what is asked for ---- */

static enum ctl_status make_body(const struct ctl_arguments *arguments, json_t **ret_body)
{
    const char *bandwidth = arguments->value[MIGRATE_BANDWIDTH];
    uint64_t bytes = 0;

    if (bandwidth && (ctl_value_size(bandwidth, &bytes) < 0 || bytes == 0)) {
        ctl_say("--bandwidth: '%s' is no size above 0", bandwidth);
        return CTL_USAGE;
    }
    *ret_body = json_pack("{s:s}", "to", arguments->operands[1]);
    if (!*ret_body) {
        ctl_say("'%s' is no UTF-8", arguments->operands[1]);
        return CTL_USAGE;
    }
    if (bytes)
        json_object_set_new(*ret_body, "bandwidth_bytes", json_integer((json_int_t)bytes));
    if (arguments->value[MIGRATE_PRECOPY_ONLY])
        json_object_set_new(*ret_body, "precopy_only", json_true());
    if (arguments->value[MIGRATE_POSTCOPY_ONLY])
        json_object_set_new(*ret_body, "postcopy_only", json_true());
    return CTL_DONE;
}

static bool is_destination(const char *text)
{
    char host[512];
    uint16_t port;

    return words_split_address(text, host, sizeof(host), &port) && port > 0;
}

static bool operands_fit(const struct ctl_arguments *arguments)
{
    bool cancels = arguments->value[MIGRATE_CANCEL];
    bool precopy = arguments->value[MIGRATE_PRECOPY_ONLY];
    bool postcopy = arguments->value[MIGRATE_POSTCOPY_ONLY];

    if (!words_are_name(arguments->operands[0])) {
        ctl_say("'%s' is no guest's name", arguments->operands[0]);
        return false;
    }
    if (cancels && (arguments->value[MIGRATE_BANDWIDTH] || precopy || postcopy))
        ctl_say("migrate: --cancel goes with no other option");
    else if (!cancels && arguments->operand_count != 2)
        ctl_say("migrate: where to? Give HOST:PORT");
    else if (!cancels && !is_destination(arguments->operands[1]))
        ctl_say("migrate: '%s' is not HOST:PORT, with a port from 1 to 65535 (and brackets around "
                "an IPv6 HOST)",
                arguments->operands[1]);
    else if (precopy && postcopy)
        ctl_say("migrate: --precopy-only or --postcopy-only?");
    else
        return true;
    return false;
}

/* ---- progress ---- */

static void show_time(double seconds)
{
    if (seconds >= 60)
        fprintf(stderr, "%.0f min", seconds / 60);
    else
        fprintf(stderr, "%.0f s", seconds);
}

/* One line that is written over, on a terminal; nothing else would be helped by it. */
static void show_progress(const json_t *status)
{
    uint64_t pages = ctl_json_u64(status, "pages"), left = ctl_json_u64(status, "pages_left");
    const json_t *left_s = json_object_get(status, "left_s");
    char rate[CTL_SIZE_CHARS], rest[CTL_SIZE_CHARS];

    fprintf(stderr, "\r\033[K%s: %s", ctl_json_text(status, "guest"),
            ctl_json_text(status, "stage"));
    if (pages)
        fprintf(stderr, ", %s left, %s/s", ctl_format_size(left * PAGE_BYTES, rest),
                ctl_format_size(ctl_json_u64(status, "rate_bytes"), rate));
    if (json_is_number(left_s)) {
        fputs(", ", stderr);
        show_time(json_number_value(left_s));
    }
    if (!json_is_true(json_object_get(status, "linked")))
        fputs(", the other host can't be heard", stderr);
    fflush(stderr);
}

static bool goes_on(const json_t *status)
{
    return strcmp(ctl_json_text(status, "status"), "running") == 0;
}

/* Until it is over; *ret_status is how it ended. */
static enum ctl_status follow(const char *socket, const char *path, json_t **ret_status)
{
    static const struct timespec moment = {.tv_nsec = 200000000};
    bool terminal = isatty(STDERR_FILENO);
    enum ctl_status result;

    for (;;) {
        json_t *status = NULL;

        result = ctl_http_call(socket, "GET", path, NULL, CTL_TIMEOUT_S, &status);
        if (result == CTL_UNREACHABLE || result == CTL_LOST) {
            ctl_say("the migration goes on without memd; waiting until it is back");
            if (ctl_http_wait(socket, MEMD_WAIT_S))
                continue;
        }
        if (result != CTL_DONE)
            return result;
        if (!goes_on(status)) {
            if (terminal)
                fputs("\r\033[K", stderr);
            *ret_status = status;
            return CTL_DONE;
        }
        if (terminal)
            show_progress(status);
        json_decref(status);
        nanosleep(&moment, NULL);
    }
}

/* ---- the report ---- */

static void print_times(const json_t *status)
{
    printf("  downtime     %.1f ms\n", ctl_json_real(status, "downtime_s") * 1000);
    printf("  pre-copy     %.2f s\n", ctl_json_real(status, "precopy_s"));
    printf("  post-copy    %.2f s\n", ctl_json_real(status, "postcopy_s"));
    printf("  in all       %.2f s\n", ctl_json_real(status, "total_s"));
    printf("  sharing      rested %.2f s; what was shared stayed shared\n",
           ctl_json_real(status, "sharing_rested_s"));
}

static void print_pages(const json_t *status)
{
    char size[CTL_SIZE_CHARS], count[CTL_SIZE_CHARS];

    printf("  sent         %s\n", ctl_format_size(ctl_json_u64(status, "bytes_sent"), size));
    printf("  pages        %s demanded",
           ctl_format_count(ctl_json_u64(status, "pages_demand"), count));
    printf(", %s pushed", ctl_format_count(ctl_json_u64(status, "pages_pushed"), count));
    printf(", %s deduplicated",
           ctl_format_count(ctl_json_u64(status, "pages_deduplicated"), count));
    printf(", %s zero\n", ctl_format_count(ctl_json_u64(status, "pages_zero"), count));
    printf("  faults       p50 %llu us, p99 %llu us, p99.9 %llu us, max %llu us\n",
           (unsigned long long)ctl_json_u64(status, "fault_us.p50"),
           (unsigned long long)ctl_json_u64(status, "fault_us.p99"),
           (unsigned long long)ctl_json_u64(status, "fault_us.p999"),
           (unsigned long long)ctl_json_u64(status, "fault_us.max"));
    printf("  reconnects   %llu\n", (unsigned long long)ctl_json_u64(status, "reconnects"));
}

static void print_report(const json_t *status)
{
    static const struct {
        const char *status, *words;
    } endings[] = {
        {"completed", "has moved to"},
        {"failed_source_runs", "goes on here; it did not get to"},
        {"failed_guest_lost", "is LOST on its way to"},
        {"cancelled", "goes on here; it was called off on its way to"},
    };
    const char *how = ctl_json_text(status, "status"), *reason = ctl_json_text(status, "reason");

    for (size_t i = 0; i < sizeof(endings) / sizeof(endings[0]); i++) {
        if (strcmp(how, endings[i].status) == 0)
            printf("guest '%s' %s %s%s%s\n", ctl_json_text(status, "guest"), endings[i].words,
                   ctl_json_text(status, "peer"), *reason ? ": " : "", reason);
    }
    if (strcmp(how, "completed") != 0)
        return;
    print_times(status);
    print_pages(status);
}

static enum ctl_status report(const struct ctl_arguments *arguments, json_t *status)
{
    bool completed = strcmp(ctl_json_text(status, "status"), "completed") == 0;
    bool cancelled = strcmp(ctl_json_text(status, "status"), "cancelled") == 0;

    if (arguments->json)
        ctl_print_json(status);
    else
        print_report(status);
    json_decref(status);
    return completed || (cancelled && arguments->value[MIGRATE_CANCEL]) ? CTL_DONE : CTL_FAILED;
}

/* ---- all of it ---- */

static enum ctl_status ask(const struct ctl_arguments *arguments, const char *path)
{
    enum ctl_status status;
    json_t *body = NULL;

    if (arguments->value[MIGRATE_CANCEL])
        return ctl_http_call(arguments->socket, "DELETE", path, NULL, CTL_TIMEOUT_S, NULL);
    status = make_body(arguments, &body);
    if (status == CTL_DONE)
        status = ctl_http_call(arguments->socket, "POST", path, body, CTL_TIMEOUT_S, NULL);
    json_decref(body);
    return status;
}

enum ctl_status ctl_migrate_run(const struct ctl_arguments *arguments)
{
    enum ctl_status status;
    json_t *outcome = NULL;
    char path[128];

    if (!operands_fit(arguments))
        return CTL_USAGE;
    snprintf(path, sizeof(path), "/v1/guests/%s/migrate", arguments->operands[0]);
    status = ask(arguments, path);
    if (status == CTL_DONE)
        status = follow(arguments->socket, path, &outcome);
    return status == CTL_DONE ? report(arguments, outcome) : status;
}
