/* SPDX-License-Identifier: Apache-2.0 */
/* The chunks that go round between the walk and the threads that compress. */
#include <criterion/criterion.h>
#include <dirent.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "analyze_compress.h"

#define CHUNKS 60U
#define PAGES  (CHUNKS * ANALYZE_CHUNK_PAGES)

static const struct analyze_file no_file = {.fd = -1};

/* Random bytes, then zeros: from `page` follows how many. */
static void fill(uint8_t *bytes, uint32_t page)
{
    unsigned seed = page + 1;
    uint32_t random = page % 5 == 0 ? PAGE_BYTES : (uint32_t)rand_r(&seed) % PAGE_BYTES;

    memset(bytes, 0, PAGE_BYTES);
    for (uint32_t i = 0; i < random; i++)
        bytes[i] = (uint8_t)rand_r(&seed);
}

static uint16_t naive_size(uint32_t page)
{
    char bytes[PAGE_BYTES], out[LZ4_COMPRESSBOUND(PAGE_BYTES)];
    int size;

    fill((uint8_t *)bytes, page);
    size = LZ4_compress_default(bytes, out, PAGE_BYTES, sizeof(out));
    return size < (int)PAGE_BYTES ? (uint16_t)size : (uint16_t)PAGE_BYTES;
}

/* Gives the chunk of the pages from `first` on, every third one of them wanted. */
static void give(struct analyze_compressor *compressor, uint32_t first)
{
    struct analyze_chunk *chunk = ctl_analyze_chunk_take(compressor, &no_file);

    chunk->first = first;
    chunk->pages = ANALYZE_CHUNK_PAGES;
    for (uint32_t i = 0; i < chunk->pages; i++) {
        fill(chunk->buffer + i * PAGE_BYTES, first + i);
        if ((first + i) % 3 == 0)
            chunk->wanted[chunk->wanted_count++] = (uint8_t)i;
    }
    ctl_analyze_chunk_give(compressor, chunk);
}

static size_t count_threads(void)
{
    DIR *tasks = opendir("/proc/self/task");
    size_t count = 0;

    cr_assert(tasks);
    for (const struct dirent *entry; (entry = readdir(tasks));)
        count += entry->d_name[0] != '.';
    closedir(tasks);
    return count;
}

Test(ctl_analyze_compress, every_wanted_page_and_no_other_gets_its_size)
{
    struct analyze_compressor *compressor;
    uint16_t *sizes = calloc(PAGES, sizeof(*sizes));
    uint64_t sum = 0, settled = 0;

    cr_assert(sizes && ctl_analyze_compressor_open(sizes, &compressor) == 0);
    for (uint32_t chunk = 0; chunk < CHUNKS; chunk++) {
        give(compressor, chunk * ANALYZE_CHUNK_PAGES);
        if (chunk % 25 == 24)
            settled += ctl_analyze_compressor_settle(compressor);
    }
    settled += ctl_analyze_compressor_settle(compressor);
    for (uint32_t page = 0; page < PAGES; page++) {
        uint16_t want = page % 3 == 0 ? naive_size(page) : 0;

        cr_expect(sizes[page] == want, "page %u: %u, not %u", page, sizes[page], want);
        sum += want;
    }
    cr_expect(settled == sum, "%lu bytes, not %lu", settled, sum);
    cr_expect(ctl_analyze_compressor_settle(compressor) == 0);
    ctl_analyze_compressor_close(compressor);
    free(sizes);
}

Test(ctl_analyze_compress, there_is_no_thread_when_nothing_is_to_be_compressed)
{
    struct analyze_compressor *compressor;
    size_t before = count_threads();

    cr_assert(ctl_analyze_compressor_open(NULL, &compressor) == 0);
    cr_expect(count_threads() == before);
    for (int i = 0; i < 3; i++) {
        struct analyze_chunk *chunk = ctl_analyze_chunk_take(compressor, &no_file);

        cr_expect(chunk->wanted_count == 0 && chunk->bytes == chunk->buffer);
        ctl_analyze_chunk_give(compressor, chunk);
    }
    cr_expect(ctl_analyze_compressor_settle(compressor) == 0);
    ctl_analyze_compressor_close(compressor);
}

/* As after an error of reading: what is queued need not be done, but nobody may be left behind. */
Test(ctl_analyze_compress, closing_in_the_middle_ends_every_thread, .timeout = 60)
{
    uint16_t *sizes = calloc(PAGES, sizeof(*sizes));
    size_t before = count_threads();

    for (int i = 0; i < 200; i++) {
        struct analyze_compressor *compressor;

        cr_assert(sizes && ctl_analyze_compressor_open(sizes, &compressor) == 0);
        cr_expect(count_threads() > before);
        for (int chunk = 0; chunk < i % 4; chunk++)
            give(compressor, (uint32_t)chunk * ANALYZE_CHUNK_PAGES);
        ctl_analyze_compressor_close(compressor);
        while (count_threads() != before) /* the kernel lets go of a thread after it was joined */
            usleep(1000);
    }
    free(sizes);
}
