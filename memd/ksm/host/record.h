/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a trust domain must still know after memd was killed: its session, its secret and which
 * files its segments are. One text file a domain, 0600, appended to before a segment is given out:
 *
 *     memd-domain 1 BOOT-ID SESSION SECRET
 *     + SEGMENT PAGES DEVICE INODE
 *     - SEGMENT
 *
 * A record of another boot is void: no memfd survives that, and inode numbers start again. The file
 * is not synced: it has to survive memd, not the host.
 */
#ifndef MEMD_KSM_RECORD_H
#define MEMD_KSM_RECORD_H

#include "hash.h"

struct ksm_record_segment {
    uint32_t segment, pages;
    uint64_t device, inode;
};

struct ksm_record {
    int fd; /* -1: nothing is kept */
    int dir;
    char file[160];
    struct ksm_record_segment *segments; /* those that were there at the start */
    size_t segment_count;
};

/* Opens or makes the record of this name in dir (-1: keeps nothing). Session and secret are the
 * recorded ones, or new random ones; *ret_found says which. */
int ksm_record_start(struct ksm_record *record, int dir, const char *name, uint64_t *ret_session,
                     struct hash_secret *ret_secret, bool *ret_found);
void ksm_record_stop(struct ksm_record *record, bool forget);

/* Before the segment is given to anybody. */
int ksm_record_add(struct ksm_record *record, const struct ksm_record_segment *segment);
int ksm_record_remove(struct ksm_record *record, uint32_t segment);

/* The recorded segment of this id that was there at the start, or NULL. */
const struct ksm_record_segment *ksm_record_find(const struct ksm_record *record, uint32_t segment);

#endif
