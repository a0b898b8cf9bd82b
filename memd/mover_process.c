/* SPDX-License-Identifier: Apache-2.0 */
/* memd-mover as a process: started, spoken to, watched, found again. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agents.h"
#include "daemon.h"
#include "host.h"
#include "log.h"
#include "migration.h"
#include "monitor.h"
#include "mover_protocol.h"
#include "send_with.h"

#define MOVER_USER  "memd-mover"
#define NOBODY      65534U
#define FDS_MAX     5
#define ORDERS_TURN 16

/* ---- descriptors ---- */

/* The path of the mover's own socket, short enough for any state directory. */
static void own_path(const struct migration *migration, char *into, size_t bytes)
{
    snprintf(into, bytes, "/proc/self/fd/%d/%s", migration->daemon->migrations.dir,
             migration->socket);
}

static int unix_address(const struct migration *migration, struct sockaddr_un *ret_address)
{
    *ret_address = (struct sockaddr_un){.sun_family = AF_UNIX};
    own_path(migration, ret_address->sun_path, sizeof(ret_address->sun_path));
    return socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

/* Where the next memd finds the mover. */
static int listen_for_next(struct migration *migration)
{
    struct sockaddr_un address;
    int fd, result;

    if (!migration->socket[0] && host_random(&result, sizeof(result)) == 0)
        snprintf(migration->socket, sizeof(migration->socket), "%08x", (unsigned)result);
    fd = unix_address(migration, &address);

    if (fd < 0)
        return -errno;
    unlink(address.sun_path);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 4)) {
        result = -errno;
        close(fd);
        return result;
    }
    return fd;
}

static in_port_t *port_of(struct sockaddr_storage *address)
{
    return address->ss_family == AF_INET6 ? &((struct sockaddr_in6 *)(void *)address)->sin6_port
                                          : &((struct sockaddr_in *)(void *)address)->sin_port;
}

