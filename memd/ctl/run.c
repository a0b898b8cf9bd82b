/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memctl run: prepares, registers, then execs the VMM.
 *
 *   1. read the options; find the VMM; see whether it brings the agent (linked with libmemd), or
 *      whether the agent can be preloaded into it;
 *   2. for QEMU, read its command line: how much RAM, and what of it can't be shared and why;
 *   3. register the guest with memd, which may refuse, or choose another engine;
 *   4. exec, with what was added to the command line and the environment.
 *
 * Until 4 nothing is started and nothing is left behind when it fails: the guest that was
 * registered goes when this process does. After 3, whatever can't be had costs sharing, never the
 * guest: it gets its words and is started without.
 *
 * RAM is put on a shared file only if the agent will be there, since only the agent turns that
 * mapping into private memory; without it the guest would live in tmpfs.
 */
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "cmdline.h"
#include "ctl.h"
#include "image.h"

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67 /* 6.4; inherited by exec since 6.7 */
#endif
#define TMPFS_SUPER 0x01021994 /* TMPFS_MAGIC */

#define RAM_DIRECTORY  "/dev/shm"
#define MEMD_WAIT_S    10 /* for a memd that is started again just now */
#define VMM_NAME_CHARS 31
#define SHARES_MAX     1000000

enum {
    RUN_NAME,
    RUN_MAX,
    RUN_MIN,
    RUN_SHARES,
    RUN_DOMAIN,
    RUN_DRY_RUN,
    RUN_INCOMING,
    RUN_NO_MIGRATE
};

const struct ctl_option ctl_run_options[] = {
    [RUN_NAME] = {.name = "name", .value = "NAME", .help = "the guest's name (needed)"},
    [RUN_MAX] = {.name = "max", .value = "SIZE", .help = "memory promised to it (QEMU: its RAM)"},
    [RUN_MIN] = {.name = "min", .value = "SIZE", .help = "memory guaranteed to it"},
    [RUN_SHARES] = {.name = "shares", .value = "NUMBER", .help = "its weight when memory is short"},
    [RUN_DOMAIN] = {.name = "domain",
                    .value = "DOMAIN",
                    .help = "share with guests of this domain"},
    [RUN_DRY_RUN] = {.name = "dry-run", .help = "print the command, and start nothing"},
    [RUN_INCOMING] = {.name = "incoming", .help = "wait for a guest from another host"},
    [RUN_NO_MIGRATE] = {.name = "no-migrate", .help = "leave the guest's RAM where QEMU puts it"},
    {0},
};

struct run {
    const struct ctl_arguments *arguments;
    uint64_t max_bytes, min_bytes, shares;
    char **vmm_argv; /* as the user wrote it */
    char *path;
    char *library; /* libmemd-preload.so */
    bool linked;   /* the VMM brings the agent itself: it is only told of memd */
    bool script;   /* which may end while the VMM that it started goes on */
    bool agent;    /* there can be one; else: */
    char reason[IMAGE_REASON_CHARS + PATH_MAX];
    bool qemu;
    struct qemu_cmdline line;
    char qmp_path[sizeof(((struct sockaddr_un *)0)->sun_path)]; /* "" when there is none */
    bool put_ram;                                               /* on a shared file */
    /* Made for the VMM. */
    char **argv;
    char *environment[8]; /* "NAME=VALUE" */
    size_t environment_count;
};

/* ---- 1. options and the VMM ---- */

static bool read_size_option(const struct run *run, int option, uint64_t *ret_bytes)
{
    const char *text = run->arguments->value[option];

    if (!text || (ctl_value_size(text, ret_bytes) == 0 && (*ret_bytes || option == RUN_MIN)))
        return true;
    ctl_say("--%s: '%s' is no size: give more than 0, as 512M or 2G", ctl_run_options[option].name,
            text);
    return false;
}

static enum ctl_status read_options(struct run *run)
{
    const char *name = run->arguments->value[RUN_NAME];
    const char *shares = run->arguments->value[RUN_SHARES];
    const char *domain = run->arguments->value[RUN_DOMAIN];

