/* SPDX-License-Identifier: Apache-2.0 */
#include "index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "host.h"

#define SMALLEST 16U
/* Tags that are fetched together: they lie anywhere in memory, and one after the other each would
 * cost a cache miss. */
#define AHEAD 8U

/* A keyed permutation of 32 bits (multiply by an odd number and fold, twice). */
static uint32_t mix(const struct ksm_index *index, uint32_t tag)
{
    uint32_t mixed = (tag ^ index->key[0]) * 0x9e3779b1U;

    mixed = (mixed ^ mixed >> 15) * (index->key[1] | 1);
    return mixed ^ mixed >> 16;
}

static struct ksm_index_shard *shard_of(const struct ksm_index *index, uint32_t mixed)
{
    return &index->shards[mixed >> (32 - KSM_INDEX_SHARD_BITS)];
}

/* The place where a tag would like to be: what is left of it, scaled to the shard. */
static uint32_t home_of(const struct ksm_index_shard *shard, uint32_t mixed)
{
    return (uint32_t)((uint64_t)(mixed << KSM_INDEX_SHARD_BITS) * shard->size >> 32);
}

static uint32_t tag_of(const struct ksm_index *index, uint32_t ref)
{
    return *index->tag_at(index->owner, ref);
}

/* The tags of what stands from `at` on. */
static void fetch(const struct ksm_index *index, const struct ksm_index_shard *shard, uint32_t at)
{
    for (uint32_t i = 0; i < AHEAD && shard->entries[at] != KSM_REF_NONE; i++) {
        __builtin_prefetch(index->tag_at(index->owner, shard->entries[at]));
        if (++at == shard->size)
            at = 0;
    }
}

