/* SPDX-License-Identifier: Apache-2.0 */
#include "rpc.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "sys.h"

#define GREET_TIMEOUT_S 5

int rpc_send(struct rpc *rpc, const void *message, uint32_t bytes, int fd)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)),
                            .cmsg_level = SOL_SOCKET,
                            .cmsg_type = SCM_RIGHTS}};
    struct iovec part = {(void *)message, bytes};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    long sent;

    if (fd >= 0) {
        memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
        header.msg_control = &control;
        header.msg_controllen = sizeof(control);
    }
    sent = sys_call3(SYS_sendmsg, rpc->fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
    return sent < 0 ? (int)sent : 0;
}

/* The descriptors of a message, at most two; others are closed. */
static void take_descriptors(struct msghdr *header, int fds[2])
{
    int count = 0;

    fds[0] = fds[1] = -1;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(header); at; at = CMSG_NXTHDR(header, at)) {
        size_t n = (at->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(at) + i * sizeof(int), sizeof(int));
            if (count < 2)
                fds[count++] = fd;
            else
                sys_close(fd);
        }
    }
}

static void close_descriptors(const int fds[2])
{
    for (int i = 0; i < 2; i++)
        if (fds[i] >= 0)
            sys_close(fds[i]);
}

static long receive(int fd, union rpc_message *ret_message, int fds[2])
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(4 * sizeof(int))];
    } control;
    struct iovec part = {ret_message, sizeof(*ret_message)};
    struct msghdr header = {.msg_iov = &part,
                            .msg_iovlen = 1,
                            .msg_control = &control,
                            .msg_controllen = sizeof(control)};
    long got = sys_call3(SYS_recvmsg, fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

    if (got < 0)
        return got;
    take_descriptors(&header, fds);
    if (got == 0)
        return -EPIPE;
    if (got < (long)sizeof(ret_message->header) || ret_message->header.bytes != (uint32_t)got) {
        close_descriptors(fds);
        return -EPROTO;
    }
    return got;
}