    if (!name) {
        ctl_say("run: the guest needs a --name");
        return CTL_USAGE;
    }
    if (!ctl_value_check_guest_name(name))
        return CTL_USAGE;
    if (domain && *domain && !words_are_name(domain)) {
        ctl_say("--domain: '%s' is no name for a domain", domain);
        return CTL_USAGE;
    }
    if (run->arguments->operands[0][0] == '\0') {
        ctl_say("run: the name of the VMM is empty");
        return CTL_USAGE;
    }
    if (!read_size_option(run, RUN_MAX, &run->max_bytes) ||
        !read_size_option(run, RUN_MIN, &run->min_bytes))
        return CTL_USAGE;
    if (shares && ctl_value_number(shares, SHARES_MAX, &run->shares) < 0) {
        ctl_say("--shares: '%s' is no number from 1 to %d", shares, SHARES_MAX);
        return CTL_USAGE;
    }
    return CTL_DONE;
}

/* The dynamic linker splits LD_PRELOAD at colons and blanks, and knows no way to quote them. */
static void find_library(struct run *run)
{
    run->library = ctl_image_preload_library();
    if (!run->library)
        snprintf(run->reason, sizeof(run->reason), "the agent is not installed (%s)",
                 MEMD_PRELOAD_INSTALLED);
    else if (strpbrk(run->library, ": \t"))
        snprintf(run->reason, sizeof(run->reason),
                 "the agent can't be preloaded from a path with blanks or colons (%s)",
                 run->library);
}

static enum ctl_status find_vmm(struct run *run)
{
    char reason[IMAGE_REASON_CHARS] = "";
    int error;

    run->vmm_argv = run->arguments->operands;
    error = ctl_image_find(run->vmm_argv[0], &run->path);
    if (error == 0)
        error = ctl_image_inspect(run->path, reason, &run->linked, &run->script);
    if (error < 0) {
        ctl_say("%s can't be started: %s", run->vmm_argv[0], strerror(-error));
        return CTL_FAILED;
    }
    if (reason[0])
        snprintf(run->reason, sizeof(run->reason), "%s", reason);
    else if (!run->linked)
        find_library(run);
    run->agent = !run->reason[0];
    return CTL_DONE;
}

/* ---- 2. QEMU ---- */

/* A guest that is to come here finds its memory in the agent, or nowhere. */
static enum ctl_status check_incoming(const struct run *run)
{
    if (!run->arguments->value[RUN_INCOMING])
        return CTL_DONE;
    if (!run->agent || run->arguments->value[RUN_NO_MIGRATE] || (run->qemu && !run->put_ram)) {
        ctl_say("run: no guest can come here: %s", !run->agent ? run->reason
                                                   : run->arguments->value[RUN_NO_MIGRATE]
                                                       ? "--no-migrate"
                                                       : "memd can't bring its RAM");
        return run->agent && run->arguments->value[RUN_NO_MIGRATE] ? CTL_USAGE : CTL_FAILED;
    }
    if (!run->line.incoming)
        return CTL_DONE;
    ctl_say("run: --incoming adds QEMU's -incoming by itself");
    return CTL_USAGE;
}

static bool on_tmpfs(const char *directory)
{
    struct statfs status;

    return statfs(directory, &status) == 0 && status.f_type == TMPFS_SUPER &&
           access(directory, W_OK) == 0;
}

static void decide_about_ram(struct run *run)
{
    if (run->arguments->value[RUN_NO_MIGRATE])
        return;
    if (!run->line.keep_ram && !on_tmpfs(RAM_DIRECTORY))
        run->line.keep_ram = RAM_DIRECTORY " is no tmpfs that this user can write to";
    run->put_ram = run->agent && !run->line.keep_ram;
    if (run->line.keep_ram)
        ctl_say(
            "%s: the RAM stays where QEMU puts it, and the guest can't be live-migrated by memd",
            run->line.keep_ram);
}

/* Tries to put the socket into `directory`: it must be short enough, and ours to write to. */
static bool place_qmp(struct run *run, const char *directory, int length)
{
    char relative[PATH_MAX], parent[PATH_MAX];
    int chars;

    snprintf(relative, sizeof(relative), "%.*s", length, directory);
    if (!realpath(relative, parent) || access(parent, W_OK) < 0)
        return false;
    chars = snprintf(run->qmp_path, sizeof(run->qmp_path), "%s/%s.qmp", parent,
                     run->arguments->value[RUN_NAME]);
    if (chars < (int)sizeof(run->qmp_path))
        return true;
    run->qmp_path[0] = '\0';
    return false;
}

