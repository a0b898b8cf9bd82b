/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon.h"
#include "log.h"

#define DEFAULT_CONFIG "/etc/memd/memd.conf"

/* jemalloc reads this: one thread needs one arena, and what was freed goes back within a second. */
__attribute__((visibility("default"))) const char *malloc_conf =
    "narenas:1,dirty_decay_ms:1000,muzzy_decay_ms:0";

struct options {
    const char *config; /* NULL: the default one, if it is there */
    bool check, foreground;
    enum log_level level;
};

static int usage(FILE *where, int status)
{
    fprintf(where, "usage: memd [--config FILE] [--check] [--foreground] [--log-level LEVEL]\n"
                   "\n"
                   "  --config FILE      read FILE instead of " DEFAULT_CONFIG "\n"
                   "  --check            read the configuration, say what is wrong with it, end\n"
                   "  --foreground       stay in the foreground\n"
                   "  --log-level LEVEL  error, warning, info (default) or debug\n"
                   "  --version          say the version, end\n");
    return status;
}

/* -1: go on; else the exit status. */
static int parse_options(int count, char **words, struct options *options)
{
    static const struct option known[] = {
        {"config", required_argument, NULL, 'c'},
        {"check", no_argument, NULL, 'k'},
        {"foreground", no_argument, NULL, 'f'},
        {"log-level", required_argument, NULL, 'l'},
        {"version", no_argument, NULL, 'v'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int word;

    while ((word = getopt_long(count, words, "c:fh", known, NULL)) != -1) {
        switch (word) {
        case 'c': options->config = optarg; break;
        case 'k': options->check = true; break;
        case 'f': options->foreground = true; break;
        case 'l':
            if (!log_level_parse(optarg, &options->level)) {
                log_error("--log-level %s: give error, warning, info or debug", optarg);
                return usage(stderr, 2);
            }
            break;
        case 'v': puts("memd " MEMD_VERSION); return 0;
        case 'h': return usage(stdout, 0);
        default: return usage(stderr, 2);
        }
    }
    if (optind == count)
        return -1;
    log_error("'%s' is not known here: memd takes options only", words[optind]);
    return usage(stderr, 2);
}

static int read_config(struct options *options, struct config *ret_config)
{
    char error[CONFIG_ERROR_BYTES];
    int result;

    if (!options->config && access(DEFAULT_CONFIG, F_OK)) {
        config_defaults(ret_config);
        return 0;
    }
    if (!options->config)
        options->config = DEFAULT_CONFIG;
    result = config_load(options->config, ret_config, error);
    if (result)
        log_error("%s", error);
    return result;
}

static void say_on_stderr(const char *words)
{
    fprintf(stderr, "memd: note: %s\n", words);
}

/* --check: what can't be meant on this host counts as wrong. Returns the exit status. */
static int check(const struct options *options, const struct config *config)
{
    if (config->doubt[0]) {
        log_error("%s", config->doubt);
        return 1;
    }
    config_say_what_waits(config, say_on_stderr);
    if (options->config)
        printf("%s is good\n", options->config);
    else
        puts("there is no " DEFAULT_CONFIG ": everything has its default");
    return 0;
}

/* A fork before anything is opened. The parent waits for one byte: memd serves (0), or not. */
static int go_background(int *ret_ready)
{
    int ready[2];
    char status = 1;
    pid_t child;

    if (pipe2(ready, O_CLOEXEC) || (child = fork()) < 0) {
        log_error("memd can't go into the background: %s", strerror(errno));
        return -errno;
    }
    if (child) {
        close(ready[1]);
        if (read(ready[0], &status, 1) != 1)
            status = 1;
        _exit(status);
    }
    close(ready[0]);
    setsid();
    *ret_ready = ready[1];
    return 0;
}

static void say_ready(int ready)
{
    int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);

    if (ready < 0)
        return;
    if (write(ready, "", 1) != 1)
        log_warning("nobody waits for memd to be ready");
    close(ready);
    log_to_syslog();
    for (int fd = 0; fd < 3 && nothing >= 0; fd++)
        dup2(nothing, fd);
    if (nothing >= 3)
        close(nothing);
}

int main(int count, char **words)
{
    /* Movers and VMMs that memd starts are watched by their pidfds: nobody waits for them. */
    struct sigaction unwaited = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDWAIT};
    struct options options = {.level = LOG_LEVEL_NOTICE};
    struct config config;
    struct daemon daemon;
    int status = parse_options(count, words, &options), ready = -1;

    if (status >= 0)
        return status;
    log_setup(options.level);
    if (read_config(&options, &config))
        return 1;
    if (options.check) {
        status = check(&options, &config);
        config_free(&config);
        return status;
    }
    if (!options.foreground && !getenv("NOTIFY_SOCKET") && go_background(&ready))
        return 1;
    sigaction(SIGCHLD, &unwaited, NULL);
    /* A file that is put there later is read by SIGHUP. */
    if (daemon_start(&daemon, &config, options.config ? options.config : DEFAULT_CONFIG))
        return 1;
    say_ready(ready);
    status = daemon_run(&daemon) ? 1 : 0;
    daemon_stop(&daemon);
    return status;
}
