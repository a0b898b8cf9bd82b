/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kernel interfaces that are younger than the headers of Debian 12 (Linux 6.1): constants and
 * layouts restated from include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h, with the
 * version that brought each.
 */
#ifndef MEMD_COMMON_KERNEL_ABI_H
#define MEMD_COMMON_KERNEL_ABI_H

#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* 6.4: also write-protects pages that are not there (UFFDIO_WRITEPROTECT, PAGEMAP_SCAN). */
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
/* 6.7: a write to a protected page lifts the protection by itself; PAGEMAP_SCAN sees it. */
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
/* 6.8 */
#ifndef UFFD_FEATURE_MOVE
#define UFFD_FEATURE_MOVE (1 << 16)
#endif

#ifndef UFFDIO_MOVE
struct uffdio_move {
    __u64 dst;
    __u64 src;
    __u64 len;
    __u64 mode;
    __s64 move; /* out: bytes moved, or -errno when none was */
};
#define _UFFDIO_MOVE                     (0x05)
#define UFFDIO_MOVE                      _IOWR(UFFDIO, _UFFDIO_MOVE, struct uffdio_move)
#define UFFDIO_MOVE_MODE_DONTWAKE        ((__u64)1 << 0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES ((__u64)1 << 1)
#endif

/* 6.1: /dev/userfaultfd */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC     0xAA
#define USERFAULTFD_IOC_NEW _IO(USERFAULTFD_IOC, 0x00)
#endif

/* 6.7: ioctl on /proc/PID/pagemap */
#ifndef PAGEMAP_SCAN
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)

#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN   (1 << 1)
#define PAGE_IS_FILE      (1 << 2)
#define PAGE_IS_PRESENT   (1 << 3)
#define PAGE_IS_SWAPPED   (1 << 4)
#define PAGE_IS_PFNZERO   (1 << 5)
#define PAGE_IS_HUGE      (1 << 6)

struct page_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

#define PM_SCAN_WP_MATCHING   (1 << 0) /* write-protect what matches */
#define PM_SCAN_CHECK_WPASYNC (1 << 1) /* stop at memory that is not registered with WP_ASYNC */

struct pm_scan_arg {
    uint64_t size;
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end;
    uint64_t vec;
    uint64_t vec_len;
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};
#endif

#endif
