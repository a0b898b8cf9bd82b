/* SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store.h"

static struct ksm_segment *publish(struct ksm_store *store, uint32_t pages)
{
    static uint8_t content[PAGE_BYTES];
    struct ksm_segment *segment;

    cr_assert_eq(ksm_store_create(store, pages, &segment), 0);
    for (uint32_t page = 0; page < pages; page++) {
        const void *one = content;

        memset(content, (int)page + 1, sizeof(content));
        cr_assert_eq(ksm_store_write(segment, page, &one, 1), 0);
        segment->tags[page] = page + 1;
    }
    cr_assert_eq(ksm_store_seal(store, segment), 0);
    return segment;
}

Test(host_store, a_slot_takes_so_many_users_and_not_one_more)
{
    struct ksm_budget budget = {.limit_pages = 100};
    struct ksm_store store;
    uint32_t slot;

    cr_assert_eq(ksm_store_start(&store, &budget), 0);
    slot = SLOT(publish(&store, 2)->id, 1);
    for (uint32_t i = 0; i < KSM_SLOT_USERS_MAX; i++) {
        cr_assert(ksm_store_usable(&store, slot, 2));
        ksm_store_use(&store, slot);
    }
    cr_assert_not(ksm_store_usable(&store, slot, 2));
    cr_assert_not(ksm_store_usable(&store, SLOT(0, 0), 2), "the tag is another one");
    for (uint32_t i = 1; i < KSM_SLOT_USERS_MAX; i++)
        cr_assert_not(ksm_store_release(&store, slot));
    cr_assert(ksm_store_release(&store, slot), "that was the last user");
    cr_assert_eq(store.used + store.users, 0);
    ksm_store_stop(&store);
}

Test(host_store, the_budget_is_kept_and_given_back)
{
    struct ksm_budget budget = {.limit_pages = 10};
    struct ksm_store store;
    struct ksm_segment *segment, *other;

    cr_assert_eq(ksm_store_start(&store, &budget), 0);
    segment = publish(&store, 8);
    cr_assert_eq(ksm_store_create(&store, 3, &other), -ENOSPC);
    cr_assert_eq(budget.refused_pages, 3);
    ksm_store_close(&store, segment);
    cr_assert_eq(budget.used_pages, 0);
    publish(&store, 10);
    ksm_store_stop(&store);
    cr_assert_eq(budget.used_pages, 0);
}

Test(host_store, slots_that_are_not_there_are_nobodys)
{
    struct ksm_budget budget = {.limit_pages = 10};
    struct ksm_store store;
    uint32_t id;

    cr_assert_eq(ksm_store_start(&store, &budget), 0);
    id = publish(&store, 4)->id;
    cr_assert(ksm_store_has(&store, SLOT(id, 3)));
    cr_assert_not(ksm_store_has(&store, SLOT(id, 4)));
    cr_assert_not(ksm_store_has(&store, SLOT(id + 1, 0)));
    cr_assert_not(ksm_store_has(&store, SLOT_NONE));
    cr_assert_eq(*ksm_store_tag_at(&store, SLOT(SEGMENTS_MAX - 1, 0)), 0);
    ksm_store_stop(&store);
}

Test(host_store, ids_are_not_used_again_at_once)
{
    struct ksm_budget budget = {.limit_pages = 10};
    struct ksm_store store;
    struct ksm_segment *first;
    uint32_t id;

    cr_assert_eq(ksm_store_start(&store, &budget), 0);
    first = publish(&store, 1);
    id = first->id;
    ksm_store_close(&store, first);
    cr_assert_neq(publish(&store, 1)->id, id);
    store.next_id = KSM_SEGMENT_IDS - 1;
    cr_assert_eq(publish(&store, 1)->id, KSM_SEGMENT_IDS - 1);
    cr_assert_eq(publish(&store, 1)->id, 0);
    cr_assert_eq(publish(&store, 1)->id, 2, "1 is in use");
    ksm_store_stop(&store);
}

/* What may not pass for a segment of an earlier life. */
Test(host_store, only_the_recorded_file_is_taken_back)
{
    struct ksm_budget budget = {.limit_pages = 100};
    struct ksm_store old, store;
    struct ksm_segment *segment, *back;
    int other, unsealed, copy;
    struct stat about;

    cr_assert_eq(ksm_store_start(&old, &budget), 0);
    cr_assert_eq(ksm_store_start(&store, &budget), 0);
    segment = publish(&old, 4);
    other = dup(publish(&old, 4)->fd);
    unsealed = memfd_create("x", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    cr_assert_eq(ftruncate(unsealed, 4 * (off_t)PAGE_BYTES), 0);
    copy = dup(segment->fd);
    cr_assert_eq(ksm_store_adopt(&store, 3, 4, segment->device, segment->inode, other, &back),
                 -EPERM);
    cr_assert_eq(ksm_store_adopt(&store, 3, 4, segment->device, segment->inode, unsealed, &back),
                 -EPERM);
    cr_assert_eq(fstat(unsealed, &about), 0);
    cr_assert_eq(ksm_store_adopt(&store, 3, 4, about.st_dev, about.st_ino, unsealed, &back), -EPERM,
                 "without seals");
    cr_assert_eq(fcntl(unsealed, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
    cr_assert_eq(ksm_store_adopt(&store, 3, 4, about.st_dev, about.st_ino, unsealed, &back), -EPERM,
                 "with all seals but the one against writing");
    cr_assert_eq(ksm_store_adopt(&store, 3, 5, segment->device, segment->inode, copy, &back),
                 -EPERM, "another size");
    cr_assert_eq(
        ksm_store_adopt(&store, KSM_SEGMENT_IDS, 4, segment->device, segment->inode, copy, &back),
        -EPERM);
    cr_assert_eq(ksm_store_adopt(&store, 3, 4, segment->device, segment->inode, copy, &back), 0);
    cr_assert_eq(back->state, SEGMENT_TAKEN_BACK);
    cr_assert(ksm_store_is(back, segment->fd));
    cr_assert_not(ksm_store_is(back, other));
    close(other);
    close(unsealed);
    ksm_store_stop(&store);
    ksm_store_stop(&old);
}
