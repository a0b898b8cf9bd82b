/* SPDX-License-Identifier: Apache-2.0 */
/*
 * When has pre-copy done what it can? A pure function of the agent's figures.
 *
 * With post-copy behind it, pre-copy is there to make the demand faults few: it ends when what is
 * left is little, when another pass would not make it less, or after PRECOPY_PASSES. Alone
 * (precopy_only) it must get down to what can be sent while the guest stands still.
 */
#ifndef MEMD_POSTCOPY_MOVER_PRECOPY_H
#define MEMD_POSTCOPY_MOVER_PRECOPY_H

#include <stdbool.h>
#include <stdint.h>

#define PRECOPY_PASSES      3U /* the first brings what does not change, the others what rarely does */
#define PRECOPY_ONLY_PASSES 100U /* a guest that still writes faster than that is not got down */

struct precopy {
    bool only;
    uint64_t last_left; /* pages, at the end of the pass before */
};

enum precopy_verdict { PRECOPY_GOES_ON, PRECOPY_IS_ENOUGH, PRECOPY_IS_IN_VAIN };

/* At the end of pass `pass` (from 1): `left` pages are dirty again, `rate` pages a second are sent.
 */
enum precopy_verdict precopy_judge(struct precopy *precopy, uint32_t pass, uint64_t left,
                                   uint64_t rate);

#endif
