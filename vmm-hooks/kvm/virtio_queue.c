/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio_queue.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <string.h>

/* The avail and the used ring begin with two 16-bit words: flags and index. */
#define RING_INDEX_AT   2U
#define RING_ENTRIES_AT 4U

void virtio_queue_reset(struct virtio_queue *queue)
{
    queue->state = (struct virtio_queue_state){.size = queue->size_max};
}

/* Where the rings are; NULL is not possible once the queue is ready, since RAM stays where it is.
 */
static void *ring_at(const struct virtio_queue *queue, uint64_t ring, uint64_t offset,
                     uint64_t bytes)
{
    return memory_at(queue->memory, ring + offset, bytes);
}

static bool ring_fits(const struct virtio_queue *queue, uint64_t ring, uint64_t align,
                      uint64_t bytes)
{
    return ring % align == 0 && memory_at(queue->memory, ring, bytes);
}

int virtio_queue_enable(struct virtio_queue *queue)
{
    struct virtio_queue_state *state = &queue->state;
    uint64_t size = state->size;

    state->ready = false;
    if (size == 0 || size > queue->size_max || (size & (size - 1)) != 0)
        return -EINVAL;
    if (!ring_fits(queue, state->desc, 16, size * sizeof(struct vring_desc)) ||
        !ring_fits(queue, state->avail, 2, RING_ENTRIES_AT + size * 2 + 2) ||
        !ring_fits(queue, state->used, 4,
                   RING_ENTRIES_AT + size * sizeof(struct vring_used_elem) + 2))
        return -EINVAL;
    state->ready = true;
    return 0;
}

static uint16_t avail_word(const struct virtio_queue *queue, uint64_t offset)
{
    const uint16_t *word = ring_at(queue, queue->state.avail, offset, sizeof(*word));

    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* One copy, of which everything is then decided. */
static struct vring_desc read_desc(const struct virtio_queue *queue, uint16_t index)
{
    struct vring_desc desc;

    memcpy(&desc, ring_at(queue, queue->state.desc, index * sizeof(desc), sizeof(desc)),
           sizeof(desc));
    __asm__ volatile("" : : : "memory");
    return desc;
}

/* False when the descriptor can't be part of a chain that has come so far. */
static bool add_buffer(const struct virtio_queue *queue, const struct vring_desc *desc,
                       struct virtio_chain *chain)
{
    uint32_t count = chain->readable + chain->writable;
    bool writable = desc->flags & VRING_DESC_F_WRITE;
    uint8_t *at = memory_at(queue->memory, desc->addr, desc->len);

    if (count >= queue->state.size || desc->len == 0 || !at)
        return false;
    if (desc->flags & ~(VRING_DESC_F_NEXT | VRING_DESC_F_WRITE))
        return false;
    if (!writable && chain->writable)
        return false; /* what is read comes first */
    chain->buffers[count] = (struct virtio_buffer){at, desc->len};
    if (writable)
        chain->writable++;
    else
        chain->readable++;
    return true;
}

static bool read_chain(const struct virtio_queue *queue, uint16_t index, struct virtio_chain *chain)
{
    struct vring_desc desc;

    do {
        if (index >= queue->state.size)
            return false;
        desc = read_desc(queue, index);
        if (!add_buffer(queue, &desc, chain))
            return false;
        index = desc.next;
    } while (desc.flags & VRING_DESC_F_NEXT);
    return true;
}

int virtio_queue_pop(struct virtio_queue *queue, struct virtio_chain *ret_chain)
{
    struct virtio_queue_state *state = &queue->state;
    uint16_t waiting;

    if (!state->ready || state->broken)
        return 0;
    waiting = (uint16_t)(avail_word(queue, RING_INDEX_AT) - state->next_avail);
    if (waiting == 0)
        return 0;
    ret_chain->readable = 0;
    ret_chain->writable = 0;
    ret_chain->head =
        avail_word(queue, RING_ENTRIES_AT + state->next_avail % state->size * sizeof(uint16_t));
    if (waiting > state->size || !read_chain(queue, ret_chain->head, ret_chain)) {
        state->broken = true;
        return -EPROTO;
    }
    state->next_avail++;
    return 1;
}

void virtio_queue_push(struct virtio_queue *queue, uint16_t head, uint32_t bytes)
{
    struct virtio_queue_state *state = &queue->state;
    struct vring_used_elem element = {.id = head, .len = bytes};
    uint64_t place = RING_ENTRIES_AT + state->next_used % state->size * sizeof(element);
    uint16_t *index = ring_at(queue, state->used, RING_INDEX_AT, sizeof(*index));

    memcpy(ring_at(queue, state->used, place, sizeof(element)), &element, sizeof(element));
    state->next_used++;
    __atomic_store_n(index, state->next_used, __ATOMIC_RELEASE);
}

bool virtio_queue_wants_interrupt(const struct virtio_queue *queue)
{
    return !(avail_word(queue, 0) & VRING_AVAIL_F_NO_INTERRUPT);
}
