/* SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "index.h"

#define REFS 20000U

/* The naive model: for each reference its tag, 0 when it is not in the index. */
static uint32_t tags[REFS];

static const uint32_t *tag_at(const void *owner, uint32_t ref)
{
    (void)owner;
    return &tags[ref];
}

static uint32_t count(const struct ksm_index *index, uint32_t tag)
{
    struct ksm_index_cursor cursor = {0};
    uint32_t found = 0, ref;

    while ((ref = ksm_index_next(index, tag, &cursor)) != KSM_REF_NONE) {
        cr_assert_eq(tags[ref], tag);
        found++;
    }
    return found;
}

static bool has(const struct ksm_index *index, uint32_t ref)
{
    struct ksm_index_cursor cursor = {0};
    uint32_t other;

    while ((other = ksm_index_next(index, tags[ref], &cursor)) != KSM_REF_NONE) {
        if (other == ref)
            return true;
    }
    return false;
}

static uint32_t longest_bucket(const struct ksm_index *index)
{
    uint32_t longest = 0;

    for (uint32_t i = 0; i < index->bucket_count; i++)
        if (index->buckets[i].used > longest)
            longest = index->buckets[i].used;
    return longest;
}

/* Returns how long the longest bucket was at the end. */
static uint32_t run(uint32_t (*draw)(void), int steps)
{
    struct ksm_index index;
    uint64_t used = 0;
    uint32_t longest;

    srand(1);
    cr_assert_eq(ksm_index_start(&index, tag_at, NULL), 0);
    for (int step = 0; step < steps; step++) {
        uint32_t ref = (uint32_t)rand() % REFS;

        if (tags[ref]) {
            cr_assert(ksm_index_remove(&index, tags[ref], ref));
            tags[ref] = 0;
            used--;
        } else {
            tags[ref] = draw();
            cr_assert_eq(ksm_index_add(&index, tags[ref], ref), 0);
            used++;
        }
        cr_assert_eq(index.used, used);
    }
    for (uint32_t ref = 0; ref < REFS; ref++)
        cr_assert(!tags[ref] || has(&index, ref), "reference %u is lost", ref);
    longest = longest_bucket(&index);
    ksm_index_stop(&index);
    return longest;
}

static uint32_t any(void)
{
    return 1 + (uint32_t)rand();
}

static uint32_t few(void)
{
    return 1 + (uint32_t)rand() % 300;
}

/* What a stranger would send to fill one place. */
static uint32_t neighbours(void)
{
    return 0x12345000U + (uint32_t)rand() % 4096;
}

Test(host_index, random_additions_and_removals_lose_nothing)
{
    cr_assert_lt(run(any, 300000), 4 * KSM_INDEX_BUCKET);
}

Test(host_index, references_of_equal_tags_are_all_found)
{
    run(few, 100000);
}

Test(host_index, tags_that_lie_close_together_do_no_harm)
{
    cr_assert_lt(run(neighbours, 200000), 8 * KSM_INDEX_BUCKET); /* some 5 of each tag */
}

Test(host_index, all_of_one_tag_come_and_others_do_not)
{
    struct ksm_index index;

    cr_assert_eq(ksm_index_start(&index, tag_at, NULL), 0);
    for (uint32_t ref = 0; ref < 100; ref++) {
        tags[ref] = ref < 30 ? 5 : 100 + ref;
        cr_assert_eq(ksm_index_add(&index, tags[ref], ref), 0);
    }
    cr_assert_eq(count(&index, 5), 30);
    cr_assert_eq(count(&index, 6), 0);
    cr_assert_not(ksm_index_remove(&index, 5, 99));
    ksm_index_stop(&index);
}

#define MANY (1U << 20)

static uint32_t *scrambled; /* MANY */

static const uint32_t *scrambled_at(const void *owner, uint32_t ref)
{
    (void)owner;
    return &scrambled[ref];
}

static void scramble(void)
{
    scrambled = malloc(MANY * sizeof(*scrambled));
    cr_assert_not_null(scrambled);
    for (uint32_t ref = 0; ref < MANY; ref++) {
        uint32_t tag = ref * 2654435761U;

        tag ^= tag >> 15;
        tag *= 2246822519U;
        tag ^= tag >> 13;
        scrambled[ref] = tag ? tag : 1;
    }
}

Test(host_index, an_entry_costs_about_six_bytes_and_leaving_gives_them_back)
{
    struct ksm_index index;

    scramble();
    cr_assert_eq(ksm_index_start(&index, scrambled_at, NULL), 0);
    for (uint32_t ref = 0; ref < MANY; ref++)
        cr_assert_eq(ksm_index_add(&index, scrambled[ref], ref), 0);
    cr_assert_leq((double)index.bytes / MANY, 6.3);
    for (uint32_t ref = 0; ref < MANY; ref++)
        cr_assert(ksm_index_remove(&index, scrambled[ref], ref));
    cr_assert_eq(index.used, 0);
    cr_assert_leq(index.bytes, 160);
    ksm_index_stop(&index);
    free(scrambled);
}
