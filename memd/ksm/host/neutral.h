/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Neutral content: the 4 KiB pages of files that the operator named (an OS image, a kernel), whose
 * content every guest of the domain may learn that another one has. In such a domain nothing else
 * is shared, since who measures how long a write takes can tell a shared page from a private one.
 *
 * What is kept is a sorted list of the pages' 64-bit hashes under the domain's secret. Files are
 * read in bounded turns; until they are read through nothing counts as neutral.
 */
#ifndef MEMD_KSM_NEUTRAL_H
#define MEMD_KSM_NEUTRAL_H

#include "hash.h"
#include "loop.h"

struct ksm_neutral;

/* paths are copied. ret_neutral is ready for use at once, and complete some turns later. Files that
 * can't be read are named in the log, and are not neutral. */
int ksm_neutral_start(struct loop *loop, const struct hash_secret *secret, char *const *paths,
                      size_t path_count, struct ksm_neutral **ret_neutral);
void ksm_neutral_stop(struct ksm_neutral *neutral);

bool ksm_neutral_has(const struct ksm_neutral *neutral, uint64_t hash);

#endif
