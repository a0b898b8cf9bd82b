/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A member: one guest as its trust domain sees it, for as long as one session of its agent lasts.
 *
 * For each page the domain keeps what the agent said about it: a state and, with it, either the tag
 * of the content that it was offered with or the slot that it shares. The states are the protocol
 * seen from memd's side; PAGE_STATES in member.c says which ring entry may come in which.
 *
 * Invariants, checked by ksm_member_check() in tests:
 *   - HINT, WANTED and FILLED pages stand in the index with their tag, pages of no other state do;
 *   - a slot's users are its SHARED and MERGING pages plus the REMAPs that are out for it.
 */
#ifndef MEMD_KSM_MEMBER_H
#define MEMD_KSM_MEMBER_H

#include "trust_domain.h"

enum ksm_page_state {
    PAGE_UNKNOWN,  /* not offered, or not any more */
    PAGE_HINT,     /* tag; had this content when it was offered; in the index */
    PAGE_SPARE,    /* tag; as HINT, but not in the index: enough others with that tag are */
    PAGE_WANTED,   /* tag; in the index; memd asked for the content */
    PAGE_REWANTED, /* tag; was WANTED and has been offered again with other content since */
    PAGE_WAITING,  /* tag; the same content is about to be published from somewhere else */
    PAGE_FILLED,   /* tag; in the index; its content is in the round */
    PAGE_MERGING,  /* slot; MERGE was sent */
    PAGE_SHARED,   /* slot */
    PAGE_STATE_COUNT
};

/* How a member's agent is reached. None of these calls back into the domain. */
struct ksm_member_ops {
    /* Queues a ring entry. false: there is no room for it; the caller undoes what it stood for. */
    bool (*put)(void *agent, struct ring_entry entry);
    /* Sends SEGMENT before any entry that is put from now on. false: the session is over. */
    bool (*give)(void *agent, uint32_t segment, uint32_t pages, int fd);
    /* Sends DROP. */
    bool (*drop)(void *agent, uint32_t segment, uint32_t pages);
    /* The member has been taken apart; nothing of it will be called again. */
    void (*left)(void *agent);
};

#define KSM_REMAPS_MAX 256U

struct ksm_remap {
    uint32_t page, slot; /* slot: the new one */
};

struct ksm_member {
    struct trust_domain *domain;
    const struct ksm_member_ops *ops;
    void *agent;
    uint32_t id;
    uint32_t announced; /* page numbers below this exist; */
    uint32_t pages;     /* those below this have a place in the hint space */
    uint32_t *chunks;   /* for each 2^15 pages the number of the domain's chunk */
    uint32_t chunk_count;
    uint64_t *held;  /* bitmap: the segments that its agent has */
    uint64_t shared; /* pages in state SHARED */
    uint64_t asked;  /* MERGEs and REMAPs that are not answered */
    bool leaving;
    struct ksm_remap remaps[KSM_REMAPS_MAX];
    uint32_t remap_count;
    /* The last match, to try its neighbour first: runs are what makes sharing cheap. */
    uint32_t last_page, last_slot, last_ref;
    struct loop_task leave_task;
    uint32_t leave_page;
    struct loop_task gone_task; /* lets go of the pages of blocks that have left */
    /* These, in order. What follows each other is one: there are as many as blocks that live, and
     * one more at most, however many have come and gone. */
    struct ksm_page_range *gone;
    uint32_t gone_count;
    uint32_t gone_page; /* where gone_task stands */
    struct ksm_member *next;
};

struct ksm_page_range {
    uint32_t first, end;
};

int ksm_member_join(struct trust_domain *domain, const struct ksm_member_ops *ops, void *agent,
                    struct ksm_member **ret_member);
/* Lets go of everything that the member uses, in bounded turns, then calls ops->left and frees it.
 * From now on nothing is sent to its agent. */
void ksm_member_leave(struct ksm_member *member);

/* Frees the member and touches nothing else: the whole domain goes. */
void ksm_member_discard(struct ksm_member *member);

/*
 * Page numbers up to pages (GUEST_MAX_PAGES at most) exist from now on. -ENOSPC: from some page on
 * they have no place in the domain's hint space, now or later: what is said about them means
 * nothing, as if they had left, and nothing of them is shared.
 *
 * A member gets no more of the space than it leaves to others: to announce costs nothing, and
 * whoever claims too much must not take what the others have.
 */
