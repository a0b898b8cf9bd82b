/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What lies behind the VMM's O_DIRECT descriptors.
 *
 * A freeze is refused by the kernel while a page is pinned (FOLL_PIN), which is how block devices,
 * ext4, xfs and btrfs do direct I/O. File systems that still take plain references (FOLL_GET: NFS,
 * Ceph, 9p) are not seen: a read that is under way there could write into a page that has been
 * merged. So nothing is frozen while the VMM has an O_DIRECT descriptor on anything that is not
 * known to be good.
 */
#ifndef MEMD_AGENT_ODIRECT_H
#define MEMD_AGENT_ODIRECT_H

#include <stdbool.h>

/* True when every O_DIRECT descriptor of this process is on a list of known good ones (or can't be
 * read any more); otherwise false and, in words, the reason (PROTOCOL_TEXT_BYTES). */
bool odirect_check(char *reason);

/* Is a file system of this f_type (statfs) known to pin? */
bool odirect_is_known_good(long f_type);

#endif
