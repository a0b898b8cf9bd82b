/* SPDX-License-Identifier: Apache-2.0 */
/* The gate, and VMMs that break their side of the contract. */
#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "gate.h"

#define RANGE ((const void *)0x7f0000200000)

/* What the next hook answers, and what it does before. */
static struct vmm {
    int answer;
    unsigned sleep_s;
    int asked, resumed, unvouched;
    const char *state; /* what save writes */
    int write_result;
    size_t reads; /* so many bytes load reads */
    char loaded[64];
    uint64_t sets[GATE_BITMAP_WORDS + 2]; /* bits that dirty_log sets */
    size_t set_words;
    struct memd_stream *kept;
} vmm;

static int answer_it(void)
{
    vmm.asked++;
    if (vmm.sleep_s)
        sleep(vmm.sleep_s);
    return vmm.answer;
}

static int on_pause(void *opaque)
{
    (void)opaque;
    return answer_it();
}

static int on_resume(void *opaque)
{
    (void)opaque;
    vmm.resumed++;
    return vmm.answer;
}

static int on_pinned(void *opaque, const void *addr, size_t bytes)
{
    (void)opaque;
    (void)addr;
    (void)bytes;
    return answer_it();
}

static int on_save(void *opaque, struct memd_stream *stream)
{
    (void)opaque;
    vmm.kept = stream;
    vmm.write_result = memd_stream_write(stream, vmm.state, strlen(vmm.state));
    return answer_it();
}

static int on_load(void *opaque, struct memd_stream *stream)
{
    (void)opaque;
    vmm.kept = stream;
    cr_assert_eq(memd_stream_read(stream, vmm.loaded, vmm.reads), 0);
    return answer_it();
}

static int on_dirty_log(void *opaque, const void *addr, size_t bytes, uint64_t *bitmap)
{
    (void)opaque;
    (void)addr;
    (void)bytes;
    for (size_t i = 0; i < vmm.set_words; i++)
        bitmap[i] |= vmm.sets[i];
    return answer_it();
}

static int on_vouch(void *opaque, const void *addr, size_t bytes)
{
    return on_pinned(opaque, addr, bytes);
}

static void on_unvouch(void *opaque, const void *addr, size_t bytes)
{
    (void)opaque;
    cr_assert_eq(addr, RANGE);
    cr_assert_eq(bytes, 2 * PAGE_BYTES);
    vmm.unvouched++;
}

static const struct memd_ops all = {
    .size = sizeof(all),
    .pause = on_pause,
    .resume = on_resume,
    .pinned = on_pinned,
    .save = on_save,
    .load = on_load,
    .dirty_log = on_dirty_log,
    .vouch = on_vouch,
    .unvouch = on_unvouch,
};

static struct gate gate;

static void set_up(void)
{
    vmm = (struct vmm){.state = "state"};
    cr_assert_eq(gate_open(&gate, &all, NULL), 0);
}

TestSuite(gate_hooks, .init = set_up, .timeout = 60);

/* ---- versions ---- */

Test(gate_hooks, a_newer_vmms_hooks_are_not_called)
{
    struct {
        struct memd_ops known;
        int (*unknown)(void);
    } newer = {.known = all, .unknown = (int (*)(void))(uintptr_t)1};

    newer.known.size = sizeof(newer);
    cr_assert_eq(gate_open(&gate, &newer.known, NULL), 0);
    cr_assert(gate_may_freeze(&gate, RANGE, PAGE_BYTES));
    cr_assert_eq(vmm.asked, 1);
}

Test(gate_hooks, the_first_version_has_three_hooks)
{
    struct memd_ops first = all;

    first.size = offsetof(struct memd_ops, save);
    cr_assert_eq(gate_open(&gate, &first, NULL), 0);
    cr_assert_eq(gate_pause(&gate), 0);
    cr_assert_eq(gate_load(&gate, "x", 1), -ENOTSUP);
    cr_assert_not(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES));
}

Test(gate_hooks, sizes_that_no_version_has)
{
    static const size_t sizes[] = {0, 1, 7, sizeof(struct memd_ops) + 1, 1UL << 20, SIZE_MAX};
    struct memd_ops wrong = all;

    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        wrong.size = sizes[i];
        cr_assert_eq(gate_open(&gate, &wrong, NULL), -EINVAL, "%zu", sizes[i]);
    }
}

Test(gate_hooks, half_of_a_pair)
{
    struct memd_ops half = {.size = sizeof(half), .pause = on_pause};

    cr_assert_eq(gate_open(&gate, &half, NULL), -EINVAL);
    cr_assert_eq(gate_pause(&gate), -ENOTSUP, "nothing of it is called");
    half = (struct memd_ops){.size = sizeof(half), .load = on_load};
    cr_assert_eq(gate_open(&gate, &half, NULL), -EINVAL);
    half = (struct memd_ops){.size = sizeof(half), .vouch = on_vouch};
    cr_assert_eq(gate_open(&gate, &half, NULL), -EINVAL);
}

