/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The race test under KVM: merges and breaks against vCPUs that write.
 *
 * This process is memvm without its main() and with a hook of its own: the bare guest runs in it
 * with several vCPUs at full speed, while one thread merges runs of its pages with a store that
 * holds what they rest as, and another kicks the vCPUs by signals all the time. To a page happens:
 *   flip   it is merged; a vCPU breaks the share, reads back what it wrote, sets it back
 *   lend   it is merged; a vCPU gives it up, finds it empty, writes its line again
 *   hot    it is frozen, found to differ, and moved back, while vCPUs write to it
 * The guest knows every byte of it and says when one is not what it wrote. KVM_RUN must never fail:
 * memvm's vCPU ends the machine when it does, and so the test.
 *
 * usage: race_kvm --image FILE [--merges N] [--cpus N] [--no-freeze]
 * With --no-freeze pages are compared in place and mapped without having been frozen: the test then
 * has to find lost bytes. Prints one line; ends with 0, 1 (a byte was lost or a vCPU failed), 2
 * (could not be set up), 77 (this kernel can't freeze pages).
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "boot.h"
#include "discard.h"
#include "freeze.h"
#include "hook.h"
#include "loader.h"
#include "machine.h"
#include "merge_row.h"
#include "race_parts.h"
#include "virtio_rng.h"

#define MEMORY_BYTES (16UL << 20)
#define MERGED_KINDS 2U /* flip, lend: what the store has */
#define LOOK_EVERY                                                                 \
    2000 /* turns of the merger between two looks at captives, and at what is said \
          */
#define HOT_ONE_IN     16U /* more, and the vCPUs do nothing but wait for frozen pages */
#define END_LIMIT_MS   120000
#define KICK_US_MAX    500
#define OUTPUT_CHARS   (1U << 20)
#define EXIT_CANT_RUN  77
#define EXIT_NO_SET_UP 2

static struct machine machine;
static const struct boot_info *boot;
static uint32_t slot_of_kind[CONTENT_KINDS]; /* the first of the kind's pages in the store */
static uint32_t slots;
static uint64_t kicks, freed_captives;
static bool stop_kicking;

static struct {
    const char *image;
    uint64_t merges;
    uint32_t cpus;
    bool no_freeze;
} wanted = {.merges = 20000, .cpus = 2};

/* ---- memvm's hook ---- */

void hook_attach(struct machine *unused)
{
    (void)unused;
}

void hook_discard(struct machine *unused, void *at, size_t bytes)
{
    uint32_t index = (uint32_t)(((uint8_t *)at - machine.memory.base) / (long)PAGE_BYTES);

    (void)unused;
    lock_take(&block->lock);
    if (discard_pages(&ram, block, index, (uint32_t)(bytes / PAGE_BYTES), MADV_DONTNEED) < 0)
        fprintf(stderr, "race_kvm: page %u can't be discarded\n", index);
    lock_release(&block->lock);
}

/* ---- the merger ---- */

static void merge_some(uint32_t *random)
{
    uint32_t chance = next_random(random) % HOT_ONE_IN;
    enum content_kind kind = chance == 0 ? CONTENT_HOT : chance % 4 ? CONTENT_FLIP : CONTENT_LEND;
    const struct boot_region *region = &boot->regions[kind];
    uint32_t at = next_random(random) % region->pages;
    uint32_t pages = next_random(random) % FREEZE_MAX_PAGES + 1;
    uint8_t outcomes[FREEZE_MAX_PAGES];
    uint32_t slot;

    if (at + pages > region->pages)
        pages = region->pages - at;
    slot = kind == CONTENT_HOT ? 0 : slot_of_kind[kind] + at;
    if (wanted.no_freeze)
        merge_without_freeze(region->first + at, SLOT(1, slot), pages);
    else
        merge_row(&ram, &segments, block, region->first + at, SLOT(1, slot), pages, outcomes,
                  &stats);
}

/* A page that the kernel copied before it was protected can't be merged again until it is given up:
 * done here for it while no vCPU runs, content and all. */
static void free_captives(void)
{
    static uint8_t content[PAGE_BYTES];

    if (block->captives == 0 || machine_pause(&machine) < 0)
        return;
    for (uint32_t i = 0; i < block->pages; i++) {
        if (!ram_captive(block, i))
            continue;
        memcpy(content, ram_address(block, i), PAGE_BYTES);
        hook_discard(&machine, ram_address(block, i), PAGE_BYTES);
        memcpy(ram_address(block, i), content, PAGE_BYTES);
        freed_captives++;
    }
    machine_resume(&machine);
}

/* The guest has said something that it should not. What it said so far is in `serial_fd`. */
static bool is_wrong(int serial_fd)
{
    static char said[OUTPUT_CHARS];
    ssize_t chars = pread(serial_fd, said, sizeof(said) - 1, 0);

    said[chars > 0 ? chars : 0] = '\0';
    return strstr(said, "CORRUPT") || strstr(said, "CRASH");
}

static bool has_ended(void)
{
    struct pollfd ended = {.fd = machine.ended_fd, .events = POLLIN};

    return poll(&ended, 1, 0) > 0;
}

/* ---- the one who kicks ---- */

static void *kick_all_the_time(void *unused)
{
    uint32_t random = 4711;

    while (!__atomic_load_n(&stop_kicking, __ATOMIC_ACQUIRE)) {
        pthread_kill(machine.cpus[next_random(&random) % wanted.cpus].thread, VCPU_KICK);
        kicks++;
        usleep(next_random(&random) % KICK_US_MAX);
    }
    return unused;
}

/* ---- setting up ---- */

static int make_store(void)
{
    static const enum content_kind kinds[MERGED_KINDS] = {CONTENT_FLIP, CONTENT_LEND};
    int fd = memfd_create("memd-race", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint64_t page[CONTENT_PAGE_WORDS];

    for (uint32_t k = 0; k < MERGED_KINDS; k++) {
        const struct boot_region *region = &boot->regions[kinds[k]];

        slot_of_kind[kinds[k]] = slots;
        for (uint32_t i = 0; i < region->pages; i++, slots++) {
            uint64_t key = content_key(kinds[k], boot->seed, i, region->pages);

            for (uint32_t word = 0; word < CONTENT_PAGE_WORDS; word++)
                page[word] = content_word(kinds[k], key, word);
            if (pwrite(fd, page, PAGE_BYTES, slots * (off_t)PAGE_BYTES) != (ssize_t)PAGE_BYTES)
                return -EIO;
        }
    }
    return take_store(fd, slots);
}

static int load_guest(void)
{
    char *words[] = {"flip=4M", "lend=2M", "hot=1M", "duty=100", "every=5", NULL};
    struct loaded loaded;
    int r = loader_load(&machine.memory, wanted.image, &loaded);

    if (r == 0)
        r = preset_fill(&machine.memory, loaded.end, wanted.cpus, 1, words);
    if (r < 0)
        return r;
    boot = memory_at(&machine.memory, ADDRESS_BOOT_INFO, sizeof(*boot));
    machine_map_low(&machine);
    for (uint32_t i = 0; r == 0 && i < wanted.cpus; i++)
        r = machine_boot_vcpu(&machine.cpus[i], loaded.entry);
    return r;
}

static int set_up(int serial_fd)
{
    const char *reason = "";
    sigset_t kick;
    int r = machine_open(&machine, MEMORY_BYTES, wanted.cpus);

    if (r < 0)
        return r;
    sigemptyset(&kick);
    sigaddset(&kick, VCPU_KICK);
    pthread_sigmask(SIG_BLOCK, &kick, NULL); /* only vCPUs take it */
    board_open(&machine, serial_fd);
    board_add_virtio(&machine, &virtio_rng_ops);
    r = take_memory_in(machine.memory.base, machine.memory.bytes, 0, &reason);
    if (r < 0 && reason) {
        printf("skip race_kvm: %s\n", reason);
        exit(EXIT_CANT_RUN);
    }
    if (r == 0)
        r = load_guest();
    if (r == 0)
        r = make_store();
    return r == 0 ? machine_start(&machine) : r;
}

/* ---- the end ---- */

/* The guest looks at everything once more and ends its machine. */
static void let_guest_end(void)
{
    static const char words[] = "report r\nstop s\n";
    struct pollfd ended = {.fd = machine.ended_fd, .events = POLLIN};

    board_input(&machine, words, sizeof(words) - 1);
    if (poll(&ended, 1, END_LIMIT_MS) <= 0) {
        fprintf(stderr, "race_kvm: the guest does not answer\n");
        machine_end(&machine, 1);
    }
}

/* What the guest said: the first line that has to do with something wrong, or its report. */
static bool judge(int serial_fd, const char **ret_line)
{
    static char said[OUTPUT_CHARS];
    ssize_t chars = pread(serial_fd, said, sizeof(said) - 1, 0);
    const char *report = NULL;

    said[chars > 0 ? chars : 0] = '\0';
    for (char *line = strtok(said, "\n"); line; line = strtok(NULL, "\n")) {
        if (strstr(line, "CORRUPT") || strstr(line, "CRASH")) {
            *ret_line = line;
            return false;
        }
        if (strstr(line, "report tag=r"))
            report = line;
    }
    *ret_line = report ? report : "the guest reported nothing";
    return report && strstr(report, " errors=0 ");
}

static void parse(int argc, char **argv)
{
    static const struct option options[] = {{"image", required_argument, NULL, 'i'},
                                            {"merges", required_argument, NULL, 'm'},
                                            {"cpus", required_argument, NULL, 'c'},
                                            {"no-freeze", no_argument, NULL, 'n'},
                                            {0}};
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (option == 'i')
            wanted.image = optarg;
        else if (option == 'm')
            wanted.merges = strtoull(optarg, NULL, 10);
        else if (option == 'c')
            wanted.cpus = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 'n')
            wanted.no_freeze = true;
        else
            exit(EXIT_NO_SET_UP);
    if (!wanted.image || wanted.cpus < 1 || wanted.cpus > MACHINE_MAX_CPUS)
        exit(EXIT_NO_SET_UP);
}

int main(int argc, char **argv)
{
    int serial_fd = memfd_create("race-serial", MFD_CLOEXEC);
    const char *line = "";
    pthread_t kicker;
    pthread_t ager;
    uint32_t random = 1;
    bool wrong = false;
    int status;
    bool good;

    parse(argc, argv);
    if (set_up(serial_fd) < 0)
        return EXIT_NO_SET_UP;
    pthread_create(&kicker, NULL, kick_all_the_time, NULL);
    pthread_create(&ager, NULL, age_pages, NULL);
    for (uint64_t turn = 1; stats.merges < wanted.merges && !wrong && !has_ended(); turn++) {
        merge_some(&random);
        if (turn % LOOK_EVERY)
            continue;
        free_captives();
        wrong = is_wrong(serial_fd);
    }
    let_guest_end();
    __atomic_store_n(&stop_kicking, true, __ATOMIC_RELEASE);
    pthread_join(kicker, NULL);
    status = machine_join(&machine);
    good = judge(serial_fd, &line) && status == 0 && ram.refused_transitions == 0;
    printf("race_kvm: %" PRIu64 " merges, %" PRIu64 " unmerges, %" PRIu64 " moved back, %" PRIu64
           " refused, %" PRIu64 " captives freed, %" PRIu64 " kicks; status %d; %s\n",
           stats.merges, ram.unmerges, stats.mismatches, stats.busy, freed_captives, kicks, status,
           line);
    return good ? 0 : 1;
}
