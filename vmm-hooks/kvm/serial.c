/* SPDX-License-Identifier: Apache-2.0 */
#include "serial.h"

#include <errno.h>
#include <linux/serial_reg.h>
#include <stdbool.h>
#include <unistd.h>

static bool shows_divisor(const struct serial *serial)
{
    return serial->line_control & UART_LCR_DLAB;
}

static uint8_t take_input(struct serial *serial)
{
    uint8_t byte;

    if (serial->input_count == 0)
        return 0;
    byte = serial->input[serial->input_at];
    serial->input_at = (serial->input_at + 1) % SERIAL_INPUT_BYTES;
    serial->input_count--;
    return byte;
}

uint8_t serial_read(struct serial *serial, uint32_t port)
{
    bool divisor = shows_divisor(serial);

    switch (port) {
    case UART_RX: return divisor ? (uint8_t)serial->divisor : take_input(serial);
    case UART_IER: return divisor ? (uint8_t)(serial->divisor >> 8) : serial->interrupt_enable;
    case UART_IIR: return UART_IIR_NO_INT;
    case UART_LCR: return serial->line_control;
    case UART_MCR: return serial->modem_control;
    case UART_LSR: return UART_LSR_THRE | UART_LSR_TEMT | (serial->input_count ? UART_LSR_DR : 0);
    case UART_MSR: return UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS;
    default: return serial->scratch;
    }
}

/* What nobody takes any more (a closed pipe) is lost, as on a cable that was pulled. */
static void put(const struct serial *serial, uint8_t byte)
{
    while (write(serial->out_fd, &byte, 1) < 0 && errno == EINTR)
        ;
}

static void set_divisor_byte(struct serial *serial, uint32_t shift, uint8_t value)
{
    serial->divisor = (uint16_t)((serial->divisor & ~(0xffU << shift)) | (uint32_t)value << shift);
}

void serial_write(struct serial *serial, uint32_t port, uint8_t value)
{
    bool divisor = shows_divisor(serial);

    switch (port) {
    case UART_TX:
        if (divisor)
            set_divisor_byte(serial, 0, value);
        else
            put(serial, value);
        break;
    case UART_IER:
        if (divisor)
            set_divisor_byte(serial, 8, value);
        else
            serial->interrupt_enable = value & 0x0f;
        break;
    case UART_LCR: serial->line_control = value; break;
    case UART_MCR: serial->modem_control = value & 0x1f; break;
    case UART_SCR: serial->scratch = value; break;
    default: break;
    }
}

size_t serial_room(const struct serial *serial)
{
    return SERIAL_INPUT_BYTES - serial->input_count;
}

void serial_give(struct serial *serial, const char *bytes, size_t count)
{
    for (size_t i = 0; i < count && serial_room(serial) > 0; i++) {
        serial->input[(serial->input_at + serial->input_count) % SERIAL_INPUT_BYTES] =
            (uint8_t)bytes[i];
        serial->input_count++;
    }
}
