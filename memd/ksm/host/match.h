/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Matching: what memd does with each ring entry of an agent.
 *
 * Each handler returns 0, or -EPROTO when the entry contradicts what memd knows (a page that was
 * never announced, the end of a share that does not exist): the agent lies, or is broken, and
 * loses its session. What can be explained by messages that crossed is no lie.
 */
#ifndef MEMD_KSM_MATCH_H
#define MEMD_KSM_MATCH_H

#include "member.h"

/* An offer with this hash is in the ring, and is to be taken after some others, or soon: memory
 * that it needs is fetched into the cache. Changes nothing. */
void ksm_match_expect(const struct ksm_member *member, uint64_t hash, bool soon);

int ksm_match_offer(struct ksm_member *member, uint32_t page, uint64_t hash);
/* content: 4096 bytes that the agent may still be writing to. */
int ksm_match_page(struct ksm_member *member, uint32_t page, const void *content);
int ksm_match_stale(struct ksm_member *member, uint32_t page);
int ksm_match_merged(struct ksm_member *member, uint32_t page, uint32_t slot);
int ksm_match_not_merged(struct ksm_member *member, uint32_t page, uint32_t slot,
                         enum not_merged reason);
int ksm_match_broken(struct ksm_member *member, uint32_t page, uint32_t slot);
int ksm_match_have(struct ksm_member *member, uint32_t page, uint32_t slot);
void ksm_match_pass(struct ksm_member *member);

/* A page in state UNKNOWN has content of this tag (and hash, where the whole of it is known; else
 * the tag): finds somebody to share it with, or remembers it. */
void ksm_match_content(struct ksm_member *member, uint32_t page, uint32_t tag, uint64_t hash);
/* Is there a slot with content of this tag that takes one more user? */
bool ksm_match_finds_slot(const struct trust_domain *domain, uint32_t tag);
/* Remembers that a page in state UNKNOWN has content of this tag: HINT, or SPARE. */
void ksm_match_keep(struct trust_domain *domain, uint32_t ref, uint32_t tag);
/* Tells a page in state UNKNOWN to share a slot. What can't be sent is remembered instead. */
void ksm_match_merge(struct trust_domain *domain, uint32_t ref, uint32_t slot, uint32_t tag);

#endif
