/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Counts contents, exactly. Two pages are one content when all of their bytes are equal; a hash
 * only says where to look.
 *
 * It counts at three granularities at once: pages, and aligned units of 64 KiB and of 2 MiB. Units
 * begin at the beginning of each source; the last one of a source is taken as if zeros followed.
 */
#ifndef MEMD_CTL_ANALYZE_COUNT_H
#define MEMD_CTL_ANALYZE_COUNT_H

#include "analyze_source.h"
#include "units.h"

enum { ANALYZE_PAGES, ANALYZE_64K, ANALYZE_2M, ANALYZE_LEVELS };

/* Bytes of a unit of each level. */
extern const uint64_t ctl_analyze_unit_bytes[ANALYZE_LEVELS];

/* Units of one level, of one source, one domain or of all. */
struct analyze_counts {
    uint64_t units;            /* counted: those that did not change */
    uint64_t zero;             /* all of whose bytes are 0 */
    uint64_t unique;           /* distinct contents among the others */
    uint64_t intra;            /* duplicates within their own source */
    uint64_t common;           /* of `unique`: contents that several sources hold. Of a source:
                                  those of its contents that another source holds, too */
    uint64_t compressed_bytes; /* distinct contents, LZ4 page by page; zero pages cost nothing */
    uint64_t changed;          /* left out, because they differ from the earlier dump */
};

/* What is not a source's but a choice of the user's. */
struct analyze_options {
    uint32_t domains;    /* sources' domains are below this; 0: none */
    bool no_compression; /* compressed_bytes stay 0 */
};

struct analyze_result {
    struct analyze_counts all[ANALYZE_LEVELS];
    struct analyze_counts (*sources)[ANALYZE_LEVELS]; /* one for each source */
    /* One for each domain, `common` not counted; NULL without domains. */
    struct analyze_counts (*domains)[ANALYZE_LEVELS];
};

/* Fills *ret_result, to be freed with ctl_analyze_result_free(). -ENOMEM; -E2BIG beyond 2^32 - 1
 * pages in all; -EIO when a source has shrunk, or another error of reading it. With domains each
 * source has one. */
int ctl_analyze_count(const struct analyze_source *sources, size_t count,
                      const struct analyze_options *options, struct analyze_result *ret_result);

void ctl_analyze_result_free(struct analyze_result *result);

#endif
