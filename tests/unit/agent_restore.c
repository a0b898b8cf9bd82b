/* SPDX-License-Identifier: Apache-2.0 */
/* A saved guest that runs before its memory was read. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "discard.h"
#include "fault.h"
#include "restore.h"

#define PAGES    8192U
#define BYTES    (PAGES * PAGE_BYTES)
#define FILE_AT  (1UL << 20) /* where RAM lies in the file */
#define HOLE_AT  1024U       /* pages of the file that are a hole */
#define HOLE_END 3072U

static struct guest_ram ram;
static struct fault_handler handler;
static struct ram_block *block;
static struct restore restore;
static uint8_t *memory;
static int file;

static void fill(uint8_t *page, uint32_t content)
{
    uint32_t *words = (uint32_t *)(void *)page;

    for (uint32_t i = 0; i < PAGE_BYTES / sizeof(*words); i++)
        words[i] = content * 2654435761U + i;
}

static bool holds(uint32_t index)
{
    _Alignas(64) uint8_t want[PAGE_BYTES] = {0};

    if (index < HOLE_AT || index >= HOLE_END)
        fill(want, index);
    return memcmp(memory + index * PAGE_BYTES, want, PAGE_BYTES) == 0;
}

static void make_file(void)
{
    uint8_t page[PAGE_BYTES];

    file = memfd_create("saved", MFD_CLOEXEC);
    cr_assert(ftruncate(file, (off_t)(FILE_AT + BYTES)) == 0);
    for (uint32_t i = 0; i < PAGES; i++) {
        fill(page, i);
        if (i < HOLE_AT || i >= HOLE_END)
            cr_assert(pwrite(file, page, PAGE_BYTES, (off_t)(FILE_AT + i * PAGE_BYTES)) ==
                      (ssize_t)PAGE_BYTES);
    }
}

static void set_up(void)
{
    const char *reason = "";

    memset(&ram, 0, sizeof(ram));
    if (ram_open(&ram, -1, &reason) < 0)
        cr_skip_test("no agent on this kernel: %s", reason);
    cr_assert(fault_start(&handler, &ram) == 0);
    fault_open(&handler);
    memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(ram_add(&ram, memory, BYTES, 0, true, &block) == 0);
    make_file();
}

static void tear_down(void)
{
    restore_close(&restore);
    fault_stop(&handler);
    ram_forget(&ram, block);
    munmap(memory, BYTES);
    ram_close(&ram);
    close(file);
}

TestSuite(restore, .init = set_up, .fini = tear_down);

Test(restore, pages_come_when_touched_and_the_rest_by_itself)
{
    uint32_t wrong = 0;

    memset(memory, 0x5a, PAGE_BYTES); /* what was there goes */
    cr_assert(restore_begin(&restore, &ram, block, file, FILE_AT) == 0);
    srandom(40);
    for (uint32_t i = 0; i < 1000; i++)
        wrong += !holds((uint32_t)random() % PAGES);
    cr_expect(restore_wait(&restore) == 0);
    cr_expect(block->counts[PLACE_REMOTE] == 0);
    for (uint32_t i = 0; i < PAGES; i++)
        wrong += !holds(i);
    cr_expect(wrong == 0, "%u pages were wrong", wrong);
    cr_expect(ram.refused_transitions == 0);
}

Test(restore, holes_are_absent_and_nobody_reads_them)
{
    cr_assert(restore_begin(&restore, &ram, block, file, FILE_AT) == 0);
    cr_assert(restore_wait(&restore) == 0);
    cr_expect(block->counts[PLACE_ABSENT] == HOLE_END - HOLE_AT);
    cr_expect(block->counts[PLACE_PRIVATE] == PAGES - (HOLE_END - HOLE_AT));
}

/* A page that is written or given up before its bytes have come is not overwritten by them. */
Test(restore, what_the_guest_does_to_a_page_stands)
{
    static const uint8_t zeros[PAGE_BYTES];
    uint32_t given = PAGES - 64, written = PAGES - 32;

    cr_assert(restore_begin(&restore, &ram, block, file, FILE_AT) == 0);
    lock_take(&block->lock);
    cr_expect(discard_pages(&ram, block, given, 32, MADV_DONTNEED) == 0);
    lock_release(&block->lock);
    memset(memory + written * PAGE_BYTES, 0x77, PAGE_BYTES);
    cr_assert(restore_wait(&restore) == 0);
    for (uint32_t i = given; i < given + 32; i++)
        cr_expect(memcmp(memory + i * PAGE_BYTES, zeros, PAGE_BYTES) == 0, "page %u", i);
    for (uint32_t i = 0; i < PAGE_BYTES; i++)
        cr_assert(memory[written * PAGE_BYTES + i] == 0x77);
    cr_expect(holds(written + 1) && holds(given - 1));
}

Test(restore, file_that_can_not_be_read)
{
    char path[64];
    int unreadable;

    snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
    unreadable = open(path, O_WRONLY | O_CLOEXEC);
    cr_assert(restore_begin(&restore, &ram, block, unreadable, FILE_AT) == 0);
    close(unreadable);
    cr_expect(restore_wait(&restore) == -EBADF);
    cr_expect(block->counts[PLACE_REMOTE] == PAGES - (HOLE_END - HOLE_AT),
              "pages that were never read count as there");
}

Test(restore, what_can_not_be_begun)
{
    cr_expect(restore_wait(&restore) == -ENOENT);
    cr_expect(restore_begin(&restore, &ram, block, file, FILE_AT + 1) == -EINVAL);
    cr_expect(restore_begin(&restore, &ram, block, file, FILE_AT + PAGE_BYTES) == -ENODATA);
    cr_expect(restore_begin(&restore, &ram, block, file, UINT64_MAX - PAGE_BYTES + 1) == -ENODATA);
    cr_expect(restore_begin(&restore, &ram, block, -1, FILE_AT) == -EBADF);
    block->resting = true;
    cr_expect(restore_begin(&restore, &ram, block, file, FILE_AT) == -EAGAIN);
    block->resting = false;
    cr_expect(restore_wait(&restore) == -ENOENT);
    cr_assert(restore_begin(&restore, &ram, block, file, FILE_AT) == 0);
    cr_expect(restore_begin(&restore, &ram, block, file, FILE_AT) == -EBUSY);
    cr_assert(restore_wait(&restore) == 0);
    cr_expect(restore_wait(&restore) == 0);
}

/* A child would see zeros where pages are still to come: it does not get this memory at all. */
Test(restore, child_gets_no_memory_that_is_not_there)
{
    int status = 0;
    pid_t child;

    cr_assert(restore_begin(&restore, &ram, block, file, FILE_AT) == 0);
    lock_take(&block->lock); /* nothing is placed now */
    if (block->counts[PLACE_REMOTE] > 0) {
        child = fork();
        if (child == 0)
            _exit(msync(memory, PAGE_BYTES, MS_ASYNC) == 0 ? 1 : 0);
        waitpid(child, &status, 0);
    }
    lock_release(&block->lock);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "it has the memory");
    cr_assert(restore_wait(&restore) == 0);
    child = fork();
    if (child == 0)
        _exit(holds(PAGES - 1) ? 0 : 1);
    waitpid(child, &status, 0);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "it has no memory afterwards");
}
