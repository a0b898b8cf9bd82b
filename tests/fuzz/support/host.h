/* SPDX-License-Identifier: Apache-2.0 */
/* A daemon in this thread, in a temporary directory that goes when the process ends. */
#ifndef TESTS_FUZZ_HOST_H
#define TESTS_FUZZ_HOST_H

#include "daemon.h"
#include "fuzz.h"

/* The one of this process; started by the first call. */
struct daemon *fuzz_daemon(void);
/* Turns its loop without waiting. */
void fuzz_turn(void);
/* So much time passes, then a turn. */
void fuzz_let_pass(uint64_t ns);
/* Registers a guest with this process as its VMM. */
struct guest *fuzz_register(const char *name);
/* A connection to it that doesn't block; suffix is "" for control, ".agent" for agents. */
int fuzz_connect(int type, const char *suffix);
/* Removes every guest, and turns until nothing of them is left. */
void fuzz_remove_guests(void);

#endif