/* ---- offences ---- */

Test(gate_hooks, one_offence_ends_every_question)
{
    size_t bytes;

    cr_assert_eq(gate_pause(&gate), 0);
    vmm.answer = 7;
    cr_assert_eq(gate_load(&gate, "", 0), -EPROTO);
    cr_assert_not_null(strstr(gate.offence, "'load'"));
    vmm.answer = 0;
    vmm.asked = 0;
    cr_assert_not(gate_may_freeze(&gate, RANGE, PAGE_BYTES));
    cr_assert_not(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES));
    cr_assert_eq(gate_save(&gate, vmm.loaded, 64, &bytes), -ENOTSUP);
    cr_assert_eq(vmm.asked, 0);
    cr_assert_eq(gate_resume(&gate), 0, "what was paused is resumed all the same");
    cr_assert_eq(vmm.resumed, 1);
    cr_assert_eq(gate_pause(&gate), -ENOTSUP);
    cr_assert_not_null(strstr(gate.offence, "'load'"), "the first offence is the one to be told");
}

Test(gate_hooks, a_hook_that_takes_too_long)
{
    vmm.sleep_s = 2;
    cr_assert_not(gate_may_freeze(&gate, RANGE, PAGE_BYTES), "its answer comes too late");
    cr_assert(gate.quarantined);
    cr_assert_not_null(strstr(gate.offence, "longer than a second"));
}

/* ---- save and load ---- */

Test(gate_hooks, a_running_vm_is_neither_saved_nor_loaded)
{
    size_t bytes = 77;

    cr_assert_eq(gate_save(&gate, vmm.loaded, 64, &bytes), -EBUSY);
    cr_assert_eq(gate_load(&gate, "x", 1), -EBUSY);
    cr_assert_eq(vmm.asked, 0);
    cr_assert_eq(bytes, 77);
}

Test(gate_hooks, what_was_saved_is_what_is_loaded)
{
    char into[16];
    size_t bytes = 0;

    cr_assert_eq(gate_pause(&gate), 0);
    cr_assert_eq(gate_save(&gate, into, sizeof(into), &bytes), 0);
    cr_assert_eq(bytes, 5);
    vmm.reads = 5;
    cr_assert_eq(gate_load(&gate, into, bytes), 0);
    cr_assert_arr_eq(vmm.loaded, "state", 5);
    cr_assert_eq(gate_resume(&gate), 0);
}

Test(gate_hooks, a_state_that_does_not_fit)
{
    char into[8] = "1234567";
    size_t bytes = 77;

    cr_assert_eq(gate_pause(&gate), 0);
    vmm.answer = -ENOSPC;
    cr_assert_eq(gate_save(&gate, into, 3, &bytes), -ENOSPC);
    cr_assert_eq(vmm.write_result, -ENOSPC);
    cr_assert_eq(bytes, 77);
    cr_assert_not(gate.quarantined);
    cr_assert_str_eq(into, "1234567", "not a byte behind what it may use");
    vmm.answer = 0;
    cr_assert_eq(gate_save(&gate, into, 3, &bytes), -EPROTO, "it says that all was well");
    cr_assert(gate.quarantined);
}

Test(gate_hooks, a_load_that_leaves_something)
{
    cr_assert_eq(gate_pause(&gate), 0);
    vmm.reads = 3;
    vmm.answer = -EINVAL;
    cr_assert_eq(gate_load(&gate, "state", 5), -EINVAL, "its own verdict on what it read");
    cr_assert_not(gate.quarantined);
    vmm.answer = 0;
    cr_assert_eq(gate_load(&gate, "state", 5), -EPROTO);
    cr_assert(gate.quarantined);
}

Test(gate_hooks, a_stream_is_good_for_its_call_and_its_direction_only)
{
    char byte, into[8];
    size_t bytes;

    cr_assert_eq(gate_pause(&gate), 0);
    cr_assert_eq(gate_save(&gate, into, sizeof(into), &bytes), 0);
    cr_assert_eq(memd_stream_write(vmm.kept, "x", 1), -EBADF);
    cr_assert_eq(memd_stream_read(vmm.kept, &byte, 1), -EBADF);
    cr_assert_eq(gate_load(&gate, "", 0), 0);
    cr_assert_eq(memd_stream_read(vmm.kept, &byte, 1), -EBADF);
    cr_assert_eq(memd_stream_read(NULL, &byte, 1), -EINVAL);
    cr_assert_eq(memd_stream_write(NULL, "x", 1), -EINVAL);
    gate.stream = (struct memd_stream){.data = (uint8_t *)"ab", .bytes = 2, .reads = true};
    cr_assert_eq(memd_stream_read(&gate.stream, NULL, 1), -EINVAL);
    cr_assert_eq(memd_stream_read(&gate.stream, into, SIZE_MAX), -ENODATA);
    cr_assert_eq(memd_stream_read(&gate.stream, into, 3), -ENODATA);
    cr_assert_eq(memd_stream_read(&gate.stream, into, 2), 0);
    cr_assert_eq(memd_stream_write(&gate.stream, "x", 1), -EBADF);
}

