/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A live guest's RAM as a source of analyze: a copy, taken while the guest runs.
 *
 * Reading a page that isn't there would make the VMM have it, so what the kernel does not have is
 * left alone and counts as zeros. What is there is said by two files together, since neither is
 * enough: pagemap (present or swapped), and maps, because a page of a private file mapping (a
 * shared page of memd) has its content whether it is present or not.
 *
 * While an agent freezes a page, it is not there for a few microseconds, and a page may be shared
 * between the look at one file and the look at the other. So pages that were not there are looked
 * for again, LOOKS times in all; each look takes the whole guest, which is far longer than a
 * freeze.
 *
 * Not promised: pages are copied one after the other, so that the copy is of no single moment.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze_source.h"
#include "hash.h"

#define LOOKS           3
#define CHUNK_PAGES     512U
#define PAGEMAP_PRESENT (1ULL << 63)
#define PAGEMAP_SWAPPED (1ULL << 62)
/* A swapped page's lowest five bits are the swap type, the highest of which are no swap files but
 * markers in empty entries (SWP_PTE_MARKER, include/linux/swap.h): userfaultfd leaves them where an
 * absent page is write-protected. */
#define PAGEMAP_SWAP_TYPE   0x1fULL
#define PAGEMAP_MARKER_TYPE 0x1fULL
#define MAP_LINE_CHARS      4352

/* Is there a page behind this entry of /proc/PID/pagemap, in memory or in swap? */
static bool has_page(uint64_t entry)
{
    if (entry & PAGEMAP_PRESENT)
        return true;
    return (entry & PAGEMAP_SWAPPED) && (entry & PAGEMAP_SWAP_TYPE) != PAGEMAP_MARKER_TYPE;
}

struct mapping {
    uint64_t start, end;
    bool file;   /* its pages have content though they are not present */
    bool shared; /* reading a hole would fill it, and pagemap can't tell */
};

struct snapshot {
    int mem, pagemap, out;
    FILE *maps;
    struct mapping *mappings;
    size_t mapping_count;
    uint8_t *have; /* a bit for each page that was copied */
    uint8_t *buffer;
    uint64_t unreadable; /* in this look: pages that are there and gave EIO */
    uint64_t unsettled;  /* in the last look: pages that are not as they were copied */
};

static int open_files(struct snapshot *snapshot, int pid)
{
    char path[64];
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/mem", pid);
    snapshot->mem = open(path, O_RDONLY | O_CLOEXEC);
    if (snapshot->mem < 0)
        return -errno;
    snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
    snapshot->pagemap = open(path, O_RDONLY | O_CLOEXEC);
    if (snapshot->pagemap < 0)
        return -errno;
    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    snapshot->maps = fdopen(fd, "r");
    return snapshot->maps ? 0 : -errno;
}

