/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a migration proves its end. Each side keeps a 64-bit hash of each page: the source of what it
 * sent last, the destination of the bytes that it placed. At the end the destination says which
 * pages it has placed and the sum of their hashes by region; the source adds up its own.
 *
 * The hash says where a page belongs as well as what it holds: right bytes in the wrong place
 * change the sum. It guards against our own mistakes and a transport that lies by accident; the
 * peer itself is who it says it is because of TLS.
 */
#ifndef MEMD_POSTCOPY_AGENT_PROOF_H
#define MEMD_POSTCOPY_AGENT_PROOF_H

#include "regions.h"

/* Of 4096 bytes, anywhere. */
uint64_t proof_content(const void *bytes);

/* Of a page that holds nothing. */
#define PROOF_EMPTY 0x6d656d6420656d70ULL

/* Of this content in this page. */
uint64_t proof_page(uint64_t content, uint64_t page);

/* The sum of `hashes` over the pages of the region that are in `placed`; how many in *ret_pages. */
uint64_t proof_sum(const struct region *region, const uint64_t *placed, const uint64_t *hashes,
                   uint64_t *ret_pages);

#endif
