/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulated VMM, and the world that it lives in: guests' RAM as arrays of page contents, agents
 * that speak the real protocol, and under them the whole real daemon on a simulated machine
 * (sim_host.h).
 *
 * Theory of operation. A *walk* does one thing after the other, chosen by chance: a guest writes,
 * an agent reads some of what memd said and answers some of it, time passes, a connection breaks, a
 * VMM dies, memd is started again. Every now and then the walk comes to *rest*: liars are ended,
 * everybody else answers everything, and then what memd believes is compared with what the agents
 * have. Nothing depends on anything but the seed; what agents are told is summed up in `trace`.
 *
 * An honest VMM does what vmm-hooks/agent does, in any order and as late as that could be late. A
 * *liar* (sim_lies.c) does the same and says things that are not so; what it says may cost it its
 * own session and nothing else.
 *
 * Invariants that are looked at (sim_check.c): an honest agent is never asked to share a page with
 * content that it never offered, never loses its session (and is not called a liar when it has hung
 * up itself), and never gets a segment of another domain; at rest the figures of memd are the
 * agents'; what nobody uses any more is closed; one turn of the loop does a bounded amount of work.
 *
 * Not simulated: the agent's own machinery (freeze, remap, faults), which tests/unit and tests/live
 * have; the control socket, except that its status is what is compared.
 */
#ifndef SIM_H
#define SIM_H

#include "daemon.h"
#include "protocol.h"
#include "sim_host.h"

#define SIM_VMMS          10U
#define SIM_DOMAINS       3U /* two that are configured, and a guest's own */
#define SIM_BLOCKS_MAX    64U
#define SIM_PAGES_MAX     4096U /* page numbers that one guest may use up */
#define SIM_OFFERS_KEPT   6U
#define SIM_TODO_MAX      (2 * RING_ENTRIES)
#define SIM_SEGMENTS_MAX  256U /* that one agent holds */
#define SIM_SEGMENTS_SEEN (1U << 16)

struct sim;

struct sim_page {
    uint32_t content; /* 0: zeros */
    uint32_t slot;    /* SLOT_NONE: not shared */
    enum place place;
    bool offered;
    bool had; /* the share was taken over by HAVE: memd may have let go of it long ago */
    /* What it was offered as since memd last asked it to share something. */
    uint32_t offers[SIM_OFFERS_KEPT], offer_count;
};

struct sim_block {
    uint32_t first_page, pages;
    uint64_t hva;
    bool live;
};

struct sim_segment {
    uint32_t id, pages;
    int fd;
    const uint8_t *bytes;
};

enum sim_link { SIM_OFF, SIM_ALONE, SIM_GREETING, SIM_SERVED };

struct sim_vmm {
    struct sim *sim;
    enum sim_link link; /* OFF: there is no such VMM now */
    char name[NAME_BYTES];
    char token[PROTOCOL_TOKEN_BYTES + 1];
    pid_t pid;
    uid_t uid;
    uint32_t domain; /* index into the names of sim_world.c; the last is its own */
    uint32_t number; /* of this life; names what is its own */
    bool liar, detached;
    uint32_t stalled;         /* steps that it still sleeps through */
    uint64_t must_end_by;     /* turn; 0: it has said nothing that must end its session */
    const char *lie;          /* the word for it */
    uint64_t next_connect_ns; /* not before */
    uint64_t patience_ns;     /* until then it waits for its WELCOME */
    uint32_t cut_after;       /* sendings of what it holds until the connection breaks; 0: never */

    int fd;
    struct ring *ring;
    uint32_t own_head, own_tail, buffer;
    bool rung; /* something was put since the last doorbell */
    struct hash_secret secret;
    uint64_t session; /* of memd's store of its domain */
    bool held;        /* has been welcomed once */
    struct ring_entry todo[SIM_TODO_MAX];
    uint32_t todo_first, todo_count;

    struct sim_block blocks[SIM_BLOCKS_MAX];
    uint32_t block_count, announced;
    bool gone_told[SIM_BLOCKS_MAX];
    uint64_t next_hva;
    struct sim_page pages[SIM_PAGES_MAX];
    uint32_t page_count;
    struct sim_segment segments[SIM_SEGMENTS_MAX];
    uint32_t segment_count;
    uint64_t merges, unmerges, mismatches;
};

/* Which domain's store a segment belongs to, by what the kernel says it is. */
struct sim_seen {
    uint64_t inode, session;
};

/* What a walk does not leave to chance. */
struct sim_options {
    uint64_t seed;
    bool liars;
    bool weak_hashes; /* different contents collide all the time */
    bool restarts;    /* memd is stopped and started again */
    bool slow;        /* so much time between two things that many small segments come about */
    bool cuts; /* memd stands still for seconds; connections break in the middle of greetings */
    bool verbose;
};

