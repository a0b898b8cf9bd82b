/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a VMM links memd. This file is all that memvm needed for it:
 *
 *   1. memd_attach(), with what memctl run left in the environment, before anything of the guest's
 *      runs and before a sandbox closes;
 *   2. memd_ram_add() for each piece of guest RAM, before it is filled: then the agent may map it
 *      anew (MEMD_RAM_FRESH), in the way that keeps its number of mappings low;
 *   3. memd_ram_discard() wherever the VMM would have called madvise(MADV_DONTNEED) on guest RAM;
 *   4. memd_ram_restore() for a saved guest that is to run before its memory was read;
 *   5. hooks: stop the vCPUs and let them run; save and load what is not RAM, to move to another
 *      host; whether something holds pages in a way that the kernel does not know of.
 *
 * A VMM that takes RAM away calls memd_ram_remove() first, and one that lives on without its guest
 * memd_detach(); memvm does neither, its end is the guest's.
 *
 * If memd_attach() fails, or memd goes away later, the guest runs on. Nothing here is a reason to
 * stop it.
 */
#include "hook.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "state.h"

static int on_pause(void *opaque)
{
    return machine_pause(opaque);
}

static int on_resume(void *opaque)
{
    struct machine *machine = opaque;

    __atomic_store_n(&machine->leaving, false, __ATOMIC_RELEASE);
    machine_resume(machine);
    return 0;
}

static int on_save(void *opaque, struct memd_stream *stream)
{
    struct machine *machine = opaque;
    struct machine_state *state = malloc(sizeof(*state));
    int r = state ? state_save(machine, state) : -ENOMEM;

    __atomic_store_n(&machine->leaving, true, __ATOMIC_RELEASE);
    if (r == 0)
        r = memd_stream_write(stream, state, state_bytes(state->cpu_count));
    free(state);
    return r;
}

/* What comes has the size of a state of ours, or it is none. */
static int on_load(void *opaque, struct memd_stream *stream)
{
    struct machine *machine = opaque;
    size_t bytes = state_bytes(machine->cpu_count);
    struct machine_state *state = malloc(sizeof(*state));
    int r = state ? memd_stream_read(stream, state, bytes) : -ENOMEM;
    char more;

    if (r == 0 && memd_stream_read(stream, &more, 1) == 0)
        r = -ENOEXEC;
    if (r == 0)
        r = state_load(machine, state, bytes);
    free(state);
    return r;
}

/* Devices touch guest memory from the vCPUs' threads only, through this process's own page table,
 * and keep no address: what is in use is what the kernel sees. */
static int on_pinned(void *opaque, const void *addr, size_t bytes)
{
    (void)opaque;
    (void)addr;
    (void)bytes;
    return 0;
}

const struct memd_ops hook_ops = {.size = sizeof(hook_ops),
                                  .pause = on_pause,
                                  .resume = on_resume,
                                  .save = on_save,
                                  .load = on_load,
                                  .pinned = on_pinned};

static void complain(const char *what, int error)
{
    fprintf(stderr, "memvm: %s: %s; the guest runs without memd\n", what, strerror(-error));
}

/* Not a failure: the agent goes on trying, and memd may be started later. */
static void say_when_unreachable(struct memd_vm *memd, const char *socket)
{
    struct memd_status status = {.size = sizeof(status)};

    if (memd_get_status(memd, &status) == 0 && !status.connected)
        fprintf(stderr, "memvm: memd does not answer at %s yet; the guest runs without it\n",
                socket);
}

void hook_attach(struct machine *machine)
{
    struct memd_options options = {
        .size = sizeof(options),
        .socket = getenv("MEMD_AGENT_SOCKET"),
        .token = getenv("MEMD_TOKEN"),
        .vmm = "memvm",
        .ops = &hook_ops,
        .opaque = machine,
    };
    int r;

    if (!options.socket || !options.token)
        return; /* nobody asked for memd */
    r = memd_attach(&options, &machine->memd);
    if (r < 0) {
        machine->memd = NULL;
        complain("memd_attach", r);
        return;
    }
    say_when_unreachable(machine->memd, options.socket);
    r = memd_ram_add(machine->memd, machine->memory.base, machine->memory.bytes, MEMD_RAM_FRESH);
    if (r < 0)
        complain("memd_ram_add", r);
}

/* Its own thread: until all of the guest's memory has come, or can't any more. Then a vCPU may wait
 * for a page that never comes, and nothing but the end of the process calls it away. */
static void *wait_restored(void *context)
{
    struct machine *machine = context;
    int r = memd_ram_restore_wait(machine->memd);

    if (r == 0)
        return NULL;
    fprintf(stderr, "memvm: the rest of the guest's memory can't be read: %s\n", strerror(-r));
    _exit(MACHINE_EXIT_FAILED);
}

bool hook_restore(struct machine *machine, int fd, uint64_t offset)
{
    pthread_t waiter;
    int r = machine->memd ? memd_ram_restore(machine->memd, machine->memory.base,
                                             machine->memory.bytes, fd, offset)
                          : -ENOTCONN;

    if (r < 0) {
        fprintf(stderr, "memvm: the guest's memory is read before it runs: %s\n",
                machine->memd ? strerror(-r) : "memd is not there");
        return false;
    }
    close(fd);
    r = -pthread_create(&waiter, NULL, wait_restored, machine);
    if (r == 0)
        pthread_detach(waiter);
    else
        wait_restored(machine);
    return true;
}

void hook_discard(struct machine *machine, void *at, size_t bytes)
{
    int r = machine->memd ? memd_ram_discard(machine->memd, at, bytes)
                          : madvise(at, bytes, MADV_DONTNEED);

    /* A guest that gave pages up counts on their being empty. */
    if (r < 0)
        memset(at, 0, bytes);
}