/* ---- the dirty log ---- */

Test(gate_hooks, pages_that_the_vmm_knows_to_be_written_are_added)
{
    uint64_t bitmap[2] = {1, 0};

    vmm.sets[0] = 4;
    vmm.sets[1] = 1;
    vmm.set_words = 2;
    cr_assert(gate_dirty_log(&gate, RANGE, 65 * PAGE_BYTES, bitmap));
    cr_assert_eq(bitmap[0], 5);
    cr_assert_eq(bitmap[1], 1);
    cr_assert_not(gate.quarantined);
}

Test(gate_hooks, a_log_that_can_not_tell_means_everything)
{
    uint64_t bitmap[2] = {0, 0};

    vmm.answer = -EIO;
    cr_assert(gate_dirty_log(&gate, RANGE, 65 * PAGE_BYTES, bitmap));
    cr_assert_eq(bitmap[0], UINT64_MAX);
    cr_assert_eq(bitmap[1], 1, "and nothing behind the range");
    cr_assert_not(gate.quarantined);
    gate.ops.dirty_log = NULL;
    bitmap[0] = 0;
    cr_assert_not(gate_dirty_log(&gate, RANGE, PAGE_BYTES, bitmap));
    cr_assert_eq(bitmap[0], 0);
}

static void too_far(size_t word, uint64_t bits)
{
    uint64_t bitmap[GATE_BITMAP_WORDS] = {0};

    vmm.sets[word] = bits;
    vmm.set_words = word + 1;
    cr_assert(gate_dirty_log(&gate, RANGE, 3 * PAGE_BYTES, bitmap));
    cr_assert(gate.quarantined);
    cr_assert_eq(bitmap[0], 7, "a liar's log means everything");
    cr_assert_eq(bitmap[1], 0);
    vmm.asked = 0;
    bitmap[0] = 0;
    cr_assert(gate_dirty_log(&gate, RANGE, 3 * PAGE_BYTES, bitmap));
    cr_assert_eq(bitmap[0], 7);
    cr_assert_eq(vmm.asked, 0);
}

Test(gate_hooks, a_bit_behind_the_range)
{
    too_far(0, 8);
}

Test(gate_hooks, a_word_behind_the_range)
{
    too_far(5, 1);
}

Test(gate_hooks, a_word_behind_the_bitmap)
{
    too_far(GATE_BITMAP_WORDS, 2);
}

/* ---- the promise ---- */

Test(gate_hooks, a_promise_is_given_back_once)
{
    vmm.answer = 0;
    cr_assert_not(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES));
    vmm.answer = -EBUSY;
    cr_assert_not(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES));
    gate_unvouch(&gate);
    cr_assert_eq(vmm.unvouched, 0, "nothing was promised");
    vmm.answer = 1;
    cr_assert(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES));
    cr_assert_not(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES), "one at a time");
    gate_unvouch(&gate);
    gate_unvouch(&gate);
    cr_assert_eq(vmm.unvouched, 1);
}

Test(gate_hooks, a_promise_outlives_no_offence)
{
    vmm.answer = 1;
    cr_assert(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES));
    vmm.answer = 9;
    cr_assert_not(gate_may_freeze(&gate, RANGE, PAGE_BYTES));
    gate_unvouch(&gate);
    cr_assert_eq(vmm.unvouched, 1, "it has to be given back");
    vmm.answer = 1;
    cr_assert_not(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES));
}

Test(gate_hooks, a_promise_that_comes_too_late)
{
    vmm.answer = 1;
    vmm.sleep_s = 2;
    cr_assert_not(gate_vouch(&gate, RANGE, 2 * PAGE_BYTES));
    cr_assert_eq(vmm.unvouched, 1);
}

Test(gate_hooks, ranges_that_are_none_are_not_asked_about)
{
    uint64_t bitmap[GATE_BITMAP_WORDS] = {0};

    vmm.answer = 1;
    cr_assert_not(gate_vouch(&gate, NULL, PAGE_BYTES));
    cr_assert_not(gate_vouch(&gate, (const void *)0x1001, PAGE_BYTES));
    cr_assert_not(gate_vouch(&gate, RANGE, 0));
    cr_assert_not(gate_vouch(&gate, RANGE, PAGE_BYTES - 1));
    cr_assert_not(gate_vouch(&gate, RANGE, (GATE_RANGE_PAGES + 1) * PAGE_BYTES));
    cr_assert(gate_dirty_log(&gate, (const void *)0x1001, PAGE_BYTES, bitmap));
    cr_assert_eq(bitmap[0], 1);
    cr_assert_eq(vmm.asked, 0);
}