struct sim {
    struct sim_host host;
    struct daemon daemon;
    struct sim_options options;
    bool running;
    char dir[64];
    struct sim_vmm vmms[SIM_VMMS];
    struct sim_seen *seen;
    uint32_t seen_count, vmm_count;
    uint64_t steps, turns, trace;
    bool still;         /* memd gets no turn: who waits for it loses patience */
    bool uid_admitted;  /* the second uid of the first domain, at present */
    bool detach_on_way; /* sessions may end for what the walk itself asked memd to do */
    int idle_fds;       /* descriptors of a memd without guests */
    uint32_t rests, full_rests;
    /* What happened at all: a walk in which nothing is shared proves nothing. */
    uint64_t merged, remapped, wanted, dropped, lies, sessions_lost, mismatched;
    char wrong[512]; /* the first invariant that did not hold; "": all did */
};

/* ---- the world (sim_world.c) ---- */

/* The daemon runs then, without guests. */
void sim_start(struct sim *sim, const struct sim_options *options);
void sim_stop(struct sim *sim);
/* So many things, one after the other, until something is wrong; ends at rest. */
void sim_walk(struct sim *sim, uint64_t steps);
void sim_turn(struct sim *sim);
void sim_restart_daemon(struct sim *sim);
/* Every honest agent has answered everything; liars are gone. */
void sim_rest(struct sim *sim);
/* Nobody is there any more. */
void sim_clear(struct sim *sim);
/* A guest of this kind, registered and with RAM; NULL: there is no room for one more. */
struct sim_vmm *sim_add(struct sim *sim, uint32_t domain, bool liar);

void sim_wrong(struct sim *sim, const char *format, ...) __attribute__((format(printf, 2, 3)));
void sim_trace(struct sim *sim, const void *bytes, size_t count);

/* ---- one VMM (sim_vmm.c) ---- */

int sim_vmm_register(struct sim_vmm *vmm);
void sim_vmm_connect(struct sim_vmm *vmm);
/* The connection breaks; memory and segments stay. */
void sim_vmm_disconnect(struct sim_vmm *vmm);
/* kill -9. */
void sim_vmm_die(struct sim_vmm *vmm);
/* Reads at most so many messages and entries, answers at most so many. */
void sim_vmm_step(struct sim_vmm *vmm, uint32_t read, uint32_t answer);
/* True when memd has said nothing that is not read and answered. */
bool sim_vmm_is_idle(const struct sim_vmm *vmm);

void sim_vmm_write(struct sim_vmm *vmm, uint32_t page, uint32_t content);
void sim_vmm_discard(struct sim_vmm *vmm, uint32_t page);
void sim_vmm_pass(struct sim_vmm *vmm, uint32_t first, uint32_t count);
void sim_vmm_plug(struct sim_vmm *vmm, uint32_t pages);
void sim_vmm_unplug(struct sim_vmm *vmm, uint32_t block);
void sim_vmm_say_stats(struct sim_vmm *vmm);
/* A page of a block that is there; PAGE_NONE: it has none. */
uint32_t sim_vmm_any_page(const struct sim_vmm *vmm);
void sim_vmm_places(const struct sim_vmm *vmm, uint64_t *ret_places);
/* Makes everything private and lets go of every segment. */
void sim_vmm_lose_store(struct sim_vmm *vmm);

void sim_vmm_send(struct sim_vmm *vmm, const void *message, uint32_t bytes, const int *fds,
                  uint32_t fd_count);
void sim_vmm_put(struct sim_vmm *vmm, uint32_t op, uint32_t page, uint64_t arg);
void sim_vmm_ring(struct sim_vmm *vmm);
uint64_t sim_vmm_hash(const struct sim_vmm *vmm, uint32_t content);

/* ---- contents (sim_content.c) ---- */

/* What content `id` of some owner is called: 0 is everybody's. */
uint32_t sim_content_of(uint32_t owner, uint32_t id);
uint32_t sim_content_owner(uint32_t content);
/* The owner of what nobody outside this VMM's domain may see. */
uint32_t sim_content_owner_of(const struct sim_vmm *vmm);
/* Expands to 4096 bytes. Contents of neighbouring ids differ in their last 8 bytes only. */
void sim_content_expand(uint32_t content, void *into);
/* -EINVAL: these bytes are no content. */
int sim_content_read(const void *bytes, uint32_t *ret_content);

/* ---- lies (sim_lies.c), checks (sim_check.c) ---- */

void sim_lie(struct sim_vmm *vmm);
/* As lie, but this one; false: there is none of this number. */
bool sim_lie_number(struct sim_vmm *vmm, uint32_t number);

/* Cheap, after each turn. */
void sim_check_turn(struct sim *sim);
/* Of memd's tables in themselves. */
void sim_check_tables(struct sim *sim);
/* At rest: what memd says against what is. */
void sim_check_rest(struct sim *sim);
/* Without guests: nothing is left of any. */
void sim_check_empty(struct sim *sim);
/* A segment has come. */
void sim_check_segment(struct sim_vmm *vmm, const struct sim_segment *segment);
int sim_check_count_fds(void);

#endif
