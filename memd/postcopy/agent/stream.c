/* SPDX-License-Identifier: Apache-2.0 */
#include "stream.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>

#include "regions.h"

int stream_open(struct stream *stream, uint32_t room, const struct wire_limits *limits,
                uint32_t *stop, int news_fd)
{
    memset(stream, 0, sizeof(*stream));
    stream->fd = stream->next_fd = -1;
    stream->limits = *limits;
    stream->stop = stop;
    stream->news_fd = news_fd;
    stream->room = room;
    stream->wake_fd = (int)sys_call2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (stream->wake_fd < 0)
        return stream->wake_fd;
    stream->buffer = regions_map(room);
    if (stream->buffer)
        return 0;
    sys_close(stream->wake_fd);
    return -ENOMEM;
}

void stream_close(struct stream *stream)
{
    if (stream->fd >= 0)
        sys_close(stream->fd);
    if (stream->posted && stream->next_fd >= 0)
        sys_close(stream->next_fd);
    sys_close(stream->wake_fd);
    regions_unmap(stream->buffer, stream->room);
    memset(stream, 0, sizeof(*stream));
    stream->fd = stream->next_fd = stream->wake_fd = -1;
}

static void ring(int fd)
{
    uint64_t one = 1;

    sys_call3(SYS_write, fd, &one, sizeof(one));
}

void stream_wake(struct stream *stream)
{
    ring(stream->wake_fd);
}

void stream_post(struct stream *stream, int fd, uint32_t epoch)
{
    lock_take(&stream->posting);
    if (stream->posted && stream->next_fd >= 0)
        sys_close(stream->next_fd);
    stream->next_fd = fd;
    stream->next_epoch = epoch;
    __atomic_store_n(&stream->posted, true, __ATOMIC_RELEASE);
    lock_release(&stream->posting);
    stream_wake(stream);
}

bool stream_take_cut(struct stream *stream, struct stream_cut *ret_cut)
{
    bool have;

    lock_take(&stream->posting);
    have = stream->have_cut;
    stream->have_cut = false;
    if (have)
        *ret_cut = stream->cut;
    lock_release(&stream->posting);
    return have;
}

static void hang_up(struct stream *stream)
{
    if (stream->fd >= 0)
        sys_close(stream->fd);
    stream->fd = -1;
    stream->from = stream->to = 0;
    __atomic_store_n(&stream->up, 0, __ATOMIC_RELEASE);
}

bool stream_adopt(struct stream *stream)
{
    bool posted;

    if (!__atomic_load_n(&stream->posted, __ATOMIC_ACQUIRE))
        return false;
    lock_take(&stream->posting);
    posted = stream->posted;
    if (posted) {
        hang_up(stream);
        stream->fd = stream->next_fd;
        stream->epoch = stream->next_epoch;
        stream->next_fd = -1;
        __atomic_store_n(&stream->posted, false, __ATOMIC_RELEASE);
        __atomic_store_n(&stream->up, stream->fd >= 0, __ATOMIC_RELEASE);
    }
    lock_release(&stream->posting);
    return posted;
}

bool stream_is_called(struct stream *stream)
{
    return __atomic_load_n(&stream->posted, __ATOMIC_ACQUIRE) ||
           __atomic_load_n(stream->stop, __ATOMIC_ACQUIRE);
}

short stream_wait(struct stream *stream, short events, int64_t timeout_ns)
{
    struct pollfd polled[2] = {{.fd = stream->wake_fd, .events = POLLIN},
                               {.fd = events ? stream->fd : -1, .events = events}};
    struct timespec timeout = {.tv_sec = timeout_ns / 1000000000,
                               .tv_nsec = timeout_ns % 1000000000};
    uint64_t count;

    sys_call5(SYS_ppoll, polled, 2, timeout_ns < 0 ? NULL : &timeout, NULL, 8);
    if (polled[0].revents & POLLIN)
        sys_read(stream->wake_fd, &count, sizeof(count));
    return stream->fd >= 0 ? polled[1].revents : 0;
}

