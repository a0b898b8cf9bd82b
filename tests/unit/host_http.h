/* SPDX-License-Identifier: Apache-2.0 */
/* A client of the control socket, in the same thread as the daemon: it turns the loop while it
 * waits. */
#ifndef TESTS_UNIT_HOST_HTTP_H
#define TESTS_UNIT_HOST_HTTP_H

#include <jansson.h>

#include "host_world.h"

/* A connection to the control socket that doesn't block. */
int http_connect(const struct world *world);
/* The same as another user; root only. */
int http_connect_as(const struct world *world, uid_t uid);
/* Sends it all; false when the other side has closed before. */
bool http_send(struct world *world, int fd, const char *text, size_t bytes);
/* Reads until the other side closes; ends what it read with a zero byte. Closes fd. */
size_t http_read_all(struct world *world, struct fake *fakes, size_t count, int fd, char *into,
                     size_t bytes);

/* One request with a body; the answer as JSON (NULL: no body that is), its status in *ret_status (0
 * when there was no answer). */
json_t *http_ask(struct world *world, struct fake *fakes, size_t count, const char *method,
                 const char *path, const char *body, int *ret_status);
int http_status(struct world *world, const char *method, const char *path, const char *body);
int http_status_as(struct world *world, uid_t uid, const char *method, const char *path,
                   const char *body);

#endif
