/* SPDX-License-Identifier: Apache-2.0 */
#include "kernel_ksm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "log.h"
#include "procfs.h"
#include "state.h"

#define FOUND_FILE     "kernel-ksm.json"
#define SLEEP_MS       20U
#define PAGES_AT_FIRST 1000U
#define PAGES_LEAST    100U
#define PAGES_MOST     100000U

/* What is saved and put back, in the order in which it is put back: run last, when the rest is. */
static const char *const settings[] = {"advisor_mode", "sleep_millisecs", "pages_to_scan",
                                       "use_zero_pages", "run"};
#define SETTING_COUNT (sizeof(settings) / sizeof(settings[0]))

/* ---- the files ---- */

static int read_setting(const struct kernel_ksm *ksm, const char *name, char *text, size_t bytes)
{
    char path[256];
    ssize_t got;
    int fd;

    snprintf(path, sizeof(path), "%s/%s", ksm->sysfs, name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    got = read(fd, text, bytes - 1);
    close(fd);
    if (got < 0)
        return -EIO;
    text[got] = '\0';
    text[strcspn(text, "\n")] = '\0';
    return 0;
}

static int write_setting(const struct kernel_ksm *ksm, const char *name, const char *text)
{
    char path[256];
    ssize_t wrote;
    int fd;

    snprintf(path, sizeof(path), "%s/%s", ksm->sysfs, name);
    fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    wrote = write(fd, text, strlen(text));
    close(fd);
    return wrote == (ssize_t)strlen(text) ? 0 : -EINVAL;
}

static int write_number(const struct kernel_ksm *ksm, const char *name, uint64_t number)
{
    char text[32];

    snprintf(text, sizeof(text), "%llu", (unsigned long long)number);
    return write_setting(ksm, name, text);
}

static uint64_t read_number(const struct kernel_ksm *ksm, const char *name)
{
    char text[64];

    return read_setting(ksm, name, text, sizeof(text)) ? 0 : strtoull(text, NULL, 10);
}

/* advisor_mode reads as "[none] scan-time": the word in brackets is what holds. */
static void take_chosen(char *text)
{
    char *open = strchr(text, '['), *close = strchr(text, ']');

    if (open && close && close > open) {
        *close = '\0';
        memmove(text, open + 1, strlen(open + 1) + 1);
    }
}

/* ---- found settings ---- */

static int save_found(const struct kernel_ksm *ksm)
{
    json_t *found = json_object();
    char text[64];
    int result;

    for (size_t i = 0; i < SETTING_COUNT; i++) {
        if (read_setting(ksm, settings[i], text, sizeof(text)))
            continue; /* younger than this kernel */
        take_chosen(text);
        json_object_set_new(found, settings[i], json_string(text));
    }
    result = state_write(ksm->state_dir, FOUND_FILE, found, false);
    json_decref(found);
    return result;
}

static void restore_found(struct kernel_ksm *ksm)
{
    json_t *found = state_read(ksm->state_dir, FOUND_FILE);

    if (!found)
        return;
    for (size_t i = 0; i < SETTING_COUNT; i++) {
        const char *text = json_string_value(json_object_get(found, settings[i]));
        int result = text ? write_setting(ksm, settings[i], text) : 0;

        if (result)
            log_warning("kernel KSM: %s can't be put back to '%s': %s", settings[i], text,
                        strerror(-result));
    }
    json_decref(found);
    unlinkat(ksm->state_dir, FOUND_FILE, 0);
}

/* ---- on and off ---- */

void kernel_ksm_start(struct kernel_ksm *ksm, const char *sysfs, int state_dir,
                      uint32_t cpu_percent)
{
    char text[64];
    int result;

    *ksm = (struct kernel_ksm){
        .state_dir = state_dir, .cpu_percent = cpu_percent, .cpu_of = procfs_process_cpu_ns};
    snprintf(ksm->sysfs, sizeof(ksm->sysfs), "%s", sysfs);
    restore_found(ksm);
    result = read_setting(ksm, "run", text, sizeof(text));
    if (!result)
        result = write_setting(ksm, "run", text);
    ksm->available = result == 0;
    if (result)
        snprintf(ksm->reason, sizeof(ksm->reason), "kernel KSM can't be steered (%s/run: %s)",
                 sysfs, strerror(-result));
}

static int switch_on(struct kernel_ksm *ksm, uint64_t now_ns)
{
    int result = save_found(ksm);

    if (result) {
        snprintf(ksm->reason, sizeof(ksm->reason),
                 "kernel KSM stays as it is: its settings can't be saved (%s)", strerror(-result));
        return result;
    }
    (void)write_setting(ksm, "advisor_mode", "none"); /* 6.8 and later; it would steer against us */
    (void)write_setting(ksm, "use_zero_pages", "1");
    ksm->pages_to_scan = PAGES_AT_FIRST;
    result = write_number(ksm, "sleep_millisecs", SLEEP_MS);
    if (!result)
        result = write_number(ksm, "pages_to_scan", ksm->pages_to_scan);
    if (!result)
        result = write_setting(ksm, "run", "1");
    if (result) {
        snprintf(ksm->reason, sizeof(ksm->reason), "kernel KSM can't be switched on (%s)",
                 strerror(-result));
        restore_found(ksm);
        return result;
    }
    ksm->running = true;
    ksm->ksmd = procfs_find_kernel_thread("ksmd");
    ksm->looked_ns = now_ns;
    if (ksm->cpu_of(ksm->ksmd, &ksm->ksmd_cpu_ns))
        ksm->ksmd_cpu_ns = 0;
    log_notice("kernel KSM is on for guests without an agent, at %u %% of one core",
               ksm->cpu_percent);
    return 0;
}

static void look(struct kernel_ksm *ksm, uint64_t now_ns, double *ret_load)
{
    uint64_t cpu;

    *ret_load = -1;
    if (ksm->cpu_of(ksm->ksmd, &cpu) || cpu < ksm->ksmd_cpu_ns)
        return;
    if (now_ns > ksm->looked_ns)
        *ret_load = (double)(cpu - ksm->ksmd_cpu_ns) / (double)(now_ns - ksm->looked_ns);
    ksm->cpu_ns += cpu - ksm->ksmd_cpu_ns;
    ksm->ksmd_cpu_ns = cpu;
    ksm->looked_ns = now_ns;
}

static void switch_off(struct kernel_ksm *ksm)
{
    ksm->running = false;
    restore_found(ksm);
    log_notice("kernel KSM is as it was found: no guest needs it");
}

int kernel_ksm_add(struct kernel_ksm *ksm, uint64_t now_ns)
{
    int result;

    if (!ksm->available)
        return -ENOSYS;
    if (!ksm->running) {
        result = switch_on(ksm, now_ns);
        if (result)
            return result;
    }
    ksm->guests++;
    return 0;
}

void kernel_ksm_remove(struct kernel_ksm *ksm, uint64_t now_ns)
{
    double load;

    if (!ksm->guests || --ksm->guests)
        return;
    look(ksm, now_ns, &load);
    switch_off(ksm);
}

void kernel_ksm_stop(struct kernel_ksm *ksm)
{
    if (ksm->running)
        switch_off(ksm);
}

/* At most half or double a second: one batch says little about the next one. */
void kernel_ksm_tick(struct kernel_ksm *ksm, uint64_t now_ns)
{
    double load, wanted = ksm->cpu_percent / 100.0, factor;
    uint64_t pages;

    if (!ksm->running)
        return;
    look(ksm, now_ns, &load);
    if (load < 0)
        return;
    factor = load > 0 ? wanted / load : 2;
    factor = factor > 2 ? 2 : factor < 0.5 ? 0.5 : factor;
    pages = (uint64_t)((double)ksm->pages_to_scan * factor);
    pages = pages < PAGES_LEAST ? PAGES_LEAST : pages > PAGES_MOST ? PAGES_MOST : pages;
    if (pages != ksm->pages_to_scan && write_number(ksm, "pages_to_scan", pages) == 0)
        ksm->pages_to_scan = pages;
}

/* ---- figures ---- */

struct kernel_ksm_figures kernel_ksm_figures(const struct kernel_ksm *ksm)
{
    struct kernel_ksm_figures figures = {0, 0, 0};

    if (!ksm->running)
        return figures;
    figures.pages_shared = read_number(ksm, "pages_shared");
    figures.pages_sharing = read_number(ksm, "pages_sharing");
    figures.zero_pages = read_number(ksm, "ksm_zero_pages");
    return figures;
}

void kernel_ksm_of_process(pid_t pid, uint64_t *ret_merged_pages, uint64_t *ret_zero_pages)
{
    char path[64];

    *ret_merged_pages = *ret_zero_pages = 0;
    snprintf(path, sizeof(path), "/proc/%d/ksm_stat", (int)pid);
    if (procfs_field(path, "ksm_merging_pages", ret_merged_pages)) {
        /* Before 6.1 there is only this file, with the bare number. */
        int fd;
        char text[32] = "";

        snprintf(path, sizeof(path), "/proc/%d/ksm_merging_pages", (int)pid);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && read(fd, text, sizeof(text) - 1) > 0)
            *ret_merged_pages = strtoull(text, NULL, 10);
        if (fd >= 0)
            close(fd);
        return;
    }
    (void)procfs_field(path, "ksm_zero_pages", ret_zero_pages);
}
