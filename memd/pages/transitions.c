/* SPDX-License-Identifier: Apache-2.0 */
#include "transitions.h"

#include <assert.h>
#include <errno.h>
#include <stdint.h>

#define REFUSED (-1)

struct rule {
    const char *name;
    int8_t to[PLACE_COUNT];
};

/* Columns in the order of enum place:
 *                        private         absent          zero            shared
 *                        stored          spilled         remote */
static const struct rule rules[] = {
    [TRANSITION_POPULATE] = {"populate",
                             {PLACE_PRIVATE, PLACE_PRIVATE, REFUSED, REFUSED, REFUSED, REFUSED,
                              REFUSED}},
    [TRANSITION_WRITE] = {"write",
                          {PLACE_PRIVATE, REFUSED, PLACE_PRIVATE, REFUSED, REFUSED, REFUSED,
                           REFUSED}},
    [TRANSITION_DISCARD] = {"discard",
                            {PLACE_ABSENT, PLACE_ABSENT, PLACE_ABSENT, PLACE_ABSENT, PLACE_ABSENT,
                             PLACE_ABSENT, PLACE_ABSENT}},
    [TRANSITION_DROP] = {"drop",
                         {PLACE_ZERO, PLACE_ZERO, PLACE_ZERO, REFUSED, REFUSED, REFUSED, REFUSED}},
    [TRANSITION_SHARE] = {"share",
                          {PLACE_SHARED, REFUSED, REFUSED, PLACE_SHARED, REFUSED, REFUSED,
                           REFUSED}},
    [TRANSITION_BREAK] = {"break",
                          {REFUSED, REFUSED, REFUSED, PLACE_PRIVATE, REFUSED, REFUSED, REFUSED}},
    [TRANSITION_EVICT] = {"evict",
                          {PLACE_STORED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED}},
    [TRANSITION_SPILL] = {"spill",
                          {REFUSED, REFUSED, REFUSED, REFUSED, PLACE_SPILLED, REFUSED, REFUSED}},
    [TRANSITION_EXPECT] = {"expect",
                           {REFUSED, PLACE_REMOTE, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED}},
    [TRANSITION_FETCH] = {"fetch",
                          {REFUSED, REFUSED, REFUSED, REFUSED, PLACE_PRIVATE, PLACE_PRIVATE,
                           PLACE_PRIVATE}},
    [TRANSITION_CLEAR] = {"clear",
                          {REFUSED, PLACE_ABSENT, REFUSED, REFUSED, REFUSED, REFUSED,
                           PLACE_ABSENT}},
};

static_assert(sizeof(rules) / sizeof(rules[0]) == TRANSITION_COUNT, "a rule for each transition");
static_assert(PLACE_COUNT == 7, "a column for each place");

int transitions_next(enum transition transition, enum place from)
{
    if (transition >= TRANSITION_COUNT || from >= PLACE_COUNT)
        return -EINVAL;
    return rules[transition].to[from] == REFUSED ? -EPERM : rules[transition].to[from];
}

const char *transitions_name(enum transition transition)
{
    return transition < TRANSITION_COUNT ? rules[transition].name : "unknown";
}
