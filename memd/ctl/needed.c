/* SPDX-License-Identifier: Apache-2.0 */
/* The DT_NEEDED entries of a program's dynamic section. Sections may be stripped, so that only the
 * program headers are looked at. Numbers from the file are used for nothing but pread(). */
#include "needed.h"

#include <string.h>
#include <unistd.h>

#define ENTRIES_MAX 4096U /* of a dynamic section; real ones have some dozens */
#define NAME_CHARS  64U

static bool read_segment(int fd, const Elf64_Ehdr *elf, uint32_t number, Elf64_Phdr *ret_segment)
{
    off_t at = (off_t)(elf->e_phoff + number * sizeof(*ret_segment));

    return pread(fd, ret_segment, sizeof(*ret_segment), at) == sizeof(*ret_segment);
}

/* Where in the file the byte at this address comes from; 0 when from nowhere. */
static uint64_t offset_of(int fd, const Elf64_Ehdr *elf, uint64_t address)
{
    Elf64_Phdr segment;

    for (uint32_t i = 0; i < elf->e_phnum && read_segment(fd, elf, i, &segment); i++)
        if (segment.p_type == PT_LOAD && address >= segment.p_vaddr &&
            address - segment.p_vaddr < segment.p_filesz)
            return segment.p_offset + (address - segment.p_vaddr);
    return 0;
}

static bool find_dynamic(int fd, const Elf64_Ehdr *elf, Elf64_Phdr *ret_dynamic)
{
    for (uint32_t i = 0; i < elf->e_phnum && read_segment(fd, elf, i, ret_dynamic); i++)
        if (ret_dynamic->p_type == PT_DYNAMIC)
            return true;
    return false;
}

/* The entry at `number`; false behind the last one. */
static bool read_entry(int fd, const Elf64_Phdr *dynamic, uint32_t number, Elf64_Dyn *ret_entry)
{
    uint64_t at = number * sizeof(*ret_entry);

    return number < ENTRIES_MAX && at < dynamic->p_filesz &&
           pread(fd, ret_entry, sizeof(*ret_entry), (off_t)(dynamic->p_offset + at)) ==
               sizeof(*ret_entry) &&
           ret_entry->d_tag != DT_NULL;
}

static bool name_begins(int fd, uint64_t at, const char *name)
{
    char found[NAME_CHARS] = "";

    return pread(fd, found, sizeof(found) - 1, (off_t)at) > 0 &&
           strncmp(found, name, strlen(name)) == 0;
}

bool ctl_needed_has(int fd, const Elf64_Ehdr *elf, const char *name)
{
    Elf64_Phdr dynamic;
    Elf64_Dyn entry;
    uint64_t names = 0;

    if (!find_dynamic(fd, elf, &dynamic))
        return false;
    for (uint32_t i = 0; names == 0 && read_entry(fd, &dynamic, i, &entry); i++)
        if (entry.d_tag == DT_STRTAB)
            names = offset_of(fd, elf, entry.d_un.d_ptr);
    for (uint32_t i = 0; names && read_entry(fd, &dynamic, i, &entry); i++)
        if (entry.d_tag == DT_NEEDED && name_begins(fd, names + entry.d_un.d_val, name))
            return true;
    return false;
}
