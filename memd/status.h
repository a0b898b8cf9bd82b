/* SPDX-License-Identifier: Apache-2.0 */
/* What memd knows, as JSON and as Prometheus text. Pure readers: they change nothing. */
#ifndef MEMD_STATUS_H
#define MEMD_STATUS_H

#include <jansson.h>

struct daemon;
struct guest;

/* New references; NULL without memory. */
json_t *status_of_host(struct daemon *daemon);
json_t *status_of_guest(struct daemon *daemon, struct guest *guest);
/* Text to free(), or NULL without memory. */
char *status_metrics(struct daemon *daemon);

#endif
