/* SPDX-License-Identifier: Apache-2.0 */
#include "restore.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "discard.h"
#include "remap.h"
#include "uffd.h"

/* ---- the file ---- */

/* `pages` pages of the block, from `index` on, as the file has them. 0 or -errno. */
static int read_pages(const struct restore *restore, uint32_t index, uint32_t pages, uint8_t *into)
{
    size_t left = (size_t)pages * PAGE_BYTES;
    uint64_t at = restore->offset + (uint64_t)index * PAGE_BYTES;

    while (left > 0) {
        long got = sys_call4(SYS_pread64, restore->fd, into, left, at);

        if (got == -EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? (int)got : -ENODATA;
        into += got;
        at += (uint64_t)got;
        left -= (size_t)got;
    }
    return 0;
}

/* It is over, if it was not: the first to say how has said it. */
static void conclude(struct restore *restore, int result)
{
    uint32_t runs = RESTORE_RUNS;
    int32_t none = 0;

    if (result < 0)
        __atomic_compare_exchange_n(&restore->result, &none, result, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_RELAXED);
    __atomic_compare_exchange_n(&restore->state, &runs, result < 0 ? RESTORE_FAILED : RESTORE_DONE,
                                false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    sys_call3(SYS_futex, &restore->state, FUTEX_WAKE_PRIVATE, INT32_MAX);
}

/* The fault handler wants one page. */
static int fetch(void *self, const struct ram_block *block, uint32_t index, uint32_t pages,
                 const void **ret_bytes)
{
    struct restore *restore = self;
    int r = block == restore->block ? read_pages(restore, index, 1, restore->page) : -ENOENT;

    (void)pages;
    if (r < 0) {
        conclude(restore, r);
        return r;
    }
    *ret_bytes = restore->page;
    return 1;
}

/* ---- bringing the rest ---- */

/* How many pages from `index` on, below `end`, are remote. */
static uint32_t remote_run(const struct ram_block *block, uint32_t index, uint32_t end)
{
    uint32_t run = 0;

    while (index + run < end && ram_place(block, index + run) == PLACE_REMOTE)
        run++;
    return run;
}

/* Copies what is in the window under those of its pages that are remote still. Caller holds the
 * lock. */
static int place_window(struct restore *restore, uint32_t index, uint32_t end)
{
    struct ram_block *block = restore->block;

    for (uint32_t i = index, run; i < end; i += run) {
        const uint8_t *from = restore->window + (size_t)(i - index) * PAGE_BYTES;
        int fd = restore->ram->guest_fd;
        long copied;

        run = remote_run(block, i, end);
        if (run == 0) {
            run = 1;
            continue;
        }
        copied = uffd_copy(fd, ram_address(block, i), from, run * PAGE_BYTES, true);
        /* It works within one VMA, and the VMM may have made several of the block. */
        if (copied == -ENOENT && run > 1)
            copied = uffd_copy(fd, ram_address(block, i), from, PAGE_BYTES, true);
        if (copied < 0)
            return (int)copied;
        run = (uint32_t)(copied / (long)PAGE_BYTES);
        ram_move_places(restore->ram, block, i, run, TRANSITION_FETCH);
    }
    return 0;
}

/* The first remote page from `index` on; the number of pages when there is none. */
static uint32_t find_remote(struct ram_block *block, uint32_t index)
{
    lock_take(&block->lock);
    while (index < block->pages && ram_place(block, index) != PLACE_REMOTE)
        index++;
    lock_release(&block->lock);
    return index;
}

/* Reads without the lock, so that nobody waits for the disk but who wants that very page. */
static int bring(struct restore *restore)
{
    struct ram_block *block = restore->block;
    uint32_t index = 0, end;
    int r = 0;

    while (r == 0 && !__atomic_load_n(&restore->stop, __ATOMIC_ACQUIRE)) {
        index = find_remote(block, index);
        if (index == block->pages)
            return 0;
        end = block->pages - index < RESTORE_WINDOW_PAGES ? block->pages
                                                          : index + RESTORE_WINDOW_PAGES;
        r = read_pages(restore, index, end - index, restore->window);
        if (r < 0)
            break;
        lock_take(&block->lock);
        r = block->live ? place_window(restore, index, end) : -ENOENT;
        lock_release(&block->lock);
        index = end;
    }
    return r < 0 ? r : -ECANCELED;
}

/* Children may have the RAM again, as the VMM wanted it. Caller holds the lock. */
static void allow_fork(const struct ram_block *block)
{
    if (block->live && !(block->attributes & RAM_DONTFORK))
        sys_madvise(block->base, (size_t)block->pages * PAGE_BYTES, MADV_DOFORK);
}

static void *run(void *context)
{
    struct restore *restore = context;
    struct ram_block *block = restore->block;
    int r = bring(restore);

    lock_take(&block->lock);
    if (r == 0) {
        restore->ram->sources[PLACE_REMOTE] = (struct page_source){0};
        allow_fork(block);
    }
    lock_release(&block->lock);
    conclude(restore, r);
    return NULL;
}

static int start_thread(struct restore *restore)
{
    sigset_t all, old;
    int r;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = -pthread_create(&restore->thread, NULL, run, restore);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return r;
}

/* ---- beginning ---- */

/* Marks the pages that the file has data for; a page that is data in part is. Caller holds the
 * lock. */
static int expect_data(struct restore *restore)
{
    struct ram_block *block = restore->block;
    uint64_t end = restore->offset + (uint64_t)block->pages * PAGE_BYTES;
    long at = sys_call3(SYS_lseek, restore->fd, restore->offset, SEEK_DATA);

    while (at >= 0 && (uint64_t)at < end) {
        long hole = sys_call3(SYS_lseek, restore->fd, at, SEEK_HOLE);
        uint64_t stop = hole > at && (uint64_t)hole < end ? (uint64_t)hole : end;
        uint32_t first = (uint32_t)(((uint64_t)at - restore->offset) / PAGE_BYTES);
        uint32_t last = (uint32_t)((stop - restore->offset + PAGE_BYTES - 1) / PAGE_BYTES);

        ram_move_places(restore->ram, block, first, last - first, TRANSITION_EXPECT);
        if (stop == end)
            return 0;
        at = sys_call3(SYS_lseek, restore->fd, restore->offset + (uint64_t)last * PAGE_BYTES,
                       SEEK_DATA);
    }
    return at < 0 && at != -ENXIO ? (int)at : 0; /* ENXIO: nothing but holes from here on */
}

/* Caller holds both locks. */
static int expect(struct restore *restore)
{
    struct ram_block *block = restore->block;
    size_t bytes = (size_t)block->pages * PAGE_BYTES;
    int r;

    if (!block->live || block->resting)
        return -EAGAIN;
    if (restore->ram->sources[PLACE_REMOTE].fetch)
        return -EBUSY;
    r = discard_pages(restore->ram, block, 0, block->pages, MADV_DONTNEED);
    if (r == 0)
        r = remap_arm(restore->ram, block, 0, block->pages);
    if (r < 0)
        return r;
    for (uint32_t c = 0; c < block->chunk_count; c++)
        block->chunks[c] = (struct chunk){.state = CHUNK_ARMED};
    memset(block->young, 0, ((size_t)block->pages + 63) / 64 * 8);
    restore->ram->sources[PLACE_REMOTE] =
        (struct page_source){.name = "file", .fetch = fetch, .self = restore};
    sys_madvise(block->base, bytes, MADV_DONTFORK);
    return expect_data(restore);
}

/* What was begun is not to be: all of it is empty. Caller holds the lock. */
static void take_back(struct restore *restore)
{
    struct ram_block *block = restore->block;

    if (restore->ram->sources[PLACE_REMOTE].self != restore)
        return;
    discard_pages(restore->ram, block, 0, block->pages, MADV_DONTNEED);
    restore->ram->sources[PLACE_REMOTE] = (struct page_source){0};
    allow_fork(block);
}

static int expect_and_start(struct restore *restore)
{
    struct ram_block *block = restore->block;
    int r;

    lock_take(&block->reading);
    lock_take(&block->lock);
    r = expect(restore);
    lock_release(&block->lock);
    lock_release(&block->reading);
    if (r == 0)
        r = start_thread(restore);
    if (r == 0)
        return 0;
    lock_take(&block->lock);
    take_back(restore);
    lock_release(&block->lock);
    return r;
}

static int check_file(const struct ram_block *block, int fd, uint64_t offset)
{
    struct stat st;
    int r = (int)sys_call2(SYS_fstat, fd, &st);

    if (r < 0)
        return r;
    if (offset % PAGE_BYTES != 0)
        return -EINVAL;
    return offset <= (uint64_t)st.st_size &&
                   (uint64_t)block->pages * PAGE_BYTES <= (uint64_t)st.st_size - offset
               ? 0
               : -ENODATA;
}

int restore_begin(struct restore *restore, struct guest_ram *ram, struct ram_block *block, int fd,
                  uint64_t offset)
{
    uint32_t none = RESTORE_NONE;
    int r = check_file(block, fd, offset);

    if (r < 0)
        return r;
    if (!__atomic_compare_exchange_n(&restore->state, &none, RESTORE_RUNS, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED))
        return -EBUSY;
    restore->ram = ram;
    restore->block = block;
    restore->offset = offset;
    restore->fd = r = (int)sys_call3(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 0);
    if (r >= 0) {
        r = expect_and_start(restore);
        if (r == 0)
            return 0;
        sys_close(restore->fd);
    }
    __atomic_store_n(&restore->state, RESTORE_NONE, __ATOMIC_RELEASE);
    return r;
}

int restore_wait(struct restore *restore)
{
    uint32_t state;

    while ((state = __atomic_load_n(&restore->state, __ATOMIC_ACQUIRE)) == RESTORE_RUNS)
        sys_call4(SYS_futex, &restore->state, FUTEX_WAIT_PRIVATE, RESTORE_RUNS, NULL);
    return state == RESTORE_NONE ? -ENOENT : __atomic_load_n(&restore->result, __ATOMIC_ACQUIRE);
}

void restore_close(struct restore *restore)
{
    if (__atomic_load_n(&restore->state, __ATOMIC_ACQUIRE) == RESTORE_NONE)
        return;
    __atomic_store_n(&restore->stop, 1, __ATOMIC_RELEASE);
    pthread_join(restore->thread, NULL);
    sys_close(restore->fd);
    memset(restore, 0, sizeof(*restore));
}
