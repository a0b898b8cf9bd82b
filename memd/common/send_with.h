/* SPDX-License-Identifier: Apache-2.0 */
/* One message with descriptors, as memd, movers and tests send them. (The agent has its own in
 * rpc.c: it goes around libc.) */
#ifndef MEMD_COMMON_SEND_WITH_H
#define MEMD_COMMON_SEND_WITH_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#define SEND_WITH_MAX 5U

/* `fds` stay the caller's; at most SEND_WITH_MAX of them. flags: of sendmsg(2), besides
 * MSG_NOSIGNAL. 0 or -errno. */
static inline int send_with(int socket, const void *message, size_t bytes, const int *fds,
                            uint32_t fd_count, int flags)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * SEND_WITH_MAX)] = {0};
    struct iovec piece = {(void *)message, bytes};
    struct msghdr header = {.msg_iov = &piece, .msg_iovlen = 1};

    if (fd_count) {
        struct cmsghdr *rights = (struct cmsghdr *)(void *)control;

        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(rights), fds, sizeof(int) * fd_count);
    }
    return sendmsg(socket, &header, flags | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

#endif
