/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The reader of ELF cores. One pass over the program headers keeps the PT_LOAD segments that hold
 * something; they are sorted by guest-physical address, joined where they say the same twice
 * (dump-guest-memory with paging=on lists a page once for each address that maps it), and refused
 * where they contradict each other.
 *
 * Invariant of what is returned: every extent lies within the file, and no byte of the file is in
 * two of them. So the pages to be read are never more than the file holds.
 */
#include "analyze_elf.h"

#include <elf.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEADERS_AT_ONCE 256U
#define DUMP_AGAIN      "make it again with QEMU's dump-guest-memory"

/* Where a field stands in its header, for both classes. */
struct field {
    uint8_t offset[2], bytes[2];
};

#define FIELD(header, name)                                                          \
    {                                                                                \
        {offsetof(Elf32_##header, name), offsetof(Elf64_##header, name)},            \
        {                                                                            \
            sizeof(((Elf32_##header *)0)->name), sizeof(((Elf64_##header *)0)->name) \
        }                                                                            \
    }

static const struct field e_type = FIELD(Ehdr, e_type);
static const struct field e_phoff = FIELD(Ehdr, e_phoff);
static const struct field e_phentsize = FIELD(Ehdr, e_phentsize);
static const struct field e_phnum = FIELD(Ehdr, e_phnum);
static const struct field e_shoff = FIELD(Ehdr, e_shoff);
static const struct field p_type = FIELD(Phdr, p_type);
static const struct field p_offset = FIELD(Phdr, p_offset);
static const struct field p_paddr = FIELD(Phdr, p_paddr);
static const struct field p_filesz = FIELD(Phdr, p_filesz);
static const struct field p_memsz = FIELD(Phdr, p_memsz);
static const struct field sh_info = FIELD(Shdr, sh_info);

/* A PT_LOAD segment that holds something. */
struct segment {
    uint64_t paddr, offset;
    uint32_t pages, file_pages;
};

struct reader {
    const struct elf_input *input;
    bool wide;       /* ELFCLASS64 */
    bool big_endian; /* ELFDATA2MSB */
    uint64_t header_offset;
    uint32_t header_count, header_bytes;
    struct segment *segments;
    size_t count, room;
    uint64_t pages; /* of all segments together */
    bool addressed; /* some segment says an address that is not 0 */
    char *why;
};

/* ---- reading what is written in the file ---- */

static uint64_t get(const struct reader *reader, const uint8_t *header, const struct field *field)
{
    const uint8_t *at = header + field->offset[reader->wide];
    uint8_t bytes = field->bytes[reader->wide];
    uint64_t value = 0;

    for (uint8_t i = 0; i < bytes; i++)
        value |= (uint64_t)at[reader->big_endian ? bytes - 1 - i : i] << 8 * i;
    return value;
}

static bool is_within(const struct reader *reader, uint64_t offset, uint64_t count)
{
    return offset <= reader->input->size && count <= reader->input->size - offset;
}

/* 0 or -errno; what reaches beyond the end is a file that was cut short. */
static int fetch(const struct reader *reader, uint64_t offset, void *to, size_t count)
{
    int error;

    if (!is_within(reader, offset, count)) {
        snprintf(reader->why, ANALYZE_WHY_CHARS,
                 "is cut short: its headers reach beyond its end; " DUMP_AGAIN
                 ", and see that the disk is not full");
        return -ENODATA;
    }
    error = reader->input->read(reader->input->context, offset, to, count);
    if (error < 0)
        snprintf(reader->why, ANALYZE_WHY_CHARS, "can't be read: %s", strerror(-error));
    return error;
}

static int refuse(const struct reader *reader, const char *words)
{
    snprintf(reader->why, ANALYZE_WHY_CHARS, "%s", words);
    return -EINVAL;
}

/* ---- the headers ---- */

/* PN_XNUM: more segments than e_phnum can say; the number stands in the first section header. */
static int read_extended_count(struct reader *reader, const uint8_t *head)
{
    uint8_t section[sizeof(Elf64_Shdr)];
    int error = fetch(reader, get(reader, head, &e_shoff), section,
                      reader->wide ? sizeof(Elf64_Shdr) : sizeof(Elf32_Shdr));

    if (error == 0)
        reader->header_count = (uint32_t)get(reader, section, &sh_info);
    return error;
}

static int read_head(struct reader *reader)
{
    uint8_t head[sizeof(Elf64_Ehdr)];
    int error = fetch(reader, 0, head, EI_NIDENT);

    if (error < 0)
        return error;
    reader->wide = head[EI_CLASS] == ELFCLASS64;
    reader->big_endian = head[EI_DATA] == ELFDATA2MSB;
    if (head[EI_CLASS] < ELFCLASS32 || head[EI_CLASS] > ELFCLASS64)
        return refuse(reader, "is an ELF file of neither 32 nor 64 bits; " DUMP_AGAIN);
    error = fetch(reader, 0, head, reader->wide ? sizeof(Elf64_Ehdr) : sizeof(Elf32_Ehdr));
    if (error < 0)
        return error;
    if (get(reader, head, &e_type) != ET_CORE)
        return refuse(reader, "is an ELF program or library, no dump of a guest; " DUMP_AGAIN);
    reader->header_bytes = reader->wide ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr);
    if (get(reader, head, &e_phentsize) != reader->header_bytes)
        return refuse(reader, "has program headers of an unknown size; " DUMP_AGAIN);
    reader->header_offset = get(reader, head, &e_phoff);
    reader->header_count = (uint32_t)get(reader, head, &e_phnum);
    if (reader->header_count == PN_XNUM)
        error = read_extended_count(reader, head);
    if (error == 0 && reader->header_count > ELF_SEGMENTS_MAX)
        return refuse(reader,
                      "claims to have more than 1048576 segments, which no guest has: it is "
                      "damaged; " DUMP_AGAIN " and without paging");
    return error;
}

static int keep(struct reader *reader, const struct segment *segment)
{
    if (reader->count == reader->room) {
        size_t room = reader->room ? 2 * reader->room : 64;
        struct segment *grown = reallocarray(reader->segments, room, sizeof(*grown));

        if (!grown) {
            snprintf(reader->why, ANALYZE_WHY_CHARS, "has too many segments for the memory here");
            return -ENOMEM;
        }
        reader->segments = grown;
        reader->room = room;
    }
    reader->segments[reader->count++] = *segment;
    return 0;
}

/* Whether a segment is one that a guest's RAM can have. */
static int check_segment(const struct reader *reader, uint64_t paddr, uint64_t offset,
                         uint64_t file_bytes, uint64_t bytes)
{
    uint64_t end;

    if (!is_within(reader, offset, file_bytes)) {
        snprintf(reader->why, ANALYZE_WHY_CHARS,
                 "is cut short: a segment ends at byte %" PRIu64 "%s, the file at %" PRIu64
                 "; " DUMP_AGAIN ", and see that the disk is not full",
                 checked_add_u64(offset, file_bytes, &end) ? end : UINT64_MAX,
                 checked_add_u64(offset, file_bytes, &end) ? "" : " or more", reader->input->size);
        return -ENODATA;
    }
    if (file_bytes > bytes)
        return refuse(reader, "has a segment that is longer in the file than in RAM; " DUMP_AGAIN);
    if (paddr % PAGE_BYTES || file_bytes % PAGE_BYTES || bytes % PAGE_BYTES)
        return refuse(reader, "has a segment that is no whole number of pages of 4096 bytes: it "
                              "is no dump of a guest's RAM; " DUMP_AGAIN);
    if (!checked_add_u64(paddr, bytes, &end))
        return refuse(reader, "has a segment beyond the end of all addresses; " DUMP_AGAIN);
    if (bytes / PAGE_BYTES > ANALYZE_PAGES_MAX - reader->pages) {
        snprintf(reader->why, ANALYZE_WHY_CHARS,
                 "claims more RAM than the 16 TiB that can be counted (a segment of %" PRIu64
                 " bytes): it is damaged; " DUMP_AGAIN,
                 bytes);
        return -E2BIG;
    }
    return 0;
}

static int take_header(struct reader *reader, const uint8_t *header)
{
    uint64_t paddr = get(reader, header, &p_paddr), offset = get(reader, header, &p_offset);
    uint64_t file_bytes = get(reader, header, &p_filesz), bytes = get(reader, header, &p_memsz);
    struct segment segment = {.paddr = paddr, .offset = offset};
    int error;

    if (get(reader, header, &p_type) != PT_LOAD || (bytes | file_bytes) == 0)
        return 0;
    error = check_segment(reader, paddr, offset, file_bytes, bytes);
    if (error < 0)
        return error;
    segment.pages = (uint32_t)(bytes / PAGE_BYTES);
    segment.file_pages = (uint32_t)(file_bytes / PAGE_BYTES);
    reader->pages += segment.pages;
    reader->addressed |= paddr != 0;
    return keep(reader, &segment);
}

static int read_headers(struct reader *reader)
{
    uint8_t headers[HEADERS_AT_ONCE * sizeof(Elf64_Phdr)];

    for (uint32_t i = 0, some; i < reader->header_count; i += some) {
        uint64_t offset = (uint64_t)i * reader->header_bytes;
        int error;

        some = reader->header_count - i;
        some = some < HEADERS_AT_ONCE ? some : HEADERS_AT_ONCE;
        if (!checked_add_u64(reader->header_offset, offset, &offset))
            offset = UINT64_MAX;
        error = fetch(reader, offset, headers, (size_t)some * reader->header_bytes);
        for (uint32_t j = 0; error == 0 && j < some; j++)
            error = take_header(reader, headers + (size_t)j * reader->header_bytes);
        if (error < 0)
            return error;
    }
    if (reader->count == 0)
        return refuse(reader, "is an ELF core without any memory in it; " DUMP_AGAIN);
    if (reader->count > 1 && !reader->addressed)
        return refuse(reader, "is the core of a process, not of a guest (no segment says a "
                              "guest-physical address); make one with QEMU's dump-guest-memory");
    return 0;
}

/* ---- from segments to pages ---- */

static int by_address(const void *a, const void *b)
{
    const struct segment *first = a, *second = b;

    if (first->paddr != second->paddr)
        return first->paddr < second->paddr ? -1 : 1;
    return (first->pages > second->pages) - (first->pages < second->pages);
}

static int by_offset(const void *a, const void *b)
{
    const struct segment *first = a, *second = b;

    return (first->offset > second->offset) - (first->offset < second->offset);
}

static uint64_t end_of(const struct segment *segment)
{
    return segment->paddr + segment->pages * PAGE_BYTES;
}

/* `next` begins within `last` and says the same of what both speak of: makes one of the two. */
static int join(const struct reader *reader, struct segment *last, const struct segment *next)
{
    bool whole = last->pages == last->file_pages && next->pages == next->file_pages;

    if (!whole || next->offset - last->offset != next->paddr - last->paddr)
        return refuse(reader, "has segments that overlap in RAM and hold different bytes: it is "
                              "damaged; " DUMP_AGAIN " and without paging");
    if (end_of(next) > end_of(last))
        last->pages = last->file_pages = (uint32_t)((end_of(next) - last->paddr) / PAGE_BYTES);
    return 0;
}

static int join_segments(struct reader *reader)
{
    size_t kept = 0;

    qsort(reader->segments, reader->count, sizeof(*reader->segments), by_address);
    for (size_t i = 1; i < reader->count; i++) {
        int error = 0;

        if (reader->segments[i].paddr < end_of(&reader->segments[kept]))
            error = join(reader, &reader->segments[kept], &reader->segments[i]);
        else
            reader->segments[++kept] = reader->segments[i];
        if (error < 0)
            return error;
    }
    reader->count = kept + 1;
    return 0;
}

/* No byte of the file may be in two segments: a small file could claim no end of pages. */
static int check_file_overlap(struct reader *reader)
{
    uint64_t end = 0;

    qsort(reader->segments, reader->count, sizeof(*reader->segments), by_offset);
    for (size_t i = 0; i < reader->count; i++) {
        const struct segment *segment = &reader->segments[i];

        if (segment->file_pages && segment->offset < end)
            return refuse(reader, "has segments that overlap in the file: it is "
                                  "damaged; " DUMP_AGAIN);
        if (segment->file_pages)
            end = segment->offset + segment->file_pages * PAGE_BYTES;
    }
    return 0;
}

static int make_extents(struct reader *reader, struct elf_ram *ret_ram)
{
    struct elf_ram ram = {.extents = calloc(reader->count, sizeof(*ram.extents))};

    if (!ram.extents) {
        snprintf(reader->why, ANALYZE_WHY_CHARS, "has too many segments for the memory here");
        return -ENOMEM;
    }
    qsort(reader->segments, reader->count, sizeof(*reader->segments), by_address);
    for (size_t i = 0; i < reader->count; i++) {
        const struct segment *segment = &reader->segments[i];

        if (segment->file_pages)
            ram.extents[ram.extent_count++] = (struct analyze_extent){
                .page = ram.pages, .pages = segment->file_pages, .offset = segment->offset};
        ram.pages += segment->pages;
    }
    *ret_ram = ram;
    return 0;
}

int ctl_analyze_elf_read(const struct elf_input *input, struct elf_ram *ret_ram,
                         char why[ANALYZE_WHY_CHARS])
{
    struct reader reader = {.input = input, .why = why};
    int error = read_head(&reader);

    if (error == 0)
        error = read_headers(&reader);
    if (error == 0)
        error = join_segments(&reader);
    if (error == 0)
        error = check_file_overlap(&reader);
    if (error == 0)
        error = make_extents(&reader, ret_ram);
    free(reader.segments);
    return error;
}
