/* SPDX-License-Identifier: Apache-2.0 */
#include "member.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LEAVE_STEP_PAGES 8192U
#define HELD_BYTES       (SEGMENTS_MAX / 8)
#define CHUNK_BYTES      (KSM_CHUNK_PAGES * sizeof(uint32_t) + KSM_CHUNK_PAGES / 2)

static bool step_leaving(struct loop_task *task);
static bool step_gone(struct loop_task *task);

/* ---- joining ---- */

int ksm_member_join(struct trust_domain *domain, const struct ksm_member_ops *ops, void *agent,
                    struct ksm_member **ret_member)
{
    struct ksm_member *member = calloc(1, sizeof(*member));

    if (!member)
        return -ENOMEM;
    member->held = mmap(NULL, HELD_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (member->held == MAP_FAILED) {
        free(member);
        return -ENOMEM;
    }
    member->domain = domain;
    member->ops = ops;
    member->agent = agent;
    member->id = domain->next_member_id++;
    member->last_page = PAGE_NONE - 1;
    member->last_slot = SLOT_NONE;
    member->last_ref = KSM_REF_NONE;
    member->leave_task = (struct loop_task){.step = step_leaving, .owner = member};
    member->gone_task = (struct loop_task){.step = step_gone, .owner = member};
    member->next = domain->members;
    domain->members = member;
    domain->member_count++;
    *ret_member = member;
    return 0;
}

/* ---- the page table ---- */

static int take_chunk(struct trust_domain *domain, struct ksm_member *member, uint32_t *ret_chunk)
{
    uint32_t number = domain->free_chunk;

    if (number == UINT32_MAX && domain->chunk_count == KSM_CHUNKS)
        return -ENOSPC;
    if (number == UINT32_MAX)
        number = domain->chunk_count++;
    else
        domain->free_chunk = domain->chunks[number].next_free;
    domain->chunks[number] =
        (struct ksm_chunk){.member = member, .first_page = member->chunk_count << KSM_CHUNK_SHIFT};
    domain->taken_chunks++;
    *ret_chunk = number;
    return 0;
}

static void free_chunk(struct trust_domain *domain, uint32_t number)
{
    struct ksm_chunk *chunk = &domain->chunks[number];

    if (chunk->values)
        munmap(chunk->values, CHUNK_BYTES);
    *chunk = (struct ksm_chunk){.next_free = domain->free_chunk};
    domain->free_chunk = number;
    domain->taken_chunks--;
}

int ksm_member_know(struct ksm_member *member, uint32_t page)
{
    struct ksm_chunk *chunk = ksm_chunk_of(member->domain, ksm_ref_of(member, page));
    void *table;

    if (chunk->values)
        return 0;
    table = mmap(NULL, CHUNK_BYTES, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (table == MAP_FAILED)
        return -ENOMEM;
    chunk->values = table;
    chunk->states = (uint8_t *)table + KSM_CHUNK_PAGES * sizeof(uint32_t);
    return 0;
}

uint32_t ksm_member_next_known(const struct ksm_member *member, uint32_t page, uint32_t end)
{
    while (page < end && !ksm_chunk_of(member->domain, ksm_ref_of(member, page))->values)
        page = (page | (KSM_CHUNK_PAGES - 1)) + 1;
    return page < end ? page : end;
}

static int grow_chunks(struct ksm_member *member, uint32_t count)
{
    uint32_t *chunks;

    if (count <= member->chunk_count)
        return 0;
    chunks = realloc(member->chunks, count * sizeof(*chunks));
    if (!chunks)
        return -ENOSPC;
    member->chunks = chunks;
    while (member->chunk_count < count) {
        uint32_t taken = member->domain->taken_chunks;
        int result = member->chunk_count < KSM_CHUNKS - taken
                         ? take_chunk(member->domain, member, &chunks[member->chunk_count])
                         : -ENOSPC;

        if (result)
            return result;
        member->chunk_count++;
    }
    return 0;
}

int ksm_member_grow(struct ksm_member *member, uint32_t pages)
{
    bool had_room = member->pages == member->announced;
    uint64_t room;
    int result;

    if (pages <= member->announced)
        return 0;
    member->announced = pages;
    if (!had_room)
        return -ENOSPC;
    result = grow_chunks(member, (pages + KSM_CHUNK_PAGES - 1) >> KSM_CHUNK_SHIFT);
    room = (uint64_t)member->chunk_count << KSM_CHUNK_SHIFT;
    member->pages = room < pages ? (uint32_t)room : pages;
    return result;
}

/* ---- segments and slots ---- */

bool ksm_member_holds(const struct ksm_member *member, uint32_t segment)
{
    return segment < SEGMENTS_MAX && member->held[segment / 64] >> segment % 64 & 1;
}

void ksm_member_set_holds(struct ksm_member *member, struct ksm_segment *segment)
{
    if (ksm_member_holds(member, segment->id))
        return;
    member->held[segment->id / 64] |= 1ULL << segment->id % 64;
    segment->holders++;
}

void ksm_member_clear_holds(struct ksm_member *member, struct ksm_segment *segment)
{
    if (!ksm_member_holds(member, segment->id))
        return;
    member->held[segment->id / 64] &= ~(1ULL << segment->id % 64);
    segment->holders--;
}

bool ksm_member_give(struct ksm_member *member, struct ksm_segment *segment)
{
    if (ksm_member_holds(member, segment->id))
        return true;
    if (!member->ops->give(member->agent, segment->id, segment->pages, segment->fd))
        return false;
    ksm_member_set_holds(member, segment);
    return true;
}

/* A slot that can't have one more user is of no use to a search, and there may be many of them. */
void ksm_member_use(struct ksm_member *member, uint32_t slot)
{
    struct trust_domain *domain = member->domain;
    const struct ksm_segment *segment = ksm_store_segment(&domain->store, SLOT_SEGMENT(slot));

    ksm_store_use(&domain->store, slot);
    if (segment->users_of[SLOT_PAGE(slot)] == KSM_SLOT_USERS_MAX)
        ksm_index_remove(&domain->index, segment->tags[SLOT_PAGE(slot)], KSM_REF_OF_SLOT(slot));
}

void ksm_member_release(struct ksm_member *member, uint32_t slot)
{
    struct trust_domain *domain = member->domain;
    const struct ksm_segment *segment = ksm_store_segment(&domain->store, SLOT_SEGMENT(slot));

    if (ksm_store_release(&domain->store, slot))
        trust_domain_retire_soon(domain);
    /* Without memory for it the slot is found no more, and goes with its segment. */
    if (segment->users_of[SLOT_PAGE(slot)] == KSM_SLOT_USERS_MAX - 1 &&
        segment->state == SEGMENT_LIVE && SLOT_PAGE(slot) < segment->indexed)
        (void)ksm_index_add(&domain->index, segment->tags[SLOT_PAGE(slot)], KSM_REF_OF_SLOT(slot));
}

/* ---- forgetting ---- */

static void forget_remaps(struct ksm_member *member, uint32_t page)
{
    for (uint32_t i = member->remap_count; i-- > 0;) {
        uint32_t slot = member->remaps[i].slot;

        if (member->remaps[i].page != page)
            continue;
        member->remaps[i] = member->remaps[--member->remap_count];
        member->asked--;
        ksm_member_release(member, slot);
    }
}

static void remove_hint(struct trust_domain *domain, uint32_t ref, uint32_t tag)
{
    if (ksm_index_remove(&domain->index, tag, ref))
        domain->hints--;
}

void ksm_member_forget(struct ksm_member *member, uint32_t page)
{
    struct trust_domain *domain = member->domain;
    uint32_t ref = ksm_ref_of(member, page), value = ksm_ref_value(domain, ref);
    enum ksm_page_state state = ksm_ref_state(domain, ref);

    if (state == PAGE_UNKNOWN)
        return;
    if (state == PAGE_HINT || state == PAGE_WANTED || state == PAGE_FILLED)
        remove_hint(domain, ref, value);
    ksm_ref_set(domain, ref, PAGE_UNKNOWN, 0);
    if (state == PAGE_WANTED) {
        ksm_round_abandon(domain, ref);
    } else if (state == PAGE_MERGING) {
        member->asked--;
        ksm_member_release(member, value);
    } else if (state == PAGE_SHARED) {
        member->shared--;
        ksm_member_release(member, value);
    }
}

/* Like forget, but nothing will be answered about the page any more. */
static void let_go(struct ksm_member *member, uint32_t page)
{
    ksm_member_forget(member, page);
    if (member->remap_count)
        forget_remaps(member, page);
}

/* The number of the first range that ends behind this page. */
static uint32_t find_gone(const struct ksm_member *member, uint32_t page)
{
    uint32_t low = 0, high = member->gone_count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (member->gone[middle].end > page)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Into its place, and one with its neighbours where they touch. */
static int add_gone(struct ksm_member *member, uint32_t first, uint32_t end)
{
    uint32_t at = find_gone(member, first);
    struct ksm_page_range *gone = member->gone;
    bool before = at > 0 && gone[at - 1].end == first;
    bool behind = at < member->gone_count && gone[at].first == end;

    if (before && behind) {
        gone[at - 1].end = gone[at].end;
        member->gone_count--;
        memmove(&gone[at], &gone[at + 1], (member->gone_count - at) * sizeof(*gone));
    } else if (before) {
        gone[at - 1].end = end;
    } else if (behind) {
        gone[at].first = first;
    } else {
        gone = realloc(gone, (member->gone_count + 1) * sizeof(*gone));
        if (!gone)
            return -ENOMEM;
        member->gone = gone;
        memmove(&gone[at + 1], &gone[at], (member->gone_count - at) * sizeof(*gone));
        gone[at] = (struct ksm_page_range){first, end};
        member->gone_count++;
    }
    return 0;
}

int ksm_member_pages_gone(struct ksm_member *member, uint32_t first, uint32_t end)
{
    int result = add_gone(member, first, end);

    if (result || member->leaving)
        return result;
    if (!member->gone_task.queued || first < member->gone_page)
        member->gone_page = first;
    loop_task_add(member->domain->loop, &member->gone_task);
    return 0;
}

bool ksm_member_page_is_gone(const struct ksm_member *member, uint32_t page)
{
    uint32_t at = find_gone(member, page);

    return page >= member->pages || (at < member->gone_count && member->gone[at].first <= page);
}

/* From gone_page on; a page that was let go before costs a look. */
static bool step_gone(struct loop_task *task)
{
    struct ksm_member *member = task->owner;
    uint32_t left = LEAVE_STEP_PAGES;

    for (uint32_t i = find_gone(member, member->gone_page); i < member->gone_count; i++) {
        const struct ksm_page_range *gone = &member->gone[i];
        uint32_t end = gone->end < member->pages ? gone->end : member->pages;

        if (member->gone_page < gone->first)
            member->gone_page = gone->first;
        while ((member->gone_page = ksm_member_next_known(member, member->gone_page, end)) < end) {
            if (!left--)
                return true;
            let_go(member, member->gone_page++);
        }
    }
    return false;
}

/* ---- leaving ---- */

void ksm_member_leave(struct ksm_member *member)
{
    if (member->leaving)
        return;
    member->leaving = true;
    loop_task_cancel(member->domain->loop, &member->gone_task);
    loop_task_add(member->domain->loop, &member->leave_task);
}

static void unlink_member(struct ksm_member *member)
{
    struct trust_domain *domain = member->domain;
    struct ksm_member **place = &domain->members;

    while (*place != member)
        place = &(*place)->next;
    *place = member->next;
    domain->member_count--;
}

void ksm_member_discard(struct ksm_member *member)
{
    struct trust_domain *domain = member->domain;

    loop_task_cancel(domain->loop, &member->leave_task);
    loop_task_cancel(domain->loop, &member->gone_task);
    for (uint32_t i = 0; i < member->chunk_count; i++)
        free_chunk(domain, member->chunks[i]);
    unlink_member(member);
    munmap(member->held, HELD_BYTES);
    free(member->chunks);
    free(member->gone);
    free(member);
}

static void drop_descriptors(struct ksm_member *member)
{
    struct trust_domain *domain = member->domain;

    for (uint32_t word = 0; word < SEGMENTS_MAX / 64; word++) {
        while (member->held[word]) {
            uint32_t id = word * 64 + (uint32_t)__builtin_ctzll(member->held[word]);
            struct ksm_segment *segment = ksm_store_segment(&domain->store, id);

            ksm_member_clear_holds(member, segment);
            trust_domain_dropped(domain, segment);
        }
    }
}

/* The end: the member frees itself and tells its agent's side. */
static void finish_leaving(struct ksm_member *member)
{
    struct trust_domain *domain = member->domain;
    const struct ksm_member_ops *ops = member->ops;
    void *agent = member->agent;

    while (member->remap_count)
        forget_remaps(member, member->remaps[0].page);
    drop_descriptors(member);
    ksm_member_discard(member);
    trust_domain_retire_soon(domain);
    ops->left(agent);
}

static bool step_leaving(struct loop_task *task)
{
    struct ksm_member *member = task->owner;

    member->leave_page = ksm_member_next_known(member, member->leave_page, member->pages);
    for (uint32_t i = 0; i < LEAVE_STEP_PAGES && member->leave_page < member->pages; i++)
        ksm_member_forget(member, member->leave_page++);
    if (member->leave_page < member->pages)
        return true;
    finish_leaving(member);
    return false;
}

/* ---- the invariants ---- */

static bool is_indexed(const struct trust_domain *domain, uint32_t ref, uint32_t tag)
{
    struct ksm_index_cursor cursor = {0};
    uint32_t other;

    while ((other = ksm_index_next(&domain->index, tag, &cursor)) != KSM_REF_NONE) {
        if (other == ref)
            return true;
    }
    return false;
}

struct census {
    uint32_t *users; /* of each slot id, sparse */
    uint64_t hints, users_total;
};

static const char *check_page(const struct trust_domain *domain, uint32_t ref,
                              struct census *census)
{
    enum ksm_page_state state = ksm_ref_state(domain, ref);
    uint32_t value = ksm_ref_value(domain, ref);
    bool in_index = state == PAGE_HINT || state == PAGE_WANTED || state == PAGE_FILLED;

    if (state >= PAGE_STATE_COUNT)
        return "a page is in no state";
    if (in_index) {
        census->hints++;
        if (!is_indexed(domain, ref, value))
            return "a hint is not in the index";
    }
    if (state == PAGE_MERGING || state == PAGE_SHARED) {
        if (!ksm_store_has(&domain->store, value))
            return "a page uses a slot that is not there";
        census->users[value]++;
        census->users_total++;
    }
    return NULL;
}

static const char *check_member(const struct ksm_member *member, struct census *census)
{
    for (uint32_t page = 0; page < member->pages; page++) {
        const char *wrong = check_page(member->domain, ksm_ref_of(member, page), census);

        if (wrong)
            return wrong;
    }
    for (uint32_t i = 0; i < member->remap_count; i++) {
        census->users[member->remaps[i].slot]++;
        census->users_total++;
    }
    return NULL;
}

static const char *check_segments(const struct trust_domain *domain, const struct census *census)
{
    uint64_t users = 0, used = 0;

    for (const struct ksm_segment *segment = domain->store.first; segment;
         segment = segment->next) {
        uint64_t here = 0;

        for (uint32_t page = 0; page < segment->pages; page++) {
            if (segment->users_of[page] != census->users[SLOT(segment->id, page)])
                return "a slot's users are not the pages that use it";
            here += segment->users_of[page];
            used += segment->users_of[page] != 0;
        }
        if (here != segment->users)
            return "a segment's users do not sum";
        users += here;
    }
    if (users != domain->store.users || users != census->users_total || used != domain->store.used)
        return "the store's users do not sum";
    return NULL;
}

const char *ksm_member_check(const struct trust_domain *domain)
{
    size_t bytes = sizeof(uint32_t) << 31;
    struct census census = {.hints = 0};
    const char *wrong = NULL;
    void *users = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (users == MAP_FAILED)
        return "no address space for the check";
    census.users = users;
    for (const struct ksm_member *member = domain->members; member && !wrong; member = member->next)
        wrong = check_member(member, &census);
    if (!wrong)
        wrong = check_segments(domain, &census);
    if (!wrong && census.hints != domain->hints)
        wrong = "the count of hints is not the hints there are";
    munmap(users, bytes);
    return wrong;
}
