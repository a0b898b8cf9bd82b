/* SPDX-License-Identifier: Apache-2.0 */
/* The places a guest page can be in: exactly one at every moment (ARCHITECTURE.md, "One idea"). */
#ifndef MEMD_COMMON_PLACES_H
#define MEMD_COMMON_PLACES_H

enum place {
    PLACE_PRIVATE, /* an anonymous page of the VMM */
    PLACE_ABSENT,  /* nothing holds it: never touched, ballooned, reported free; reads as zeros */
    PLACE_ZERO,    /* was all zeros and was dropped; the kernel's zero page stands in for it */
    PLACE_SHARED,  /* a slot of the domain's store, mapped privately */
    PLACE_STORED,  /* a compressed object in the guest's vault */
    PLACE_SPILLED, /* in the guest's spill file */
    PLACE_REMOTE,  /* at a migration source or in a snapshot file */
    PLACE_COUNT
};

/* "private", "absent", ...: the names of the interface (memctl status --json). Static storage. */
static inline const char *place_name(enum place place)
{
    static const char *const names[PLACE_COUNT] = {"private", "absent",  "zero",  "shared",
                                                   "stored",  "spilled", "remote"};

    return place < PLACE_COUNT ? names[place] : "unknown";
}

#endif
