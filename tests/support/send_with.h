/* SPDX-License-Identifier: Apache-2.0 */
/* One message with one descriptor, as agent and memd send them to each other. */
#ifndef TESTS_SUPPORT_SEND_WITH_H
#define TESTS_SUPPORT_SEND_WITH_H

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

/* fd -1: none. Returns what sendmsg() does, errno as well. */
static inline ssize_t send_with(int to, const void *message, size_t bytes, int fd)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec piece = {(void *)message, bytes};
    struct msghdr header = {.msg_iov = &piece, .msg_iovlen = 1};

    if (fd >= 0) {
        struct cmsghdr *rights = (struct cmsghdr *)(void *)control;

        header.msg_control = control;
        header.msg_controllen = sizeof(control);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &fd, sizeof(fd));
    }
    return sendmsg(to, &header, MSG_NOSIGNAL);
}

#endif
