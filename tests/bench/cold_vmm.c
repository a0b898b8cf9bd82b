/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A VMM whose guest does nothing: RAM full of pages that nobody else has, for the agent to hash,
 * send and have looked up once. Before, it does what can't be left out, XXH3 over the same pages in
 * the same order, and says how much CPU time that took.
 *
 * usage: cold_vmm MIB random|last_8     under memctl run; says "alone SECONDS", registers its RAM
 * when it reads a line, says "registered", and stays until its input ends.
 */
#include <memd/memd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "hash.h"

static void fill_page(uint64_t *page, uint64_t number, int near)
{
    uint64_t state = near ? 1 : number * 0x9e3779b97f4a7c15ULL + 1;

    for (size_t i = 0; i < PAGE_BYTES / sizeof(*page); i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        page[i] = state;
    }
    page[PAGE_BYTES / sizeof(*page) - 1] = number + 1;
}

static double cpu_seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double hash_all(const uint8_t *ram, size_t bytes, uint64_t *ret_sum)
{
    static const struct hash_secret secret = {{1, 2, 3}};
    double start = cpu_seconds();

    for (size_t at = 0; at < bytes; at += PAGE_BYTES)
        *ret_sum ^= hash_page(&secret, ram + at);
    return cpu_seconds() - start;
}

int main(int argc, char **argv)
{
    size_t bytes = argc == 3 ? strtoull(argv[1], NULL, 10) << 20 : 0;
    struct memd_options options = {.size = sizeof(options), .vmm = "cold"};
    struct memd_vm *vm = NULL;
    uint64_t sum = 0;
    char line[16];
    uint8_t *ram;
    int r;

    if (bytes == 0) {
        fprintf(stderr, "usage: cold_vmm MIB random|last_8\n");
        return 2;
    }
    ram =
        mmap(NULL, bytes + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        return 1;
    ram = (uint8_t *)(((uintptr_t)ram + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES);
    madvise(ram, bytes, MADV_HUGEPAGE); /* as QEMU and memvm do */
    for (size_t at = 0; at < bytes; at += PAGE_BYTES)
        fill_page((uint64_t *)(void *)(ram + at), at / PAGE_BYTES, strcmp(argv[2], "last_8") == 0);
    printf("alone %.6f\n", hash_all(ram, bytes, &sum));
    fflush(stdout);
    if (!fgets(line, sizeof(line), stdin))
        return (int)(sum & 1);
    options.socket = getenv("MEMD_AGENT_SOCKET");
    options.token = getenv("MEMD_TOKEN");
    r = memd_attach(&options, &vm);
    if (r == 0)
        r = memd_ram_add(vm, ram, bytes, 0);
    if (r < 0) {
        fprintf(stderr, "cold_vmm: %s\n", strerror(-r));
        return 1;
    }
    printf("registered\n");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin))
        continue;
    return memd_detach(vm) < 0;
}
