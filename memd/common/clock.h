/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMD_COMMON_CLOCK_H
#define MEMD_COMMON_CLOCK_H

#include <stdint.h>
#include <time.h>

/* CLOCK_MONOTONIC in nanoseconds. (memd itself asks its loop, or host.h: tests stand under those.)
 */
static inline uint64_t clock_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

#endif