static void choose_qmp(struct run *run)
{
    const char *socket = run->arguments->socket, *slash = strrchr(socket, '/');
    const char *runtime = getenv("XDG_RUNTIME_DIR"), *given = getenv("MEMD_QMP");

    if (run->arguments->value[RUN_INCOMING] && given && *given &&
        strlen(given) < sizeof(run->qmp_path)) {
        strcpy(run->qmp_path, given);
        return;
    }
    if (place_qmp(run, slash ? socket : ".", slash ? (int)(slash - socket) + 1 : 1))
        return;
    if (runtime && place_qmp(run, runtime, (int)strlen(runtime)))
        return;
    ctl_say("no place for a QMP socket beside %s or in $XDG_RUNTIME_DIR: memd can't ask QEMU about "
            "this guest",
            socket);
}

static enum ctl_status read_qemu(struct run *run)
{
    int error = qemu_cmdline_read(run->vmm_argv, &run->line);

    for (size_t i = 0; i < run->line.word_count; i++)
        ctl_say("%s", run->line.words[i]);
    if (error < 0) {
        ctl_say("%s: its command line was not understood: %s", run->vmm_argv[0], strerror(-error));
        return CTL_FAILED;
    }
    if (run->line.merge_off && !run->reason[0])
        snprintf(run->reason, sizeof(run->reason), "mem-merge=off on QEMU's command line");
    if (!run->max_bytes)
        run->max_bytes = run->line.ram_bytes;
    if (run->line.daemonizes && !run->agent)
        ctl_say("-daemonize: without the agent memd loses sight of this guest");
    decide_about_ram(run);
    choose_qmp(run);
    return CTL_DONE;
}

static enum ctl_status read_vmm(struct run *run)
{
    enum ctl_status status = CTL_DONE;

    run->qemu = qemu_cmdline_is_qemu(run->vmm_argv[0]);
    if (run->qemu)
        status = read_qemu(run);
    if (status != CTL_DONE)
        return status;
    if (!run->max_bytes) {
        ctl_say("run: --max is needed: %s",
                run->qemu ? "QEMU's command line does not say how much RAM there is"
                          : "how much memory this VMM's guest has is not known");
        return CTL_USAGE;
    }
    if (run->min_bytes > run->max_bytes) {
        ctl_say("run: --min is more than --max");
        return CTL_USAGE;
    }
    return check_incoming(run);
}

/* ---- 3. registration ---- */

static const char *vmm_name(const struct run *run, char name[VMM_NAME_CHARS + 1])
{
    const char *slash = strrchr(run->vmm_argv[0], '/');

    snprintf(name, VMM_NAME_CHARS + 1, "%s",
             run->qemu ? "qemu"
             : slash   ? slash + 1
                       : run->vmm_argv[0]);
    return name;
}

static json_t *make_registration(const struct run *run)
{
    char name[VMM_NAME_CHARS + 1];
    const char *domain = run->arguments->value[RUN_DOMAIN];
    json_t *body = json_pack("{s:s, s:I, s:s, s:s, s:s, s:I}", "name",
                             run->arguments->value[RUN_NAME], "pid", (json_int_t)getpid(), "vmm",
                             vmm_name(run, name), "engine", run->agent ? "agent" : "kernel",
                             "reason", run->reason, "max_bytes", (json_int_t)run->max_bytes);

    if (run->arguments->value[RUN_MIN])
        json_object_set_new(body, "min_bytes", json_integer((json_int_t)run->min_bytes));
    if (run->shares)
        json_object_set_new(body, "shares", json_integer((json_int_t)run->shares));
    if (domain)
        json_object_set_new(body, "domain", json_string(domain));
    if (run->qemu ? run->line.daemonizes : run->script)
        json_object_set_new(body, "daemonizes", json_true());
    if (run->qmp_path[0])
        json_object_set_new(body, "qmp", json_string(run->qmp_path));
    return body;
}

