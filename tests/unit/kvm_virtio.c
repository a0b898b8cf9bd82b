/* SPDX-License-Identifier: Apache-2.0 */
/* memvm's virtio transport against drivers that lie. RAM is real, and as small as it may be, so
 * that an address that was not checked is a crash. */
#include <criterion/criterion.h>
#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "virtio_mmio.h"
#include "virtio_rng.h"

#define RAM_BYTES   0x10000UL
#define DESC_AT     0x1000UL
#define AVAIL_AT    0x2000UL
#define USED_AT     0x3000UL
#define BUFFER_AT   0x4000UL
#define SIZE        8U
#define VERSION_1   (1U << (VIRTIO_F_VERSION_1 - 32))
#define DRIVER_BITS (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER)

static struct guest_memory memory;
static struct virtio_mmio transport;
static struct virtio_queue queue;
static struct virtio_chain chain;
static uint32_t interrupts;

static void on_interrupt(void *opaque)
{
    (void)opaque;
    interrupts++;
}

static void write_register(uint32_t offset, uint32_t value)
{
    virtio_mmio_write(&transport, offset, 4, value);
}

static uint32_t read_register(uint32_t offset)
{
    return virtio_mmio_read(&transport, offset, 4);
}

static void set_up(void)
{
    cr_assert(memory_open(&memory, RAM_BYTES) == 0);
    transport = (struct virtio_mmio){.ops = &virtio_rng_ops, .interrupt = on_interrupt};
    virtio_mmio_open(&transport, &memory);
    queue = (struct virtio_queue){.memory = &memory, .size_max = SIZE};
    virtio_queue_reset(&queue);
    queue.state.desc = DESC_AT;
    queue.state.avail = AVAIL_AT;
    queue.state.used = USED_AT;
    interrupts = 0;
}

static void tear_down(void)
{
    munmap(memory.base, memory.bytes);
}

TestSuite(virtio, .init = set_up, .fini = tear_down);

/* ---- the driver's side ---- */

static struct vring_desc *desc(uint32_t index)
{
    return (struct vring_desc *)(memory.base + DESC_AT) + index;
}

static uint16_t *avail(uint32_t word)
{
    return (uint16_t *)(memory.base + AVAIL_AT) + word;
}

static struct vring_used *used(void)
{
    return (struct vring_used *)(memory.base + USED_AT);
}

static void put(uint32_t index, uint64_t address, uint32_t bytes, uint16_t flags, uint16_t next)
{
    *desc(index) = (struct vring_desc){address, bytes, flags, next};
}

/* Makes the chain that begins at `head` the next one. */
static void offer(uint16_t head)
{
    *avail(2 + *avail(1) % SIZE) = head;
    ++*avail(1);
}

static int pop_offered(uint16_t head)
{
    cr_assert(virtio_queue_enable(&queue) == 0);
    offer(head);
    return virtio_queue_pop(&queue, &chain);
}

static bool is_broken_by(uint16_t head)
{
    bool refused = pop_offered(head) == -EPROTO;

    /* And stays so, whatever comes next. */
    put(0, BUFFER_AT, 8, 0, 0);
    offer(0);
    return refused && queue.state.broken && virtio_queue_pop(&queue, &chain) == 0;
}

/* ---- queues ---- */

