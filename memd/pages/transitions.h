/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state machine of a page's place: a page changes its place only by a named transition, and
 * only from the places that the table in transitions.c allows it from.
 */
#ifndef MEMD_PAGES_TRANSITIONS_H
#define MEMD_PAGES_TRANSITIONS_H

#include "places.h"

enum transition {
    TRANSITION_POPULATE, /* the guest touched a page that nothing held */
    TRANSITION_WRITE,    /* the guest wrote to a zero page: the kernel copied it */
    TRANSITION_DISCARD,  /* the guest or the VMM gave the page up */
    TRANSITION_DROP,     /* frozen, found to be all zeros, dropped */
    TRANSITION_SHARE,    /* frozen, compared, mapped from the store */
    TRANSITION_BREAK,    /* a share ended: the page has a copy of its own */
    TRANSITION_EVICT,    /* moved out to the vault */
    TRANSITION_SPILL,    /* moved on to the spill file */
    TRANSITION_EXPECT,   /* incoming: the bytes are at a migration source or in a snapshot */
    TRANSITION_FETCH,    /* a page source brought the bytes back */
    TRANSITION_CLEAR,    /* a page source says that there are none: zeros */
    TRANSITION_COUNT
};

/* Where `transition` leads from `from`, or -EPERM when it is not allowed from there. */
int transitions_next(enum transition transition, enum place from);

/* "populate", "break", ...; static storage. */
const char *transitions_name(enum transition transition);

#endif
