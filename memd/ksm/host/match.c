/* SPDX-License-Identifier: Apache-2.0 */
#include "match.h"

#include <errno.h>

#include "neutral.h"

/* Where content was found. */
struct hit {
    uint32_t slot; /* SLOT_NONE: no slot */
    uint32_t ref;  /* KSM_REF_NONE: no hint either */
    bool hinted;   /* a hint has this tag, usable or not (of a neighbour's: unknown) */
};

/* ---- finding ---- */

/* Does the page behind ref have this content, by its tag? */
static bool try_ref(const struct trust_domain *domain, uint32_t self, uint32_t ref, uint32_t tag,
                    struct hit *ret_hit)
{
    const struct ksm_member *member = ksm_chunk_of(domain, ref)->member;
    enum ksm_page_state state;
    uint32_t value;

    if (!member || member->leaving || ref == self)
        return false;
    state = ksm_ref_state(domain, ref);
    value = ksm_ref_value(domain, ref);
    if (state == PAGE_SHARED && ksm_store_usable(&domain->store, value, tag)) {
        *ret_hit = (struct hit){value, ref, true};
        return true;
    }
    if ((state == PAGE_HINT || state == PAGE_WANTED || state == PAGE_FILLED) && value == tag) {
        *ret_hit = (struct hit){SLOT_NONE, ref, true};
        return true;
    }
    return false;
}

/* The neighbour of what the page before this one matched. */
static bool try_neighbours(const struct ksm_member *member, uint32_t page, uint32_t tag,
                           struct hit *ret_hit)
{
    const struct trust_domain *domain = member->domain;
    uint32_t self = ksm_ref_of(member, page), last = member->last_ref;
    const struct ksm_member *other;

    if (page != member->last_page + 1)
        return false;
    if (member->last_slot != SLOT_NONE &&
        ksm_store_usable(&domain->store, member->last_slot + 1, tag)) {
        *ret_hit = (struct hit){member->last_slot + 1, KSM_REF_NONE, true};
        return true;
    }
    if (last == KSM_REF_NONE)
        return false;
    if ((last + 1) % KSM_CHUNK_PAGES && try_ref(domain, self, last + 1, tag, ret_hit))
        return true;
    other = ksm_chunk_of(domain, last)->member;
    return other && page < other->pages &&
           try_ref(domain, self, ksm_ref_of(other, page), tag, ret_hit);
}

static struct hit look_up(const struct trust_domain *domain, uint32_t self, uint32_t tag)
{
    struct ksm_index_cursor cursor = {0};
    struct hit hit = {SLOT_NONE, KSM_REF_NONE, false};
    uint32_t ref;

    while ((ref = ksm_index_next(&domain->index, tag, &cursor)) != KSM_REF_NONE) {
        if (KSM_REF_IS_SLOT(ref)) {
            if (ksm_store_usable(&domain->store, KSM_REF_SLOT(ref), tag))
                return (struct hit){KSM_REF_SLOT(ref), hit.ref, hit.hinted};
            continue;
        }
        hit.hinted = true;
        (void)try_ref(domain, self, ref, tag, &hit);
    }
    return hit;
}

bool ksm_match_finds_slot(const struct trust_domain *domain, uint32_t tag)
{
    return look_up(domain, KSM_REF_NONE, tag).slot != SLOT_NONE;
}

/* ---- what follows from it ---- */

/* One hint for each tag: a stranger who offers one hash a million times fills no table. */
static void keep(struct trust_domain *domain, uint32_t ref, uint32_t tag, bool hinted)
{
    ksm_ref_set(domain, ref, PAGE_HINT, tag);
    if (!hinted && ksm_index_add(&domain->index, tag, ref) == 0) {
        domain->hints++;
        return;
    }
    ksm_ref_set(domain, ref, PAGE_SPARE, tag);
    domain->missed = true;
    domain->counters.missed++;
}

void ksm_match_keep(struct trust_domain *domain, uint32_t ref, uint32_t tag)
{
    struct ksm_index_cursor cursor = {0};
    uint32_t other;

    do {
        other = ksm_index_next(&domain->index, tag, &cursor);
    } while (other != KSM_REF_NONE && KSM_REF_IS_SLOT(other));
    keep(domain, ref, tag, other != KSM_REF_NONE);
}

void ksm_match_merge(struct trust_domain *domain, uint32_t ref, uint32_t slot, uint32_t tag)
{
    struct ksm_member *member = ksm_chunk_of(domain, ref)->member;
    struct ksm_segment *segment = ksm_store_segment(&domain->store, SLOT_SEGMENT(slot));
    struct ring_entry entry = {RING_MERGE, ksm_ref_page(domain, ref), slot};

    if (!ksm_store_usable(&domain->store, slot, tag) || member->leaving) {
        ksm_match_keep(domain, ref, tag);
        return;
    }
    if (!ksm_member_give(member, segment) || !member->ops->put(member->agent, entry)) {
        ksm_ref_set(domain, ref, PAGE_SPARE, tag);
        domain->missed = true;
        domain->counters.missed++;
        return;
    }
    ksm_member_use(member, slot);
    ksm_ref_set(domain, ref, PAGE_MERGING, slot);
    member->asked++;
    domain->counters.merges_asked++;
}

