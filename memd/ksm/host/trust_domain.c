/* SPDX-License-Identifier: Apache-2.0 */
#include "trust_domain.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "compact.h"
#include "log.h"
#include "match.h"
#include "member.h"
#include "neutral.h"

#define NS_PER_S       1000000000ULL
#define UNINDEX_STEP   1024U /* slots */
#define REHASH_STEP    64U   /* slots */
#define SWEEP_STEP     4096U /* pages */
#define SWEEP_PAUSE_NS (5 * NS_PER_S)
/* Between two looks for something to compact. */
#define IDLE_LOOK_NS (8 * NS_PER_S)

static bool step_retiring(struct loop_task *task);
static bool step_rehashing(struct loop_task *task);
static bool step_sweep(struct loop_task *task);
static void look_after(struct loop_timer *timer);

/* Where the tag under which a reference is in the index stands. */
static const uint32_t *tag_at(const void *owner, uint32_t ref)
{
    const struct trust_domain *domain = owner;

    return KSM_REF_IS_SLOT(ref) ? ksm_store_tag_at(&domain->store, KSM_REF_SLOT(ref))
                                : ksm_ref_value_at(domain, ref);
}

/* ---- start and stop ---- */

static void prepare(struct trust_domain *domain, const struct trust_domain_setup *setup)
{
    domain->loop = setup->loop;
    domain->ops = setup->ops;
    domain->owner = setup->owner;
    domain->free_chunk = UINT32_MAX;
    domain->settled_ns = loop_now(setup->loop) + setup->settle_ns;
    domain->retire_task = (struct loop_task){.step = step_retiring, .owner = domain};
    domain->rehash_task = (struct loop_task){.step = step_rehashing, .owner = domain};
    domain->sweep_task = (struct loop_task){.step = step_sweep, .owner = domain};
    domain->chores = (struct loop_timer){.expired = look_after, .owner = domain};
}

static int start_parts(struct trust_domain *domain, const struct trust_domain_setup *setup)
{
    bool found;
    int result = ksm_record_start(&domain->record, setup->record_dir, domain->name,
                                  &domain->session, &domain->secret, &found);

    if (result)
        return result;
    if (!found)
        domain->settled_ns = 0;
    result = ksm_index_start(&domain->index, tag_at, domain);
    if (result)
        goto undo_record;
    result = ksm_store_start(&domain->store, setup->budget);
    if (result)
        goto undo_index;
    /* Ids that agents may still have something of are not given out again. */
    for (size_t i = 0; i < domain->record.segment_count; i++) {
        if (domain->record.segments[i].segment >= domain->store.next_id)
            domain->store.next_id = (domain->record.segments[i].segment + 1) % KSM_SEGMENT_IDS;
    }
    result = ksm_round_start(domain);
    if (result)
        goto undo_store;
    return 0;
undo_store:
    ksm_store_stop(&domain->store);
undo_index:
    ksm_index_stop(&domain->index);
undo_record:
    ksm_record_stop(&domain->record, false);
    return result;
}

int trust_domain_start(const char *name, bool own, const struct trust_domain_setup *setup,
                       struct trust_domain **ret_domain)
{
    struct trust_domain *domain = calloc(1, sizeof(*domain));
    int result;

