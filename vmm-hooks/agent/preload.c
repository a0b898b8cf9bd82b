/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libmemd-preload: the agent inside a stock VMM, under the libc calls that the VMM makes anyway.
 *
 * A VMM announces its guest's RAM by madvise(MADV_MERGEABLE), as QEMU does for every block before
 * the guest starts. The first such call attaches the agent; it is swallowed, or ksmd would fight
 * for the same pages. From then on each call that changes memory is looked at: outside registered
 * RAM (and that is one comparison) it goes to the kernel as it is; inside it does what the caller
 * expects without ever showing the guest a byte that is not its own.
 *
 * Nothing here goes back through libc to do its work, nothing allocates, and where the agent is
 * missing or has given up every call is the kernel's own.
 *
 * Built with MEMD_TEST_NO_INTERPOSE the discards are not looked at: a test uses that to show that
 * the guest's memory then goes wrong.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vhost.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "agent.h"
#include "kernel_abi.h"

/* Files that stand behind guest RAM: one a memory backend. */
#define MAX_RAM_FILES 16U

#define EXPORT __attribute__((visibility("default")))

/* Blocks below this are ROMs and the like. */
#define SMALLEST_BLOCK (1UL << 20)

#define VFIO_IOMMU_MAP_DMA 0x3b71 /* include/uapi/linux/vfio.h: _IO(';', 100 + 13) */
#define IOMMU_IOAS_MAP     0x3b85 /* include/uapi/linux/iommufd.h: _IO(';', 0x85) */

/* MADV_ values that are younger than some libc headers. */
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

#ifdef MEMD_TEST_NO_INTERPOSE
static const bool discards_are_ours = false;
#else
static const bool discards_are_ours = true;
#endif

enum preload_state { PRELOAD_NEW, PRELOAD_STARTING, PRELOAD_READY, PRELOAD_FAILED };

static struct {
    uint32_t state;
    struct memd_vm *vm;
    uint32_t memory_locked; /* mlockall was seen before there was an agent */
    /* Backing files of guest RAM that were answered with private memory. Without a lock, which a
     * child of the VMM could find taken for ever. */
    struct ram_file {
        uint32_t version; /* odd: it is being changed */
        dev_t device;
        ino_t inode;
        uint8_t *address;
        size_t bytes; /* 0: none */
    } files[MAX_RAM_FILES];
} preload;

