/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that leaves: the source's half of a migration.
 *
 * Theory of operation
 * -------------------
 * Two threads. *bulk* sends passes while the guest runs here (pre-copy), the final map when it has
 * stopped, and then pushes every page that the map calls remote, once. *urgent* reads what the
 * destination says, and answers each request at once, whatever bulk is doing; an answer is neither
 * queued behind bulk's bytes nor held back by the bandwidth limit.
 *
 * The map makes three kinds of pages: right at the destination already, empty, and *pending*. Who
 * sends a pending page takes its bit first, so that it is sent once. A page that is asked for is
 * sent whether its bit is there or not: it may be on its way, but behind much else.
 *
 * The pusher follows the faults: it goes on where the last request was. Requests at a steady
 * stride (1 is a sequence) are answered ahead of their being made, up to 16 pages.
 *
 * While the guest stands still the push may be told to wait: CPU and link are for the switch-over
 * then, and for the pages that the destination's VMM asks for while it loads.
 *
 * After a cut nothing is assumed of what was sent: the destination says what it has (HAVE), and the
 * rest becomes pending again. Until all of that was heard nothing is pushed.
 *
 * Nothing is given up here: the guest's memory stays as it is until the VMM ends.
 *
 * It does not promise that what was sent has arrived; that is what the proof is for, which compares
 * the hash of every page as it was sent last with what the destination has placed.
 */
#ifndef MEMD_POSTCOPY_AGENT_OUTGOING_H
#define MEMD_POSTCOPY_AGENT_OUTGOING_H

#include <pthread.h>

#include "mover_protocol.h"
#include "passes.h"
#include "proof.h"
#include "slots.h"
#include "stream.h"

/* Frames, and contents among them, that are handed to the kernel at once. */
#define OUTGOING_FRAMES   64U
#define OUTGOING_CONTENTS 16U
#define OUTGOING_HINTS    64U
/* Places in the guest whose faults follow a stride of their own (vCPUs, mostly). */
#define OUTGOING_STRIDES 8U

enum outgoing_task {
    OUTGOING_REST = 0,
    OUTGOING_PASS = 1, /* pre-copy */
    OUTGOING_MAP = 2,  /* stop, and write the final map */
    OUTGOING_PUSH = 3, /* what it says is remote */
};

struct outgoing_counts {
    uint64_t data, zero, slot, resent; /* pages sent */
    uint64_t demand;                   /* requests answered */
};

/* Frames on their way into one connection, with bytes of at most one block. */
struct outgoing_batch {
    struct iovec parts[2 * OUTGOING_FRAMES];
    uint32_t part_count, frame_count, content_count;
    struct ram_block *block;
    uint64_t bytes;
    uint8_t headers[OUTGOING_FRAMES][WIRE_HEADER_BYTES + 4 * WIRE_DATA_MAX];
    uint8_t (*contents)[PAGE_BYTES]; /* OUTGOING_CONTENTS of them; bulk only */
};

struct outgoing_stride {
    bool used;
    uint64_t last; /* the page that was asked for last */
    int64_t step;
    uint32_t ahead; /* pages that were answered beyond it */
    uint32_t window;
};

struct outgoing {
    struct guest_ram *ram;
    struct regions regions;
    struct passes passes;
    struct slots slots;
    int news_fd; /* an eventfd: rung when something below is new */
    uint32_t stop;
    uint32_t switches;  /* MOVER_NO_... */
    uint64_t bandwidth; /* any thread sets it */
    pthread_t urgent_thread, bulk_thread;
    uint32_t urgent_tid;
    struct stream urgent, bulk;

    uint64_t *sent;    /* bitmap, see passes.h */
    uint64_t *pending; /* bitmap */
    uint64_t *hashes;  /* of each page as it was sent last; 0: never */
    uint64_t *placed;  /* bitmap: what the destination says it has placed */

    uint32_t task;       /* enum outgoing_task: set by any thread, MAP to PUSH by bulk */
    uint32_t push_epoch; /* bulk may push on connections of this epoch; 0: on none */
    uint32_t pushing;    /* bulk is in the middle of it */
    uint32_t push_waits; /* for outgoing_release(): only what is asked for is sent */
    int32_t map_result;  /* -EINPROGRESS while the map is being made, else 0 or -errno */

    /* Any thread may read these. */
    struct outgoing_counts counts;
    uint32_t pass; /* being sent */
    uint32_t passes_ended;
    uint64_t pass_dirty; /* pages that the last pass found */
    uint64_t dirty_rate; /* pages a second */
    uint32_t all_pushed; /* nothing was pending any more when it was looked last */
    uint32_t proven;     /* 1: the sums were compared, with: */
    int32_t proven_result;
    uint32_t proven_region;
    uint64_t proven_pages;

    /* Urgent to bulk: where faults are, and (MOVER_NO_URGENT) what they wait for. */
    uint64_t hints[OUTGOING_HINTS];
    uint32_t hint_head; /* modulo 2^32 */

    /* Urgent's. */
    struct outgoing_batch urgent_batch;
    struct outgoing_stride strides[OUTGOING_STRIDES];
    uint32_t stride_next;
    struct outgoing_stride *plan; /* what to send ahead when all requests are answered */

    /* Bulk's. */
    struct outgoing_batch bulk_batch;
    uint32_t hint_tail;
    uint64_t cursor;
    uint64_t detour_at, detour_end; /* the neighbourhood of a fault */
    uint64_t pass_began_ns;
    uint64_t paid_until_ns; /* of the bandwidth limit */
};

/* Room and threads for a migration from here of the RAM that there is now. `news_fd` is an eventfd
 * of the caller's; `log` may be NULL. 0 or -errno; -EBUSY: some of it has not come here yet. */
int outgoing_open(struct outgoing *outgoing, struct guest_ram *ram,
                  const struct mover_tuning *tuning, int news_fd, const struct passes_log *log);
/* Ends threads, connections and tracking; the guest is as it was. */
void outgoing_close(struct outgoing *outgoing);

/* The next connection (or none, -1) of a channel. The descriptor is the outgoing's from now on. */
void outgoing_link(struct outgoing *outgoing, enum mover_channel channel, int fd, uint32_t epoch);

void outgoing_tune(struct outgoing *outgoing, const struct mover_tuning *tuning);

/* Begins to send pass after pass. Nobody may scan or merge from now on. */
void outgoing_precopy(struct outgoing *outgoing);

/* The guest has stopped: begins to write the final map; the push follows by itself, unless it is to
 * `hold` until outgoing_release(). It does not wait: news is rung when it is done. */
void outgoing_stop(struct outgoing *outgoing, bool hold);
void outgoing_release(struct outgoing *outgoing);
/* 0; -EINPROGRESS: not done yet; -errno: the connection broke, and what the destination knows is
 * not known. */
int outgoing_stopped(const struct outgoing *outgoing);

/* Pages that are to be sent. */
uint64_t outgoing_pending(const struct outgoing *outgoing);

#endif
