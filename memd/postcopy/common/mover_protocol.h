/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an agent and its mover say to each other while a guest moves.
 *
 * Theory of operation
 * -------------------
 * A mover is a process of its own, one a migration and side. memd makes an AF_UNIX SOCK_SEQPACKET
 * pair, gives one end to the mover and the other to the agent (MESSAGE_MOVER of protocol.h). The
 * mover has the connections, the agent has the memory: the mover makes three connections to the
 * mover at the other side, keeps *control* for itself, and hands *urgent* and *bulk* to the agent,
 * which speaks the page wire (wire.h) on them with the agent at the other side.
 *
 * The agent keeps the state of the migration, since it lives exactly as long as the guest: a mover
 * that died is replaced by a new one (a second MESSAGE_MOVER), which learns from HELLO where things
 * stand. Nothing in the agent depends on the mover being there: with its links in place the pages
 * go on moving.
 *
 * The agent speaks first: MOVER_HELLO, then one MOVER_REGION for each region. Regions are numbered
 * from 0, and their pages laid end to end in that order are the page numbers of the wire; both
 * sides' tables must be the same before anything else is said.
 *
 * Then the mover asks. Every request gets exactly one MOVER_DONE, in order; what the agent says of
 * its own accord (PROGRESS, MAPPED, PROVEN, CUT) may come in between. A request that does not fit
 * the role or the phase is answered by -EPERM and changes nothing. Requests that call the VMM
 * (STOP, SAVE, LOAD, RUN, HOLD, GO) take as long as the VMM does; nothing else is served meanwhile.
 * STOP is the one that may be overtaken: while the map is being written UNLINK and ABORT are
 * served, and end it (where QEMU is saved meanwhile, when that is done: drive_qemu.h).
 *
 * The usual order.  Source: SESSION, LINK x 2, [PRECOPY], STOP, SAVE, COMMIT. Destination: SESSION,
 * LINK x 2, EXPECT, (MAPPED), LOAD, RUN. LINK before EXPECT is fine: the destination reads nothing
 * from a link before EXPECT. Whatever comes before COMMIT can be taken back by ABORT on both sides.
 *
 * A cut link. MOVER_CUT says that a data connection has failed or ended (end of file is never
 * success). The mover sends UNLINK at both sides, makes new connections, and gives them as LINK
 * with the next epoch. The destination's agent then tells the source's what it has, by itself.
 *
 * Byte order and layout are those of the machine: both ends are on it. Messages only grow at the
 * end: a reader takes what it knows, and what is missing is zero.
 */
#ifndef MEMD_POSTCOPY_COMMON_MOVER_PROTOCOL_H
#define MEMD_POSTCOPY_COMMON_MOVER_PROTOCOL_H

#include <stdint.h>

#define MOVER_VERSION       1
#define MOVER_SESSION_BYTES 16
#define MOVER_MAX_MESSAGE   1024U

enum mover_role {
    MOVER_SOURCE = 1,
    MOVER_DESTINATION = 2,
};

enum mover_channel {
    MOVER_URGENT = 0, /* WANT, and its answers */
    MOVER_BULK = 1,   /* everything else: passes, map, push */
    MOVER_CHANNELS
};

/* Where a migration stands in the agent. */
enum mover_phase {
    MOVER_PHASE_FRESH = 0,
    /* source */
    MOVER_PHASE_PRECOPY = 1,   /* the guest runs, its writes are tracked, passes are sent */
    MOVER_PHASE_STOPPED = 2,   /* the guest stands still; the final map is being written, or is */
    MOVER_PHASE_COMMITTED = 3, /* the guest never runs here again */
    /* destination */
    MOVER_PHASE_EXPECTING = 4, /* all RAM is remote */
    MOVER_PHASE_MAPPED = 5,    /* the final map has been applied: faults are served */
    MOVER_PHASE_LOADED = 6,    /* the load hook has returned 0 */
    MOVER_PHASE_RUNNING = 7,   /* the guest runs here */
};