static bool join_round(struct trust_domain *domain, uint32_t source, uint32_t ref, uint32_t tag,
                       uint64_t hash)
{
    if (ksm_ref_state(domain, source) == PAGE_HINT)
        return ksm_round_ask(domain, source, ref, tag, hash);
    return ksm_round_wait(domain, source, ref, tag);
}

void ksm_match_content(struct ksm_member *member, uint32_t page, uint32_t tag, uint64_t hash)
{
    struct trust_domain *domain = member->domain;
    uint32_t ref = ksm_ref_of(member, page);
    struct hit hit;

    if (!try_neighbours(member, page, tag, &hit))
        hit = look_up(domain, ref, tag);
    member->last_page = page;
    member->last_slot = hit.slot;
    member->last_ref = hit.ref;
    if (hit.slot != SLOT_NONE)
        ksm_match_merge(domain, ref, hit.slot, tag);
    else if (hit.ref == KSM_REF_NONE)
        keep(domain, ref, tag, hit.hinted);
    else if (!join_round(domain, hit.ref, ref, tag, hash))
        ksm_match_keep(domain, ref, tag);
}

/* ---- the entries ---- */

static bool is_known(const struct ksm_member *member, uint32_t page)
{
    return page < member->announced;
}

/* The page is asked for its old content, and has other content now: what was asked is void, the
 * answer will say so, and then the new content is looked at. */
static void offer_again(struct ksm_member *member, uint32_t ref, uint32_t tag)
{
    struct trust_domain *domain = member->domain;

    if (ksm_ref_state(domain, ref) == PAGE_WANTED) {
        if (ksm_ref_value(domain, ref) == tag)
            return;
        if (ksm_index_remove(&domain->index, ksm_ref_value(domain, ref), ref))
            domain->hints--;
        ksm_ref_set(domain, ref, PAGE_REWANTED, tag);
        ksm_round_abandon(domain, ref);
    } else {
        ksm_ref_set(domain, ref, PAGE_REWANTED, tag);
    }
}

void ksm_match_expect(const struct ksm_member *member, uint64_t hash, bool soon)
{
    ksm_index_expect(&member->domain->index, hash_tag(hash), soon);
}

int ksm_match_offer(struct ksm_member *member, uint32_t page, uint64_t hash)
{
    struct trust_domain *domain = member->domain;
    uint32_t tag = hash_tag(hash), ref;
    enum ksm_page_state state;

    if (!is_known(member, page))
        return -EPROTO;
    domain->counters.offers++;
    /* Without memory for it the page is not shared: it is nothing worse than an offer unheard. */
    if (ksm_member_page_is_gone(member, page) || ksm_member_know(member, page))
        return 0;
    ref = ksm_ref_of(member, page);
    state = ksm_ref_state(domain, ref);
    if (state == PAGE_MERGING || state == PAGE_SHARED) {
        domain->counters.ignored_offers++;
        return 0;
    }
    if (state == PAGE_WANTED || state == PAGE_REWANTED) {
        offer_again(member, ref, tag);
        return 0;
    }
    if ((state == PAGE_WAITING || state == PAGE_FILLED) && ksm_ref_value(domain, ref) == tag)
        return 0;
    ksm_member_forget(member, page);
    if (domain->neutral && !ksm_neutral_has(domain->neutral, hash)) {
        domain->counters.not_neutral++;
        return 0;
    }
    ksm_match_content(member, page, tag, hash);
    return 0;
}

/* A WANT was answered. The page is UNKNOWN afterwards, or what it was offered as since. */
static int end_want(struct ksm_member *member, uint32_t page)
{
    struct trust_domain *domain = member->domain;
    uint32_t ref = ksm_ref_of(member, page), tag = ksm_ref_value(domain, ref);

    switch (ksm_ref_state(domain, ref)) {
    case PAGE_WANTED: ksm_member_forget(member, page); return 0;
    case PAGE_REWANTED:
        ksm_ref_set(domain, ref, PAGE_UNKNOWN, 0);
        if (tag)
            ksm_match_content(member, page, tag, tag);
        return 0;
    default: return -EPROTO;
    }
}

int ksm_match_page(struct ksm_member *member, uint32_t page, const void *content)
{
    if (!is_known(member, page))
        return -EPROTO;
    if (ksm_member_page_is_gone(member, page))
        return 0;
    if (ksm_ref_state(member->domain, ksm_ref_of(member, page)) != PAGE_WANTED)
        return end_want(member, page);
    ksm_round_fill(member->domain, ksm_ref_of(member, page), content);
    return 0;
}

