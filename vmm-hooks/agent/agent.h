/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent: what holds the parts together.
 *
 * Threads
 *   scanner  (run.c, session.c) talks to memd, scans, merges. Everything that is not guest_ram
 *            belongs to it.
 *   handler  (fault.c) serves faults.
 *   mover's  (migration.c, while the guest moves and after) serves the mover and calls hooks; the
 *            engine that it drives (memd/postcopy/agent) has one or two threads of its own.
 *   the VMM's own threads come in through attach.c and preload.c: they register RAM, discard
 *            pages, and take RAM away. They touch guest_ram under a block's lock, and the few
 *            words below that are marked so.
 *
 * The connection to memd may be missing, break, and come back at any time; the guest's memory does
 * not depend on it.
 */
#ifndef MEMD_AGENT_AGENT_H
#define MEMD_AGENT_AGENT_H

#include <memd/memd.h>
#include <pthread.h>

#include "clock.h"
#include "fault.h"
#include "gate.h"
#include "merge.h"
#include "migration.h"
#include "restore.h"
#include "rpc.h"
#include "scan.h"
#include "segments.h"

#define AGENT_MAX_LEFT_ALONE 32U

/* MERGE entries done together: long enough for whole runs, short enough for one turn. */
#define AGENT_MAX_MERGES 512U

/* RAM that the VMM announced and that is not managed. */
struct left_alone {
    uint64_t hva;
    uint64_t pages;
    const char *reason; /* static storage */
};

struct memd_vm {
    struct guest_ram ram;
    struct fault_handler handler;
    struct segments segments;
    struct scanner scanner;
    struct merge_stats merge;
    struct gate gate; /* under migration.gate */
    struct rpc rpc;
    struct migration migration;
    struct restore restore; /* a saved guest that comes from a file */

    char socket[108];
    char token[PROTOCOL_TOKEN_BYTES];
    char vmm[32];
    pthread_t thread;
    int stop_fd;
    uint32_t scanner_tid;

    /* Set by any thread, under `words` where they are more than a word. */
    struct lock words;
    uint32_t state; /* enum agent_state */
    uint32_t stop;
    uint32_t in_turn;         /* the scanner is doing something; */
    uint32_t turns;           /* turns that it has ended */
    uint32_t forked;          /* this is a child of the VMM, without our threads */
    uint32_t *mark;           /* 1, and 0 in a child; or NULL */
    uint32_t registers_begun; /* UFFDIO_REGISTER by the VMM itself: calls that came in, */
    uint32_t registers_ended; /* and calls that are over */
    char reason[PROTOCOL_TEXT_BYTES];
    uint32_t news; /* state or reason have changed since memd was told */
    uint32_t left_alone_count;
    struct left_alone left_alone[AGENT_MAX_LEFT_ALONE];

    /* The scanner's own. */
    uint32_t ready; /* futex: 0 until the first attempt at everything is over */
    int setup_result;
    bool ram_open;
    bool held; /* segments of an earlier connection are here */
    uint64_t session;
    uint64_t features;  /* of this connection: what both sides have */
    uint32_t announced; /* blocks told to memd */
    uint64_t gone;      /* bitmap of blocks whose leaving was told */
    uint32_t alone_told;
    uint32_t urgent_told;
    struct message_stats told;                  /* what memd was told last */
    struct ring_entry merges[AGENT_MAX_MERGES]; /* taken from the ring, not yet done */
    uint32_t merge_count;
    uint64_t merges_at_ns; /* when something was last added */
    uint32_t revisit_ms;
    uint32_t cpu_permille;
    uint32_t interval_ms;
    bool paused;
    bool detached; /* memd asked us to let go */
    bool in_pass;
    bool sink_full;
    uint64_t next_pass_ns;
    uint64_t next_connect_ns;
    uint64_t resume_wait_ns; /* standing down: until the next look whether that is over */
    uint64_t budget_ns;      /* CPU time that may be used now */
    uint64_t budget_at_ns;
    uint64_t cpu_at_ns;
    uint64_t looked_at_ns; /* when it was last looked whether anything may be frozen */
    bool freeze_allowed;
    bool unpinned_kvm;         /* see descriptors.h */
    uint32_t vmas;             /* when they were counted last */
    uint64_t unmerges_counted; /* ram.unmerges then */
    uint32_t vma_limit;
};

/* Is this a child of the VMM: a copy of its memory, without our threads? (Not one of vfork, which
 * has no memory of its own.) */
static inline bool agent_is_child(const struct memd_vm *vm)
{
    return vm->forked || (vm->mark && !*vm->mark);
}

