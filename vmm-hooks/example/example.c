/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that a VMM does with libmemd: attach, register the guest's RAM, discard what a balloon
 * gives up, take RAM away, detach. It is C11 and C++17, and works with or without a memd:
 *
 *   cc -std=c11 example.c $(pkg-config --cflags --libs libmemd)
 *
 * MEMD_AGENT_SOCKET and MEMD_TOKEN are what memctl run leaves in the environment of a VMM.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#include <errno.h>
#include <memd/memd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define RAM_BYTES  ((size_t)16 << 20)
#define PAGE_BYTES ((size_t)4096)

struct machine {
    unsigned char *ram;
    int running;
};

/* A real VMM stops its vCPU threads here and waits for I/O that writes into guest memory. */
static int on_pause(void *opaque)
{
    struct machine *machine = (struct machine *)opaque;

    machine->running = 0;
    return 0;
}

static int on_resume(void *opaque)
{
    struct machine *machine = (struct machine *)opaque;

    machine->running = 1;
    return 0;
}

/* No device of this machine is given addresses of guest memory. */
static int on_pinned(void *opaque, const void *addr, size_t bytes)
{
    (void)opaque;
    (void)addr;
    (void)bytes;
    return 0;
}

static int on_save(void *opaque, struct memd_stream *stream)
{
    const struct machine *machine = (const struct machine *)opaque;

    return memd_stream_write(stream, &machine->running, sizeof(machine->running));
}

static int on_load(void *opaque, struct memd_stream *stream)
{
    struct machine *machine = (struct machine *)opaque;
    int running;
    int r = memd_stream_read(stream, &running, sizeof(running));

    if (r == 0)
        machine->running = running != 0;
    return r;
}

static int fail(const char *what, int error)
{
    fprintf(stderr, "%s: %s\n", what, strerror(-error));
    return 1;
}

static int attach(struct machine *machine, struct memd_vm **ret_vm)
{
    struct memd_ops ops;
    struct memd_options options;

    memset(&ops, 0, sizeof(ops));
    ops.size = sizeof(ops);
    ops.pause = on_pause;
    ops.resume = on_resume;
    ops.pinned = on_pinned;
    ops.save = on_save;
    ops.load = on_load;

    memset(&options, 0, sizeof(options));
    options.size = sizeof(options);
    options.socket = getenv("MEMD_AGENT_SOCKET");
    options.token = getenv("MEMD_TOKEN");
    options.vmm = "example";
    options.ops = &ops;
    options.opaque = machine;
    return memd_attach(&options, ret_vm);
}

static int run(struct machine *machine, struct memd_vm *vm)
{
    struct memd_status status;
    int r;

    /* Before anything is in it: nobody else touches it yet. */
    r = memd_ram_add(vm, machine->ram, RAM_BYTES, MEMD_RAM_FRESH);
    if (r < 0)
        return fail("memd_ram_add", r);

    /* The guest runs. Its balloon gives a megabyte up. */
    memset(machine->ram, 0x5a, RAM_BYTES);
    r = memd_ram_discard(vm, machine->ram + RAM_BYTES / 2, (size_t)1 << 20);
    if (r < 0)
        return fail("memd_ram_discard", r);
    if (machine->ram[RAM_BYTES / 2] != 0 || machine->ram[0] != 0x5a)
        return fail("the guest's memory", -EIO);

    memset(&status, 0, sizeof(status));
    status.size = sizeof(status);
    r = memd_get_status(vm, &status);
    if (r < 0)
        return fail("memd_get_status", r);
    printf("%llu pages, %llu shared, memd %s\n", (unsigned long long)status.pages,
           (unsigned long long)status.shared, status.connected ? "answers" : "is not there");

    /* Before its mapping changes. */
    r = memd_ram_remove(vm, machine->ram, RAM_BYTES);
    return r < 0 ? fail("memd_ram_remove", r) : 0;
}

int main(void)
{
    struct machine machine;
    struct memd_vm *vm = NULL;
    void *ram;
    int r, result;

    memset(&machine, 0, sizeof(machine));
    ram = mmap(NULL, RAM_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        return 1;
    machine.ram = (unsigned char *)ram;
    r = attach(&machine, &vm);
    if (r < 0) {
        /* No reason not to run the guest: it shares nothing, that is all. */
        fail("memd_attach", r);
        munmap(ram, RAM_BYTES);
        return 0;
    }
    result = run(&machine, vm);
    r = memd_detach(vm);
    if (r < 0)
        return fail("memd_detach", r);
    munmap(ram, RAM_BYTES);
    return result;
}
