/* SPDX-License-Identifier: Apache-2.0 */
/* Pages whose bytes follow from a number, and a segment of the store that holds such pages. */
#ifndef TESTS_UNIT_AGENT_BYTES_H
#define TESTS_UNIT_AGENT_BYTES_H

#include <stdbool.h>
#include <stdint.h>

#define ALL_SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

void bytes_fill(uint8_t *page, uint32_t content);
bool bytes_hold(const uint8_t *page, uint32_t content);
/* Writes to a byte twice; afterwards it is what it was. */
void bytes_touch(volatile uint8_t *byte);
/* A memfd of pages with contents first_content, first_content + 1, ... and with these seals. */
int bytes_segment(uint32_t pages, uint32_t first_content, int seals);

#endif
