/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an agent and memd say to each other.
 *
 * Theory of operation
 * -------------------
 * An agent connects to memd's agent socket (AF_UNIX, SOCK_SEQPACKET; its path is that of the
 * control socket with ".agent" behind it) and says HELLO; memd answers WELCOME or REFUSED. From
 * then on there are two ways between them:
 *
 *   - the socket carries *messages*: rare, typed, of one exact size each, some with a descriptor;
 *   - the *ring*, a memfd that memd made and sealed against resizing, carries 16-byte *entries* in
 *     both directions and the contents of pages that are to be published. A DOORBELL message says
 *     that there is something new in it.
 *
 * A message that says something about the ring is sent before the entries that rely on it are
 * written (SEGMENT before MERGE), so a reader that finds an entry about something unknown reads
 * the socket first.
 *
 * The agent OFFERs the pages that have been quiet, with their hashes. memd remembers an offer as a
 * *hint* (this guest had this content there). When a second page has the same hash, memd WANTs the
 * content of the first: the agent copies it into a page buffer of the ring and answers PAGE, or
 * STALE when it has changed. memd takes its own copy, hashes that, collects such pages into a
 * *segment* (a memfd), seals it (F_SEAL_WRITE, SHRINK, GROW, SEAL), gives its descriptor to the
 * agents of that domain that will use it, and answers MERGE to every guest that offered the
 * content. The agent freezes the page, compares every byte, maps the slot, and says MERGED or
 * NOT_MERGED. When a share ends (the guest wrote to it, discarded it, the agent stood down) it
 * says BROKEN.
 *
 * Every WANT, MERGE and REMAP gets exactly one answer. An OFFER of a page that is shared, or that a
 * MERGE is out for, is ignored: after NOT_MERGED the agent offers the page again. RAM_GONE ends all
 * shares of its pages, and what still comes about them is ignored. HELD_END and DROPPED
 * take effect after every entry that was written before them; a HELD that memd does not accept is
 * answered by DETACH with rejoin. The ids of segments go round at 2^17 - 1, once every holder has
 * said DROPPED.
 *
 * Who trusts whom: memd checks every word from an agent (it copies an entry before looking at
 * it); an agent that lies loses its session. An agent trusts memd, which is root, except that it
 * never maps what it has not compared.
 *
 * Agents live as long as their virtual machines. Messages only grow at the end, by a new minor
 * version; memd serves the previous major version too.
 *
 * Byte order and layout are those of the machine: both ends are on it.
 */
#ifndef MEMD_COMMON_PROTOCOL_H
#define MEMD_COMMON_PROTOCOL_H

#include <assert.h>

#include "hash.h"
#include "places.h"
#include "units.h"

#define PROTOCOL_VERSION 1
#define PROTOCOL_MAGIC   0x646d656dU /* "memd" */

/* Feature bits of HELLO and WELCOME; each side uses what both have. */
#define FEATURE_SHARE (1ULL << 0) /* the agent can freeze pages (UFFDIO_MOVE works here) */
#define FEATURE_MOVE  (1ULL << 1) /* the agent takes MESSAGE_MOVER */

#define PROTOCOL_TOKEN_BYTES 32 /* hexadecimal digits, no end mark */
#define PROTOCOL_TEXT_BYTES  200

/* ---- slots: where a shared page is in its domain's store ---- */

/* A segment has at most this many pages (64 MiB). */
#define SEGMENT_MAX_PAGES  (1U << 14)
#define SLOT_SEGMENT(slot) ((slot) >> 14)
#define SLOT_PAGE(slot)    ((slot) & (SEGMENT_MAX_PAGES - 1))
/* segment < 2^17, so that a slot has 31 bits and SLOT_NONE is none. */
#define SLOT(segment, page) ((uint32_t)(segment) << 14 | (uint32_t)(page))
#define SEGMENTS_MAX        (1U << 17)

/* ---- the socket ---- */

enum message_type {
    MESSAGE_HELLO = 1,   /* agent: first message; with FEATURE_SHARE or with a reason without */
    MESSAGE_WELCOME = 2, /* memd: the answer; descriptors: ring, then /dev/userfaultfd or none */
    MESSAGE_REFUSED = 3, /* memd: the answer; the connection ends, the guest runs on alone */
    MESSAGE_RAM = 4,     /* agent: a block of guest RAM was taken in (or left alone, with reason) */
    MESSAGE_RAM_GONE = 5,  /* agent: a block has left; its pages are nobody's any more */
    MESSAGE_SEGMENT = 6,   /* memd: here is a segment; one descriptor */
    MESSAGE_DROP = 7,      /* memd: nobody uses this segment: unmap, close, answer DROPPED */
    MESSAGE_DROPPED = 8,   /* agent: no mapping and no descriptor of the segment is left here */
    MESSAGE_TUNE = 9,      /* memd: how often and how hard to scan */
    MESSAGE_DETACH = 10,   /* memd: make every page private again, then answer DETACHED */
    MESSAGE_DETACHED = 11, /* agent: it is done; no share is left; the connection ends */
    MESSAGE_STATS = 12,    /* agent: its places and counters, after a pass that changed some (and
                              each eighth) and on TUNE_REPORT; rings like DOORBELL */
    MESSAGE_DOORBELL = 13, /* both: look into the ring */
    MESSAGE_HELD = 14,     /* agent, to a restarted memd: a segment that I have; one descriptor */
    MESSAGE_HELD_END = 15, /* agent: that was all of it (segments by HELD, pages by HAVE) */
    MESSAGE_MOVER = 16,    /* memd: the guest is to move, and this is its mover; one descriptor, a
                              SOCK_SEQPACKET socket that speaks postcopy/common/mover_protocol.h. A
                              second one takes the place of the first */
    MESSAGE_URGENT = 17,   /* agent, where both have FEATURE_MOVE: which of its threads answers the
                              faults of a guest that has moved away, and deserves the handler's
                              priority; there is one at a time, or none */
};

