/* SPDX-License-Identifier: Apache-2.0 */
/*
 * QEMU's monitor, as memd sees it: a path that somebody gave when a guest was registered. memd does
 * not speak there; it hands the connection to the mover, which may. Since memd may reach more than
 * who gave the path, it looks who listens before anything is said: the guest's own VMM, or nobody.
 */
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon.h"

/* Who called listen() there. */
static bool is_its_vmm(const struct guest *guest, int fd)
{
    struct ucred peer;
    socklen_t bytes = sizeof(peer);

    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && guest->pid > 0 &&
           peer.pid == guest->pid;
}

int monitor_connect(const struct guest *guest, int *ret_fd)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd, result = 0;

    if (!guest->qmp[0] || strlen(guest->qmp) >= sizeof(address.sun_path))
        return -ENOENT;
    strcpy(address.sun_path, guest->qmp);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        result = errno == ECONNREFUSED ? -ENOENT : -errno;
    else if (!is_its_vmm(guest, fd))
        result = -EPERM;
    if (result == 0)
        *ret_fd = fd;
    else
        close(fd);
    return result;
}

bool monitor_make_place(const struct daemon *daemon, const char *name, uid_t uid, char *path)
{
    const char *socket = daemon->config.socket, *slash = strrchr(socket, '/');
    int room = (int)sizeof(((struct sockaddr_un *)0)->sun_path);
    struct stat st;

    if (!slash || snprintf(path, (size_t)room, "%.*s/%s.vmm", (int)(slash - socket), socket,
                           name) >= room - (int)sizeof("/qmp"))
        return false;
    if (mkdir(path, 0700) < 0 && errno != EEXIST)
        return false;
    /* Nobody's link, and nobody's who could put something else there. */
    if (lstat(path, &st) < 0 || !S_ISDIR(st.st_mode) ||
        (st.st_uid != uid && lchown(path, uid, (gid_t)-1) < 0))
        return false;
    strcat(path, "/qmp");
    return true;
}
