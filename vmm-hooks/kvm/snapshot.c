/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Save and load. The file: the machine's state (state.c), then RAM at an offset of its own, so that
 * RAM page N is where it can be mapped; pages of zeros are holes.
 */
#include "snapshot.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "hook.h"

static_assert(sizeof(struct machine_state) <= SNAPSHOT_RAM_AT, "it lies in front of RAM");

static int complain(const char *path, int error)
{
    fprintf(stderr, "memvm: %s: %s\n", path,
            error == -ENOEXEC ? "no machine that this memvm has saved" : strerror(-error));
    return error;
}

/* ---- saving ---- */

static bool is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, MEMORY_PAGE_BYTES - 1) == 0;
}

static int write_all(int fd, const void *from, size_t bytes, off_t at)
{
    ssize_t done = pwrite(fd, from, bytes, at);

    if (done < 0)
        return -errno;
    return (size_t)done == bytes ? 0 : -ENOSPC;
}

/* Page by page, as the kernel's page cache would do it anyway. */
static int save_memory(int fd, const struct guest_memory *memory)
{
    int r = ftruncate(fd, (off_t)(SNAPSHOT_RAM_AT + memory->bytes)) < 0 ? -errno : 0;

    for (uint64_t at = 0; r == 0 && at < memory->bytes; at += MEMORY_PAGE_BYTES)
        if (!is_zero(memory->base + at))
            r = write_all(fd, memory->base + at, MEMORY_PAGE_BYTES, (off_t)(SNAPSHOT_RAM_AT + at));
    return r;
}

static int save(struct machine *machine, int fd)
{
    static struct machine_state state;
    int r = state_save(machine, &state);

    if (r == 0)
        r = write_all(fd, &state, state_bytes(machine->cpu_count), 0);
    if (r == 0)
        r = save_memory(fd, &machine->memory);
    return r == 0 && fsync(fd) < 0 ? -errno : r;
}

int snapshot_save(struct machine *machine, const char *path)
{
    char temporary[4096];
    int fd;
    int r;

    if (snprintf(temporary, sizeof(temporary), "%s.new", path) >= (int)sizeof(temporary))
        return complain(path, -ENAMETOOLONG);
    fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return complain(temporary, -errno);
    r = save(machine, fd);
    close(fd);
    if (r == 0 && rename(temporary, path) < 0)
        r = -errno;
    if (r < 0)
        unlink(temporary);
    return r < 0 ? complain(path, r) : 0;
}

/* ---- loading ---- */

/* Holes are not read: untouched memory reads as zeros. */
static int load_memory(int fd, const struct guest_memory *memory)
{
    off_t end = (off_t)(SNAPSHOT_RAM_AT + memory->bytes);
    off_t at = lseek(fd, SNAPSHOT_RAM_AT, SEEK_DATA);

    while (at >= 0 && at < end) {
        off_t hole = lseek(fd, at, SEEK_HOLE), stop = hole < end ? hole : end;

        while (at < stop) {
            ssize_t got =
                pread(fd, memory->base + (at - (off_t)SNAPSHOT_RAM_AT), (size_t)(stop - at), at);

            if (got <= 0)
                return got < 0 ? -errno : -ENOEXEC;
            at += got;
        }
        at = lseek(fd, at, SEEK_DATA);
    }
    return at < 0 && errno != ENXIO ? -errno : 0; /* ENXIO: nothing but holes from here on */
}

/* Reads as much of a state as there may be, and looks whether the file has the RAM to it. */
static int read_state(struct snapshot *snapshot)
{
    struct machine_state *state = &snapshot->state;
    ssize_t got = pread(snapshot->fd, state, sizeof(*state), 0);

    if (got < 0)
        return -errno;
    if ((size_t)got < sizeof(*state) || state->cpu_count > MACHINE_MAX_CPUS ||
        state_check(state, state_bytes(state->cpu_count)) < 0)
        return -ENOEXEC;
    return lseek(snapshot->fd, 0, SEEK_END) == (off_t)(SNAPSHOT_RAM_AT + state->memory_bytes)
               ? 0
               : -ENOEXEC;
}

int snapshot_open(const char *path, struct snapshot *ret_snapshot)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    int r;

    ret_snapshot->fd = fd;
    r = fd < 0 ? -errno : read_state(ret_snapshot);
    if (r < 0 && fd >= 0)
        close(fd);
    return r < 0 ? complain(path, r) : 0;
}

int snapshot_load(struct snapshot *snapshot, struct machine *machine, bool lazy)
{
    int r = 0;

    if (!lazy || !hook_restore(machine, snapshot->fd, SNAPSHOT_RAM_AT)) {
        r = load_memory(snapshot->fd, &machine->memory);
        close(snapshot->fd);
    }
    if (r == 0)
        r = state_load(machine, &snapshot->state, state_bytes(snapshot->state.cpu_count));
    return r < 0 ? complain("loading", r) : 0;
}