static enum ctl_status register_guest(const struct run *run, json_t **ret_answer)
{
    json_t *body = make_registration(run);
    enum ctl_status status;

    if (!body) {
        ctl_say("the VMM's name or path is no UTF-8, which memd can't take");
        return CTL_FAILED;
    }
    /* It may have registered us or not: who asks again for itself is no second guest. */
    do {
        status = ctl_http_call(run->arguments->socket, "POST", "/v1/guests", body, CTL_TIMEOUT_S,
                               ret_answer);
        if (status == CTL_LOST)
            ctl_say("memd has ended meanwhile; waiting until it is back");
    } while (status == CTL_LOST && ctl_http_wait(run->arguments->socket, MEMD_WAIT_S));
    json_decref(body);
    return status;
}

/* ---- 4. the VMM's words and surroundings ---- */

__attribute__((format(printf, 2, 3))) static bool add_environment(struct run *run,
                                                                  const char *format, ...)
{
    va_list arguments;
    int chars;

    va_start(arguments, format);
    chars = vasprintf(&run->environment[run->environment_count], format, arguments);
    va_end(arguments);
    run->environment_count += chars >= 0;
    return chars >= 0;
}

static bool add_library(struct run *run)
{
    const char *others = getenv("LD_PRELOAD");

    return add_environment(run, "LD_PRELOAD=%s%s%s", run->library, others ? ":" : "",
                           others ? others : "");
}

static bool add_agent(struct run *run, const char *socket, const char *token)
{
    bool fits = (run->linked || add_library(run)) &&
                add_environment(run, "MEMD_AGENT_SOCKET=%s", socket) &&
                add_environment(run, "MEMD_TOKEN=%s", token);

    if (fits && run->put_ram) {
        char *prefix = qemu_cmdline_ram_prefix(RAM_DIRECTORY);

        fits = prefix && add_environment(run, "MEMD_RAM_DIR=%s", prefix);
        free(prefix);
    }
    return fits;
}

/* Fills argv and environment; `agent` says whether the agent goes in. */
static enum ctl_status prepare(struct run *run, bool agent, const char *socket, const char *token)
{
    struct qemu_extras extras = {
        .qmp_path = run->qmp_path[0] ? run->qmp_path : NULL,
        .ram_directory = agent && run->put_ram ? RAM_DIRECTORY : NULL,
        .incoming = run->qemu && run->arguments->value[RUN_INCOMING],
    };

    if (qemu_cmdline_extend(&run->line, &extras, run->vmm_argv, &run->argv) < 0 ||
        (agent && !add_agent(run, socket, token))) {
        ctl_say("no memory");
        return CTL_FAILED;
    }
    return CTL_DONE;
}

/* Without an agent the kernel's KSM is what is left; it takes only memory that is offered to it.
 * QEMU offers its guest's RAM itself (unless mem-merge=off), other VMMs don't offer anything. */
static void offer_to_kernel(const struct run *run)
{
    if (run->qemu || prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) == 0)
        return;
    ctl_say("the kernel takes no memory of this VMM into its KSM unasked (%s)", strerror(errno));
}

static enum ctl_status start(const struct run *run)
{
    static const char *const ours[] = {"MEMD_AGENT_SOCKET", "MEMD_TOKEN", "MEMD_RAM_DIR",
                                       "MEMD_QMP"};

    for (size_t i = 0; i < sizeof(ours) / sizeof(ours[0]); i++)
        unsetenv(ours[i]); /* of a VMM that we were started from */
    for (size_t i = 0; i < run->environment_count; i++)
        putenv(run->environment[i]);
    fflush(NULL);
    execv(run->path, run->argv);
    ctl_say("%s could not be started: %s", run->path, strerror(errno));
    return CTL_FAILED;
}

/* memd itself has started us, for a guest that is on its way and registered. */
static bool is_expected(const struct run *run)
{
    return run->arguments->value[RUN_INCOMING] && getenv("MEMD_TOKEN") &&
           getenv("MEMD_AGENT_SOCKET");
}

static enum ctl_status start_expected(struct run *run)
{
    enum ctl_status status = prepare(run, true, getenv("MEMD_AGENT_SOCKET"), getenv("MEMD_TOKEN"));

