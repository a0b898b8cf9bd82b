/* SPDX-License-Identifier: Apache-2.0 */
#include "ctl_collide.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#undef XXH3_64bits_withSeed
#define XXH3_64bits_withSeed(bytes, count, seed) \
    ((void)(bytes), (void)(count), (void)(seed), (uint64_t)7)
#define ctl_analyze_count       collide_analyze_count
#define ctl_analyze_result_free collide_analyze_result_free
#define ctl_analyze_unit_bytes  collide_analyze_unit_bytes
#include "../../memd/ctl/analyze_count.c"
