/* SPDX-License-Identifier: Apache-2.0 */
/* Reads the options of a command by its table. --socket, --json, --help and --version are the same
 * for all of them. */
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>
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

/* Says what is wrong, and where the options are told. */
static void __attribute__((format(printf, 2, 3)))
complain(const struct ctl_command *command, const char *format, ...)
{
    char words[256];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(words, sizeof(words), format, arguments);
    va_end(arguments);
    ctl_say("%s: %s; 'memctl %s --help' tells the usage", command->name, words, command->name);
}

static bool take_socket(const struct ctl_command *command, struct ctl_arguments *arguments)
{
    size_t room = sizeof(((struct sockaddr_un *)0)->sun_path);

    if (arguments->socket)
        complain(command, "--socket is given twice");
    else if (!optarg[0] || strlen(optarg) >= room)
        complain(command, "--socket: give a path of 1 to %zu characters", room - 1);
    else
        arguments->socket = optarg;
    return arguments->socket == optarg;
}

static bool take(const struct ctl_command *command, struct ctl_arguments *arguments, int option)
{
    if (option == OPTION_SOCKET)
        return take_socket(command, arguments);
    if (option == OPTION_JSON) {
        arguments->json = true;
    } else {
        struct ctl_values *repeated = &arguments->repeated[option];

        if (command->options[option].repeats) {
            repeated->at[repeated->count++] = optarg;
        } else if (optarg && arguments->value[option]) {
            complain(command, "--%s is given twice", command->options[option].name);
            return false;
        }
        arguments->value[option] = optarg ? optarg : "";
    }
    return true;
}

/* getopt_long() has come to a word that it does not understand. */
static void complain_about_option(const struct ctl_command *command, char **argv, int option)
{
    if (option == ':')
        complain(command, "%s needs a value", argv[optind - 1]);
    else if (optopt >= ' ')
        complain(command, "there is no option -%c", optopt);
    else
        complain(command, "'%s' is none of its options", argv[optind - 1]);
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
    if (arguments->operand_count < command->operands_min)
        complain(command, "something is missing: it wants %s", command->operands);
    else
        complain(command, "'%s' is a word too many", arguments->operands[command->operands_max]);
    return false;
}

/* Goes through argv; false when it is all over, with *ret_status. */
static bool walk(const struct ctl_command *command, const struct option *table, int argc,
                 char **argv, struct ctl_arguments *arguments, enum ctl_status *ret_status)
{
    int option;

    *ret_status = CTL_USAGE;
    opterr = 0;
    /* "+": the words of a wrapped program are not ours, even if they look so. */
    while ((option = getopt_long(argc, argv, command->wraps ? "+:" : ":", table, NULL)) != -1) {
        if (option == '?' || option == ':') {
            complain_about_option(command, argv, option);
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
        if (!take(command, arguments, option))
            return false;
    }
    arguments->operands = argv + optind;
    arguments->operand_count = (size_t)(argc - optind);
    return check_operands(command, arguments);
}

bool ctl_options_read(const struct ctl_command *command, int argc, char **argv,
                      struct ctl_arguments *ret_arguments, enum ctl_status *ret_status)
{
    struct option *table = make_getopt_table(command);
    bool go_on;

    *ret_arguments = (struct ctl_arguments){.socket = NULL};
    if (!table || !make_room(command, argc, ret_arguments)) {
        ctl_say("no memory");
        free(table);
        *ret_status = CTL_FAILED;
        return false;
    }
    go_on = walk(command, table, argc, argv, ret_arguments, ret_status);
    if (!ret_arguments->socket)
        ret_arguments->socket = default_socket();
    free(table);
    return go_on;
}

void ctl_options_free(struct ctl_arguments *arguments)
{
    for (int i = 0; i < CTL_OPTIONS_MAX; i++)
        free(arguments->repeated[i].at);
}
