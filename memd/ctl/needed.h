/* SPDX-License-Identifier: Apache-2.0 */
/* Which libraries a program was linked with. */
#ifndef MEMD_CTL_NEEDED_H
#define MEMD_CTL_NEEDED_H

#include <elf.h>
#include <stdbool.h>

/* Whether the native 64-bit ELF program in `fd` asks the dynamic linker for a library whose name
 * begins with `name`. False as well when its tables can't be read. */
bool ctl_needed_has(int fd, const Elf64_Ehdr *elf, const char *name);

#endif
