/* SPDX-License-Identifier: Apache-2.0 */
/* One message with descriptors, as memd, movers and tests send and receive them. (The agent has its
 * own in rpc.c: it goes around libc.) */
#ifndef MEMD_COMMON_SEND_WITH_H
#define MEMD_COMMON_SEND_WITH_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

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

/* The one descriptor of a message that was received with room for one (CMSG_SPACE(sizeof(int))),
 * the caller's from now on; -1: none. Where one has room the kernel may have put two: who sends two
 * has sent none. */
static inline int received_fd(struct msghdr *header)
{
    const struct cmsghdr *rights = CMSG_FIRSTHDR(header);
    int fds[2] = {-1, -1};

    if (!rights || rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS ||
        rights->cmsg_len > CMSG_LEN(sizeof(fds)))
        return -1;
    memcpy(fds, CMSG_DATA(rights), rights->cmsg_len - CMSG_LEN(0));
    if (fds[1] < 0)
        return fds[0];
    close(fds[0]);
    close(fds[1]);
    return -1;
}

#endif
