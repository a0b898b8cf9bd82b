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

#include "discard.h"
#include "fault.h"
#include "freeze.h"
#include "merge.h"
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

static void fill(uint8_t *page, uint32_t content)
{
    uint32_t *words = (uint32_t *)page;

    for (uint32_t i = 0; i < PAGE_BYTES / 4; i++)
        words[i] = content * 2654435761U + i;
}

static bool holds(const uint8_t *page, uint32_t content)
{
    uint8_t want[PAGE_BYTES];

    fill(want, content);
    return memcmp(page, want, PAGE_BYTES) == 0;
}

static int make_segment(uint32_t pages, uint32_t first_content, int seals)
{
    int fd = memfd_create("memd-test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t page[PAGE_BYTES];

    for (uint32_t i = 0; i < pages; i++) {
        fill(page, first_content + i);
        cr_assert_eq(pwrite(fd, page, PAGE_BYTES, i * (off_t)PAGE_BYTES), (ssize_t)PAGE_BYTES);
    }
    cr_assert_eq(fcntl(fd, F_ADD_SEALS, seals), 0);
    return fd;
}

#define ALL_SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

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
    cr_assert_eq(segments_add(&segments, 1, 1024, make_segment(1024, 1000, ALL_SEALS)), 0);
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
        fill(ram_address(block, index + i), first_content + i);
}

static void merge(uint32_t index, uint32_t slot_page, uint32_t pages, uint8_t *outcomes)
{
    merge_pages(&ram, &segments, block, index, SLOT(1, slot_page), pages, outcomes, &stats);
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
        cr_assert(holds(ram_address(block, 100 + i), 1000 + i));
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
    cr_assert(!holds(ram_address(block, 1), 1001));
    ram_address(block, 1)[PAGE_BYTES - 1] ^= 1;
    cr_assert(holds(ram_address(block, 1), 1001));
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
            ram_address(block, i)[100]++;
            ram_address(block, i)[100]--;
            cr_assert(holds(ram_address(block, i), 1000 + i));
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
    cr_assert(holds(ram_address(block, 9), 1009));
    cr_assert(holds(ram_address(block, 40), 1040));
    assert_sums();
}

Test(agent_pages, an_unsealed_segment_is_refused)
{
    int fd = make_segment(4, 0, F_SEAL_SHRINK | F_SEAL_GROW);

    cr_assert_eq(segments_add(&segments, 2, 4, fd), -EPERM);
    close(fd);
    fd = make_segment(4, 0, ALL_SEALS);
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
            if (!holds(ram_address(block, i), 1000 + i))
                _exit(1);
        ram_address(block, 3)[0] = 1;
        _exit(0);
    }
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert_eq(status, 0);
    merge(32, 32, 32, outcomes);
    for (uint32_t i = 0; i < 64; i++)
        cr_assert(holds(ram_address(block, i), 1000 + i));
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
        cr_assert(holds(ram_address(block, i), 1000 + i));
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
}

Test(agent_pages, segments_can_be_given_up_one_by_one)
{
    uint8_t outcomes[64];

    cr_assert_eq(segments_add(&segments, 2, 64, make_segment(64, 5000, ALL_SEALS)), 0);
    fill_guest(0, 64, 1000);
    fill_guest(64, 64, 5000);
    merge(0, 0, 64, outcomes);
    merge_pages(&ram, &segments, block, 64, SLOT(2, 0), 64, outcomes, &stats);
    lock_take(&block->lock);
    cr_assert_eq(discard_segment(&ram, block, 0, 2), 0);
    lock_release(&block->lock);
    segments_remove(&segments, 2);
    cr_assert_eq(block->counts[PLACE_SHARED], 64);
    for (uint32_t i = 0; i < 128; i++)
        cr_assert(holds(ram_address(block, i), i < 64 ? 1000 + i : 5000 + i - 64));
    assert_sums();
}

Test(agent_pages, a_shared_page_moves_within_the_store)
{
    uint8_t outcomes[4];

    cr_assert_eq(segments_add(&segments, 2, 64, make_segment(64, 1000, ALL_SEALS)), 0);
    fill_guest(0, 4, 1000);
    merge(0, 0, 4, outcomes);
    cr_assert_eq(merge_remap(&ram, &segments, block, 1, SLOT(2, 1), &stats), 0);
    cr_assert_eq(block->slots[1], SLOT(2, 1));
    cr_assert_eq(merge_remap(&ram, &segments, block, 2, SLOT(2, 1), &stats), NOT_MERGED_MISMATCH);
    cr_assert(holds(ram_address(block, 1), 1001));
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
        fill(at + (200 + i) * PAGE_BYTES, 1000 + i);
    cr_assert_eq(ram_add(&ram, at, HUGE_BYTES, RAM_NOHUGEPAGE, false, &old), 0);
    lock_take(&old->lock);
    cr_assert_eq(remap_arm(&ram, old, 0, HUGE_PAGES), 0);
    old->chunks[0].state = CHUNK_ARMED;
    ram_move_places(&ram, old, 200, 8, TRANSITION_POPULATE);
    lock_release(&old->lock);
    merge_pages(&ram, &segments, old, 200, SLOT(1, 0), 8, outcomes, &stats);
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
        cr_assert(holds(ram_address(block, i), 1000 + i), "page %u", i);
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
    cr_assert_eq(segments_add(&segments, 1, 1024, make_segment(1024, 7000, ALL_SEALS)), 0);
    ram_address(block, 1)[9]++;
    ram_address(block, 1)[9]--;
    for (uint32_t i = 0; i < 4; i++)
        cr_assert(holds(ram_address(block, i), 1000 + i), "page %u", i);
    cr_assert_eq(block->counts[PLACE_SHARED], 0);
    cr_assert_eq(block->captives, 4);
    assert_sums();
}

