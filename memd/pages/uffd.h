/* SPDX-License-Identifier: Apache-2.0 */
/*
 * userfaultfd's ioctls as functions. Each reads the signed result field as well as the answer,
 * and retries EAGAIN (the address space is changing) where the kernel asks for that.
 */
#ifndef MEMD_PAGES_UFFD_H
#define MEMD_PAGES_UFFD_H

#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A userfaultfd with exactly these features, non-blocking, never UFFD_USER_MODE_ONLY (KVM and
 * system calls must be able to wait in a hole). From `dev` (/dev/userfaultfd) unless it is -1. */
int uffd_open(int dev, uint64_t features);

int uffd_register(int fd, const void *at, size_t bytes, uint64_t mode);
int uffd_unregister(int fd, const void *at, size_t bytes);
int uffd_protect(int fd, const void *at, size_t bytes, bool protect);
int uffd_wake(int fd, const void *at, size_t bytes);

/* UFFDIO_COPY of whole pages. Returns bytes copied (perhaps fewer), or -errno when none was
 * (-EEXIST: somebody was faster). Wakes nobody unless `wake`. */
long uffd_copy(int fd, void *to, const void *from, size_t bytes, bool wake);
/* UFFDIO_ZEROPAGE, likewise; wakes nobody. */
long uffd_zero(int fd, void *to, size_t bytes);
/* UFFDIO_MOVE, likewise; wakes nobody. -EBUSY: a page is pinned or not exclusive. Linux 6.18 may
 * have moved more than it says: move() in freeze.c. */
long uffd_move(int fd, void *to, void *from, size_t bytes);

#endif
