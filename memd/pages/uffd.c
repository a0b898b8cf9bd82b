/* SPDX-License-Identifier: Apache-2.0 */
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>

#include "kernel_abi.h"
#include "sys.h"

/* EAGAIN comes while another thread forks or remaps; that ends. This many tries are far more than
 * were ever seen, and bounded. */
#define MAX_TRIES 10000

int uffd_open(int dev, uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    int fd;
    int r;

    if (dev >= 0)
        fd = (int)sys_call3(SYS_ioctl, dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    else
        fd = (int)sys_call1(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return fd;
    r = sys_ioctl(fd, UFFDIO_API, &api);
    if (r < 0) {
        sys_close(fd);
        return r == -EINVAL ? -ENOSYS : r;
    }
    return fd;
}

int uffd_register(int fd, const void *at, size_t bytes, uint64_t mode)
{
    struct uffdio_register request = {.range = {(uintptr_t)at, bytes}, .mode = mode};

    return sys_ioctl(fd, UFFDIO_REGISTER, &request);
}

int uffd_unregister(int fd, const void *at, size_t bytes)
{
    struct uffdio_range range = {(uintptr_t)at, bytes};

    return sys_ioctl(fd, UFFDIO_UNREGISTER, &range);
}

int uffd_protect(int fd, const void *at, size_t bytes, bool protect)
{
    struct uffdio_writeprotect request = {
        .range = {(uintptr_t)at, bytes},
        .mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };
    int r;

    for (int tries = 0; tries < MAX_TRIES; tries++) {
        r = sys_ioctl(fd, UFFDIO_WRITEPROTECT, &request);
        if (r != -EAGAIN)
            return r;
    }
    return -EAGAIN;
}

int uffd_wake(int fd, const void *at, size_t bytes)
{
    struct uffdio_range range = {(uintptr_t)at, bytes};

    return sys_ioctl(fd, UFFDIO_WAKE, &range);
}

/* Copy, zeropage and move all report in a signed field how far they got. */
static bool again(long *ret_result, int r, int64_t done)
{
    *ret_result = done > 0 ? (long)done : r < 0 && done < 0 ? (long)done : r;
    if (r == 0 && done == 0)
        *ret_result = -EAGAIN;
    return *ret_result == -EAGAIN;
}

long uffd_copy(int fd, void *to, const void *from, size_t bytes, bool wake)
{
    long result = -EAGAIN;

    for (int tries = 0; tries < MAX_TRIES; tries++) {
        struct uffdio_copy request = {
            .dst = (uintptr_t)to,
            .src = (uintptr_t)from,
            .len = bytes,
            .mode = wake ? 0 : UFFDIO_COPY_MODE_DONTWAKE,
        };
        int r = sys_ioctl(fd, UFFDIO_COPY, &request);
        if (!again(&result, r, request.copy))
            break;
    }
    return result;
}

long uffd_zero(int fd, void *to, size_t bytes)
{
    long result = -EAGAIN;

    for (int tries = 0; tries < MAX_TRIES; tries++) {
        struct uffdio_zeropage request = {
            .range = {(uintptr_t)to, bytes},
            .mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE,
        };
        int r = sys_ioctl(fd, UFFDIO_ZEROPAGE, &request);
        if (!again(&result, r, request.zeropage))
            break;
    }
    return result;
}

long uffd_move(int fd, void *to, void *from, size_t bytes)
{
    long result = -EAGAIN;

    for (int tries = 0; tries < MAX_TRIES; tries++) {
        struct uffdio_move request = {
            .dst = (uintptr_t)to,
            .src = (uintptr_t)from,
            .len = bytes,
            .mode = UFFDIO_MOVE_MODE_DONTWAKE,
        };
        int r = sys_ioctl(fd, UFFDIO_MOVE, &request);
        if (!again(&result, r, request.move))
            break;
    }
    return result;
}
