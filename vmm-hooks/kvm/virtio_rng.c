/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio_rng.h"

#include <linux/virtio_ids.h>
#include <sys/random.h>

/* So much for one chain at most, or a guest could keep its vCPU's thread in here for long. A driver
 * has to live with less than it asked for. */
#define CHAIN_BYTES_MAX 4096U

/* Fills what the chain offers; returns how many bytes. getrandom() writes to guest memory as any
 * program does: where a page is frozen it waits. */
static uint32_t fill(const struct virtio_chain *chain)
{
    uint32_t filled = 0;

    for (uint32_t i = chain->readable; i < chain->readable + chain->writable; i++) {
        uint32_t room = CHAIN_BYTES_MAX - filled;
        uint32_t bytes = chain->buffers[i].bytes < room ? chain->buffers[i].bytes : room;
        ssize_t got = getrandom(chain->buffers[i].at, bytes, 0);

        if (got <= 0)
            break;
        filled += (uint32_t)got;
    }
    return filled;
}

/* A turn is bounded by the queue's size: a guest that adds while we take must notify again. */
static void notify(struct virtio_mmio *transport, uint32_t queue)
{
    struct virtio_queue *from = &transport->queues[queue];
    struct virtio_chain chain;
    uint32_t done = 0;

    while (done < from->state.size && virtio_queue_pop(from, &chain) > 0) {
        virtio_queue_push(from, chain.head, fill(&chain));
        done++;
    }
    if (done)
        virtio_mmio_used(transport, queue);
}

const struct virtio_device_ops virtio_rng_ops = {
    .device_id = VIRTIO_ID_RNG,
    .queue_count = 1,
    .queue_size = 64,
    .notify = notify,
};
