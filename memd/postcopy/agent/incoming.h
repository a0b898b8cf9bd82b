/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that comes here: the destination's half of a migration.
 *
 * Theory of operation
 * -------------------
 * incoming_expect makes every page of the guest `remote`: missing, and registered, so that whoever
 * touches one waits in a fault. What then happens to a page is
 *
 *   remote -> requested   somebody waits for it: the fault handler has asked for it (WANT). Still
 *                         remote, with a flag
 *   remote -> private     its bytes came and were placed, all at once, by UFFDIO_COPY
 *   remote -> absent      the source says that there are none
 *   remote -> absent      the guest or its VMM gave it up meanwhile (a discard)
 *
 * and each of these happens under the block's lock. So bytes that are on their way when a page is
 * discarded find it absent, and are dropped: a page that was given up reads as zeros for ever
 * after, whatever comes. The same holds for what comes twice.
 *
 * Two connections. *urgent* is read and written by the fault handler's own thread (it is the
 * handler's side, fault.h): fault, request, answer, placement, one thread. *bulk* has a thread of
 * its own, which places 16 pages at most while it holds a lock.
 *
 * Before the final map has come (pre-copy) pages may come again and again, the last one counts; the
 * guest does not run here yet. The map says of every page whether what came is right. Requests
 * wait until then. Behind it nothing is ever overwritten.
 *
 * The end is when no page is remote any more. Then the source is told which pages were placed and
 * the sums of their hashes, and compares. Before that the source gives nothing up.
 *
 * Invariants
 *   - a remote page is missing, its chunk is armed, and nobody disarms it (discard_disarm).
 *   - a page leaves `remote` once; nothing that comes for it afterwards is looked at.
 *   - while there are remote pages no child of the VMM has this RAM (MADV_DONTFORK): a child has
 *     our mappings without our userfaultfd, and would read zeros.
 *
 * It does not promise that the bytes are those that the source's guest had: that is what the proof
 * is for. It does not judge what a broken connection means: it stops, says so, and goes on with the
 * next one, on which it first says what it has.
 */
#ifndef MEMD_POSTCOPY_AGENT_INCOMING_H
#define MEMD_POSTCOPY_AGENT_INCOMING_H

#include <pthread.h>

#include "fault.h"
#include "mover_protocol.h"
#include "proof.h"
#include "regions.h"
#include "stream.h"

/* Requests that wait for the connection. More than that (a cut, many vCPUs): the tables are
 * searched for the flags. */
#define INCOMING_WANTS 1024U
/* Requests that are timed at once. */
#define INCOMING_TIMED     256U
#define INCOMING_OUT_BYTES 8192U

struct incoming_counts {
    uint64_t data, zero, slot, dropped; /* pages */
    uint64_t demand;                    /* requests */
};

struct incoming_timed {
    uint64_t page;
    uint64_t since_ns; /* 0: free */
};

struct incoming {
    struct guest_ram *ram;
    struct fault_handler *handler;
    struct fault_side side;
    struct regions regions;
    struct mover_tuning tuning;
    int news_fd; /* an eventfd: rung when something below is new */
    uint32_t stop;
    pthread_t thread;
    struct stream urgent; /* the fault handler's */
    struct stream bulk;   /* the thread's */

    uint64_t *hashes; /* of each page as it was placed */
    uint64_t *placed; /* bitmap: has a hash */
    uint8_t *contents;
    uint64_t *content_hashes;
    uint64_t *content_here; /* bitmap */
    uint32_t contents_max;

    /* Any thread may read these. */
    uint32_t expecting; /* 1: bulk is read */
    uint32_t mapped;    /* 1: the final map has been applied */
    uint32_t proven;    /* 1: the source has answered, with: */
    int32_t proven_result;
    uint32_t proven_region;
    uint32_t contents_known;          /* the first so many are here */
    uint64_t pages_have, pages_empty; /* of the map */
    struct incoming_counts counts;

    /* The bulk thread's. */
    uint64_t map_at; /* pages that the map has covered */

    /* The handler's thread's. */
    uint64_t wants[INCOMING_WANTS];
    uint32_t wants_from, wants_to; /* modulo 2^32 */
    uint64_t rescan_at;            /* where to look for further requests */
    uint64_t have_at;              /* HAVE is to be said from here on */
    bool have_end_due;
    uint64_t placed_at; /* the same for PLACED */
    bool done_due, done_said;
    uint64_t asked; /* the last page that was asked for (MOVER_NO_PIPELINE) */
    bool is_asked;
    uint8_t out[INCOMING_OUT_BYTES];
    uint32_t out_from, out_to;

    /* `times` is under its lock. */
    uint32_t complete; /* any thread: nothing is remote any more, say DONE */
    uint32_t rescan;   /* any thread: look for requests again */
    struct lock timing;
    struct incoming_timed timed[INCOMING_TIMED];
    struct fault_times times; /* from the fault to the page */
};

/* Room and a thread for a migration to here of the RAM that there is now. `news_fd` is an eventfd
 * of the caller's. 0 or -errno. `incoming`, `ram` and `handler` must outlive incoming_close. */
int incoming_open(struct incoming *incoming, struct guest_ram *ram, struct fault_handler *handler,
                  const struct mover_tuning *tuning, int news_fd);
/* Ends the thread and the connections. Pages that are remote stay so, and who waits for one waits
 * for ever: the VMM is to be ended then. */
void incoming_close(struct incoming *incoming);

/* Makes all RAM remote; what is in it goes. The guest must not run; nobody may scan. 0; -EBUSY: the
 * agent has stood down, or RAM has left; -errno: some of it may be remote, the VMM is to be ended.
 */
int incoming_expect(struct incoming *incoming);

/* The next connection (or none, -1) of a channel. The descriptor is the incoming's from now on. */
void incoming_link(struct incoming *incoming, enum mover_channel channel, int fd, uint32_t epoch);

/* Pages that are remote now. */
uint64_t incoming_remote(const struct incoming *incoming);
/* Pages that are in the proof. */
uint64_t incoming_placed(const struct incoming *incoming);
/* A copy of the times from fault to page. */
struct fault_times incoming_times(struct incoming *incoming);

#endif
