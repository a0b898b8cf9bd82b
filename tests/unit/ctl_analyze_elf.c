/* SPDX-License-Identifier: Apache-2.0 */
/* The reader of ELF cores: where pages are, and what is refused and why. */
#include <criterion/criterion.h>
#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "analyze_elf.h"

#define FILE_BYTES (64UL << 10)

struct core {
    uint8_t bytes[FILE_BYTES];
    uint64_t size; /* what the reader is told */
    struct elf_ram ram;
    char why[ANALYZE_WHY_CHARS];
};

/* One test at a time runs in a process. */
static struct core core;

static int read_core(void *context, uint64_t offset, void *to, size_t count)
{
    const struct core *from = context;

    cr_assert(offset <= FILE_BYTES && count <= FILE_BYTES - offset, "read beyond the end");
    memcpy(to, from->bytes + offset, count);
    return 0;
}

/* A 64-bit core with these segments; each field can be spoilt afterwards. */
static Elf64_Phdr *make_core(const Elf64_Phdr *segments, uint16_t count)
{
    Elf64_Ehdr head = {.e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, 1},
                       .e_type = ET_CORE,
                       .e_phoff = sizeof(head),
                       .e_phentsize = sizeof(Elf64_Phdr),
                       .e_phnum = count};

    memset(&core, 0, sizeof(core));
    core.size = FILE_BYTES;
    memcpy(core.bytes, &head, sizeof(head));
    memcpy(core.bytes + sizeof(head), segments, count * sizeof(*segments));
    return (Elf64_Phdr *)(void *)(core.bytes + sizeof(head));
}

static Elf64_Ehdr *head_of(void)
{
    return (Elf64_Ehdr *)(void *)core.bytes;
}

static Elf64_Phdr load(uint64_t paddr, uint64_t offset, uint64_t file_pages, uint64_t pages)
{
    return (Elf64_Phdr){.p_type = PT_LOAD,
                        .p_paddr = paddr,
                        .p_offset = offset,
                        .p_filesz = file_pages * PAGE_BYTES,
                        .p_memsz = pages * PAGE_BYTES};
}

static int read_it(void)
{
    struct elf_input input = {.read = read_core, .context = &core, .size = core.size};

    return ctl_analyze_elf_read(&input, &core.ram, core.why);
}

static void expect_refusal(int error, const char *words)
{
    core.ram = (struct elf_ram){.extents = (void *)1, .pages = 77};
    cr_expect(read_it() == error);
    cr_expect(core.ram.extents == (void *)1 && core.ram.pages == 77, "touched on failure");
    cr_expect(strstr(core.why, words), "no '%s' in: %s", words, core.why);
}

static void expect_extent(size_t index, uint64_t page, uint64_t pages, uint64_t offset)
{
    cr_assert(index < core.ram.extent_count);
    cr_expect(core.ram.extents[index].page == page);
    cr_expect(core.ram.extents[index].pages == pages);
    cr_expect(core.ram.extents[index].offset == offset);
}

Test(ctl_analyze_elf, segments_are_laid_out_by_address_and_what_is_not_in_the_file_is_zeros)
{
    Elf64_Phdr segments[] = {{.p_type = PT_NOTE, .p_offset = 1UL << 60, .p_filesz = 5},
                             load(0x100000, 4099, 3, 3),
                             load(0, 20000, 2, 5),
                             load(0x80000, 0, 0, 4)};

    make_core(segments, 4);
    cr_assert(read_it() == 0, "%s", core.why);
    cr_expect(core.ram.pages == 12 && core.ram.extent_count == 2);
    expect_extent(0, 0, 2, 20000);
    expect_extent(1, 9, 3, 4099);
    free(core.ram.extents);
}

Test(ctl_analyze_elf, cores_of_32_bits_and_of_the_other_byte_order_are_read)
{
    static const uint8_t head[] = {0x7f,      'E',       'L',     'F',
                                   1,         2,         1,       [17] = 4, /* ET_CORE */
                                   [31] = 52, [43] = 32, [45] = 1};
    static const uint8_t segment[] = {
        [3] = PT_LOAD, [6] = 0x20,  [13] = 0x10, /* p_paddr 0x100000 */
        [18] = 0x20,   [22] = 0x30, [31] = 0};

    make_core(NULL, 0);
    memcpy(core.bytes, head, sizeof(head));
    memcpy(core.bytes + 52, segment, sizeof(segment));
    cr_assert(read_it() == 0, "%s", core.why);
    cr_expect(core.ram.pages == 3 && core.ram.extent_count == 1);
    expect_extent(0, 0, 2, 0x2000);
    free(core.ram.extents);
}

