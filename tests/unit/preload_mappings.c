/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A VMM that knows nothing of memd and changes the mappings of its guest's RAM: what it asks for
 * happens, or fails as it would without us, and either way every byte is as it must be. The test is
 * the VMM, with the calls that libmemd-preload stands under; only the other end, memd, is made up.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent_bytes.h"
#include "agent_memd.h"

#define PAGES 256U
#define BYTES (PAGES * PAGE_BYTES)

static struct memd_end memd;
static uint8_t *ram;

/* What a file's pages are mapped as says /proc. */
static uint32_t pages_of(const char *file, const uint8_t *from, size_t bytes)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    uintptr_t start, end, first = (uintptr_t)from, last = first + bytes;
    uint32_t pages = 0;
    char line[512];

    while (fgets(line, sizeof(line), maps)) {
        if (!strstr(line, file) || sscanf(line, "%lx-%lx", &start, &end) != 2)
            continue;
        start = start > first ? start : first;
        end = end < last ? end : last;
        pages += end > start ? (uint32_t)((end - start) / PAGE_BYTES) : 0;
    }
    fclose(maps);
    return pages;
}

static uint32_t shared(void)
{
    return pages_of("memfd:memd-test", ram, BYTES);
}

static uint8_t *page(uint32_t i)
{
    return ram + i * PAGE_BYTES;
}

static uint8_t *map_anonymous(size_t bytes)
{
    uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    cr_assert_neq(at, MAP_FAILED);
    return at;
}

/* Announces the RAM, has all of it shared. A page on either side of it is the test's. */
static void set_up(void)
{
    int fd = bytes_segment(PAGES, 1, ALL_SEALS);

    memd_end_start(&memd);
    setenv("MEMD_AGENT_SOCKET", memd.path, 1);
    ram = map_anonymous(BYTES + 2 * PAGE_BYTES) + PAGE_BYTES;
    madvise(ram, BYTES, MADV_NOHUGEPAGE);
    if (madvise(ram, BYTES, MADV_MERGEABLE) < 0)
        cr_skip_test("no agent on this kernel");
    for (uint32_t i = 0; i < PAGES; i++)
        bytes_fill(page(i), i + 1);
    for (int tries = 0; tries < 20000 && memd.fd < 0; tries++)
        usleep(1000);
    memd_end_give(&memd, 1, PAGES, fd);
    for (int tries = 0; tries < 400 && shared() < PAGES; tries++) {
        memd_end_merge(&memd, 0, SLOT(1, 0), PAGES);
        usleep(50000);
    }
    if (shared() == 0)
        cr_skip_test("nothing can be shared on this kernel");
    cr_assert_eq(shared(), PAGES);
    close(fd);
}

static void tear_down(void)
{
    memd_end_stop(&memd);
}

TestSuite(preload, .init = set_up, .fini = tear_down, .timeout = 60);

/* All pages from `first` on have their bytes, and can be written to. */
static void work(uint32_t first, uint32_t end)
{
    for (uint32_t i = first; i < end; i++) {
        cr_assert(bytes_hold(page(i), i + 1), "page %u has other bytes", i);
        bytes_touch(&page(i)[i]);
        cr_assert(bytes_hold(page(i), i + 1), "page %u lost a write", i);
    }
}

/* From now on no share gets a copy of its own, as when there is no memory: the userfaultfd for that
 * is the third that the agent has opened. */
static void let_copies_fail(void)
{
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), seen = 0;
    char link[64], path[64];

    for (int fd = 3; fd < 256; fd++) {
        ssize_t got;

        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        got = readlink(path, link, sizeof(link) - 1);
        link[got > 0 ? got : 0] = '\0';
        if (strcmp(link, "anon_inode:[userfaultfd]") == 0 && ++seen == 3)
            cr_assert_eq(dup2(null, fd), fd);
    }
    cr_assert_eq(seen, 3);
    close(null);
}