/* In front of every message; `bytes` is the size of the whole message. */
struct message_header {
    uint32_t type;
    uint32_t bytes;
};

struct message_hello {
    struct message_header header;
    uint32_t magic;
    uint32_t version;
    uint64_t features;
    char token[PROTOCOL_TOKEN_BYTES]; /* from memctl run; all zero bytes when there is none */
    uint32_t scanner_tid;
    uint32_t handler_tid;
    uint32_t page_bytes;
    uint32_t held;                    /* 1: HELD, HAVE and HELD_END follow (memd was restarted) */
    char vmm[32];                     /* "qemu", "memvm", ...; ends with a zero byte */
    char reason[PROTOCOL_TEXT_BYTES]; /* without FEATURE_SHARE: why; ends with a zero byte */
};

struct message_welcome {
    struct message_header header;
    uint32_t version;
    uint32_t guest_id;
    uint64_t features;
    uint64_t
        session; /* of this memd and this domain: segments of another session are HELD in vain */
    struct hash_secret secret;
    uint32_t ring_bytes;
    uint32_t have_userfaultfd; /* 1: the second descriptor is /dev/userfaultfd */
    uint32_t revisit_ms;
    uint32_t cpu_permille; /* of one core, for this agent's scanner; 0: no limit */
};

/* REFUSED and DETACH: code is an errno value; text is for people and ends with a zero byte. */
struct message_words {
    struct message_header header;
    uint32_t code;
    uint32_t rejoin; /* DETACH: 1 = say HELLO again afterwards (the guest changes its domain) */
    char text[PROTOCOL_TEXT_BYTES];
};

struct message_ram {
    struct message_header header;
    uint32_t first_page; /* the end of the previous block: blocks are laid end to end */
    uint32_t pages;
    uint64_t hva;
    uint32_t managed; /* 0: left alone; it then has no page numbers (first_page 0) */
    uint32_t unused;
    char reason[PROTOCOL_TEXT_BYTES]; /* when left alone: why */
};

struct message_ram_gone {
    struct message_header header;
    uint32_t first_page;
    uint32_t pages;
};

/* SEGMENT, DROP, DROPPED, HELD. */
struct message_segment {
    struct message_header header;
    uint32_t segment;
    uint32_t pages;
};

struct message_urgent {
    struct message_header header;
    uint32_t tid; /* 0: none */
    uint32_t unused;
};

struct message_mover {
    struct message_header header;
    uint32_t role; /* enum mover_role: 1 from here, 2 to here */
    uint32_t unused;
};

struct message_tune {
    struct message_header header;
    uint32_t revisit_ms;
    uint32_t cpu_permille;
    uint32_t flags;
    uint32_t unused;
};
#define TUNE_PAUSE  1U /* stop scanning; shares stay */
#define TUNE_REPORT 2U /* send STATS now */

/* DOORBELL, DETACHED, HELD_END. */
struct message_plain {
    struct message_header header;
};

enum agent_state {
    AGENT_ACTIVE = 0,    /* scanning and sharing */
    AGENT_STANDING_DOWN, /* nothing is shared now (the VMM uses userfaultfd itself, ...); may return
                          */
    AGENT_GAVE_UP,       /* nothing is shared and nothing will be */
    AGENT_STATE_COUNT
};

struct message_stats {
    struct message_header header;
    uint32_t state;               /* enum agent_state */
    uint32_t passes;              /* scan passes ended */
    uint64_t places[PLACE_COUNT]; /* sums to the pages of all managed blocks */
    uint64_t merges;              /* pages whose place became shared, ever */
    uint64_t zero_merges;         /* pages whose place became zero, ever */
    uint64_t unmerges;            /* shared pages that became something else, ever */
    uint64_t mismatches;          /* freezes that found other bytes than the hash promised, ever */
    uint64_t busy;                /* freezes that the kernel refused (EBUSY: a pinned page), ever */
    uint64_t broken;              /* shares that the kernel copied by itself and that are held as
                                     private pages in a store mapping now: they can't be frozen */
    uint64_t hashed;              /* pages hashed, ever */
    uint64_t discards;            /* shared pages that a discard made absent, ever */
    uint64_t cpu_ns;              /* CPU time of the agent's threads, ever */
    uint64_t huge_pages;          /* 2 MiB blocks that are mapped huge now */
    uint32_t vmas;                /* VMAs of this process, counted at the last pass */
    uint32_t vma_budget;          /* how many it allows itself to get to */
    uint64_t fault_count;         /* faults that the handler served, ever */
    uint32_t fault_p50_us, fault_p99_us, fault_p999_us, fault_max_us;
    char reason[PROTOCOL_TEXT_BYTES]; /* the latest word about what holds sharing back, or empty */
};

