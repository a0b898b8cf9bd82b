/* SPDX-License-Identifier: Apache-2.0 */
/* Dumps as sources of analyze: what kind of file it is, where its pages are, and reading them. */
#include "analyze_source.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Holes that are shorter are read as the zeros that they are: what the list of extents takes stays
 * under a byte a page. */
#define HOLE_MIN_BYTES HUGE_BYTES

/* ---- what kind of file ---- */

#define MAGIC_CHARS 16U

/* What begins like this is no raw dump, though its size may fit. */
static const struct {
    const char *magic;
    const char *words;
} foreign_formats[] = {
    {"KDUMP   ", "is a kdump-compressed dump, which analyze can't read; dump again without -z, -l "
                 "or -s (dump-guest-memory FILE)"},
    {"makedumpfile", "is a kdump-compressed dump, which analyze can't read; dump again without "
                     "-z, -l or -s (dump-guest-memory FILE)"},
    {"PAGEDU64", "is a Windows crash dump, which analyze can't read; dump again without -w"},
    {"PAGEDUMP", "is a Windows crash dump, which analyze can't read; dump again without -w"},
    {"QFI\xfb", "is a qcow2 disk image, no dump; make one with QEMU's dump-guest-memory"},
    {"QEVM", "is a migration stream, no dump; make one with QEMU's dump-guest-memory"},
    {"\x1f\x8b\x08", "is compressed with gzip; unpack it first"},
    {"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"},
    {"\xfd"
     "7zXZ",
     "is compressed with xz; unpack it first"},
    {"\x04\x22\x4d\x18", "is compressed with lz4; unpack it first"},
};

static const char *find_foreign(const char head[MAGIC_CHARS])
{
    for (size_t i = 0; i < sizeof(foreign_formats) / sizeof(foreign_formats[0]); i++) {
        if (memcmp(head, foreign_formats[i].magic, strlen(foreign_formats[i].magic)) == 0)
            return foreign_formats[i].words;
    }
    return NULL;
}

/* ---- raw dumps ---- */

/* Not being able to is no error: pages are read then. */
static void map(struct analyze_file *file)
{
    size_t bytes = (size_t)file->status.st_size;
    void *address = mmap(NULL, bytes, PROT_READ, MAP_SHARED, file->fd, 0);

    if (address == MAP_FAILED)
        return;
    madvise(address, bytes, MADV_SEQUENTIAL);
    file->map = address;
}

