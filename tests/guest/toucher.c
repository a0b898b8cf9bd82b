/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest of the migration benchmark: writes to memory at a steady rate, and takes the time of
 * each access. It is what a guest notices of a migration, whoever moves it.
 *
 * One region, filled with content that no page shares with another. A step writes one word of a
 * page: three steps follow each other through the region, the fourth goes to a random page. Before
 * a page is written its word must be the one written last. Steps come at memd.rate (each counts as
 * a page that was written); between bursts of a millisecond the program sleeps.
 *
 * An access that takes longer than SLOW_NS was a fault that the host served: without one it is a
 * tenth of a microsecond, also where the guest is interpreted. A *stall* is time in which this
 * program wanted to run and did not, whatever the reason: the longest way from one look at the
 * clock to the next, less what it meant to sleep. The clock is the processor's (TSC), which stands
 * still while the VMM has the machine stopped: downtime is not in it.
 *
 * Options on the kernel's command line: memd.touch=SIZE of the region; memd.rate=BYTES a second
 * (123M); memd.seed=N.
 * Commands on the console, one a line; TAG is any word:
 *   reset TAG     forget all times           -> reset tag= errors=
 *   figures TAG   -> figures tag= steps= faults= fault_p50_us= fault_p99_us= fault_max_us=
 *                    random_faults= random_p50_us= random_p99_us= stall_us= errors=
 *   report TAG    look at all pages now      -> report tag= pages= errors= rounds=
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES  4096U
#define PAGE_WORDS  (PAGE_BYTES / 8)
#define SLOW_NS     8000U
#define BURST_NS    1000000U
#define BUCKETS     512U /* eight to a power of two of nanoseconds */
#define RANDOM_STEP 4U

struct times {
    uint64_t count, max_ns;
    uint64_t buckets[BUCKETS];
};

static uint64_t *region;
static uint32_t *generation;
static size_t pages;
static uint64_t rate = 123ULL << 20, seed = 1;
static double ns_per_tick;
static struct times faults, random_faults;
static uint64_t steps, errors, stall_ns, last_ns;

/* ---- times ---- */

static uint64_t now_ns(void)
{
    return (uint64_t)((double)__builtin_ia32_rdtsc() * ns_per_tick);
}

static uint64_t kernel_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static void calibrate(void)
{
    uint64_t ticks = __builtin_ia32_rdtsc(), begun = kernel_ns();

    usleep(300000);
    ns_per_tick = (double)(kernel_ns() - begun) / (double)(__builtin_ia32_rdtsc() - ticks);
}

