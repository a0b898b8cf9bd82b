/* SPDX-License-Identifier: Apache-2.0 */
#include "precopy.h"

/* What is sent in so much time is little. Alone, the guest stands still for that long. */
#define LITTLE_MS      20U
#define LITTLE_ONLY_MS 300U /* as much as QEMU's default downtime limit */

enum precopy_verdict precopy_judge(struct precopy *precopy, uint32_t pass, uint64_t left,
                                   uint64_t rate)
{
    uint64_t little = rate / 1000 * (precopy->only ? LITTLE_ONLY_MS : LITTLE_MS);
    bool gains = pass == 1 || left < precopy->last_left - precopy->last_left / 4;

    precopy->last_left = left;
    if (left <= little || left == 0)
        return PRECOPY_IS_ENOUGH;
    if (precopy->only)
        return pass < PRECOPY_ONLY_PASSES ? PRECOPY_GOES_ON : PRECOPY_IS_IN_VAIN;
    return gains && pass < PRECOPY_PASSES ? PRECOPY_GOES_ON : PRECOPY_IS_ENOUGH;
}