int ksm_member_grow(struct ksm_member *member, uint32_t pages);
/* Makes room for what is known about a page; before that it is UNKNOWN and nothing can be said
 * about it. RAM that nobody speaks of costs nothing, however much was announced. -ENOMEM. */
int ksm_member_know(struct ksm_member *member, uint32_t page);
/* The first page from `page` on that something may be known about; `end` when there is none before
 * that. */
uint32_t ksm_member_next_known(const struct ksm_member *member, uint32_t page, uint32_t end);
/* The pages first to end have left; what is said about them from now on means nothing. -ENOMEM. */
int ksm_member_pages_gone(struct ksm_member *member, uint32_t first, uint32_t end);
bool ksm_member_page_is_gone(const struct ksm_member *member, uint32_t page);

/* Ends whatever a page stands for, without a word to the agent. An unanswered WANT or MERGE of it
 * is then of no consequence. */
void ksm_member_forget(struct ksm_member *member, uint32_t page);

bool ksm_member_holds(const struct ksm_member *member, uint32_t segment);
void ksm_member_set_holds(struct ksm_member *member, struct ksm_segment *segment);
void ksm_member_clear_holds(struct ksm_member *member, struct ksm_segment *segment);

/* Sees to it that the member's agent has the segment. false: its session is over. */
bool ksm_member_give(struct ksm_member *member, struct ksm_segment *segment);

/* One more, one less user of a slot; tells the domain when that was a segment's last. */
void ksm_member_use(struct ksm_member *member, uint32_t slot);
void ksm_member_release(struct ksm_member *member, uint32_t slot);

/* ---- the page table ---- */

static inline uint32_t ksm_ref_of(const struct ksm_member *member, uint32_t page)
{
    return member->chunks[page >> KSM_CHUNK_SHIFT] << KSM_CHUNK_SHIFT |
           (page & (KSM_CHUNK_PAGES - 1));
}

/* The chunk of a hint reference; its member is NULL when nobody is there any more. */
static inline struct ksm_chunk *ksm_chunk_of(const struct trust_domain *domain, uint32_t ref)
{
    return &domain->chunks[ref >> KSM_CHUNK_SHIFT];
}

/* Pages of a chunk without a table have never been spoken of: they are UNKNOWN. */
static inline enum ksm_page_state ksm_ref_state(const struct trust_domain *domain, uint32_t ref)
{
    const struct ksm_chunk *chunk = ksm_chunk_of(domain, ref);
    uint32_t at = ref & (KSM_CHUNK_PAGES - 1);

    if (!chunk->states)
        return PAGE_UNKNOWN;
    return (enum ksm_page_state)(chunk->states[at / 2] >> (at % 2 * 4) & 15);
}

static inline const uint32_t *ksm_ref_value_at(const struct trust_domain *domain, uint32_t ref)
{
    static const uint32_t nothing = 0;
    const struct ksm_chunk *chunk = ksm_chunk_of(domain, ref);

    return chunk->values ? &chunk->values[ref & (KSM_CHUNK_PAGES - 1)] : &nothing;
}

static inline uint32_t ksm_ref_value(const struct trust_domain *domain, uint32_t ref)
{
    return *ksm_ref_value_at(domain, ref);
}

/* The chunk has its table: ksm_member_know() said so. */
static inline void ksm_ref_set(struct trust_domain *domain, uint32_t ref, enum ksm_page_state state,
                               uint32_t value)
{
    struct ksm_chunk *chunk = ksm_chunk_of(domain, ref);
    uint32_t at = ref & (KSM_CHUNK_PAGES - 1);

    chunk->values[at] = value;
    chunk->states[at / 2] = (uint8_t)((chunk->states[at / 2] & (15 << ((at + 1) % 2 * 4))) |
                                      (unsigned)state << (at % 2 * 4));
}

static inline uint32_t ksm_ref_page(const struct trust_domain *domain, uint32_t ref)
{
    return ksm_chunk_of(domain, ref)->first_page + (ref & (KSM_CHUNK_PAGES - 1));
}

/* Walks everything (tests only): 0 when the invariants above hold, else words for people. */
const char *ksm_member_check(const struct trust_domain *domain);

#endif
