/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compaction: a segment that few use still costs all of its pages, and many small segments cost
 * each agent a descriptor and the kernel a mapping. What is still used of them is copied, from
 * memd's own descriptors, into one new segment; the users are told to move over (REMAP), and the
 * old segments retire when nobody uses them any more.
 *
 * One compaction at a time and domain: choose, copy, then sweep the members' page tables for users,
 * all in bounded steps. Whoever can't move (REMAP answered by NOT_MERGED) keeps the old segment
 * alive, and is asked again by a later sweep.
 */
#ifndef MEMD_KSM_COMPACT_H
#define MEMD_KSM_COMPACT_H

#include "trust_domain.h"

struct ksm_compact;

/* Looks whether there is something to do and starts it. Cheap: once a second. */
void ksm_compact_consider(struct trust_domain *domain);
/* Stops whatever goes on; segments stay as they are. */
void ksm_compact_stop(struct trust_domain *domain);

#endif
