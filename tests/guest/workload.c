/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The workload of a test guest: memory whose every byte is known, rewritten and verified for ever.
 *
 * The memory is a list of *regions*. What a page of a region has to hold follows from the region's
 * kind, the page's index, the guest's seed and the page's generation (how often it was rewritten),
 * so that any wrong byte is found, whether it is foreign, stale or torn:
 *
 *   common   the same in every guest, page by page
 *   unique   of this guest alone
 *   twin     of this guest alone, but each content stands in four places
 *   mosaic   in turns a page that stands here twice and in every guest, and a unique one: shares,
 *            but never with its neighbours
 *   zero     was filled once and is all zeros since
 *   churn    rests like `common` (every fourth run of eight pages: like `zero`), is now and then
 *            overwritten with unique content and later set back: shares break and come again
 *   hot      unique and rewritten for ever
 *
 * Each round verifies every page of every region, then rewrites. Between bursts the workload
 * sleeps so long that it uses memd.duty per cent of its virtual CPU. On the first wrong byte it
 * says CORRUPT with the place and goes on counting; it never repairs what it found.
 *
 * Options come from the kernel's command line (sizes take K, M, G):
 *   memd.common= .unique= .twin= .mosaic= .zero= .churn= .hot=   sizes of the regions
 *   memd.seed=N         what is unique follows from it (default 1)
 *   memd.duty=PERCENT   share of the virtual CPU to use (default 10)
 *   memd.every=SECONDS  how often to print the `verified` line (default 2)
 *   memd.lend=SIZE      the block that `free` and `take` work on (default 100M)
 *
 * Commands on the console, one a line. TAG is any word; it comes back in the answer:
 *   report TAG   verify everything now            -> report tag= pages= errors= rounds=
 *   fill TAG     have the lend block, with twins  -> filled tag= pages=
 *   free TAG     unmap the lend block             -> freed tag= pages=
 *   take TAG     map it, look at each fresh page before anything writes to it, fill it
 *                                                 -> took tag= pages= dirty= [first= offset= got=]
 *   pause TAG    only verify, write nothing       -> paused tag=
 *   resume TAG                                    -> resumed tag=
 * Each line starts with "memd-guest: ".
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

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define PAGE_BYTES  4096
#define PAGE_WORDS  (PAGE_BYTES / sizeof(uint64_t))
#define BURST_PAGES 128 /* between two looks at the console and the clock */
#define RUN_PAGES   8   /* churn goes in runs, as real writers do */

enum kind { COMMON, UNIQUE, TWIN, MOSAIC, ZERO, CHURN, HOT, KINDS };

static const char *const kind_names[KINDS] = {"common", "unique", "twin", "mosaic",
                                              "zero",   "churn",  "hot"};

struct region {
    uint64_t *words;
    uint32_t *generation; /* per page; churn and hot only */
    size_t pages;
};

static struct region regions[KINDS];
static struct region lend; /* filled like TWIN; words is NULL while it is given away */
static uint64_t seed = 1;
static unsigned long duty = 10;
static unsigned long every = 2;
static unsigned long rounds, errors;
static bool paused;
static uint64_t write_turn;

/* ---- what a page has to hold ---- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

static uint64_t page_key(uint64_t owner, enum kind kind, uint64_t index, uint32_t generation)
{
    return mix(mix(owner + 0x9e3779b97f4a7c15ULL * (1 + kind)) ^ mix(index << 32 | generation));
}

/* The next word of a page. One multiplication: a guest is often interpreted. */
static inline uint64_t next_word(uint64_t word)
{
    return word * 6364136223846793005ULL + 1442695040888963407ULL;
}

static bool churn_rests_zero(size_t index)
{
    return index / RUN_PAGES % 4 == 3;
}

