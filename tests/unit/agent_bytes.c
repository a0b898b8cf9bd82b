/* SPDX-License-Identifier: Apache-2.0 */
#include "agent_bytes.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "units.h"

void bytes_fill(uint8_t *page, uint32_t content)
{
    uint32_t *words = (uint32_t *)(void *)page;

    for (uint32_t i = 0; i < PAGE_BYTES / sizeof(*words); i++)
        words[i] = content * 2654435761U + i;
}

bool bytes_hold(const uint8_t *page, uint32_t content)
{
    _Alignas(64) uint8_t want[PAGE_BYTES];

    bytes_fill(want, content);
    return memcmp(page, want, PAGE_BYTES) == 0;
}

void bytes_touch(volatile uint8_t *byte)
{
    *byte = (uint8_t)(*byte + 1);
    *byte = (uint8_t)(*byte - 1);
}

int bytes_segment(uint32_t pages, uint32_t first_content, int seals)
{
    int fd = memfd_create("memd-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t page[PAGE_BYTES];

    for (uint32_t i = 0; i < pages; i++) {
        bytes_fill(page, first_content + i);
        cr_assert_eq(pwrite(fd, page, PAGE_BYTES, i * (off_t)PAGE_BYTES), (ssize_t)PAGE_BYTES);
    }
    cr_assert_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}
