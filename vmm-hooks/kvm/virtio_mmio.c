/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio_mmio.h"

#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>

#define MAGIC_VALUE      0x74726976U /* "virt" */
#define VENDOR           0x6d656d64U /* "memd" */
#define VERSION_1        (1ULL << VIRTIO_F_VERSION_1)
#define NO_SHARED_MEMORY 0xffffffffU /* both halves of a length: there is no such region */

static bool is_live(const struct virtio_mmio *transport)
{
    return transport->state.status & VIRTIO_CONFIG_S_DRIVER_OK &&
           !(transport->state.status & VIRTIO_CONFIG_S_NEEDS_RESET);
}

static uint64_t offered(const struct virtio_mmio *transport)
{
    return transport->ops->features | VERSION_1;
}

/* NULL when the driver has selected one that there is not. */
static struct virtio_queue *selected(struct virtio_mmio *transport)
{
    uint32_t number = transport->state.queue_sel;

    return number < transport->ops->queue_count ? &transport->queues[number] : NULL;
}

static void reset(struct virtio_mmio *transport)
{
    uint32_t generation = transport->state.config_generation;

    transport->state = (struct virtio_mmio_state){.config_generation = generation};
    for (uint32_t i = 0; i < transport->ops->queue_count; i++)
        virtio_queue_reset(&transport->queues[i]);
    if (transport->ops->reset)
        transport->ops->reset(transport);
}

void virtio_mmio_open(struct virtio_mmio *transport, const struct guest_memory *memory)
{
    for (uint32_t i = 0; i < transport->ops->queue_count; i++)
        transport->queues[i] =
            (struct virtio_queue){.memory = memory, .size_max = transport->ops->queue_size};
    reset(transport);
}

/* ---- what devices say ---- */

static void interrupt(struct virtio_mmio *transport, uint32_t why)
{
    transport->state.interrupt_status |= why;
    transport->interrupt(transport->opaque);
}

void virtio_mmio_used(struct virtio_mmio *transport, uint32_t queue)
{
    if (virtio_queue_wants_interrupt(&transport->queues[queue]))
        interrupt(transport, VIRTIO_MMIO_INT_VRING);
}

void virtio_mmio_config_changed(struct virtio_mmio *transport)
{
    transport->state.config_generation++;
    if (is_live(transport))
        interrupt(transport, VIRTIO_MMIO_INT_CONFIG);
}

void virtio_mmio_needs_reset(struct virtio_mmio *transport)
{
    transport->state.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    interrupt(transport, VIRTIO_MMIO_INT_CONFIG);
}

/* ---- reading ---- */

static uint32_t read_features(const struct virtio_mmio *transport)
{
    uint32_t half = transport->state.device_features_sel;

    return half < 2 ? (uint32_t)(offered(transport) >> (32 * half)) : 0;
}

static uint32_t read_register(struct virtio_mmio *transport, uint32_t offset)
{
    const struct virtio_mmio_state *state = &transport->state;
    const struct virtio_queue *queue = selected(transport);

    switch (offset) {
    case VIRTIO_MMIO_MAGIC_VALUE: return MAGIC_VALUE;
    case VIRTIO_MMIO_VERSION: return 2;
    case VIRTIO_MMIO_DEVICE_ID: return transport->ops->device_id;
    case VIRTIO_MMIO_VENDOR_ID: return VENDOR;
    case VIRTIO_MMIO_DEVICE_FEATURES: return read_features(transport);
    case VIRTIO_MMIO_QUEUE_NUM_MAX: return queue ? queue->size_max : 0;
    case VIRTIO_MMIO_QUEUE_READY: return queue ? queue->state.ready : 0;
    case VIRTIO_MMIO_INTERRUPT_STATUS: return state->interrupt_status;
    case VIRTIO_MMIO_STATUS: return state->status;
    case VIRTIO_MMIO_SHM_LEN_LOW:
    case VIRTIO_MMIO_SHM_LEN_HIGH: return NO_SHARED_MEMORY;
    case VIRTIO_MMIO_CONFIG_GENERATION: return state->config_generation;
    default: return 0;
    }
}

uint32_t virtio_mmio_read(struct virtio_mmio *transport, uint32_t offset, uint32_t bytes)
{
    if (offset >= VIRTIO_MMIO_CONFIG)
        return transport->ops->config_read
                   ? transport->ops->config_read(transport, offset - VIRTIO_MMIO_CONFIG, bytes)
                   : 0;
    return bytes == sizeof(uint32_t) ? read_register(transport, offset) : 0;
}

/* ---- writing ---- */

static void set_half(uint64_t *whole, uint32_t half, uint32_t value)
{
    uint32_t shift = 32 * half;

    *whole = (*whole & ~(0xffffffffULL << shift)) | (uint64_t)value << shift;
}

/* Features are settled once FEATURES_OK is. */
static void write_features(struct virtio_mmio *transport, uint32_t value)
{
    struct virtio_mmio_state *state = &transport->state;

    if (state->driver_features_sel < 2 && !(state->status & VIRTIO_CONFIG_S_FEATURES_OK))
        set_half(&state->driver_features, state->driver_features_sel, value);
}

