/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's hold on guest memory, tried on memory of this process: the test is VMM and guest at
 * once, the fault handler is the real one, and the store is a memfd that the test seals.
 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent_bytes.h"
#include "discard.h"
#include "fault.h"
#include "freeze.h"
#include "merge_row.h"
#include "procfs.h"
#include "remap.h"
#include "uffd.h"

#define PAGES 2048U

static struct guest_ram ram;
static struct fault_handler handler;
static struct segments segments;
static struct merge_stats stats;
static struct ram_block *block;
static uint8_t *guest;

static void *reserve(size_t bytes)
{
    uint8_t *at =
        mmap(NULL, bytes + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return (uint8_t *)(((uintptr_t)at + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
}

static void set_up(void)
{
    const char *reason = "";

    if (ram_open(&ram, -1, &reason) < 0)
        cr_skip_test("no agent on this kernel: %s", reason);
    ram.sources[PLACE_SHARED] = segments_source(&segments);
    cr_assert_eq(fault_start(&handler, &ram), 0);
    fault_open(&handler);
    guest = reserve(PAGES * PAGE_BYTES);
    cr_assert_eq(ram_add(&ram, guest, PAGES * PAGE_BYTES, 0, true, &block), 0);
    for (uint32_t c = 0; c < block->chunk_count; c++) {
        lock_take(&block->lock);
        cr_assert_eq(remap_arm(&ram, block, ram_chunk_first(block, c), HUGE_PAGES), 0);
        block->chunks[c].state = CHUNK_ARMED;
        lock_release(&block->lock);
    }
    cr_assert_eq(segments_add(&segments, 1, 1024, bytes_segment(1024, 1000, ALL_SEALS)), 0);
}

/* As agent_stand_down does it. Returns what could not be made private. */
static uint32_t stand_down(struct ram_block *of)
{
    uint32_t left = 0;

    of->resting = true;
    for (uint32_t c = 0; c < of->chunk_count; c++)
        left += discard_stand_down(&ram, of, c);
    return left;
}

static void tear_down(void)
{
    lock_take(&block->lock);
    cr_assert_eq(stand_down(block), 0);
    lock_release(&block->lock);
    fault_stop(&handler);
}

TestSuite(agent_pages, .init = set_up, .fini = tear_down, .timeout = 60);

static void fill_guest(uint32_t index, uint32_t pages, uint32_t first_content)
{
    for (uint32_t i = 0; i < pages; i++)
        bytes_fill(ram_address(block, index + i), first_content + i);
}

static void merge(uint32_t index, uint32_t slot_page, uint32_t pages, uint8_t *outcomes)
{
    merge_row(&ram, &segments, block, index, SLOT(1, slot_page), pages, outcomes, &stats);
}

static void assert_sums(void)
{
    uint64_t sum = 0;

    for (int p = 0; p < PLACE_COUNT; p++)
        sum += block->counts[p];
    cr_assert_eq(sum, block->pages);
    cr_assert_eq(ram.refused_transitions, 0);
}

static uint32_t vmas_of_guest(void)
{
    FILE *file = fopen("/proc/self/maps", "r");
    char line[512];
    uint32_t vmas = 0;
    uintptr_t start, end;

    while (fgets(line, sizeof(line), file))
        if (sscanf(line, "%lx-%lx", &start, &end) == 2)
            vmas += start < (uintptr_t)guest + PAGES * PAGE_BYTES && end > (uintptr_t)guest;
    fclose(file);
    return vmas;
}

Test(agent_pages, equal_pages_are_shared_and_read_the_same)
{
    uint8_t outcomes[300];

    fill_guest(100, 300, 1000);
    merge(100, 0, 300, outcomes);
    for (uint32_t i = 0; i < 300; i++) {
        cr_assert_eq(outcomes[i], 0);
        cr_assert_eq(ram_place(block, 100 + i), PLACE_SHARED);
        cr_assert(bytes_hold(ram_address(block, 100 + i), 1000 + i));
    }
    cr_assert_eq(block->counts[PLACE_SHARED], 300);
    assert_sums();
    cr_assert_leq(vmas_of_guest(), 3);
}

Test(agent_pages, a_page_that_differs_in_its_last_byte_goes_back)
{
    uint8_t outcomes[3];

    fill_guest(0, 3, 1000);
    ram_address(block, 1)[PAGE_BYTES - 1] ^= 1;
    merge(0, 0, 3, outcomes);
    cr_assert_eq(outcomes[0], 0);
    cr_assert_eq(outcomes[1], NOT_MERGED_MISMATCH);
    cr_assert_eq(outcomes[2], 0);
    cr_assert(!bytes_hold(ram_address(block, 1), 1001));
    ram_address(block, 1)[PAGE_BYTES - 1] ^= 1;
    cr_assert(bytes_hold(ram_address(block, 1), 1001));
    assert_sums();
}

Test(agent_pages, a_write_breaks_only_its_own_page_at_first)
{
    uint8_t outcomes[64];

    fill_guest(512, 64, 1000);
    merge(512, 0, 64, outcomes);
    ram_address(block, 530)[7] = 0x55;
    cr_assert_eq(ram_place(block, 530), PLACE_PRIVATE);
    cr_assert_eq(ram_place(block, 529), PLACE_SHARED);
    cr_assert_eq(ram_place(block, 531), PLACE_SHARED);
    cr_assert_eq(ram_address(block, 530)[7], 0x55);
    lock_take(&block->lock); /* the handler has noted it when it lets go of this */
    lock_release(&block->lock);
    cr_assert_eq(ram.broken.count, 1);
    cr_assert_eq(ram.broken.pages[0], 530);
    assert_sums();
}

Test(agent_pages, vmas_join_again_when_every_share_is_broken_one_by_one)
{
    uint8_t outcomes[512];

    fill_guest(0, 512, 1000);
    merge(0, 0, 512, outcomes);
    for (uint32_t i = 0; i < 512; i += 2)
        ram_address(block, i)[0]++;
    for (uint32_t i = 1; i < 512; i += 2)
        ram_address(block, i)[0]++;
    cr_assert_eq(block->counts[PLACE_SHARED], 0);
    cr_assert_leq(vmas_of_guest(), 2);
    assert_sums();
}

Test(agent_pages, a_broken_page_can_be_shared_again)
{
    uint8_t outcomes[8];

    fill_guest(0, 8, 1000);
    for (int round = 0; round < 50; round++) {
        merge(0, 0, 8, outcomes);
        for (uint32_t i = 0; i < 8; i++) {
            cr_assert_eq(outcomes[i], 0, "round %d page %u outcome %u", round, i, outcomes[i]);
            bytes_touch(&ram_address(block, i)[100]);
            cr_assert(bytes_hold(ram_address(block, i), 1000 + i));
        }
    }
    assert_sums();
}

Test(agent_pages, a_discarded_share_reads_as_zeros)
{
    static const uint8_t zeros[PAGE_BYTES];
    uint8_t outcomes[64];

    fill_guest(0, 64, 1000);
    merge(0, 0, 64, outcomes);
    lock_take(&block->lock);
    cr_assert_eq(discard_pages(&ram, block, 10, 30, MADV_DONTNEED), 0);
    lock_release(&block->lock);
    for (uint32_t i = 10; i < 40; i++)
        cr_assert_eq(memcmp(ram_address(block, i), zeros, PAGE_BYTES), 0);
    cr_assert(bytes_hold(ram_address(block, 9), 1009));
    cr_assert(bytes_hold(ram_address(block, 40), 1040));
    assert_sums();
}

Test(agent_pages, an_unsealed_segment_is_refused)
{
    int fd = bytes_segment(4, 0, F_SEAL_SHRINK | F_SEAL_GROW);

    cr_assert_eq(segments_add(&segments, 2, 4, fd), -EPERM);
    close(fd);
    fd = bytes_segment(4, 0, ALL_SEALS);
    cr_assert_eq(segments_add(&segments, 2, 5, fd), -EINVAL);
    close(fd);
}

Test(agent_pages, a_fork_between_leaves_both_sides_right)
{
    uint8_t outcomes[64];
    int status;
    pid_t child;

    fill_guest(0, 64, 1000);
    merge(0, 0, 32, outcomes);
    child = fork();
    if (child == 0) {
        for (uint32_t i = 0; i < 64; i++)
            if (!bytes_hold(ram_address(block, i), 1000 + i))
                _exit(1);
        ram_address(block, 3)[0] = 1;
        _exit(0);
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert_eq(status, 0);
    merge(32, 32, 32, outcomes);
    for (uint32_t i = 0; i < 64; i++)
        cr_assert(bytes_hold(ram_address(block, i), 1000 + i));
    assert_sums();
}

Test(agent_pages, pages_that_no_longer_are_exclusive_are_returned_by_copy)
{
    int status;
    pid_t child;

    fill_guest(0, 4, 1000);
    lock_take(&block->lock);
    cr_assert_eq(freeze_take(&ram, block, 0, 4), 4);
    madvise(ram.staging, FREEZE_MAX_PAGES * PAGE_BYTES, MADV_DOFORK);
    child = fork(); /* the staged pages are shared with the child now: MOVE will refuse them */
    if (child == 0) {
        pause();
        _exit(0);
    }
    freeze_return(&ram, block, 0, 0, 4);
    freeze_thaw(&ram, block, 0, 4);
    lock_release(&block->lock);
    for (uint32_t i = 0; i < 4; i++)
        cr_assert(bytes_hold(ram_address(block, i), 1000 + i));
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
}

Test(agent_pages, segments_can_be_given_up_one_by_one)
{
    uint8_t outcomes[64];

    cr_assert_eq(segments_add(&segments, 2, 64, bytes_segment(64, 5000, ALL_SEALS)), 0);
    fill_guest(0, 64, 1000);
    fill_guest(64, 64, 5000);
    merge(0, 0, 64, outcomes);
    merge_row(&ram, &segments, block, 64, SLOT(2, 0), 64, outcomes, &stats);
    lock_take(&block->lock);
    cr_assert_eq(discard_segment(&ram, block, 0, 2), 0);
    lock_release(&block->lock);
    segments_remove(&segments, 2);
    cr_assert_eq(block->counts[PLACE_SHARED], 64);
    for (uint32_t i = 0; i < 128; i++)
        cr_assert(bytes_hold(ram_address(block, i), i < 64 ? 1000 + i : 5000 + i - 64));
    assert_sums();
}

Test(agent_pages, a_shared_page_moves_within_the_store)
{
    uint8_t outcomes[4];

    cr_assert_eq(segments_add(&segments, 2, 64, bytes_segment(64, 1000, ALL_SEALS)), 0);
    fill_guest(0, 4, 1000);
    merge(0, 0, 4, outcomes);
    cr_assert_eq(merge_remap(&ram, &segments, block, 1, SLOT(2, 1), &stats), 0);
    cr_assert_eq(block->slots[1], SLOT(2, 1));
    cr_assert_eq(merge_remap(&ram, &segments, block, 2, SLOT(2, 1), &stats), NOT_MERGED_MISMATCH);
    cr_assert(bytes_hold(ram_address(block, 1), 1001));
    ram_address(block, 1)[0]++;
    cr_assert_eq(ram_place(block, 1), PLACE_PRIVATE);
    assert_sums();
}

/* Memory that was there before the block was taken in is a VMA of its own beside what comes out of
 * the shadow. */
Test(agent_pages, a_run_of_faults_does_not_stick_at_the_end_of_a_vma)
{
    struct ram_block *old;
    uint8_t *at = reserve(HUGE_BYTES);
    uint8_t outcomes[8];

    madvise(at, HUGE_BYTES, MADV_NOHUGEPAGE);
    for (uint32_t i = 0; i < 8; i++)
        bytes_fill(at + (200 + i) * PAGE_BYTES, 1000 + i);
    cr_assert_eq(ram_add(&ram, at, HUGE_BYTES, RAM_NOHUGEPAGE, false, &old), 0);
    lock_take(&old->lock);
    cr_assert_eq(remap_arm(&ram, old, 0, HUGE_PAGES), 0);
    old->chunks[0].state = CHUNK_ARMED;
    ram_move_places(&ram, old, 200, 8, TRANSITION_POPULATE);
    lock_release(&old->lock);
    merge_row(&ram, &segments, old, 200, SLOT(1, 0), 8, outcomes, &stats);
    cr_assert_eq(outcomes[0], 0);
    lock_take(&old->lock);
    cr_assert_eq(discard_pages(&ram, old, 200, 8, MADV_DONTNEED), 0);
    lock_release(&old->lock);
    for (uint32_t i = 190; i < 210; i++)
        cr_assert_eq(ram_address(old, i)[0], 0);
    lock_take(&old->lock);
    cr_assert_eq(stand_down(old), 0);
    lock_release(&old->lock);
}

/* The kernel fills whatever is registered, with whichever userfaultfd. */
Test(agent_pages, a_fault_that_is_told_of_late_puts_nothing_into_the_store_s_mapping)
{
    uint8_t outcomes[4];

    fill_guest(0, 4, 1000);
    merge(0, 0, 4, outcomes);
    /* As if the kernel had reclaimed the store's pages. */
    madvise(ram_address(block, 0), 4 * PAGE_BYTES, MADV_DONTNEED);
    fault_serve_missing(&handler, (uintptr_t)ram_address(block, 1));
    lock_take(&block->lock);
    ram_move_places(&ram, block, 2, 1, TRANSITION_BREAK);
    ram_set_captive(block, 2, true);
    lock_release(&block->lock);
    fault_serve_missing(&handler, (uintptr_t)ram_address(block, 2));
    for (uint32_t i = 0; i < 4; i++)
        cr_assert(bytes_hold(ram_address(block, i), 1000 + i), "page %u", i);
    assert_sums();
}

Test(agent_pages, a_fault_that_is_told_of_late_puts_nothing_into_the_vmm_s_own_userfaultfd)
{
    int fd = uffd_open(-1, 0);
    unsigned char there = 0xff;

    lock_take(&block->lock);
    cr_assert_eq(stand_down(block), 0);
    lock_release(&block->lock);
    cr_assert_eq(uffd_register(fd, ram_address(block, 0), HUGE_BYTES, UFFDIO_REGISTER_MODE_MISSING),
                 0);
    fault_serve_missing(&handler, (uintptr_t)ram_address(block, 5));
    cr_assert_eq(mincore(ram_address(block, 5), PAGE_BYTES, &there), 0);
    cr_assert_eq(there & 1, 0);
    uffd_unregister(fd, ram_address(block, 0), HUGE_BYTES);
    close(fd);
}

/* With memd's next session the numbers of segments mean other contents. */
Test(agent_pages, a_share_that_gets_no_copy_does_not_look_its_slot_up_again)
{
    struct guest_ram *r = &ram;
    int shadow_fd = r->shadow_fd;
    uint8_t outcomes[4];

    fill_guest(0, 4, 1000);
    merge(0, 0, 4, outcomes);
    lock_take(&block->lock);
    r->shadow_fd = -1; /* no copy can be prepared */
    discard_shares(r, block, 0);
    r->shadow_fd = shadow_fd;
    lock_release(&block->lock);
    segments_remove(&segments, 1);
    cr_assert_eq(segments_add(&segments, 1, 1024, bytes_segment(1024, 7000, ALL_SEALS)), 0);
    bytes_touch(&ram_address(block, 1)[9]);
    for (uint32_t i = 0; i < 4; i++)
        cr_assert(bytes_hold(ram_address(block, i), 1000 + i), "page %u", i);
    cr_assert_eq(block->counts[PLACE_SHARED], 0);
    cr_assert_eq(block->captives, 4);
    assert_sums();
}

/* Without PAGEMAP_SCAN nobody can say which pages were written before they were protected. */
Test(agent_pages, pages_that_may_have_been_written_unseen_are_not_called_shared)
{
    int pagemap_fd = ram.pagemap_fd;
    uint8_t outcomes[4];

    cr_assert_eq(segments_add(&segments, 2, 4, bytes_segment(4, 1000, ALL_SEALS)), 0);
    fill_guest(0, 4, 1000);
    merge(0, 0, 2, outcomes);
    ram.pagemap_fd = -1;
    merge(2, 2, 2, outcomes);
    cr_assert_eq(outcomes[0], NOT_MERGED_GONE);
    cr_assert_eq(merge_remap(&ram, &segments, block, 1, SLOT(2, 1), &stats), NOT_MERGED_GONE);
    ram.pagemap_fd = pagemap_fd;
    cr_assert_eq(ram_place(block, 2), PLACE_PRIVATE);
    cr_assert(ram_captive(block, 2));
    /* The share that page 1 had is over, and memd will be told. */
    cr_assert_eq(ram.broken.count, 1);
    cr_assert_eq(ram.broken.pages[0], 1);
    assert_sums();
}

static void lower_limit(int resource)
{
    struct rlimit limit;

    cr_assert_eq(getrlimit(resource, &limit), 0);
    limit.rlim_cur = 1 << 20;
    cr_assert_eq(setrlimit(resource, &limit), 0);
}

/* mremap unmaps its target before it finds that the process may not have more. */
static void works_below_a_lowered_limit(int resource)
{
    uint8_t outcomes[16];

    fill_guest(0, 16, 1000);
    merge(0, 0, 8, outcomes);
    lower_limit(resource);
    bytes_touch(&ram_address(block, 1)[9]);
    lock_take(&block->lock);
    cr_assert_eq(discard_pages(&ram, block, 4, 2, MADV_DONTNEED), 0);
    lock_release(&block->lock);
    merge_row(&ram, &segments, block, 8, SLOT(1, 8), 8, outcomes, &stats);
    cr_assert_eq(outcomes[0], NOT_MERGED_BUDGET);
    for (uint32_t i = 0; i < 16; i++)
        if (i == 4 || i == 5)
            cr_assert(hash_page_is_zero(ram_address(block, i)), "page %u", i);
        else
            cr_assert(bytes_hold(ram_address(block, i), 1000 + i), "page %u", i);
    assert_sums();
    setrlimit(resource, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY});
}

Test(agent_pages, a_limit_on_the_address_space_that_was_lowered_leaves_no_gap)
{
    works_below_a_lowered_limit(RLIMIT_AS);
}

Test(agent_pages, a_limit_on_data_that_was_lowered_leaves_no_gap)
{
    works_below_a_lowered_limit(RLIMIT_DATA);
}

/* As where the kernel had no memory to register a part of it. */
Test(agent_pages, zeros_in_place_where_some_pages_are_not_registered, .timeout = 20)
{
    uint8_t outcomes[8];

    fill_guest(0, 8, 1000);
    merge(0, 0, 8, outcomes);
    lock_take(&block->lock);
    cr_assert_eq(uffd_unregister(ram.store_fd, ram_address(block, 2), PAGE_BYTES), 0);
    ram_move_places(&ram, block, 2, 1, TRANSITION_BREAK);
    ram_set_captive(block, 2, true);
    lock_release(&block->lock);
    lower_limit(RLIMIT_AS);
    lock_take(&block->lock);
    cr_assert_eq(discard_pages(&ram, block, 1, 4, MADV_DONTNEED), 0);
    lock_release(&block->lock);
    setrlimit(RLIMIT_AS, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY});
    for (uint32_t i = 0; i < 8; i++)
        if (i >= 1 && i < 5)
            cr_assert(hash_page_is_zero(ram_address(block, i)), "page %u", i);
        else
            cr_assert(bytes_hold(ram_address(block, i), 1000 + i), "page %u", i);
    cr_assert_eq(block->captives, 4);
    cr_assert_eq(ram.unmerges, 3);
    assert_sums();
}

/* Two pages, and then nothing that can be read: as when the kernel runs out of memory. */
static int fetch_half(void *self, const struct ram_block *of, uint32_t index, uint32_t pages,
                      const void **ret_bytes)
{
    (void)of;
    (void)index;
    *ret_bytes = self;
    return (int)pages;
}

Test(agent_pages, a_copy_that_fails_half_way_is_not_what_a_discard_shows)
{
    uint8_t *half = reserve(8 * PAGE_BYTES);
    uint8_t outcomes[8];

    memset(half, 7, 2 * PAGE_BYTES);
    mprotect(half + 2 * PAGE_BYTES, 6 * PAGE_BYTES, PROT_NONE);
    fill_guest(0, 8, 1000);
    merge(0, 0, 8, outcomes);
    lock_take(&block->lock);
    ram.sources[PLACE_SHARED] = (struct page_source){.fetch = fetch_half, .self = half};
    cr_assert_lt(remap_to_private(&ram, block, 0, 8, true), 0);
    cr_assert_eq(discard_pages(&ram, block, 0, 8, MADV_DONTNEED), 0);
    ram.sources[PLACE_SHARED] = segments_source(&segments);
    lock_release(&block->lock);
    for (uint32_t i = 0; i < 8; i++)
        cr_assert(hash_page_is_zero(ram_address(block, i)), "page %u", i);
    assert_sums();
}

/* The kernel drops a page that was given up with MADV_FREE whenever it likes. */
Test(agent_pages, a_frozen_page_that_the_kernel_drops_reads_as_zeros, .timeout = 20)
{
    fill_guest(0, 4, 1000);
    lock_take(&block->lock);
    cr_assert_eq(freeze_take(&ram, block, 0, 4), 4);
    madvise(freeze_bytes(&ram, 1), PAGE_BYTES, MADV_DONTNEED);
    madvise(freeze_bytes(&ram, 3), PAGE_BYTES, MADV_DONTNEED);
    cr_assert(hash_page_is_zero(freeze_bytes(&ram, 3)));
    freeze_return(&ram, block, 0, 0, 4);
    freeze_thaw(&ram, block, 0, 4);
    lock_release(&block->lock);
    for (uint32_t i = 0; i < 4; i++)
        cr_assert(i % 2 ? hash_page_is_zero(ram_address(block, i))
                        : bytes_hold(ram_address(block, i), 1000 + i),
                  "page %u", i);
    assert_sums();
}

/* Until the kernel gives this process no more. */
static void use_up_mappings(void)
{
    size_t pages = 1 << 20;
    uint8_t *at = mmap(NULL, pages * PAGE_BYTES, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    for (size_t i = 1; i < pages; i += 2)
        if (mprotect(at + i * PAGE_BYTES, PAGE_BYTES, PROT_READ) < 0)
            return;
    cr_skip_test("vm.max_map_count is too large to reach it");
}

/* Where a chunk that is to be armed ends within a mapping, there is no other half for it. */
Test(agent_pages, a_chunk_that_is_armed_by_half_lets_nobody_wait, .timeout = 20)
{
    struct ram_block *other;
    uint8_t *at = reserve(2 * HUGE_BYTES);

    madvise(at, HUGE_BYTES / 2, MADV_DONTDUMP);
    cr_assert_eq(ram_add(&ram, at, 2 * HUGE_BYTES, 0, false, &other), 0);
    use_up_mappings();
    lock_take(&other->lock);
    cr_assert_eq(remap_arm(&ram, other, 0, HUGE_PAGES), -ENOMEM);
    lock_release(&other->lock);
    for (uint32_t i = 0; i < HUGE_PAGES; i += 16)
        cr_assert_eq(ram_address(other, i)[7], 0); /* comes back */
}

/* A VMM whose malloc gets no mapping any more ends. */
Test(agent_pages, breaks_and_discards_in_the_middle_of_runs_leave_mappings_to_the_vmm)
{
    uint8_t outcomes[64];
    uint32_t vmas;

    fill_guest(0, 64, 1000);
    merge(0, 0, 64, outcomes);
    ram.vmas_allowed = 4;
    ram.vmas_spent = 0;
    bytes_touch(&ram_address(block, 10)[1]);
    bytes_touch(&ram_address(block, 20)[1]);
    vmas = vmas_of_guest();
    bytes_touch(&ram_address(block, 30)[1]); /* would be two more */
    bytes_touch(&ram_address(block, 21)[1]); /* none more, beside 20 */
    lock_take(&block->lock);
    cr_assert_eq(discard_pages(&ram, block, 40, 2, MADV_DONTNEED), 0);
    lock_release(&block->lock);
    cr_assert_eq(vmas_of_guest(), vmas);
    cr_assert(ram_captive(block, 30));
    cr_assert_not(ram_captive(block, 21));
    ram.vmas_spent = 0; /* they were counted again */
    bytes_touch(&ram_address(block, 50)[1]);
    cr_assert_not(ram_captive(block, 50));
    cr_assert_eq(vmas_of_guest(), vmas + 2);
    for (uint32_t i = 0; i < 64; i++)
        if (i == 40 || i == 41)
            cr_assert(hash_page_is_zero(ram_address(block, i)));
        else
            cr_assert(bytes_hold(ram_address(block, i), 1000 + i), "page %u", i);
    assert_sums();
}

/* A write that may end a share makes as many mappings as were reckoned. */
static void write_and_count(uint32_t index)
{
    uint32_t before = vmas_of_guest();
    int cost = ram_place(block, index) == PLACE_SHARED ? ram_split_cost(block, index, 1) : 0;

    handler.window = 0; /* no more than this one */
    handler.last_block = NULL;
    bytes_touch(&ram_address(block, index)[1]);
    cr_assert_eq((int)vmas_of_guest() - (int)before, cost, "page %u", index);
}

Test(agent_pages, what_a_broken_share_costs_in_mappings)
{
    uint8_t outcomes[64];

    fill_guest(512, 64, 1000);
    fill_guest(600, 1, 1009);
    merge(512, 0, 64, outcomes);
    merge(600, 9, 1, outcomes);
    for (uint32_t i = 0; i < 300; i++)
        write_and_count(i == 299 ? 600 : 512 + i * 37 % 64);
    assert_sums();
}

/* What it reads into by plain references is not seen by the kernel's MOVE. */
Test(agent_pages, a_file_opened_for_direct_io_in_the_middle_ends_the_freeze)
{
    uint8_t outcomes[4];

    fill_guest(0, 4, 1000);
    ram.direct_io_changed = 1;
    merge(0, 0, 4, outcomes);
    for (uint32_t i = 0; i < 4; i++) {
        cr_assert_eq(outcomes[i], NOT_MERGED_BUSY);
        cr_assert(bytes_hold(ram_address(block, i), 1000 + i));
    }
    cr_assert_eq(block->counts[PLACE_SHARED], 0);
    ram.direct_io_changed = 0; /* it was looked at */
    merge(0, 0, 4, outcomes);
    cr_assert_eq(block->counts[PLACE_SHARED], 4);
    assert_sums();
}

static bool ageing;

/* As reclaim and DAMON do. */
static void *age(void *unused)
{
    while (__atomic_load_n(&ageing, __ATOMIC_ACQUIRE)) {
        madvise(ram_address(block, 0), 64 * PAGE_BYTES, MADV_COLD);
        madvise(ram.staging, FREEZE_MAX_PAGES * PAGE_BYTES, MADV_COLD);
    }
    return unused;
}

/* Stands under freeze.c's calls of uffd_move (CMakeLists.txt): what it moves it moves, but it does
 * not say so. */
static long kernel_says; /* 0: the truth */
static uint8_t *kernel_drops;

long __real_uffd_move(int fd, void *to, void *from, size_t bytes);
long __wrap_uffd_move(int fd, void *to, void *from, size_t bytes);

long __wrap_uffd_move(int fd, void *to, void *from, size_t bytes)
{
    long moved = __real_uffd_move(fd, to, from, bytes);

    if (kernel_drops)
        madvise(kernel_drops, PAGE_BYTES, MADV_DONTNEED);
    return kernel_says && kernel_says < moved ? kernel_says : moved;
}

static bool is_there(const uint8_t *at)
{
    uint64_t entry = 0;

    cr_assert_eq(pread(ram.pagemap_fd, &entry, sizeof(entry),
                       (off_t)((uintptr_t)at / PAGE_BYTES * sizeof(entry))),
                 sizeof(entry));
    return entry >> 63;
}

/* Linux 6.18 moves pages that it does not count (freeze.c): what is left out of the count would be
 * a hole in the guest for ever. */
Test(agent_pages, a_freeze_counts_what_was_moved_whatever_the_kernel_says)
{
    pthread_t thread;

    fill_guest(0, 64, 1000);
    ageing = true;
    pthread_create(&thread, NULL, age, NULL);
    lock_take(&block->lock);
    for (uint32_t round = 0; round < 150000; round++) {
        int frozen = freeze_take(&ram, block, 0, 64);

        for (uint32_t i = frozen > 0 ? (uint32_t)frozen : 0; i < 64; i++)
            cr_assert(is_there(ram_address(block, i)), "round %u: %d frozen, %u is gone", round,
                      frozen, i);
        if (frozen <= 0)
            continue;
        freeze_return(&ram, block, 0, 0, (uint32_t)frozen);
        freeze_thaw(&ram, block, 0, (uint32_t)frozen);
    }
    lock_release(&block->lock);
    __atomic_store_n(&ageing, false, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    for (uint32_t i = 0; i < 64; i++)
        cr_assert(bytes_hold(ram_address(block, i), 1000 + i), "page %u", i);
    assert_sums();
}

/* A discard there would put memory of ours over what the VMM has mapped since. */
Test(agent_pages, what_the_vmm_unmaps_is_not_remembered_as_the_store_s)
{
    uint8_t outcomes[4];

    fill_guest(0, 4, 1000);
    merge(0, 0, 4, outcomes);
    lock_take(&block->lock);
    ram_move_places(&ram, block, 1, 1, TRANSITION_BREAK);
    ram_set_captive(block, 1, true);
    discard_forget(&ram, block, 0, 3);
    lock_release(&block->lock);
    cr_assert_eq(block->captives, 0);
    cr_assert_eq(block->counts[PLACE_SHARED], 1);
    for (uint32_t i = 0; i < 3; i++)
        cr_assert_eq(ram_place(block, i), PLACE_ABSENT);
    assert_sums();
}

static bool has_policy(const uint8_t *at, const char *policy)
{
    char line[512], wanted[32];
    bool found = false;
    FILE *file = fopen("/proc/self/numa_maps", "r");

    snprintf(wanted, sizeof(wanted), "%lx %s", (unsigned long)(uintptr_t)at, policy);
    while (file && !found && fgets(line, sizeof(line), file))
        found = strncmp(line, wanted, strlen(wanted)) == 0;
    if (file)
        fclose(file);
    return found;
}

Test(agent_pages, a_numa_policy_of_fresh_memory_is_kept)
{
    unsigned long node_0 = 1;
    uint8_t *at =
        mmap(NULL, HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct ram_block *other;

    if (syscall(SYS_mbind, at, HUGE_BYTES, MPOL_PREFERRED, &node_0, 64, 0) < 0)
        cr_skip("this kernel has no NUMA policies");
    cr_assert(has_policy(at, "prefer"));
    cr_assert_eq(ram_add(&ram, at, HUGE_BYTES, 0, true, &other), 0);
    cr_assert(has_policy(at, "prefer"));
}

/* ---- huge pages ---- */

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

/* Fills an armed chunk anew, as one huge page. */
static void fill_huge(uint32_t first, uint32_t first_content)
{
    cr_assert_eq(discard_pages(&ram, block, first, HUGE_PAGES, MADV_DONTNEED), 0);
    fill_guest(first, HUGE_PAGES, first_content);
    madvise(ram_address(block, first), HUGE_BYTES, MADV_COLLAPSE);
    cr_assert_eq(remap_arm(&ram, block, first, HUGE_PAGES), 0);
    block->chunks[ram_chunk_of(block, first)].state = CHUNK_ARMED;
    ram_move_places(&ram, block, first, HUGE_PAGES, TRANSITION_POPULATE);
    if (!freeze_is_huge(&ram, block, first))
        cr_skip_test("this machine gives no huge page");
}

Test(agent_pages, a_huge_page_is_frozen_whole_and_what_differs_goes_back)
{
    uint8_t outcomes[HUGE_PAGES];

    for (uint32_t round = 1; round <= 3; round++) {
        fill_huge(1024, 1000);
        if (round == 2)
            bytes_fill(ram_address(block, 1034), 7);
        merge(1024, 0, HUGE_PAGES, outcomes);
        cr_assert_eq(ram.huge_freezes, round);
        for (uint32_t i = 0; i < HUGE_PAGES; i++) {
            bool other = round == 2 && i == 10;
            cr_assert_eq(outcomes[i], other ? NOT_MERGED_MISMATCH : 0, "page %u: %u", i,
                         outcomes[i]);
            cr_assert_eq(ram_place(block, 1024 + i), other ? PLACE_PRIVATE : PLACE_SHARED);
            cr_assert(bytes_hold(ram_address(block, 1024 + i), other ? 7 : 1000 + i));
        }
        assert_sums();
    }
}

/* The page tables of a huge page that is given back in parts would be in the way of the next. */
Test(agent_pages, a_huge_page_that_is_given_back_is_as_it_was)
{
    for (uint32_t round = 0; round < 2; round++) {
        uint32_t part = round == 0 ? 200 : HUGE_PAGES;

        fill_huge(1024, 1000);
        lock_take(&block->lock);
        cr_assert_eq(freeze_take(&ram, block, 1024, HUGE_PAGES), HUGE_PAGES);
        cr_assert(bytes_hold(freeze_bytes(&ram, 300), 1300));
        cr_assert(!freeze_is_huge(&ram, block, 1024), "it has left a hole");
        freeze_return(&ram, block, 1024, 0, part);
        freeze_return(&ram, block, 1024 + part, part, HUGE_PAGES - part);
        freeze_thaw(&ram, block, 1024, HUGE_PAGES);
        if (part == HUGE_PAGES)
            cr_assert(freeze_is_huge(&ram, block, 1024), "it came back as it was");
        lock_release(&block->lock);
        for (uint32_t i = 0; i < HUGE_PAGES; i++)
            cr_assert(bytes_hold(ram_address(block, 1024 + i), 1000 + i));
    }
}

/* As is left there where the kernel filled a hole of the staging area behind our back (mlockall).
 */
static void leave_zeros(uint8_t *at)
{
    static const uint8_t zeros[PAGE_BYTES];

    cr_assert_eq(uffd_copy(ram.guest_fd, at, zeros, PAGE_BYTES, false), (long)PAGE_BYTES);
}

Test(agent_pages, what_was_in_the_staging_area_is_not_taken_for_what_was_moved)
{
    uint8_t outcomes[64];

    fill_guest(0, 64, 1000);
    freeze_empty(&ram);
    leave_zeros(ram.staging + 8 * PAGE_BYTES);
    lock_take(&block->lock);
    cr_assert_eq(freeze_take(&ram, block, 0, 64), 8);
    cr_assert(bytes_hold(freeze_bytes(&ram, 7), 1007));
    cr_assert(is_there(ram_address(block, 8)));
    freeze_return(&ram, block, 0, 0, 8);
    freeze_thaw(&ram, block, 0, 8);
    cr_assert_eq(freeze_take(&ram, block, 8, 4), -EEXIST, "it is the very next");
    lock_release(&block->lock);
    merge(0, 0, 64, outcomes);
    for (uint32_t i = 0; i < 64; i++)
        cr_assert(bytes_hold(ram_address(block, i), 1000 + i), "page %u", i);
    assert_sums();
}

/* What is in the way of the move's end: 100 pages are moved, one by one. */
Test(agent_pages, a_huge_page_that_is_split_half_way_is_merged_in_parts)
{
    uint8_t outcomes[HUGE_PAGES];

    fill_huge(1024, 1000);
    freeze_empty(&ram);
    leave_zeros(ram.huge_staging + 100 * PAGE_BYTES);
    lock_take(&block->lock);
    cr_assert_eq(freeze_take(&ram, block, 1024, HUGE_PAGES), 100);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        cr_assert_eq(is_there(ram_address(block, 1024 + i)), i >= 100, "page %u", i);
    freeze_return(&ram, block, 1024, 0, 100);
    freeze_thaw(&ram, block, 1024, 100);
    lock_release(&block->lock);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        cr_assert(bytes_hold(ram_address(block, 1024 + i), 1000 + i), "page %u", i);
    fill_huge(1024, 1000);
    freeze_empty(&ram);
    leave_zeros(ram.huge_staging + 100 * PAGE_BYTES);
    bytes_fill(ram_address(block, 1024 + 50), 7);
    bytes_fill(ram_address(block, 1024 + 200), 8);
    merge(1024, 0, HUGE_PAGES, outcomes);
    for (uint32_t i = 0; i < HUGE_PAGES; i++) {
        bool other = i == 50 || i == 200;
        uint32_t content = i == 50 ? 7 : i == 200 ? 8 : 1000 + i;
        cr_assert_eq(outcomes[i], other ? NOT_MERGED_MISMATCH : 0, "page %u: %u", i, outcomes[i]);
        cr_assert(bytes_hold(ram_address(block, 1024 + i), content), "page %u", i);
    }
    assert_sums();
}

Test(agent_pages, what_the_kernel_leaves_out_of_its_count_is_found_in_huge_pages_too)
{
    static const long said[] = {-EEXIST, 8 * (long)PAGE_BYTES, -EAGAIN};
    uint8_t outcomes[HUGE_PAGES];

    for (size_t k = 0; k < sizeof(said) / sizeof(said[0]); k++) {
        fill_huge(1024, 1000);
        lock_take(&block->lock);
        kernel_says = said[k];
        cr_assert_eq(freeze_take(&ram, block, 1024, HUGE_PAGES), HUGE_PAGES);
        freeze_return(&ram, block, 1024, 0, HUGE_PAGES);
        freeze_thaw(&ram, block, 1024, HUGE_PAGES);
        kernel_says = 0;
        cr_assert(freeze_is_huge(&ram, block, 1024), "it came back as it was");
        lock_release(&block->lock);
        bytes_fill(ram_address(block, 1024 + 50), 7);
        kernel_says = said[k];
        merge(1024, 0, HUGE_PAGES, outcomes);
        kernel_says = 0;
        for (uint32_t i = 0; i < HUGE_PAGES; i++) {
            cr_assert_eq(outcomes[i], i == 50 ? NOT_MERGED_MISMATCH : 0, "page %u", i);
            cr_assert(bytes_hold(ram_address(block, 1024 + i), i == 50 ? 7 : 1000 + i));
        }
    }
    assert_sums();
}

/* Split, stopped half-way, and miscounted. */
Test(agent_pages, what_the_kernel_leaves_out_of_its_count_is_no_more_than_was_moved)
{
    fill_huge(1024, 1000);
    freeze_empty(&ram);
    leave_zeros(ram.huge_staging + 100 * PAGE_BYTES);
    leave_zeros(ram.huge_staging + 200 * PAGE_BYTES);
    lock_take(&block->lock);
    kernel_says = 8 * (long)PAGE_BYTES;
    cr_assert_eq(freeze_take(&ram, block, 1024, HUGE_PAGES), 100);
    freeze_return(&ram, block, 1024, 0, 100);
    freeze_thaw(&ram, block, 1024, 100);
    kernel_says = 0;
    lock_release(&block->lock);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        cr_assert(bytes_hold(ram_address(block, 1024 + i), 1000 + i), "page %u", i);
}

/* As a page that was given up with MADV_FREE is dropped, before it was looked at what came. */
Test(agent_pages, a_page_that_is_dropped_does_not_hide_those_behind_it)
{
    fill_guest(0, 64, 1000);
    freeze_empty(&ram);
    lock_take(&block->lock);
    kernel_says = -EEXIST;
    kernel_drops = ram.staging + 20 * PAGE_BYTES;
    cr_assert_eq(freeze_take(&ram, block, 0, 64), 64);
    kernel_drops = NULL;
    freeze_return(&ram, block, 0, 0, 64);
    freeze_thaw(&ram, block, 0, 64);
    kernel_says = 0;
    lock_release(&block->lock);
    for (uint32_t i = 0; i < 64; i++)
        if (i == 20)
            cr_assert(hash_page_is_zero(ram_address(block, i)));
        else
            cr_assert(bytes_hold(ram_address(block, i), 1000 + i), "page %u", i);
}

Test(agent_pages, a_file_opened_for_direct_io_meanwhile_gives_a_huge_page_back_whole)
{
    uint8_t outcomes[HUGE_PAGES];

    fill_huge(1024, 1000);
    ram.direct_io_changed = 1;
    merge(1024, 0, HUGE_PAGES, outcomes);
    cr_assert_eq(ram.huge_freezes, 1);
    cr_assert(freeze_is_huge(&ram, block, 1024), "nothing has split it");
    for (uint32_t i = 0; i < HUGE_PAGES; i++) {
        cr_assert_eq(outcomes[i], NOT_MERGED_BUSY);
        cr_assert(bytes_hold(ram_address(block, 1024 + i), 1000 + i));
    }
    ram.direct_io_changed = 0; /* it was looked at */
    merge(1024, 0, HUGE_PAGES, outcomes);
    cr_assert_eq(ram.huge_freezes, 2);
    cr_assert_eq(block->counts[PLACE_SHARED], HUGE_PAGES);
    assert_sums();
}

/* A frozen page that was given up with MADV_FREE may be dropped; here as the kernel does it. */
Test(agent_pages, what_is_dropped_from_a_frozen_huge_page_reads_as_zeros)
{
    fill_huge(1024, 1000);
    lock_take(&block->lock);
    cr_assert_eq(freeze_take(&ram, block, 1024, HUGE_PAGES), HUGE_PAGES);
    madvise(freeze_bytes(&ram, 9), PAGE_BYTES, MADV_DONTNEED);
    cr_assert(hash_page_is_zero(freeze_bytes(&ram, 9)));
    freeze_return(&ram, block, 1024, 0, HUGE_PAGES);
    freeze_thaw(&ram, block, 1024, HUGE_PAGES);
    lock_release(&block->lock);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        if (i == 9)
            cr_assert(hash_page_is_zero(ram_address(block, 1024 + i)));
        else
            cr_assert(bytes_hold(ram_address(block, 1024 + i), 1000 + i), "page %u", i);
}

Test(agent_pages, each_run_of_a_scattered_merge_spends_its_mappings)
{
    uint32_t slots[64], vmas = vmas_of_guest();
    uint8_t outcomes[64];

    for (uint32_t i = 0; i < 64; i++) { /* 16 runs of four */
        slots[i] = SLOT(1, (15 - i / 4) * 4 + i % 4);
        bytes_fill(ram_address(block, 512 + i), 1000 + SLOT_PAGE(slots[i]));
    }
    merge_pages(&ram, &segments, block, 512, slots, 64, outcomes, &stats);
    cr_assert_eq(block->counts[PLACE_SHARED], 64);
    cr_assert_eq(ram.vmas_spent, 32);
    cr_assert_eq(stats.vmas_added, 32);
    cr_assert_leq(vmas_of_guest(), vmas + 32);
    for (uint32_t i = 0; i < 300; i++) /* and what they cost when they end */
        write_and_count(512 + i * 37 % 64);
    assert_sums();
}

Test(agent_pages, pages_that_follow_each_other_are_merged_wherever_they_are_in_the_store)
{
    uint32_t slots[40];
    uint8_t outcomes[40];

    for (uint32_t i = 0; i < 40; i++) {
        slots[i] = SLOT(1, i < 20 ? 100 - i : 200 + i / 3);
        bytes_fill(ram_address(block, 8 + i), 1000 + SLOT_PAGE(slots[i]) + (i == 30));
    }
    slots[35] = SLOT(9, 0); /* there is no such segment */
    merge_pages(&ram, &segments, block, 8, slots, 40, outcomes, &stats);
    for (uint32_t i = 0; i < 40; i++) {
        uint8_t want = i == 30 ? NOT_MERGED_MISMATCH : i == 35 ? NOT_MERGED_REFUSED : 0;
        cr_assert_eq(outcomes[i], want, "page %u: %u", i, outcomes[i]);
        cr_assert_eq(ram_place(block, 8 + i), want ? PLACE_PRIVATE : PLACE_SHARED);
        if (!want)
            cr_assert_eq(block->slots[8 + i], slots[i]);
    }
    for (uint32_t i = 0; i < 40; i++)
        if (i != 35)
            cr_assert(
                bytes_hold(ram_address(block, 8 + i), 1000 + SLOT_PAGE(slots[i]) + (i == 30)));
    assert_sums();
    bytes_touch(ram_address(block, 12));
    cr_assert_eq(ram_place(block, 12), PLACE_PRIVATE, "a write still breaks its share");
    cr_assert_eq(ram_place(block, 11), PLACE_SHARED);
}
