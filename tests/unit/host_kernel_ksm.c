/* SPDX-License-Identifier: Apache-2.0 */
/* The second engine against a directory of plain files: no test here touches the host's ksmd. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernel_ksm.h"
#include "log.h"

#define S 1000000000ULL

static char dir[64];
static int state;
static uint64_t ksmd_cpu_ns;

static void put(const char *name, const char *text)
{
    char path[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", dir, name);
    file = fopen(path, "w");
    fputs(text, file);
    fclose(file);
}

static const char *get(const char *name)
{
    static char text[64];
    char path[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", dir, name);
    file = fopen(path, "r");
    text[0] = '\0';
    if (!fgets(text, sizeof(text), file))
        text[0] = '\0';
    fclose(file);
    text[strcspn(text, "\n")] = '\0';
    return text;
}

static int cpu_of(pid_t pid, uint64_t *ret_ns)
{
    (void)pid;
    *ret_ns = ksmd_cpu_ns;
    return 0;
}

static void set_up(struct kernel_ksm *ksm)
{
    log_setup(LOG_LEVEL_ERROR);
    strcpy(dir, "/tmp/memd-ksm-XXXXXX");
    cr_assert_not_null(mkdtemp(dir));
    state = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    cr_assert_geq(state, 0);
    put("run", "0\n");
    put("pages_to_scan", "123\n");
    put("sleep_millisecs", "77\n");
    put("use_zero_pages", "0\n");
    put("advisor_mode", "none [scan-time]\n");
    kernel_ksm_start(ksm, dir, state, 50);
    ksm->cpu_of = cpu_of;
}

static void clean_up(void)
{
    static const char *const files[] = {"run",          "pages_to_scan",  "sleep_millisecs",
                                        "advisor_mode", "use_zero_pages", "kernel-ksm.json"};

    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++)
        unlinkat(state, files[i], 0);
    rmdir(dir);
    close(state);
}

static void must_be_as_found(void)
{
    cr_assert_str_eq(get("run"), "0");
    cr_assert_str_eq(get("pages_to_scan"), "123");
    cr_assert_str_eq(get("sleep_millisecs"), "77");
    cr_assert_str_eq(get("advisor_mode"), "scan-time");
}

Test(host_kernel_ksm, ksmd_runs_only_while_a_guest_needs_it)
{
    struct kernel_ksm ksm;

    set_up(&ksm);
    cr_assert(ksm.available);
    cr_assert_str_eq(get("run"), "0");
    cr_assert_eq(kernel_ksm_add(&ksm, S), 0);
    cr_assert_eq(kernel_ksm_add(&ksm, S), 0);
    cr_assert_str_eq(get("run"), "1");
    cr_assert_str_eq(get("advisor_mode"), "none");
    kernel_ksm_remove(&ksm, 2 * S);
    cr_assert_str_eq(get("run"), "1");
    kernel_ksm_remove(&ksm, 2 * S);
    must_be_as_found();
    clean_up();
}

Test(host_kernel_ksm, found_settings_come_back_when_memd_stops)
{
    struct kernel_ksm ksm;

    set_up(&ksm);
    cr_assert_eq(kernel_ksm_add(&ksm, S), 0);
    kernel_ksm_stop(&ksm);
    must_be_as_found();
    clean_up();
}

Test(host_kernel_ksm, found_settings_come_back_after_a_kill)
{
    struct kernel_ksm ksm, next;

    set_up(&ksm);
    cr_assert_eq(kernel_ksm_add(&ksm, S), 0);
    kernel_ksm_start(&next, dir, state, 50); /* the first one was killed */
    must_be_as_found();
    cr_assert_eq(kernel_ksm_add(&next, S), 0);
    kernel_ksm_start(&ksm, dir, state, 50);
    must_be_as_found();
    clean_up();
}

Test(host_kernel_ksm, pages_to_scan_follow_the_cpu_that_ksmd_used)
{
    struct kernel_ksm ksm;
    uint64_t now = S, before;

    set_up(&ksm);
    ksmd_cpu_ns = 0;
    cr_assert_eq(kernel_ksm_add(&ksm, now), 0);
    before = ksm.pages_to_scan;
    ksmd_cpu_ns += S; /* a whole core, twice what it may have */
    kernel_ksm_tick(&ksm, now += S);
    cr_assert_eq(ksm.pages_to_scan, before / 2);
    ksmd_cpu_ns += S / 4;
    kernel_ksm_tick(&ksm, now += S);
    cr_assert_eq(ksm.pages_to_scan, before);
    for (int i = 0; i < 40; i++)
        kernel_ksm_tick(&ksm, now += S); /* no CPU at all: more, but with a limit */
    cr_assert_leq(ksm.pages_to_scan, 100000);
    cr_assert_eq(strtoull(get("pages_to_scan"), NULL, 10), ksm.pages_to_scan);
    cr_assert_eq(ksm.cpu_ns, S + S / 4);
    clean_up();
}

Test(host_kernel_ksm, a_kernel_without_ksm_says_so)
{
    struct kernel_ksm ksm;

    log_setup(LOG_LEVEL_ERROR);
    kernel_ksm_start(&ksm, "/nowhere/ksm", -1, 50);
    cr_assert_not(ksm.available);
    cr_assert_not_null(strstr(ksm.reason, "/nowhere/ksm/run"));
    cr_assert_eq(kernel_ksm_add(&ksm, S), -ENOSYS);
}
