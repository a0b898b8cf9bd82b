/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the VMM's open descriptors say about pages that are in use without being pinned.
 *
 * A freeze is refused by the kernel while a page is pinned (FOLL_PIN), which is how block devices,
 * ext4, xfs and btrfs do direct I/O. File systems that still take plain references (FOLL_GET: NFS,
 * Ceph, 9p) are not seen: a read that is under way there could write into a page that has been
 * merged. So nothing is frozen while the VMM has an O_DIRECT descriptor on anything that is not
 * known to be good.
 *
 * KVM itself held the control structures of a nested guest (kvm_vcpu_map) by plain references until
 * Linux 6.13 ("KVM: Pin (as in FOLL_PIN) pages during kvm_vcpu_map()"), so that below it nothing of
 * a KVM guest that may run guests of its own is frozen.
 */
#ifndef MEMD_AGENT_DESCRIPTORS_H
#define MEMD_AGENT_DESCRIPTORS_H

#include <stdbool.h>

/* True when nothing among this process's descriptors forbids to freeze pages (or can't be read any
 * more); otherwise false and, in words, the reason (PROTOCOL_TEXT_BYTES). `unpinned_kvm` is what
 * descriptors_kvm_is_unpinned said. */
bool descriptors_check(bool unpinned_kvm, char *reason);

/* Does this host's KVM hold pages of nested guests unpinned? */
bool descriptors_kvm_is_unpinned(void);

/* Is a file system of this f_type (statfs) known to pin? */
bool descriptors_is_known_good(long f_type);

/* Is this what the symbolic link in /proc/self/fd of a KVM virtual machine reads? */
bool descriptors_is_kvm(const char *link);

#endif
