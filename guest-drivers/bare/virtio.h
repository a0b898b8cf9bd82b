/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A driver's half of virtio-mmio (virtio 1.2, section 4.2, version 2) with one request at a time a
 * queue: small, and enough for an entropy source or a balloon.
 */
#ifndef BARE_VIRTIO_H
#define BARE_VIRTIO_H

#include <stdbool.h>
#include <stdint.h>

#define VIRTIO_QUEUE_SIZE 8U

struct virtio_desc {
    uint64_t address;
    uint32_t bytes;
    uint16_t flags;
    uint16_t next;
};

struct virtio_avail {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[VIRTIO_QUEUE_SIZE];
    uint16_t used_event;
};

struct virtio_used {
    uint16_t flags;
    uint16_t index;
    struct {
        uint32_t id;
        uint32_t bytes;
    } ring[VIRTIO_QUEUE_SIZE];
    uint16_t avail_event;
};

struct virtio_queue {
    _Alignas(16) struct virtio_desc desc[VIRTIO_QUEUE_SIZE];
    _Alignas(4) struct virtio_avail avail;
    _Alignas(4) struct virtio_used used;
    uint64_t device; /* address of its registers */
    uint32_t index;
};

/* The address of the first device of this kind, or 0. */
uint64_t virtio_find(uint32_t device_id, uint32_t count);

/* Negotiates nothing but VERSION_1, and sets up `queue` (zeroed) as number 0. */
bool virtio_open(uint64_t device, struct virtio_queue *queue);

/* Lets the device write up to `bytes` into the buffer and waits until it has. *ret_bytes: how many
 * it says it wrote. False when the device answers with something impossible. */
bool virtio_receive(struct virtio_queue *queue, void *buffer, uint32_t bytes, uint32_t *ret_bytes);

#endif
