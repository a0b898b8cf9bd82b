/* SPDX-License-Identifier: Apache-2.0 */
/* A guest for the targets of the agent: its memory under the real fault handler, and what each of
 * its pages must hold. */
#ifndef TESTS_FUZZ_SUPPORT_GUEST_H
#define TESTS_FUZZ_SUPPORT_GUEST_H

#include "agent.h"

#define PAGES 1024U /* two chunks */

struct fuzz_guest {
    struct memd_vm vm;
    struct ram_block *block;
    uint8_t *memory;
    uint32_t generation[PAGES]; /* what each page holds; 0: zeros */
};

extern struct fuzz_guest fuzz_guest;

/* Makes it, once; ends the program with 77 (skipped) where the kernel has no agent. Whether this
 * was the first time. */
bool fuzz_guest_start(void);

/* What a page of this generation holds. */
void fuzz_guest_content(uint32_t generation, uint8_t *into);
void fuzz_guest_write(uint32_t page, uint32_t generation);

/* Every page holds what it must, and is in one place. */
void fuzz_guest_check(void);

#endif
