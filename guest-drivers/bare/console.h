/* SPDX-License-Identifier: Apache-2.0 */
/* The serial port: whole lines out, commands in. */
#ifndef BARE_CONSOLE_H
#define BARE_CONSOLE_H

#include <stdint.h>

/*
 * Prints "memd-guest: " and the format. Known in it: %s (const char *), %u (uint64_t, decimal),
 * %x (uint64_t, hexadecimal): every number is to be given as 64 bits. Any vCPU; lines stay whole.
 */
void say(const char *format, ...);

/* A line of input without its end, cut off at `bytes`, or NULL when none is complete. Stays until
 * the next call. First vCPU only. */
const char *console_line(void);

/* Says which exception came where, and ends the machine with OFF_CRASHED. */
_Noreturn void crash(uint64_t number, uint64_t error, uint64_t rip, uint64_t address);

/* Fills the table that start.S has loaded. */
void console_catch_exceptions(void);

#define OFF_STOPPED 0U
#define OFF_CRASHED 9U

_Noreturn void power_off(uint32_t status);

#endif
