/* SPDX-License-Identifier: Apache-2.0 */
/* What every fuzz target is: libFuzzer's entry, which replay.c calls as well. */
#ifndef MEMD_TESTS_FUZZ_TARGET_H
#define MEMD_TESTS_FUZZ_TARGET_H

#include <stddef.h>
#include <stdint.h>

/* Feeds `count` bytes to what is tested, and aborts when a promise is broken. Always 0. */
__attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(const uint8_t *bytes,
                                                                  size_t count);

#endif
