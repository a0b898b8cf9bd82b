/* SPDX-License-Identifier: Apache-2.0 */
/* The bare guest's hands: ports, device registers, the clock, and resting. */
#ifndef BARE_MACHINE_H
#define BARE_MACHINE_H

#include <stdint.h>

#include "address_map.h"

static inline void port_write8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t port_read8(uint16_t port)
{
    uint8_t value;

    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline void port_write32(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint32_t port_read32(uint16_t port)
{
    uint32_t value;

    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

static inline uint32_t device_read(uint64_t address)
{
    return *(volatile uint32_t *)(uintptr_t)address;
}

static inline void device_write(uint64_t address, uint32_t value)
{
    *(volatile uint32_t *)(uintptr_t)address = value;
}

/* Microseconds; wraps after 71 minutes: only differences mean something. */
static inline uint32_t clock_us(void)
{
    return port_read32(PORT_CLOCK);
}

/* Gives the processor away for that long, or until something happens. */
static inline void rest_us(uint32_t us)
{
    port_write32(PORT_ALARM, us);
    __asm__ volatile("hlt" : : : "memory");
}

#endif