/* The key of what page `index` has to hold; false when it has to be all zeros. */
static bool expected_key(enum kind kind, size_t index, uint32_t generation, uint64_t *ret_key)
{
    size_t quarter = regions[TWIN].pages / 4 ? regions[TWIN].pages / 4 : 1;
    size_t half = regions[MOSAIC].pages > 3 ? regions[MOSAIC].pages / 4 * 2 : 2; /* even */

    switch (kind) {
    case COMMON: *ret_key = page_key(0, COMMON, index, 0); return true;
    case TWIN: *ret_key = page_key(seed, TWIN, index % quarter, 0); return true;
    case MOSAIC:
        *ret_key =
            index % 2 ? page_key(seed, MOSAIC, index, 0) : page_key(0, MOSAIC, index % half, 0);
        return true;
    case ZERO: return false;
    case CHURN:
        if (!generation && churn_rests_zero(index))
            return false;
        *ret_key = page_key(generation ? seed : 0, CHURN, index, generation);
        return true;
    default: *ret_key = page_key(seed, kind, index, generation); return true;
    }
}

static void fill_with_key(uint64_t *page, uint64_t key)
{
    for (size_t i = 0; i < PAGE_WORDS; i++) {
        key = next_word(key);
        page[i] = key;
    }
}

static void fill_page(enum kind kind, size_t index, uint32_t generation)
{
    uint64_t *page = regions[kind].words + index * PAGE_WORDS;
    uint64_t key;

    if (expected_key(kind, index, generation, &key))
        fill_with_key(page, key);
    else
        memset(page, 0, PAGE_BYTES);
}

/* ---- saying ---- */

static void say(const char *format, ...)
{
    char line[256] = "memd-guest: ";
    size_t used = strlen(line);
    va_list args;

    va_start(args, format);
    vsnprintf(line + used, sizeof(line) - used - 1, format, args);
    va_end(args);
    strcat(line, "\n");
    for (size_t done = 0, bytes = strlen(line); done < bytes;) {
        ssize_t got = write(STDOUT_FILENO, line + done, bytes - done);

        if (got < 0 && errno != EINTR)
            return;
        done += got > 0 ? (size_t)got : 0;
    }
}

static _Noreturn void give_up(const char *what)
{
    say("failed %s: %s", what, strerror(errno));
    exit(1);
}

/* ---- verifying ---- */

static void blame(const char *name, size_t index, size_t word, uint64_t want, uint64_t got)
{
    if (errors++ == 0)
        say("CORRUPT region=%s page=%zu offset=%zu want=%016llx got=%016llx", name, index,
            word * sizeof(uint64_t), (unsigned long long)want, (unsigned long long)got);
}

/* At most one error a page. The memory may change behind the compiler's back. */
static void verify_words(const char *name, size_t index, const volatile uint64_t *page,
                         uint64_t key, bool zero)
{
    for (size_t i = 0; i < PAGE_WORDS; i++) {
        uint64_t got = page[i];

        key = zero ? 0 : next_word(key);
        if (got != key) {
            blame(name, index, i, key, got);
            return;
        }
    }
}

static void verify_page(enum kind kind, size_t index)
{
    const struct region *region = &regions[kind];
    uint32_t generation = region->generation ? region->generation[index] : 0;
    uint64_t key = 0;
    bool zero = !expected_key(kind, index, generation, &key);

    verify_words(kind_names[kind], index, region->words + index * PAGE_WORDS, key, zero);
}

static uint64_t lend_key(size_t index)
{
    size_t quarter = lend.pages / 4 ? lend.pages / 4 : 1;

    return page_key(~seed, TWIN, index % quarter, 0);
}

static void verify_lend(void)
{
    for (size_t i = 0; lend.words && i < lend.pages; i++)
        verify_words("lend", i, lend.words + i * PAGE_WORDS, lend_key(i), false);
}

static size_t all_pages(void)
{
    size_t pages = lend.words ? lend.pages : 0;

    for (int kind = 0; kind < KINDS; kind++)
        pages += regions[kind].pages;
    return pages;
}

/* ---- memory ---- */

static uint64_t *map_pages(size_t pages)
{
    void *memory =
        mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED)
        give_up("mmap");
    return memory;
}

