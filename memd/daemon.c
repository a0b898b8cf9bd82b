/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Start-up is the list below, read aloud from top to bottom; what fails unwinds it backwards.
 */
#include "daemon.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include "host.h"
#include "log.h"
#include "procfs.h"
#include "state.h"

#define NS_PER_S 1000000000ULL

/* ---- the parts ---- */

/* Each shared segment is a descriptor here. */
static int start_limits(struct daemon *daemon)
{
    struct rlimit files;

    (void)daemon;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    return 0;
}

static int start_loop(struct daemon *daemon)
{
    int result = loop_start(&daemon->loop);

    if (result)
        log_error("io_uring can't be used (%s): memd needs it. Look at "
                  "/proc/sys/kernel/io_uring_disabled (0 allows it) and at seccomp filters around "
                  "memd; memctl doctor says more",
                  strerror(-result));
    else
        daemon->started_ns = loop_now(&daemon->loop);
    return result;
}

static void stop_loop(struct daemon *daemon)
{
    loop_stop(&daemon->loop);
}

static int start_state(struct daemon *daemon)
{
    const char *path = daemon->config.state_dir;
    int result = state_open(path, &daemon->state_dir, &daemon->state_lock);

    if (result == -EBUSY)
        log_error("another memd works with %s; stop it first, or give this one its own state_dir "
                  "and socket",
                  path);
    else if (result)
        log_error("[host] state_dir %s: %s", path, strerror(-result));
    return result;
}

static void stop_state(struct daemon *daemon)
{
    close(daemon->state_lock);
    close(daemon->state_dir);
}

static int answers(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), result;

    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    result = fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
    if (fd >= 0)
        close(fd);
    return result;
}

static int check_alone(struct daemon *daemon)
{
    if (!answers(daemon->config.socket))
        return 0;
    log_error("another memd answers on %s; stop it first, or give this one its own socket",
              daemon->config.socket);
    return -EADDRINUSE;
}

static void set_ledger(struct daemon *daemon)
{
    const struct config *config = &daemon->config;
    uint64_t memory = procfs_host_memory_bytes();

    daemon->ledger.budget_bytes = config->budget_bytes;
    if (!config->budget_bytes)
        daemon->ledger.budget_bytes =
            memory > config->reserve_bytes ? memory - config->reserve_bytes : 0;
}

static int start_ledger(struct daemon *daemon)
{
    set_ledger(daemon);
    return 0;
}

/* While ksmd is ours it is steered once a second. */
static void steer(struct loop_timer *timer)
{
    struct daemon *daemon = timer->owner;

    kernel_ksm_tick(&daemon->kernel_ksm, loop_now(&daemon->loop));
    if (daemon->kernel_ksm.running)
        daemon_steer(daemon);
}

void daemon_steer(struct daemon *daemon)
{
    if (!daemon->steering.due_ns)
        loop_timer_set(&daemon->loop, &daemon->steering, NS_PER_S);
}

static int start_kernel_ksm(struct daemon *daemon)
{
    daemon->steering = (struct loop_timer){.expired = steer, .owner = daemon};
    kernel_ksm_start(&daemon->kernel_ksm, host_ksm_directory(), daemon->state_dir,
                     daemon->config.cpu_percent);
    return 0;
}

static void stop_kernel_ksm(struct daemon *daemon)
{
    loop_timer_cancel(&daemon->loop, &daemon->steering);
    kernel_ksm_stop(&daemon->kernel_ksm);
}

static int start_registry(struct daemon *daemon)
{
    int result = registry_start(daemon);

    if (!result)
        domains_tidy(daemon);
    return result;
}

static void stop_registry(struct daemon *daemon)
{
    registry_stop(daemon);
}

/* Sessions end with their guests, and both before the domains that they are in. */
static void stop_agents(struct daemon *daemon)
{
    registry_stop(daemon);
    agents_stop(daemon);
}

static void warn(const char *words)
{
    log_warning("%s", words);
}

static void say_about(const struct config *config)
{
    if (config->doubt[0])
        log_warning("%s", config->doubt);
    config_say_what_waits(config, warn);
}

/* ---- signals ---- */

static void take_signal(struct loop_watch *watch, uint32_t events)
{
    struct daemon *daemon = watch->owner;
    struct signalfd_siginfo info;

    (void)events;
    if (read(watch->fd, &info, sizeof(info)) != sizeof(info))
        return;
    if (info.ssi_signo == SIGHUP)
        daemon_reload(daemon);
    else
        loop_end(&daemon->loop);
}

