/* SPDX-License-Identifier: Apache-2.0 */
/* Raw dumps as a source of analyze. */
#include "analyze_source.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static bool is_core(int fd)
{
    Elf64_Ehdr head;

    return pread(fd, &head, sizeof(head), 0) == sizeof(head) &&
           memcmp(head.e_ident, ELFMAG, SELFMAG) == 0 && head.e_type == ET_CORE;
}

/* 0, or why an open file is no raw dump: -errno, and *ret_fault in words. */
static int judge(int fd, const struct stat *status, const char **ret_fault)
{
    *ret_fault = "is no regular file";
    if (!S_ISREG(status->st_mode))
        return -EINVAL;
    *ret_fault = "is empty";
    if (status->st_size == 0)
        return -ENODATA;
    *ret_fault = "is an ELF core: analyze reads raw dumps";
    if (is_core(fd))
        return -ENOEXEC;
    *ret_fault = "is no raw dump: its size is no multiple of 4096";
    if (status->st_size % (off_t)PAGE_BYTES)
        return -EINVAL;
    *ret_fault = NULL;
    return 0;
}

static int map(struct analyze_file *file)
{
    size_t bytes = (size_t)file->status.st_size;
    void *address = mmap(NULL, bytes, PROT_READ, MAP_SHARED, file->fd, 0);

    if (address == MAP_FAILED)
        return -errno;
    madvise(address, bytes, MADV_SEQUENTIAL);
    file->bytes = address;
    file->pages = bytes / PAGE_BYTES;
    return 0;
}

int ctl_analyze_open_dump(const char *path, struct analyze_file *ret_file,
                          char why[ANALYZE_WHY_CHARS])
{
    struct analyze_file file = {.fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    const char *fault = NULL;
    int error = 0;

    if (file.fd < 0 || fstat(file.fd, &file.status) < 0)
        error = -errno;
    if (error == 0)
        error = judge(file.fd, &file.status, &fault);
    if (error == 0)
        error = map(&file);
    if (error == 0) {
        *ret_file = file;
        return 0;
    }
    snprintf(why, ANALYZE_WHY_CHARS, "%.150s %s%s", path,
             fault ? fault : "can't be read: ", fault ? "" : strerror(-error));
    if (file.fd >= 0)
        close(file.fd);
    return error;
}

bool ctl_analyze_file_is_same(const struct analyze_file *file)
{
    struct stat now;

    return fstat(file->fd, &now) == 0 && now.st_size == file->status.st_size &&
           now.st_mtim.tv_sec == file->status.st_mtim.tv_sec &&
           now.st_mtim.tv_nsec == file->status.st_mtim.tv_nsec;
}

void ctl_analyze_close(struct analyze_file *file)
{
    if (file->fd < 0)
        return;
    munmap((void *)file->bytes, file->pages * PAGE_BYTES);
    close(file->fd);
    file->fd = -1;
}
