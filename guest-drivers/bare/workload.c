/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the vCPUs do to the memory: verify it for ever, and rewrite some of it.
 *
 * A vCPU looks at one cache line of each page a round, another one each time. Which pages and lines
 * it looks at:
 *   - what nobody writes, and `lend`: the pages are dealt out among the vCPUs;
 *   - churn, hot, flip: every vCPU visits every page, and owns the lines whose number modulo the
 *     count of vCPUs is its own. Nobody else ever reads or writes them, so the vCPUs write to a
 *     page at the same time, without a lock, and each knows what it has to find.
 * A write that gets lost leaves an older generation behind, which its owner finds at the next
 * visit. On the first wrong word it says CORRUPT with the place; it goes on counting and repairs
 * nothing.
 */
#include "workload.h"

#include <stdbool.h>

#include "console.h"
#include "machine.h"

#define BURST_PAGES  32U /* between two pauses */
#define RUN_PAGES    8U  /* churn goes in runs, as real writers do */
#define CHURN_ROUNDS 16U

struct visit {
    const struct boot_info *boot;
    struct work *work;
    enum content_kind kind;
    uint32_t cpu;
    uint32_t index; /* of the page in its region */
    uint32_t line;
    uint64_t key;
    bool verify_only;
    volatile uint64_t *page;
};

struct work work[MACHINE_MAX_CPUS];
uint32_t workload_quiet;

static bool has_owned_lines(enum content_kind kind)
{
    return kind == CONTENT_CHURN || kind == CONTENT_HOT || kind == CONTENT_FLIP;
}

/* The generation of the visit's line, where it has one. Churn lies before hot in the table. */
static uint32_t *generation_of(const struct visit *visit)
{
    const struct boot_info *boot = visit->boot;
    uint32_t *table = (uint32_t *)((uintptr_t)boot->generations * CONTENT_PAGE_BYTES);
    uint32_t page = visit->index;

    if (visit->kind == CONTENT_HOT)
        page += boot->regions[CONTENT_CHURN].pages;
    return table + (uint64_t)page * CONTENT_PAGE_LINES + visit->line;
}

static uint32_t generation(const struct visit *visit)
{
    if (visit->kind != CONTENT_CHURN && visit->kind != CONTENT_HOT)
        return 0;
    return *generation_of(visit);
}

/* ---- a line ---- */

static void blame(const struct visit *visit, uint32_t gen, uint32_t word, uint64_t want,
                  uint64_t got)
{
    static const char *const names[] = CONTENT_NAMES;

    if (visit->work->errors++ == 0)
        say("CORRUPT region=%s page=%u offset=%u want=%x got=%x cpu=%u generation=%u",
            names[visit->kind], (uint64_t)visit->index, (uint64_t)word * 8, want, got,
            (uint64_t)visit->cpu, (uint64_t)gen);
}

/* At most one error a line. */
static void verify_line(const struct visit *visit, uint32_t gen)
{
    volatile uint64_t *line = visit->page + (uint64_t)visit->line * CONTENT_LINE_WORDS;
    uint64_t want[CONTENT_LINE_WORDS];

    content_line(visit->kind, visit->key, visit->line, visit->boot->seed, gen, want);
    for (uint32_t i = 0; i < CONTENT_LINE_WORDS; i++) {
        uint64_t got = line[i];

        if (got != want[i]) {
            blame(visit, gen, visit->line * CONTENT_LINE_WORDS + i, want[i], got);
            return;
        }
    }
}

static void write_line(const struct visit *visit, uint32_t gen)
{
    volatile uint64_t *line = visit->page + (uint64_t)visit->line * CONTENT_LINE_WORDS;
    uint64_t words[CONTENT_LINE_WORDS];

    content_line(visit->kind, visit->key, visit->line, visit->boot->seed, gen, words);
    for (uint32_t i = 0; i < CONTENT_LINE_WORDS; i++)
        line[i] = words[i];
}

/* ---- what is done to a page, besides verifying ---- */

static uint32_t next_generation(const struct visit *visit)
{
    if (++visit->work->turn == 0)
        visit->work->turn = 1;
    return visit->work->turn;
}

static void rewrite_hot(const struct visit *visit)
{
    uint32_t gen = next_generation(visit);

    *generation_of(visit) = gen;
    write_line(visit, gen);
    visit->work->hot_writes++;
}