    return status == CTL_DONE ? start(run) : status;
}

static enum ctl_status register_and_start(struct run *run)
{
    json_t *answer = NULL;
    enum ctl_status status = register_guest(run, &answer);
    const char *engine = ctl_json_text(answer, "engine");
    bool agent = run->agent && strcmp(engine, "agent") == 0;

    if (status != CTL_DONE)
        return status;
    if (run->agent && !agent && run->arguments->value[RUN_INCOMING]) {
        ctl_say("run: no guest can come here: memd uses no agents on this host");
        status = CTL_FAILED;
    } else if (run->agent && !agent) {
        ctl_say("memd uses no agents on this host: the guest is started without one");
    }
    if (status == CTL_DONE)
        status = prepare(run, agent, ctl_json_text(answer, "agent_socket"),
                         ctl_json_text(answer, "token"));
    if (status == CTL_DONE && strcmp(engine, "kernel") == 0)
        offer_to_kernel(run);
    json_decref(answer);
    return status == CTL_DONE ? start(run) : status;
}

/* ---- --dry-run ---- */

/* In single quotes unless it is plain. */
static void print_quoted(const char *word)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                "0123456789_-+=./,:@%";

    if (*word && strspn(word, plain) == strlen(word)) {
        fputs(word, stdout);
        return;
    }
    putchar('\'');
    for (; *word; word++) {
        if (*word == '\'')
            fputs("'\\''", stdout);
        else
            putchar(*word);
    }
    putchar('\'');
}

static void print_command(const struct run *run)
{
    if (run->environment_count)
        fputs("env", stdout);
    for (size_t i = 0; i < run->environment_count; i++) {
        putchar(' ');
        print_quoted(run->environment[i]);
    }
    for (char **word = run->argv; *word; word++) {
        if (word != run->argv || run->environment_count)
            putchar(' ');
        print_quoted(*word);
    }
    putchar('\n');
}

static json_t *json_strings(char *const *strings, size_t count)
{
    json_t *array = json_array();

    for (size_t i = 0; i < count && strings[i]; i++)
        json_array_append_new(array, json_string(strings[i]));
    return array;
}

static void print_command_json(const struct run *run)
{
    json_t *object =
        json_pack("{s:s, s:s, s:I, s:o, s:o}", "engine", run->agent ? "agent" : "kernel", "reason",
                  run->reason, "max_bytes", (json_int_t)run->max_bytes, "environment",
                  json_strings(run->environment, run->environment_count), "command",
                  json_strings(run->argv, SIZE_MAX));

    ctl_print_json(object);
    json_decref(object);
}

static enum ctl_status dry_run(struct run *run)
{
    char socket[PATH_MAX];
    enum ctl_status status;

    snprintf(socket, sizeof(socket), "%s.agent", run->arguments->socket);
    status = prepare(run, run->agent, socket, "GIVEN_BY_MEMD");
    if (status != CTL_DONE)
        return status;
    if (run->arguments->json)
        print_command_json(run);
    else
        print_command(run);
    return CTL_DONE;
}

/* ---- all of it ---- */

static void free_run(struct run *run)
{
    qemu_cmdline_free(&run->line);
    qemu_cmdline_free_argv(run->argv);
    for (size_t i = 0; i < run->environment_count; i++)
        free(run->environment[i]);
    free(run->path);
    free(run->library);
}

enum ctl_status ctl_run_run(const struct ctl_arguments *arguments)
{
    struct run run = {.arguments = arguments};
    enum ctl_status status = read_options(&run);

    if (status == CTL_DONE && arguments->json && !arguments->value[RUN_DRY_RUN]) {
        ctl_say("run: --json belongs to --dry-run");
        status = CTL_USAGE;
    }
    if (status == CTL_DONE)
        status = find_vmm(&run);
    if (status == CTL_DONE)
        status = read_vmm(&run);
    if (status == CTL_DONE && !run.agent)
        ctl_say("%s", run.reason);
    if (status == CTL_DONE)
        status = arguments->value[RUN_DRY_RUN] ? dry_run(&run)
                 : is_expected(&run)           ? start_expected(&run)
                                               : register_and_start(&run);
    free_run(&run);
    return status;
}