/* Without PAGEMAP_SCAN nobody can say which pages were written before they were protected. */
Test(agent_pages, pages_that_may_have_been_written_unseen_are_not_called_shared)
{
    int pagemap_fd = ram.pagemap_fd;
    uint8_t outcomes[4];

    cr_assert_eq(segments_add(&segments, 2, 4, make_segment(4, 1000, ALL_SEALS)), 0);
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
    ram_address(block, 1)[9]++;
    ram_address(block, 1)[9]--;
    lock_take(&block->lock);
    cr_assert_eq(discard_pages(&ram, block, 4, 2, MADV_DONTNEED), 0);
    lock_release(&block->lock);
    merge_pages(&ram, &segments, block, 8, SLOT(1, 8), 8, outcomes, &stats);
    cr_assert_eq(outcomes[0], NOT_MERGED_BUDGET);
    for (uint32_t i = 0; i < 16; i++)
        if (i == 4 || i == 5)
            cr_assert(hash_page_is_zero(ram_address(block, i)), "page %u", i);
        else
            cr_assert(holds(ram_address(block, i), 1000 + i), "page %u", i);
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
        if (round == 2) /* its page tables are in the way of the third, were they left there */
            fill(ram_address(block, 1034), 7);
        merge(1024, 0, HUGE_PAGES, outcomes);
        cr_assert_eq(ram.huge_freezes, round);
        for (uint32_t i = 0; i < HUGE_PAGES; i++) {
            bool other = round == 2 && i == 10;
            cr_assert_eq(outcomes[i], other ? NOT_MERGED_MISMATCH : 0, "page %u: %u", i,
                         outcomes[i]);
            cr_assert_eq(ram_place(block, 1024 + i), other ? PLACE_PRIVATE : PLACE_SHARED);
            cr_assert(holds(ram_address(block, 1024 + i), other ? 7 : 1000 + i));
        }
        assert_sums();
    }
}

Test(agent_pages, a_huge_page_that_is_given_back_is_as_it_was)
{
    fill_huge(1024, 1000);
    lock_take(&block->lock);
    cr_assert_eq(freeze_take(&ram, block, 1024, HUGE_PAGES), HUGE_PAGES);
    cr_assert(holds(freeze_bytes(&ram, 300), 1300));
    cr_assert(!freeze_is_huge(&ram, block, 1024), "it has left a hole");
    freeze_return(&ram, block, 1024, 0, HUGE_PAGES);
    freeze_thaw(&ram, block, 1024, HUGE_PAGES);
    cr_assert(freeze_is_huge(&ram, block, 1024), "it came back as it was");
    lock_release(&block->lock);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        cr_assert(holds(ram_address(block, 1024 + i), 1000 + i));
}

Test(agent_pages, pages_that_follow_each_other_are_merged_wherever_they_are_in_the_store)
{
    uint32_t slots[40];
    uint8_t outcomes[40];

    for (uint32_t i = 0; i < 40; i++) {
        slots[i] = SLOT(1, i < 20 ? 100 - i : 200 + i / 3);
        fill(ram_address(block, 8 + i), 1000 + SLOT_PAGE(slots[i]) + (i == 30));
    }
    slots[35] = SLOT(9, 0); /* there is no such segment */
    merge_scattered(&ram, &segments, block, 8, slots, 40, outcomes, &stats);
    for (uint32_t i = 0; i < 40; i++) {
        uint8_t want = i == 30 ? NOT_MERGED_MISMATCH : i == 35 ? NOT_MERGED_REFUSED : 0;
        cr_assert_eq(outcomes[i], want, "page %u: %u", i, outcomes[i]);
        cr_assert_eq(ram_place(block, 8 + i), want ? PLACE_PRIVATE : PLACE_SHARED);
        if (!want)
            cr_assert_eq(block->slots[8 + i], slots[i]);
    }
    for (uint32_t i = 0; i < 40; i++)
        if (i != 35)
            cr_assert(holds(ram_address(block, 8 + i), 1000 + SLOT_PAGE(slots[i]) + (i == 30)));
    assert_sums();
    fill(ram_address(block, 12), 1);
    cr_assert_eq(ram_place(block, 12), PLACE_PRIVATE, "a write still breaks its share");
    cr_assert_eq(ram_place(block, 11), PLACE_SHARED);
}