    if (!domain)
        return -ENOMEM;
    snprintf(domain->name, sizeof(domain->name), "%s%s", own ? "~" : "", name);
    domain->own = own;
    prepare(domain, setup);
    domain->chunks = mmap(NULL, KSM_CHUNKS * sizeof(*domain->chunks), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (domain->chunks == MAP_FAILED) {
        result = -ENOMEM;
        goto undo_domain;
    }
    result = start_parts(domain, setup);
    if (result)
        goto undo_chunks;
    loop_timer_set(domain->loop, &domain->chores, NS_PER_S);
    *ret_domain = domain;
    return 0;
undo_chunks:
    munmap(domain->chunks, KSM_CHUNKS * sizeof(*domain->chunks));
undo_domain:
    free(domain);
    return result;
}

void trust_domain_stop(struct trust_domain *domain, bool forget)
{
    loop_timer_cancel(domain->loop, &domain->chores);
    loop_task_cancel(domain->loop, &domain->retire_task);
    loop_task_cancel(domain->loop, &domain->rehash_task);
    loop_task_cancel(domain->loop, &domain->sweep_task);
    while (domain->members)
        ksm_member_discard(domain->members);
    ksm_compact_stop(domain);
    ksm_round_stop(domain);
    ksm_store_stop(&domain->store);
    ksm_index_stop(&domain->index);
    ksm_record_stop(&domain->record, forget);
    if (domain->neutral)
        ksm_neutral_stop(domain->neutral);
    munmap(domain->chunks, KSM_CHUNKS * sizeof(*domain->chunks));
    free(domain);
}

static uint64_t known_pages(const struct ksm_member *member)
{
    uint64_t pages = 0;
    uint32_t page = 0;

    while ((page = ksm_member_next_known(member, page, member->pages)) < member->pages) {
        uint32_t next = (page | (KSM_CHUNK_PAGES - 1)) + 1;

        pages += (next < member->pages ? next : member->pages) - page;
        page = next;
    }
    return pages;
}

uint64_t trust_domain_table_bytes(const struct trust_domain *domain)
{
    uint64_t pages = 0;

    for (const struct ksm_member *member = domain->members; member; member = member->next)
        pages += known_pages(member);
    return pages * sizeof(uint32_t) + pages / 2 + domain->index.bytes +
           domain->store.pages * (sizeof(uint32_t) + sizeof(uint32_t));
}

/* ---- taking back ---- */

int trust_domain_take_back(struct trust_domain *domain, uint32_t id, uint32_t pages, int fd)
{
    const struct ksm_record_segment *recorded = ksm_record_find(&domain->record, id);
    struct ksm_segment *segment = ksm_store_segment(&domain->store, id);
    int result;

    if (segment)
        return segment->state != SEGMENT_WRITING && segment->pages == pages &&
                       ksm_store_is(segment, fd)
                   ? -EEXIST
                   : -EPERM;
    if (!recorded || recorded->pages != pages)
        return -EPERM;
    result =
        ksm_store_adopt(&domain->store, id, pages, recorded->device, recorded->inode, fd, &segment);
    if (result)
        return result;
    domain->ops->park(domain->owner, domain, id, fd);
    loop_task_add(domain->loop, &domain->rehash_task);
    return 0;
}

/* Hashes some slots again: what a record or an agent says about contents is not believed. */
static int rehash(struct trust_domain *domain, struct ksm_segment *segment)
{
    uint8_t buffer[16 * PAGE_BYTES];
    uint32_t count = segment->pages - segment->indexed;
    int result;

    if (count > 16)
        count = 16;
    result = ksm_store_read(segment, segment->indexed, count, buffer);
    for (uint32_t i = 0; i < count && !result; i++) {
        uint32_t page = segment->indexed++;
        uint64_t hash = hash_page(&domain->secret, buffer + i * PAGE_BYTES);

        segment->tags[page] = hash_tag(hash);
        if (segment->users_of[page] < KSM_SLOT_USERS_MAX)
            result = ksm_index_add(&domain->index, segment->tags[page],
                                   KSM_REF_OF_SLOT(SLOT(segment->id, page)));
    }
    return result;
}

static bool step_rehashing(struct loop_task *task)
{
    struct trust_domain *domain = task->owner;
    struct ksm_segment *segment = domain->store.first;

    while (segment && segment->state != SEGMENT_TAKEN_BACK)
        segment = segment->next;
    if (!segment)
        return false;
    for (uint32_t done = 0; done < REHASH_STEP && segment->indexed < segment->pages; done += 16) {
        if (rehash(domain, segment)) {
            /* Who shares it goes on; nobody new will. */
            segment->state = SEGMENT_SPARSE;
            log_warning(
                "domain '%s': segment %u can't be read again, nothing new is shared with it",
                domain->name, segment->id);
            return true;
        }
    }
    if (segment->indexed == segment->pages) {
        segment->state = SEGMENT_LIVE;
        domain->missed = true;
    }
    trust_domain_retire_soon(domain);
    return true;
}

/* ---- retiring ---- */

void trust_domain_retire_soon(struct trust_domain *domain)
{
    loop_task_add(domain->loop, &domain->retire_task);
}

static void close_segment(struct trust_domain *domain, struct ksm_segment *segment)
{
    uint32_t id = segment->id, pages = segment->pages;

    ksm_record_remove(&domain->record, id);
    domain->ops->park(domain->owner, domain, id, -1);
    ksm_store_close(&domain->store, segment);
    domain->store.retired++;
    if (domain->store.budget->full) {
        domain->store.budget->full = false;
        domain->missed = true; /* what found no room may try again */
    }
    domain->ops->event(domain->owner, domain, "segment_retired", id, pages);
}

void trust_domain_held(struct ksm_member *member, struct ksm_segment *segment)
{
    if (ksm_member_holds(member, segment->id))
        return;
    ksm_member_set_holds(member, segment);
    if (segment->state == SEGMENT_DROPPING)
        member->ops->drop(member->agent, segment->id, segment->pages);
}

void trust_domain_dropped(struct trust_domain *domain, struct ksm_segment *segment)
{
    if (segment->holders == 0)
        trust_domain_retire_soon(domain);
}

/* Its slots leave the index, from the last one on; then every agent that has it shall drop it. */
static void retire(struct trust_domain *domain, struct ksm_segment *segment)
{
    uint32_t left = UNINDEX_STEP;

    segment->state = SEGMENT_RETIRING;
    while (segment->indexed && left--) {
        uint32_t page = --segment->indexed;
        ksm_index_remove(&domain->index, segment->tags[page],
                         KSM_REF_OF_SLOT(SLOT(segment->id, page)));
    }
    if (segment->indexed)
        return;
    segment->state = SEGMENT_DROPPING;
    for (struct ksm_member *member = domain->members; member; member = member->next) {
        if (ksm_member_holds(member, segment->id) && !member->leaving)
            member->ops->drop(member->agent, segment->id, segment->pages);
    }
}

static bool may_retire(const struct trust_domain *domain, const struct ksm_segment *segment)
{
    if (segment->state == SEGMENT_RETIRING)
        return true;
    if (segment->state != SEGMENT_LIVE && segment->state != SEGMENT_SPARSE)
        return false;
    return !segment->users && !segment->pinned && loop_now(domain->loop) >= domain->settled_ns;
}

static bool step_retiring(struct loop_task *task)
{
    struct trust_domain *domain = task->owner;
    struct ksm_segment *segment, *next;

    for (segment = domain->store.first; segment; segment = next) {
        next = segment->next;
        /* Users: pages that their agent did not speak of again before it dropped the segment. They
         * go with it; until then the slots are counted, and must be there. */
        if (segment->state == SEGMENT_DROPPING && !segment->holders && !segment->users) {
            close_segment(domain, segment);
            return true;
        }
        if (may_retire(domain, segment)) {
            retire(domain, segment);
            return true;
        }
    }
    if (!domain->members && !domain->store.first)
        domain->ops->idle(domain->owner, domain); /* may free the domain */
    return false;
}

/* ---- the sweep: matches that found no room are tried again ---- */

static struct ksm_member *member_from(const struct trust_domain *domain, uint32_t id)
{
    struct ksm_member *best = NULL;

