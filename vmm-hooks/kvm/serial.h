/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A 16550 serial port: what the guest writes goes to a descriptor at once, what we are given waits
 * in a queue until the guest reads it. It is always ready to send, and raises no interrupt.
 *
 * All calls under the board's lock.
 */
#ifndef MEMVM_SERIAL_H
#define MEMVM_SERIAL_H

#include <stddef.h>
#include <stdint.h>

#define SERIAL_INPUT_BYTES 4096U
#define SERIAL_PORTS       8U

/* Saved as it is, but for the descriptor. */
struct serial {
    int out_fd;
    uint8_t interrupt_enable, line_control, modem_control, scratch;
    uint16_t divisor;
    uint32_t input_at, input_count;
    uint8_t input[SERIAL_INPUT_BYTES];
};

uint8_t serial_read(struct serial *serial, uint32_t port);
void serial_write(struct serial *serial, uint32_t port, uint8_t value);

/* How many bytes serial_give() would take. */
size_t serial_room(const struct serial *serial);
void serial_give(struct serial *serial, const char *bytes, size_t count);

#endif
