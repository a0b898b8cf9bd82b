/* SPDX-License-Identifier: Apache-2.0 */
#include "loader.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "address_map.h"

static int complain(const char *path, int error, const char *why)
{
    fprintf(stderr, "memvm: %s: %s\n", path, why ? why : strerror(-error));
    return error;
}

static const char *judge(const Elf64_Ehdr *elf)
{
    if (memcmp(elf->e_ident, ELFMAG, SELFMAG) != 0 || elf->e_ident[EI_CLASS] != ELFCLASS64)
        return "no 64-bit ELF image";
    if (elf->e_machine != EM_X86_64 || elf->e_type != ET_EXEC)
        return "not a static x86-64 program";
    if (elf->e_phentsize != sizeof(Elf64_Phdr))
        return "its program headers have another size";
    return NULL;
}

static int load_segment(const struct guest_memory *memory, int fd, const Elf64_Phdr *segment,
                        struct loaded *loaded)
{
    uint64_t end = segment->p_paddr + segment->p_memsz;
    uint8_t *to;

    if (segment->p_paddr < ADDRESS_KERNEL || segment->p_filesz > segment->p_memsz)
        return -ENOEXEC;
    to = memory_at(memory, segment->p_paddr, segment->p_memsz);
    if (!to)
        return -ENOSPC;
    if (pread(fd, to, segment->p_filesz, (off_t)segment->p_offset) != (ssize_t)segment->p_filesz)
        return -ENOEXEC;
    if (end > loaded->end)
        loaded->end = end;
    return 0;
}

static int load(const struct guest_memory *memory, int fd, const Elf64_Ehdr *elf,
                struct loaded *loaded)
{
    int r = 0;

    loaded->entry = elf->e_entry;
    for (uint32_t i = 0; r == 0 && i < elf->e_phnum; i++) {
        Elf64_Phdr segment;

        if (pread(fd, &segment, sizeof(segment), (off_t)(elf->e_phoff + i * sizeof(segment))) !=
            sizeof(segment))
            return -ENOEXEC;
        if (segment.p_type == PT_LOAD)
            r = load_segment(memory, fd, &segment, loaded);
    }
    return r == 0 && loaded->end == 0 ? -ENOEXEC : r;
}

int loader_load(const struct guest_memory *memory, const char *path, struct loaded *ret_loaded)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct loaded loaded = {0};
    const char *why = NULL;
    Elf64_Ehdr elf;
    int r = -ENOEXEC;

    if (fd < 0)
        return complain(path, -errno, NULL);
    if (pread(fd, &elf, sizeof(elf), 0) != sizeof(elf))
        why = "no ELF image";
    else
        why = judge(&elf);
    if (!why)
        r = load(memory, fd, &elf, &loaded);
    close(fd);
    if (r < 0)
        return complain(path, r, r == -ENOSPC ? "it does not fit into the guest's memory" : why);
    *ret_loaded = loaded;
    return 0;
}
