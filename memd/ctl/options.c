/* SPDX-License-Identifier: Apache-2.0 */
/* Reads the options of a command by its table. --socket, --json, --help and --version are the same
 * for all of them. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ctl.h"

enum common_option { OPTION_SOCKET = CTL_OPTIONS_MAX, OPTION_JSON, OPTION_HELP, OPTION_VERSION };

static void print_option(FILE *stream, const struct ctl_option *option)
{
    char left[64];

    snprintf(left, sizeof(left), "--%s%s%s", option->name, option->value ? " " : "",
             option->value ? option->value : "");
    fprintf(stream, "  %-*s %s\n", CTL_SUMMARY_COLUMNS, left, option->help);
}

static void print_usage(FILE *stream, const struct ctl_command *command)
{
    static const struct ctl_option socket = {.name = "socket",
                                             .value = "PATH",
                                             .help = "memd's control socket (" CTL_DEFAULT_SOCKET
                                                     ", then $XDG_RUNTIME_DIR/memd.sock)"};
    static const struct ctl_option json = {.name = "json", .help = "print JSON"};
    static const struct ctl_option help = {.name = "help", .help = "print this"};
    static const struct ctl_option version = {.name = "version", .help = "print the version"};

    fprintf(stream, "usage: memctl %s [OPTION...] %s\n%s\n\noptions:\n", command->name,
            command->operands, command->summary);
    for (const struct ctl_option *option = command->options; option->name; option++)
        print_option(stream, option);
    if (command->prints_data)
        print_option(stream, &json);
    print_option(stream, &socket);
    print_option(stream, &help);
    print_option(stream, &version);
}

/* The command's table and the common options as getopt_long() wants them; NULL without memory. */
static struct option *make_getopt_table(const struct ctl_command *command)
{
    struct option *table = calloc(CTL_OPTIONS_MAX + 5, sizeof(*table));
    size_t count = 0;

    if (!table)
        return NULL;
    for (; command->options[count].name; count++) {
        table[count].name = command->options[count].name;
        table[count].has_arg = command->options[count].value ? required_argument : no_argument;
        table[count].val = (int)count;
    }
    table[count++] = (struct option){"socket", required_argument, NULL, OPTION_SOCKET};
    table[count++] = (struct option){"help", no_argument, NULL, OPTION_HELP};
    table[count++] = (struct option){"version", no_argument, NULL, OPTION_VERSION};
    if (command->prints_data)
        table[count] = (struct option){"json", no_argument, NULL, OPTION_JSON};
    return table;
}

static const char *default_socket(void)
{
    static char path[4096];
    const char *directory = getenv("XDG_RUNTIME_DIR");

    if (access(CTL_DEFAULT_SOCKET, F_OK) == 0 || !directory)
        return CTL_DEFAULT_SOCKET;
    snprintf(path, sizeof(path), "%s/memd.sock", directory);
    return access(path, F_OK) == 0 ? path : CTL_DEFAULT_SOCKET;
}

static void take(const struct ctl_command *command, struct ctl_arguments *arguments, int option)
{
    if (option == OPTION_SOCKET) {
        arguments->socket = optarg;
    } else if (option == OPTION_JSON) {
        arguments->json = true;
    } else {
        struct ctl_values *repeated = &arguments->repeated[option];

        if (command->options[option].repeats)
            repeated->at[repeated->count++] = optarg;
        arguments->value[option] = optarg ? optarg : "";
    }
}

/* Room for the values of options that repeat: no more than there are words. */
static bool make_room(const struct ctl_command *command, int argc, struct ctl_arguments *arguments)
{
    for (int i = 0; command->options[i].name; i++) {
        if (!command->options[i].repeats)
            continue;
        arguments->repeated[i].at = calloc((size_t)argc + 1, sizeof(char *));
        if (!arguments->repeated[i].at)
            return false;
    }
    return true;
}

static bool check_operands(const struct ctl_command *command, const struct ctl_arguments *arguments)
{
    if (arguments->operand_count >= command->operands_min &&
        arguments->operand_count <= command->operands_max)
        return true;
    ctl_say("%s: %s", command->name,
            arguments->operand_count < command->operands_min ? "something is missing"
                                                             : "too many words");
    return false;
}

/* Goes through argv; false when it is all over, with *ret_status. */
static bool walk(const struct ctl_command *command, const struct option *table, int argc,
                 char **argv, struct ctl_arguments *arguments, enum ctl_status *ret_status)
{
    int option;

    *ret_status = CTL_USAGE;
    opterr = 1;
    /* "+": the words of a wrapped program are not ours, even if they look so. */
    while ((option = getopt_long(argc, argv, command->wraps ? "+" : "", table, NULL)) != -1) {
        if (option == '?') {
            print_usage(stderr, command);
            return false;
        }
        if (option == OPTION_HELP || option == OPTION_VERSION) {
            if (option == OPTION_HELP)
                print_usage(stdout, command);
            else
                printf("memctl %s\n", MEMD_VERSION);
            *ret_status = CTL_DONE;
            return false;
        }
        take(command, arguments, option);
    }
    arguments->operands = argv + optind;
    arguments->operand_count = (size_t)(argc - optind);
    if (check_operands(command, arguments))
        return true;
    print_usage(stderr, command);
    return false;
}

bool ctl_options_read(const struct ctl_command *command, int argc, char **argv,
                      struct ctl_arguments *ret_arguments, enum ctl_status *ret_status)
{
    struct option *table = make_getopt_table(command);
    char *name = argv[0];
    bool go_on;

    *ret_arguments = (struct ctl_arguments){.socket = default_socket()};
    if (!table || !make_room(command, argc, ret_arguments)) {
        ctl_say("no memory");
        free(table);
        *ret_status = CTL_FAILED;
        return false;
    }
    argv[0] = "memctl"; /* the name that getopt_long() complains under */
    go_on = walk(command, table, argc, argv, ret_arguments, ret_status);
    argv[0] = name;
    free(table);
    return go_on;
}

void ctl_options_free(struct ctl_arguments *arguments)
{
    for (int i = 0; i < CTL_OPTIONS_MAX; i++)
        free(arguments->repeated[i].at);
}