    for (struct ksm_member *member = domain->members; member; member = member->next) {
        if (member->id >= id && !member->leaving && (!best || member->id < best->id))
            best = member;
    }
    return best;
}

static void sweep_page(struct trust_domain *domain, struct ksm_member *member, uint32_t page)
{
    uint32_t ref = ksm_ref_of(member, page), tag = ksm_ref_value(domain, ref);

    switch (ksm_ref_state(domain, ref)) {
    case PAGE_SPARE:
        ksm_ref_set(domain, ref, PAGE_UNKNOWN, 0);
        ksm_match_content(member, page, tag, tag);
        break;
    case PAGE_HINT: /* a slot may have come since, by a compaction or from an earlier memd */
        if (ksm_match_finds_slot(domain, tag)) {
            ksm_member_forget(member, page);
            ksm_match_content(member, page, tag, tag);
        }
        break;
    default: break;
    }
}

static bool step_sweep(struct loop_task *task)
{
    struct trust_domain *domain = task->owner;
    struct ksm_member *member = member_from(domain, domain->sweep_member);

    if (!member || !ksm_round_has_room(domain)) {
        if (member) {
            domain->missed = true; /* goes on from here as soon as there is room */
            return false;
        }
        domain->sweep_member = domain->sweep_page = 0;
        domain->swept_ns = loop_now(domain->loop);
        return false;
    }
    if (member->id != domain->sweep_member)
        domain->sweep_page = 0;
    domain->sweep_member = member->id;
    domain->sweep_page = ksm_member_next_known(member, domain->sweep_page, member->pages);
    for (uint32_t i = 0; i < SWEEP_STEP && domain->sweep_page < member->pages; i++)
        sweep_page(domain, member, domain->sweep_page++);
    if (domain->sweep_page >= member->pages) {
        domain->sweep_member = member->id + 1;
        domain->sweep_page = 0;
    }
    return true;
}

/* What can wait: soon while something is known to wait, else now and then. There may be a domain a
 * guest. */
static void look_after(struct loop_timer *timer)
{
    struct trust_domain *domain = timer->owner;
    const struct ksm_budget *budget = domain->store.budget;
    uint64_t now = loop_now(domain->loop);

    loop_timer_set(domain->loop, timer,
                   domain->settled_ns || domain->missed ? NS_PER_S : IDLE_LOOK_NS);
    if (domain->settled_ns && now >= domain->settled_ns) {
        domain->settled_ns = 0;
        trust_domain_retire_soon(domain);
    }
    if (domain->missed && budget->used_pages < budget->limit_pages &&
        now - domain->swept_ns >= SWEEP_PAUSE_NS && ksm_round_has_room(domain)) {
        domain->missed = false;
        loop_task_add(domain->loop, &domain->sweep_task);
    }
    ksm_compact_consider(domain);
}
