/* SPDX-License-Identifier: Apache-2.0 */
#include "procfs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NS_PER_S 1000000000ULL

int procfs_text(const char *path, char *text, size_t bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got;

    if (fd < 0)
        return -errno;
    got = read(fd, text, bytes - 1);
    close(fd);
    if (got < 0)
        return -EIO;
    text[got] = '\0';
    return 0;
}

/* The name in field 2 may contain anything. */
int procfs_stat_field(pid_t pid, int number, uint64_t *ret_value)
{
    char path[64], text[1024], *at;
    int result;

    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    result = procfs_text(path, text, sizeof(text));
    if (result)
        return result;
    at = strrchr(text, ')');
    for (int field = 2; at && field < number; field++)
        at = strchr(at + 1, ' ');
    if (!at)
        return -EIO;
    *ret_value = strtoull(at + 1, NULL, 10);
    return 0;
}

int procfs_process_cpu_ns(pid_t pid, uint64_t *ret_ns)
{
    uint64_t user, system;
    int result = procfs_stat_field(pid, 14, &user);

    if (!result)
        result = procfs_stat_field(pid, 15, &system);
    if (!result)
        *ret_ns = (user + system) * (NS_PER_S / (uint64_t)sysconf(_SC_CLK_TCK));
    return result;
}

uint64_t procfs_number_in(const char *text, const char *name)
{
    size_t length = strlen(name);

    while (text && *text) {
        if (strncmp(text, name, length) == 0 && strchr(": \t", text[length]) && text[length])
            return strtoull(text + length + strspn(text + length, ": \t"), NULL, 10);
        text = strchr(text, '\n');
        if (text)
            text++;
    }
    return 0;
}

int procfs_field(const char *path, const char *name, uint64_t *ret_value)
{
    char text[4096] = "";
    int result = procfs_text(path, text, sizeof(text));

    if (!result)
        *ret_value = procfs_number_in(text, name);
    return result;
}

static bool is_named(const char *pid, const char *name)
{
    char path[300], text[64];

    snprintf(path, sizeof(path), "/proc/%s/comm", pid);
    return procfs_text(path, text, sizeof(text)) == 0 && strncmp(text, name, strlen(name)) == 0 &&
           text[strlen(name)] == '\n';
}

pid_t procfs_find_kernel_thread(const char *name)
{
    DIR *proc = opendir("/proc");
    const struct dirent *entry;
    pid_t found = 0;
    uint64_t parent;

    while (proc && !found && (entry = readdir(proc))) {
        pid_t pid = (pid_t)atoi(entry->d_name);

        /* Kernel threads are children of kthreadd; anybody may call himself ksmd. */
        if (pid > 0 && is_named(entry->d_name, name) && procfs_stat_field(pid, 4, &parent) == 0 &&
            parent == 2)
            found = pid;
    }
    if (proc)
        closedir(proc);
    return found;
}

uint64_t procfs_host_memory_bytes(void)
{
    uint64_t kib = 0;

    return procfs_field("/proc/meminfo", "MemTotal", &kib) ? 0 : kib * 1024;
}
