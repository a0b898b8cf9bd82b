/* SPDX-License-Identifier: Apache-2.0 */
#include "agent_memd.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "send_with.h"

/* Caller holds the lock. */
static void greet(struct memd_end *end, int fd)
{
    struct message_welcome welcome = {.header = {MESSAGE_WELCOME, sizeof(welcome)},
                                      .version = PROTOCOL_VERSION,
                                      .features = FEATURE_SHARE,
                                      .session = 1,
                                      .ring_bytes = RING_BYTES,
                                      .revisit_ms = 1000};
    int ring = memfd_create("memd-ring", MFD_CLOEXEC);

    (void)ftruncate(ring, RING_BYTES);
    end->ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, ring, 0);
    end->head = 0;
    end->fd = fd;
    (void)send_with(fd, &welcome, sizeof(welcome), &ring, ring >= 0, 0);
    close(ring);
}

static void hang_up(struct memd_end *end)
{
    munmap(end->ring, RING_BYTES);
    close(end->fd);
    end->fd = -1;
}

static void read_messages(struct memd_end *end)
{
    union {
        struct message_header header;
        struct message_stats stats;
        uint8_t bytes[1024];
    } message;
    ssize_t got;

    while ((got = recv(end->fd, &message, sizeof(message), MSG_DONTWAIT)) > 0) {
        __atomic_add_fetch(&end->messages, 1, __ATOMIC_RELEASE);
        if (message.header.type == MESSAGE_STATS)
            memcpy(end->reason, message.stats.reason, sizeof(end->reason));
    }
    if (got == 0)
        hang_up(end);
    else
        __atomic_store_n(&end->ring->to_memd.tail,
                         __atomic_load_n(&end->ring->to_memd.head, __ATOMIC_ACQUIRE),
                         __ATOMIC_RELEASE);
}

static void *be_memd(void *context)
{
    struct memd_end *end = context;

    while (!__atomic_load_n(&end->stop, __ATOMIC_ACQUIRE)) {
        struct pollfd polled = {.fd = end->fd >= 0 ? end->fd : end->listener, .events = POLLIN};

        if (poll(&polled, 1, 1) <= 0 && end->fd < 0)
            continue;
        pthread_mutex_lock(&end->lock);
        if (end->fd >= 0)
            read_messages(end);
        else
            greet(end, accept4(end->listener, NULL, NULL, SOCK_CLOEXEC));
        pthread_mutex_unlock(&end->lock);
    }
    return NULL;
}

static void name_socket(char path[MEMD_END_PATH_BYTES], pid_t process)
{
    snprintf(path, MEMD_END_PATH_BYTES, "/tmp/memd-unit-agent-%d", (int)process);
}

void memd_end_forget(pid_t process)
{
    char path[MEMD_END_PATH_BYTES];

    name_socket(path, process);
    unlink(path);
}

void memd_end_start(struct memd_end *end)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    memset(end, 0, sizeof(*end));
    end->fd = -1;
    name_socket(end->path, getpid());
    strcpy(address.sun_path, end->path);
    end->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    unlink(end->path);
    cr_assert_eq(bind(end->listener, (struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(listen(end->listener, 8), 0);
    pthread_mutex_init(&end->lock, NULL);
    cr_assert_eq(pthread_create(&end->thread, NULL, be_memd, end), 0);
}

void memd_end_stop(struct memd_end *end)
{
    __atomic_store_n(&end->stop, true, __ATOMIC_RELEASE);
    pthread_join(end->thread, NULL);
    if (end->fd >= 0)
        hang_up(end);
    close(end->listener);
    unlink(end->path);
}

void memd_end_give(struct memd_end *end, uint32_t segment, uint32_t pages, int fd)
{
    struct message_segment message = {{MESSAGE_SEGMENT, sizeof(message)}, segment, pages};

    pthread_mutex_lock(&end->lock);
    if (end->fd >= 0)
        (void)send_with(end->fd, &message, sizeof(message), &fd, fd >= 0, 0);
    pthread_mutex_unlock(&end->lock);
}

void memd_end_tune(struct memd_end *end, uint32_t revisit_ms)
{
    struct message_tune message = {
        .header = {MESSAGE_TUNE, sizeof(message)}, .revisit_ms = revisit_ms, .cpu_permille = 0};

    pthread_mutex_lock(&end->lock);
    if (end->fd >= 0)
        (void)send_with(end->fd, &message, sizeof(message), NULL, 0, 0);
    pthread_mutex_unlock(&end->lock);
}

void memd_end_give_mover(struct memd_end *end, uint32_t role, int fd)
{
    struct message_mover message = {{MESSAGE_MOVER, sizeof(message)}, role, 0};
    bool given = false;

    while (!given) { /* the agent connects in its own time */
        pthread_mutex_lock(&end->lock);
        given = end->fd >= 0;
        if (given)
            (void)send_with(end->fd, &message, sizeof(message), &fd, fd >= 0, 0);
        pthread_mutex_unlock(&end->lock);
        if (!given)
            usleep(1000);
    }
}

void memd_end_merge_scattered(struct memd_end *end, uint32_t page, const uint32_t *slots,
                              uint32_t pages)
{
    struct message_plain bell = {{MESSAGE_DOORBELL, sizeof(bell)}};

    pthread_mutex_lock(&end->lock);
    for (uint32_t i = 0; end->fd >= 0 && i < pages && ring_room(&end->ring->to_agent, end->head);
         i++)
        ring_put(&end->ring->to_agent, &end->head,
                 (struct ring_entry){RING_MERGE, page + i, slots[i]});
    if (end->fd >= 0)
        (void)send_with(end->fd, &bell, sizeof(bell), NULL, 0, 0);
    pthread_mutex_unlock(&end->lock);
}

void memd_end_merge(struct memd_end *end, uint32_t page, uint32_t slot, uint32_t pages)
{
    uint32_t slots[SEGMENT_MAX_PAGES];

    for (uint32_t i = 0; i < pages; i++)
        slots[i] = slot + i;
    memd_end_merge_scattered(end, page, slots, pages);
}

bool memd_end_heard(struct memd_end *end, const char *words)
{
    bool heard;

    pthread_mutex_lock(&end->lock);
    heard = strstr(end->reason, words) != NULL;
    pthread_mutex_unlock(&end->lock);
    return heard;
}