enum mover_type {
    /* agent to mover */
    MOVER_HELLO = 1,
    MOVER_REGION = 2,
    MOVER_DONE = 3,
    MOVER_PROGRESS = 4,
    MOVER_MAPPED = 5,
    MOVER_PROVEN = 6,
    MOVER_CUT = 7,
    /* mover to agent; "fd": with a descriptor */
    MOVER_SET_SESSION = 16,   /* both: struct mover_session */
    MOVER_LINK = 17,          /* both, fd: struct mover_link */
    MOVER_UNLINK = 18,        /* both: struct mover_link (channel is not looked at) */
    MOVER_START_PRECOPY = 19, /* source: struct mover_plain */
    MOVER_STOP = 20,          /* source: struct mover_stop */
    MOVER_SAVE = 21,          /* source: struct mover_plain; DONE has a sealed memfd */
    MOVER_COMMIT = 22,        /* source: struct mover_plain; DONE when the final map is written */
    MOVER_ABORT = 23,         /* both: struct mover_plain */
    MOVER_EXPECT = 24,        /* destination: struct mover_plain */
    MOVER_LOAD = 25,          /* destination, fd (what SAVE gave): struct mover_load */
    MOVER_RUN = 26,           /* destination: struct mover_plain */
    MOVER_HOLD = 27,          /* destination: struct mover_plain */
    MOVER_GO = 28,            /* destination: struct mover_plain */
    MOVER_TUNE = 29,          /* source: struct mover_tune_message, at any time after SESSION */
    MOVER_PUSH = 31,          /* source, committed: struct mover_plain. The guest runs there */
    MOVER_FORGET = 30, /* destination, when nothing is remote: struct mover_plain. It is over,
                          whether PROVEN was heard or not. (A mover that goes after PROVEN
                          need not say it.) */
};

/* In front of every message; `bytes` is the size of the whole message. */
struct mover_header {
    uint32_t type;
    uint32_t bytes;
};

/* What the VMM can be asked for through the agent. Without them the mover does it by itself (QMP):
 * STOP is said with pause 0, LOAD without a descriptor when it is done, RUN when it is done; SAVE,
 * HOLD and GO are -ENOTSUP. */
#define MOVER_CAN_PAUSE 1U /* pause and resume */
#define MOVER_CAN_SAVE  2U /* save and load */

struct mover_hello {
    struct mover_header header;
    uint32_t version;
    uint32_t role;                        /* as MESSAGE_MOVER said */
    uint32_t phase;                       /* enum mover_phase */
    uint32_t hooks;                       /* MOVER_CAN_... */
    uint8_t session[MOVER_SESSION_BYTES]; /* all zero: none yet */
    uint32_t page_bytes;
    uint32_t region_count;
    uint64_t pages;           /* of all regions */
    uint64_t unmanaged_pages; /* RAM that the agent leaves alone: can't be moved */
    uint32_t epoch;           /* of the newest link that was given; 0: none yet */
    uint32_t linked;          /* bit 1 << channel: this link of that epoch is up */
    uint32_t paused;          /* the guest is paused by a request (STOP, HOLD) */
    uint32_t proven;          /* 1: PROVEN was said, with this: */
    int32_t proven_result;
    uint32_t urgent_tid;   /* source: the thread that answers demand faults; destination: the fault
                              handler. They deserve a real-time priority, which memd can give */
    uint64_t remote_pages; /* destination: pages that are still at the source */
    char reason[128];      /* not empty: this agent can't move its guest, and why */
};

struct mover_region {
    struct mover_header header;
    uint32_t index;
    uint32_t unused;
    uint64_t first_page; /* on the wire: the pages of all regions before it */
    uint64_t pages;
};

struct mover_plain {
    struct mover_header header;
};

/* The answer to a request. */
struct mover_done {
    struct mover_header header;
    uint32_t what;  /* enum mover_type of the request */
    int32_t result; /* 0 or -errno */
    uint64_t value; /* SET_SESSION: as urgent_tid of HELLO, which the source has from now on only.
                       SAVE: bytes in the memfd. STOP, RUN: for how many nanoseconds the guest
                       has stood still or run, 0: not known better than by the answer. HOLD, GO,
                       RUN, LOAD, STOP: nanoseconds that the VMM's hook took are in `ns` */
    uint64_t ns;
};

/* Switches for measurements: each turns one means of speed off. Zero is the normal way. */
#define MOVER_NO_LOCALITY                                                                        \
    1U                       /* the pusher goes from the first page to the last, whatever faults \
                              */
