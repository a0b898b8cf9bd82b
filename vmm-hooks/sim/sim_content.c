/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "sim.h"

#define OWNER_SHIFT 16
#define LAST        (PAGE_BYTES / sizeof(uint64_t) - 1)
#define NEAR_SHIFT  3 /* so many bits of an id are in the last 8 bytes only */

uint32_t sim_content_of(uint32_t owner, uint32_t id)
{
    return owner << OWNER_SHIFT | id;
}

uint32_t sim_content_owner(uint32_t content)
{
    return content >> OWNER_SHIFT;
}

uint32_t sim_content_owner_of(const struct sim_vmm *vmm)
{
    return vmm->domain == SIM_DOMAINS - 1 ? SIM_DOMAINS + vmm->number : vmm->domain + 1;
}

static uint64_t pattern_of(uint32_t content)
{
    return ((uint64_t)(content >> NEAR_SHIFT) + 1) * 0x9e3779b97f4a7c15ULL;
}

void sim_content_expand(uint32_t content, void *into)
{
    uint64_t *words = into, pattern = pattern_of(content);

    if (!content) {
        memset(into, 0, PAGE_BYTES);
        return;
    }
    for (size_t i = 0; i < LAST; i++)
        words[i] = pattern;
    words[LAST] = content;
}

int sim_content_read(const void *bytes, uint32_t *ret_content)
{
    const uint64_t *words = bytes;
    uint64_t pattern;

    if (words[LAST] == 0 || words[LAST] > UINT32_MAX)
        return -EINVAL;
    pattern = pattern_of((uint32_t)words[LAST]);
    for (size_t i = 0; i < LAST; i++) {
        if (words[i] != pattern)
            return -EINVAL;
    }
    *ret_content = (uint32_t)words[LAST];
    return 0;
}
