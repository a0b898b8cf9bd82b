/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A split virtqueue (virtio 1.2, section 2.7) as its device sees it.
 *
 * Everything in it was written by the guest, and may be changed by the guest while we look. So each
 * number is read once and checked before it is used: addresses against RAM, indices against the
 * queue's size, the length of a chain against the number of descriptors (which ends loops). A queue
 * in which something is impossible is `broken` until the guest resets the device, and nothing of it
 * is touched again. Indirect descriptors are not offered, so they are impossible too.
 *
 * Not promised: that a buffer still holds what it held a moment ago.
 */
#ifndef MEMVM_VIRTIO_QUEUE_H
#define MEMVM_VIRTIO_QUEUE_H

#include <stdbool.h>
#include <stddef.h>

#include "memory.h"

#define VIRTIO_QUEUE_MAX 256U

struct virtio_buffer {
    uint8_t *at;
    uint32_t bytes;
};

/* What the guest put into the queue in one piece: first what the device reads, then what it writes.
 */
struct virtio_chain {
    uint16_t head;
    uint16_t readable;
    uint16_t writable;
    struct virtio_buffer buffers[VIRTIO_QUEUE_MAX];
};

/* What is set by the driver, and saved. */
struct virtio_queue_state {
    uint64_t desc, avail, used; /* guest addresses */
    uint32_t size;
    uint16_t next_avail, next_used;
    uint8_t ready, broken;
};

struct virtio_queue {
    const struct guest_memory *memory;
    uint32_t size_max;
    struct virtio_queue_state state;
};

void virtio_queue_reset(struct virtio_queue *queue);

/* The driver (or a saved file) says that the queue is set up: looks whether that can be.
 * 0, or -EINVAL: the queue is not ready. */
int virtio_queue_enable(struct virtio_queue *queue);

/* The next chain: 1, or 0 when there is none, or -EPROTO: the queue is broken. */
int virtio_queue_pop(struct virtio_queue *queue, struct virtio_chain *ret_chain);

/* The device is done with the chain, into which it wrote `bytes`. */
void virtio_queue_push(struct virtio_queue *queue, uint16_t head, uint32_t bytes);

/* Whether the driver wants to be told of what was pushed. */
bool virtio_queue_wants_interrupt(const struct virtio_queue *queue);

#endif