Test(ctl_analyze_elf, more_segments_than_the_header_can_say)
{
    Elf64_Phdr segments[] = {load(0, 8192, 1, 1), load(0x100000, 16384, 1, 1)};
    Elf64_Shdr section = {.sh_info = 2};

    make_core(segments, 2);
    head_of()->e_phnum = PN_XNUM;
    head_of()->e_shoff = 4096;
    memcpy(core.bytes + 4096, &section, sizeof(section));
    cr_assert(read_it() == 0, "%s", core.why);
    cr_expect(core.ram.pages == 2);
    free(core.ram.extents);
    section.sh_info = UINT32_MAX;
    memcpy(core.bytes + 4096, &section, sizeof(section));
    expect_refusal(-EINVAL, "more than 1048576 segments");
    section.sh_info = ELF_SEGMENTS_MAX;
    memcpy(core.bytes + 4096, &section, sizeof(section));
    expect_refusal(-ENODATA, "cut short");
    head_of()->e_shoff = UINT64_MAX - 3;
    expect_refusal(-ENODATA, "cut short");
}

Test(ctl_analyze_elf, segments_that_say_the_same_twice_are_one)
{
    Elf64_Phdr segments[] = {load(0x4000, 8192, 2, 2), load(0x3000, 4096, 2, 2),
                             load(0x4000, 8192, 1, 1)};

    make_core(segments, 3);
    cr_assert(read_it() == 0, "%s", core.why);
    cr_expect(core.ram.pages == 3 && core.ram.extent_count == 1);
    expect_extent(0, 0, 3, 4096);
    free(core.ram.extents);
}

Test(ctl_analyze_elf, segments_that_contradict_each_other_are_refused)
{
    Elf64_Phdr in_ram[] = {load(0x4000, 4096, 2, 2), load(0x5000, 32768, 2, 2)};
    Elf64_Phdr in_file[] = {load(0x4000, 4096, 2, 2), load(0x8000, 8192, 2, 2)};
    Elf64_Phdr half[] = {load(0x4000, 4096, 1, 2), load(0x5000, 8192, 1, 1)};

    make_core(in_ram, 2);
    expect_refusal(-EINVAL, "overlap in RAM");
    make_core(in_file, 2);
    expect_refusal(-EINVAL, "overlap in the file");
    make_core(half, 2);
    expect_refusal(-EINVAL, "overlap in RAM");
}

Test(ctl_analyze_elf, lies_about_sizes_are_refused)
{
    Elf64_Phdr good = load(0x1000, 4096, 2, 2);
    Elf64_Phdr *segment = make_core(&good, 1);

    segment->p_memsz = 1UL << 60;
    expect_refusal(-E2BIG, "16 TiB");
    segment->p_memsz = PAGE_BYTES;
    expect_refusal(-EINVAL, "longer in the file");
    *segment = good;
    segment->p_filesz = segment->p_memsz = 1UL << 60;
    expect_refusal(-ENODATA, "cut short");
    *segment = good;
    segment->p_offset = UINT64_MAX - 100;
    expect_refusal(-ENODATA, "cut short");
    *segment = good;
    segment->p_paddr = UINT64_MAX - PAGE_BYTES + 1;
    expect_refusal(-EINVAL, "end of all addresses");
    *segment = good;
    segment->p_paddr = 0x1001;
    expect_refusal(-EINVAL, "whole number of pages");
    *segment = good;
    core.size = 4096 + 2 * PAGE_BYTES - 1;
    expect_refusal(-ENODATA, "cut short");
    core.size++;
    cr_expect(read_it() == 0);
    free(core.ram.extents);
}

Test(ctl_analyze_elf, what_is_no_guests_core_is_refused)
{
    Elf64_Phdr process[] = {load(0, 4096, 1, 1), load(0, 8192, 1, 1)};

    make_core(process, 2);
    expect_refusal(-EINVAL, "core of a process");
    make_core(process, 0);
    expect_refusal(-EINVAL, "without any memory");
    make_core(process, 1);
    head_of()->e_type = ET_DYN;
    expect_refusal(-EINVAL, "program or library");
    make_core(process, 1);
    head_of()->e_phentsize = 32;
    expect_refusal(-EINVAL, "unknown size");
    make_core(process, 1);
    head_of()->e_ident[EI_CLASS] = 3;
    expect_refusal(-EINVAL, "neither");
    make_core(process, 1);
    head_of()->e_phoff = UINT64_MAX - 10;
    expect_refusal(-ENODATA, "cut short");
    make_core(process, 1);
    core.size = 63;
    expect_refusal(-ENODATA, "cut short");
    core.size = 3;
    expect_refusal(-ENODATA, "cut short");
}