static long finish(long result)
{
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

static struct memd_vm *attached(void)
{
    return __atomic_load_n(&preload.state, __ATOMIC_ACQUIRE) == PRELOAD_READY ? preload.vm : NULL;
}

/* The agent, but not in a child of the VMM: its memory is a copy that no agent looks after, and
 * what the userfaultfds that it has inherited do, they do to its parent. */
static struct memd_vm *agent(void)
{
    struct memd_vm *vm = attached();

    return vm && !agent_is_child(vm) ? vm : NULL;
}

/* The agent, if the range touches what may be registered RAM; in a child too. */
static struct memd_vm *touched(const void *addr, size_t bytes)
{
    struct memd_vm *vm = attached();

    if (!vm || (uintptr_t)addr >= vm->ram.highest || (uintptr_t)addr + bytes <= vm->ram.lowest)
        return NULL;
    return vm;
}

/* The same, but not in a child. */
static struct memd_vm *concerned(const void *addr, size_t bytes)
{
    struct memd_vm *vm = touched(addr, bytes);

    return vm && !agent_is_child(vm) ? vm : NULL;
}

/* The i-th RAM file, if there is one. */
static bool read_file(uint32_t i, struct ram_file *ret_file)
{
    const struct ram_file *file = &preload.files[i];
    uint32_t version = __atomic_load_n(&file->version, __ATOMIC_ACQUIRE);
    struct ram_file copy = *file;

    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (version % 2 || __atomic_load_n(&file->version, __ATOMIC_RELAXED) != version ||
        copy.bytes == 0)
        return false;
    *ret_file = copy;
    return true;
}

/* Is it in a RAM file, as the VMM believes? */
static bool is_in_file(const void *addr)
{
    struct ram_file file;

    for (uint32_t i = 0; i < MAX_RAM_FILES; i++)
        if (read_file(i, &file) && (const uint8_t *)addr >= file.address &&
            (const uint8_t *)addr < file.address + file.bytes)
            return true;
    return false;
}

/* ---- attaching ---- */

static void attach(void)
{
    uint32_t expected = PRELOAD_NEW;
    struct memd_options options = {
        .size = sizeof(options),
        .socket = getenv("MEMD_AGENT_SOCKET"),
        .token = getenv("MEMD_TOKEN"),
        .vmm = "qemu",
    };

    if (!__atomic_compare_exchange_n(&preload.state, &expected, PRELOAD_STARTING, false,
                                     __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return;
    if (!options.socket || agent_attach(&options, &preload.vm) < 0) {
        __atomic_store_n(&preload.state, PRELOAD_FAILED, __ATOMIC_RELEASE);
        return;
    }
    if (preload.memory_locked)
        agent_give_up(preload.vm, "the VMM locks its memory (mlockall)");
    __atomic_store_n(&preload.state, PRELOAD_READY, __ATOMIC_RELEASE);
}

/* 0: registered, the advice is ours. 1: not for us, ask the kernel. RAM that is on no file of
 * memctl's is not shared, as QEMU sees it (x-ignore-shared): QEMU moves it by itself, firmware
 * tables and video memory among it, and its bytes should not come twice. */
static int announce(void *addr, size_t bytes)
{
    struct memd_vm *vm;
    int r;

    if (bytes < SMALLEST_BLOCK || (uintptr_t)addr % PAGE_BYTES || bytes % PAGE_BYTES)
        return 1;
    attach();
    vm = agent();
    if (!vm || vm->setup_result < 0)
        return 1;
    r = memd_ram_add(vm, addr, bytes, MEMD_RAM_FRESH | (is_in_file(addr) ? 0 : MEMD_RAM_VMM_MOVES));
    /* QEMU announces the RAM of a memory backend twice. */
    return r < 0 && r != -EEXIST;
}

/* ---- madvise ---- */

static bool is_discard(int advice)
{
    return advice == MADV_DONTNEED || advice == MADV_REMOVE || advice == MADV_FREE ||
           advice == MADV_DONTNEED_LOCKED;
}

/* Attributes that memd has to put back wherever it maps something. */
static bool is_attribute(int advice)
{
    return advice == MADV_DONTFORK || advice == MADV_DOFORK || advice == MADV_DONTDUMP ||
           advice == MADV_DODUMP || advice == MADV_HUGEPAGE || advice == MADV_NOHUGEPAGE;
}

static void change_attributes(struct ram_block *block, int advice)
{
    const struct {
        int advice;
        uint32_t set, clear;
    } changes[] = {
        {MADV_DONTFORK, RAM_DONTFORK, 0},
        {MADV_DOFORK, 0, RAM_DONTFORK},
        {MADV_DONTDUMP, RAM_DONTDUMP, 0},
        {MADV_DODUMP, 0, RAM_DONTDUMP},
        {MADV_HUGEPAGE, RAM_HUGEPAGE, RAM_NOHUGEPAGE},
        {MADV_NOHUGEPAGE, RAM_NOHUGEPAGE, RAM_HUGEPAGE},
    };

    for (size_t i = 0; i < sizeof(changes) / sizeof(changes[0]); i++)
        if (changes[i].advice == advice)
            block->attributes = (block->attributes & ~changes[i].clear) | changes[i].set;
}

/* The blocks of the range are the VMM's alone from now on. */
static void give_back(struct memd_vm *vm, void *addr, size_t bytes)
{
    struct agent_leaving leaving = {.changed = addr, .changed_bytes = bytes};

    agent_leave_begin(vm, &leaving);
    agent_leave_end(vm, &leaving, true);
}

/* For a whole block, or several: the shadow gets it too. For a part: that block is given back. */
static int advise_attribute(struct memd_vm *vm, void *addr, size_t bytes, int advice)
{
    uint8_t *end = (uint8_t *)addr + bytes;

    for (uint32_t i = 0; i < vm->ram.block_count; i++) {
        struct ram_block *block = &vm->ram.blocks[i];
        uint8_t *block_end = ram_address(block, block->pages);
        if (!block->live || end <= block->base || (uint8_t *)addr >= block_end)
            continue;
        if ((uint8_t *)addr > block->base || end < block_end) {
            give_back(vm, addr, bytes);
            agent_say(vm, "the VMM gave a part of its RAM attributes of its own (madvise)");
            continue;
        }
        lock_take(&block->lock);
        if (block->live) {
            change_attributes(block, advice);
            sys_madvise(block->shadow, (size_t)(block->pages + 1) * PAGE_BYTES, advice);
        }
        lock_release(&block->lock);
    }
    return sys_madvise(addr, bytes, advice);
}

/* Puts a RAM file into a free place (`free`), or nothing into one that is not. False: it is not
 * such a place, or another thread is there. */
static bool write_file(uint32_t i, bool free, const struct ram_file *from)
{
    struct ram_file *file = &preload.files[i];
    uint32_t version = __atomic_load_n(&file->version, __ATOMIC_ACQUIRE);

    if (version % 2 || !__atomic_compare_exchange_n(&file->version, &version, version + 1, false,
                                                    __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return false;
    if ((file->bytes == 0) != free) {
        __atomic_store_n(&file->version, version, __ATOMIC_RELEASE);
        return false;
    }
    __atomic_thread_fence(__ATOMIC_RELEASE);
    file->device = from->device;
    file->inode = from->inode;
    file->address = from->address;
    file->bytes = from->bytes;
    __atomic_store_n(&file->version, version + 2, __ATOMIC_RELEASE);
    return true;
}

static bool add_file(const struct ram_file *file)
{
    for (uint32_t i = 0; i < MAX_RAM_FILES; i++)
        if (write_file(i, true, file))
            return true;
    return false;
}

/* Takes out the RAM files that lie within the range: their mappings are about to end. Before they
 * do, or it could be another thread's new ones. Returns how many, for add_file if they stay. */
static uint32_t remove_files(const void *addr, size_t bytes, struct ram_file *ret_files)
{
    static const struct ram_file none;
    const uint8_t *from = addr;
    uint32_t count = 0;

    for (uint32_t i = 0; i < MAX_RAM_FILES; i++) {
        struct ram_file file;
        if (read_file(i, &file) && file.address >= from && (size_t)(file.address - from) <= bytes &&
            bytes - (size_t)(file.address - from) >= file.bytes && write_file(i, false, &none))
            ret_files[count++] = file;
    }
    return count;
}

/* The RAM file behind the VMM's descriptor, if it is one. */
static bool find_file(int fd, struct ram_file *ret_file)
{
    struct stat st;

    if (sys_call2(SYS_fstat, fd, &st) < 0)
        return false;
    for (uint32_t i = 0; i < MAX_RAM_FILES; i++)
        if (read_file(i, ret_file) && ret_file->device == st.st_dev && ret_file->inode == st.st_ino)
            return true;
    return false;
}

static int advise(void *addr, size_t bytes, int advice)
{
    struct memd_vm *vm;

    if (advice == MADV_MERGEABLE && announce(addr, bytes) == 0)
        return 0;
    vm = touched(addr, bytes);
    if (!vm || (is_discard(advice) && !discards_are_ours))
        return sys_madvise(addr, bytes, advice);
    if (agent_is_child(vm))
        return is_discard(advice) ? agent_discard_in_child(vm, addr, bytes, advice)
                                  : sys_madvise(addr, bytes, advice);
    if (is_discard(advice))
        return agent_discard(vm, addr, bytes,
                             advice == MADV_REMOVE && is_in_file(addr) ? MADV_DONTNEED : advice);
    if (is_attribute(advice))
        return advise_attribute(vm, addr, bytes, advice);
    return sys_madvise(addr, bytes, advice);
}

EXPORT int madvise(void *addr, size_t bytes, int advice)
{
    return (int)finish(advise(addr, bytes, advice));
}

EXPORT int posix_madvise(void *addr, size_t bytes, int advice)
{
    /* POSIX_MADV_DONTNEED must not lose data: glibc ignores it, and so do we. */
    return advice == POSIX_MADV_DONTNEED ? 0 : -advise(addr, bytes, advice);
}

/* ---- mappings ---- */

/* Is it the file that memctl run put guest RAM on? MEMD_RAM_DIR has how its path begins: QEMU makes
 * it in a directory of memctl's choosing, under a name of its own, and unlinks it at once. */
static bool is_ram_file(int fd)
{
    static const char prefix[] = "/proc/self/fd/";
    const char *beginning = getenv("MEMD_RAM_DIR");
    char link[sizeof(prefix) + 12];
    char target[256];
    char digits[12];
    size_t length = 0;
    size_t at = sizeof(prefix) - 1;
    long got;

    if (!beginning || !*beginning || fd < 0)
        return false;
    memcpy(link, prefix, sizeof(prefix));
    do {
        digits[length++] = (char)('0' + fd % 10);
        fd /= 10;
    } while (fd > 0);
    while (length > 0)
        link[at++] = digits[--length];
    link[at] = 0;
    got = sys_call4(SYS_readlinkat, AT_FDCWD, link, target, sizeof(target) - 1);
    if (got <= 0)
        return false;
    target[got] = 0;
    /* The beginning of the file's path, not a whole directory: others have files there too. */
    return strncmp(target, beginning, strlen(beginning)) == 0;
}

static void *answer_ram_file(void *addr, size_t bytes, int prot, int flags, int fd)
{
    struct ram_file file = {.bytes = bytes};
    struct stat st;

    if (sys_call2(SYS_fstat, fd, &st) < 0)
        return sys_mmap(addr, bytes, prot, flags, fd, 0);
    file.device = st.st_dev;
    file.inode = st.st_ino;
    file.address = sys_mmap(addr, bytes, prot,
                            (flags & ~(MAP_SHARED | MAP_SHARED_VALIDATE | MAP_SYNC)) | MAP_PRIVATE |
                                MAP_ANONYMOUS,
                            -1, 0);
    if (sys_failed(file.address) || add_file(&file))
        return file.address;
    /* A file too many is mapped as the VMM asked, and left alone. */
    if (!(flags & MAP_FIXED))
        sys_munmap(file.address, bytes);
    return sys_mmap(addr, bytes, prot, flags, fd, 0);
}

/* A call that ends what is mapped at [addr, addr + bytes). */
struct ending {
    struct memd_vm *vm; /* NULL: not in guest RAM */
    struct agent_leaving leaving;
    uint32_t file_count;
    struct ram_file files[MAX_RAM_FILES];
};

static void begin_ending(struct ending *ending, void *addr, size_t bytes, bool whole)
{
    ending->vm = concerned(addr, bytes);
    ending->file_count = remove_files(addr, bytes, ending->files);
    if (!ending->vm)
        return;
    ending->leaving = (struct agent_leaving){.ended = addr, .ended_bytes = bytes, .whole = whole};
    agent_leave_begin(ending->vm, &ending->leaving);
}

static void end_ending(struct ending *ending, bool done)
{
    if (ending->vm)
        agent_leave_end(ending->vm, &ending->leaving, done);
    while (!done && ending->file_count > 0)
        (void)add_file(&ending->files[--ending->file_count]);
}

static void *map(void *addr, size_t bytes, int prot, int flags, int fd, off_t offset)
{
    struct ending ending;
    void *at;

    /* Not whole: the kernel may have unmapped what was there before it finds that it can't. */
    if (flags & MAP_FIXED)
        begin_ending(&ending, addr, bytes, false);
    if (fd >= 0 && (flags & MAP_SHARED) && !(flags & MAP_ANONYMOUS) && offset == 0 &&
        is_ram_file(fd))
        at = answer_ram_file(addr, bytes, prot, flags, fd);
    else
        at = sys_mmap(addr, bytes, prot, flags, fd, offset);
    if (flags & MAP_FIXED)
        end_ending(&ending, !sys_failed(at));
    return at;
}

EXPORT void *mmap(void *addr, size_t bytes, int prot, int flags, int fd, off_t offset)
{
    return (void *)finish((long)map(addr, bytes, prot, flags, fd, offset));
}

EXPORT void *mmap64(void *addr, size_t bytes, int prot, int flags, int fd, off64_t offset)
{
    return (void *)finish((long)map(addr, bytes, prot, flags, fd, offset));
}

EXPORT int munmap(void *addr, size_t bytes)
{
    struct ending ending;
    int r;

    begin_ending(&ending, addr, bytes, true);
    r = sys_munmap(addr, bytes);
    end_ending(&ending, r == 0);
    return (int)finish(r);
}

EXPORT void *mremap(void *old, size_t old_bytes, size_t new_bytes, int flags, ...)
{
    struct agent_leaving leaving = {.changed = old,
                                    .changed_bytes = old_bytes ? old_bytes : PAGE_BYTES};
    struct memd_vm *vm = concerned(old, leaving.changed_bytes);
    void *at;
    va_list list;

    if (flags & MREMAP_FIXED) {
        va_start(list, flags);
        leaving.ended = va_arg(list, void *);
        leaving.ended_bytes = new_bytes;
        va_end(list);
        if (!vm)
            vm = concerned(leaving.ended, new_bytes);
    }
    if (vm)
        agent_leave_begin(vm, &leaving);
    if (vm && agent_leave_is_partial(&leaving))
        at = (void *)-ENOMEM; /* a page in the store's mapping must not leave our sight */
    else
        at = sys_mremap(old, old_bytes, new_bytes, flags, leaving.ended);
    if (vm)
        agent_leave_end(vm, &leaving, !sys_failed(at));
    return (void *)finish((long)at);
}

EXPORT int mprotect(void *addr, size_t bytes, int prot)
{
    struct agent_leaving leaving = {.changed = addr, .changed_bytes = bytes};
    struct memd_vm *vm = concerned(addr, bytes);
    int r;

    if (vm)
        agent_leave_begin(vm, &leaving);
    r = (int)sys_call3(SYS_mprotect, addr, bytes, prot);
    if (vm)
        agent_leave_end(vm, &leaving, r == 0);
    return (int)finish(r);
}

EXPORT int fallocate64(int fd, int mode, off64_t offset, off64_t bytes)
{
    long r = sys_call4(SYS_fallocate, fd, mode, offset, bytes);
    struct memd_vm *vm = discards_are_ours ? agent() : NULL;
    struct ram_file file;

    if (r == 0 && vm && (mode & FALLOC_FL_PUNCH_HOLE) && find_file(fd, &file) && offset >= 0 &&
        bytes > 0 && (size_t)offset < file.bytes && (size_t)bytes <= file.bytes - (size_t)offset)
        r = agent_discard(vm, file.address + offset, (size_t)bytes, MADV_DONTNEED);
    return (int)finish(r);
}

EXPORT int fallocate(int fd, int mode, off_t offset, off_t bytes)
{
    return fallocate64(fd, mode, offset, bytes);
}

/* ---- what makes memd leave the guest alone ---- */

static void lock_range(uintptr_t addr, size_t bytes)
{
    struct memd_vm *vm = concerned((const void *)addr, bytes);

    if (!vm)
        return;
    give_back(vm, (void *)addr, bytes);
    agent_say(vm, "the VMM locked a part of its RAM (mlock)");
}

EXPORT int mlock(const void *addr, size_t bytes)
{
    lock_range((uintptr_t)addr, bytes);
    return (int)finish(sys_call2(SYS_mlock, addr, bytes));
}

EXPORT int mlock2(const void *addr, size_t bytes, unsigned flags)
{
    lock_range((uintptr_t)addr, bytes);
    return (int)finish(sys_call3(SYS_mlock2, addr, bytes, flags));
}

EXPORT int mlockall(int flags)
{
    struct memd_vm *vm = agent();

    if (vm)
        agent_give_up(vm, "the VMM locks its memory (mlockall)");
    __atomic_store_n(&preload.memory_locked, 1, __ATOMIC_RELEASE);
    return (int)finish(sys_call1(SYS_mlockall, flags));
}

/* A NUMA policy for whole blocks holds for the shadow too; for a part, the block is given back. */
static void mirror_policy(struct memd_vm *vm, void *addr, size_t bytes, int mode,
                          const unsigned long *mask, unsigned long max)
{
    uint8_t *end = (uint8_t *)addr + bytes;

    for (uint32_t i = 0; i < vm->ram.block_count; i++) {
        struct ram_block *block = &vm->ram.blocks[i];
        uint8_t *block_end = ram_address(block, block->pages);
        if (!block->live || end <= block->base || (uint8_t *)addr >= block_end)
            continue;
        if ((uint8_t *)addr > block->base || end < block_end) {
            give_back(vm, block->base, PAGE_BYTES);
            agent_say(vm, "the VMM gave a part of its RAM a NUMA policy of its own (mbind)");
            continue;
        }
        lock_take(&block->lock);
        if (block->live)
            ram_apply_policy(block, mode, mask, max);
        lock_release(&block->lock);
    }
}

long mbind(void *addr, unsigned long bytes, int mode, const unsigned long *mask, unsigned long max,
           unsigned flags);

EXPORT long mbind(void *addr, unsigned long bytes, int mode, const unsigned long *mask,
                  unsigned long max, unsigned flags)
{
    struct memd_vm *vm = concerned(addr, bytes);

    if (vm)
        mirror_policy(vm, addr, bytes, mode, mask, max);
    return finish(sys_call6(SYS_mbind, SYS_ARG(addr), (long)bytes, mode, SYS_ARG(mask), (long)max,
                            (long)flags));
}

/* The VMM's own userfaultfd (post-copy, background snapshots) gets its memory as the VMM made it.
 */
static struct memd_vm *before_register(const struct uffdio_register *request)
{
    struct memd_vm *vm =
        concerned((void *)(uintptr_t)request->range.start, (size_t)request->range.len);

    if (vm) {
        __atomic_add_fetch(&vm->registers_begun, 1, __ATOMIC_SEQ_CST);
        agent_stand_down(vm, AGENT_STANDING_DOWN,
                         "the VMM uses userfaultfd on its RAM itself (migration or snapshot)");
    }
    return vm;
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    struct memd_vm *registering = NULL;
    struct memd_vm *vm;
    va_list list;
    void *argument;
    long r;

    va_start(list, request);
    argument = va_arg(list, void *);
    va_end(list);
    if (request == UFFDIO_REGISTER && argument) {
        registering = before_register(argument);
    } else if (request == VFIO_IOMMU_MAP_DMA || request == IOMMU_IOAS_MAP) {
        vm = agent();
        if (vm)
            agent_give_up(vm, "the VMM gives its memory to a device (VFIO)");
    } else if (request == VHOST_SCSI_SET_ENDPOINT) {
        /* Its reads go straight into pages that it holds by plain references (FOLL_GET). */
        vm = agent();
        if (vm)
            agent_give_up(vm, "the VMM gives its memory to vhost-scsi, which does not pin pages");
    }
    r = sys_call3(SYS_ioctl, fd, request, argument);
    if (registering)
        __atomic_add_fetch(&registering->registers_ended, 1, __ATOMIC_SEQ_CST);
    return (int)finish(r);
}

/* ---- direct I/O: a new O_DIRECT descriptor is looked at before the next freeze ---- */

static void note_open(int flags)
{
    struct memd_vm *vm = agent();

    if (vm && (flags & O_DIRECT))
        __atomic_store_n(&vm->ram.direct_io_changed, 1, __ATOMIC_RELEASE);
}

static int open_at(int directory, const char *path, int flags, mode_t mode)
{
    long fd = sys_call4(SYS_openat, directory, path, flags, mode);

    note_open(flags);
    return (int)finish(fd);
}

#define OPEN_MODE(flags, last)                                     \
    ({                                                             \
        mode_t mode_ = 0;                                          \
        va_list list_;                                             \
        va_start(list_, last);                                     \
        if (((flags)&O_CREAT) || ((flags)&O_TMPFILE) == O_TMPFILE) \
            mode_ = (mode_t)va_arg(list_, int);                    \
        va_end(list_);                                             \
        mode_;                                                     \
    })

EXPORT int open(const char *path, int flags, ...)
{
    return open_at(AT_FDCWD, path, flags, OPEN_MODE(flags, flags));
}

EXPORT int open64(const char *path, int flags, ...)
{
    return open_at(AT_FDCWD, path, flags | O_LARGEFILE, OPEN_MODE(flags, flags));
}

EXPORT int openat(int directory, const char *path, int flags, ...)
{
    return open_at(directory, path, flags, OPEN_MODE(flags, flags));
}

EXPORT int openat64(int directory, const char *path, int flags, ...)
{
    return open_at(directory, path, flags | O_LARGEFILE, OPEN_MODE(flags, flags));
}

int __open_2(const char *path, int flags);
int __open64_2(const char *path, int flags);
int __openat_2(int directory, const char *path, int flags);
int __openat64_2(int directory, const char *path, int flags);

EXPORT int __open_2(const char *path, int flags)
{
    return open_at(AT_FDCWD, path, flags, 0);
}

EXPORT int __open64_2(const char *path, int flags)
{
    return open_at(AT_FDCWD, path, flags | O_LARGEFILE, 0);
}

EXPORT int __openat_2(int directory, const char *path, int flags)
{
    return open_at(directory, path, flags, 0);
}

EXPORT int __openat64_2(int directory, const char *path, int flags)
{
    return open_at(directory, path, flags | O_LARGEFILE, 0);
}

static int control(int fd, int command, long argument)
{
    if (command == F_SETFL)
        note_open((int)argument);
    return (int)finish(sys_call3(SYS_fcntl, fd, command, argument));
}

EXPORT int fcntl(int fd, int command, ...)
{
    va_list list;
    long argument;

    va_start(list, command);
    argument = va_arg(list, long);
    va_end(list);
    return control(fd, command, argument);
}

EXPORT int fcntl64(int fd, int command, ...)
{
    va_list list;
    long argument;

    va_start(list, command);
    argument = va_arg(list, long);
    va_end(list);
    return control(fd, command, argument);
}
