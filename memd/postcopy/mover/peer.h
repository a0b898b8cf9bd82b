/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What two movers say to each other: the greeting that opens each of the three connections of a
 * migration (control, urgent, bulk), and the frames of the control connection. What the two agents
 * say on urgent and bulk is another language (postcopy/common/wire.h).
 *
 * The other host is a stranger until TLS has proved who it is, and may lie afterwards: everything
 * is decoded into checked structs here, and nowhere else. A type that is not known, a size that
 * does not fit, a text that is none, a region beyond what a guest can have: -EPROTO, and the
 * connection ends.
 *
 * Little-endian, whatever the machine is.
 */
#ifndef MEMD_POSTCOPY_MOVER_PEER_H
#define MEMD_POSTCOPY_MOVER_PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "units.h"

#define PEER_VERSION       2U
#define PEER_MAGIC         0x31766f6d646d656dULL /* "memdmov1" */
#define PEER_SESSION_BYTES 16
#define PEER_NAME_BYTES    64
#define PEER_VMM_BYTES     32
#define PEER_TEXT_BYTES    200
#define PEER_REGIONS_MAX   256U /* as many blocks as memd keeps of one guest */
#define PEER_CHUNK_BYTES   32768U
#define PEER_STATE_MAX     (64U << 20) /* of devices and vCPUs; stock QEMU's is 0.3 MiB */

/* ---- the greeting ---- */

enum peer_channel { PEER_CONTROL, PEER_URGENT, PEER_BULK, PEER_CHANNEL_COUNT };

/* Who connects says what the connection is for; the answer is the same with a verdict. Both are of
 * one size, so that whoever owns the socket next finds nothing of ours in it. */
struct peer_greeting {
    enum peer_channel channel;
    uint32_t verdict; /* of the answer; enum peer_verdict */
    uint32_t epoch;
    uint8_t session[PEER_SESSION_BYTES];
};

enum peer_verdict {
    PEER_WELCOME,
    PEER_OTHER_SESSION, /* no session of this mover's */
    PEER_OLD_EPOCH,     /* a connection from before the last cut, or one that is there already */
    PEER_OTHER_VERSION,
    PEER_BUSY,
    PEER_VERDICT_COUNT
};

#define PEER_GREETING_BYTES 48

void peer_greeting_encode(const struct peer_greeting *greeting, uint8_t into[PEER_GREETING_BYTES]);
/* -EPROTO: it is none; -EPROTONOSUPPORT: of another version. */
int peer_greeting_decode(const uint8_t from[PEER_GREETING_BYTES],
                         struct peer_greeting *ret_greeting);
/* For people. */
const char *peer_verdict_words(uint32_t verdict);

/* ---- frames of the control connection ---- */

enum peer_type {
    PEER_HELLO = 1,     /* source: this is the guest. First frame of a session */
    PEER_OK = 2,        /* destination: it can come; where the other connections go to */
    PEER_REFUSED = 3,   /* destination: why not. The guest was not touched */
    PEER_EXPECTING = 4, /* destination: both data connections are at the agent, RAM is `remote` */
    PEER_STATE = 5,     /* source: a piece of the state of vCPUs and devices */
    PEER_READY = 6,     /* destination: state and map are in place; from here on it waits for GO */
    PEER_GO = 7,        /* source: it has committed, the guest will never run there again */
    PEER_RUNNING = 8,   /* destination: the guest runs here */
    PEER_ABORT = 9,     /* both, only while the source has not committed */
    PEER_PING = 10,     /* both: I am here */
    PEER_RESUME = 11,   /* both, first frame after a cut: where I stand */
    PEER_PROVEN = 12,   /* destination: every page is here and the sums agree; its figures */
    PEER_BYE = 13,      /* source: its VMM may end, so may the destination's mover */
    PEER_TYPE_END
};

struct peer_region {
    uint64_t first_page, pages;
};

struct peer_hello {
    uint32_t version;
    uint32_t machine; /* ELF's e_machine of the host */
    uint32_t page_bytes;
    uint32_t features;
    char vmm[PEER_VMM_BYTES];
    char name[PEER_NAME_BYTES];
    uint32_t region_count;
    struct peer_region regions[PEER_REGIONS_MAX];
};

struct peer_words {
    uint32_t code; /* an errno value, or 0 */
    char text[PEER_TEXT_BYTES];
};

struct peer_state {
    uint64_t offset, total;
    const uint8_t *bytes; /* in the buffer that was decoded */
    uint32_t count;
};

/* Where one side stands, said after a cut. */
enum peer_stand {
    PEER_BEFORE_COMMIT, /* source: it has not committed and never will: the session is over */
    PEER_COMMITTED,     /* source */
    PEER_WAITS,         /* destination: it has said READY and waits for GO */
    PEER_RUNS,          /* destination: the guest runs here, pages are missing */
    PEER_HAS_ALL,       /* both: proven */
    PEER_STAND_COUNT
};

struct peer_figures {
    uint64_t pages_demand, pages_placed, bytes;
    uint32_t fault_p50_us, fault_p99_us, fault_p999_us, fault_max_us;
};

/* One frame, decoded. */
struct peer_frame {
    enum peer_type type;
    union {
        struct peer_hello hello;
        struct peer_words words; /* REFUSED, ABORT */
        struct peer_state state;
        struct peer_figures figures; /* PROVEN */
        uint32_t port;               /* OK: of the same address */
        uint64_t ago_ns;             /* RUNNING: since when it does */
        enum peer_stand stand;       /* RESUME */
    };
};

#define PEER_HEADER_BYTES 8
#define PEER_FRAME_MAX    (PEER_HEADER_BYTES + 16 + PEER_CHUNK_BYTES)

/* Bytes of the frame at `from`, of which `have` bytes are there; 0: not all are there yet; -EPROTO:
 * no frame begins like this. */
int peer_frame_size(const uint8_t *from, size_t have);
/* The frame of exactly `bytes` bytes. -EPROTO. */
int peer_frame_decode(const uint8_t *from, size_t bytes, struct peer_frame *ret_frame);
/* Into a buffer of PEER_FRAME_MAX bytes; how many it takes. The frame is sound (it is ours). */
size_t peer_frame_encode(const struct peer_frame *frame, uint8_t *into);

#endif
