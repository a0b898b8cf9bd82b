/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What happens, as lines of JSON for those who listen now. Nobody's slowness costs memory without
 * bound: a subscriber whose buffer is full loses events, and is told how many.
 */
#ifndef MEMD_EVENTS_H
#define MEMD_EVENTS_H

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#define EVENTS_BUFFER_BYTES (256U << 10)

struct events_subscriber {
    char *buffer; /* of EVENTS_BUFFER_BYTES: whole lines */
    size_t used;
    uint64_t lost;
    void (*arrived)(struct events_subscriber *subscriber); /* something is in the buffer now */
    void *owner;
    struct events_subscriber *next;
};

struct events {
    struct events_subscriber *first;
    uint64_t emitted;
};

int events_subscribe(struct events *events, struct events_subscriber *subscriber);
void events_unsubscribe(struct events *events, struct events_subscriber *subscriber);
/* Takes up to bytes from the subscriber's buffer; returns how many. */
size_t events_take(struct events_subscriber *subscriber, char *into, size_t bytes);

/* {"time":...,"event":EVENT,"guest":GUEST,...more}. guest and more may be NULL; more is consumed.
 */
void events_emit(struct events *events, const char *event, const char *guest, json_t *more);

#endif