void stream_fail(struct stream *stream, int result, const char *reason)
{
    if (stream->fd < 0)
        return;
    lock_take(&stream->posting);
    memset(&stream->cut, 0, sizeof(stream->cut));
    stream->cut.epoch = stream->epoch;
    stream->cut.result = result;
    if (reason)
        strncpy(stream->cut.reason, reason, sizeof(stream->cut.reason) - 1);
    stream->have_cut = true;
    lock_release(&stream->posting);
    hang_up(stream);
    ring(stream->news_fd);
}

static void count_bytes(uint64_t *counter, long bytes)
{
    __atomic_store_n(counter, *counter + (uint64_t)bytes, __ATOMIC_RELAXED);
}

long stream_fill(struct stream *stream)
{
    long got;

    if (stream->from == stream->to) {
        stream->from = stream->to = 0;
    } else if (stream->room - stream->from < WIRE_FRAME_MAX || stream->to == stream->room) {
        memmove(stream->buffer, stream->buffer + stream->from, stream->to - stream->from);
        stream->to -= stream->from;
        stream->from = 0;
    }
    got = sys_call6(SYS_recvfrom, stream->fd, SYS_ARG(stream->buffer + stream->to),
                    stream->room - stream->to, MSG_DONTWAIT, 0, 0);
    if (got == -EAGAIN || got == -EINTR)
        return 0;
    if (got == 0)
        return -EPIPE;
    if (got > 0) {
        stream->to += (uint32_t)got;
        count_bytes(&stream->bytes_in, got);
    }
    return got;
}

int stream_next(struct stream *stream, struct wire_frame *ret_frame, const uint8_t **ret_payload,
                const char **ret_reason)
{
    const uint8_t *at = stream->buffer + stream->from;
    uint32_t have = stream->to - stream->from;
    struct wire_frame frame;
    uint32_t payload;
    int r;

    if (have < WIRE_HEADER_BYTES)
        return 0;
    r = wire_read_header(&stream->limits, at, &frame, &payload, ret_reason);
    if (r < 0)
        return r;
    if (have - WIRE_HEADER_BYTES < payload)
        return 0;
    stream->from += WIRE_HEADER_BYTES + payload;
    *ret_frame = frame;
    *ret_payload = at + WIRE_HEADER_BYTES;
    return 1;
}

long stream_try_send(struct stream *stream, const struct iovec *parts, uint32_t count)
{
    struct msghdr message = {.msg_iov = (struct iovec *)parts, .msg_iovlen = count};
    long sent = sys_call3(SYS_sendmsg, stream->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);

    if (sent > 0)
        count_bytes(&stream->bytes_out, sent);
    return sent;
}

static long send_from_block(struct stream *stream, const struct iovec *parts, uint32_t count,
                            struct ram_block *block)
{
    long sent = -EFAULT;

    lock_take(&block->reading);
    if (__atomic_load_n(&block->live, __ATOMIC_ACQUIRE))
        sent = stream_try_send(stream, parts, count);
    lock_release(&block->reading);
    return sent;
}

/* Takes `sent` bytes off the front. */
static void advance(struct iovec **parts, uint32_t *count, size_t sent)
{
    while (*count > 0 && sent >= (*parts)->iov_len) {
        sent -= (*parts)->iov_len;
        (*parts)++;
        (*count)--;
    }
    if (sent > 0) {
        (*parts)->iov_base = (uint8_t *)(*parts)->iov_base + sent;
        (*parts)->iov_len -= sent;
    }
}

int stream_send(struct stream *stream, struct iovec *parts, uint32_t count, struct ram_block *block)
{
    while (count > 0) {
        long sent;

        if (stream->fd < 0)
            return -ENOTCONN;
        sent = block ? send_from_block(stream, parts, count, block)
                     : stream_try_send(stream, parts, count);
        if (sent == -EAGAIN) {
            stream_wait(stream, POLLOUT, -1);
            if (stream_is_called(stream))
                return -ECANCELED;
            continue;
        }
        if (sent == -EINTR)
            continue;
        if (sent < 0)
            return (int)sent;
        advance(&parts, &count, (size_t)sent);
    }
    return 0;
}
