/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libmemd: the way in for a VMM that calls memd itself.
 *
 * A VMM attaches once, registers the RAM of its guest, tells the agent about every change that it
 * makes to that memory, and detaches. In between the agent's two threads do the work: they share,
 * drop and (in time) evict and move pages under the running guest, and the VMM sees nothing but
 * its memory.
 *
 * Every function returns 0 or -errno, never prints, and leaves result pointers untouched when it
 * fails. Whatever fails, the guest's memory stays right: an agent that can't work leaves it alone.
 * One virtual machine a process.
 *
 * Structs carry their own size, so that a VMM built against an older header goes on working; new
 * fields come at the end and are zero when they are missing.
 */
#ifndef MEMD_MEMD_H
#define MEMD_MEMD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MEMD_API __attribute__((visibility("default")))

struct memd_vm;

/*
 * What the VMM offers. Each may be NULL. They are called on the agent's scanner thread, never with
 * one of the agent's locks held, `opaque` being that of struct memd_options. A hook that answers
 * with something impossible is not asked again (memctl guest says so), and the guest goes on.
 */
struct memd_ops {
    size_t size; /* sizeof(struct memd_ops) */

    /* Stop all vCPUs and finish all I/O to guest memory; return 0 when that is so, or -errno. */
    int (*pause)(void *opaque);
    /* Let them run again. Called exactly once for each pause that returned 0. */
    int (*resume)(void *opaque);
    /*
     * Is any page of [addr, addr + bytes) in use by somebody who does not show up as a page table
     * entry or as a pin of the kernel's (a device that was given its address, another process that
     * maps it)? 1: leave it alone, 0: no, -errno: can't tell, which counts as 1.
     */
    int (*pinned)(void *opaque, const void *addr, size_t bytes);
};

struct memd_options {
    size_t size;                /* sizeof(struct memd_options) */
    const char *socket;         /* memd's agent socket; NULL: /run/memd/memd.sock.agent. Copied. */
    const char *token;          /* 32 hexadecimal digits from the registration, or NULL. Copied. */
    const char *vmm;            /* what memctl shows as the VMM's kind, at most 31 bytes. Copied. */
    const struct memd_ops *ops; /* may be NULL. Copied. */
    void *opaque;
};

/*
 * Starts the agent: userfaultfd is opened and tried out, the two threads start, the connection to
 * memd is made in the background and made again whenever it breaks. Call it before a seccomp
 * filter or a change of uid.
 *
 * -ENOSYS: this kernel can't freeze pages (UFFDIO_MOVE, Linux 6.8); -EPERM: userfaultfd is
 * withheld; -EBUSY: this process has an agent; -EINVAL: an option is wrong.
 */
MEMD_API int memd_attach(const struct memd_options *options, struct memd_vm **ret_vm);

/* The promise that no other thread touches the range yet: it may be mapped anew. */
#define MEMD_RAM_FRESH 1U

/*
 * Registers guest RAM: whole 4 KiB pages, private, anonymous, readable and writable, of this
 * process alone. -EINVAL, -EPERM, -EEXIST (overlaps RAM that is registered), -ENOSPC: it is left
 * alone, and memctl guest says why.
 */
MEMD_API int memd_ram_add(struct memd_vm *vm, void *addr, size_t bytes, unsigned flags);

/* Ends the management of RAM: every page in it is private again. Whole blocks, as they were
 * registered; -ENOENT when there is no such block, -ENOMEM when pages can't be made private (the
 * block then stays registered). */
MEMD_API int memd_ram_remove(struct memd_vm *vm, void *addr, size_t bytes);

/* The guest gave these pages up (balloon, free page reporting): they become empty and read as
 * zeros. Use this in place of madvise(MADV_DONTNEED). The range may go beyond registered RAM. */
MEMD_API int memd_ram_discard(struct memd_vm *vm, void *addr, size_t bytes);

struct memd_status {
    size_t size;          /* sizeof(struct memd_status), set by the caller */
    uint64_t pages;       /* all of what is registered, in 4 KiB pages */
    uint64_t shared;      /* of these, in the store */
    uint64_t zero;        /* dropped zero pages */
    uint64_t merges;      /* pages that became shared, ever */
    uint64_t unmerges;    /* shares that ended, ever */
    uint64_t zero_merges; /* zero pages that were dropped, ever */
    uint64_t captives;    /* private pages that can't be frozen, see memd(7) */
    uint32_t connected;   /* 1: memd answers */
    uint32_t passes;      /* scan passes ended */
};

MEMD_API int memd_get_status(struct memd_vm *vm, struct memd_status *ret_status);

/* Makes every page private, ends the threads and the connection, frees the handle. -ENOMEM: some
 * pages can't be made private now; nothing has ended. */
MEMD_API int memd_detach(struct memd_vm *vm);

#ifdef __cplusplus
}
#endif

#endif
