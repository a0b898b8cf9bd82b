/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memctl doctor: looks at this host, and for each problem says what it costs and what mends it.
 *
 * What can be tried is tried, on a few pages of our own: a version number or a device node proves
 * little. Nothing on the host is changed.
 *
 * A check is a function and a line in `checks`.
 */
#include <assert.h>
#include <stdarg.h>
#include <stdio.h>

#include "doctor.h"

static const struct {
    const char *name;
    void (*look)(const struct ctl_arguments *arguments, struct finding *ret_finding);
} checks[] = {
    {"kernel", ctl_doctor_kernel},
    {"userfaultfd", ctl_doctor_userfaultfd},
    {"/dev/userfaultfd", ctl_doctor_device},
    {"userfaultfd features", ctl_doctor_features},
    {"UFFDIO_MOVE", ctl_doctor_move},
    {"PAGEMAP_SCAN", ctl_doctor_scan},
    {"swap", ctl_doctor_swap},
    {"io_uring", ctl_doctor_io_uring},
    {"/dev/kvm", ctl_doctor_kvm},
    {"vm.max_map_count", ctl_doctor_map_count},
    {"vm.overcommit_memory", ctl_doctor_commit},
    {"KSM", ctl_doctor_ksm},
    {"PSI", ctl_doctor_pressure},
    {"huge pages", ctl_doctor_huge_pages},
    {"cgroups", ctl_doctor_cgroup},
    {"/dev/shm", ctl_doctor_shm},
    {"memd", ctl_doctor_memd},
};

#define CHECKS (sizeof(checks) / sizeof(checks[0]))

static const char *const status_names[] = {"ok", "note", "problem", "unknown"};
static_assert(sizeof(status_names) / sizeof(status_names[0]) == FINDING_COUNT,
              "each status has a name");

void ctl_finding_set(struct finding *finding, enum finding_status status, const char *format, ...)
{
    va_list arguments;

    finding->status = status;
    va_start(arguments, format);
    vsnprintf(finding->found, sizeof(finding->found), format, arguments);
    va_end(arguments);
}

/* Of several checks that fail alike the first one is enough. */
static bool is_said(const struct finding findings[CHECKS], size_t index)
{
    for (size_t i = 0; i < index; i++) {
        if (findings[i].mend == findings[index].mend && findings[i].cost == findings[index].cost &&
            findings[i].status == findings[index].status)
            return true;
    }
    return false;
}

static void print_remedies(const struct finding findings[CHECKS])
{
    for (size_t i = 0; i < CHECKS; i++) {
        if (findings[i].status == FINDING_OK || is_said(findings, i))
            continue;
        printf("\n%s: %s\n  costs   %s\n  mend    %s\n", checks[i].name, findings[i].found,
               findings[i].cost, findings[i].mend);
    }
}

static bool has(const struct finding findings[CHECKS], enum finding_status status)
{
    for (size_t i = 0; i < CHECKS; i++) {
        if (findings[i].status == status)
            return true;
    }
    return false;
}

static const char *verdict(const struct finding findings[CHECKS])
{
    if (has(findings, FINDING_PROBLEM))
        return "memd can't share in full on this host: see the problems above.";
    if (has(findings, FINDING_UNKNOWN))
        return "Not all of it could be tried as this user: run 'memctl doctor' as root.";
    return "memd can share in full on this host.";
}

static void print_findings(const struct finding findings[CHECKS])
{
    static const char *const headings[] = {"CHECK", "", "FOUND"};
    struct ctl_table *table = ctl_table_new(headings, 3);

    for (size_t i = 0; i < CHECKS; i++) {
        ctl_table_add(table, "%s", checks[i].name);
        ctl_table_add(table, "%s", status_names[findings[i].status]);
        ctl_table_add(table, "%s", findings[i].found);
    }
    ctl_table_print(table, 0);
    print_remedies(findings);
    printf("\n%s\n", verdict(findings));
}

static void print_findings_json(const struct finding findings[CHECKS], bool full)
{
    json_t *array = json_array(), *object;

    for (size_t i = 0; i < CHECKS; i++) {
        const struct finding *finding = &findings[i];
        bool ok = finding->status == FINDING_OK;

        json_array_append_new(array, json_pack("{s:s, s:s, s:s, s:s, s:s}", "check", checks[i].name,
                                               "status", status_names[finding->status], "found",
                                               finding->found, "cost", ok ? "" : finding->cost,
                                               "mend", ok ? "" : finding->mend));
    }
    object = json_pack("{s:b, s:o}", "full_sharing", full, "checks", array);
    ctl_print_json(object);
    json_decref(object);
}

enum ctl_status ctl_doctor_run(const struct ctl_arguments *arguments)
{
    struct finding findings[CHECKS];
    bool full;

    for (size_t i = 0; i < CHECKS; i++) {
        findings[i] = (struct finding){.cost = "", .mend = ""};
        checks[i].look(arguments, &findings[i]);
    }
    full = !has(findings, FINDING_PROBLEM) && !has(findings, FINDING_UNKNOWN);
    if (arguments->json)
        print_findings_json(findings, full);
    else
        print_findings(findings);
    return full ? CTL_DONE : CTL_FAILED;
}
