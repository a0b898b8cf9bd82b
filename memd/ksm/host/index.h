/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of a trust domain: from the tag of a page's content (hash.h) to where that content is.
 *
 * Theory of operation. An entry is a 32-bit *reference*: the top bit says whether the other 31 are
 * a slot of the store or a page of the domain's hint space. Its tag is not in the table: it stands
 * in the page table of the guest, or in the segment, and tag_at() says where. Beside each reference
 * stands a *mark*, 8 bits of its tag: a look-up reads the marks of one bucket, in a line or two of
 * the cache, and only the tags behind marks that fit.
 *
 * The table is linear hashing (W. Litwin, "Linear hashing: a new tool for file and table
 * addressing", VLDB 1980) with buckets that are as large as they must be: there are as many as keep
 * them at KSM_INDEX_BUCKET entries on average, and each addition splits at most one of them, so no
 * turn is longer than to split one. Within a bucket there is no order: what is removed leaves its
 * place to the last. An entry costs 5 bytes and with its bucket's spare room about 6.
 *
 * Agents choose the tags that they send, so bucket and mark come from the tag mixed with a key that
 * nobody outside knows: a stranger can't fill one bucket on purpose. How many entries one and the
 * same tag may have is for the caller to bound.
 *
 * Invariant: while a reference is in the index, *tag_at(reference) is the tag it was added with.
 * Several references may have the same tag. Not promised: which of them comes first.
 */
#ifndef MEMD_KSM_INDEX_H
#define MEMD_KSM_INDEX_H

#include "units.h"

#define KSM_INDEX_BUCKET 48U

#define KSM_REF_NONE       UINT32_MAX
#define KSM_REF_IS_SLOT(r) ((r) >> 31)
#define KSM_REF_OF_SLOT(s) ((uint32_t)(s) | 1U << 31)
#define KSM_REF_SLOT(r)    ((r) & ~(1U << 31))

struct ksm_bucket {
    uint8_t *marks; /* `size` of them, and behind them as many references */
    uint32_t size, used;
};

struct ksm_index {
    struct ksm_bucket *buckets;
    uint32_t bucket_count, bucket_room;
    const uint32_t *(*tag_at)(const void *owner, uint32_t ref); /* where its tag stands */
    const void *owner;
    uint32_t key[2];
    uint64_t used;  /* entries */
    uint64_t bytes; /* of the table */
};

/* Where a search stands. Adding or removing anything ends its meaning. */
struct ksm_index_cursor {
    uint32_t at;
};

int ksm_index_start(struct ksm_index *index,
                    const uint32_t *(*tag_at)(const void *owner, uint32_t ref), const void *owner);
void ksm_index_stop(struct ksm_index *index);

/* -ENOMEM: not added. The caller has seen to it that *tag_at(ref) is tag by now. */
int ksm_index_add(struct ksm_index *index, uint32_t tag, uint32_t ref);
/* false: it was not there. *tag_at(ref) still has to be tag. */
bool ksm_index_remove(struct ksm_index *index, uint32_t tag, uint32_t ref);

/* The next reference with this tag, or KSM_REF_NONE. The cursor starts as {0}. */
uint32_t ksm_index_next(const struct ksm_index *index, uint32_t tag,
                        struct ksm_index_cursor *cursor);
/* This tag is to be looked for: fetches its bucket into the cache, and when that was done and it is
 * `soon`, the tags behind the marks that fit. */
void ksm_index_expect(const struct ksm_index *index, uint32_t tag, bool soon);

#endif