/* A run is turned every sixteenth round and set back eight rounds later. */
static void rewrite_churn(const struct visit *visit)
{
    uint64_t phase = (visit->work->rounds + visit->index / RUN_PAGES) % CHURN_ROUNDS;

    if (phase != 0 && phase != CHURN_ROUNDS / 2)
        return;
    *generation_of(visit) = phase == 0 ? next_generation(visit) : 0;
    write_line(visit, *generation_of(visit));
    visit->work->hot_writes++;
}

static void flip(const struct visit *visit)
{
    uint32_t gen = next_generation(visit);

    write_line(visit, gen);
    verify_line(visit, gen);
    write_line(visit, 0);
    visit->work->flips++;
}

/* The first word of each line, and the last of the page, have to be zero. */
static void verify_empty(const struct visit *visit)
{
    uint64_t got = visit->page[CONTENT_PAGE_WORDS - 1];

    for (uint32_t word = 0; word < CONTENT_PAGE_WORDS; word += CONTENT_LINE_WORDS)
        got |= visit->page[word];
    if (got && visit->work->errors++ == 0)
        say("CORRUPT region=lend page=%u is not empty after it was given up: got=%x cpu=%u",
            (uint64_t)visit->index, got, (uint64_t)visit->cpu);
}

static void lend(struct visit *visit)
{
    port_write32(PORT_GIVE_UP, (uint32_t)((uintptr_t)visit->page / CONTENT_PAGE_BYTES));
    verify_empty(visit);
    visit->line = visit->key % CONTENT_PAGE_LINES;
    write_line(visit, 0);
    visit->work->given_up++;
}

/* ---- a page ---- */

/* The line of this visit: any, or the next one that is ours. Churn's is always the same, or it
 * would not be set back. */
static uint32_t choose_line(const struct visit *visit)
{
    uint64_t step = visit->work->rounds + visit->index;
    uint32_t cpus = visit->boot->cpus;

    if (!has_owned_lines(visit->kind))
        return step % CONTENT_PAGE_LINES;
    if (visit->kind == CONTENT_CHURN)
        step = visit->index;
    return visit->cpu + cpus * (uint32_t)(step % (CONTENT_PAGE_LINES / cpus));
}

static void visit_page(struct visit *visit)
{
    visit->line = choose_line(visit);
    visit->key = content_key(visit->kind, visit->boot->seed, visit->index,
                             visit->boot->regions[visit->kind].pages);
    verify_line(visit, generation(visit));
    visit->work->verified++;
    if (visit->verify_only)
        return;
    switch (visit->kind) {
    case CONTENT_CHURN: rewrite_churn(visit); break;
    case CONTENT_HOT: rewrite_hot(visit); break;
    case CONTENT_FLIP: flip(visit); break;
    case CONTENT_LEND: lend(visit); break;
    default: break;
    }
}

static void nothing(uint32_t cpu)
{
    (void)cpu;
}

static void visit_all(const struct boot_info *boot, uint32_t cpu, bool verify_only,
                      void (*pause_here)(uint32_t cpu))
{
    uint32_t since_pause = 0;

    for (uint32_t kind = 0; kind < CONTENT_KINDS; kind++) {
        const struct boot_region *region = &boot->regions[kind];
        bool all = has_owned_lines(kind);

        for (uint32_t i = all ? 0 : cpu; i < region->pages; i += all ? 1 : boot->cpus) {
            struct visit visit = {.boot = boot, .work = &work[cpu], .kind = kind, .cpu = cpu};

            visit.index = i;
            visit.verify_only = verify_only || workload_quiet;
            visit.page = (uint64_t *)((uintptr_t)(region->first + i) * CONTENT_PAGE_BYTES);
            visit_page(&visit);
            if (++since_pause % BURST_PAGES == 0)
                pause_here(cpu);
        }
    }
}

void workload_round(const struct boot_info *boot, uint32_t cpu, void (*pause_here)(uint32_t cpu))
{
    visit_all(boot, cpu, false, pause_here);
    work[cpu].rounds++;
}

void workload_verify(const struct boot_info *boot, uint32_t cpu)
{
    visit_all(boot, cpu, true, nothing);
}
