/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The control socket: HTTP/1.1 with JSON (libmicrohttpd), in the daemon's loop. Routes are a table:
 * method, path, who may, handler. Who calls is what the kernel says about the connection.
 */
#ifndef MEMD_CONTROL_H
#define MEMD_CONTROL_H

#include <stdbool.h>

struct control;
struct daemon;
struct guest;

/* -EADDRINUSE: another memd answers there. Logs what is wrong. */
int control_start(struct daemon *daemon);
void control_stop(struct daemon *daemon);
/* A TCP socket that listens at HOST:PORT, or -errno. */
int control_listen_tcp(const char *where);
/* [metrics] listen may have changed. */
void control_reload(struct daemon *daemon);

/* The list of guests was written: who registered one of them is answered. */
void control_saved(struct daemon *daemon);
/* A guest that somebody asked to detach is private again, or its agent is gone. */
void control_detached(struct daemon *daemon, const char *guest, bool done);

#endif
