/* SPDX-License-Identifier: Apache-2.0 */
#include "guest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "fuzz.h"

struct fuzz_guest fuzz_guest;

static struct memd_vm *const vm = &fuzz_guest.vm;

void fuzz_guest_content(uint32_t generation, uint8_t *into)
{
    memset(into, 0, PAGE_BYTES);
    for (size_t i = 0; i < PAGE_BYTES; i += 256)
        memcpy(into + i, &generation, sizeof(generation));
}

void fuzz_guest_write(uint32_t page, uint32_t generation)
{
    fuzz_guest.generation[page] = generation;
    fuzz_guest_content(generation, fuzz_guest.memory + page * PAGE_BYTES);
}

bool fuzz_guest_start(void)
{
    static int result = -1;
    const char *reason = "";
    uint8_t *at;

    if (result == 0)
        return false;
    result = ram_open(&vm->ram, -1, &reason);
    if (result < 0) {
        fprintf(stderr, "no agent on this kernel: %s\n", reason);
        exit(77);
    }
    vm->rpc.fd = -1;
    vm->ram_open = true;
    vm->freeze_allowed = true;
    vm->vma_limit = 60000;
    vm->state = AGENT_ACTIVE;
    vm->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    vm->ram.sources[PLACE_SHARED] = segments_source(&vm->segments);
    vm->scanner.ram = &vm->ram;
    FUZZ_REQUIRE(fault_start(&vm->handler, &vm->ram) == 0);
    fault_open(&vm->handler);
    at = mmap(NULL, (PAGES + HUGE_PAGES) * PAGE_BYTES, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fuzz_guest.memory = (uint8_t *)(((uintptr_t)at + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    FUZZ_REQUIRE(
        ram_add(&vm->ram, fuzz_guest.memory, PAGES * PAGE_BYTES, 0, true, &fuzz_guest.block) == 0);
    return true;
}

void fuzz_guest_check(void)
{
    static uint8_t page[PAGE_BYTES];
    uint64_t sum = 0;

    for (uint32_t i = 0; i < PAGES; i++) {
        fuzz_guest_content(fuzz_guest.generation[i], page);
        FUZZ_REQUIRE(memcmp(page, fuzz_guest.memory + i * PAGE_BYTES, PAGE_BYTES) == 0);
    }
    for (int place = 0; place < PLACE_COUNT; place++)
        sum += fuzz_guest.block->counts[place];
    FUZZ_REQUIRE(sum == PAGES);
    FUZZ_REQUIRE(vm->ram.refused_transitions == 0);
}
