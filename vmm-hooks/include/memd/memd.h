/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libmemd: the way in for a VMM that calls memd itself. libmemd(7) is the manual.
 *
 * A VMM attaches once, registers the RAM of its guest, tells the agent about every change that it
 * makes to that memory, and detaches. In between the agent's two threads do the work: they share,
 * drop and (in time) evict and move pages under the running guest, and the VMM sees nothing but
 * its memory.
 *
 * Every function returns 0 or -errno, never prints, and leaves result pointers untouched when it
 * fails. Whatever fails, the guest's memory stays right: an agent that can't work leaves it alone.
 * One virtual machine a process. Every function may be called from any thread; none from a signal
 * handler.
 *
 * Versions. Structs carry their own size, the caller's sizeof; new fields come at the end.
 *   - A VMM that was built against an older header gives a smaller struct: what is missing is zero.
 *   - A VMM that was built against a newer one gives a larger struct. Options behind what this
 *     library knows must be zero, else -E2BIG: what the VMM asks for can't be had. Hooks behind it
 *     are not called, as any hook may not be called. A status is filled as far as it is known.
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
struct memd_stream;

/*
 * What the VMM offers. Each hook may be NULL; where two belong together it is both or none. They
 * are called one at a time, on threads of the agent's, never with one of the agent's locks held,
 * `opaque` being that of struct memd_options. A hook may call libmemd, but not memd_detach. It may
 * not unwind (longjmp, C++ exceptions) through the agent.
 *
 * A hook that answers with something impossible, or takes longer than its limit (1 s, for pause,
 * resume, save and load 60 s), has broken the contract: from then on no hook is called but what
 * ends something that has begun (resume, unvouch), memctl guest shows the offence, and the agent
 * goes on as if every question had been answered with "leave it alone".
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

    /*
     * Save and load of everything that makes up the virtual machine but the RAM that is registered:
     * vCPUs, devices, what is in flight between them. Called only between a pause that returned 0
     * and its resume.
     *
     * save writes the state with memd_stream_write, in a form of the VMM's own that the same
     * version of the VMM, started with the same machine, can load, on another host too. It leaves
     * the machine as it was. 0, or -errno: nothing counts as saved. Once a write has failed save
     * must fail.
     *
     * load replaces the state by one that save wrote, with memd_stream_read; it reads all of it.
     * What it reads has come from outside of this process: it is to be checked. 0, or -errno with
     * the old state in place; a VMM that can't go back must end itself.
     */
    int (*save)(void *opaque, struct memd_stream *stream);
    int (*load)(void *opaque, struct memd_stream *stream);

    /*
     * Which pages of [addr, addr + bytes) were written, since the last call that covered them, by
     * ways that do not set the dirty state of this process's page tables (KVM's own log of writes
     * through another mapping, a device that writes by physical address)? addr and bytes are whole
     * 4 KiB pages of one registered block, at most 2 MiB. Sets the bit of each such page in bitmap
     * (page i of the range: bit i % 64 of bitmap[i / 64]), leaves the others as they are, and
     * forgets what it has told. A page that it is not sure of counts as written. A write that is
     * under way is told of by this call or by the next. 0, or -errno: all of the range counts as
     * written. The guest runs meanwhile.
     */
    int (*dirty_log)(void *opaque, const void *addr, size_t bytes, uint64_t *bitmap);

    /*
     * vouch asks for a promise: from the moment at which it returns 1 until unvouch is called for
     * the same range, [addr, addr + bytes) is read and written through the page tables of this
     * process only. No pin of the kernel's is on it (direct I/O, registered buffers of io_uring,
     * VFIO, vhost, RDMA, a page that another process maps), and none comes: whoever wants to begin
     * such an access waits until unvouch, in the VMM's own code. Accesses by vCPUs and by ordinary
     * loads and stores go on; those may wait in a page fault. Then write-protecting the range's
     * page table entries is enough to freeze its bytes.
     *
     * 1: promised; 0: not now (something is under way: vouch does not wait for it); -errno counts
     * as 0. Called with whole pages of one registered block, at most 2 MiB, and no second time
     * before unvouch, which is called exactly once for each 1, within a second. A promise that is
     * broken can cost the guest's bytes: no one can check it.
     */
    int (*vouch)(void *opaque, const void *addr, size_t bytes);
    void (*unvouch)(void *opaque, const void *addr, size_t bytes);
};

/*
 * For a save hook: writes all of it. 0; -ENOSPC: there is more than the receiver takes; -EBADF: the
 * hook that this stream was for has returned, or it was not for writing; -EINVAL.
 */
MEMD_API int memd_stream_write(struct memd_stream *stream, const void *data, size_t bytes);
/* For a load hook: reads exactly so much. 0; -ENODATA: there is less, and nothing was read; -EBADF;
 * -EINVAL. */
MEMD_API int memd_stream_read(struct memd_stream *stream, void *ret_data, size_t bytes);

struct memd_options {
    size_t size;                /* sizeof(struct memd_options) */
    const char *socket;         /* memd's agent socket; NULL: /run/memd/memd.sock.agent. Copied. */
    const char *token;          /* 32 hexadecimal digits from the registration, or NULL. Copied. */
    const char *vmm;            /* what memctl shows as the VMM's kind; cut to 31 bytes. Copied. */
    const struct memd_ops *ops; /* may be NULL. Copied. */
    void *opaque;
};

