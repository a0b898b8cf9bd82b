/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page wire: what the agents of source and destination say to each other, on two stream
 * connections that their movers have made.
 *
 * A stream is a sequence of frames: a header of 16 bytes, then a payload whose size follows from
 * the header. All numbers are little-endian. Page numbers run over all regions laid end to end.
 *
 * Source to destination
 *   bulk, while the guest runs at the source (pre-copy):  DATA, CONTENT, REF, PASS
 *   bulk, at the stop:  MAP..., MAP_END. The runs of all MAP frames cover every page once and in
 *     order: what was sent before is right (HAVE), or is still to come (REMOTE), or there is
 *     nothing (EMPTY: zeros)
 *   bulk and urgent, then:  DATA, ZERO, CONTENT (bulk only), REF (bulk only), NOTHING_LEFT (bulk:
 *     everything has been sent once)
 *   urgent:  PROVEN, the answer to DONE
 * Destination to source, on urgent
 *   WANT; after a reconnect HAVE..., HAVE_END; at the end PLACED..., DONE
 *
 * After MAP_END a page is sent for good: the guest does not run at the source. A page may come
 * twice (on both channels, or again after a cut); the destination takes the first and drops the
 * others. CONTENT is a content that several pages have, and its number, which never means another
 * one; REF says that a page is that content.
 *
 * Every frame is checked against the table in wire.c before a byte of its payload is looked at:
 * type, direction, channel, count, bounds. Anything else ends the link.
 */
#ifndef MEMD_POSTCOPY_COMMON_WIRE_H
#define MEMD_POSTCOPY_COMMON_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WIRE_HEADER_BYTES 16U
#define WIRE_PAGE_BYTES   4096U

#define WIRE_DATA_MAX 16U        /* pages of a DATA frame */
#define WIRE_RUN_MAX  (1U << 24) /* pages of a ZERO frame */
#define WIRE_REF_MAX  64U        /* pages of a REF frame */
#define WIRE_MAP_MAX  1024U      /* runs of a MAP frame */
#define WIRE_BITS_MAX 32768U     /* pages of a HAVE or PLACED frame; a multiple of 64 */
#define WIRE_SUMS_MAX 64U        /* regions of a DONE frame */

/* The longest frame: a full DATA. */
#define WIRE_FRAME_MAX (WIRE_HEADER_BYTES + WIRE_DATA_MAX * WIRE_PAGE_BYTES)

enum wire_type {
    /* source to destination */
    WIRE_DATA = 1,         /* pages page, page + 1, ...; count x 4096 bytes */
    WIRE_ZERO = 2,         /* `count` pages from `page` on are zeros; no payload */
    WIRE_CONTENT = 3,      /* content number `page`; count 1; 4096 bytes */
    WIRE_REF = 4,          /* count pages from `page` on; a u32 each: its content */
    WIRE_PASS = 5,         /* end of pre-copy pass `count` */
    WIRE_MAP = 6,          /* count runs, each 16 bytes: u64 page, u32 pages, u32 wire_kind */
    WIRE_MAP_END = 7,      /* page = the number of all pages */
    WIRE_NOTHING_LEFT = 8, /* no payload */
    WIRE_PROVEN = 9,       /* count 0: the sums agree. Else an errno, and page is the region */
    /* destination to source */
    WIRE_WANT = 32,     /* page: a fault waits for it; count 1 */
    WIRE_HAVE = 33,     /* count pages from `page` on (both multiples of 64, but for the last of
                           all): a bit each, set when the page need not be sent (any more) */
    WIRE_HAVE_END = 34, /* page = how many contents, from number 0 on, need not be sent again */
    WIRE_PLACED = 35,   /* like HAVE: a bit for each page that is in the sums of DONE */
    WIRE_DONE = 36,     /* count regions; a u64 each: the sum of its placed pages' hashes */
};

enum wire_kind {
    WIRE_KIND_HAVE = 1,
    WIRE_KIND_REMOTE = 2,
    WIRE_KIND_EMPTY = 3,
};

/* Who reads, and from what. */
enum wire_reader {
    WIRE_AT_SOURCE = 1,             /* urgent, from the destination */
    WIRE_AT_DESTINATION_URGENT = 2, /* from the source */
    WIRE_AT_DESTINATION_BULK = 4,
};

struct wire_limits {
    enum wire_reader reader;
    uint64_t pages; /* of all regions */
    uint32_t regions;
    uint32_t contents; /* CONTENTs that this reader takes in all */
};

struct wire_frame {
    uint16_t type;
    uint16_t flags; /* 0 */
    uint32_t count;
    uint64_t page;
};

struct wire_run {
    uint64_t page;
    uint32_t pages;
    uint32_t kind;
};

/*
 * Reads the header at `bytes` (WIRE_HEADER_BYTES of them). 0, the frame and the size of its payload
 * when it is allowed; else -EPROTO, and what is wrong with it in *ret_reason (static storage).
 */
int wire_read_header(const struct wire_limits *limits, const uint8_t *bytes,
                     struct wire_frame *ret_frame, uint32_t *ret_payload_bytes,
                     const char **ret_reason);

/* Writes a header. */
void wire_write_header(uint8_t *bytes, enum wire_type type, uint32_t count, uint64_t page);

/* The i-th run of a MAP frame's payload. 0; -EPROTO: bounds or kind are wrong, or it does not begin
 * at `expected`, where the run before it ended. */
int wire_read_run(const struct wire_limits *limits, const uint8_t *payload, uint32_t i,
                  uint64_t expected, struct wire_run *ret_run, const char **ret_reason);
void wire_write_run(uint8_t *payload, uint32_t i, const struct wire_run *run);

/* Words of HAVE, PLACED and DONE, and the numbers of REF: any alignment. */
uint64_t wire_read_u64(const uint8_t *payload, uint32_t i);
void wire_write_u64(uint8_t *payload, uint32_t i, uint64_t value);
uint32_t wire_read_u32(const uint8_t *payload, uint32_t i);
void wire_write_u32(uint8_t *payload, uint32_t i, uint32_t value);

/* "DATA", ...; static storage. */
const char *wire_type_name(uint32_t type);

#endif