/* attach.c */

/* memd_attach, but an agent that can't work (vm->setup_result) stays, to tell memd why. */
int agent_attach(const struct memd_options *options, struct memd_vm **ret_vm);

/* Records why nothing (more) is shared, for memctl guest. */
void agent_say(struct memd_vm *vm, const char *reason);
/* Gives everything back to the guest and lets it rest, in this state and for this reason. Any
 * thread. Returns pages that could not be made private. */
uint32_t agent_stand_down(struct memd_vm *vm, enum agent_state state, const char *reason);

/* For good: as above, and what the agent had mapped and registered for it goes too (a lock of all
 * memory would wait for ever in a hole of ours). */
void agent_give_up(struct memd_vm *vm, const char *reason);

/* Up to so many blocks can be touched by one call of the VMM. */
#define AGENT_MAX_LEAVING RAM_MAX_BLOCKS

/* A call of the VMM's that memd can't follow, and the blocks that it touches. The first five are
 * the caller's, the others 0. */
struct agent_leaving {
    void *changed; /* a mapping that becomes another one, or moves; or NULL */
    size_t changed_bytes;
    void *ended; /* what is mapped here ends; or NULL */
    size_t ended_bytes;
    bool whole; /* if the call fails, all of `ended` is as before (munmap; not MAP_FIXED) */
    uint32_t count;
    struct ram_block *blocks[AGENT_MAX_LEAVING];
};

/*
 * Before the call: every block that it touches is given back to the VMM. What is certain to end
 * altogether (`whole`) is not copied for that. The blocks stay locked until agent_leave_end, so
 * that the change and our letting go are one. Nothing is forgotten yet that a call which fails
 * would leave in the store's mappings.
 */
void agent_leave_begin(struct memd_vm *vm, struct agent_leaving *leaving);
/* After it: did the call succeed? Then `ended` holds something else now. */
void agent_leave_end(struct memd_vm *vm, struct agent_leaving *leaving, bool done);
/* Between the two: has something of `changed` stayed in the store's mappings (there was no memory
 * to copy it to)? It can't be moved elsewhere then. */
bool agent_leave_is_partial(const struct agent_leaving *leaving);

/* memd_ram_discard with the VMM's own advice. 0 or -errno. */
int agent_discard(struct memd_vm *vm, void *addr, size_t bytes, int advice);

/* The same in a child of the VMM, which has copies of our mappings but no agent. */
int agent_discard_in_child(struct memd_vm *vm, void *addr, size_t bytes, int advice);

/* session.c (scanner's thread) */

/* Connects and greets; puts back what an earlier connection had. 0 or -errno. */
int session_open(struct memd_vm *vm);
void session_close(struct memd_vm *vm);
/* Reads messages and the ring, answers. Returns how much there was, 0 for nothing. */
uint32_t session_turn(struct memd_vm *vm);
/* Tells memd of new blocks, blocks that left, and shares that ended. */
void session_report(struct memd_vm *vm);
void session_send_stats(struct memd_vm *vm);
/* Sends them if they tell memd anything, or the last ones are some passes old. */
void session_end_pass(struct memd_vm *vm);
/* Tries once more to give back the segments that could not be given back when memd asked. */
void session_drop_again(struct memd_vm *vm);
/* Puts an entry, waiting for room as long as memd may need; false when the connection is over. */
bool session_put(struct memd_vm *vm, uint32_t op, uint32_t page, uint64_t arg);
/* How long at most session_turn need not be called. */
uint64_t session_patience_ns(const struct memd_vm *vm);
/* Waits for memd or for somebody to stop us. */
void session_wait(struct memd_vm *vm, uint64_t ns);

/* run.c (scanner's thread) */
void *run_scanner(void *vm);
uint64_t run_cpu_ns(const struct memd_vm *vm);
/* May these pages be frozen, as far as I/O and hooks go? Says why not. */
bool run_may_freeze(void *vm, struct ram_block *block, uint32_t index, uint32_t pages);
/* How long a run must be now to be worth two more VMAs; 0: no VMA may be spent at all. */
uint32_t run_shortest_run(const struct memd_vm *vm);
/* Will a single page still be worth two VMAs when so many runs were merged? */
bool run_may_scatter(const struct memd_vm *vm, uint32_t runs);
/* Counts the VMAs anew where what is known of them is far too much perhaps (by an eighth of the
 * budget: a count takes a microsecond a VMA). True: it did. */
bool run_count_again(struct memd_vm *vm);

#endif
