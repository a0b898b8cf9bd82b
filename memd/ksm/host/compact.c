/* SPDX-License-Identifier: Apache-2.0 */
#include "compact.h"

#include <errno.h>
#include <stdlib.h>

#include "log.h"
#include "member.h"

#define FROM_MAX      64U
#define SPARSE_PART   4U  /* sparse: less than a quarter of the slots is used */
#define SPARSE_ROUNDS 4U  /* and that many rounds have been published since */
#define SMALL_COUNT   16U /* so many segments below the smallest full size are too many */
#define PAUSE_NS      60000000000ULL /* between two compactions of a domain */
#define WAIT_NS       2000000ULL     /* for answers, when as many REMAPs are out as may be */
#define UNINDEX_STEP  1024U
#define COPY_STEP     16U
#define SWEEP_STEP    4096U

enum phase { PHASE_UNINDEX, PHASE_COPY, PHASE_SEAL, PHASE_INDEX, PHASE_SWEEP };

struct ksm_compact {
    struct trust_domain *domain;
    struct loop_task task;
    struct loop_timer wait;
    enum phase phase;
    uint32_t from[FROM_MAX]; /* ids: a segment may go meanwhile */
    uint32_t from_count;
    struct ksm_segment *to;
    uint32_t *source; /* for each page of `to` the old slot */
    uint32_t at;      /* page of `to`, or number of `from` */
    uint32_t member, page;
    uint64_t ended_ns;
};

/* ---- choosing ---- */

static bool is_small(const struct ksm_segment *segment)
{
    return segment->pages < KSM_ROUND_SMALLEST;
}

static bool is_sparse(const struct trust_domain *domain, const struct ksm_segment *segment)
{
    return !is_small(segment) && segment->used < segment->pages / SPARSE_PART &&
           domain->store.published - segment->age >= SPARSE_ROUNDS;
}

static bool may_move(const struct ksm_segment *segment)
{
    return segment->used && (segment->state == SEGMENT_LIVE || segment->state == SEGMENT_SPARSE) &&
           segment->indexed == (segment->state == SEGMENT_LIVE ? segment->pages : 0);
}

static uint32_t count_small(const struct trust_domain *domain)
{
    uint32_t count = 0;

    for (const struct ksm_segment *segment = domain->store.first; segment; segment = segment->next)
        count += may_move(segment) && is_small(segment);
    return count;
}

/* Pages that the new segment will have; ids into compact->from. */
static uint32_t choose(struct ksm_compact *compact)
{
    const struct trust_domain *domain = compact->domain;
    bool small_too = count_small(domain) >= SMALL_COUNT;
    uint32_t pages = 0;

    for (const struct ksm_segment *segment = domain->store.first;
         segment && compact->from_count < FROM_MAX; segment = segment->next) {
        bool wanted = segment->state == SEGMENT_SPARSE || is_sparse(domain, segment) ||
                      (small_too && is_small(segment));

        if (!wanted || !may_move(segment) || segment == domain->round.segment ||
            pages + segment->used > SEGMENT_MAX_PAGES)
            continue;
        compact->from[compact->from_count++] = segment->id;
        pages += segment->used;
    }
    return pages;
}

/* ---- start and end ---- */

/* Which old slot goes to which page; from now on nobody new gets into the old segments. */
static int plan(struct ksm_compact *compact)
{
    const struct ksm_store *store = &compact->domain->store;
    uint32_t next = 0;

    for (uint32_t i = 0; i < compact->from_count; i++) {
        struct ksm_segment *segment = ksm_store_segment(store, compact->from[i]);

        free(segment->moved);
        segment->moved = malloc(segment->pages * sizeof(*segment->moved));
        if (!segment->moved)
            return -ENOMEM;
        segment->state = SEGMENT_SPARSE;
        segment->pinned = true;
        for (uint32_t page = 0; page < segment->pages; page++) {
            segment->moved[page] = SLOT_NONE;
            if (!segment->users_of[page])
                continue;
            compact->source[next] = SLOT(segment->id, page);
            compact->to->tags[next] = segment->tags[page];
            segment->moved[page] = SLOT(compact->to->id, next++);
        }
    }
    return 0;
}

static bool step(struct loop_task *task);

static void go_on(struct loop_timer *timer)
{
    struct ksm_compact *compact = timer->owner;

    loop_task_add(compact->domain->loop, &compact->task);
}

