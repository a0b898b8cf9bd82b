/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bare guest: a 64-bit program without an operating system, run by memvm. Its memory was filled
 * by the loader; it verifies and rewrites it for ever (workload.c) and tells of it over the serial
 * port. The first vCPU also reads commands, prints, and draws from the entropy device.
 *
 * Says, each line beginning with "memd-guest: ":
 *   ready seed= pages= cpus= random=            once
 *   verified rounds= pages= errors= hot-writes= flips= given-up= random-bytes=
 *   CORRUPT ...                                 on the first wrong word of a vCPU
 *   CRASH ...                                   on an exception; the machine then ends with status
 * 9
 *
 * Commands, one a line. TAG is any word; it comes back in the answer:
 *   report TAG   all vCPUs look at all pages now   -> report tag= pages= errors= rounds= ...
 *   pause TAG    only verify, write nothing        -> paused tag=
 *   resume TAG                                     -> resumed tag=
 *   stop TAG     end the machine with status 0     -> stopped tag=
 */
#include <stdbool.h>

#include "console.h"
#include "machine.h"
#include "virtio.h"
#include "workload.h"

#define ENTROPY_DEVICE 4U
#define ENTROPY_BYTES  64U
#define REST_MAX_US    500000U
#define REPORT_WAIT_US 1000U

static const struct boot_info *const boot = (const struct boot_info *)ADDRESS_BOOT_INFO;
static uint32_t started;       /* the first vCPU has made everything ready */
static uint32_t report_wanted; /* number of the last report that was asked for */
static uint32_t burst_began_us[MACHINE_MAX_CPUS];
static struct virtio_queue entropy_queue;
static uint64_t random_bytes, random_errors;

/* GCC calls these by itself. */
void *memset(void *to, int value, unsigned long bytes);
void *memcpy(void *to, const void *from, unsigned long bytes);

void *memset(void *to, int value, unsigned long bytes)
{
    void *end = to;

    __asm__ volatile("rep stosb" : "+D"(end), "+c"(bytes) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, unsigned long bytes)
{
    void *end = to;

    __asm__ volatile("rep movsb" : "+D"(end), "+S"(from), "+c"(bytes) : : "memory");
    return to;
}

/* ---- entropy ---- */

static bool all_equal(const uint8_t *bytes, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++)
        if (bytes[i] != bytes[0])
            return false;
    return true;
}

/* 64 random bytes that are all the same come once in 2^504 times. */
static void draw_entropy(void)
{
    static uint8_t drawn[ENTROPY_BYTES];
    uint32_t bytes = 0;

    if (!entropy_queue.device)
        return;
    memset(drawn, 0, ENTROPY_BYTES);
    if (!virtio_receive(&entropy_queue, drawn, ENTROPY_BYTES, &bytes) || bytes == 0 ||
        (bytes == ENTROPY_BYTES && all_equal(drawn, bytes)))
        random_errors++;
    random_bytes += bytes;
}

static const char *open_entropy(void)
{
    uint64_t device = virtio_find(ENTROPY_DEVICE, boot->virtio_count);

    if (!device)
        return "none";
    return virtio_open(device, &entropy_queue) ? "virtio" : "broken";
}

/* ---- saying ---- */

static struct work sum_of_work(void)
{
    struct work sum = {.rounds = ~0ULL};

    for (uint32_t cpu = 0; cpu < boot->cpus; cpu++) {
        sum.rounds = work[cpu].rounds < sum.rounds ? work[cpu].rounds : sum.rounds;
        sum.verified += work[cpu].verified;
        sum.hot_writes += work[cpu].hot_writes;
        sum.flips += work[cpu].flips;
        sum.given_up += work[cpu].given_up;
        sum.errors += work[cpu].errors;
    }
    sum.errors += random_errors;
    return sum;
}

static uint64_t all_pages(void)
{
    uint64_t pages = 0;

    for (uint32_t kind = 0; kind < CONTENT_KINDS; kind++)
        pages += boot->regions[kind].pages;
    return pages;
}

static void say_verified(void)
{
    struct work sum = sum_of_work();

    say("verified rounds=%u pages=%u errors=%u hot-writes=%u flips=%u given-up=%u random-bytes=%u",
        sum.rounds, sum.verified, sum.errors, sum.hot_writes, sum.flips, sum.given_up,
        random_bytes);
}

