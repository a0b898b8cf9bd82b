/* SPDX-License-Identifier: Apache-2.0 */
#include "events.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "host.h"

int events_subscribe(struct events *events, struct events_subscriber *subscriber)
{
    subscriber->buffer = malloc(EVENTS_BUFFER_BYTES);
    if (!subscriber->buffer)
        return -ENOMEM;
    subscriber->used = 0;
    subscriber->lost = 0;
    subscriber->next = events->first;
    events->first = subscriber;
    return 0;
}

void events_unsubscribe(struct events *events, struct events_subscriber *subscriber)
{
    for (struct events_subscriber **place = &events->first; *place; place = &(*place)->next) {
        if (*place == subscriber) {
            *place = subscriber->next;
            break;
        }
    }
    free(subscriber->buffer);
    subscriber->buffer = NULL;
}

size_t events_take(struct events_subscriber *subscriber, char *into, size_t bytes)
{
    size_t taken = subscriber->used < bytes ? subscriber->used : bytes;

    memcpy(into, subscriber->buffer, taken);
    subscriber->used -= taken;
    memmove(subscriber->buffer, subscriber->buffer + taken, subscriber->used);
    return taken;
}

static int append(struct events_subscriber *subscriber, json_t *event)
{
    size_t room = EVENTS_BUFFER_BYTES - subscriber->used;
    size_t length = json_dumpb(event, subscriber->buffer + subscriber->used, room, JSON_COMPACT);

    if (length == 0 || length + 1 > room)
        return -ENOSPC;
    subscriber->used += length;
    subscriber->buffer[subscriber->used++] = '\n';
    return 0;
}

static void deliver(struct events_subscriber *subscriber, json_t *event, double now)
{
    json_t *lost;

    if (subscriber->lost) {
        lost = json_pack("{s:f,s:s,s:I}", "time", now, "event", "events_lost", "count",
                         (json_int_t)subscriber->lost);
        if (lost && append(subscriber, lost) == 0)
            subscriber->lost = 0;
        json_decref(lost);
    }
    if (append(subscriber, event))
        subscriber->lost++;
    subscriber->arrived(subscriber);
}

void events_emit(struct events *events, const char *event, const char *guest, json_t *more)
{
    double now = host_wall_seconds();
    json_t *json = json_pack("{s:f,s:s}", "time", now, "event", event);
    struct events_subscriber *next;

    if (json && guest)
        json_object_set_new(json, "guest", json_string(guest));
    if (json && more)
        json_object_update(json, more);
    json_decref(more);
    events->emitted++;
    for (struct events_subscriber *one = events->first; json && one; one = next) {
        next = one->next;
        deliver(one, json, now);
    }
    json_decref(json);
}