/* ---- calls that fail ---- */

Test(preload, an_munmap_of_all_that_is_refused)
{
    cr_assert_lt(munmap(ram - 8, BYTES + 16), 0);
    cr_assert_eq(errno, EINVAL);
    cr_assert_eq(shared(), PAGES, "nothing has changed");
    work(0, PAGES);
}

Test(preload, an_munmap_of_a_part_that_is_refused_and_no_memory_to_copy)
{
    let_copies_fail();
    cr_assert_lt(munmap(page(3) - 8, 100 * PAGE_BYTES), 0);
    work(0, PAGES);
}

Test(preload, a_mapping_over_all_that_is_refused)
{
    cr_assert_eq(mmap(ram, BYTES, PROT_READ, MAP_PRIVATE | MAP_FIXED, -1, 0), MAP_FAILED);
    cr_assert_eq(errno, EBADF);
    work(0, PAGES);
}

Test(preload, a_mapping_over_all_that_is_refused_and_no_memory_to_copy)
{
    let_copies_fail();
    cr_assert_eq(mmap(ram, BYTES, PROT_READ, MAP_PRIVATE | MAP_FIXED, -1, 0), MAP_FAILED);
    work(0, PAGES);
}

Test(preload, a_move_over_it_that_is_refused_and_no_memory_to_copy)
{
    uint8_t *other = map_anonymous(4 * PAGE_BYTES);

    let_copies_fail();
    cr_assert_eq(
        mremap(other + 8, 4 * PAGE_BYTES, 4 * PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, page(8)),
        MAP_FAILED);
    work(0, PAGES);
}

/* ---- calls that succeed ---- */