/* ---- commands ---- */

static void take_part_in_report(uint32_t cpu)
{
    uint32_t wanted = __atomic_load_n(&report_wanted, __ATOMIC_ACQUIRE);

    if (wanted == work[cpu].reports)
        return;
    workload_verify(boot, cpu);
    __atomic_store_n(&work[cpu].reports, wanted, __ATOMIC_RELEASE);
}

static void command_report(const char *tag)
{
    struct work sum;

    __atomic_store_n(&report_wanted, report_wanted + 1, __ATOMIC_RELEASE);
    take_part_in_report(0);
    for (uint32_t cpu = 1; cpu < boot->cpus; cpu++)
        while (__atomic_load_n(&work[cpu].reports, __ATOMIC_ACQUIRE) != report_wanted)
            rest_us(REPORT_WAIT_US);
    sum = sum_of_work();
    say("report tag=%s pages=%u errors=%u rounds=%u hot-writes=%u flips=%u given-up=%u "
        "random-bytes=%u",
        tag, all_pages(), sum.errors, sum.rounds, sum.hot_writes, sum.flips, sum.given_up,
        random_bytes);
}

static void command_pause(const char *tag)
{
    __atomic_store_n(&workload_quiet, 1, __ATOMIC_RELEASE);
    say("paused tag=%s", tag);
}

static void command_resume(const char *tag)
{
    __atomic_store_n(&workload_quiet, 0, __ATOMIC_RELEASE);
    say("resumed tag=%s", tag);
}

static void command_stop(const char *tag)
{
    say("stopped tag=%s", tag);
    power_off(OFF_STOPPED);
}

static const struct {
    const char *name;
    void (*run)(const char *tag);
} commands[] = {
    {"report ", command_report},
    {"pause ", command_pause},
    {"resume ", command_resume},
    {"stop ", command_stop},
};

/* What follows the name, or NULL when the line does not begin with it. */
static const char *after(const char *line, const char *name)
{
    while (*name)
        if (*line++ != *name++)
            return (const char *)0;
    return line;
}

static void look_at_console(void)
{
    const char *line = console_line();

    if (!line || !*line)
        return;
    for (uint32_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        const char *tag = after(line, commands[i].name);

        if (tag) {
            commands[i].run(tag);
            return;
        }
    }
    say("unknown command %s", line);
}

/* ---- the rounds ---- */

/* After a burst of work: rest so long that the duty is kept. */
static void rest_after_burst(uint32_t cpu)
{
    uint32_t worked = clock_us() - burst_began_us[cpu];
    uint64_t rest = boot->duty < 100 ? (uint64_t)worked * (100 - boot->duty) / boot->duty : 0;

    if (rest > 0)
        rest_us(rest < REST_MAX_US ? (uint32_t)rest : REST_MAX_US);
    burst_began_us[cpu] = clock_us();
}

static void pause_first(uint32_t cpu)
{
    static uint32_t said_us;

    look_at_console();
    if (clock_us() - said_us >= boot->every_ms * 1000) {
        said_us = clock_us();
        say_verified();
    }
    rest_after_burst(cpu);
}

static void pause_other(uint32_t cpu)
{
    take_part_in_report(cpu);
    rest_after_burst(cpu);
}

static _Noreturn void work_first(void)
{
    console_catch_exceptions();
    if (boot->crash)
        __asm__ volatile("ud2");
    const char *entropy = open_entropy();
    draw_entropy();
    say("ready seed=%u pages=%u cpus=%u random=%s", boot->seed, all_pages(), (uint64_t)boot->cpus,
        entropy);
    __atomic_store_n(&started, 1, __ATOMIC_RELEASE);
    for (;;) {
        workload_round(boot, 0, pause_first);
        draw_entropy();
        pause_first(0);
    }
}

_Noreturn void guest_main(const struct boot_info *info, uint32_t cpu);

_Noreturn void guest_main(const struct boot_info *info, uint32_t cpu)
{
    if (info->magic != BOOT_MAGIC)
        power_off(OFF_CRASHED);
    if (cpu == 0)
        work_first();
    while (!__atomic_load_n(&started, __ATOMIC_ACQUIRE))
        rest_us(REPORT_WAIT_US);
    for (;;) {
        workload_round(boot, cpu, pause_other);
        pause_other(cpu);
    }
}
