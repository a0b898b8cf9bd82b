/* SPDX-License-Identifier: Apache-2.0 */
#include "board.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "hook.h"
#include "machine.h"

#define FIRST_CPU 0U /* the one that devices wake */

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static void on_interrupt(void *opaque)
{
    machine_wake(opaque, FIRST_CPU);
}

void board_open(struct machine *machine, int serial_fd)
{
    pthread_mutex_init(&machine->board.lock, NULL);
    machine->board.serial.out_fd = serial_fd;
}

void board_add_virtio(struct machine *machine, const struct virtio_device_ops *ops)
{
    struct virtio_mmio *transport = &machine->board.virtio[machine->board.virtio_count++];

    transport->ops = ops;
    transport->interrupt = on_interrupt;
    transport->opaque = machine;
    virtio_mmio_open(transport, &machine->memory);
}

/* ---- ports ---- */

static void set_alarm(struct vcpu *cpu, uint32_t us)
{
    pthread_mutex_lock(&cpu->machine->lock);
    cpu->alarm = now_ns() + us * 1000ULL;
    pthread_mutex_unlock(&cpu->machine->lock);
}

/* The guest has no use for this page any more: memd and the host get it back. */
static void give_up(struct machine *machine, uint64_t page)
{
    uint8_t *at = memory_at(&machine->memory, page * MEMORY_PAGE_BYTES, MEMORY_PAGE_BYTES);

    if (at)
        hook_discard(machine, at, MEMORY_PAGE_BYTES);
}

static void write_own_port(struct vcpu *cpu, uint16_t port, uint32_t value)
{
    switch (port) {
    case PORT_ALARM: set_alarm(cpu, value); break;
    case PORT_GIVE_UP: give_up(cpu->machine, value); break;
    case PORT_OFF: machine_end(cpu->machine, (int)(value & 0x7f)); break;
    default: break;
    }
}

static void access_serial(struct board *board, uint32_t port, bool write, uint8_t *data)
{
    pthread_mutex_lock(&board->lock);
    if (write)
        serial_write(&board->serial, port, *data);
    else
        *data = serial_read(&board->serial, port);
    pthread_mutex_unlock(&board->lock);
}

void board_port(struct vcpu *cpu, uint16_t port, bool write, uint8_t *data, uint32_t bytes)
{
    uint32_t value = 0;

    if (port >= PORT_SERIAL && port < PORT_SERIAL + SERIAL_PORTS && bytes == 1) {
        access_serial(&cpu->machine->board, port - PORT_SERIAL, write, data);
    } else if (write) {
        memcpy(&value, data, bytes);
        write_own_port(cpu, port, value);
    } else if (port == PORT_CLOCK) {
        value = (uint32_t)(now_ns() / 1000);
        memcpy(data, &value, bytes);
    } else {
        memset(data, 0xff, bytes);
    }
}

/* ---- addresses ---- */

void board_mmio(struct vcpu *cpu, uint64_t address, bool write, uint8_t *data, uint32_t bytes)
{
    struct board *board = &cpu->machine->board;
    uint64_t number = (address - ADDRESS_VIRTIO) / ADDRESS_VIRTIO_BYTES;
    uint32_t offset = (uint32_t)((address - ADDRESS_VIRTIO) % ADDRESS_VIRTIO_BYTES);
    uint32_t value = 0;

    if (address < ADDRESS_VIRTIO || number >= board->virtio_count || bytes > sizeof(value)) {
        if (!write)
            memset(data, 0xff, bytes);
        return;
    }
    pthread_mutex_lock(&board->lock);
    if (write) {
        memcpy(&value, data, bytes);
        virtio_mmio_write(&board->virtio[number], offset, bytes, value);
    } else {
        value = virtio_mmio_read(&board->virtio[number], offset, bytes);
        memcpy(data, &value, bytes);
    }
    pthread_mutex_unlock(&board->lock);
}

/* ---- input, save, load ---- */

size_t board_input(struct machine *machine, const char *bytes, size_t count)
{
    size_t room;

    pthread_mutex_lock(&machine->board.lock);
    serial_give(&machine->board.serial, bytes, count);
    room = serial_room(&machine->board.serial);
    pthread_mutex_unlock(&machine->board.lock);
    if (count)
        machine_wake(machine, FIRST_CPU);
    return room;
}

void board_save(struct machine *machine, struct board_state *ret_state)
{
    struct board *board = &machine->board;

    pthread_mutex_lock(&board->lock);
    memset(ret_state, 0, sizeof(*ret_state));
    ret_state->serial = board->serial;
    ret_state->serial.out_fd = -1;
    for (uint32_t i = 0; i < board->virtio_count; i++)
        ret_state->virtio[i] = virtio_mmio_save(&board->virtio[i]);
    pthread_mutex_unlock(&board->lock);
}

static bool is_serial(const struct serial *serial)
{
    return serial->input_at < SERIAL_INPUT_BYTES && serial->input_count <= SERIAL_INPUT_BYTES;
}

int board_load(struct machine *machine, const struct board_state *state)
{
    struct board *board = &machine->board;
    int out_fd = board->serial.out_fd;
    int r = is_serial(&state->serial) ? 0 : -EINVAL;

    pthread_mutex_lock(&board->lock);
    if (r == 0) {
        board->serial = state->serial;
        board->serial.out_fd = out_fd;
    }
    for (uint32_t i = 0; r == 0 && i < board->virtio_count; i++)
        r = virtio_mmio_load(&board->virtio[i], &state->virtio[i]);
    pthread_mutex_unlock(&board->lock);
    return r;
}
