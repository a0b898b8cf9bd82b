/* SPDX-License-Identifier: Apache-2.0 */
#include "descriptors.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "procfs.h"
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

bool descriptors_is_known_good(long f_type)
{
    for (size_t i = 0; i < sizeof(known_good) / sizeof(known_good[0]); i++)
        if (known_good[i] == f_type)
            return true;
    return false;
}

/* Words for what a descriptor forbids; NULL: nothing. */
static const char *look_at_file(int fd)
{
    long flags = sys_call2(SYS_fcntl, fd, F_GETFL);
    struct statfs fs;
    struct stat st;

    if (flags < 0 || !(flags & O_DIRECT))
        return NULL;
    if (sys_call2(SYS_fstat, fd, &st) < 0)
        return NULL;          /* closed meanwhile */
    if (!S_ISREG(st.st_mode)) /* a block device pins; on a pipe O_DIRECT means packets */
        return NULL;
    if (sys_call2(SYS_fstatfs, fd, &fs) == 0 && descriptors_is_known_good(fs.f_type))
        return NULL;
    return "the VMM has a file open with O_DIRECT on a file system that is not known to pin pages "
           "(ext4, xfs, btrfs, block devices are)";
}

bool descriptors_is_kvm(const char *link)
{
    return strcmp(link, "anon_inode:kvm-vm") == 0;
}

static const char *look_at_link(int directory, const char *name)
{
    char link[32];
    long got = sys_call4(SYS_readlinkat, directory, name, link, sizeof(link) - 1);

    if (got <= 0)
        return NULL;
    link[got] = 0;
    return descriptors_is_kvm(link)
               ? "nested virtualisation is on, and this kernel (below 6.13) does not pin what it "
                 "uses of a nested guest: load kvm_intel or kvm_amd with nested=0"
               : NULL;
}

bool descriptors_kvm_is_unpinned(void)
{
    static const char *const parameters[] = {"/sys/module/kvm_intel/parameters/nested",
                                             "/sys/module/kvm_amd/parameters/nested"};
    char value;

    if (!procfs_kernel_below(6, 13))
        return false;
    for (size_t i = 0; i < sizeof(parameters) / sizeof(parameters[0]); i++) {
        int fd = (int)sys_call4(SYS_openat, AT_FDCWD, parameters[i], O_RDONLY | O_CLOEXEC, 0);
        long got = fd < 0 ? 0 : sys_read(fd, &value, 1);
        if (fd >= 0)
            sys_close(fd);
        if (got == 1 && (value == 'Y' || value == '1'))
            return true;
    }
    return false;
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

static const char *check_entries(const char *buffer, long bytes, int directory, bool unpinned_kvm)
{
    const char *word = NULL;

    for (long at = 0; at < bytes && !word;) {
        const struct dirent64_head *entry = (const void *)(buffer + at);
        int fd = parse_descriptor(entry->name);
        if (fd >= 0 && fd != directory) {
            word = look_at_file(fd);
            if (!word && unpinned_kvm)
                word = look_at_link(directory, entry->name);
        }
        at += entry->reclen;
    }
    return word;
}

bool descriptors_check(bool unpinned_kvm, char *reason)
{
    const char *word = NULL;
    char buffer[4096] __attribute__((aligned(8)));
    int directory = (int)sys_call4(SYS_openat, AT_FDCWD, "/proc/self/fd",
                                   O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    long got = directory;

    while (directory >= 0 && !word &&
           (got = sys_call3(SYS_getdents64, directory, buffer, sizeof(buffer))) > 0)
        word = check_entries(buffer, got, directory, unpinned_kvm);
    if (directory >= 0)
        sys_close(directory);
    if (got < 0)
        word = "the VMM's descriptors can't be listed (/proc/self/fd: a chroot?)";
    if (word)
        strncpy(reason, word, PROTOCOL_TEXT_BYTES);
    return !word;
}
