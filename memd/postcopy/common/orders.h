/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What memd and a mover say to each other.
 *
 * memd execs memd-mover with a connected AF_UNIX SOCK_SEQPACKET socket as its standard input and
 * sends START, with descriptors. From then on the mover reports (STATUS, each 200 ms and whenever
 * something happens), and memd may cancel. A mover outlives its memd: it has a listening socket
 * (START brings it) at a path that only memd knows and that the next memd connects to. The newest
 * connection is memd; an older one is closed.
 *
 * When it is over, STATUS has an outcome; the mover says so until memd has answered FORGET (it has
 * noted the outcome, and done what is memd's part), and ends.
 *
 * Both trust each other as far as this goes: a mover has read what a stranger said, so memd bounds
 * every number and ends a mover whose messages are not of the form below. Texts end with a zero
 * byte. Byte order and layout are the machine's.
 */
#ifndef MEMD_POSTCOPY_COMMON_ORDERS_H
#define MEMD_POSTCOPY_COMMON_ORDERS_H

#include <stdint.h>

#define ORDERS_VERSION       1
#define ORDERS_SESSION_BYTES 16
#define ORDERS_WORD_BYTES    256
#define ORDERS_NAME_BYTES    64
#define ORDERS_MAX_MESSAGE   3072U

enum order_type {
    /* memd to mover */
    ORDER_START = 1,  /* first of all; descriptors as listed at struct order_start */
    ORDER_GUEST = 2,  /* destination: answer to NEED_GUEST; with result 0 the agent's socket */
    ORDER_CANCEL = 3, /* call it off, if that can still be */
    ORDER_FORGET = 4, /* the outcome is noted: end */
    /* mover to memd */
    ORDER_NEED_GUEST = 16, /* destination: start the VMM of this guest */
    ORDER_STATUS = 17,
};

struct order_header {
    uint32_t type;
    uint32_t bytes; /* of the whole message */
};

/* Descriptors of START, in this order, those that there are: the listener for the next memd; the
 * agent's socket (source; destination when it takes over); the listener for the peer, and the
 * peer's first connection (destination, the latter not when it takes over); and where there is an
 * agent's socket, a connection to QEMU's monitor, if has_monitor says so. */
struct order_start {
    struct order_header header;
    uint32_t version;
    uint32_t role;       /* enum mover_role */
    uint32_t takes_over; /* 1: a mover before this one has died */
    uint32_t epoch;      /* takes over: the highest that memd has heard of */
    uint32_t precopy_only;
    uint32_t postcopy_only;
    uint32_t plain;
    uint64_t bandwidth;                    /* bytes a second, 0: no limit */
    uint8_t session[ORDERS_SESSION_BYTES]; /* source: of memd's choice; destination: taking over */
    char name[ORDERS_NAME_BYTES];          /* of the guest */
    char vmm[32];
    char host[ORDERS_WORD_BYTES]; /* source: where to */
    uint32_t port;
    uint32_t data_port; /* source, takes over: the destination mover's own */
    uint32_t uid, gid;  /* to run as */
    char tls_cert[ORDERS_WORD_BYTES], tls_key[ORDERS_WORD_BYTES], tls_ca[ORDERS_WORD_BYTES];
    uint32_t has_monitor;
    uint32_t switches; /* MOVER_NO_... (mover_protocol.h) */
};

struct order_guest {
    struct order_header header;
    int32_t result;       /* 0 or -errno */
    uint32_t has_monitor; /* 1: a connection to QEMU's monitor comes behind the agent's socket */
    char words[200];      /* for the other host's operator */
};

struct order_plain {
    struct order_header header;
};

struct order_need_guest {
    struct order_header header;
    char name[ORDERS_NAME_BYTES];
    char vmm[32];
    uint64_t pages;
    uint8_t session[ORDERS_SESSION_BYTES];
};

enum order_outcome {
    ORDER_GOES_ON,
    ORDER_COMPLETED,
    ORDER_SOURCE_RUNS,
    ORDER_GUEST_LOST,
    ORDER_CANCELLED,
    ORDER_OUTCOME_COUNT
};

/* Where a migration is, for people and for a memd that is asked to cancel. */
enum order_stage {
    ORDER_STAGE_PREPARE, /* connecting, comparing, starting the VMM */
    ORDER_STAGE_PRECOPY,
    ORDER_STAGE_SWITCH, /* the guest is stopped, the state moves */
    ORDER_STAGE_POSTCOPY,
    ORDER_STAGE_DONE,
    ORDER_STAGE_COUNT
};

struct order_status {
    struct order_header header;
    uint32_t stage;   /* enum order_stage */
    uint32_t outcome; /* enum order_outcome */
    uint32_t may_cancel;
    uint32_t was_cut; /* source, SOURCE_RUNS: by nothing but a connection or a mover that ended */
    uint32_t linked;  /* 1: the other host can be heard */
    uint32_t epoch;
    uint32_t data_port; /* source: the destination mover's own; 0: not known yet */
    uint32_t reconnects;
    uint32_t pass;
    uint64_t pages, pages_left;
    uint64_t rate_bytes; /* a second, of the last interval */
    uint64_t elapsed_ns; /* since the start */
    uint64_t precopy_ns, downtime_ns, postcopy_ns;
    uint64_t bytes_sent; /* both directions, as the network sees them */
    uint64_t pages_data, pages_demand, pages_pushed, pages_slot, pages_zero, pages_resent;
    uint32_t fault_p50_us, fault_p99_us, fault_p999_us, fault_max_us;
    uint8_t session[ORDERS_SESSION_BYTES];
    char words[200]; /* what went wrong, or what it waits for */
};

#endif