static int add_extent(struct analyze_file *file, uint64_t start, uint64_t end)
{
    struct analyze_extent *last =
        file->extent_count ? &file->extents[file->extent_count - 1] : NULL;
    struct analyze_extent *grown;

    if (last && start - (last->page + last->pages) * PAGE_BYTES < HOLE_MIN_BYTES) {
        last->pages = end / PAGE_BYTES - last->page;
        return 0;
    }
    /* Powers of two, so that it is a copy only now and then. */
    if (!file->extents || (file->extent_count & (file->extent_count - 1)) == 0) {
        grown = reallocarray(file->extents, file->extent_count ? 2 * file->extent_count : 1,
                             sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        file->extents = grown;
    }
    file->extents[file->extent_count++] = (struct analyze_extent){
        .page = start / PAGE_BYTES, .pages = (end - start) / PAGE_BYTES, .offset = start};
    return 0;
}

/* Lists what is no hole of the file. */
static int list_data(struct analyze_file *file)
{
    uint64_t size = file->pages * PAGE_BYTES, at = 0;
    int error = 0;

    while (error == 0 && at < size) {
        off_t start = lseek(file->fd, (off_t)at, SEEK_DATA), end;

        if (start < 0 && errno == ENXIO)
            return 0;
        end = start < 0 ? -1 : lseek(file->fd, start, SEEK_HOLE);
        if (end < 0) /* the file system can't tell */
            return add_extent(file, at, size);
        start = (off_t)((uint64_t)start / PAGE_BYTES * PAGE_BYTES);
        at = ((uint64_t)end + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
        at = at < size ? at : size;
        error = add_extent(file, (uint64_t)start, at);
    }
    return error;
}

int ctl_analyze_open_raw(int fd, uint64_t pages, struct analyze_file *ret_file)
{
    struct analyze_file file = {.fd = fd, .pages = pages};
    int error;

    if (fstat(fd, &file.status) < 0)
        return -errno;
    error = list_data(&file);
    if (error < 0) {
        free(file.extents);
        return error;
    }
    map(&file);
    *ret_file = file;
    return 0;
}

/* ---- ELF cores ---- */

/* Exactly `count` bytes: 0, or -EIO where the file ends before, or -errno. */
static int read_fully(int fd, uint64_t offset, void *to, size_t count)
{
    for (uint8_t *at = to; count > 0;) {
        ssize_t got = pread(fd, at, count, (off_t)offset);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EIO;
        at += got;
        offset += (uint64_t)got;
        count -= (size_t)got;
    }
    return 0;
}

static int read_elf_file(void *context, uint64_t offset, void *to, size_t count)
{
    return read_fully(*(const int *)context, offset, to, count);
}

static int open_elf(struct analyze_file *file, char why[ANALYZE_WHY_CHARS])
{
    struct elf_input input = {
        .read = read_elf_file, .context = &file->fd, .size = (uint64_t)file->status.st_size};
    struct elf_ram ram;
    int error = ctl_analyze_elf_read(&input, &ram, why);

    if (error < 0)
        return error;
    file->extents = ram.extents;
    file->extent_count = ram.extent_count;
    file->pages = ram.pages;
    map(file);
    return 0;
}

/* ---- opening ---- */

static int refuse(char why[ANALYZE_WHY_CHARS], const char *words, int error)
{
    snprintf(why, ANALYZE_WHY_CHARS, "%s", words);
    return error;
}

/* The checks that a raw dump has to stand. */
static int open_whole(struct analyze_file *file, char why[ANALYZE_WHY_CHARS])
{
    uint64_t bytes = (uint64_t)file->status.st_size;
    int error;

    if (bytes % PAGE_BYTES)
        return refuse(why,
                      "is no raw dump of a guest: its size is no multiple of 4096; if it was cut "
                      "short, dump again, and see that the disk is not full",
                      -EINVAL);
    if (bytes / PAGE_BYTES > ANALYZE_PAGES_MAX)
        return refuse(why, "is larger than the 16 TiB that can be counted; is it a dump at all?",
                      -E2BIG);
    error = ctl_analyze_open_raw(file->fd, bytes / PAGE_BYTES, file);
    return error < 0 ? refuse(why, strerror(-error), error) : 0;
}

/* Finds out what the open file is, and where its pages are. */
static int look_into(struct analyze_file *file, char why[ANALYZE_WHY_CHARS])
{
    char head[MAGIC_CHARS] = {0};

    if (!S_ISREG(file->status.st_mode))
        return refuse(why, "is no regular file; write the dump to a file first", -EINVAL);
    if (file->status.st_size == 0)
        return refuse(why, "is empty; dump again, and see that the disk is not full", -ENODATA);
    if (pread(file->fd, head, sizeof(head), 0) < 0)
        return refuse(why, strerror(errno), -errno);
    if (find_foreign(head))
        return refuse(why, find_foreign(head), -ENOEXEC);
    return memcmp(head, ELFMAG, SELFMAG) == 0 ? open_elf(file, why) : open_whole(file, why);
}

int ctl_analyze_open_dump(const char *path, struct analyze_file *ret_file,
                          char why[ANALYZE_WHY_CHARS])
{
    struct analyze_file file = {.fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
    char words[ANALYZE_WHY_CHARS];
    int error = 0;

    if (file.fd < 0 || fstat(file.fd, &file.status) < 0) {
        error = -errno;
        snprintf(words, sizeof(words), "can't be read: %s", strerror(-error));
    }
    if (error == 0)
        error = look_into(&file, words);
    if (error == 0) {
        *ret_file = file;
        return 0;
    }
    snprintf(why, ANALYZE_WHY_CHARS, "%.150s %.350s", path, words);
    if (file.fd >= 0)
        close(file.fd);
    return error;
}

/* ---- reading ---- */

/* The first extent that does not end before `page`; extent_count when there is none. */
static size_t find_extent(const struct analyze_file *file, uint64_t page)
{
    size_t low = 0, high = file->extent_count;

    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct analyze_extent *extent = &file->extents[middle];

        if (extent->page + extent->pages <= page)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

uint64_t ctl_analyze_hole(const struct analyze_file *file, uint64_t page)
{
    size_t next = find_extent(file, page);
    uint64_t end = next < file->extent_count ? file->extents[next].page : file->pages;

    return end > page ? end - page : 0;
}

int ctl_analyze_read(const struct analyze_file *file, uint64_t page, uint64_t count,
                     uint8_t *buffer)
{
    int error = 0;

    for (size_t i = find_extent(file, page); error == 0 && count > 0;) {
        const struct analyze_extent *extent = &file->extents[i];
        bool there = i < file->extent_count && extent->page <= page;
        uint64_t end = there                    ? extent->page + extent->pages
                       : i < file->extent_count ? extent->page
                                                : page + count;
        uint64_t some = end - page < count ? end - page : count;

        if (there)
            error = read_fully(file->fd, extent->offset + (page - extent->page) * PAGE_BYTES,
                               buffer, some * PAGE_BYTES);
        else
            memset(buffer, 0, some * PAGE_BYTES);
        i += there;
        page += some;
        count -= some;
        buffer += some * PAGE_BYTES;
    }
    return error;
}

int ctl_analyze_view(const struct analyze_file *file, uint64_t page, uint64_t count,
                     uint8_t *buffer, const uint8_t **ret_bytes)
{
    size_t i = find_extent(file, page);
    const struct analyze_extent *extent = &file->extents[i];
    bool whole = file->map && i < file->extent_count && extent->page <= page &&
                 page + count <= extent->page + extent->pages;
    int error = whole ? 0 : ctl_analyze_read(file, page, count, buffer);

    if (error == 0)
        *ret_bytes =
            whole ? file->map + extent->offset + (page - extent->page) * PAGE_BYTES : buffer;
    return error;
}

/* A fault maps more than a page: 64 KiB around it or, from Linux 6.18 on, whole large folios. So
 * nothing may be touched that was dropped, or what is behind comes back: a last page that also
 * holds the beginning of the next view is left to that view. */
void ctl_analyze_drop(const struct analyze_file *file, const uint8_t *bytes, uint64_t count)
{
    uintptr_t start = (uintptr_t)bytes / PAGE_BYTES * PAGE_BYTES;
    uintptr_t end = ((uintptr_t)bytes + count * PAGE_BYTES) / PAGE_BYTES * PAGE_BYTES;

    if (file->map && bytes >= file->map && bytes < file->map + file->status.st_size)
        madvise((void *)start, end - start, MADV_DONTNEED);
}

uint64_t ctl_analyze_data_pages(const struct analyze_file *file)
{
    uint64_t pages = 0;

    for (size_t i = 0; i < file->extent_count; i++)
        pages += file->extents[i].pages;
    return pages;
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
    if (file->map)
        munmap((void *)file->map, (size_t)file->status.st_size);
    free(file->extents);
    close(file->fd);
    file->fd = -1;
}