/* ---- the ring ---- */

#define RING_ENTRIES      1024U /* in each direction; a power of two */
#define RING_PAGE_BUFFERS 16U

enum ring_op {
    /* agent to memd */
    RING_OFFER = 1,      /* page; arg = page hash: quiet for a pass, has this content */
    RING_PAGE = 2,       /* page; arg = buffer: the content that was WANTed. The buffer is memd's
                            until memd has consumed this entry (moved its tail past it) */
    RING_STALE = 3,      /* page: has changed, the WANT can't be met */
    RING_MERGED = 4,     /* page; arg = slot */
    RING_NOT_MERGED = 5, /* page; arg = slot | (uint64_t)enum not_merged << 32 */
    RING_BROKEN = 6,     /* page; arg = slot: this share has ended */
    RING_HAVE = 7,       /* page; arg = slot: to a restarted memd, between HELLO and HELD_END */
    RING_PASS = 8,       /* arg = pass: everything quiet in this pass, and that was
                            something, has been offered */
    /* memd to agent */
    RING_MERGE = 16, /* page; arg = slot: compare and share; answered by MERGED or NOT_MERGED */
    RING_WANT = 17,  /* page; arg = hash it was offered with: answered by PAGE or STALE */
    RING_REMAP = 18, /* page; arg = new slot: a shared page's content moves within the store;
                        answered like MERGE. On MERGED the old slot has one user less. */
};

enum not_merged {
    NOT_MERGED_MISMATCH = 1, /* the bytes differ: the page was written meanwhile, or a hash lied */
    NOT_MERGED_BUSY = 2,     /* the page is pinned */
    NOT_MERGED_GONE = 3,     /* the page is not private any more */
    NOT_MERGED_BUDGET = 4,   /* no VMA left to spend on it */
    NOT_MERGED_REFUSED = 5,  /* something else: STATS.reason has the word */
};

struct ring_entry {
    uint32_t op;
    uint32_t page;
    uint64_t arg;
};

/* One direction. The producer owns head, the consumer owns tail; both only grow (modulo 2^32). */
struct ring_queue {
    uint32_t head __attribute__((aligned(64)));
    uint32_t tail __attribute__((aligned(64)));
    struct ring_entry entries[RING_ENTRIES] __attribute__((aligned(64)));
};

struct ring {
    struct ring_queue to_memd;
    struct ring_queue to_agent;
    uint8_t pages[RING_PAGE_BUFFERS][PAGE_BYTES] __attribute__((aligned(4096)));
};

#define RING_BYTES sizeof(struct ring)

static_assert(sizeof(struct ring_entry) == 16, "a ring entry has 16 bytes");
static_assert(sizeof(struct ring) % PAGE_BYTES == 0, "the ring is mapped in whole pages");

/* How many entries can be read now; more than RING_ENTRIES means that the producer lies. */
static inline uint32_t ring_filled(const struct ring_queue *queue, uint32_t own_tail)
{
    return __atomic_load_n(&queue->head, __ATOMIC_ACQUIRE) - own_tail;
}

/* How many entries can be written now; more than RING_ENTRIES means that the consumer lies. */
static inline uint32_t ring_room(const struct ring_queue *queue, uint32_t own_head)
{
    return RING_ENTRIES - (own_head - __atomic_load_n(&queue->tail, __ATOMIC_ACQUIRE));
}

/* Producer: stores the entry; *own_head is the producer's private copy of head. The caller has
 * checked ring_room. */
static inline void ring_put(struct ring_queue *queue, uint32_t *own_head, struct ring_entry entry)
{
    queue->entries[*own_head % RING_ENTRIES] = entry;
    *own_head += 1;
    __atomic_store_n(&queue->head, *own_head, __ATOMIC_RELEASE);
}

/* Consumer: a copy of the next entry, still owned by the producer until ring_release. */
static inline struct ring_entry ring_peek(const struct ring_queue *queue, uint32_t own_tail)
{
    const volatile struct ring_entry *shared = &queue->entries[own_tail % RING_ENTRIES];
    struct ring_entry entry = {.op = shared->op, .page = shared->page, .arg = shared->arg};

    return entry;
}

/* Consumer: done with every entry before *own_tail + 1. */
static inline void ring_release(struct ring_queue *queue, uint32_t *own_tail)
{
    *own_tail += 1;
    __atomic_store_n(&queue->tail, *own_tail, __ATOMIC_RELEASE);
}

#endif