static void count(struct times *times, uint64_t ns)
{
    uint32_t power = 63 - (uint32_t)__builtin_clzll(ns | 8);
    uint64_t bucket = power * 8 + (ns >> (power - 3)) % 8;

    times->count++;
    times->buckets[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    if (ns > times->max_ns)
        times->max_ns = ns;
}

/* In microseconds; the upper end of the bucket. */
static double quantile(const struct times *times, double fraction)
{
    uint64_t below = 0;

    for (uint32_t b = 0; b < BUCKETS; b++) {
        below += times->buckets[b];
        if (times->buckets[b] && (double)below >= fraction * (double)times->count) {
            double upper = (double)((8ULL + b % 8 + 1) << (b / 8)) / 8;
            return (upper < (double)times->max_ns ? upper : (double)times->max_ns) / 1000;
        }
    }
    return 0;
}

/* ---- saying ---- */

static void say(const char *format, ...)
{
    char line[400] = "memd-guest: ";
    size_t used = strlen(line);
    va_list args;

    va_start(args, format);
    vsnprintf(line + used, sizeof(line) - used - 1, format, args);
    va_end(args);
    strcat(line, "\n");
    if (write(STDOUT_FILENO, line, strlen(line)) < 0)
        exit(1);
}

static _Noreturn void give_up(const char *what)
{
    say("failed %s: %s", what, strerror(errno));
    exit(1);
}

/* ---- pages ---- */

static uint64_t word_of(size_t page)
{
    return (page + seed * 0x10000001ULL) * 0x9e3779b97f4a7c15ULL ^ generation[page];
}

static void fill(size_t page)
{
    uint64_t *words = region + page * PAGE_WORDS, word = word_of(page);

    for (size_t i = 1; i < PAGE_WORDS; i++) {
        word = word * 6364136223846793005ULL + 1442695040888963407ULL;
        words[i] = word;
    }
    words[0] = word_of(page);
}

static void judge(size_t page, uint64_t got)
{
    if (got != word_of(page) && errors++ == 0)
        say("CORRUPT page=%zu want=%016llx got=%016llx", page, (unsigned long long)word_of(page),
            (unsigned long long)got);
}

static void look_at_all(void)
{
    for (size_t page = 0; page < pages; page++) {
        const volatile uint64_t *words = region + page * PAGE_WORDS;
        uint32_t now = generation[page];
        uint64_t word;

        judge(page, words[0]);
        generation[page] = 0;
        word = word_of(page);
        generation[page] = now;
        for (size_t i = 1; i < PAGE_WORDS; i++) {
            word = word * 6364136223846793005ULL + 1442695040888963407ULL;
            if (words[i] != word && errors++ == 0)
                say("CORRUPT page=%zu word=%zu", page, i);
        }
    }
}

/* ---- steps ---- */

static uint64_t next_random(void)
{
    static uint64_t state = 88172645463325252ULL;

    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

/* Returns when it was over. */
static uint64_t step(void)
{
    static size_t next;
    bool random = steps++ % RANDOM_STEP == 0;
    size_t page = random ? next_random() % pages : next++ % pages;
    volatile uint64_t *word = region + page * PAGE_WORDS;
    uint32_t now = generation[page] + 1;
    uint64_t begun = now_ns(), got = *word, ended;

    *word = (page + seed * 0x10000001ULL) * 0x9e3779b97f4a7c15ULL ^ now;
    ended = now_ns();
    judge(page, got);
    generation[page] = now;
    if (ended - begun > SLOW_NS) {
        count(&faults, ended - begun);
        if (random)
            count(&random_faults, ended - begun);
    }
    return ended;
}

/* Time has gone by since the last look, of which so much was meant to. */
static uint64_t look_at_clock(uint64_t now, uint64_t meant_ns)
{
    uint64_t gone = last_ns ? now - last_ns : 0;

    if (gone > meant_ns && gone - meant_ns > stall_ns)
        stall_ns = gone - meant_ns;
    last_ns = now;
    return now;
}

/* ---- commands ---- */

static void command_reset(const char *tag)
{
    memset(&faults, 0, sizeof(faults));
    memset(&random_faults, 0, sizeof(random_faults));
    steps = stall_ns = 0;
    say("reset tag=%s errors=%llu", tag, (unsigned long long)errors);
    last_ns = 0;
}

static void command_figures(const char *tag)
{
    say("figures tag=%s steps=%llu faults=%llu fault_p50_us=%.1f fault_p99_us=%.1f "
        "fault_max_us=%.1f random_faults=%llu random_p50_us=%.1f random_p99_us=%.1f stall_us=%.1f "
        "errors=%llu",
        tag, (unsigned long long)steps, (unsigned long long)faults.count, quantile(&faults, 0.5),
        quantile(&faults, 0.99), (double)faults.max_ns / 1000,
        (unsigned long long)random_faults.count, quantile(&random_faults, 0.5),
        quantile(&random_faults, 0.99), (double)stall_ns / 1000, (unsigned long long)errors);
    last_ns = 0;
}

static void command_report(const char *tag)
{
    look_at_all();
    say("report tag=%s pages=%zu errors=%llu rounds=%llu", tag, pages, (unsigned long long)errors,
        (unsigned long long)(steps / pages));
    last_ns = 0;
}

static void obey(char *line)
{
    static const struct {
        const char *name;
        void (*run)(const char *tag);
    } commands[] = {
        {"reset", command_reset}, {"figures", command_figures}, {"report", command_report}};
    char *save = NULL;
    const char *name = strtok_r(line, " \r\n", &save), *tag = strtok_r(NULL, " \r\n", &save);

    for (size_t i = 0; name && i < sizeof(commands) / sizeof(commands[0]); i++)
        if (strcmp(name, commands[i].name) == 0)
            commands[i].run(tag ? tag : "-");
}

static void look_at_console(void)
{
    struct pollfd console = {.fd = STDIN_FILENO, .events = POLLIN};
    char line[128];
    ssize_t got = poll(&console, 1, 0) > 0 ? read(STDIN_FILENO, line, sizeof(line) - 1) : 0;

    if (got <= 0)
        return;
    line[got] = '\0';
    obey(line);
}

/* Bursts: as many steps as are due, then a sleep for the rest of the millisecond. Steps that a
 * stall has held up are not made up for. */
static _Noreturn void run(void)
{
    double steps_per_ns = (double)rate / PAGE_BYTES / 1e9, due = 0;
    uint64_t now = look_at_clock(now_ns(), 0);

    for (;;) {
        uint64_t end = now + BURST_NS;
        struct timespec rest = {0};

        for (due += steps_per_ns * BURST_NS; due >= 1; due--)
            now = look_at_clock(step(), 0);
        if (now < end) {
            rest.tv_nsec = (long)(end - now);
            nanosleep(&rest, NULL);
            now = look_at_clock(now_ns(), (uint64_t)rest.tv_nsec);
        }
        look_at_console();
        if (!last_ns)
            now = look_at_clock(now_ns(), 0);
    }
}

/* ---- start ---- */

static uint64_t option(const char *line, const char *name, uint64_t otherwise)
{
    const char *at = strstr(line, name);
    const char *units = "KMG", *unit;
    char *end;
    uint64_t value;

    if (!at)
        return otherwise;
    value = strtoull(at + strlen(name), &end, 10);
    unit = *end ? strchr(units, *end) : NULL;
    return unit ? value << (10 * (unit - units + 1)) : value;
}

static void read_options(void)
{
    static char line[4096];
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);

    if (fd < 0 || read(fd, line, sizeof(line) - 1) < 0)
        give_up("/proc/cmdline");
    close(fd);
    pages = option(line, "memd.touch=", 64 << 20) / PAGE_BYTES;
    rate = option(line, "memd.rate=", rate);
    seed = option(line, "memd.seed=", seed);
}

static void *map(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (at == MAP_FAILED)
        give_up("mmap");
    return at;
}

int main(void)
{
    struct termios tty;

    read_options();
    if (tcgetattr(STDIN_FILENO, &tty) == 0) {
        tty.c_lflag &= ~(tcflag_t)(ECHO | ISIG);
        tcsetattr(STDIN_FILENO, TCSANOW, &tty);
    }
    region = map(pages * PAGE_BYTES);
    generation = map(pages * sizeof(*generation));
    for (size_t page = 0; page < pages; page++)
        fill(page);
    calibrate();
    say("ready seed=%llu pages=%zu", (unsigned long long)seed, pages);
    run();
}