static void make_region(enum kind kind, size_t pages)
{
    struct region *region = &regions[kind];

    region->pages = pages;
    if (!pages)
        return;
    region->words = map_pages(pages);
    if (kind == CHURN || kind == HOT) {
        region->generation = calloc(pages, sizeof(*region->generation));
        if (!region->generation)
            give_up("calloc");
    }
    if (kind == ZERO) /* was used once: an untouched page would be absent, not zero */
        memset(region->words, 0xa5, pages * PAGE_BYTES);
    for (size_t i = 0; i < pages; i++)
        fill_page(kind, i, 0);
}

static void fill_lend(void)
{
    for (size_t i = 0; i < lend.pages; i++)
        fill_with_key(lend.words + i * PAGE_WORDS, lend_key(i));
}

static void map_lend(void)
{
    lend.words = map_pages(lend.pages);
    /* A huge page is cleared by the kernel whatever init_on_free promises. */
    madvise(lend.words, lend.pages * PAGE_BYTES, MADV_NOHUGEPAGE);
}

/* ---- commands ---- */

static void command_report(const char *tag)
{
    unsigned long before = errors;

    for (int kind = 0; kind < KINDS; kind++)
        for (size_t i = 0; i < regions[kind].pages; i++)
            verify_page(kind, i);
    verify_lend();
    say("report tag=%s pages=%zu errors=%lu new=%lu rounds=%lu", tag, all_pages(), errors,
        errors - before, rounds);
}

static void command_fill(const char *tag)
{
    if (!lend.words)
        map_lend();
    fill_lend();
    say("filled tag=%s pages=%zu", tag, lend.pages);
}

static void command_free(const char *tag)
{
    if (lend.words)
        munmap(lend.words, lend.pages * PAGE_BYTES);
    lend.words = NULL;
    say("freed tag=%s pages=%zu", tag, lend.pages);
}

/* A fresh page by a write fault that writes nothing: a read would show the guest's zero page. */
static void command_take(const char *tag)
{
    size_t dirty = 0, first = 0, offset = 0;
    uint64_t got = 0;

    if (lend.words)
        command_free("again");
    map_lend();
    if (madvise(lend.words, lend.pages * PAGE_BYTES, MADV_POPULATE_WRITE) < 0)
        give_up("MADV_POPULATE_WRITE");
    for (size_t i = 0; i < lend.pages; i++) {
        const volatile uint64_t *page = lend.words + i * PAGE_WORDS;

        for (size_t word = 0; word < PAGE_WORDS; word++) {
            uint64_t value = page[word];

            if (!value)
                continue;
            if (!dirty++)
                first = i, offset = word * sizeof(uint64_t), got = value;
            break;
        }
    }
    fill_lend();
    say("took tag=%s pages=%zu dirty=%zu first=%zu offset=%zu got=%016llx", tag, lend.pages, dirty,
        first, offset, (unsigned long long)got);
}

static void command_pause(const char *tag)
{
    paused = true;
    say("paused tag=%s", tag);
}

static void command_resume(const char *tag)
{
    paused = false;
    say("resumed tag=%s", tag);
}

static const struct {
    const char *name;
    void (*run)(const char *tag);
} commands[] = {
    {"report", command_report}, {"fill", command_fill},   {"free", command_free},
    {"take", command_take},     {"pause", command_pause}, {"resume", command_resume},
};

static void obey(char *line)
{
    char *save = NULL;
    const char *name = strtok_r(line, " \r\n", &save);
    const char *tag = strtok_r(NULL, " \r\n", &save);

    if (!name)
        return;
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        if (!strcmp(name, commands[i].name)) {
            commands[i].run(tag ? tag : "-");
            return;
        }
    }
    say("unknown command %s", name);
}

/* Waits up to `ms` for a command and obeys it. */
static void look_at_console(int ms)
{
    struct pollfd console = {.fd = STDIN_FILENO, .events = POLLIN};
    char line[128];

    if (poll(&console, 1, ms) <= 0 || !(console.revents & POLLIN))
        return;
    ssize_t got = read(STDIN_FILENO, line, sizeof(line) - 1);

    if (got <= 0)
        return;
    line[got] = 0;
    obey(line);
}