Test(virtio, good_chain_comes_as_it_was_put)
{
    put(3, BUFFER_AT, 16, VRING_DESC_F_NEXT, 5);
    put(5, BUFFER_AT + 16, 32, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
    put(1, RAM_BYTES - 8, 8, VRING_DESC_F_WRITE, 0);
    cr_expect(pop_offered(3) == 1);
    cr_expect(chain.head == 3 && chain.readable == 1 && chain.writable == 2);
    cr_expect(chain.buffers[0].at == memory.base + BUFFER_AT && chain.buffers[0].bytes == 16);
    cr_expect(chain.buffers[2].at == memory.base + RAM_BYTES - 8);
    virtio_queue_push(&queue, chain.head, 40);
    cr_expect(used()->idx == 1 && used()->ring[0].id == 3 && used()->ring[0].len == 40);
    cr_expect(virtio_queue_pop(&queue, &chain) == 0);
}

Test(virtio, indices_wrap_around)
{
    put(0, BUFFER_AT, 8, 0, 0);
    cr_assert(virtio_queue_enable(&queue) == 0);
    for (uint32_t i = 0; i < 70000; i++) {
        offer(0);
        cr_assert(virtio_queue_pop(&queue, &chain) == 1);
        virtio_queue_push(&queue, chain.head, 0);
    }
    cr_expect(used()->idx == (uint16_t)70000);
    cr_expect(virtio_queue_pop(&queue, &chain) == 0);
}

Test(virtio, chain_that_is_a_loop)
{
    put(0, BUFFER_AT, 8, VRING_DESC_F_NEXT, 1);
    put(1, BUFFER_AT, 8, VRING_DESC_F_NEXT, 0);
    cr_expect(is_broken_by(0));
}

Test(virtio, descriptor_that_follows_itself)
{
    put(7, BUFFER_AT, 8, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 7);
    cr_expect(is_broken_by(7));
}

Test(virtio, head_that_is_no_descriptor)
{
    cr_expect(is_broken_by(SIZE));
}

Test(virtio, next_that_is_no_descriptor)
{
    put(0, BUFFER_AT, 8, VRING_DESC_F_NEXT, 0xffff);
    cr_expect(is_broken_by(0));
}

Test(virtio, buffers_that_are_not_in_ram)
{
    static const struct {
        uint64_t address;
        uint32_t bytes;
    } cases[] = {
        {RAM_BYTES, 1},          {RAM_BYTES - 1, 2}, {0, RAM_BYTES + 1}, {UINT64_MAX, 1},
        {UINT64_MAX - 3, 8},     {1ULL << 63, 1},    {0, UINT32_MAX},    {BUFFER_AT, 0},
        {0xffffffff00000000, 8}, {RAM_BYTES, 0},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        virtio_queue_reset(&queue);
        queue.state.desc = DESC_AT;
        queue.state.avail = AVAIL_AT;
        queue.state.used = USED_AT;
        *avail(1) = 0;
        put(2, cases[i].address, cases[i].bytes, VRING_DESC_F_WRITE, 0);
        cr_expect(is_broken_by(2), "case %zu", i);
    }
}

Test(virtio, indirect_descriptor_was_not_offered)
{
    put(0, BUFFER_AT, 64, VRING_DESC_F_INDIRECT, 0);
    cr_expect(is_broken_by(0));
}

Test(virtio, readable_buffer_behind_a_writable_one)
{
    put(0, BUFFER_AT, 8, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
    put(1, BUFFER_AT, 8, 0, 0);
    cr_expect(is_broken_by(0));
}

Test(virtio, more_chains_than_the_queue_has_room_for)
{
    put(0, BUFFER_AT, 8, 0, 0);
    *avail(1) = SIZE;
    cr_expect(is_broken_by(0));
}

Test(virtio, rings_that_can_not_be)
{
    static const struct {
        uint64_t desc, avail, used;
        uint32_t size;
    } cases[] = {
        {DESC_AT, AVAIL_AT, USED_AT, 0},           {DESC_AT, AVAIL_AT, USED_AT, 3},
        {DESC_AT, AVAIL_AT, USED_AT, 2 * SIZE},    {DESC_AT, AVAIL_AT, USED_AT, 0x80000000},
        {DESC_AT + 8, AVAIL_AT, USED_AT, SIZE},    {DESC_AT, AVAIL_AT + 1, USED_AT, SIZE},
        {DESC_AT, AVAIL_AT, USED_AT + 2, SIZE},    {RAM_BYTES - 16, AVAIL_AT, USED_AT, SIZE},
        {DESC_AT, RAM_BYTES - 20, USED_AT, SIZE},  {DESC_AT, AVAIL_AT, RAM_BYTES - 68, SIZE},
        {DESC_AT, AVAIL_AT, UINT64_MAX - 3, SIZE}, {1ULL << 40, AVAIL_AT, USED_AT, SIZE},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        queue.state = (struct virtio_queue_state){.desc = cases[i].desc,
                                                  .avail = cases[i].avail,
                                                  .used = cases[i].used,
                                                  .size = cases[i].size};
        cr_expect(virtio_queue_enable(&queue) == -EINVAL, "case %zu", i);
        cr_expect(!queue.state.ready && virtio_queue_pop(&queue, &chain) == 0, "case %zu", i);
    }
}

/* ---- the transport, with the entropy device on it ---- */

static void negotiate(void)
{
    write_register(VIRTIO_MMIO_STATUS, DRIVER_BITS);
    write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    write_register(VIRTIO_MMIO_DRIVER_FEATURES, VERSION_1);
    write_register(VIRTIO_MMIO_STATUS, DRIVER_BITS | VIRTIO_CONFIG_S_FEATURES_OK);
}

static void open_queue(uint64_t used_at)
{
    write_register(VIRTIO_MMIO_QUEUE_SEL, 0);
    write_register(VIRTIO_MMIO_QUEUE_NUM, SIZE);
    write_register(VIRTIO_MMIO_QUEUE_DESC_LOW, DESC_AT);
    write_register(VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAIL_AT);
    write_register(VIRTIO_MMIO_QUEUE_USED_LOW, (uint32_t)used_at);
    write_register(VIRTIO_MMIO_QUEUE_USED_HIGH, (uint32_t)(used_at >> 32));
    write_register(VIRTIO_MMIO_QUEUE_READY, 1);
    write_register(VIRTIO_MMIO_STATUS,
                   DRIVER_BITS | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
}

Test(virtio, entropy_comes_and_is_told)
{
    static const uint8_t zeros[64];

    negotiate();
    open_queue(USED_AT);
    put(0, BUFFER_AT, sizeof(zeros), VRING_DESC_F_WRITE, 0);
    offer(0);
    write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    cr_expect(used()->idx == 1 && used()->ring[0].len == sizeof(zeros));
    cr_expect(memcmp(memory.base + BUFFER_AT, zeros, sizeof(zeros)) != 0);
    cr_expect(memcmp(memory.base + BUFFER_AT + sizeof(zeros), zeros, 8) == 0);
    cr_expect(interrupts == 1 && read_register(VIRTIO_MMIO_INTERRUPT_STATUS) == 1);
    write_register(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    cr_expect(read_register(VIRTIO_MMIO_INTERRUPT_STATUS) == 0);
}

Test(virtio, broken_queue_asks_for_a_reset_and_lives_after_it)
{
    negotiate();
    open_queue(USED_AT);
    offer(SIZE);
    write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    cr_expect(read_register(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET);
    cr_expect(used()->idx == 0);
    write_register(VIRTIO_MMIO_STATUS, 0);
    cr_expect(read_register(VIRTIO_MMIO_STATUS) == 0 &&
              read_register(VIRTIO_MMIO_QUEUE_READY) == 0);
    memset(memory.base, 0, memory.bytes);
    negotiate();
    open_queue(USED_AT);
    put(0, BUFFER_AT, 8, VRING_DESC_F_WRITE, 0);
    offer(0);
    write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    cr_expect(used()->idx == 1);
}

Test(virtio, queue_outside_of_ram_is_not_ready)
{
    negotiate();
    open_queue(1ULL << 33);
    cr_expect(read_register(VIRTIO_MMIO_QUEUE_READY) == 0);
    cr_expect(read_register(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET);
    write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
}

Test(virtio, ready_queue_stays_where_it_is)
{
    negotiate();
    open_queue(USED_AT);
    write_register(VIRTIO_MMIO_QUEUE_USED_HIGH, 1);
    write_register(VIRTIO_MMIO_QUEUE_NUM, 0);
    write_register(VIRTIO_MMIO_QUEUE_READY, 1);
    put(0, BUFFER_AT, 8, VRING_DESC_F_WRITE, 0);
    offer(0);
    write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    cr_expect(used()->idx == 1);
}

Test(virtio, driver_takes_what_was_not_offered)
{
    write_register(VIRTIO_MMIO_STATUS, DRIVER_BITS);
    write_register(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    write_register(VIRTIO_MMIO_DRIVER_FEATURES, 1U << 28);
    negotiate();
    cr_expect(!(read_register(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_FEATURES_OK));
    open_queue(USED_AT);
    cr_expect(!(read_register(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_DRIVER_OK));
    put(0, BUFFER_AT, 8, VRING_DESC_F_WRITE, 0);
    offer(0);
    write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    cr_expect(used()->idx == 0, "a device that was not agreed upon is at work");
}

Test(virtio, queues_and_registers_that_there_are_not)
{
    negotiate();
    open_queue(USED_AT);
    write_register(VIRTIO_MMIO_QUEUE_SEL, UINT32_MAX);
    cr_expect(read_register(VIRTIO_MMIO_QUEUE_NUM_MAX) == 0);
    write_register(VIRTIO_MMIO_QUEUE_READY, 1);
    write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    write_register(VIRTIO_MMIO_QUEUE_NOTIFY, UINT32_MAX);
    for (uint32_t offset = 0; offset < 0x200; offset++)
        for (uint32_t bytes = 1; bytes <= 4; bytes *= 2)
            if (offset != VIRTIO_MMIO_STATUS) {
                virtio_mmio_write(&transport, offset, bytes, 0xffffffff);
                virtio_mmio_read(&transport, offset, bytes);
            }
    cr_expect(read_register(VIRTIO_MMIO_MAGIC_VALUE) == 0x74726976);
    cr_expect(virtio_mmio_read(&transport, VIRTIO_MMIO_MAGIC_VALUE, 1) == 0);
}

Test(virtio, saved_state_that_lies_is_refused)
{
    struct virtio_mmio_state state;

    negotiate();
    open_queue(USED_AT);
    state = virtio_mmio_save(&transport);
    cr_expect(virtio_mmio_load(&transport, &state) == 0);
    cr_expect(transport.queues[0].state.ready);
    state.queues[0].used = RAM_BYTES;
    cr_expect(virtio_mmio_load(&transport, &state) == -EINVAL);
    state = virtio_mmio_save(&transport);
    state.queues[0].ready = 1;
    state.queues[0].size = 1U << 31;
    cr_expect(virtio_mmio_load(&transport, &state) == -EINVAL);
}

/* Everything in the rings at random, for a while: nothing but a reset is ever asked for. */
Test(virtio, random_rings_do_no_harm)
{
    srandom(20);
    for (uint32_t round = 0; round < 20000; round++) {
        write_register(VIRTIO_MMIO_STATUS, 0);
        for (uint32_t i = 0; i < SIZE; i++)
            put(i, (uint64_t)random() % (RAM_BYTES * 5 / 4), (uint32_t)random() % 0x1800,
                (uint16_t)(random() % 4), (uint16_t)(random() % (SIZE + 1)));
        memset(avail(0), 0, 64);
        memset(used(), 0, 128);
        negotiate();
        open_queue(USED_AT);
        for (uint32_t i = 0; i < 4; i++)
            offer((uint16_t)(random() % (SIZE + 1)));
        write_register(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        cr_assert(transport.queues[0].state.next_used <= 4);
    }
}