/* A driver sets bits, and takes none back but by a reset. FEATURES_OK stays off where it took what
 * was not offered, or is older than version 1. */
static void write_status(struct virtio_mmio *transport, uint32_t value)
{
    struct virtio_mmio_state *state = &transport->state;
    bool agreed =
        !(state->driver_features & ~offered(transport)) && state->driver_features & VERSION_1;

    if (value == 0) {
        reset(transport);
        return;
    }
    value &= 0xffU & ~VIRTIO_CONFIG_S_NEEDS_RESET; /* that one is ours to set */
    if (!agreed)
        value &= ~VIRTIO_CONFIG_S_FEATURES_OK;
    if (!((state->status | value) & VIRTIO_CONFIG_S_FEATURES_OK))
        value &= ~VIRTIO_CONFIG_S_DRIVER_OK;
    state->status |= value;
}

static void write_ready(struct virtio_mmio *transport, struct virtio_queue *queue, uint32_t value)
{
    if (value == 0)
        virtio_queue_reset(queue);
    else if (!queue->state.ready && virtio_queue_enable(queue) < 0)
        virtio_mmio_needs_reset(transport);
}

/* The selected queue's registers. A queue that is ready is not changed any more. */
static void write_queue(struct virtio_mmio *transport, uint32_t offset, uint32_t value)
{
    struct virtio_queue *queue = selected(transport);

    if (!queue)
        return;
    if (offset == VIRTIO_MMIO_QUEUE_READY) {
        write_ready(transport, queue, value);
        return;
    }
    if (queue->state.ready)
        return;
    switch (offset) {
    case VIRTIO_MMIO_QUEUE_NUM: queue->state.size = value; break;
    case VIRTIO_MMIO_QUEUE_DESC_LOW: set_half(&queue->state.desc, 0, value); break;
    case VIRTIO_MMIO_QUEUE_DESC_HIGH: set_half(&queue->state.desc, 1, value); break;
    case VIRTIO_MMIO_QUEUE_AVAIL_LOW: set_half(&queue->state.avail, 0, value); break;
    case VIRTIO_MMIO_QUEUE_AVAIL_HIGH: set_half(&queue->state.avail, 1, value); break;
    case VIRTIO_MMIO_QUEUE_USED_LOW: set_half(&queue->state.used, 0, value); break;
    case VIRTIO_MMIO_QUEUE_USED_HIGH: set_half(&queue->state.used, 1, value); break;
    default: break;
    }
}

static void notify(struct virtio_mmio *transport, uint32_t queue)
{
    if (!is_live(transport) || queue >= transport->ops->queue_count ||
        !transport->queues[queue].state.ready)
        return;
    transport->ops->notify(transport, queue);
    if (transport->queues[queue].state.broken)
        virtio_mmio_needs_reset(transport);
}

static void write_register(struct virtio_mmio *transport, uint32_t offset, uint32_t value)
{
    struct virtio_mmio_state *state = &transport->state;

    switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES_SEL: state->device_features_sel = value; break;
    case VIRTIO_MMIO_DRIVER_FEATURES_SEL: state->driver_features_sel = value; break;
    case VIRTIO_MMIO_DRIVER_FEATURES: write_features(transport, value); break;
    case VIRTIO_MMIO_QUEUE_SEL: state->queue_sel = value; break;
    case VIRTIO_MMIO_QUEUE_NOTIFY: notify(transport, value); break;
    case VIRTIO_MMIO_INTERRUPT_ACK: state->interrupt_status &= ~value; break;
    case VIRTIO_MMIO_STATUS: write_status(transport, value); break;
    default: write_queue(transport, offset, value); break;
    }
}

void virtio_mmio_write(struct virtio_mmio *transport, uint32_t offset, uint32_t bytes,
                       uint32_t value)
{
    if (offset < VIRTIO_MMIO_CONFIG) {
        if (bytes == sizeof(uint32_t))
            write_register(transport, offset, value);
    } else if (transport->ops->config_write) {
        transport->ops->config_write(transport, offset - VIRTIO_MMIO_CONFIG, bytes, value);
    }
}

/* ---- save and load ---- */

struct virtio_mmio_state virtio_mmio_save(const struct virtio_mmio *transport)
{
    struct virtio_mmio_state state = transport->state;

    for (uint32_t i = 0; i < transport->ops->queue_count; i++)
        state.queues[i] = transport->queues[i].state;
    return state;
}

int virtio_mmio_load(struct virtio_mmio *transport, const struct virtio_mmio_state *state)
{
    if (state->driver_features & ~offered(transport))
        return -EINVAL;
    transport->state = *state;
    for (uint32_t i = 0; i < transport->ops->queue_count; i++) {
        struct virtio_queue *queue = &transport->queues[i];

        queue->state = state->queues[i];
        if (queue->state.ready && virtio_queue_enable(queue) < 0)
            return -EINVAL;
    }
    return 0;
}
