/* SPDX-License-Identifier: Apache-2.0 */
/* What analyze says about its counts: a table, JSON, CSV, and a chart (analyze_svg.c). */
#ifndef MEMD_CTL_ANALYZE_REPORT_H
#define MEMD_CTL_ANALYZE_REPORT_H

#include <stdio.h>

#include "analyze_count.h"

/* Everything is borrowed. */
struct analyze_report {
    const struct analyze_source *sources;
    size_t source_count;
    const char *const *domain_names; /* NULL: nobody asked for domains */
    const struct analyze_options *options;
    const struct analyze_result *result;
};

/* What can be saved among sources that share in one of three ways. One zero page is enough for
 * everybody in each of them: it says nothing about anybody. */
enum { WHAT_IF_ONE_DOMAIN, WHAT_IF_THESE_DOMAINS, WHAT_IF_EACH_ALONE, WHAT_IFS };
struct analyze_what_if {
    uint64_t kept; /* units */
    uint64_t saved_bytes;
    double ratio;
};

/* Without domains there is nothing to be said of WHAT_IF_THESE_DOMAINS. */
struct analyze_what_if ctl_analyze_what_if(const struct analyze_report *report, int which, int way);

/* Figures that follow from counts. */
uint64_t ctl_analyze_duplicates(const struct analyze_counts *counts);
uint64_t ctl_analyze_kept(const struct analyze_counts *counts);

/* To standard output. */
void ctl_analyze_print_table(const struct analyze_report *report);
void ctl_analyze_print_json(const struct analyze_report *report);

/* To a file; what could not be written shows in ferror(). */
void ctl_analyze_write_csv(const struct analyze_report *report, FILE *file);
void ctl_analyze_write_svg(const struct analyze_report *report, FILE *file);

#endif