/* port 0: any; *ret_port is the one that it is. */
static int listen_at(struct sockaddr_storage *address, socklen_t bytes, uint16_t port,
                     uint16_t *ret_port)
{
    int fd = socket(address->ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1;
    int result;

    if (fd < 0)
        return -errno;
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    *port_of(address) = htons(port);
    if (bind(fd, (struct sockaddr *)address, bytes) || listen(fd, 16) ||
        getsockname(fd, (struct sockaddr *)address, &bytes)) {
        result = -errno;
        close(fd);
        return result;
    }
    *ret_port = ntohs(*port_of(address));
    return fd;
}

/* The mover's own port: of the address that [migration] listen names, and of its ports; the one
 * that it had before when it takes over. */
static int listen_for_peer(struct migration *migration)
{
    struct port_range ports = migration->daemon->config.migration_ports;
    struct sockaddr_storage address = {.ss_family = AF_INET};
    socklen_t bytes = sizeof(address);
    int fd = -EADDRINUSE;

    if (getsockname(migration->daemon->migrations.listener, (struct sockaddr *)&address, &bytes))
        return -errno;
    if (migration->listen_port)
        ports = (struct port_range){migration->listen_port, migration->listen_port};
    for (uint32_t port = ports.first; fd == -EADDRINUSE && port <= ports.last; port++)
        fd = listen_at(&address, bytes, (uint16_t)port, &migration->listen_port);
    return fd;
}

int mover_process_reach_agent(struct guest *guest, uint32_t role, int *ret_fd)
{
    int pair[2], result;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return -errno;
    result = agents_give_mover(guest, role, pair[1]);
    close(pair[1]);
    if (result) {
        close(pair[0]);
        return result;
    }
    (void)fcntl(pair[0], F_SETFL, O_NONBLOCK);
    *ret_fd = pair[0];
    return 0;
}

/* ---- saying ---- */

void mover_process_say(struct migration *migration, uint32_t order)
{
    struct order_plain message = {{order, sizeof(message)}};

    if (migration->orders.fd >= 0)
        (void)send_with(migration->orders.fd, &message, sizeof(message), NULL, 0, MSG_DONTWAIT);
}

void mover_process_give_guest(struct migration *migration, int result, const char *words,
                              int agent_fd)
{
    struct order_guest message = {.header = {ORDER_GUEST, sizeof(message)}, .result = result};
    const struct guest *guest = registry_find(migration->daemon, migration->start.name);
    int fds[2] = {agent_fd, -1};
    uint32_t count = agent_fd >= 0;

    if (count && guest && monitor_connect(guest, &fds[1]) == 0)
        message.has_monitor = count++;
    snprintf(message.words, sizeof(message.words), "%s", words);
    if (migration->orders.fd >= 0)
        (void)send_with(migration->orders.fd, &message, sizeof(message), fds, count, MSG_DONTWAIT);
    if (fds[1] >= 0)
        close(fds[1]);
}

/* ---- hearing ---- */

static bool is_text(const char *text, size_t bytes)
{
    return memchr(text, 0, bytes) != NULL;
}

/* Words that may have come from the other host go to logs, terminals and JSON. */
static void make_plain(char *text)
{
    for (; *text; text++)
        if (!isascii((unsigned char)*text) || !isprint((unsigned char)*text))
            *text = '?';
}

bool mover_process_take(struct migration *migration, const uint8_t *message, size_t bytes)
{
    struct order_header header;
    struct order_status status;
    struct order_need_guest need;

    if (bytes < sizeof(header))
        return false;
    memcpy(&header, message, sizeof(header));
    if (header.type == ORDER_STATUS && bytes == sizeof(status)) {
        memcpy(&status, message, sizeof(status));
        if (status.stage >= ORDER_STAGE_COUNT || status.outcome >= ORDER_OUTCOME_COUNT ||
            status.data_port > UINT16_MAX || !is_text(status.words, sizeof(status.words)))
            return false;
        make_plain(status.words);
        migration_heard_status(migration, &status);
        return true;
    }
    if (header.type == ORDER_NEED_GUEST && bytes == sizeof(need)) {
        memcpy(&need, message, sizeof(need));
        if (!is_text(need.name, sizeof(need.name)) || !words_are_name(need.name))
            return false;
        migration_heard_need(migration, &need);
        return true;
    }
    return false;
}

static void close_orders(struct migration *migration)
{
    loop_watch_remove(&migration->daemon->loop, &migration->orders);
    if (migration->orders.fd >= 0)
        close(migration->orders.fd);
    migration->orders.fd = -1;
}

static void can_read(struct loop_watch *watch, uint32_t events)
{
    struct migration *migration = watch->owner;

    (void)events;
    for (int i = 0; i < ORDERS_TURN && watch->fd >= 0; i++) {
        _Alignas(8) uint8_t message[ORDERS_MAX_MESSAGE];
        ssize_t got = recv(watch->fd, message, sizeof(message), MSG_DONTWAIT);

        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (got > 0 && mover_process_take(migration, message, (size_t)got))
            continue;
        if (got > 0 && migration->pid > 0) {
            log_error("the mover of guest '%s' says what can't be: it is ended",
                      migration->start.name);
            (void)kill(migration->pid, SIGKILL);
        }
        close_orders(migration); /* its process is watched as well */
        return;
    }
}

static int watch_orders(struct migration *migration, int fd)
{
    migration->orders = (struct loop_watch){.fd = fd,
                                            .events = POLLIN,
                                            .level = true,
                                            .ready = can_read,
                                            .owner = migration,
                                            .op = LOOP_NOT_QUEUED};
    return loop_watch_add(&migration->daemon->loop, &migration->orders);
}

/* ---- the process ---- */

static void close_death(struct migration *migration)
{
    loop_watch_remove(&migration->daemon->loop, &migration->death);
    if (migration->death.fd >= 0)
        close(migration->death.fd);
    migration->death.fd = -1;
    migration->pid = 0;
}

static void died(struct loop_watch *watch, uint32_t events)
{
    struct migration *migration = watch->owner;

    (void)events;
    /* Its last words were written before it ended. */
    if (migration->orders.fd >= 0)
        can_read(&migration->orders, POLLIN);
    close_orders(migration);
    close_death(migration);
    migration_lost_mover(migration);
}

static int watch_process(struct migration *migration, pid_t pid)
{
    int fd = host_process_open(pid), result;

    if (fd < 0)
        return fd;
    result = host_process_start_time(pid, &migration->start_time);
    if (result) {
        close(fd);
        return result;
    }
    migration->pid = pid;
    migration->death = (struct loop_watch){.fd = fd,
                                           .events = POLLIN,
                                           .level = true,
                                           .ready = died,
                                           .owner = migration,
                                           .op = LOOP_NOT_QUEUED};
    return loop_watch_add(&migration->daemon->loop, &migration->death);
}

void mover_process_let_go(struct migration *migration)
{
    close_orders(migration);
    close_death(migration);
}

/* Heartbeats and the switch-over must not wait for a busy host's other processes. Its relays, which
 * use the CPU, make themselves ordinary threads. */
static void schedule(pid_t pid)
{
    struct sched_param first = {.sched_priority = 1};

    (void)sched_setscheduler(pid, SCHED_FIFO, &first);
}

/* Beside memd, as in a build directory; where an installation has it from there; or where this one
 * was to be installed. NULL: in none of these. */
static const char *program(char *into, size_t bytes)
{
    static const char *const places[] = {"memd-mover", "../libexec/memd/memd-mover"};
    ssize_t length = readlink("/proc/self/exe", into, bytes - 64);
    char *slash;

    into[length > 0 ? length : 0] = '\0';
    slash = strrchr(into, '/');
    for (size_t i = 0; slash && i < sizeof(places) / sizeof(places[0]); i++) {
        strcpy(slash + 1, places[i]);
        if (access(into, X_OK) == 0)
            return into;
    }
    return access(MEMD_MOVER_INSTALLED, X_OK) == 0 ? MEMD_MOVER_INSTALLED : NULL;
}

static pid_t spawn(int orders)
{
    char path[CONFIG_WORD_BYTES + 128];
    char *argv[] = {"memd-mover", NULL}, *environment[] = {NULL};
    const char *what = program(path, sizeof(path));
    sigset_t none;
    pid_t pid;

    if (!what)
        return -ENOEXEC;
    pid = fork();
    if (pid)
        return pid < 0 ? -errno : pid;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setsid();
    if (dup2(orders, STDIN_FILENO) == STDIN_FILENO)
        execve(what, argv, environment);
    _exit(127);
}

static void choose_user(struct order_start *start)
{
    const struct passwd *user = getpwnam(MOVER_USER);

    start->uid = user ? user->pw_uid : NOBODY;
    start->gid = user ? user->pw_gid : NOBODY;
}

/* MEMD_MOVER_WITHOUT: what a measurement wants to do without. */
static uint32_t switches(void)
{
    static const struct {
        const char *word;
        uint32_t is;
    } known[] = {{"locality", MOVER_NO_LOCALITY},
                 {"urgent", MOVER_NO_URGENT},
                 {"pipelining", MOVER_NO_PIPELINE},
                 {"sharing", MOVER_NO_SLOTS}};
    const char *without = getenv("MEMD_MOVER_WITHOUT");

    for (size_t i = 0; without && i < sizeof(known) / sizeof(known[0]); i++) {
        if (strcmp(without, known[i].word) == 0)
            return known[i].is;
    }
    if (without)
        log_warning("MEMD_MOVER_WITHOUT=%s: locality, urgent, pipelining or sharing", without);
    return 0;
}

static void fill_start(struct migration *migration)
{
    const struct config *config = &migration->daemon->config;
    struct order_start *start = &migration->start;

    start->header = (struct order_header){ORDER_START, sizeof(*start)};
    start->version = ORDERS_VERSION;
    start->role = migration->source ? MOVER_SOURCE : MOVER_DESTINATION;
    start->plain = config->plain;
    start->switches = switches();
    if (!start->bandwidth)
        start->bandwidth = config->migration_bandwidth_bytes;
    strcpy(start->tls_cert, config->tls_cert);
    strcpy(start->tls_key, config->tls_key);
    strcpy(start->tls_ca, config->tls_ca);
    choose_user(start);
}

/* The descriptors of START in their order; how many, or -errno. What is open is the caller's. */
static int collect(struct migration *migration, int first, int *fds)
{
    struct guest *guest = registry_find(migration->daemon, migration->start.name);
    int count = 0, result;

    fds[count] = listen_for_next(migration);
    if (fds[count++] < 0)
        return fds[0];
    if (migration->source || migration->start.takes_over) {
        result = guest ? mover_process_reach_agent(guest, migration->start.role, &fds[count])
                       : -ENOTCONN;
        if (result)
            return result;
        count++;
    }
    if (!migration->source) {
        fds[count] = listen_for_peer(migration);
        migration->start.data_port = migration->listen_port;
        if (fds[count++] < 0)
            return fds[count - 1];
    }
    if (first >= 0)
        fds[count++] = first;
    migration->start.has_monitor = migration->source || migration->start.takes_over
                                       ? monitor_connect(guest, &fds[count]) == 0
                                       : 0;
    return count + (int)migration->start.has_monitor;
}

static int start_with(struct migration *migration, const int *fds, uint32_t count)
{
    int pair[2], result;
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return -errno;
    result =
        send_with(pair[0], &migration->start, sizeof(migration->start), fds, count, MSG_DONTWAIT);
    pid = result ? result : spawn(pair[1]);
    close(pair[1]);
    if (pid < 0) {
        close(pair[0]);
        return (int)pid;
    }
    schedule(pid);
    result = watch_process(migration, pid);
    if (!result)
        result = watch_orders(migration, pair[0]);
    else
        close(pair[0]);
    return result;
}

int mover_process_start(struct migration *migration, int first)
{
    int fds[FDS_MAX] = {-1, -1, -1, -1, -1}, count, result;

    fill_start(migration);
    count = collect(migration, first, fds);
    result = count < 0 ? count : start_with(migration, fds, (uint32_t)count);
    for (int i = 0; i < FDS_MAX; i++) {
        if (fds[i] >= 0 && fds[i] != first)
            close(fds[i]);
    }
    if (first >= 0)
        close(first);
    return result;
}

const char *mover_process_why(int result)
{
    if (result == -ENOEXEC)
        return "memd-mover is neither beside memd nor is it " MEMD_MOVER_INSTALLED ": install it";
    if (result == -ESRCH)
        return "it ended at once";
    return result == -EADDRINUSE ? "all of [migration] ports are in use" : strerror(-result);
}

int mover_process_find(struct migration *migration)
{
    struct sockaddr_un address;
    int fd = unix_address(migration, &address), result;

    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
        close(fd);
        return -ECONNREFUSED;
    }
    result = watch_process(migration, migration->pid);
    if (!result)
        result = watch_orders(migration, fd);
    else
        close(fd);
    return result;
}
