/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMD_MONITOR_H
#define MEMD_MONITOR_H

#include "registry.h"

/* A connection to the monitor (QMP) of this guest's VMM, for a mover. -ENOENT: it has none;
 * -EPERM: at the path that was given for it somebody else listens; -errno. */
int monitor_connect(const struct guest *guest, int *ret_fd);

/* Where the VMM that is started for an arriving guest is to put its monitor: a directory that its
 * user alone may write to, beside memd's control socket. Fills `path` (GUEST_WORDS); false: there
 * can be none. */
bool monitor_make_place(const struct daemon *daemon, const char *name, uid_t uid, char *path);

#endif