/* On disk rather than in memory: the host may be short of it, and a guest is large. */
static int open_output(struct snapshot *snapshot, uint64_t pages)
{
    const char *directory = getenv("TMPDIR");

    snapshot->out = open(directory ? directory : "/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (snapshot->out < 0)
        return -errno;
    return ftruncate(snapshot->out, (off_t)(pages * PAGE_BYTES)) < 0 ? -errno : 0;
}

static bool read_mapping(const char *line, struct mapping *ret_mapping)
{
    unsigned long start, end, inode;
    char rights[8];

    if (sscanf(line, "%lx-%lx %7s %*x %*s %lu", &start, &end, rights, &inode) != 4)
        return false;
    *ret_mapping = (struct mapping){
        .start = start, .end = end, .file = inode != 0, .shared = rights[3] == 's'};
    return true;
}

static int read_mappings(struct snapshot *snapshot)
{
    char line[MAP_LINE_CHARS];
    size_t room = snapshot->mapping_count;

    rewind(snapshot->maps);
    snapshot->mapping_count = 0;
    while (fgets(line, sizeof(line), snapshot->maps)) {
        if (snapshot->mapping_count == room) {
            struct mapping *grown;

            room = room ? 2 * room : 1024;
            grown = reallocarray(snapshot->mappings, room, sizeof(*grown));
            if (!grown)
                return -ENOMEM;
            snapshot->mappings = grown;
        }
        if (!read_mapping(line, &snapshot->mappings[snapshot->mapping_count]))
            return -EPROTO;
        snapshot->mapping_count++;
    }
    return snapshot->mapping_count ? 0 : -ESRCH;
}

static const struct mapping *find_mapping(const struct snapshot *snapshot, uint64_t hva)
{
    size_t low = 0, high = snapshot->mapping_count;

    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct mapping *mapping = &snapshot->mappings[middle];

        if (hva >= mapping->start && hva < mapping->end)
            return mapping;
        if (hva < mapping->start)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

static int write_page(const struct snapshot *snapshot, const uint8_t *page, uint64_t at)
{
    ssize_t written;

    if (hash_page_is_zero(page))
        return 0; /* the file has a hole there */
    written = pwrite(snapshot->out, page, PAGE_BYTES, (off_t)(at * PAGE_BYTES));
    if (written == (ssize_t)PAGE_BYTES)
        return 0;
    return written < 0 ? -errno : -ENOSPC;
}

/* Copies up to `pages` pages at hva; *ret_copied may be fewer, 0 when the first one gave EIO. */
static int copy_run(struct snapshot *snapshot, uint64_t hva, uint64_t pages, uint64_t at,
                    uint64_t *ret_copied)
{
    ssize_t got = pread(snapshot->mem, snapshot->buffer, pages * PAGE_BYTES, (off_t)hva);
    uint64_t copied = got > 0 ? (uint64_t)got / PAGE_BYTES : 0;

    if (got < 0 && errno != EIO)
        return -errno;
    if (got == 0)
        return -ESRCH;
    for (uint64_t i = 0; i < copied; i++) {
        int error = write_page(snapshot, snapshot->buffer + i * PAGE_BYTES, at + i);

        if (error < 0)
            return error;
        snapshot->have[(at + i) / 8] |= (uint8_t)(1 << (at + i) % 8);
    }
    *ret_copied = copied;
    return 0;
}

/* Whether the page at hva has content to be read. */
static int is_there(const struct snapshot *snapshot, uint64_t hva, uint64_t entry, bool *ret_there)
{
    const struct mapping *mapping = find_mapping(snapshot, hva);

    if (mapping && mapping->shared)
        return -EMEDIUMTYPE;
    *ret_there = has_page(entry) || (mapping && mapping->file);
    return 0;
}

/* Counts the pages from `from` on that shall be copied together. */
static int find_run(const struct snapshot *snapshot, const uint64_t *entries, uint64_t from,
                    uint64_t count, uint64_t hva, uint64_t at, uint64_t *ret_pages)
{
    uint64_t pages = 0;

    for (uint64_t i = from; i < count; i++, pages++) {
        bool there = false;
        bool have = snapshot->have[(at + i) / 8] >> (at + i) % 8 & 1;
        int error = have ? 0 : is_there(snapshot, hva + i * PAGE_BYTES, entries[i], &there);

        if (error < 0)
            return error;
        if (!there)
            break;
    }
    *ret_pages = pages;
    return 0;
}

/* One look at `count` pages (CHUNK_PAGES at most) at hva, which go to page `at` of the copy. */
static int copy_chunk(struct snapshot *snapshot, uint64_t hva, uint64_t count, uint64_t at)
{
    uint64_t entries[CHUNK_PAGES], pages, copied = 0;
    ssize_t bytes = (ssize_t)(count * sizeof(entries[0]));

    if (pread(snapshot->pagemap, entries, (size_t)bytes,
              (off_t)(hva / PAGE_BYTES * sizeof(entries[0]))) != bytes)
        return -ESRCH;
    for (uint64_t i = 0; i < count; i += pages) {
        int error = find_run(snapshot, entries, i, count, hva, at, &pages);

        if (error == 0 && pages == 0) {
            pages = 1; /* not there, or copied already */
            continue;
        }
        if (error == 0)
            error = copy_run(snapshot, hva + i * PAGE_BYTES, pages, at + i, &copied);
        if (error < 0)
            return error;
        if (copied == 0)
            snapshot->unreadable++;
        pages = copied ? copied : 1;
    }
    return 0;
}

/* `chunk` sees every page, at most CHUNK_PAGES at a time. */
static int look(struct snapshot *snapshot, const struct analyze_block *blocks, size_t count,
                int (*chunk)(struct snapshot *, uint64_t hva, uint64_t pages, uint64_t at))
{
    uint64_t at = 0;
    int error = read_mappings(snapshot);

    snapshot->unreadable = 0;
    for (size_t i = 0; error == 0 && i < count; i++) {
        for (uint64_t page = 0; error == 0 && page < blocks[i].pages; page += CHUNK_PAGES) {
            uint64_t left = blocks[i].pages - page;

            error = chunk(snapshot, blocks[i].hva + page * PAGE_BYTES,
                          left < CHUNK_PAGES ? left : CHUNK_PAGES, at + page);
        }
        at += blocks[i].pages;
    }
    return error;
}

/* Counts the pages of a chunk that are not what was copied of them any more. */
static int compare_chunk(struct snapshot *snapshot, uint64_t hva, uint64_t count, uint64_t at)
{
    uint8_t copy[PAGE_BYTES];

    for (uint64_t i = 0; i < count; i++) {
        if (!(snapshot->have[(at + i) / 8] >> (at + i) % 8 & 1))
            continue; /* not there when it was looked for; looking now could fill it */
        if (pread(snapshot->out, copy, PAGE_BYTES, (off_t)((at + i) * PAGE_BYTES)) !=
            (ssize_t)PAGE_BYTES)
            return -EIO;
        if (pread(snapshot->mem, snapshot->buffer, PAGE_BYTES, (off_t)(hva + i * PAGE_BYTES)) !=
                (ssize_t)PAGE_BYTES ||
            memcmp(snapshot->buffer, copy, PAGE_BYTES) != 0)
            snapshot->unsettled++;
    }
    return 0;
}

static int take(struct snapshot *snapshot, const struct analyze_block *blocks, size_t count)
{
    int error = 0;

    for (int i = 0; error == 0 && i < LOOKS; i++)
        error = look(snapshot, blocks, count, copy_chunk);
    if (error == 0 && snapshot->unreadable)
        return -EIO;
    return error == 0 ? look(snapshot, blocks, count, compare_chunk) : error;
}

static uint64_t count_absent(const struct snapshot *snapshot, uint64_t pages)
{
    uint64_t copied = 0;

    for (uint64_t i = 0; i < pages / 8 + 1; i++)
        copied += (uint64_t)__builtin_popcount(snapshot->have[i]);
    return pages - copied;
}

static void explain(int error, int pid, const struct snapshot *snapshot,
                    char why[ANALYZE_WHY_CHARS])
{
    if (error == -EMEDIUMTYPE)
        snprintf(why, ANALYZE_WHY_CHARS,
                 "process %d maps its guest's RAM shared: reading it would fill its holes", pid);
    else if (error == -EIO)
        snprintf(why, ANALYZE_WHY_CHARS, "%llu pages of process %d can't be read",
                 (unsigned long long)snapshot->unreadable, pid);
    else if (error == -ESRCH)
        snprintf(why, ANALYZE_WHY_CHARS, "process %d has ended, or its RAM has gone", pid);
    else
        snprintf(why, ANALYZE_WHY_CHARS, "the RAM of process %d can't be copied: %s", pid,
                 strerror(-error));
}

static void close_snapshot(struct snapshot *snapshot)
{
    if (snapshot->mem >= 0)
        close(snapshot->mem);
    if (snapshot->pagemap >= 0)
        close(snapshot->pagemap);
    if (snapshot->maps)
        fclose(snapshot->maps);
    free(snapshot->mappings);
    free(snapshot->have);
    free(snapshot->buffer);
}

int ctl_analyze_open_blocks(int pid, const struct analyze_block *blocks, size_t count,
                            struct analyze_file *ret_file, char why[ANALYZE_WHY_CHARS])
{
    struct snapshot snapshot = {.mem = -1, .pagemap = -1, .out = -1};
    uint64_t pages = 0;
    int error;

    for (size_t i = 0; i < count; i++)
        pages += blocks[i].pages;
    snapshot.have = calloc(pages / 8 + 1, 1);
    snapshot.buffer = malloc(CHUNK_PAGES * PAGE_BYTES);
    error = snapshot.have && snapshot.buffer ? open_files(&snapshot, pid) : -ENOMEM;
    if (error == 0)
        error = open_output(&snapshot, pages);
    if (error == 0)
        error = take(&snapshot, blocks, count);
    if (error == 0)
        error = ctl_analyze_open_raw(snapshot.out, pages, ret_file);
    if (error == 0) {
        ret_file->live = true;
        ret_file->unsettled = snapshot.unsettled;
        ret_file->absent = count_absent(&snapshot, pages);
    }
    if (error < 0)
        explain(error, pid, &snapshot, why);
    if (error < 0 && snapshot.out >= 0)
        close(snapshot.out);
    close_snapshot(&snapshot);
    return error;
}