/* The old segments stay SPARSE: what is left of their users is tried again next time. */
static void end(struct ksm_compact *compact)
{
    struct trust_domain *domain = compact->domain;

    for (uint32_t i = 0; i < compact->from_count; i++) {
        struct ksm_segment *segment = ksm_store_segment(&domain->store, compact->from[i]);

        if (segment) {
            free(segment->moved);
            segment->moved = NULL;
            segment->pinned = false;
        }
    }
    if (compact->to)
        compact->to->pinned = false;
    free(compact->source);
    compact->source = NULL;
    compact->to = NULL;
    compact->from_count = 0;
    compact->ended_ns = loop_now(domain->loop);
    trust_domain_retire_soon(domain);
}

static int start(struct ksm_compact *compact, uint32_t pages)
{
    struct trust_domain *domain = compact->domain;
    int result = ksm_store_create(&domain->store, pages, &compact->to);

    if (result)
        return result;
    compact->to->pinned = true;
    compact->source = malloc(pages * sizeof(*compact->source));
    result = compact->source ? plan(compact) : -ENOMEM;
    if (result) {
        ksm_store_close(&domain->store, compact->to);
        compact->to = NULL;
        end(compact);
        return result;
    }
    compact->phase = PHASE_UNINDEX;
    compact->at = compact->member = compact->page = 0;
    loop_task_add(domain->loop, &compact->task);
    return 0;
}

void ksm_compact_consider(struct trust_domain *domain)
{
    struct ksm_compact *compact = domain->compact;
    const struct ksm_budget *budget = domain->store.budget;
    uint32_t pages;

    if (!compact) {
        compact = domain->compact = calloc(1, sizeof(*compact));
        if (!compact)
            return;
        compact->domain = domain;
        compact->task = (struct loop_task){.step = step, .owner = compact};
        compact->wait = (struct loop_timer){.expired = go_on, .owner = compact};
    }
    if (compact->to || domain->settled_ns ||
        (compact->ended_ns && loop_now(domain->loop) - compact->ended_ns < PAUSE_NS))
        return;
    compact->from_count = 0;
    pages = choose(compact);
    if (!pages || budget->used_pages + pages > budget->limit_pages || start(compact, pages))
        compact->from_count = 0;
}

void ksm_compact_stop(struct trust_domain *domain)
{
    struct ksm_compact *compact = domain->compact;

    if (!compact)
        return;
    loop_task_cancel(domain->loop, &compact->task);
    loop_timer_cancel(domain->loop, &compact->wait);
    free(compact->source);
    free(compact);
    domain->compact = NULL;
}

/* ---- the steps; each returns true when it is to be called again in the next turn ---- */

static bool step_unindex(struct ksm_compact *compact)
{
    struct trust_domain *domain = compact->domain;
    struct ksm_segment *segment;
    uint32_t left = UNINDEX_STEP;

    if (compact->at == compact->from_count) {
        compact->phase = PHASE_COPY;
        compact->at = 0;
        return true;
    }
    segment = ksm_store_segment(&domain->store, compact->from[compact->at]);
    while (segment && segment->state == SEGMENT_SPARSE && segment->indexed && left--) {
        uint32_t page = --segment->indexed;
        ksm_index_remove(&domain->index, segment->tags[page],
                         KSM_REF_OF_SLOT(SLOT(segment->id, page)));
    }
    if (!segment || segment->state != SEGMENT_SPARSE || !segment->indexed)
        compact->at++;
    return true;
}

/* Nothing is published: the old segments, out of the index by now, serve those who have them. */
static bool give_up(struct ksm_compact *compact, const char *what)
{
    struct trust_domain *domain = compact->domain;

    log_warning("domain '%s': compaction can't %s, sparse segments stay as they are", domain->name,
                what);
    ksm_record_remove(&domain->record, compact->to->id);
    ksm_store_close(&domain->store, compact->to);
    compact->to = NULL;
    end(compact);
    return false;
}

static bool step_copy(struct ksm_compact *compact)
{
    uint8_t buffer[COPY_STEP][PAGE_BYTES];
    const void *pages[COPY_STEP];
    uint32_t count = compact->to->pages - compact->at;

    if (count > COPY_STEP)
        count = COPY_STEP;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t slot = compact->source[compact->at + i];
        const struct ksm_segment *segment =
            ksm_store_segment(&compact->domain->store, SLOT_SEGMENT(slot));

        if (ksm_store_read(segment, SLOT_PAGE(slot), 1, buffer[i]))
            return give_up(compact, "read a segment");
        pages[i] = buffer[i];
    }
    if (ksm_store_write(compact->to, compact->at, pages, count))
        return give_up(compact, "write a segment");
    compact->at += count;
    if (compact->at == compact->to->pages)
        compact->phase = PHASE_SEAL;
    return true;
}