int ksm_match_stale(struct ksm_member *member, uint32_t page)
{
    if (!is_known(member, page))
        return -EPROTO;
    member->domain->counters.stale++;
    return ksm_member_page_is_gone(member, page) ? 0 : end_want(member, page);
}

static struct ksm_remap *find_remap(struct ksm_member *member, uint32_t page, uint32_t slot)
{
    for (uint32_t i = 0; i < member->remap_count; i++) {
        if (member->remaps[i].page == page && member->remaps[i].slot == slot)
            return &member->remaps[i];
    }
    return NULL;
}

static void end_remap(struct ksm_member *member, struct ksm_remap *remap)
{
    *remap = member->remaps[--member->remap_count];
    member->asked--;
}

static bool is_merging(const struct ksm_member *member, uint32_t ref, uint32_t slot)
{
    return ksm_ref_state(member->domain, ref) == PAGE_MERGING &&
           ksm_ref_value(member->domain, ref) == slot;
}

/* The share has moved to the new slot; the old one has a user less. */
static int end_remap_well(struct ksm_member *member, struct ksm_remap *remap, uint32_t ref)
{
    struct trust_domain *domain = member->domain;
    uint32_t old = ksm_ref_value(domain, ref), slot = remap->slot;

    if (ksm_ref_state(domain, ref) != PAGE_SHARED)
        return -EPROTO;
    end_remap(member, remap);
    ksm_ref_set(domain, ref, PAGE_SHARED, slot);
    ksm_member_release(member, old);
    return 0;
}

/* A REMAP and a MERGE may be out for one page and slot: the share broke while the REMAP was on its
 * way, and the page was offered again. The REMAP was sent before, so the first answer is its. */
int ksm_match_merged(struct ksm_member *member, uint32_t page, uint32_t slot)
{
    struct trust_domain *domain = member->domain;
    struct ksm_remap *remap;
    uint32_t ref;

    if (!is_known(member, page))
        return -EPROTO;
    if (ksm_member_page_is_gone(member, page))
        return 0;
    ref = ksm_ref_of(member, page);
    remap = find_remap(member, page, slot);
    if (remap)
        return end_remap_well(member, remap, ref);
    if (!is_merging(member, ref, slot))
        return -EPROTO;
    ksm_ref_set(domain, ref, PAGE_SHARED, slot);
    member->shared++;
    member->asked--;
    domain->counters.merged++;
    return 0;
}

int ksm_match_not_merged(struct ksm_member *member, uint32_t page, uint32_t slot,
                         enum not_merged reason)
{
    struct trust_domain *domain = member->domain;
    struct ksm_remap *remap;
    uint32_t ref;

    if (!is_known(member, page) || reason < NOT_MERGED_MISMATCH || reason > NOT_MERGED_REFUSED)
        return -EPROTO;
    if (ksm_member_page_is_gone(member, page))
        return 0;
    ref = ksm_ref_of(member, page);
    domain->counters.not_merged++;
    remap = find_remap(member, page, slot);
    if (remap) {
        end_remap(member, remap);
    } else if (is_merging(member, ref, slot)) {
        ksm_ref_set(domain, ref, PAGE_UNKNOWN, 0);
        member->asked--;
    } else {
        return -EPROTO;
    }
    ksm_member_release(member, slot);
    return 0;
}

int ksm_match_broken(struct ksm_member *member, uint32_t page, uint32_t slot)
{
    struct trust_domain *domain = member->domain;
    uint32_t ref;

    if (!is_known(member, page))
        return -EPROTO;
    if (ksm_member_page_is_gone(member, page))
        return 0;
    ref = ksm_ref_of(member, page);
    if (ksm_ref_state(domain, ref) != PAGE_SHARED || ksm_ref_value(domain, ref) != slot)
        return -EPROTO;
    domain->counters.broken++;
    ksm_member_forget(member, page);
    return 0;
}

int ksm_match_have(struct ksm_member *member, uint32_t page, uint32_t slot)
{
    struct trust_domain *domain = member->domain;
    uint32_t ref;

    if (!is_known(member, page) || slot == SLOT_NONE || !ksm_store_has(&domain->store, slot) ||
        !ksm_member_holds(member, SLOT_SEGMENT(slot)))
        return -EPROTO;
    if (ksm_member_page_is_gone(member, page))
        return 0;
    ref = ksm_ref_of(member, page);
    if (ksm_member_know(member, page) || ksm_ref_state(domain, ref) != PAGE_UNKNOWN)
        return -EPROTO;
    ksm_member_use(member, slot);
    ksm_ref_set(domain, ref, PAGE_SHARED, slot);
    member->shared++;
    return 0;
}

void ksm_match_pass(struct ksm_member *member)
{
    ksm_round_hurry(member->domain);
}
