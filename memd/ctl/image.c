/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The dynamic linker preloads a library only into programs that have a dynamic linker, the same
 * one as ours, and that don't gain rights when they are started (AT_SECURE): it would skip the
 * agent silently, or not start the program at all. So we look before.
 *
 * Rights that a program would not gain for this very caller (a set-uid root program started by
 * root) are not told apart: such a program is treated as one that gains them.
 */
#include "image.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "needed.h"

#define SCRIPT_LINE_CHARS 256 /* as many as the kernel looks at */
#define SCRIPT_DEPTH      4

struct image {
    bool elf;
    bool native; /* our ELF class and machine */
    bool dynamic;
    bool linked;                /* with libmemd */
    char interpreter[PATH_MAX]; /* the dynamic linker, or the one behind #! */
};

static int is_program(const char *path)
{
    struct stat status;

    if (stat(path, &status) < 0)
        return -errno;
    if (!S_ISREG(status.st_mode))
        return -EACCES;
    return access(path, X_OK) < 0 ? -errno : 0;
}

int ctl_image_find(const char *program, char **ret_path)
{
    const char *directories = getenv("PATH");
    char path[PATH_MAX];
    int error = -ENOENT;

    if (strchr(program, '/')) {
        error = is_program(program);
        if (error < 0)
            return error;
        *ret_path = strdup(program);
        return *ret_path ? 0 : -ENOMEM;
    }
    if (!directories)
        directories = "/usr/local/bin:/usr/bin:/bin";
    for (size_t length; *directories; directories += length + (directories[length] == ':')) {
        int found;

        length = strcspn(directories, ":");
        snprintf(path, sizeof(path), "%.*s/%s", (int)length, length ? directories : ".", program);
        found = is_program(path);
        if (found == 0) {
            *ret_path = strdup(path);
            return *ret_path ? 0 : -ENOMEM;
        }
        error = found == -EACCES ? found : error;
    }
    return error;
}

/* The interpreter of a script: the first word behind "#!". */
static int read_script(const char *head, struct image *image)
{
    const char *from = head + 2 + strspn(head + 2, " \t");
    size_t length = strcspn(from, " \t\n");

    if (length == 0 || length >= sizeof(image->interpreter))
        return -ENOEXEC;
    memcpy(image->interpreter, from, length);
    image->interpreter[length] = '\0';
    return 0;
}

static int read_program_header(int fd, const Elf64_Phdr *header, struct image *image)
{
    ssize_t got;

    if (header->p_type != PT_INTERP)
        return 0;
    if (header->p_filesz == 0 || header->p_filesz > sizeof(image->interpreter))
        return -ENOEXEC;
    got = pread(fd, image->interpreter, header->p_filesz, (off_t)header->p_offset);
    if (got != (ssize_t)header->p_filesz)
        return got < 0 ? -errno : -ENOEXEC;
    image->interpreter[header->p_filesz - 1] = '\0';
    image->dynamic = true;
    return 0;
}

/* A program of another class or machine is not looked into: it has another dynamic linker. */
static int read_elf(int fd, const Elf64_Ehdr *elf, struct image *image)
{
    image->elf = true;
    image->native = elf->e_ident[EI_CLASS] == ELFCLASS64 &&
#if defined(__x86_64__)
                    elf->e_machine == EM_X86_64;
#elif defined(__aarch64__)
                    elf->e_machine == EM_AARCH64;
#else
                    true;
#endif
    for (size_t i = 0; image->native && i < elf->e_phnum; i++) {
        Elf64_Phdr header;
        off_t offset = (off_t)(elf->e_phoff + i * sizeof(header));
        int error;

        if (pread(fd, &header, sizeof(header), offset) != sizeof(header))
            return -ENOEXEC;
        error = read_program_header(fd, &header, image);
        if (error < 0)
            return error;
    }
    image->linked = image->native && image->dynamic && ctl_needed_has(fd, elf, "libmemd.so");
    return 0;
}

