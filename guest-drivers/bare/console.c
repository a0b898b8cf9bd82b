/* SPDX-License-Identifier: Apache-2.0 */
#include "console.h"

#include <stdarg.h>
#include <stdbool.h>

#include "machine.h"

#define LINE_STATUS       (PORT_SERIAL + 5U)
#define LINE_HAS_INPUT    0x01U
#define EXCEPTIONS        32U
#define GATE_INTERRUPT    0x8e00U /* present, 64-bit interrupt gate */
#define CODE_SELECTOR     0x08U
#define LINE_BYTES        256U
#define DECIMAL_DIGITS    20U
#define HEXADECIMAL_CHARS 16U

struct gate {
    uint16_t offset_low;
    uint16_t selector;
    uint16_t type;
    uint16_t offset_middle;
    uint32_t offset_high;
    uint32_t reserved;
};

extern struct gate idt[EXCEPTIONS];
extern const uint64_t gates[EXCEPTIONS];

static uint32_t speaking; /* 1: a vCPU is printing a line */

/* ---- out ---- */

static void put(char c)
{
    port_write8(PORT_SERIAL, (uint8_t)c);
}

static void put_text(const char *text)
{
    while (*text)
        put(*text++);
}

static void put_number(uint64_t value, uint32_t base, uint32_t least_digits)
{
    char digits[DECIMAL_DIGITS];
    uint32_t count = 0;

    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value || count < least_digits);
    while (count)
        put(digits[--count]);
}

static void put_formatted(const char *format, va_list values)
{
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        format++;
        if (*format == 's')
            put_text(va_arg(values, const char *));
        else if (*format == 'u')
            put_number(va_arg(values, uint64_t), 10, 1);
        else
            put_number(va_arg(values, uint64_t), 16, HEXADECIMAL_CHARS);
    }
}

void say(const char *format, ...)
{
    va_list values;

    while (__atomic_exchange_n(&speaking, 1, __ATOMIC_ACQUIRE))
        __asm__ volatile("pause");
    va_start(values, format);
    put_text("memd-guest: ");
    put_formatted(format, values);
    put('\n');
    va_end(values);
    __atomic_store_n(&speaking, 0, __ATOMIC_RELEASE);
}

/* ---- in ---- */

const char *console_line(void)
{
    static char line[LINE_BYTES];
    static uint32_t chars;

    while (port_read8(LINE_STATUS) & LINE_HAS_INPUT) {
        char c = (char)port_read8(PORT_SERIAL);

        if (c == '\n' || c == '\r') {
            line[chars] = '\0';
            chars = 0;
            return line;
        }
        if (chars < LINE_BYTES - 1)
            line[chars++] = c;
    }
    return (const char *)0;
}

/* ---- the end ---- */

_Noreturn void power_off(uint32_t status)
{
    for (;;)
        port_write32(PORT_OFF, status);
}

_Noreturn void crash(uint64_t number, uint64_t error, uint64_t rip, uint64_t address)
{
    __atomic_store_n(&speaking, 0, __ATOMIC_RELEASE); /* it may be say() that crashed */
    say("CRASH exception=%u error=%x rip=%x address=%x", number, error, rip, address);
    power_off(OFF_CRASHED);
}

void console_catch_exceptions(void)
{
    for (uint32_t i = 0; i < EXCEPTIONS; i++)
        idt[i] = (struct gate){
            .offset_low = (uint16_t)gates[i],
            .selector = CODE_SELECTOR,
            .type = GATE_INTERRUPT,
            .offset_middle = (uint16_t)(gates[i] >> 16),
            .offset_high = (uint32_t)(gates[i] >> 32),
        };
}
