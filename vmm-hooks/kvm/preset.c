/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The content of the bare guest's memory. A vCPU may be interpreted, and then needs seconds for
 * what takes us milliseconds: so we fill, with the very functions by which the guest verifies.
 *
 * Behind the guest's image lie, page by page: the table of generations, then the regions in the
 * order of their kinds. What is left over stays untouched.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "address_map.h"
#include "boot.h"
#include "loader.h"

#define LINE_GENERATION_BYTES 4U

static const char *const kind_names[] = CONTENT_NAMES;

int preset_size(const char *text, uint64_t *ret_bytes)
{
    static const char units[] = "KMG";
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    const char *unit = *end ? strchr(units, *end) : NULL;
    uint32_t shift = unit ? 10 * (uint32_t)(unit - units + 1) : 0;

    if (end == text || *text == '-' || (*end && !unit) || (unit && end[1]) ||
        value > UINT64_MAX >> 1 >> shift)
        return -EINVAL;
    *ret_bytes = (uint64_t)value << shift;
    return 0;
}

/* ---- the words ---- */

static bool is_named(const char *word, const char *name)
{
    size_t chars = strlen(name);

    return strncmp(word, name, chars) == 0 && word[chars] == '=';
}

static bool set_number(struct boot_info *boot, const char *word, uint64_t value)
{
    if (is_named(word, "seed") && value > 0)
        boot->seed = value;
    else if (is_named(word, "duty") && value >= 1 && value <= 100)
        boot->duty = (uint32_t)value;
    else if (is_named(word, "every") && value >= 1 && value <= 1000)
        boot->every_ms = (uint32_t)value * 1000;
    else if (is_named(word, "crash") && value <= 1)
        boot->crash = (uint32_t)value;
    else
        return false;
    return true;
}

static bool set_word(struct boot_info *boot, const char *word)
{
    const char *value = strchr(word, '=');
    uint64_t number;

    if (!value || preset_size(value + 1, &number) < 0)
        return false;
    for (uint32_t kind = 0; kind < CONTENT_KINDS; kind++)
        if (is_named(word, kind_names[kind])) {
            boot->regions[kind].pages = (uint32_t)(number / CONTENT_PAGE_BYTES);
            return number < ADDRESS_RAM_END;
        }
    return set_number(boot, word, number);
}

/* ---- where things lie ---- */

static uint32_t table_pages(const struct boot_info *boot)
{
    uint64_t lines = (uint64_t)CONTENT_PAGE_LINES *
                     (boot->regions[CONTENT_CHURN].pages + boot->regions[CONTENT_HOT].pages);

    return (uint32_t)((lines * LINE_GENERATION_BYTES + CONTENT_PAGE_BYTES - 1) /
                      CONTENT_PAGE_BYTES);
}

/* Returns the number of the first page behind everything. */
static uint64_t lay_out(struct boot_info *boot, uint64_t end)
{
    uint64_t next = (end + CONTENT_PAGE_BYTES - 1) / CONTENT_PAGE_BYTES;

    boot->generations = (uint32_t)next;
    next += table_pages(boot);
    for (uint32_t kind = 0; kind < CONTENT_KINDS; kind++) {
        boot->regions[kind].first = (uint32_t)next;
        next += boot->regions[kind].pages;
    }
    return next;
}

/* ---- filling ---- */

static void fill_page(uint64_t *page, enum content_kind kind, uint64_t key)
{
    for (uint32_t word = 0; word < CONTENT_PAGE_WORDS; word++)
        page[word] = content_word(kind, key, word);
}

static void fill(const struct guest_memory *memory, const struct boot_info *boot)
{
    for (uint32_t kind = 0; kind < CONTENT_KINDS; kind++) {
        const struct boot_region *region = &boot->regions[kind];
        uint64_t *at = memory_at(memory, region->first * (uint64_t)CONTENT_PAGE_BYTES,
                                 region->pages * (uint64_t)CONTENT_PAGE_BYTES);

        for (uint32_t i = 0; i < region->pages; i++, at += CONTENT_PAGE_WORDS)
            fill_page(at, kind, content_key(kind, boot->seed, i, region->pages));
    }
}

int preset_fill(const struct guest_memory *memory, uint64_t end, uint32_t cpus,
                uint32_t virtio_count, char *const *words)
{
    struct boot_info boot = {.magic = BOOT_MAGIC,
                             .seed = 1,
                             .cpus = cpus,
                             .duty = 10,
                             .every_ms = 2000,
                             .virtio_count = virtio_count};
    uint64_t behind;

    for (; *words; words++)
        if (!set_word(&boot, *words)) {
            fprintf(stderr, "memvm: '%s' is no word for the bare guest: see memvm(1)\n", *words);
            return -EINVAL;
        }
    behind = lay_out(&boot, end);
    if (behind * CONTENT_PAGE_BYTES > memory->bytes) {
        fprintf(stderr, "memvm: the content needs %llu KiB of memory, there are %llu\n",
                (unsigned long long)behind * 4, (unsigned long long)memory->bytes / 1024);
        return -ENOSPC;
    }
    fill(memory, &boot);
    memcpy(memory_at(memory, ADDRESS_BOOT_INFO, sizeof(boot)), &boot, sizeof(boot));
    return 0;
}
