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

#include <elf.h>
#include <errno.h>

#include "fuzz.h"

/* What a seed is made of: a core of 64 or 32 bits in either byte order, with these segments. */
struct seed {
    bool narrow, big_endian;
    uint16_t type;  /* e_type */
    uint16_t count; /* e_phnum as it says itself; PN_XNUM puts it into a section header */
    uint64_t more;  /* see above */
    struct segment {
        uint32_t type;
        uint64_t address, offset, filled, size;
    } segments[3];
};

static const struct seed seeds[] = {
    {.type = ET_CORE,
     .count = 2,
     .segments = {{PT_LOAD, 0, 4096, 8192, 8192}, {PT_LOAD, 1 << 20, 12288, 4096, 24576}}},
    {.narrow = true,
     .type = ET_CORE,
     .count = 3,
     .segments = {{PT_NOTE, 0, 1000, 300, 300},
                  {PT_LOAD, 0, 4096, 8192, 8192},
                  {PT_LOAD, 65536, 12288, 4096, 4096}}},
    {.big_endian = true, .type = ET_CORE, .count = 1, .segments = {{PT_LOAD, 0, 4096, 4096, 4096}}},
    {.type = ET_CORE, .count = PN_XNUM, .segments = {{PT_LOAD, 0, 4096, 4096, 4096}}},
    {.type = ET_CORE,
     .count = 2,
     .segments = {{PT_LOAD, 0x4000, 8192, 8192, 8192}, {PT_LOAD, 0x3000, 4096, 8192, 8192}}},
    {.type = ET_CORE,
     .count = 2,
     .segments = {{PT_LOAD, 0x4000, 8192, 8192, 8192}, {PT_LOAD, 0x9000, 8192, 8192, 8192}}},
    {.type = ET_CORE,
     .count = 1,
     .more = 3ULL << 30,
     .segments = {{PT_LOAD, 0, 4096, 2ULL << 30, 2ULL << 30}}},
    {.type = ET_CORE, .count = 1, .segments = {{PT_LOAD, 0, 4096, 4096, 1ULL << 60}}},
    {.type = ET_CORE, .count = 0},
    {.type = ET_EXEC, .count = 1, .segments = {{PT_LOAD, 0, 4096, 4096, 4096}}},
};

/* Writes numbers one behind the other in a seed's byte order. */
struct writer {
    uint8_t *at, *end;
    bool big_endian;
};

static void put(struct writer *to, uint64_t value, size_t bytes)
{
    for (size_t i = 0; i < bytes && to->at < to->end; i++)
        *to->at++ = (uint8_t)(value >> 8 * (to->big_endian ? bytes - 1 - i : i));
}

static void put_segment(struct writer *to, const struct segment *segment, size_t word)
{
    put(to, segment->type, 4);
    if (word == 8)
        put(to, PF_R | PF_W, 4);
    put(to, segment->offset, word);
    put(to, 0, word); /* p_vaddr */
    put(to, segment->address, word);
    put(to, segment->filled, word);
    put(to, segment->size, word);
    if (word == 4)
        put(to, PF_R | PF_W, 4);
    put(to, 0, word); /* p_align */
}

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    const struct seed *seed = &seeds[number];
    struct writer to = {.at = into, .end = into + room};
    size_t word, head, segments;

    if (number >= sizeof(seeds) / sizeof(seeds[0]))
        return 0;
    to.big_endian = seed->big_endian;
    word = seed->narrow ? 4 : 8;
    head = seed->narrow ? sizeof(Elf32_Ehdr) : sizeof(Elf64_Ehdr);
    segments = seed->count == PN_XNUM ? 1 : seed->count;
    memcpy(to.at, ELFMAG, SELFMAG);
    to.at += SELFMAG;
    put(&to, seed->narrow ? ELFCLASS32 : ELFCLASS64, 1);
    put(&to, seed->big_endian ? ELFDATA2MSB : ELFDATA2LSB, 1);
    put(&to, EV_CURRENT, 1);
    memset(to.at, 0, EI_NIDENT - EI_OSABI);
    to.at += EI_NIDENT - EI_OSABI;
    put(&to, seed->type, 2);
    put(&to, EM_X86_64, 2);
    put(&to, EV_CURRENT, 4);
    put(&to, 0, word);
    put(&to, head, word);
    put(&to, seed->count == PN_XNUM ? head + segments * (seed->narrow ? 32 : 56) : 0, word);
    put(&to, 0, 4);
    put(&to, head, 2);
    put(&to, seed->narrow ? 32 : 56, 2);
    put(&to, seed->count, 2);
    put(&to, seed->narrow ? 40 : 64, 2);
    put(&to, 0, 4);
    for (size_t i = 0; i < segments; i++)
        put_segment(&to, &seed->segments[i], word);
    for (size_t i = 0; i < 10 && seed->count == PN_XNUM; i++) /* sh_info says how many */
        put(&to, i == 7 ? segments : 0, i < 2 || i == 6 || i == 7 ? 4 : word);
    to.big_endian = false;
    put(&to, 65536 + seed->more, 8);
    return (size_t)(to.at - into);
}

struct file {
    const uint8_t *bytes;
    size_t count;
    uint64_t size;
};

static int read_file(void *context, uint64_t offset, void *to, size_t count)
{
    const struct file *file = context;

    FUZZ_REQUIRE(offset <= file->size && count <= file->size - offset);
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

    FUZZ_REQUIRE(ram->pages > 0 && ram->pages <= ANALYZE_PAGES_MAX);
    FUZZ_REQUIRE(ram->extent_count <= ELF_SEGMENTS_MAX);
    for (size_t i = 0; i < ram->extent_count; i++) {
        const struct analyze_extent *extent = &ram->extents[i];

        FUZZ_REQUIRE(extent->pages > 0 && extent->page >= page);
        page = extent->page + extent->pages;
        FUZZ_REQUIRE(page <= ram->pages);
    }
    qsort(ram->extents, ram->extent_count, sizeof(*ram->extents), by_offset);
    for (size_t i = 0; i < ram->extent_count; i++) {
        const struct analyze_extent *extent = &ram->extents[i];

        FUZZ_REQUIRE(extent->offset >= offset);
        offset = extent->offset + extent->pages * PAGE_BYTES;
        FUZZ_REQUIRE(offset <= size);
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
        FUZZ_REQUIRE(why[0] != '\0' && ram.pages == 77 && !ram.extents);
    } else {
        FUZZ_REQUIRE(error == 0);
        check_ram(&ram, file.size);
        free(ram.extents);
    }
    return 0;
}
