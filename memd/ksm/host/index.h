/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of a trust domain: from the tag of a page's content (hash.h) to where that content is.
 *
 * Theory of operation. An entry is nothing but a 32-bit *reference*: the top bit says whether the
 * other 31 are a slot of the store or a page of the domain's hint space. Its tag is not in the
 * table: it stands in the page table of the guest, or in the segment, and tag_at() says where. That
 * makes an entry 4 bytes, and 5 to 6.3 with the room that open addressing needs.
 *
 * The table is cut into shards by upper bits. A shard grows by a quarter when it is four
 * fifths full and shrinks when it is less than a third full, so the longest turn is one shard's
 * rehash: for a domain of 64 GiB some 4,000 entries. Within a shard the place is the tag scaled to
 * the shard's size, then the next free one; deletion shifts back, so there are no tombstones.
 *
 * Agents choose the tags that they send, so shard and place come from the tag mixed with a key that
 * nobody outside knows: a stranger can't fill one place on purpose. How many entries one and the
 * same tag may have is for the caller to bound.
 *
 * Invariant: while a reference is in the index, *tag_at(reference) is the tag it was added with.
 * Several references may have the same tag. Not promised: which of them comes first.
 */
#ifndef MEMD_KSM_INDEX_H
#define MEMD_KSM_INDEX_H

#include "units.h"

#define KSM_INDEX_SHARD_BITS 12
#define KSM_INDEX_SHARDS     (1U << KSM_INDEX_SHARD_BITS)

#define KSM_REF_NONE       UINT32_MAX
#define KSM_REF_IS_SLOT(r) ((r) >> 31)
#define KSM_REF_OF_SLOT(s) ((uint32_t)(s) | 1U << 31)
#define KSM_REF_SLOT(r)    ((r) & ~(1U << 31))

struct ksm_index_shard {
    uint32_t *entries;
    uint32_t size, used;
};

struct ksm_index {
    struct ksm_index_shard *shards;
    const uint32_t *(*tag_at)(const void *owner, uint32_t ref); /* where its tag stands */
    const void *owner;
    uint32_t key[2];
    uint64_t used; /* entries */
    uint64_t size; /* entries that there is room for */
};

/* Where a search stands. Adding or removing anything ends its meaning. */
struct ksm_index_cursor {
    uint32_t place, seen;
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
/* This tag is to be looked for: fetches its entries into the cache, and when that was done and it
 * is `soon`, the tags of those. */
void ksm_index_expect(const struct ksm_index *index, uint32_t tag, bool soon);

#endif
