/* SPDX-License-Identifier: Apache-2.0 */
#include "odirect.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "protocol.h"
#include "sys.h"

/* f_type values from include/uapi/linux/magic.h. All of these do direct I/O through iomap or
 * btrfs' own code on pinned pages since 6.5; tmpfs copies like a buffered read. */
static const long known_good[] = {
    0xef53,     /* ext2, ext3, ext4 */
    0x58465342, /* xfs */
    0x9123683e, /* btrfs */
    0x01021994, /* tmpfs */
};

struct dirent64_head {
    uint64_t ino;
    int64_t off;
    uint16_t reclen;
    uint8_t type;
    char name[];
};

bool odirect_is_known_good(long f_type)
{
    for (size_t i = 0; i < sizeof(known_good) / sizeof(known_good[0]); i++)
        if (known_good[i] == f_type)
            return true;
    return false;
}

static bool descriptor_is_good(int fd)
{
    long flags = sys_call2(SYS_fcntl, fd, F_GETFL);
    struct statfs fs;
    struct stat st;

    if (flags < 0 || !(flags & O_DIRECT))
        return true;
    if (sys_call2(SYS_fstat, fd, &st) < 0)
        return true; /* closed meanwhile */
    if (S_ISBLK(st.st_mode))
        return true;
    if (!S_ISREG(st.st_mode))
        return true; /* O_DIRECT on a pipe means packets */
    return sys_call2(SYS_fstatfs, fd, &fs) == 0 && odirect_is_known_good(fs.f_type);
}

static int parse_descriptor(const char *name)
{
    int fd = 0;

    for (; *name; name++) {
        if (*name < '0' || *name > '9')
            return -1;
        fd = fd * 10 + (*name - '0');
    }
    return fd;
}

static bool check_entries(const char *buffer, long bytes, int directory)
{
    for (long at = 0; at < bytes;) {
        const struct dirent64_head *entry = (const void *)(buffer + at);
        int fd = parse_descriptor(entry->name);
        if (fd >= 0 && fd != directory && !descriptor_is_good(fd))
            return false;
        at += entry->reclen;
    }
    return true;
}

bool odirect_check(char *reason)
{
    static const char word[] = "the VMM has a file open with O_DIRECT on a file system that is not "
                               "known to pin pages (ext4, xfs, btrfs, block devices are)";
    static const char blind[] = "the VMM's descriptors can't be listed (/proc/self/fd: a chroot?)";
    char buffer[4096] __attribute__((aligned(8)));
    int directory = (int)sys_call4(SYS_openat, AT_FDCWD, "/proc/self/fd",
                                   O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    bool good = directory >= 0;
    long got = 0;

    while (good && (got = sys_call3(SYS_getdents64, directory, buffer, sizeof(buffer))) > 0)
        good = check_entries(buffer, got, directory);
    if (directory >= 0)
        sys_close(directory);
    if (got < 0)
        good = false;
    if (!good && directory >= 0 && got >= 0)
        memcpy(reason, word, sizeof(word));
    else if (!good)
        memcpy(reason, blind, sizeof(blind));
    return good;
}
