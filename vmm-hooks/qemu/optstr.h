/* SPDX-License-Identifier: Apache-2.0 */
/*
 * QEMU's option strings: "implied,key=value,key=a,,b" (a doubled comma is a comma), or a JSON
 * object.
 */
#ifndef MEMD_QEMU_OPTSTR_H
#define MEMD_QEMU_OPTSTR_H

#include "units.h"

/* The value of `key` in `options`, the last one if there are several; `implied` (or NULL) is the
 * key of a first word without "=". A later word without "=" has the value "on". A new string, or
 * NULL when the key is not there (or memory is short: the caller can't tell, and need not). */
char *qemu_optstr_get(const char *options, const char *implied, const char *key);

/* True when `key` is there and says no (off, no, false, n), respectively yes (on, yes, true, y). */
bool qemu_optstr_says_no(const char *options, const char *key);
bool qemu_optstr_says_yes(const char *options, const char *key);

/* A size as QEMU reads it: a number, perhaps with a fraction, and a unit (b, k, M, G, T, P, E);
 * `unit` is the letter to take where there is none. -EINVAL or -ERANGE. */
int qemu_optstr_size(const char *text, char unit, uint64_t *ret_bytes);

/* `text` with its commas doubled; a new string, or NULL when there is no memory. */
char *qemu_optstr_escape(const char *text);

#endif