static int read_image(const char *path, struct image *ret_image)
{
    union {
        char text[SCRIPT_LINE_CHARS + 1];
        Elf64_Ehdr elf;
    } head = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int error = -ENOEXEC;
    ssize_t got;

    if (fd < 0)
        return -errno;
    *ret_image = (struct image){0};
    got = read(fd, head.text, SCRIPT_LINE_CHARS);
    if (got < 0)
        error = -errno;
    else if (got >= (ssize_t)sizeof(Elf64_Ehdr) && memcmp(head.text, ELFMAG, SELFMAG) == 0)
        error = read_elf(fd, &head.elf, ret_image);
    else if (got > 2 && memcmp(head.text, "#!", 2) == 0)
        error = read_script(head.text, ret_image);
    close(fd);
    return error;
}

static const char *rights_gained(const char *path)
{
    struct stat status;

    if (stat(path, &status) < 0)
        return NULL;
    if (status.st_mode & S_ISUID)
        return "set-uid";
    if ((status.st_mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP))
        return "set-gid";
    if (getxattr(path, "security.capability", NULL, 0) > 0)
        return "with file capabilities";
    return NULL;
}

/* True when the program has the dynamic linker that we (and the agent's library) have. */
static bool same_linker(const struct image *image)
{
    struct image own = {0};
    char theirs[PATH_MAX], ours[PATH_MAX];

    if (read_image("/proc/self/exe", &own) < 0 || !own.dynamic)
        return false;
    return realpath(image->interpreter, theirs) && realpath(own.interpreter, ours) &&
           strcmp(theirs, ours) == 0;
}

static void judge_elf(const char *path, const struct image *image, char reason[IMAGE_REASON_CHARS])
{
    const char *rights = rights_gained(path);

    if (!image->native)
        snprintf(reason, IMAGE_REASON_CHARS,
                 "the VMM is built for another machine: no agent can be preloaded");
    else if (!image->dynamic)
        snprintf(reason, IMAGE_REASON_CHARS,
                 "the VMM is linked statically: no agent can be preloaded");
    else if (rights)
        snprintf(reason, IMAGE_REASON_CHARS, "the VMM is %s: no agent can be preloaded", rights);
    else if (!same_linker(image))
        snprintf(reason, IMAGE_REASON_CHARS,
                 "the VMM has another C library than the agent: it can't be preloaded");
}

int ctl_image_inspect(const char *path, char reason[IMAGE_REASON_CHARS], bool *ret_linked,
                      bool *ret_script)
{
    char current[PATH_MAX];
    struct image image = {0};

    reason[0] = '\0';
    *ret_linked = *ret_script = false;
    snprintf(current, sizeof(current), "%s", path);
    for (int depth = 0; depth < SCRIPT_DEPTH; depth++) {
        int error = read_image(current, &image);

        if (error == -EACCES) { /* executable and not readable: the kernel gives it no AT_SECURE,
                                   but nobody can look inside either */
            snprintf(reason, IMAGE_REASON_CHARS,
                     "the VMM can't be read: no agent can be preloaded");
            return 0;
        }
        if (error < 0)
            return error;
        if (image.elf) {
            *ret_linked = image.linked;
            if (!image.linked)
                judge_elf(current, &image, reason);
            return 0;
        }
        *ret_script = true;
        snprintf(current, sizeof(current), "%s", image.interpreter);
    }
    return -ELOOP;
}

char *ctl_image_preload_library(void)
{
    /* As it was built; as it was installed, wherever that was. */
    static const char *const from_here[] = {"../lib/libmemd-preload.so", MEMD_PRELOAD_FROM_BIN};
    char own[PATH_MAX], path[PATH_MAX + sizeof(MEMD_PRELOAD_FROM_BIN) + 32];
    ssize_t length = readlink("/proc/self/exe", own, sizeof(own) - 1);

    own[length > 0 ? length : 0] = '\0';
    for (size_t i = 0; length > 0 && i < sizeof(from_here) / sizeof(from_here[0]); i++) {
        snprintf(path, sizeof(path), "%.*s/%s", (int)(strrchr(own, '/') - own), own, from_here[i]);
        if (access(path, R_OK) == 0)
            return realpath(path, NULL);
    }
    return access(MEMD_PRELOAD_INSTALLED, R_OK) == 0 ? strdup(MEMD_PRELOAD_INSTALLED) : NULL;
}
