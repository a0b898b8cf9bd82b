/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The VMM that a guest arrives in. What is started, as whom and with how much memory is in
 * [guest NAME] of this host's configuration; all that the other host can choose is which of these
 * sections. It is registered like a guest of memctl run, before it begins.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon.h"
#include "log.h"
#include "migration.h"
#include "monitor.h"

/* What the VMM finds in its environment: nothing of memd's own but the way to it. */
struct surroundings {
    char token[64], socket[160], home[CONFIG_WORD_BYTES + 8], monitor[GUEST_WORDS + 16];
};

static void surround(const struct daemon *daemon, const struct guest *guest,
                     const struct config_guest *configured, struct surroundings *ret_around)
{
    const struct passwd *user = getpwuid(configured->incoming_uid);

    snprintf(ret_around->token, sizeof(ret_around->token), "MEMD_TOKEN=%s", guest->token);
    snprintf(ret_around->socket, sizeof(ret_around->socket), "MEMD_AGENT_SOCKET=%s",
             daemon->agents.path);
    snprintf(ret_around->home, sizeof(ret_around->home), "HOME=%s", user ? user->pw_dir : "/");
    snprintf(ret_around->monitor, sizeof(ret_around->monitor), "MEMD_QMP=%s", guest->qmp);
}

/* It is not to be spared when memory is short, as memd is, and not to be favoured as memd may be.
 */
static void become_ordinary(void)
{
    struct sched_param none = {.sched_priority = 0};
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC), nothing;
    sigset_t signals;

    if (fd >= 0) {
        if (write(fd, "0", 1) != 1)
            _exit(126);
        close(fd);
    }
    (void)sched_setscheduler(0, SCHED_OTHER, &none);
    sigemptyset(&signals);
    sigprocmask(SIG_SETMASK, &signals, NULL);
    signal(SIGPIPE, SIG_DFL);
    setsid();
    nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (nothing < 0 || dup2(nothing, STDIN_FILENO) < 0 || dup2(nothing, STDOUT_FILENO) < 0)
        _exit(126);
}

static void become_user(const struct config_guest *configured)
{
    const struct passwd *user = getpwuid(configured->incoming_uid);
    gid_t gid = user ? user->pw_gid : (gid_t)configured->incoming_uid;

    if (geteuid() != 0)
        return;
    if ((user ? initgroups(user->pw_name, gid) : setgroups(0, NULL)) || setresgid(gid, gid, gid) ||
        setresuid(configured->incoming_uid, configured->incoming_uid, configured->incoming_uid))
        _exit(126);
}

/* The child: waits until it is registered (what it needs comes then), and becomes the VMM. */
static void be_the_vmm(const struct config_guest *configured, int go)
{
    struct surroundings around;
    char *environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                           around.token,
                           around.socket,
                           around.home,
                           around.monitor,
                           NULL};

    if (read(go, &around, sizeof(around)) != sizeof(around))
        _exit(126);
    become_ordinary();
    become_user(configured);
    execve(configured->incoming[0], configured->incoming, environment);
    _exit(127);
}

static const char *refusal(const struct daemon *daemon, const char *name)
{
    const struct config_guest *configured = config_guest_find(&daemon->config, name);

    if (!configured)
        return "no guest of this name may come here: memd.conf there has no [guest] section for it";
    if (!configured->incoming_count)
        return "this guest may not come here: its [guest] section in memd.conf there names no VMM "
               "(incoming)";
    if (registry_find(daemon, name))
        return "a guest of this name is here already";
    return NULL;
}

static int enlist(struct daemon *daemon, const struct config_guest *configured, pid_t pid,
                  struct guest **ret_guest, char *words, size_t words_bytes)
{
    struct guest_request request = {.pid = pid,
                                    .uid = configured->incoming_uid,
                                    .engine = ENGINE_AGENT,
                                    .wish = {.has_max = true, .max_bytes = configured->max_bytes}};
    const char *slash = strrchr(configured->incoming[0], '/');

    strcpy(request.name, configured->name);
    snprintf(request.vmm, sizeof(request.vmm), "%.31s",
             slash ? slash + 1 : configured->incoming[0]);
    if (!monitor_make_place(daemon, configured->name, configured->incoming_uid, request.qmp))
        request.qmp[0] = '\0';
    return registry_add(daemon, &request, ret_guest, words, words_bytes);
}

int incoming_start(struct daemon *daemon, const char *name, struct guest **ret_guest, char *words,
                   size_t words_bytes)
{
    const struct config_guest *configured = config_guest_find(&daemon->config, name);
    const char *why = refusal(daemon, name);
    struct surroundings around = {.token = ""};
    int go[2], result;
    pid_t pid;

    if (why) {
        snprintf(words, words_bytes, "%s", why);
        return -EPERM;
    }
    if (access(configured->incoming[0], X_OK)) {
        result = -errno;
        log_error("[guest %s] incoming: %s: %s", name, configured->incoming[0], strerror(-result));
        snprintf(words, words_bytes, "the VMM of its [guest] section can't be started: %s",
                 strerror(-result));
        return result;
    }
    if (pipe2(go, O_CLOEXEC))
        return -errno;
    pid = fork();
    if (pid == 0) {
        close(go[1]);
        be_the_vmm(configured, go[0]);
    }
    close(go[0]);
    result = pid < 0 ? -errno : enlist(daemon, configured, pid, ret_guest, words, words_bytes);
    if (!result) {
        surround(daemon, *ret_guest, configured, &around);
        if (write(go[1], &around, sizeof(around)) != sizeof(around))
            result = -EPIPE; /* its death is seen */
    }
    close(go[1]);
    return result;
}