static bool step_seal(struct ksm_compact *compact)
{
    struct trust_domain *domain = compact->domain;
    struct ksm_segment *to = compact->to;
    struct ksm_record_segment recorded = {to->id, to->pages, 0, 0};

    if (ksm_store_seal(&domain->store, to))
        return give_up(compact, "seal a segment");
    /* Until the sweep is over nothing may take it for a segment that nobody needs. */
    to->state = SEGMENT_WRITING;
    recorded.device = to->device;
    recorded.inode = to->inode;
    if (ksm_record_add(&domain->record, &recorded))
        return give_up(compact, "record a segment");
    domain->ops->park(domain->owner, domain, to->id, to->fd);
    compact->phase = PHASE_INDEX;
    return true;
}

static bool step_index(struct ksm_compact *compact)
{
    struct trust_domain *domain = compact->domain;
    struct ksm_segment *to = compact->to;

    for (uint32_t i = 0; i < UNINDEX_STEP && to->indexed < to->pages; i++) {
        (void)ksm_index_add(&domain->index, to->tags[to->indexed],
                            KSM_REF_OF_SLOT(SLOT(to->id, to->indexed)));
        to->indexed++;
    }
    if (to->indexed < to->pages)
        return true;
    to->state = SEGMENT_LIVE;
    domain->missed = true; /* who was offered meanwhile found no slot */
    domain->ops->event(domain->owner, domain, "segment_published", to->id, to->pages);
    compact->phase = PHASE_SWEEP;
    return true;
}

static bool has_remap(const struct ksm_member *member, uint32_t page)
{
    for (uint32_t i = 0; i < member->remap_count; i++) {
        if (member->remaps[i].page == page)
            return true;
    }
    return false;
}

/* false: not now, the page has to be tried again later. */
static bool move(struct ksm_compact *compact, struct ksm_member *member, uint32_t page)
{
    struct trust_domain *domain = compact->domain;
    uint32_t ref = ksm_ref_of(member, page), slot = ksm_ref_value(domain, ref), fresh;
    const struct ksm_segment *segment;

    if (ksm_ref_state(domain, ref) != PAGE_SHARED)
        return true;
    segment = ksm_store_segment(&domain->store, SLOT_SEGMENT(slot));
    fresh = segment->moved ? segment->moved[SLOT_PAGE(slot)] : SLOT_NONE;
    if (fresh == SLOT_NONE || has_remap(member, page) ||
        !ksm_store_usable(&domain->store, fresh, segment->tags[SLOT_PAGE(slot)]))
        return true;
    if (member->remap_count == KSM_REMAPS_MAX || !ksm_member_give(member, compact->to) ||
        !member->ops->put(member->agent, (struct ring_entry){RING_REMAP, page, fresh}))
        return false;
    member->remaps[member->remap_count++] = (struct ksm_remap){page, fresh};
    member->asked++;
    ksm_member_use(member, fresh);
    domain->counters.remaps++;
    return true;
}

static struct ksm_member *member_from(const struct trust_domain *domain, uint32_t id)
{
    struct ksm_member *best = NULL;

    for (struct ksm_member *member = domain->members; member; member = member->next) {
        if (member->id >= id && !member->leaving && (!best || member->id < best->id))
            best = member;
    }
    return best;
}

static bool step_sweep(struct ksm_compact *compact)
{
    struct ksm_member *member = member_from(compact->domain, compact->member);

    if (!member) {
        end(compact);
        return false;
    }
    if (member->id != compact->member)
        compact->page = 0;
    compact->member = member->id;
    compact->page = ksm_member_next_known(member, compact->page, member->pages);
    for (uint32_t i = 0; i < SWEEP_STEP && compact->page < member->pages; i++) {
        if (!move(compact, member, compact->page)) {
            loop_timer_set(compact->domain->loop, &compact->wait, WAIT_NS);
            return false;
        }
        compact->page++;
    }
    if (compact->page >= member->pages) {
        compact->member = member->id + 1;
        compact->page = 0;
    }
    return true;
}

static bool step(struct loop_task *task)
{
    static bool (*const steps[])(struct ksm_compact *) = {
        [PHASE_UNINDEX] = step_unindex, [PHASE_COPY] = step_copy,   [PHASE_SEAL] = step_seal,
        [PHASE_INDEX] = step_index,     [PHASE_SWEEP] = step_sweep,
    };
    struct ksm_compact *compact = task->owner;

    return steps[compact->phase](compact);
}
