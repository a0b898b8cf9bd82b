/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio.h"

#include "machine.h"

enum registers {
    MAGIC = 0x00,
    VERSION = 0x04,
    DEVICE_ID = 0x08,
    DEVICE_FEATURES = 0x10,
    DEVICE_FEATURES_SEL = 0x14,
    DRIVER_FEATURES = 0x20,
    DRIVER_FEATURES_SEL = 0x24,
    QUEUE_SEL = 0x30,
    QUEUE_NUM_MAX = 0x34,
    QUEUE_NUM = 0x38,
    QUEUE_READY = 0x44,
    QUEUE_NOTIFY = 0x50,
    INTERRUPT_STATUS = 0x60,
    INTERRUPT_ACK = 0x64,
    STATUS = 0x70,
    QUEUE_DESC = 0x80,
    QUEUE_DRIVER = 0x90,
    QUEUE_DEVICE = 0xa0,
};

#define MAGIC_VALUE        0x74726976U /* "virt" */
#define STATUS_ACKNOWLEDGE 1U
#define STATUS_DRIVER      2U
#define STATUS_DRIVER_OK   4U
#define STATUS_FEATURES_OK 8U
#define FEATURE_VERSION_1  1U /* bit 32 */
#define DESC_WRITE         2U
#define WAIT_US            10000U

uint64_t virtio_find(uint32_t device_id, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t device = ADDRESS_VIRTIO + i * ADDRESS_VIRTIO_BYTES;

        if (device_read(device + MAGIC) == MAGIC_VALUE && device_read(device + VERSION) == 2 &&
            device_read(device + DEVICE_ID) == device_id)
            return device;
    }
    return 0;
}

static void set_address(uint64_t device, uint32_t reg, const volatile void *address)
{
    device_write(device + reg, (uint32_t)(uintptr_t)address);
    device_write(device + reg + 4, (uint32_t)((uint64_t)(uintptr_t)address >> 32));
}

static bool negotiate(uint64_t device)
{
    uint32_t status = STATUS_ACKNOWLEDGE | STATUS_DRIVER;

    device_write(device + STATUS, 0);
    device_write(device + STATUS, STATUS_ACKNOWLEDGE);
    device_write(device + STATUS, status);
    device_write(device + DEVICE_FEATURES_SEL, 1);
    if (!(device_read(device + DEVICE_FEATURES) & FEATURE_VERSION_1))
        return false;
    device_write(device + DRIVER_FEATURES_SEL, 0);
    device_write(device + DRIVER_FEATURES, 0);
    device_write(device + DRIVER_FEATURES_SEL, 1);
    device_write(device + DRIVER_FEATURES, FEATURE_VERSION_1);
    device_write(device + STATUS, status | STATUS_FEATURES_OK);
    return device_read(device + STATUS) & STATUS_FEATURES_OK;
}

bool virtio_open(uint64_t device, struct virtio_queue *queue)
{
    if (!negotiate(device))
        return false;
    queue->device = device;
    device_write(device + QUEUE_SEL, queue->index);
    if (device_read(device + QUEUE_READY) ||
        device_read(device + QUEUE_NUM_MAX) < VIRTIO_QUEUE_SIZE)
        return false;
    device_write(device + QUEUE_NUM, VIRTIO_QUEUE_SIZE);
    set_address(device, QUEUE_DESC, queue->desc);
    set_address(device, QUEUE_DRIVER, &queue->avail);
    set_address(device, QUEUE_DEVICE, &queue->used);
    device_write(device + QUEUE_READY, 1);
    device_write(device + STATUS,
                 STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
    return device_read(device + QUEUE_READY) == 1;
}

bool virtio_receive(struct virtio_queue *queue, void *buffer, uint32_t bytes, uint32_t *ret_bytes)
{
    uint16_t before = __atomic_load_n(&queue->used.index, __ATOMIC_ACQUIRE);
    uint16_t place = queue->avail.index % VIRTIO_QUEUE_SIZE;

    queue->desc[0] = (struct virtio_desc){(uint64_t)(uintptr_t)buffer, bytes, DESC_WRITE, 0};
    queue->avail.ring[place] = 0;
    __atomic_store_n(&queue->avail.index, (uint16_t)(queue->avail.index + 1), __ATOMIC_SEQ_CST);
    device_write(queue->device + QUEUE_NOTIFY, queue->index);
    while (__atomic_load_n(&queue->used.index, __ATOMIC_ACQUIRE) == before)
        rest_us(WAIT_US);
    device_write(queue->device + INTERRUPT_ACK, device_read(queue->device + INTERRUPT_STATUS));
    place = before % VIRTIO_QUEUE_SIZE;
    if ((uint16_t)(before + 1) != queue->used.index || queue->used.ring[place].id != 0 ||
        queue->used.ring[place].bytes > bytes)
        return false;
    *ret_bytes = queue->used.ring[place].bytes;
    return true;
}
