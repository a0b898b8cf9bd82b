/* SPDX-License-Identifier: Apache-2.0 */
#include "round.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "match.h"
#include "member.h"
#include "neutral.h"

#define NOTHING      UINT32_MAX
#define BUCKETS      (1U << 15)
#define TICK_NS      50000000ULL
#define QUIET_NS     200000000ULL  /* nothing new for so long: the round is as full as it gets */
#define SMALL_NS     1000000000ULL /* how long a small round waits for company */
#define SMALL_PAGES  64U
#define ANSWER_NS    5000000000ULL /* an agent that owes content for so long is not waited for */
#define WRITE_STEP   256U          /* pages */
#define RESOLVE_STEP 128U          /* items */

static bool step_sealing(struct loop_task *task);
static void tick(struct loop_timer *timer);

static void *reserve(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

static void release(void *memory, size_t bytes)
{
    if (memory)
        munmap(memory, bytes);
}

static void empty(struct ksm_round *round)
{
    round->item_top = round->waiter_top = 0;
    round->free_item = round->free_waiter = NOTHING;
    round->free_items = KSM_ITEMS_MAX;
    round->free_waiters = KSM_WAITERS_MAX;
}

int ksm_round_start(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;

    *round = (struct ksm_round){
        .items = reserve(KSM_ITEMS_MAX * sizeof(*round->items)),
        .waiters = reserve(KSM_WAITERS_MAX * sizeof(*round->waiters)),
        .buckets = reserve(BUCKETS * sizeof(*round->buckets)),
        .staging = reserve(KSM_ITEMS_MAX * PAGE_BYTES),
        .order = reserve(SEGMENT_MAX_PAGES * sizeof(*round->order)),
        .capacity = KSM_ROUND_SMALLEST,
        .timer = {.expired = tick, .owner = domain},
        .seal_task = {.step = step_sealing, .owner = domain},
    };
    empty(round);
    if (!round->items || !round->waiters || !round->buckets || !round->staging || !round->order) {
        ksm_round_stop(domain);
        return -ENOMEM;
    }
    return 0;
}

void ksm_round_stop(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;

    loop_timer_cancel(domain->loop, &round->timer);
    loop_task_cancel(domain->loop, &round->seal_task);
    release(round->items, KSM_ITEMS_MAX * sizeof(*round->items));
    release(round->waiters, KSM_WAITERS_MAX * sizeof(*round->waiters));
    release(round->buckets, BUCKETS * sizeof(*round->buckets));
    release(round->staging, KSM_ITEMS_MAX * PAGE_BYTES);
    release(round->order, SEGMENT_MAX_PAGES * sizeof(*round->order));
    *round = (struct ksm_round){.items = NULL};
}

bool ksm_round_has_room(const struct trust_domain *domain)
{
    return domain->round.free_items > KSM_ITEMS_MAX / 2 &&
           domain->round.free_waiters > KSM_WAITERS_MAX / 2;
}

/* ---- items and waiters ---- */

/* Buckets hold numbers + 1, so that fresh memory means empty. */
static uint32_t *bucket_of(struct ksm_round *round, uint32_t source)
{
    return &round->buckets[(source * 0x9e3779b1U) >> 17];
}

static uint32_t find_item(struct ksm_round *round, uint32_t source)
{
    uint32_t number = *bucket_of(round, source);

    while (number && round->items[number - 1].source != source)
        number = round->items[number - 1].next;
    return number ? number - 1 : NOTHING;
}

static void link_item(struct ksm_round *round, uint32_t number)
{
    uint32_t *bucket = bucket_of(round, round->items[number].source);

    round->items[number].next = *bucket;
    *bucket = number + 1;
}

static void unlink_item(struct ksm_round *round, uint32_t number)
{
    uint32_t *place = bucket_of(round, round->items[number].source);

    while (*place != number + 1)
        place = &round->items[*place - 1].next;
    *place = round->items[number].next;
}

static uint32_t take_item(struct ksm_round *round)
{
    uint32_t number = round->free_item;

    if (number != NOTHING)
        round->free_item = round->items[number].next;
    else if (round->item_top < KSM_ITEMS_MAX)
        number = round->item_top++;
    if (number != NOTHING)
        round->free_items--;
    return number;
}

/* Unlinked already, without waiters. */
static void free_item(struct ksm_round *round, uint32_t number)
{
    round->items[number] = (struct ksm_item){.next = round->free_item, .state = ITEM_FREE};
    round->free_item = number;
    round->free_items++;
}

static bool add_waiter(struct ksm_round *round, struct ksm_item *item, uint32_t ref)
{
    uint32_t number = round->free_waiter;

    if (number != NOTHING)
        round->free_waiter = round->waiters[number].next;
    else if (round->waiter_top < KSM_WAITERS_MAX)
        number = round->waiter_top++;
    else
        return false;
    round->free_waiters--;
    round->waiters[number] = (struct ksm_waiter){ref, item->first_waiter};
    item->first_waiter = number;
    return true;
}

/* Takes the next waiter that still waits for this content off the item; KSM_REF_NONE: none. */
static uint32_t next_waiter(struct trust_domain *domain, struct ksm_item *item)
{
    struct ksm_round *round = &domain->round;

    while (item->first_waiter != NOTHING) {
        uint32_t number = item->first_waiter, ref = round->waiters[number].ref;
        const struct ksm_member *member = ksm_chunk_of(domain, ref)->member;

        item->first_waiter = round->waiters[number].next;
        round->waiters[number].next = round->free_waiter;
        round->free_waiter = number;
        round->free_waiters++;
        if (member && !member->leaving && ksm_ref_state(domain, ref) == PAGE_WAITING &&
            ksm_ref_value(domain, ref) == item->tag) {
            ksm_ref_set(domain, ref, PAGE_UNKNOWN, 0);
            return ref;
        }
    }
    return KSM_REF_NONE;
}

/* ---- asking ---- */

static void run_timer(struct trust_domain *domain)
{
    if (!domain->round.timer.due_ns)
        loop_timer_set(domain->loop, &domain->round.timer, TICK_NS);
}

static uint64_t order_of(const struct trust_domain *domain, uint32_t ref)
{
    return (uint64_t)ksm_chunk_of(domain, ref)->member->id << 32 | ksm_ref_page(domain, ref);
}

/* Sends WANT to the source of an item, which is a HINT. */
static bool want(struct trust_domain *domain, uint32_t number)
{
    struct ksm_item *item = &domain->round.items[number];
    struct ksm_member *member = ksm_chunk_of(domain, item->source)->member;
    struct ring_entry entry = {RING_WANT, ksm_ref_page(domain, item->source), item->hash};

    if (member->leaving || !member->ops->put(member->agent, entry))
        return false;
    ksm_ref_set(domain, item->source, PAGE_WANTED, item->tag);
    item->order = order_of(domain, item->source);
    item->asked_ns = loop_now(domain->loop);
    item->state = ITEM_ASKED;
    link_item(&domain->round, number);
    domain->round.asked++;
    domain->counters.wants++;
    run_timer(domain);
    return true;
}

/* Once for each time that it gets full; a segment that goes makes room (trust_domain.c). */
static void say_full(struct trust_domain *domain)
{
    if (!domain->store.budget->full)
        domain->ops->event(domain->owner, domain, "store_full", 0, 0);
    domain->store.budget->full = true;
}

bool ksm_round_ask(struct trust_domain *domain, uint32_t source, uint32_t ref, uint32_t tag,
                   uint64_t hash)
{
    struct ksm_round *round = &domain->round;
    struct ksm_budget *budget = domain->store.budget;
    uint32_t number;

    if (budget->used_pages >= budget->limit_pages) {
        budget->refused_pages++;
        say_full(domain);
        return false;
    }
    number = take_item(round);
    if (number == NOTHING)
        return false;
    round->items[number] =
        (struct ksm_item){.hash = hash, .source = source, .tag = tag, .first_waiter = NOTHING};
    if (!add_waiter(round, &round->items[number], ref))
        goto undo_item;
    if (!want(domain, number))
        goto undo_waiter;
    ksm_ref_set(domain, ref, PAGE_WAITING, tag);
    return true;
undo_waiter:
    (void)next_waiter(domain,
                      &round->items[number]); /* not WAITING yet: only its record is freed */
undo_item:
    free_item(round, number);
    return false;
}

bool ksm_round_wait(struct trust_domain *domain, uint32_t source, uint32_t ref, uint32_t tag)
{
    struct ksm_round *round = &domain->round;
    uint32_t number = find_item(round, source);

    if (number == NOTHING || round->items[number].tag != tag ||
        !add_waiter(round, &round->items[number], ref))
        return false;
    ksm_ref_set(domain, ref, PAGE_WAITING, tag);
    return true;
}

/* The item has lost its source: the first waiter becomes it, if there is somebody to share with. */
static void promote(struct trust_domain *domain, uint32_t number)
{
    struct ksm_round *round = &domain->round;
    struct ksm_item *item = &round->items[number];
    uint32_t tag = item->tag, source = next_waiter(domain, item), second;

    if (source == KSM_REF_NONE) {
        free_item(round, number);
        return;
    }
    ksm_match_keep(domain, source, tag);
    second = next_waiter(domain, item);
    if (second != KSM_REF_NONE && ksm_ref_state(domain, source) == PAGE_HINT) {
        item->source = source;
        if (add_waiter(round, item, second) && want(domain, number)) {
            ksm_ref_set(domain, second, PAGE_WAITING, tag);
            return;
        }
    }
    for (; second != KSM_REF_NONE; second = next_waiter(domain, item))
        ksm_match_keep(domain, second, tag);
    free_item(round, number);
}

void ksm_round_abandon(struct trust_domain *domain, uint32_t source)
{
    struct ksm_round *round = &domain->round;
    uint32_t number = find_item(round, source);

    if (number == NOTHING || round->items[number].state != ITEM_ASKED)
        return;
    unlink_item(round, number);
    round->asked--;
    promote(domain, number);
}

/* ---- filling ---- */

static void consider(struct trust_domain *domain);

static bool content_is_good(const struct trust_domain *domain, uint64_t hash, uint32_t tag)
{
    return hash_tag(hash) == tag && (!domain->neutral || ksm_neutral_has(domain->neutral, hash));
}

void ksm_round_fill(struct trust_domain *domain, uint32_t source, const void *content)
{
    struct ksm_round *round = &domain->round;
    uint32_t number = find_item(round, source), tag = ksm_ref_value(domain, source);
    void *copy;

    if (number == NOTHING || round->items[number].state != ITEM_ASKED)
        return;
    copy = round->staging + (size_t)number * PAGE_BYTES;
    memcpy(copy, content, PAGE_BYTES);
    if (!content_is_good(domain, hash_page(&domain->secret, copy), tag)) {
        struct ksm_member *member = ksm_chunk_of(domain, source)->member;

        domain->counters.stale++;
        ksm_member_forget(member, ksm_ref_page(domain, source));
        return;
    }
    ksm_ref_set(domain, source, PAGE_FILLED, tag);
    round->items[number].state = ITEM_FILLED;
    round->asked--;
    round->last_filled_ns = loop_now(domain->loop);
    if (round->filled++ == 0)
        round->first_filled_ns = round->last_filled_ns;
    consider(domain);
}

void ksm_round_hurry(struct trust_domain *domain)
{
    domain->round.hurry |= domain->round.filled || domain->round.asked;
    consider(domain);
}

/* ---- sealing: what goes in ---- */

static int by_order(const void *left, const void *right, void *items)
{
    uint64_t a = ((struct ksm_item *)items)[*(const uint32_t *)left].order;
    uint64_t b = ((struct ksm_item *)items)[*(const uint32_t *)right].order;

    return (a > b) - (a < b);
}

static bool source_is_there(const struct trust_domain *domain, const struct ksm_item *item)
{
    const struct ksm_member *member = ksm_chunk_of(domain, item->source)->member;

    return member && !member->leaving && ksm_ref_state(domain, item->source) == PAGE_FILLED &&
           ksm_ref_value(domain, item->source) == item->tag;
}

/* At most two are counted. */
static uint32_t takers(const struct trust_domain *domain, const struct ksm_item *item)
{
    const struct ksm_round *round = &domain->round;
    uint32_t count = source_is_there(domain, item);

    for (uint32_t number = item->first_waiter; number != NOTHING && count < 2;
         number = round->waiters[number].next) {
        uint32_t ref = round->waiters[number].ref;
        const struct ksm_member *member = ksm_chunk_of(domain, ref)->member;

        count += member && !member->leaving && ksm_ref_state(domain, ref) == PAGE_WAITING &&
                 ksm_ref_value(domain, ref) == item->tag;
    }
    return count;
}

/* The item will not be published; who wanted it is remembered. */
static void dissolve(struct trust_domain *domain, uint32_t number)
{
    struct ksm_round *round = &domain->round;
    struct ksm_item *item = &round->items[number];
    uint32_t ref;

    unlink_item(round, number);
    if (source_is_there(domain, item))
        ksm_ref_set(domain, item->source, PAGE_HINT, item->tag);
    while ((ref = next_waiter(domain, item)) != KSM_REF_NONE)
        ksm_match_keep(domain, ref, item->tag);
    free_item(round, number);
}

static void collect(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;

    round->count = 0;
    for (uint32_t i = 0; i < round->item_top && round->count < round->capacity; i++) {
        if (round->items[i].state != ITEM_FILLED)
            continue;
        round->filled--;
        if (takers(domain, &round->items[i]) < 2) {
            dissolve(domain, i);
            continue;
        }
        round->items[i].state = ITEM_SEALING;
        round->order[round->count++] = i;
    }
    qsort_r(round->order, round->count, sizeof(*round->order), by_order, round->items);
}

static void dissolve_rest(struct trust_domain *domain, uint32_t first)
{
    for (uint32_t i = first; i < domain->round.count; i++)
        dissolve(domain, domain->round.order[i]);
    domain->round.count = first;
}

static void fit_budget(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;
    struct ksm_budget *budget = domain->store.budget;
    uint64_t room =
        budget->limit_pages > budget->used_pages ? budget->limit_pages - budget->used_pages : 0;

    if (round->count <= room)
        return;
    budget->refused_pages += round->count - room;
    say_full(domain);
    dissolve_rest(domain, (uint32_t)room);
}

static void begin(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;

    round->hurry = false;
    round->written = round->resolved = 0;
    collect(domain);
    fit_budget(domain);
    if (round->count == round->capacity && round->capacity < SEGMENT_MAX_PAGES)
        round->capacity *= 2;
    if (round->count == 0)
        return;
    if (ksm_store_create(&domain->store, round->count, &round->segment)) {
        dissolve_rest(domain, 0);
        return;
    }
    round->segment->pinned = true;
    for (uint32_t i = 0; i < round->count; i++)
        round->segment->tags[i] = round->items[round->order[i]].tag;
    loop_task_add(domain->loop, &round->seal_task);
}

static void consider(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;
    uint64_t now = loop_now(domain->loop);
    bool quiet = now - round->last_filled_ns >= (round->hurry ? TICK_NS : QUIET_NS);
    bool grown = round->filled >= SMALL_PAGES || now - round->first_filled_ns >= SMALL_NS;

    if (round->segment || !round->filled)
        return;
    if (round->filled >= round->capacity || (quiet && grown))
        begin(domain);
}

/* ---- sealing: the steps ---- */

static int write_step(struct ksm_round *round)
{
    const void *pages[WRITE_STEP];
    uint32_t count = round->count - round->written;
    int result;

    if (count > WRITE_STEP)
        count = WRITE_STEP;
    for (uint32_t i = 0; i < count; i++)
        pages[i] = round->staging + (size_t)round->order[round->written + i] * PAGE_BYTES;
    result = ksm_store_write(round->segment, round->written, pages, count);
    if (!result)
        round->written += count;
    return result;
}

static int seal(struct trust_domain *domain)
{
    struct ksm_segment *segment = domain->round.segment;
    struct ksm_record_segment recorded = {segment->id, segment->pages, 0, 0};
    int result = ksm_store_seal(&domain->store, segment);

    if (result)
        return result;
    recorded.device = segment->device;
    recorded.inode = segment->inode;
    result = ksm_record_add(&domain->record, &recorded);
    if (result)
        return result;
    domain->ops->park(domain->owner, domain, segment->id, segment->fd);
    return 0;
}

/* A page that another search has left behind with the same content. */
static uint32_t take_hint(struct trust_domain *domain, uint32_t tag)
{
    struct ksm_index_cursor cursor = {0};
    uint32_t ref;

    while ((ref = ksm_index_next(&domain->index, tag, &cursor)) != KSM_REF_NONE) {
        if (!KSM_REF_IS_SLOT(ref) && ksm_ref_state(domain, ref) == PAGE_HINT &&
            !ksm_chunk_of(domain, ref)->member->leaving) {
            ksm_member_forget(ksm_chunk_of(domain, ref)->member, ksm_ref_page(domain, ref));
            return ref;
        }
    }
    return KSM_REF_NONE;
}

static void resolve(struct trust_domain *domain, uint32_t page)
{
    struct ksm_round *round = &domain->round;
    uint32_t number = round->order[page], slot = SLOT(round->segment->id, page), ref;
    struct ksm_item *item = &round->items[number];
    uint32_t tag = item->tag;

    /* Without memory for it the slot is not found again, but who waits for it gets it. */
    (void)ksm_index_add(&domain->index, tag, KSM_REF_OF_SLOT(slot));
    round->segment->indexed = page + 1;
    unlink_item(round, number);
    if (source_is_there(domain, item)) {
        ksm_member_forget(ksm_chunk_of(domain, item->source)->member,
                          ksm_ref_page(domain, item->source));
        ksm_match_merge(domain, item->source, slot, tag);
    }
    while ((ref = next_waiter(domain, item)) != KSM_REF_NONE)
        ksm_match_merge(domain, ref, slot, tag);
    ref = take_hint(domain, tag);
    if (ref != KSM_REF_NONE)
        ksm_match_merge(domain, ref, slot, tag);
    free_item(round, number);
}

/* Gives back the memory of contents that have been written out. */
static void trim(struct ksm_round *round)
{
    uint32_t first = 0;

    if (round->free_items == KSM_ITEMS_MAX) {
        madvise(round->items, KSM_ITEMS_MAX * sizeof(*round->items), MADV_DONTNEED);
        madvise(round->waiters, KSM_WAITERS_MAX * sizeof(*round->waiters), MADV_DONTNEED);
        madvise(round->buckets, BUCKETS * sizeof(*round->buckets), MADV_DONTNEED);
        madvise(round->staging, KSM_ITEMS_MAX * PAGE_BYTES, MADV_DONTNEED);
        empty(round);
        return;
    }
    for (uint32_t i = 0; i <= round->item_top; i++) {
        if (i < round->item_top && round->items[i].state == ITEM_FREE)
            continue;
        if (i > first)
            madvise(round->staging + (size_t)first * PAGE_BYTES, (size_t)(i - first) * PAGE_BYTES,
                    MADV_DONTNEED);
        first = i + 1;
    }
}

static void end(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;
    struct ksm_segment *segment = round->segment;

    segment->pinned = false;
    round->segment = NULL;
    round->count = 0;
    domain->ops->event(domain->owner, domain, "segment_published", segment->id, segment->pages);
    if (!segment->users)
        trust_domain_retire_soon(domain);
    trim(round);
    round->first_filled_ns = round->last_filled_ns;
    consider(domain);
}

static void fail(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;

    ksm_record_remove(&domain->record, round->segment->id);
    ksm_store_close(&domain->store, round->segment);
    round->segment = NULL;
    dissolve_rest(domain, 0);
}

static bool step_sealing(struct loop_task *task)
{
    struct trust_domain *domain = task->owner;
    struct ksm_round *round = &domain->round;

    if (round->written < round->count) {
        if (write_step(round) == 0)
            return true;
        fail(domain);
        return false;
    }
    if (round->segment->state == SEGMENT_WRITING) {
        if (seal(domain) == 0)
            return true;
        fail(domain);
        return false;
    }
    for (uint32_t i = 0; i < RESOLVE_STEP && round->resolved < round->count; i++)
        resolve(domain, round->resolved++);
    if (round->resolved < round->count)
        return true;
    end(domain);
    return false;
}

/* ---- time ---- */

/* Sources that owe an answer for too long are given up; the answer may still come (REWANTED). */
static void give_up_waiting(struct trust_domain *domain)
{
    struct ksm_round *round = &domain->round;
    uint64_t now = loop_now(domain->loop);

    for (uint32_t i = 0; i < round->item_top; i++) {
        struct ksm_item *item = &round->items[i];
        uint32_t source = item->source;

        if (item->state != ITEM_ASKED || now - item->asked_ns < ANSWER_NS)
            continue;
        domain->counters.timeouts++;
        if (ksm_index_remove(&domain->index, item->tag, source))
            domain->hints--;
        ksm_ref_set(domain, source, PAGE_REWANTED, item->tag);
        ksm_round_abandon(domain, source);
    }
}

static void tick(struct loop_timer *timer)
{
    struct trust_domain *domain = timer->owner;
    struct ksm_round *round = &domain->round;

    if (round->asked)
        give_up_waiting(domain);
    consider(domain);
    if (round->asked || round->filled)
        loop_timer_set(domain->loop, timer, TICK_NS);
    else if (!round->segment)
        trim(round);
}
