/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What memd says to a service manager, and the segments that rest with it: the manager's end of the
 * protocol (sd_notify(3), sd_listen_fds(3)) is played by the test.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host_world.h"

#define PAGES      50U
#define WORDS_MAX  256U
#define STORED_MAX 64U
#define FIRST_FD   3 /* SD_LISTEN_FDS_START */

struct stored {
    char name[128];
    int fd;
};

/* A thread: memd waits until the manager has read what it says. */
static struct manager {
    int socket;
    pthread_t thread;
    pthread_mutex_t lock;
    char words[WORDS_MAX][256];
    uint32_t word_count;
    struct stored stored[STORED_MAX];
    uint32_t stored_count;
} manager;

static void forget(const char *name)
{
    for (uint32_t i = 0; i < manager.stored_count; i++) {
        if (strcmp(manager.stored[i].name, name) == 0) {
            close(manager.stored[i].fd);
            manager.stored[i--] = manager.stored[--manager.stored_count];
        }
    }
}

static void take_words(const char *words, int fd)
{
    const char *name = strstr(words, "FDNAME=");
    char copy[128] = "";

    if (name)
        snprintf(copy, sizeof(copy), "%.*s", (int)strcspn(name + 7, "\n"), name + 7);
    pthread_mutex_lock(&manager.lock);
    snprintf(manager.words[manager.word_count++ % WORDS_MAX], sizeof(manager.words[0]), "%s",
             words);
    if (strncmp(words, "FDSTORE=1", 9) == 0 && fd >= 0 && manager.stored_count < STORED_MAX) {
        struct stored *stored = &manager.stored[manager.stored_count++];

        strcpy(stored->name, copy);
        stored->fd = fd;
    } else if (strncmp(words, "FDSTOREREMOVE=1", 15) == 0) {
        forget(copy);
    }
    pthread_mutex_unlock(&manager.lock);
}

static void *manage(void *unused)
{
    (void)unused;
    for (;;) {
        char words[256], control[CMSG_SPACE(sizeof(int))];
        struct iovec piece = {words, sizeof(words) - 1};
        struct msghdr header = {.msg_iov = &piece,
                                .msg_iovlen = 1,
                                .msg_control = control,
                                .msg_controllen = sizeof(control)};
        ssize_t got = recvmsg(manager.socket, &header, MSG_CMSG_CLOEXEC);
        struct cmsghdr *part = got < 0 ? NULL : CMSG_FIRSTHDR(&header);
        int fd = -1;

        if (got <= 0)
            return NULL;
        words[got] = '\0';
        if (part && part->cmsg_type == SCM_RIGHTS)
            memcpy(&fd, CMSG_DATA(part), sizeof(fd));
        take_words(words, fd);
    }
}

static void start_manager(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char name[64];
    int length;

    memset(&manager, 0, sizeof(manager));
    pthread_mutex_init(&manager.lock, NULL);
    length = snprintf(name, sizeof(name), "@memd-unit-manager-%d", (int)getpid());
    memcpy(address.sun_path, name, (size_t)length);
    address.sun_path[0] = '\0';
    manager.socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    cr_assert_eq(bind(manager.socket, (struct sockaddr *)&address,
                      (socklen_t)(offsetof(struct sockaddr_un, sun_path) + (size_t)length)),
                 0);
    setenv("NOTIFY_SOCKET", name, 1);
    cr_assert_eq(pthread_create(&manager.thread, NULL, manage, NULL), 0);
}

static bool was_told(const char *words)
{
    bool found = false;

    pthread_mutex_lock(&manager.lock);
    for (uint32_t i = 0; i < manager.word_count && i < WORDS_MAX; i++)
        found |= strcmp(manager.words[i], words) == 0;
    pthread_mutex_unlock(&manager.lock);
    return found;
}

/* The descriptor that rests under this name; -1: none. */
static int find_stored(const char *name)
{
    int fd = -1;

    pthread_mutex_lock(&manager.lock);
    for (uint32_t i = 0; i < manager.stored_count; i++) {
        if (strcmp(manager.stored[i].name, name) == 0)
            fd = manager.stored[i].fd;
    }
    pthread_mutex_unlock(&manager.lock);
    return fd;
}

static uint32_t stored_count(void)
{
    uint32_t count;

    pthread_mutex_lock(&manager.lock);
    count = manager.stored_count;
    pthread_mutex_unlock(&manager.lock);
    return count;
}

static bool same_file(int a, int b)
{
    struct stat one, other;

    return fstat(a, &one) == 0 && fstat(b, &other) == 0 && one.st_dev == other.st_dev &&
           one.st_ino == other.st_ino;
}

Test(host_systemd, the_manager_is_told_of_the_start_the_end_and_every_segment, .timeout = 60)
{
    struct fake fakes[2];
    struct world world;
    char name[64];

    start_manager();
    fakes_share(&world, fakes, PAGES);
    UNTIL(&world, fakes, 2, was_told("READY=1"));
    for (uint32_t segment = 0; segment < FAKE_SEGMENTS; segment++) {
        if (fakes[0].segments[segment] < 0)
            continue;
        snprintf(name, sizeof(name), "memd.%u.web", segment);
        UNTIL(&world, fakes, 2, find_stored(name) >= 0);
        cr_assert(same_file(find_stored(name), fakes[0].segments[segment]));
    }
    cr_assert_gt(stored_count(), 0);
    /* Nobody uses them any more: the manager is to let go of them, too. */
    for (int i = 0; i < 2; i++) {
        for (uint32_t page = 0; page < PAGES; page++)
            fake_write(&fakes[i], page, 1000 + (uint32_t)i * PAGES + page);
        fake_bell(&fakes[i]);
    }
    UNTIL(&world, fakes, 2, stored_count() == 0);
    daemon_stop(&world.daemon);
    world.running = false;
    while (!was_told("STOPPING=1"))
        usleep(1000);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}

