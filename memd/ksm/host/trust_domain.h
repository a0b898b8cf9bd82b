/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Trust domains: the guests that may share pages with each other, and nobody else.
 *
 * They fail closed. A guest that no configuration puts into a domain gets a domain of its own, with
 * its own secret, index and store, and shares within itself. A configured domain admits an agent
 * only by the uid that the kernel states for its connection, never by what it says.
 *
 * Each domain has a *session*: a random number that names one life of its store. Secret, session
 * and the list of sealed segments are kept on disk (record.h), so that a restarted memd knows which
 * descriptors it may take back. Inside a domain an agent can read every segment that it was given:
 * a VMM that was taken over can read what the others share (SECURITY.md).
 *
 * A domain is also the whole of the matching machine, here in one struct: index (where is this
 * content), store (what is shared), round (what is about to be), members (who).
 */
#ifndef MEMD_KSM_TRUST_DOMAIN_H
#define MEMD_KSM_TRUST_DOMAIN_H

#include "index.h"
#include "loop.h"
#include "protocol.h"
#include "record.h"
#include "round.h"
#include "store.h"

#define TRUST_DOMAIN_NAME_BYTES 112

struct ksm_member;
struct ksm_compact;
struct ksm_neutral;
struct trust_domain;

/* What a domain has to tell the daemon. */
struct trust_domain_ops {
    /* "segment_published", "segment_retired", "store_full": once, when it has happened. */
    void (*event)(void *owner, const struct trust_domain *domain, const char *event,
                  uint32_t segment, uint32_t pages);
    /* A segment was sealed (fd), or is gone (fd -1): for the service manager's descriptor store. */
    void (*park)(void *owner, const struct trust_domain *domain, uint32_t segment, int fd);
    /* The last member has left and the store is empty. */
    void (*idle)(void *owner, struct trust_domain *domain);
};

/* 2^15 pages of the hint space: the unit in which members take it. */
#define KSM_CHUNK_SHIFT 15
#define KSM_CHUNK_PAGES (1U << KSM_CHUNK_SHIFT)
#define KSM_CHUNKS      (1U << (31 - KSM_CHUNK_SHIFT))

/* The page table of one chunk of one member: a value for each page (its tag, or its slot) and four
 * bits of state. A chunk without a member is free. */
struct ksm_chunk {
    struct ksm_member *member;
    uint32_t first_page;
    uint32_t next_free;
    uint32_t *values;
    uint8_t *states;
};

struct ksm_counters {
    uint64_t offers, ignored_offers, not_neutral;
    uint64_t wants, stale, timeouts;
    uint64_t merges_asked, merged, not_merged, broken;
    uint64_t missed; /* matches that found no room in the round */
    uint64_t remaps;
};

struct trust_domain {
    char name[TRUST_DOMAIN_NAME_BYTES]; /* the configured name, or "~" and what names one guest for
                                           good */
    bool own;                           /* of one guest alone */
    uint64_t session;
    struct hash_secret secret;
    struct loop *loop;
    const struct trust_domain_ops *ops;
    void *owner;

    struct ksm_index index;
    struct ksm_store store;
    struct ksm_round round;
    struct ksm_record record;
    struct ksm_neutral *neutral; /* NULL: any content may be shared */
    struct ksm_chunk *chunks;
    uint32_t chunk_count, free_chunk, taken_chunks;
    struct ksm_member *members;
    uint32_t member_count, next_member_id;

    struct loop_task retire_task, rehash_task, sweep_task;
    struct ksm_compact *compact;       /* NULL: none is going on */
    struct loop_timer chores;          /* looks now and then for a sweep or a compaction to do */
    uint32_t sweep_member, sweep_page; /* where the sweep stands */
    uint64_t swept_ns;                 /* when the last one ended */
    uint64_t settled_ns; /* until then segments without users wait for agents that come back */
    bool missed;         /* a match found no room since the last sweep */
    uint64_t hints;      /* pages in the index */
    struct ksm_counters counters;
    struct trust_domain *next;
};

/* Where and how a domain is made. */
struct trust_domain_setup {
    struct loop *loop;
    struct ksm_budget *budget;
    const struct trust_domain_ops *ops;
    void *owner;
    int record_dir;     /* the directory for records; -1: nothing is kept */
    uint64_t settle_ns; /* how long after the start recorded segments wait for their agents */
};

/* A domain with this name; takes back session and secret when there is a record of this boot. */
int trust_domain_start(const char *name, bool own, const struct trust_domain_setup *setup,
                       struct trust_domain **ret_domain);
/* Frees everything, members too (without a word to anybody). forget: removes the record as well. */
void trust_domain_stop(struct trust_domain *domain, bool forget);

/* Takes back a recorded segment that somebody hands over; owns fd when it returns 0. -EEXIST: it
 * has it already and fd is the same file (the caller closes fd). -EPERM: fd is not what the record
 * says, or there is no such record. */
int trust_domain_take_back(struct trust_domain *domain, uint32_t segment, uint32_t pages, int fd);

/* A segment has no user any more, or something that kept it alive has ended. */
void trust_domain_retire_soon(struct trust_domain *domain);
/* An agent that came back has the segment's descriptor. Where the segment is on its way out, this
 * agent shall drop it too: it was not there when the others were told. */
void trust_domain_held(struct ksm_member *member, struct ksm_segment *segment);
/* An agent has dropped its descriptor (or died): holders has been lowered. */
void trust_domain_dropped(struct trust_domain *domain, struct ksm_segment *segment);

/* Bytes of memory that the domain's tables take (store contents aside), about. */
uint64_t trust_domain_table_bytes(const struct trust_domain *domain);

#endif