/*
 * Starts the agent: userfaultfd is opened and tried out, the two threads start, the connection to
 * memd is made in the background and made again whenever it breaks. Call it before a seccomp
 * filter or a change of uid.
 *
 * -ENOSYS: this kernel can't freeze pages (UFFDIO_MOVE, Linux 6.8); -EPERM: userfaultfd is
 * withheld; -EBUSY: this process has an agent; -EINVAL: an option is wrong; -E2BIG: an option that
 * this library does not know.
 */
MEMD_API int memd_attach(const struct memd_options *options, struct memd_vm **ret_vm);

/*
 * All calls below: -EBADF when vm is not what memd_attach gave, or was detached; -EAGAIN in a child
 * of the process that attached (its memory is its own, and nothing manages it).
 */

/* The promise that no other thread touches the range yet: it may be mapped anew. */
#define MEMD_RAM_FRESH 1U
/* When the guest moves, the VMM moves this block by itself, as a part of its own state: memd shares
 * in it, and leaves it out of every migration. The same at both ends. */
#define MEMD_RAM_VMM_MOVES 2U

/*
 * Registers guest RAM: whole 4 KiB pages, private, anonymous, readable and writable, of this
 * process alone. -EINVAL (among others: a flag that this library does not know), -EFAULT (it is not
 * mapped all through), -EPERM (locked), -EEXIST (overlaps RAM that is registered), -EBUSY (it has a
 * userfaultfd already), -ENOSPC, -ENOMEM, -EAGAIN (the agent has stood down): it is left alone, and
 * memctl guest says why.
 *
 * While it is registered the VMM changes its mapping (munmap, mremap, mprotect, a mapping over it)
 * only after memd_ram_remove, and empties pages only by memd_ram_discard.
 */
MEMD_API int memd_ram_add(struct memd_vm *vm, void *addr, size_t bytes, unsigned flags);

/* Ends the management of RAM: every page in it is private again. Whole blocks, as they were
 * registered; -ENOENT when there is no such block, -ENOMEM when pages can't be made private,
 * -EBUSY when some of them are still at the source of a migration (the block then stays
 * registered). */
MEMD_API int memd_ram_remove(struct memd_vm *vm, void *addr, size_t bytes);

/* The guest gave these pages up (balloon, free page reporting): they become empty and read as
 * zeros. Use this in place of madvise(MADV_DONTNEED). The range may go beyond registered RAM, and
 * is emptied there too, as by madvise; where nothing is mapped: -ENOMEM, the rest being done.
 * Works in a child, too. -EINVAL: addr is no page's, or the range wraps. */
MEMD_API int memd_ram_discard(struct memd_vm *vm, void *addr, size_t bytes);

/*
 * Lets a saved guest run before its memory was read: registered RAM (one whole block), which is
 * emptied, gets its content from `bytes` of the file from `offset` on, a page when it is touched
 * first, and the rest in the background. Holes of the file are empty pages. The file must not
 * change until memd_ram_restore_wait has returned; the descriptor may be closed. Its position
 * changes.
 *
 * -ENOENT: no such block; -EINVAL: the offset is no multiple of 4096; -ENODATA: the file is
 * shorter; -EBUSY: this was called before; -EAGAIN: the agent has stood down; -errno. Then the RAM
 * is empty.
 */
MEMD_API int memd_ram_restore(struct memd_vm *vm, void *addr, size_t bytes, int fd,
                              uint64_t offset);

/* Waits until all of it is there: 0. -errno: some of the file can't be read, and whoever touches a
 * page that is missing waits for ever: the VMM must end. -ENOENT: nothing was begun. */
MEMD_API int memd_ram_restore_wait(struct memd_vm *vm);

struct memd_status {
    size_t size;          /* sizeof(struct memd_status), set by the caller; on return what of it
                             this library knows (less if the caller's is newer; the rest is zero) */
    uint64_t pages;       /* all of what is registered, in 4 KiB pages */
    uint64_t shared;      /* of these, in the store */
    uint64_t zero;        /* dropped zero pages */
    uint64_t merges;      /* pages that became shared, ever */
    uint64_t unmerges;    /* shares that ended, ever */
    uint64_t zero_merges; /* zero pages that were dropped, ever */
    uint64_t captives;    /* private pages that can't be frozen, see libmemd(7) */
    uint32_t connected;   /* 1: memd answers */
    uint32_t passes;      /* scan passes ended */
};

/* Never waits for memd or for a scan. -EINVAL: size is none that there was. */
MEMD_API int memd_get_status(struct memd_vm *vm, struct memd_status *ret_status);

/* Makes every page private, ends the threads and the connection, frees the handle. -ENOMEM: some
 * pages can't be made private now; nothing has ended. -EDEADLK: called by a hook. It waits for a
 * hook that is being called. Not while another thread is in one of these calls. */
MEMD_API int memd_detach(struct memd_vm *vm);

#ifdef __cplusplus
}
#endif

#endif