int ksm_index_start(struct ksm_index *index,
                    const uint32_t *(*tag_at)(const void *owner, uint32_t ref), const void *owner)
{
    void *shards = mmap(NULL, sizeof(struct ksm_index_shard) * KSM_INDEX_SHARDS,
                        PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int result;

    if (shards == MAP_FAILED)
        return -errno;
    *index = (struct ksm_index){.shards = shards, .tag_at = tag_at, .owner = owner};
    result = host_random(index->key, sizeof(index->key));
    if (result)
        ksm_index_stop(index);
    return result;
}

void ksm_index_stop(struct ksm_index *index)
{
    if (!index->shards)
        return;
    for (uint32_t i = 0; i < KSM_INDEX_SHARDS; i++)
        free(index->shards[i].entries);
    munmap(index->shards, sizeof(struct ksm_index_shard) * KSM_INDEX_SHARDS);
    index->shards = NULL;
}

static void place(struct ksm_index_shard *shard, uint32_t mixed, uint32_t ref)
{
    uint32_t at = home_of(shard, mixed);

    while (shard->entries[at] != KSM_REF_NONE) {
        if (++at == shard->size)
            at = 0;
    }
    shard->entries[at] = ref;
}

/* 16, 20, 24, 28, 32, 40, ...: four steps a doubling, the sizes that the allocator has too. */
static uint32_t size_above(uint32_t size)
{
    uint32_t step = 1;

    while (step * 8 <= size)
        step *= 2;
    return size + step;
}

static int resize(struct ksm_index *index, struct ksm_index_shard *shard, uint32_t size)
{
    struct ksm_index_shard grown = {.size = size, .used = shard->used};

    grown.entries = malloc(size * sizeof(*grown.entries));
    if (!grown.entries)
        return -ENOMEM;
    memset(grown.entries, 0xff, size * sizeof(*grown.entries));
    for (uint32_t i = 0; i < shard->size; i++) {
        uint32_t ref = shard->entries[i];

        if (i + AHEAD < shard->size && shard->entries[i + AHEAD] != KSM_REF_NONE)
            __builtin_prefetch(index->tag_at(index->owner, shard->entries[i + AHEAD]));
        if (ref != KSM_REF_NONE)
            place(&grown, mix(index, tag_of(index, ref)), ref);
    }
    index->size += size;
    index->size -= shard->size;
    free(shard->entries);
    *shard = grown;
    return 0;
}

int ksm_index_add(struct ksm_index *index, uint32_t tag, uint32_t ref)
{
    uint32_t mixed = mix(index, tag);
    struct ksm_index_shard *shard = shard_of(index, mixed);

    if ((uint64_t)(shard->used + 1) * 5 > (uint64_t)shard->size * 4) {
        int result = resize(index, shard, shard->size ? size_above(shard->size) : SMALLEST);
        if (result)
            return result;
    }
    place(shard, mixed, ref);
    shard->used++;
    index->used++;
    return 0;
}

void ksm_index_expect(const struct ksm_index *index, uint32_t tag, bool soon)
{
    uint32_t mixed = mix(index, tag), home;
    const struct ksm_index_shard *shard = shard_of(index, mixed);

    if (!shard->size)
        return;
    home = home_of(shard, mixed);
    if (soon)
        fetch(index, shard, home);
    else
        __builtin_prefetch(&shard->entries[home]);
}

uint32_t ksm_index_next(const struct ksm_index *index, uint32_t tag,
                        struct ksm_index_cursor *cursor)
{
    uint32_t mixed = mix(index, tag);
    const struct ksm_index_shard *shard = shard_of(index, mixed);

    if (!shard->size)
        return KSM_REF_NONE;
    if (!cursor->seen)
        cursor->place = home_of(shard, mixed);
    while (cursor->seen < shard->size) {
        uint32_t ref = shard->entries[cursor->place];

        if (ref == KSM_REF_NONE)
            break;
        if (cursor->seen++ % AHEAD == 0 && cursor->seen > 1) /* the first were expected */
            fetch(index, shard, cursor->place);
        if (++cursor->place == shard->size)
            cursor->place = 0;
        if (tag_of(index, ref) == tag)
            return ref;
    }
    return KSM_REF_NONE;
}

/* Moves what stands behind a freed place forward, so that no search ends early. */
static void close_gap(const struct ksm_index *index, struct ksm_index_shard *shard, uint32_t gap)
{
    uint32_t at = gap;

    fetch(index, shard, gap);
    for (;;) {
        uint32_t home, ref;

        if (++at == shard->size)
            at = 0;
        ref = shard->entries[at];
        if (ref == KSM_REF_NONE)
            break;
        home = home_of(shard, mix(index, tag_of(index, ref)));
        /* It may move to the gap unless its home lies behind the gap, cyclically. */
        if (gap <= at ? (gap < home && home <= at) : (gap < home || home <= at))
            continue;
        shard->entries[gap] = ref;
        gap = at;
    }
    shard->entries[gap] = KSM_REF_NONE;
}

static void shrink(struct ksm_index *index, struct ksm_index_shard *shard)
{
    uint32_t size = SMALLEST;

    if (shard->size <= SMALLEST || (uint64_t)shard->used * 3 >= shard->size)
        return;
    while ((uint64_t)shard->used * 3 > (uint64_t)size * 2)
        size = size_above(size);
    (void)resize(index, shard, size); /* without memory it stays as large as it is */
}

bool ksm_index_remove(struct ksm_index *index, uint32_t tag, uint32_t ref)
{
    uint32_t mixed = mix(index, tag);
    struct ksm_index_shard *shard = shard_of(index, mixed);
    uint32_t at;

    if (!shard->size)
        return false;
    at = home_of(shard, mixed);
    for (uint32_t seen = 0; shard->entries[at] != ref; seen++) {
        if (shard->entries[at] == KSM_REF_NONE || seen == shard->size)
            return false;
        if (++at == shard->size)
            at = 0;
    }
    close_gap(index, shard, at);
    shard->used--;
    index->used--;
    shrink(index, shard);
    return true;
}
