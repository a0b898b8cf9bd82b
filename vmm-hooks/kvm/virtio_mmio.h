/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The virtio-mmio transport (virtio 1.2, section 4.2, version 2): registers on one side, a device's
 * ops on the other. What a driver writes is a stranger's word; whatever it does, the worst that
 * happens is that its device asks for a reset (DEVICE_NEEDS_RESET).
 *
 * All calls under the board's lock.
 */
#ifndef MEMVM_VIRTIO_MMIO_H
#define MEMVM_VIRTIO_MMIO_H

#include "virtio_queue.h"

#define VIRTIO_MMIO_MAX_QUEUES 8U

struct virtio_mmio;

/* A device. Its functions are called with nothing but what is promised here. */
struct virtio_device_ops {
    uint32_t device_id;
    uint32_t queue_count; /* up to VIRTIO_MMIO_MAX_QUEUES */
    uint32_t queue_size;  /* at most, a power of two up to VIRTIO_QUEUE_MAX */
    uint64_t features;    /* that it offers, besides VERSION_1 */
    /* The driver says that there is something in this queue (which exists and is ready). */
    void (*notify)(struct virtio_mmio *transport, uint32_t queue);
    /* The device's own registers: `bytes` is 1, 2 or 4, and the offset may be anything. NULL: none,
     * reads give 0. */
    uint32_t (*config_read)(struct virtio_mmio *transport, uint32_t offset, uint32_t bytes);
    void (*config_write)(struct virtio_mmio *transport, uint32_t offset, uint32_t bytes,
                         uint32_t value);
    /* The driver begins anew. NULL: there is nothing to forget. */
    void (*reset)(struct virtio_mmio *transport);
};

/* What is saved. */
struct virtio_mmio_state {
    uint64_t driver_features;
    uint32_t device_features_sel, driver_features_sel, queue_sel;
    uint32_t status, interrupt_status, config_generation;
    struct virtio_queue_state queues[VIRTIO_MMIO_MAX_QUEUES];
};

struct virtio_mmio {
    const struct virtio_device_ops *ops;
    void *device;                    /* the ops' own */
    void (*interrupt)(void *opaque); /* tells the guest to look */
    void *opaque;
    struct virtio_mmio_state state;
    struct virtio_queue queues[VIRTIO_MMIO_MAX_QUEUES];
};

/* `transport->ops`, `device`, `interrupt` and `opaque` are set by the caller. */
void virtio_mmio_open(struct virtio_mmio *transport, const struct guest_memory *memory);

/* An access of the guest's to the register at `offset`. Below 0x100 only 4 bytes at a time mean
 * anything: others read as 0 and write nothing. */
uint32_t virtio_mmio_read(struct virtio_mmio *transport, uint32_t offset, uint32_t bytes);
void virtio_mmio_write(struct virtio_mmio *transport, uint32_t offset, uint32_t bytes,
                       uint32_t value);

/* For devices: something was pushed into this queue; the device's registers have changed; the
 * driver did something impossible. */
void virtio_mmio_used(struct virtio_mmio *transport, uint32_t queue);
void virtio_mmio_config_changed(struct virtio_mmio *transport);
void virtio_mmio_needs_reset(struct virtio_mmio *transport);

/* The state with that of the queues in it; and back, 0 or -EINVAL when it can't be. */
struct virtio_mmio_state virtio_mmio_save(const struct virtio_mmio *transport);
int virtio_mmio_load(struct virtio_mmio *transport, const struct virtio_mmio_state *state);

#endif
