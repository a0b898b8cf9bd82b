/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The reader of ELF cores, with a file of any bytes. The last 8 bytes are no part of the file: what
 * they say is added to its size, so that headers can speak of terabytes; reading there fails, as it
 * does on a bad disk.
 *
 * What is returned must keep its promises: extents that ascend, have pages, lie within the file and
 * within the guest, and do not share a byte of the file; words that say why, and nothing touched,
 * when there is nothing.
 */
#include "analyze_elf.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "target.h"

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                            \
        }                                                                       \
    } while (0)

struct file {
    const uint8_t *bytes;
    size_t count;
    uint64_t size;
};

static int read_file(void *context, uint64_t offset, void *to, size_t count)
{
    const struct file *file = context;

    CHECK(offset <= file->size && count <= file->size - offset);
    if (offset > file->count || count > file->count - offset)
        return -EIO;
    memcpy(to, file->bytes + offset, count);
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const struct analyze_extent *first = a, *second = b;

    return (first->offset > second->offset) - (first->offset < second->offset);
}

static void check_ram(struct elf_ram *ram, uint64_t size)
{
    uint64_t page = 0, offset = 0;

    CHECK(ram->pages > 0 && ram->pages <= ANALYZE_PAGES_MAX);
    CHECK(ram->extent_count <= ELF_SEGMENTS_MAX);
    for (size_t i = 0; i < ram->extent_count; i++) {
        const struct analyze_extent *extent = &ram->extents[i];

        CHECK(extent->pages > 0 && extent->page >= page);
        page = extent->page + extent->pages;
        CHECK(page <= ram->pages);
    }
    qsort(ram->extents, ram->extent_count, sizeof(*ram->extents), by_offset);
    for (size_t i = 0; i < ram->extent_count; i++) {
        const struct analyze_extent *extent = &ram->extents[i];

        CHECK(extent->offset >= offset);
        offset = extent->offset + extent->pages * PAGE_BYTES;
        CHECK(offset <= size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t count)
{
    struct file file = {.bytes = bytes, .count = count, .size = count};
    struct elf_input input = {.read = read_file, .context = &file};
    struct elf_ram ram = {.pages = 77};
    char why[ANALYZE_WHY_CHARS] = "";
    uint64_t more = 0;
    int error;

    if (count >= sizeof(more)) {
        file.count -= sizeof(more);
        memcpy(&more, bytes + file.count, sizeof(more));
        file.size = file.count + (more & 0xffffffffffULL);
    }
    input.size = file.size;
    error = ctl_analyze_elf_read(&input, &ram, why);
    if (error < 0) {
        CHECK(why[0] != '\0' && ram.pages == 77 && !ram.extents);
    } else {
        CHECK(error == 0);
        check_ram(&ram, file.size);
        free(ram.extents);
    }
    return 0;
}
