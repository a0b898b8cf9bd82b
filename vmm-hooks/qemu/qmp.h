/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small QMP client: one connection, one command at a time. Events that come meanwhile are kept
 * for who asks for them, the latest QMP_EVENTS_MAX.
 *
 * QEMU is a stranger: a line that is longer than QMP_LINE_BYTES or no JSON ends the connection.
 * Nothing here logs. Not for several threads at once.
 */
#ifndef MEMD_QEMU_QMP_H
#define MEMD_QEMU_QMP_H

#include <jansson.h>

#include "units.h"

#define QMP_LINE_BYTES (1U << 20)
#define QMP_EVENTS_MAX 32U

struct qmp;

/* Connects to the unix socket at `path` and leaves the capabilities negotiation behind. A QMP
 * socket serves one client at a time: while another one is connected, this waits in line and ends
 * with -ETIMEDOUT after timeout_ms (greeting and negotiation together). 0 or -errno; -EPROTO when
 * what answers is not QMP. */
int qmp_open(const char *path, int timeout_ms, struct qmp **ret_qmp);

/* The same with a socket that is connected to QEMU already; it is ours from then on, and closed
 * when this fails. */
int qmp_open_fd(int fd, int timeout_ms, struct qmp **ret_qmp);

/* Runs `command` with `arguments` (borrowed; NULL for none). *ret_result is the "return" member, a
 * reference that the caller gives up with json_decref(). -EREMOTEIO: QEMU answered with an error,
 * for which qmp_error() has the words; -ETIMEDOUT: it has not answered yet, and whether the command
 * is run nobody knows. In both cases the connection lives on. After any other error it is dead, and
 * can only be closed. */
int qmp_execute(struct qmp *qmp, const char *command, json_t *arguments, int timeout_ms,
                json_t **ret_result);

/* The same, and QEMU gets a copy of the descriptor with it (for getfd). */
int qmp_execute_with_fd(struct qmp *qmp, const char *command, json_t *arguments, int fd,
                        int timeout_ms, json_t **ret_result);

/* The next event, one that came earlier if there is: the whole object, to be given up with
 * json_decref(). -ETIMEDOUT: none came, the connection lives on. After any other error it is dead.
 */
int qmp_wait_event(struct qmp *qmp, int timeout_ms, json_t **ret_event);
/* Drops the events that have come so far. */
void qmp_forget_events(struct qmp *qmp);

/* The description of QEMU's latest error answer, "" when there was none; valid until the next
 * call. */
const char *qmp_error(const struct qmp *qmp);

void qmp_close(struct qmp *qmp);

#endif
