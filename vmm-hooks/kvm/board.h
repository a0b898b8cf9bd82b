/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The board: what answers when the guest reads or writes a port or an address that is no RAM.
 * Accesses to nothing read as ones and write nothing, as on a bus.
 */
#ifndef MEMVM_BOARD_H
#define MEMVM_BOARD_H

#include <pthread.h>
#include <stdbool.h>

#include "serial.h"
#include "virtio_mmio.h"

#define BOARD_MAX_VIRTIO 4U

struct machine;
struct vcpu;

struct board {
    pthread_mutex_t lock; /* of all devices; taken before the machine's */
    struct serial serial;
    uint32_t virtio_count;
    struct virtio_mmio virtio[BOARD_MAX_VIRTIO];
};

/* What is saved. */
struct board_state {
    struct serial serial;
    struct virtio_mmio_state virtio[BOARD_MAX_VIRTIO];
};

/* An empty board but for the serial port, which writes to `serial_fd`. */
void board_open(struct machine *machine, int serial_fd);
void board_add_virtio(struct machine *machine, const struct virtio_device_ops *ops);

/* An access by this vCPU, in its thread. `data` holds `bytes` bytes. */
void board_port(struct vcpu *cpu, uint16_t port, bool write, uint8_t *data, uint32_t bytes);
void board_mmio(struct vcpu *cpu, uint64_t address, bool write, uint8_t *data, uint32_t bytes);

/* Input for the serial port. Returns how much there is still room for. */
size_t board_input(struct machine *machine, const char *bytes, size_t count);

/* Only while the machine does not run. board_load: 0, or -EINVAL: parts of it may be in place. */
void board_save(struct machine *machine, struct board_state *ret_state);
int board_load(struct machine *machine, const struct board_state *state);

#endif
