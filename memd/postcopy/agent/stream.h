/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One end of a data connection, and how it is replaced.
 *
 * A stream belongs to one thread (its owner), which alone reads, writes and closes its descriptor.
 * Other threads only post the next descriptor, or that there is to be none; the owner takes that
 * over at the top of its loop. Nothing here waits but stream_send.
 */
#ifndef MEMD_POSTCOPY_AGENT_STREAM_H
#define MEMD_POSTCOPY_AGENT_STREAM_H

#include <sys/uio.h>

#include "lock.h"
#include "ram.h"
#include "wire.h"

#define STREAM_REASON_BYTES 96

/* What became of a connection. */
struct stream_cut {
    uint32_t epoch;
    int result; /* -errno */
    char reason[STREAM_REASON_BYTES];
};

struct stream {
    /* Any thread, under `posting`. */
    struct lock posting;
    bool posted;
    int next_fd; /* -1: none */
    uint32_t next_epoch;
    struct stream_cut cut; /* the last one, until stream_take_cut */
    bool have_cut;

    uint32_t up;    /* any thread may read it: the owner has a descriptor */
    uint32_t *stop; /* any thread sets it: the owner is to end */
    int wake_fd;    /* an eventfd: what the owner waits for besides */
    int news_fd;    /* an eventfd of somebody who wants to know of a cut */

    /* The owner's. */
    int fd;
    uint32_t epoch;
    struct wire_limits limits;
    uint8_t *buffer;
    uint32_t room, from, to;      /* of the buffer: what was read and not yet taken */
    uint64_t bytes_in, bytes_out; /* others may read them */
};

/* `room` bytes of buffer, at least WIRE_FRAME_MAX. 0 or -ENOMEM. */
int stream_open(struct stream *stream, uint32_t room, const struct wire_limits *limits,
                uint32_t *stop, int news_fd);
/* When the owner has ended. */
void stream_close(struct stream *stream);

/* Any thread: the owner is to go on with this descriptor (which is the stream's from now on), or
 * with none (-1). */
void stream_post(struct stream *stream, int fd, uint32_t epoch);
/* Any thread: what cut the connection, once. */
bool stream_take_cut(struct stream *stream, struct stream_cut *ret_cut);
/* Any thread. */
void stream_wake(struct stream *stream);

/* Owner: takes over what was posted. True when the connection is another one now. */
bool stream_adopt(struct stream *stream);
/* Owner: is it time to leave what it is doing (something was posted, or the end)? */
bool stream_is_called(struct stream *stream);
/* Owner: waits for `events` on the connection, for a wake, or until `timeout_ns` are over (-1: no
 * limit). Returns the events that there are. */
short stream_wait(struct stream *stream, short events, int64_t timeout_ns);
/* Owner: the connection is over. `reason` may be NULL. */
void stream_fail(struct stream *stream, int result, const char *reason);

/* Owner: reads what there is. Bytes, 0 when there is nothing now, or -errno (-EPIPE: its end). */
long stream_fill(struct stream *stream);
/* Owner: the next frame, whose payload stays valid until the next call of either. 1; 0: there is no
 * whole frame; -EPROTO and in words what is wrong. */
int stream_next(struct stream *stream, struct wire_frame *ret_frame, const uint8_t **ret_payload,
                const char **ret_reason);

/* Owner: sends without waiting. Bytes, or -errno (-EAGAIN). */
long stream_try_send(struct stream *stream, const struct iovec *parts, uint32_t count);
/*
 * Owner: sends all of it, waiting for room. `parts` is used up. Where they lie in guest memory,
 * `block` is whose: its reading lock is held while bytes are taken out of it, and never while
 * waiting. 0; -ECANCELED: called away; -EFAULT: the block has left; -errno of the connection.
 */
int stream_send(struct stream *stream, struct iovec *parts, uint32_t count,
                struct ram_block *block);

#endif
