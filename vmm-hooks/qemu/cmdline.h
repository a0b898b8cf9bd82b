/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a QEMU command line says about the guest's memory, and the same line with memd's additions.
 *
 * Nothing here starts, opens or changes anything, and nothing here logs: words for the user are
 * collected in struct qemu_cmdline.
 */
#ifndef MEMD_QEMU_CMDLINE_H
#define MEMD_QEMU_CMDLINE_H

#include "units.h"

#define QEMU_CMDLINE_WORDS_MAX    16
#define QEMU_CMDLINE_BACKENDS_MAX 64

/* The identifier of the memory backend that qemu_cmdline_extend() adds. */
#define QEMU_BACKEND_ID "memd.ram"

/* A memory backend that the user brought. */
struct qemu_backend {
    char *id;
    uint64_t bytes;
};

struct qemu_cmdline {
    uint64_t ram_bytes;     /* RAM at the start, DIMMs included; 0: the line does not say */
    uint64_t machine_bytes; /* the machine's own part of it (-m), rounded up as QEMU does */
    bool merge_off;         /* mem-merge=off: the user wants nothing shared */
    bool daemonizes;        /* the process that is started is not the one that runs the guest */
    bool graphical;         /* there is a display to put a monitor on */
    bool nographic;
    bool incoming;        /* it asks for -incoming itself */
    bool default_monitor; /* QEMU makes one by itself, unless another monitor is asked for */
    bool default_serial;
    char *machine;        /* the machine type, NULL: QEMU's default */
    const char *keep_ram; /* why the RAM must stay as the user has it; NULL: it need not */
    char *words[QEMU_CMDLINE_WORDS_MAX]; /* what the user should know, each one sentence */
    size_t word_count;

    /* While reading. */
    bool size_given;
    bool size_elsewhere; /* a configuration file may say it */
    bool x86;            /* the binary's default machine is a PC with 128 MiB */
    struct qemu_backend backends[QEMU_CMDLINE_BACKENDS_MAX];
    size_t backend_count;
    char *dimms[QEMU_CMDLINE_BACKENDS_MAX]; /* identifiers of the backends that DIMMs use */
    size_t dimm_count;
};

/* What qemu_cmdline_extend() shall add; a NULL adds nothing. */
struct qemu_extras {
    const char *qmp_path;      /* a unix socket for QMP that QEMU shall make */
    const char *ram_directory; /* put guest RAM on a shared file in this directory */
    bool incoming;             /* wait for a guest (migrate.h) instead of starting one */
};

/* True when a program of this name (path allowed) is QEMU's system emulator. */
bool qemu_cmdline_is_qemu(const char *program);

/* Reads argv (argv[0] is the program, NULL at the end) into *ret_cmdline, which the caller frees
 * with qemu_cmdline_free(). -ENOMEM; -EINVAL for a line that QEMU itself will not take (an option
 * without its value, a size that is none), with a word that says what; *ret_cmdline is then filled
 * as far as it went and must be freed as well. */
int qemu_cmdline_read(char *const argv[], struct qemu_cmdline *ret_cmdline);

/* argv with the extras behind it, as a NULL-terminated list of its own that the caller frees with
 * qemu_cmdline_free_argv(). 0 or -ENOMEM. */
int qemu_cmdline_extend(const struct qemu_cmdline *cmdline, const struct qemu_extras *extras,
                        char *const argv[], char ***ret_argv);

/* The beginning that the path of every file has which QEMU makes for the backend in `directory`
 * (it unlinks the file at once). A new string, or NULL when there is no memory. */
char *qemu_cmdline_ram_prefix(const char *directory);

void qemu_cmdline_free(struct qemu_cmdline *cmdline);
void qemu_cmdline_free_argv(char **argv);

#endif