/* ---- the rounds ---- */

static uint64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* After work since `since`: rest so long that the duty is kept, at most half a second. */
static uint64_t rest(uint64_t since)
{
    uint64_t worked = now_us() - since;
    uint64_t rest_ms = duty < 100 ? worked * (100 - duty) / duty / 1000 : 0;

    look_at_console((int)(rest_ms < 500 ? rest_ms : 500));
    return now_us();
}

static void rewrite_hot(size_t index)
{
    fill_page(HOT, index, ++regions[HOT].generation[index]);
}

/* A run is turned every 16th round and set back eight rounds later. */
static void rewrite_churn(size_t index)
{
    struct region *churn = &regions[CHURN];
    size_t phase = (rounds + index / RUN_PAGES) % 16;

    if (phase == 0)
        churn->generation[index] = (uint32_t)++write_turn;
    else if (phase == 8)
        churn->generation[index] = 0;
    else
        return;
    fill_page(CHURN, index, churn->generation[index]);
}

static void one_round(void)
{
    uint64_t since = now_us();

    for (int kind = 0; kind < KINDS; kind++) {
        for (size_t i = 0; i < regions[kind].pages; i++) {
            verify_page(kind, i);
            if (kind == HOT && !paused)
                rewrite_hot(i);
            if (kind == CHURN && !paused)
                rewrite_churn(i);
            if (i % BURST_PAGES == BURST_PAGES - 1)
                since = rest(since);
        }
    }
    verify_lend();
    rounds++;
    rest(since);
}

/* ---- options ---- */

static unsigned long parse_size(const char *text)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    const char *unit = "KMGT", *found = *end ? strchr(unit, *end) : NULL;

    return found ? value << (10 * (found - unit + 1)) : value;
}

static void set_option(const char *name, const char *value, size_t region_pages[KINDS])
{
    for (int kind = 0; kind < KINDS; kind++)
        if (!strcmp(name, kind_names[kind]))
            region_pages[kind] = parse_size(value) / PAGE_BYTES;
    if (!strcmp(name, "seed"))
        seed = parse_size(value);
    else if (!strcmp(name, "duty"))
        duty = parse_size(value);
    else if (!strcmp(name, "every"))
        every = parse_size(value);
    else if (!strcmp(name, "lend"))
        lend.pages = parse_size(value) / PAGE_BYTES;
}

static void read_options(size_t region_pages[KINDS])
{
    static char line[4096];
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t bytes = fd < 0 ? -1 : read(fd, line, sizeof(line) - 1);
    char *save = NULL;

    if (bytes < 0)
        give_up("/proc/cmdline");
    close(fd);
    for (char *word = strtok_r(line, " \n", &save); word; word = strtok_r(NULL, " \n", &save)) {
        char *equals = strchr(word, '=');

        if (strncmp(word, "memd.", 5) != 0 || !equals)
            continue;
        *equals = 0;
        set_option(word + 5, equals + 1, region_pages);
    }
    duty = duty < 1 ? 1 : duty > 100 ? 100 : duty;
}

/* Commands are not echoed: the console carries answers only. */
static void set_up_console(void)
{
    struct termios tty;

    if (tcgetattr(STDIN_FILENO, &tty) < 0)
        return;
    tty.c_lflag &= ~(tcflag_t)(ECHO | ISIG);
    tcsetattr(STDIN_FILENO, TCSANOW, &tty);
}

int main(void)
{
    size_t region_pages[KINDS] = {0};
    uint64_t said_us = 0;

    lend.pages = (size_t)100 * 1024 * 1024 / PAGE_BYTES;
    read_options(region_pages);
    set_up_console();
    for (int kind = 0; kind < KINDS; kind++)
        make_region(kind, region_pages[kind]);
    say("ready seed=%llu pages=%zu", (unsigned long long)seed, all_pages());
    for (;;) {
        one_round();
        if (now_us() - said_us < every * 1000000)
            continue;
        said_us = now_us();
        say("verified rounds=%lu pages=%zu errors=%lu", rounds, all_pages(), errors);
    }
}
