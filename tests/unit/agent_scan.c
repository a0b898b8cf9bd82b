/* SPDX-License-Identifier: Apache-2.0 */
/* The scanner, on memory of this process. A pass is what the test makes of it: no clock. */
#include <criterion/criterion.h>
#include <string.h>
#include <sys/mman.h>

#include "discard.h"
#include "fault.h"
#include "remap.h"
#include "scan.h"

#define PAGES 1024U

static struct guest_ram ram;
static struct fault_handler handler;
static struct scanner scanner;
static struct ram_block *block;
static uint8_t *guest;
static uint32_t offers[PAGES];
static uint32_t room;
static bool allowed;

static bool take_offer(void *self, uint32_t page, uint64_t hash)
{
    (void)self;
    cr_assert_lt(page, PAGES);
    cr_assert_eq(hash, hash_page(&scanner.secret, ram_address(block, page)));
    if (room == 0)
        return false;
    room--;
    offers[page]++;
    return true;
}

static bool may_freeze(void *self, struct ram_block *at, uint32_t index, uint32_t pages)
{
    (void)self;
    (void)at;
    (void)index;
    (void)pages;
    return allowed;
}

static void set_up_memory(int advice)
{
    const char *reason = "";
    uint8_t *at = mmap(NULL, PAGES * PAGE_BYTES + HUGE_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (ram_open(&ram, -1, &reason) < 0)
        cr_skip_test("no agent on this kernel: %s", reason);
    cr_assert_eq(fault_start(&handler, &ram), 0);
    fault_open(&handler);
    guest = (uint8_t *)(((uintptr_t)at + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    cr_assert_eq(ram_add(&ram, guest, PAGES * PAGE_BYTES,
                         advice == MADV_HUGEPAGE ? RAM_HUGEPAGE : RAM_NOHUGEPAGE, true, &block),
                 0);
    scanner.ram = &ram;
    memset(&scanner.secret, 0x5a, sizeof(scanner.secret));
    scanner.sink = (struct scan_sink){.offer = take_offer, .may_freeze = may_freeze};
    scanner.settle_ms = 3000;
    room = UINT32_MAX;
    allowed = true;
}

static void set_up_small(void)
{
    set_up_memory(MADV_NOHUGEPAGE);
}

static void set_up_huge(void)
{
    set_up_memory(MADV_HUGEPAGE);
}

static void tear_down(void)
{
    cr_assert_eq(ram.refused_transitions, 0);
    fault_stop(&handler);
}

TestSuite(agent_scan, .init = set_up_small, .fini = tear_down, .timeout = 60);
TestSuite(agent_scan_huge, .init = set_up_huge, .fini = tear_down, .timeout = 60);

static void pass(void)
{
    scanner.now_ms += 1000;
    while (scan_step(&scanner) == SCAN_MORE)
        ;
}

static void write_page(uint32_t index, uint8_t value)
{
    memset(ram_address(block, index), value, PAGE_BYTES);
}

static uint64_t sum_of_places(void)
{
    uint64_t sum = 0;

    for (int p = 0; p < PLACE_COUNT; p++)
        sum += block->counts[p];
    return sum;
}

Test(agent_scan, a_page_is_offered_once_when_it_has_been_quiet_for_a_pass)
{
    write_page(3, 1);
    pass();
    cr_assert_eq(offers[3], 0);
    pass();
    cr_assert_eq(offers[3], 1);
    pass();
    pass();
    cr_assert_eq(offers[3], 1);
    cr_assert_eq(ram_place(block, 3), PLACE_PRIVATE);
    cr_assert_eq(sum_of_places(), PAGES);
}

Test(agent_scan, a_page_that_changes_in_every_pass_is_never_offered)
{
    for (uint8_t i = 1; i < 10; i++) {
        write_page(3, i);
        write_page(4, 7);
        pass();
    }
    cr_assert_eq(offers[3], 0);
    cr_assert_eq(offers[4], 0);
    pass();
    cr_assert_eq(offers[3], 1);
}

/* They are missing, and not empty: whoever takes them for that shows zeros to the guest. */
Test(agent_scan, pages_that_are_still_to_come_are_let_be)
{
    lock_take(&block->lock);
    cr_assert_eq(remap_arm(&ram, block, 0, PAGES), 0);
    for (uint32_t c = 0; c < block->chunk_count; c++)
        block->chunks[c].state = CHUNK_ARMED;
    ram_move_places(&ram, block, 0, PAGES, TRANSITION_EXPECT);
    lock_release(&block->lock);
    for (uint32_t i = 0; i < 20; i++)
        pass();
    cr_assert_eq(block->counts[PLACE_REMOTE], PAGES);
    for (uint32_t c = 0; c < block->chunk_count; c++)
        cr_assert_eq(block->chunks[c].state, CHUNK_ARMED);
}

Test(agent_scan, a_changed_page_is_offered_again)
{
    write_page(3, 1);
    pass();
    pass();
    write_page(3, 2);
    pass();
    cr_assert_eq(offers[3], 1);
    pass();
    cr_assert_eq(offers[3], 2);
}

Test(agent_scan, zero_pages_are_dropped_and_come_back_with_a_write)
{
    for (uint32_t i = 0; i < 100; i++)
        write_page(i, 1);
    for (uint32_t i = 10; i < 90; i++)
        write_page(i, 0);
    pass();
    pass();
    cr_assert_eq(block->counts[PLACE_ZERO], 80);
    cr_assert_eq(ram_address(block, 50)[123], 0);
    ram_address(block, 50)[123] = 9;
    ram_address(block, 51)[0] = 8;
    pass();
    cr_assert_eq(ram_place(block, 50), PLACE_PRIVATE);
    cr_assert_eq(block->counts[PLACE_ZERO], 78);
    cr_assert_eq(ram_address(block, 50)[123], 9);
    cr_assert_eq(ram_address(block, 50)[124], 0);
    for (uint32_t i = 10; i < 90; i++)
        cr_assert_eq(offers[i], 0);
    cr_assert_eq(sum_of_places(), PAGES);
}

Test(agent_scan, nothing_is_frozen_when_it_must_not_be)
{
    allowed = false;
    write_page(0, 1);
    write_page(1, 0);
    ram_address(block, 1)[0] = 1;
    ram_address(block, 1)[0] = 0;
    pass();
    pass();
    cr_assert_eq(block->counts[PLACE_ZERO], 0);
    cr_assert_eq(offers[0], 0);
    allowed = true;
    pass();
    cr_assert_eq(block->counts[PLACE_ZERO], 1);
    cr_assert_eq(offers[0], 1);
}

Test(agent_scan, a_full_sink_loses_no_candidate)
{
    for (uint32_t i = 0; i < 300; i++)
        write_page(i, 1);
    pass();
    room = 0;
    for (int tries = 0; tries < 5; tries++)
        cr_assert_eq(scan_step(&scanner), SCAN_FULL);
    while (true) {
        enum scan_result result = scan_step(&scanner);
        if (result == SCAN_PASS_END)
            break;
        if (result == SCAN_FULL)
            room = 7;
    }
    for (uint32_t i = 0; i < 300; i++)
        cr_assert_eq(offers[i], 1);
}

Test(agent_scan, what_the_index_forgot_is_offered_again)
{
    write_page(3, 1);
    pass();
    pass();
    scan_forget(&scanner);
    pass();
    pass();
    cr_assert_eq(offers[3], 2);
}

Test(agent_scan, untouched_memory_stays_untouched)
{
    pass();
    pass();
    pass();
    cr_assert_eq(block->counts[PLACE_ABSENT], PAGES);
    cr_assert_eq(handler.times.count, 0);
}

Test(agent_scan, a_chunk_that_was_given_up_can_be_huge_again)
{
    write_page(0, 1);
    write_page(1, 2);
    pass();
    cr_assert_eq(block->chunks[0].state, CHUNK_ARMED);
    lock_take(&block->lock);
    cr_assert_eq(discard_pages(&ram, block, 0, HUGE_PAGES, MADV_DONTNEED), 0);
    lock_release(&block->lock);
    cr_assert_eq(block->chunks[0].state, CHUNK_EMPTY);
    cr_assert_eq(block->counts[PLACE_ABSENT], PAGES);
    cr_assert_eq(ram_address(block, 0)[0], 0);
}

Test(agent_scan, a_chunk_that_changes_all_the_time_is_let_go)
{
    for (uint8_t round = 1; round < 6; round++) {
        for (uint32_t i = 0; i < HUGE_PAGES; i++)
            write_page(i, round);
        pass();
    }
    cr_assert_eq(block->chunks[0].state, CHUNK_HOT);
    cr_assert_eq(sum_of_places(), PAGES);
}

static void need_huge_page(void)
{
    if (scanner.huge_chunks == 0)
        cr_skip_test("this machine gives no huge page");
}

/* Passes until the page has been offered `times` times; at most `limit`. */
static uint32_t passes_until_offered(uint32_t page, uint32_t times, uint32_t limit)
{
    for (uint32_t n = 1; n <= limit; n++) {
        pass();
        if (offers[page] == times)
            return n;
    }
    cr_assert_fail("page %u was offered %u times, not %u, after %u passes", page, offers[page],
                   times, limit);
    return 0;
}

Test(agent_scan, what_changes_after_a_long_rest_is_found_though_it_is_looked_at_less_often)
{
    scanner.lazy = true;
    write_page(3, 1);
    write_page(700, 1);
    passes_until_offered(3, 1, 2);
    for (uint32_t i = 0; i < 40; i++)
        pass();
    write_page(3, 2);
    cr_assert_gt(passes_until_offered(3, 2, 12), 2);
    write_page(3, 3);
    cr_assert_gt(passes_until_offered(3, 3, 8), 2); /* a little keeps it half awake */
    cr_assert_eq(offers[700], 1);
}

Test(agent_scan, much_that_changes_after_a_long_rest_wakes_its_chunk)
{
    scanner.lazy = true;
    for (uint32_t i = 0; i < 40; i++)
        pass();
    for (uint32_t i = 0; i <= SURVEY_LITTLE; i++)
        write_page(i, 1);
    /* At most 8 passes until that is seen, and then every pass counts. */
    cr_assert_leq(passes_until_offered(3, 1, 9), 9);
    write_page(4, 2);
    cr_assert_eq(passes_until_offered(4, 2, 2), 2);
}

Test(agent_scan, pages_that_change_all_the_time_keep_their_chunk_from_being_looked_at_each_pass)
{
    uint32_t looks = 0;

    scanner.lazy = true;
    for (uint32_t i = 0; i < 80; i++) {
        uint64_t before = scanner.pass_written;
        write_page(3, (uint8_t)i);
        pass();
        looks += i >= 40 && scanner.pass_written > before;
    }
    cr_assert_eq(looks, 5);
    passes_until_offered(3, 1, 16);
}

Test(agent_scan, nobody_is_left_out_while_the_scan_is_in_a_hurry)
{
    write_page(3, 1);
    for (uint32_t i = 0; i < 40; i++)
        pass();
    write_page(3, 2);
    cr_assert_eq(passes_until_offered(3, 2, 2), 2);
}

Test(agent_scan, only_looks_at_armed_chunks_can_be_fruitless)
{
    write_page(3, 1);
    for (uint32_t i = 0; i < 10; i++)
        pass();
    cr_assert_gt(block->chunks[0].fruitless, 5);
    cr_assert_eq(block->chunks[1].state, CHUNK_EMPTY);
    cr_assert_eq(block->chunks[1].fruitless, 0);
}

Test(agent_scan, a_chunk_that_is_all_shared_is_looked_at_again_when_a_share_breaks)
{
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        write_page(i, (uint8_t)(i % 255 + 1));
    pass();
    pass();
    lock_take(&block->lock);
    ram_move_places(&ram, block, 0, HUGE_PAGES, TRANSITION_SHARE);
    lock_release(&block->lock);
    cr_assert(ram_chunk_is_shared(block, 0));
    write_page(5, 1);
    pass();
    pass();
    cr_assert_eq(offers[5], 1);
    lock_take(&block->lock);
    ram_move_places(&ram, block, 5, 1, TRANSITION_BREAK);
    lock_release(&block->lock);
    cr_assert(!ram_chunk_is_shared(block, 0));
    write_page(5, 2);
    passes_until_offered(5, 2, 2);
}

Test(agent_scan_huge, a_hot_huge_page_is_left_alone)
{
    for (uint8_t round = 1; round < 12; round++) {
        for (uint32_t i = 0; i < HUGE_PAGES; i++)
            write_page(i, round);
        pass();
    }
    need_huge_page();
    cr_assert_eq(block->chunks[0].state, CHUNK_HUGE);
    cr_assert_eq(scanner.huge_chunks, 1);
    cr_assert_eq(offers[0], 0);
}

Test(agent_scan_huge, a_huge_page_that_changes_now_and_then_is_not_taken_for_cold)
{
    for (uint8_t round = 1; round < 30; round++) {
        for (uint32_t i = 0; i < HUGE_PAGES && round % 3 == 0; i++)
            write_page(i, round);
        pass();
    }
    need_huge_page();
    cr_assert_eq(block->chunks[0].state, CHUNK_HUGE);
}

Test(agent_scan_huge, a_cold_huge_page_is_offered_page_by_page_and_stays_huge)
{
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        write_page(i, (uint8_t)(i % 255 + 1));
    pass();
    need_huge_page();
    pass();
    pass();
    cr_assert_eq(block->chunks[0].state, CHUNK_HUGE);
    pass();
    pass();
    cr_assert_eq(block->chunks[0].state, CHUNK_ARMED);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        cr_assert_eq(offers[i], 1);
}

Test(agent_scan_huge, a_huge_page_of_zeros_is_dropped_whole)
{
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        write_page(i, 1);
    pass();
    need_huge_page();
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        write_page(i, 0);
    for (int n = 0; n < 6; n++)
        pass();
    cr_assert_eq(scanner.zero_merges, HUGE_PAGES);
    cr_assert_eq(ram.huge_freezes, 1);
    for (uint32_t i = 0; i < HUGE_PAGES; i++)
        cr_assert_eq(ram_place(block, i), PLACE_ZERO);
    cr_assert(hash_page_is_zero(ram_address(block, 5)));
    write_page(5, 3);
    cr_assert_eq(*ram_address(block, 5), 3);
}
