/* SPDX-License-Identifier: Apache-2.0 */
/* States of a machine that come from strangers: what is none is refused before anything of it is
 * believed. No KVM is needed: where it would be, descriptors that are none show that nobody got so
 * far, or that the machine goes back to what it was. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "gate.h"
#include "hook.h"
#include "state.h"
#include "virtio_rng.h"

#define RAM_BYTES (2UL << 20)

static struct machine machine;
static struct machine_state state;
static struct gate gate;

/* A machine of two vCPUs that was never started, and a state that such a machine could have. */
static void set_up(void)
{
    memset(&machine, 0, sizeof(machine));
    cr_assert(memory_open(&machine.memory, RAM_BYTES) == 0);
    pthread_mutex_init(&machine.lock, NULL);
    machine.cpu_count = 2;
    machine.cpus[0].fd = machine.cpus[1].fd = -1;
    machine.incoming = true;
    board_open(&machine, -1);
    board_add_virtio(&machine, &virtio_rng_ops);
    cr_assert(state_save(&machine, &state) == -EBADF, "it has no vCPUs to ask");
    for (uint32_t i = 0; i < 2; i++)
        state.vcpus[i].parts = 0x7f;
    cr_assert(state_check(&state, state_bytes(2)) == 0);
    cr_assert(gate_open(&gate, &hook_ops, &machine) == 0);
}

static void tear_down(void)
{
    munmap(machine.memory.base, machine.memory.bytes);
}

TestSuite(state, .init = set_up, .fini = tear_down);

Test(state, of_every_length_but_its_own)
{
    for (size_t bytes = 0; bytes <= sizeof(state); bytes++)
        if (bytes != state_bytes(2))
            cr_assert(state_check(&state, bytes) == -ENOEXEC, "%zu bytes", bytes);
}

/* Each lie at a place of its own in an otherwise good state. */
Test(state, that_lies)
{
    static const struct {
        size_t at, bytes;
        uint64_t value;
    } lies[] = {
        {offsetof(struct machine_state, magic), 8, 0},
        {offsetof(struct machine_state, version), 4, 1},
        {offsetof(struct machine_state, vcpu_bytes), 4, 0},
        {offsetof(struct machine_state, board_bytes), 4, UINT32_MAX},
        {offsetof(struct machine_state, cpu_count), 4, 0},
        {offsetof(struct machine_state, cpu_count), 4, 1},
        {offsetof(struct machine_state, cpu_count), 4, MACHINE_MAX_CPUS + 1},
        {offsetof(struct machine_state, cpu_count), 4, UINT32_MAX},
        {offsetof(struct machine_state, memory_bytes), 8, 0},
        {offsetof(struct machine_state, memory_bytes), 8, RAM_BYTES + 1},
        {offsetof(struct machine_state, memory_bytes), 8, UINT64_MAX},
        {offsetof(struct machine_state, memory_bytes), 8, 1ULL << 63},
        {offsetof(struct machine_state, vcpus[1].parts), 4, 0},
        {offsetof(struct machine_state, vcpus[1].parts), 4, UINT32_MAX},
        {offsetof(struct machine_state, vcpus[0].msrs), 4, 1U << STATE_MSRS},
        {offsetof(struct machine_state, vcpus[1].halted), 1, 2},
    };

    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        struct machine_state wrong = state;

        memcpy((char *)&wrong + lies[i].at, &lies[i].value, lies[i].bytes);
        cr_expect(state_check(&wrong, state_bytes(2)) == -ENOEXEC, "lie %zu", i);
        cr_expect(state_load(&machine, &wrong, state_bytes(2)) == -ENOEXEC, "lie %zu", i);
    }
}

Test(state, of_another_kind_of_machine)
{
    struct machine_state other = state;

    other.memory_bytes = 2 * RAM_BYTES;
    cr_expect(state_load(&machine, &other, state_bytes(2)) == -EXDEV);
    other = state;
    other.cpu_count = 1;
    cr_expect(state_load(&machine, &other, state_bytes(1)) == -EXDEV);
    cr_expect(machine.incoming && !machine.ended, "a state that was refused counts as come");
}

/* The board's part, byte by byte at random: refused, or harmless to read and write through. */
Test(state, random_boards_do_no_harm)
{
    uint32_t taken = 0;

    srandom(30);
    for (uint32_t round = 0; round < 200000; round++) {
        struct board_state board = state.board;
        uint8_t *bytes = (uint8_t *)&board;
        size_t from = round % 2 ? 0 : offsetof(struct board_state, virtio);

        for (uint32_t i = 0; i < 4; i++)
            bytes[from + (size_t)random() % (sizeof(board) - from)] = (uint8_t)random();
        if (board_load(&machine, &board) < 0)
            continue;
        taken++;
        cr_assert(board_input(&machine, "report x\n", 9) <= SERIAL_INPUT_BYTES);
        for (uint32_t i = 0; i < 9; i++)
            serial_read(&machine.board.serial, 0);
        virtio_mmio_write(&machine.board.virtio[0], 0x50, 4, 0); /* notify */
    }
    cr_expect(taken > 1000 && taken < 200000, "%u were taken", taken);
}

Test(state, board_that_lies)
{
    struct board_state board = state.board;

    board.serial.input_at = SERIAL_INPUT_BYTES;
    cr_expect(board_load(&machine, &board) == -EINVAL);
    board = state.board;
    board.serial.input_count = SERIAL_INPUT_BYTES + 1;
    cr_expect(board_load(&machine, &board) == -EINVAL);
    board = state.board;
    board.virtio[0].driver_features = 1ULL << 28;
    cr_expect(board_load(&machine, &board) == -EINVAL);
    board = state.board;
    board.virtio[0].queues[0].ready = 1;
    board.virtio[0].queues[0].size = 64;
    board.virtio[0].queues[0].used = RAM_BYTES;
    cr_expect(board_load(&machine, &board) == -EINVAL);
}

/* ---- through the hooks, as memd calls them ---- */

Test(state, streams_that_end_too_early_or_go_on)
{
    size_t bytes = state_bytes(2);

    cr_assert(gate_pause(&gate) == 0, "an incoming machine that waits can't be paused");
    cr_expect(gate_load(&gate, &state, bytes - 1) == -ENODATA);
    cr_expect(gate_load(&gate, &state, 0) == -ENODATA);
    cr_expect(gate_load(&gate, &state, bytes + 1) == -ENOEXEC);
    cr_expect(!gate.quarantined, "%s", gate.offence);
    cr_expect(machine.incoming, "a state that was refused counts as come");
    cr_expect(gate_resume(&gate) == 0 && machine_is_held(&machine), "it runs without a state");
}

Test(state, saving_that_fails_is_not_a_state)
{
    static uint8_t into[sizeof(struct machine_state)];
    size_t bytes = 0;

    cr_assert(gate_pause(&gate) == 0);
    cr_expect(gate_save(&gate, into, sizeof(into), &bytes) == -EBADF && bytes == 0);
    cr_expect(!gate.quarantined);
}