static int start_signals(struct daemon *daemon)
{
    sigset_t signals;
    int fd;

    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        return -errno;
    daemon->signals = (struct loop_watch){.fd = fd,
                                          .events = POLLIN,
                                          .level = true,
                                          .ready = take_signal,
                                          .owner = daemon,
                                          .op = LOOP_NOT_QUEUED};
    return loop_watch_add(&daemon->loop, &daemon->signals);
}

static void stop_signals(struct daemon *daemon)
{
    loop_watch_remove(&daemon->loop, &daemon->signals);
    close(daemon->signals.fd);
}

/* ---- start and stop ---- */

static const struct part {
    const char *name;
    int (*start)(struct daemon *daemon);
    void (*stop)(struct daemon *daemon); /* NULL: leaves nothing */
} parts[] = {
    {"limits", start_limits, NULL},
    {"loop", start_loop, stop_loop},
    {"signals", start_signals, stop_signals},
    {"state directory", start_state, stop_state},
    {"no other memd", check_alone, NULL},
    {"ledger", start_ledger, NULL},
    {"kernel KSM", start_kernel_ksm, stop_kernel_ksm},
    {"trust domains", domains_start, domains_stop},
    {"guests", start_registry, stop_registry},
    {"agents", agents_start, stop_agents},
    {"migrations", migration_start, migration_stop},
    {"control socket", control_start, control_stop},
};
#define PART_COUNT (sizeof(parts) / sizeof(parts[0]))

static void stop_from(struct daemon *daemon, size_t count)
{
    while (count-- > 0) {
        if (parts[count].stop)
            parts[count].stop(daemon);
    }
    config_free(&daemon->config);
}

int daemon_start(struct daemon *daemon, struct config *config, const char *config_path)
{
    memset(daemon, 0, sizeof(*daemon));
    daemon->config = *config;
    memset(config, 0, sizeof(*config));
    if (config_path)
        snprintf(daemon->config_path, sizeof(daemon->config_path), "%s", config_path);
    for (size_t i = 0; i < PART_COUNT; i++) {
        int result = parts[i].start(daemon);

        if (result) {
            log_error("memd does not start: %s: %s", parts[i].name, strerror(-result));
            stop_from(daemon, i);
            return result;
        }
    }
    say_about(&daemon->config);
    log_notice("memd %s serves %s, budget %llu MiB, store %llu MiB", MEMD_VERSION,
               daemon->config.socket, (unsigned long long)daemon->ledger.budget_bytes >> 20,
               (unsigned long long)daemon->domains.budget.limit_pages * PAGE_BYTES >> 20);
    (void)sd_notify(0, "READY=1");
    return 0;
}

void daemon_stop(struct daemon *daemon)
{
    (void)sd_notify(0, "STOPPING=1");
    state_saver_settle(&daemon->registry.saver);
    state_saver_settle(&daemon->migrations.saver);
    stop_from(daemon, PART_COUNT);
}

int daemon_run(struct daemon *daemon)
{
    int result = loop_run(&daemon->loop);

    if (result)
        log_error("the io_uring of the loop fails (%s): memd stops, guests run on",
                  strerror(-result));
    return result;
}

/* ---- SIGHUP ---- */

static void say_what_needs_a_restart(const struct config *old, const struct config *now)
{
    if (strcmp(old->socket, now->socket) != 0 || strcmp(old->state_dir, now->state_dir) != 0)
        log_warning("[host] socket and state_dir are taken over when memd is started again");
}

void daemon_reload(struct daemon *daemon)
{
    char error[CONFIG_ERROR_BYTES];
    struct config old = daemon->config, fresh;

    if (!daemon->config_path[0]) {
        log_warning("SIGHUP: memd was started without a configuration file, nothing to read");
        return;
    }
    if (config_load(daemon->config_path, &fresh, error)) {
        log_error("%s; nothing was changed", error);
        events_emit(&daemon->events, "config_rejected", NULL, json_pack("{s:s}", "reason", error));
        return;
    }
    say_what_needs_a_restart(&old, &fresh);
    strcpy(fresh.socket, old.socket);
    strcpy(fresh.state_dir, old.state_dir);
    daemon->config = fresh;
    set_ledger(daemon);
    daemon->kernel_ksm.cpu_percent = fresh.cpu_percent;
    domains_reload(daemon, &old);
    registry_reload(daemon, &old);
    agents_reload(daemon, &old);
    agents_tune(daemon);
    control_reload(daemon);
    migration_reload(daemon);
    say_about(&fresh);
    config_free(&old);
    log_notice("%s was read again", daemon->config_path);
    events_emit(&daemon->events, "config_reloaded", NULL, NULL);
}