/* ---- a restart ---- */

/* What the manager offers to a memd that starts. */
struct offered {
    char names[1024];
    int fds[16];
    int count;
};

static void offer(struct offered *offered, const char *name, int fd)
{
    if (offered->count)
        strcat(offered->names, ":");
    strcat(offered->names, name);
    offered->fds[offered->count++] = fd;
}

/* In a child, whose descriptors can be numbered as the protocol wants it: starts memd and ends with
 * the number of segments that it took back. */
static int restart_with(struct world *world, const struct offered *offered)
{
    int status = -1, moved[16];
    char text[16];
    pid_t pid = fork();

    if (pid == 0) {
        for (int i = 0; i < offered->count; i++)
            moved[i] = fcntl(offered->fds[i], F_DUPFD, 500);
        for (int i = 0; i < offered->count; i++)
            dup2(moved[i], FIRST_FD + i);
        snprintf(text, sizeof(text), "%d", (int)getpid());
        setenv("LISTEN_PID", text, 1);
        snprintf(text, sizeof(text), "%d", offered->count);
        setenv("LISTEN_FDS", text, 1);
        setenv("LISTEN_FDNAMES", offered->names, 1);
        freopen("/dev/null", "w", stderr);
        world_restart(world, world_web());
        _exit(world->daemon.domains.first ? (int)world->daemon.domains.first->store.segment_count
                                          : 0);
    }
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int make_memfd(int seals)
{
    int fd = memfd_create("made-up", MFD_ALLOW_SEALING | MFD_CLOEXEC);

    cr_assert_eq(ftruncate(fd, PAGES * (off_t)PAGE_BYTES), 0);
    cr_assert_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

#define ALL_SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* Puts a file on record as a segment. */
static void put_on_record(const struct world *world, uint32_t segment, int fd)
{
    char path[128];
    struct stat about;
    FILE *file;

    snprintf(path, sizeof(path), "%s/state/domains/web.domain", world->dir);
    file = fopen(path, "a");
    cr_assert_not_null(file);
    cr_assert_eq(fstat(fd, &about), 0);
    fprintf(file, "+ %u %u %llu %llu\n", segment, PAGES, (unsigned long long)about.st_dev,
            (unsigned long long)about.st_ino);
    fclose(file);
}

static uint32_t only_segment(const struct fake *fake)
{
    uint32_t found = FAKE_SEGMENTS;

    for (uint32_t segment = 0; segment < FAKE_SEGMENTS; segment++) {
        if (fake->segments[segment] >= 0) {
            cr_assert_eq(found, FAKE_SEGMENTS, "the test wants one segment");
            found = segment;
        }
    }
    cr_assert_lt(found, FAKE_SEGMENTS);
    return found;
}

static void name_of(uint32_t segment, char *ret_name)
{
    snprintf(ret_name, 64, "memd.%u.web", segment);
}

Test(host_systemd, a_restarted_memd_takes_back_what_is_on_record_and_nothing_else, .timeout = 60)
{
    struct offered genuine = {.count = 0}, others = {.count = 0};
    struct world world;
    struct fake fakes[2];
    uint32_t segment;
    char name[64];
    int fd, foreign, unsealed;

    start_manager();
    fakes_share(&world, fakes, PAGES);
    daemon_stop(&world.daemon);
    world.running = false;
    segment = only_segment(&fakes[0]);
    fd = fakes[0].segments[segment];
    name_of(segment, name);

    /* Another file under its name; it under another name, number or domain; names that are none. */
    offer(&others, name, make_memfd(ALL_SEALS));
    offer(&others, "memd.77.web", fd);
    offer(&others, "memd.77.elsewhere", fd);
    offer(&others, "memd.4294967295.web", fd);
    offer(&others, "memd..web", fd);
    offer(&others, "stored", fd);
    offer(&others, name, open("/dev/null", O_RDONLY | O_CLOEXEC));
    /* On record, but not sealed; on record, but another user's. */
    unsealed = make_memfd(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    put_on_record(&world, 500, unsealed);
    offer(&others, "memd.500.web", unsealed);
    foreign = make_memfd(ALL_SEALS);
    if (geteuid() == 0)
        cr_assert_eq(fchown(foreign, 4711, 4711), 0);
    else
        close(foreign), foreign = open("/dev/null", O_RDONLY | O_CLOEXEC);
    put_on_record(&world, 501, foreign);
    offer(&others, "memd.501.web", foreign);
    cr_assert_eq(restart_with(&world, &others), 0);
    while (!was_told("FDSTOREREMOVE=1\nFDNAME=memd.500.web"))
        usleep(1000); /* what was refused does not rest with the manager for ever */

    offer(&genuine, "memd.500.web", unsealed);
    offer(&genuine, name, fd);
    offer(&genuine, "stored", fd);
    cr_assert_eq(restart_with(&world, &genuine), 1);
    for (int i = 0; i < 2; i++)
        fake_close(&fakes[i]);
    world_stop(&world);
}
