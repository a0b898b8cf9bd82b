/* SPDX-License-Identifier: Apache-2.0 */
/* The exact counter once more, built with a hash that is the same for every content. */
#ifndef MEMD_TESTS_CTL_COLLIDE_H
#define MEMD_TESTS_CTL_COLLIDE_H

#include "analyze_count.h"

int collide_analyze_count(const struct analyze_source *sources, size_t count,
                          const struct analyze_options *options, struct analyze_result *ret_result);
void collide_analyze_result_free(struct analyze_result *result);

#endif
