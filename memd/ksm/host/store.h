/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The store of a trust domain: the pages that its guests share, in *segments*.
 *
 * A segment is a memfd that is written once, sealed (WRITE, SHRINK, GROW, SEAL: from then on not
 * even root can change it) and only then given out. A *slot* is one of its pages. Nothing is ever
 * punched or reused; a segment goes as a whole when nobody uses any of its slots and every agent
 * that had its descriptor has said that it dropped it.
 *
 *   WRITING -> LIVE -> RETIRING -> DROPPING -> (closed)
 *   TAKEN_BACK -> LIVE      after a restart: its slots are hashed again first
 *   LIVE -> SPARSE          its users are being moved to another segment; nobody new gets in
 *
 * Invariants: users_of[] counts each page that is mapped to a slot or was asked to be (MERGE sent,
 * not answered); users is their sum, used the number of slots with any. The budget counts every
 * page of every segment that is not closed. Ids are not used again before all others were.
 *
 * Not promised: that a page is worth its slot. That is the round's business (round.h).
 */
#ifndef MEMD_KSM_STORE_H
#define MEMD_KSM_STORE_H

#include "protocol.h"

/* More users of one slot than this would make the kernel's walk over the mappings of one page long
 * (ksmd draws the line at 256 by default; ours are runs, cheaper to walk). A further copy of the
 * content is published instead. */
#define KSM_SLOT_USERS_MAX 4096U

/* The last id would make a reference that means "none" (index.h). */
#define KSM_SEGMENT_IDS (SEGMENTS_MAX - 1)

enum ksm_segment_state {
    SEGMENT_WRITING,
    SEGMENT_TAKEN_BACK,
    SEGMENT_LIVE,
    SEGMENT_SPARSE,
    SEGMENT_RETIRING,
    SEGMENT_DROPPING,
    SEGMENT_STATE_COUNT
};

struct ksm_segment {
    uint32_t id, pages;
    int fd;
    enum ksm_segment_state state;
    uint64_t device, inode;
    uint32_t users, used;
    uint32_t holders; /* agents that have its descriptor */
    uint32_t indexed; /* its first slots that are in the index */
    uint64_t age;     /* the store's count of published segments when this one was */
    uint32_t *tags;
    uint32_t *users_of; /* HAVE may bring more than KSM_SLOT_USERS_MAX: it tells what is so */
    bool pinned;        /* at work on it: not retired, whatever its users */
    uint32_t *moved;    /* SPARSE, while users are being moved: the new slot of each page */
    struct ksm_segment *next, *previous; /* all segments of the store */
};

/* What all stores of the host may hold together. */
struct ksm_budget {
    uint64_t limit_pages, used_pages;
    uint64_t refused_pages; /* pages that were not published for want of room, ever */
    bool full;
};

struct ksm_store {
    struct ksm_segment **by_id;
    struct ksm_segment *first;
    uint32_t segment_count, next_id;
    uint64_t pages; /* of all its segments */
    uint64_t used;  /* slots with users */
    uint64_t users;
    uint64_t published, retired; /* segments, ever */
    struct ksm_budget *budget;
};

int ksm_store_start(struct ksm_store *store, struct ksm_budget *budget);
/* Closes every segment, whatever its state. Mappings of agents stay as they are. */
void ksm_store_stop(struct ksm_store *store);

/* NULL when there is none of this id. */
struct ksm_segment *ksm_store_segment(const struct ksm_store *store, uint32_t id);

/* A new segment in state WRITING. -ENOSPC: the budget has no room for it (counted as refused). */
int ksm_store_create(struct ksm_store *store, uint32_t pages, struct ksm_segment **ret_segment);
/* Writes count pages from first on. */
int ksm_store_write(struct ksm_segment *segment, uint32_t first, const void *const *pages,
                    uint32_t count);
/* Seals it; LIVE then. On failure it is as before and good for ksm_store_close. */
int ksm_store_seal(struct ksm_store *store, struct ksm_segment *segment);
/* Takes back a sealed segment of an earlier life: fd must be device, inode, of this process's uid,
 * have the size and all four seals. State TAKEN_BACK; owns fd on success. -EPERM when fd is not the
 * recorded one; -EEXIST when the id is taken. */
int ksm_store_adopt(struct ksm_store *store, uint32_t id, uint32_t pages, uint64_t device,
                    uint64_t inode, int fd, struct ksm_segment **ret_segment);
/* True when fd is this very segment. */
bool ksm_store_is(const struct ksm_segment *segment, int fd);
void ksm_store_close(struct ksm_store *store, struct ksm_segment *segment);

/* Where the tag of a slot stands: never NULL, a 0 when there is no such slot. */
const uint32_t *ksm_store_tag_at(const struct ksm_store *store, uint32_t slot);
/* True when the slot is there, LIVE, has this tag and room for one more user. */
bool ksm_store_usable(const struct ksm_store *store, uint32_t slot, uint32_t tag);
/* True when the slot is in a segment that agents may have. */
bool ksm_store_has(const struct ksm_store *store, uint32_t slot);

/* One user more, one less. The slot is there. release: true when its segment has no user left. */
void ksm_store_use(struct ksm_store *store, uint32_t slot);
bool ksm_store_release(struct ksm_store *store, uint32_t slot);

/* Reads one page of a segment. */
int ksm_store_read(const struct ksm_segment *segment, uint32_t page, uint32_t count, void *buffer);

#endif
