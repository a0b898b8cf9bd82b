/* SPDX-License-Identifier: Apache-2.0 */
/* The program that `memctl run` shall start: where it is, whether it brings the agent itself, and
 * whether the dynamic linker will preload the agent into it if not. */
#ifndef MEMD_CTL_IMAGE_H
#define MEMD_CTL_IMAGE_H

#include <stdbool.h>

#include "units.h"

#define IMAGE_REASON_CHARS 160

/* Finds `program` as execvp() would; *ret_path is a new string. -ENOENT, -EACCES, -ENOMEM. */
int ctl_image_find(const char *program, char **ret_path);

/* Says in `reason` why nothing can be preloaded into the program at `path`, "" when it can, and in
 * *ret_linked whether it is linked with libmemd, so that nothing needs to be. For a script
 * (*ret_script) this looks at its interpreter. 0, or -errno when it is no program that can be
 * started (-ENOEXEC: neither ELF nor a script). */
int ctl_image_inspect(const char *path, char reason[IMAGE_REASON_CHARS], bool *ret_linked,
                      bool *ret_script);

/* The path of libmemd-preload.so: beside this build's own binaries, or where it is installed. A
 * new string, or NULL when it is in neither place. */
char *ctl_image_preload_library(void);

#endif