int rpc_receive(struct rpc *rpc, union rpc_message *ret_message, int *ret_fd)
{
    int fds[2];
    long got = receive(rpc->fd, ret_message, fds);

    if (got == -EAGAIN || got == -EINTR)
        return 0;
    if (got < 0)
        return (int)got;
    if (fds[1] >= 0)
        sys_close(fds[1]);
    *ret_fd = fds[0];
    return 1;
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t length = strlen(path);
    int fd;
    int r;

    if (length >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    memcpy(address.sun_path, path, length);
    fd = (int)sys_call3(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return fd;
    r = (int)sys_call3(SYS_connect, fd, &address, sizeof(address));
    if (r < 0) {
        sys_close(fd);
        return r;
    }
    return fd;
}

static int map_ring(struct rpc *rpc, int fd, uint32_t bytes)
{
    void *ring;

    if (fd < 0 || bytes < RING_BYTES)
        return -EPROTO;
    ring = sys_mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (sys_failed(ring))
        return (int)(intptr_t)ring;
    sys_madvise(ring, RING_BYTES, MADV_DONTFORK);
    sys_madvise(ring, RING_BYTES, MADV_DONTDUMP);
    rpc->ring = ring;
    rpc->head = rpc->ring->to_memd.head;
    rpc->tail = rpc->ring->to_agent.tail;
    rpc->buffer = 0;
    rpc->dirty = false;
    return 0;
}

static int read_answer(struct rpc *rpc, struct message_welcome *ret_welcome, int *ret_dev,
                       char *reason)
{
    struct pollfd polled = {.fd = rpc->fd, .events = POLLIN};
    struct timespec timeout = {.tv_sec = GREET_TIMEOUT_S};
    union rpc_message answer;
    int fds[2];
    long got;
    int r;

    if (sys_call5(SYS_ppoll, &polled, 1, &timeout, NULL, 8) <= 0)
        return -ETIMEDOUT;
    got = receive(rpc->fd, &answer, fds);
    if (got < 0)
        return (int)got;
    if (answer.header.type == MESSAGE_REFUSED && got >= (long)sizeof(answer.words)) {
        close_descriptors(fds);
        answer.words.text[sizeof(answer.words.text) - 1] = 0;
        memcpy(reason, answer.words.text, sizeof(answer.words.text));
        return -EACCES;
    }
    r = answer.header.type == MESSAGE_WELCOME && got >= (long)sizeof(answer.welcome)
            ? map_ring(rpc, fds[0], answer.welcome.ring_bytes)
            : -EPROTO;
    if (fds[0] >= 0)
        sys_close(fds[0]);
    if (r < 0) {
        if (fds[1] >= 0)
            sys_close(fds[1]);
        return r;
    }
    *ret_welcome = answer.welcome;
    *ret_dev = fds[1];
    return 0;
}

int rpc_greet(struct rpc *rpc, const char *path, const struct message_hello *hello,
              struct message_welcome *ret_welcome, int *ret_dev, char *reason)
{
    int r;

    rpc->ring = NULL;
    rpc->fd = connect_to(path);
    if (rpc->fd < 0)
        return rpc->fd;
    r = rpc_send(rpc, hello, sizeof(*hello), -1);
    if (r == 0)
        r = read_answer(rpc, ret_welcome, ret_dev, reason);
    if (r < 0)
        rpc_close(rpc);
    return r;
}

void rpc_close(struct rpc *rpc)
{
    if (rpc->fd >= 0)
        sys_close(rpc->fd);
    if (rpc->ring)
        sys_munmap(rpc->ring, RING_BYTES);
    rpc->fd = -1;
    rpc->ring = NULL;
}

bool rpc_room(const struct rpc *rpc, uint32_t entries)
{
    uint32_t room = ring_room(&rpc->ring->to_memd, rpc->head);

    return room <= RING_ENTRIES && room >= entries;
}

bool rpc_put(struct rpc *rpc, uint32_t op, uint32_t page, uint64_t arg)
{
    if (!rpc_room(rpc, 1))
        return false;
    ring_put(&rpc->ring->to_memd, &rpc->head,
             (struct ring_entry){.op = op, .page = page, .arg = arg});
    /* Only now: a buffer that was filled in vain must not shift the others' turn. */
    if (op == RING_PAGE)
        rpc->buffer = (rpc->buffer + 1) % RING_PAGE_BUFFERS;
    rpc->dirty = true;
    return true;
}

/* A buffer is memd's until memd has consumed the entry that names it. Buffers go round, so all are
 * ours but those of the PAGE entries that are still in the ring. */
uint8_t *rpc_page_buffer(struct rpc *rpc, uint32_t *ret_buffer)
{
    const struct ring_queue *queue = &rpc->ring->to_memd;
    uint32_t tail = __atomic_load_n(&queue->tail, __ATOMIC_ACQUIRE);
    uint32_t used = 0;

    if (rpc->head - tail > RING_ENTRIES)
        return NULL;
    for (uint32_t at = tail; at != rpc->head; at++)
        used += queue->entries[at % RING_ENTRIES].op == RING_PAGE;
    if (used >= RING_PAGE_BUFFERS)
        return NULL;
    *ret_buffer = rpc->buffer;
    return rpc->ring->pages[*ret_buffer];
}

bool rpc_take(struct rpc *rpc, struct ring_entry *ret_entry)
{
    uint32_t filled = ring_filled(&rpc->ring->to_agent, rpc->tail);

    if (filled == 0 || filled > RING_ENTRIES)
        return false;
    *ret_entry = ring_peek(&rpc->ring->to_agent, rpc->tail);
    ring_release(&rpc->ring->to_agent, &rpc->tail);
    return true;
}

void rpc_ring(struct rpc *rpc)
{
    struct message_plain doorbell = {.header = {MESSAGE_DOORBELL, sizeof(doorbell)}};

    if (!rpc->dirty)
        return;
    /* A full socket means that memd has doorbells enough to come back for. */
    rpc_send(rpc, &doorbell, sizeof(doorbell), -1);
    rpc->dirty = false;
}