#define MOVER_NO_URGENT   2U /* answers to faults go on bulk, behind what is queued there */
#define MOVER_NO_PIPELINE 4U /* one demand request in flight at a time */
#define MOVER_NO_SLOTS    8U /* shared pages are sent like others */

struct mover_tuning {
    uint64_t bandwidth; /* bytes a second on bulk, 0: no limit. Never holds an answer to a fault */
    uint32_t switches;  /* MOVER_NO_... */
    uint32_t unused;
};

struct mover_session {
    struct mover_header header;
    uint8_t session[MOVER_SESSION_BYTES]; /* not all zero */
    struct mover_tuning tuning;
};

struct mover_tune_message {
    struct mover_header header;
    struct mover_tuning tuning;
};

struct mover_link {
    struct mover_header header;
    uint32_t channel; /* enum mover_channel */
    uint32_t epoch;   /* 1 and up; not below that of any earlier LINK (-ESTALE) */
};

struct mover_stop {
    struct mover_header header;
    uint32_t pause; /* 1: by the pause hook; 0: the mover has stopped the VMM already */
    uint32_t hold;  /* 1: nothing is pushed before PUSH, what is asked for is sent all the same: the
                       CPU and the link are for the switch-over, while the guest stands still */
};

struct mover_load {
    struct mover_header header;
    uint64_t bytes;
};

/* How far it is: each 100 ms from SESSION on, and at the end of each pre-copy pass. */
struct mover_progress {
    struct mover_header header;
    uint32_t phase;
    uint32_t pass;       /* source, PRECOPY: the pass that is being sent, from 1 */
    uint32_t pass_ended; /* 1: that pass is over, and `pages_left` are dirty again */
    uint32_t unused;
    uint64_t pages_left; /* source: to be sent; destination: remote */
    uint64_t bytes_sent; /* on both channels of this side, ever: frames with their payloads */
    uint64_t bytes_received;
    uint64_t rate; /* pages a second of the last interval, sent or placed */
    uint64_t
        dirty_rate; /* source, PRECOPY: pages a second that the guest dirtied in the last pass */
    uint64_t pages_data;    /* source: sent as bytes; destination: placed from bytes */
    uint64_t pages_zero;    /* all zeros, or absent: no bytes */
    uint64_t pages_slot;    /* by reference to a content that was sent once */
    uint64_t pages_demand;  /* source: WANTs answered; destination: faults that had to ask */
    uint64_t pages_resent;  /* source: sent more than once (pre-copy, reconnects) */
    uint64_t pages_dropped; /* destination: came, but the page was there or had been removed */
};

/* The final map has been applied: the guest may be loaded and run. */
struct mover_mapped {
    struct mover_header header;
    uint64_t pages_remote;
    uint64_t pages_have;
    uint64_t pages_empty;
};

/* An agent that has no mover for 10 s before COMMIT gives the migration up by itself: a guest is
 * not left paused because nobody is there to end it. */
#define MOVER_PATIENCE_S 10

/* All pages are placed and the hash sums agree (result 0), or they don't (-EBADMSG: `region` is the
 * first that differs). The source says it when it has answered, the destination when it has heard.
 * If the source goes before the answer is there, the source's mover can still tell on control. */
struct mover_proven {
    struct mover_header header;
    int32_t result;
    uint32_t region;
    uint64_t pages_placed;  /* in the proof */
    uint64_t pages_removed; /* were discarded at the destination before they came */
    struct {
        uint64_t count; /* faults that had to ask the source (destination only) */
        uint32_t p50_us, p99_us, p999_us, max_us; /* from the fault to the page being there */
    } faults;
    struct {
        uint64_t bytes_sent, bytes_received;
        uint64_t data, zero, slot, demand, resent, dropped; /* as in PROGRESS */
    } pages;
};

/* A data connection is over: this one is closed already. */
struct mover_cut {
    struct mover_header header;
    uint32_t epoch;
    uint32_t channel;
    int32_t result; /* -errno: -EPIPE is an end of file, -EPROTO garbage, -ENOMEM this side has no
                       page to place one in */
    uint32_t unused;
    char reason[96]; /* in words, for garbage: what was wrong with it */
};

#endif
