/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memctl: the hands of memd's operator. It has no state: each command asks memd over its control
 * socket (HTTP and JSON), looks at this host itself (doctor, analyze), or starts a VMM (run).
 *
 * A new command is a function, a table of options, a line in `commands`, and a manual page.
 */
#include <stdio.h>
#include <string.h>

#include "ctl.h"

static const struct ctl_option no_options[] = {{0}};

static const struct ctl_command commands[] = {
    {.name = "doctor",
     .operands = "",
     .summary = "check this host, and say what mends it",
     .options = no_options,
     .prints_data = true,
     .run = ctl_doctor_run},
    {.name = "run",
     .operands = "-- VMM ARGUMENT...",
     .summary = "start a VMM whose guest memd takes care of",
     .options = ctl_run_options,
     .prints_data = true,
     .wraps = true,
     .operands_min = 1,
     .operands_max = SIZE_MAX,
     .run = ctl_run_run},
    {.name = "status",
     .operands = "",
     .summary = "the host, what sharing saves, and a line for each guest",
     .options = no_options,
     .prints_data = true,
     .run = ctl_status_run},
    {.name = "guest",
     .operands = "NAME",
     .summary = "one guest in full, and what holds sharing back",
     .options = no_options,
     .prints_data = true,
     .operands_min = 1,
     .operands_max = 1,
     .run = ctl_guest_run},
    {.name = "set",
     .operands = "NAME KEY=VALUE...",
     .summary = "change what a guest is promised (max, min, shares, domain)",
     .options = no_options,
     .operands_min = 2,
     .operands_max = SIZE_MAX,
     .run = ctl_set_run},
    {.name = "detach",
     .operands = "NAME",
     .summary = "let a guest go, all of its pages private again",
     .options = no_options,
     .operands_min = 1,
     .operands_max = 1,
     .run = ctl_detach_run},
    {.name = "migrate",
     .operands = "NAME [HOST:PORT]",
     .summary = "move a running guest to another host",
     .options = ctl_migrate_options,
     .prints_data = true,
     .operands_min = 1,
     .operands_max = 2,
     .run = ctl_migrate_run},
    {.name = "events",
     .operands = "",
     .summary = "what happens, as it happens",
     .options = ctl_events_options,
     .prints_data = true,
     .run = ctl_events_run},
    {.name = "analyze",
     .operands = "SOURCE...",
     .summary = "count exactly how much could be shared in memory dumps or live guests",
     .options = ctl_analyze_options,
     .prints_data = true,
     .operands_min = 1,
     .operands_max = SIZE_MAX,
     .run = ctl_analyze_run},
};

#define COMMANDS (sizeof(commands) / sizeof(commands[0]))

static void print_usage(FILE *stream)
{
    fprintf(stream, "usage: memctl COMMAND [OPTION...] ...\n\ncommands:\n");
    for (size_t i = 0; i < COMMANDS; i++)
        fprintf(stream, "  %-10s %s\n", commands[i].name, commands[i].summary);
    fprintf(stream, "\n'memctl COMMAND --help' tells the options, 'man memctl' the rest.\n");
}

static const struct ctl_command *find_command(const char *name)
{
    for (size_t i = 0; i < COMMANDS; i++) {
        if (strcmp(commands[i].name, name) == 0)
            return &commands[i];
    }
    return NULL;
}

/* Buffered output that could not be written is a failure that only closing tells. */
static enum ctl_status flush(enum ctl_status status)
{
    if (fflush(stdout) == 0 && !ferror(stdout))
        return status;
    ctl_say("could not write the output: %m");
    return status == CTL_DONE ? CTL_FAILED : status;
}

static enum ctl_status run_command(const struct ctl_command *command, int argc, char **argv)
{
    struct ctl_arguments arguments;
    enum ctl_status status;

    if (ctl_options_read(command, argc, argv, &arguments, &status))
        status = command->run(&arguments);
    ctl_options_free(&arguments);
    return flush(status == CTL_LOST ? CTL_UNREACHABLE : status);
}

/* "memctl --socket PATH status" is "memctl status --socket PATH": brings the command to argv[1].
 * False when there is none. */
static bool move_command_first(int argc, char **argv)
{
    int at = 1;
    char *command;

    while (at < argc && argv[at][0] == '-')
        at += strcmp(argv[at], "--socket") == 0 ? 2 : 1;
    if (at >= argc)
        return false;
    command = argv[at];
    memmove(&argv[2], &argv[1], (size_t)(at - 1) * sizeof(char *));
    argv[1] = command;
    return true;
}

int main(int argc, char **argv)
{
    const struct ctl_command *command;

    if (argc == 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        print_usage(stdout);
        return flush(CTL_DONE);
    }
    if (argc == 2 && strcmp(argv[1], "--version") == 0) {
        printf("memctl %s\n", MEMD_VERSION);
        return flush(CTL_DONE);
    }
    if (!move_command_first(argc, argv)) {
        ctl_say("no command is given; 'memctl --help' lists them");
        return CTL_USAGE;
    }
    command = find_command(argv[1]);
    if (!command) {
        ctl_say("there is no command '%s'; 'memctl --help' lists them", argv[1]);
        return CTL_USAGE;
    }
    return run_command(command, argc - 1, argv + 1);
}