Test(preload, an_munmap_takes_what_it_says)
{
    cr_assert_eq(munmap(ram, BYTES), 0);
    cr_assert_eq(shared(), 0);
    cr_assert_eq(mmap(ram, BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
                 (void *)ram);
    for (size_t i = 0; i < BYTES; i += 512)
        cr_assert_eq(ram[i], 0);
}

Test(preload, an_munmap_of_a_part_and_what_is_mapped_there_next)
{
    let_copies_fail();
    cr_assert_eq(munmap(page(10), 20 * PAGE_BYTES), 0);
    cr_assert_eq(mmap(page(10), 20 * PAGE_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
                 (void *)page(10));
    memset(page(10), 9, 20 * PAGE_BYTES);
    work(0, 10);
    work(30, PAGES);
    cr_assert_eq(page(10)[0] + page(29)[PAGE_BYTES - 1], 18);
}

Test(preload, a_move_over_a_part_and_no_memory_to_copy)
{
    uint8_t *other = map_anonymous(4 * PAGE_BYTES);

    memset(other, 5, 4 * PAGE_BYTES);
    let_copies_fail();
    cr_assert_eq(
        mremap(other, 4 * PAGE_BYTES, 4 * PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, page(8)),
        (void *)page(8));
    for (size_t i = 0; i < 4 * PAGE_BYTES; i++)
        cr_assert_eq(page(8)[i], 5);
    work(0, 8);
    work(12, PAGES);
    memset(page(8), 6, 4 * PAGE_BYTES);
    cr_assert_eq(page(8)[0], 6);
}

/* A page of the store must not leave our sight. */
Test(preload, a_move_of_ram_elsewhere_and_no_memory_to_copy)
{
    let_copies_fail();
    cr_assert_eq(mremap(ram, BYTES, BYTES + PAGE_BYTES, MREMAP_MAYMOVE), MAP_FAILED);
    cr_assert_eq(errno, ENOMEM);
    work(0, PAGES);
}

Test(preload, a_move_of_ram_onto_ram)
{
    cr_assert_eq(
        mremap(page(0), 4 * PAGE_BYTES, 4 * PAGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, page(100)),
        (void *)page(100));
    for (uint32_t i = 0; i < 4; i++)
        cr_assert(bytes_hold(page(100 + i), i + 1));
    work(4, 100);
    work(104, PAGES);
}

/* ---- RAM that was given back ---- */

/* The VMM registers a page with a userfaultfd of its own, for a moment. */
static void use_userfaultfd(uint8_t *at)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register request = {.range = {(uintptr_t)at, PAGE_BYTES},
                                      .mode = UFFDIO_REGISTER_MODE_MISSING};

    cr_assert_eq(ioctl(fd, UFFDIO_API, &api), 0);
    cr_assert_eq(ioctl(fd, UFFDIO_REGISTER, &request), 0);
    cr_assert_eq(ioctl(fd, UFFDIO_UNREGISTER, &request.range), 0);
    close(fd);
}

/* Where something could not be undone the agent keeps an eye on a block that it has given back.
 * When it takes up its work again, that block is none of it. */
Test(preload, locked_ram_is_not_shared_after_the_vmm_used_userfaultfd)
{
    uint8_t *more = map_anonymous(BYTES);
    uint32_t before;

    madvise(more, BYTES, MADV_NOHUGEPAGE);
    cr_assert_eq(madvise(more, BYTES, MADV_MERGEABLE), 0);
    for (uint32_t i = 0; i < PAGES; i++)
        bytes_fill(more + i * PAGE_BYTES, i + 1);
    let_copies_fail();
    work(0, PAGES); /* the kernel copies all of it */
    cr_assert_eq(mlock(page(3), PAGE_BYTES), 0);
    cr_assert_eq(madvise(page(100), 50 * PAGE_BYTES, MADV_DONTNEED), 0);
    for (uint32_t i = 100; i < 150; i++)
        bytes_fill(page(i), i + 1);
    before = shared();
    use_userfaultfd(more);
    for (int tries = 0; tries < 400 && pages_of("memfd:memd-test", more, BYTES) == 0; tries++) {
        memd_end_merge(&memd, 100, SLOT(1, 100), 50);
        memd_end_merge(&memd, PAGES, SLOT(1, 0), 50);
        usleep(50000);
    }
    cr_assert_neq(pages_of("memfd:memd-test", more, BYTES), 0, "it shares again");
    cr_assert_eq(shared(), before);
    work(0, PAGES);
}

/* ---- memory backends with files ---- */

static void *map_ram_file(void)
{
    char path[] = "/tmp/memd-unit-ram-XXXXXX";
    int fd = mkstemp(path);
    void *at;

    unlink(path);
    cr_assert_eq(ftruncate(fd, BYTES), 0);
    at = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    cr_assert_neq(at, MAP_FAILED);
    close(fd);
    return at;
}

Test(preload, memory_that_is_plugged_and_unplugged_again_and_again)
{
    void *plugged[20];

    setenv("MEMD_RAM_DIR", "/tmp/memd-unit-ram-", 1);
    for (int i = 0; i < 50; i++) {
        plugged[0] = map_ram_file();
        cr_assert_eq(pages_of("memd-unit-ram", plugged[0], BYTES), 0, "a file after %d others", i);
        cr_assert_eq(munmap(plugged[0], BYTES), 0);
    }
    /* As many at once as there is room for; those that are too many are the VMM's. */
    for (int i = 0; i < 20; i++) {
        plugged[i] = map_ram_file();
        cr_assert_eq(pages_of("memd-unit-ram", plugged[i], BYTES), i < 16 ? 0 : PAGES, "%d", i);
    }
    cr_assert_lt(munmap((char *)plugged[3] - 8, BYTES + 16), 0);
    cr_assert_eq(pages_of("memd-unit-ram", map_ram_file(), BYTES), PAGES, "it was not unplugged");
    cr_assert_eq(munmap(plugged[3], BYTES), 0);
    cr_assert_eq(pages_of("memd-unit-ram", map_ram_file(), BYTES), 0);
}
