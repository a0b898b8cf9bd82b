/* SPDX-License-Identifier: Apache-2.0 */
#include "index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "host.h"

#define LINE_BYTES 64U
/* A bucket grows by so many entries, and shrinks when twice as many are free. */
#define STEP 16U
/* Two buckets become one when they would have no more than this on average. */
#define FEW        (KSM_INDEX_BUCKET / 3)
#define FIRST_ROOM 256U
/* Tags that are fetched while others are read: they lie anywhere in memory. */
#define AHEAD 16U

/* ---- one bucket ---- */

static uint32_t *refs_of(const struct ksm_bucket *bucket)
{
    return (uint32_t *)(void *)(bucket->marks + bucket->size);
}

static size_t bytes_of(uint32_t size)
{
    return size * (sizeof(uint8_t) + sizeof(uint32_t));
}

static int resize(struct ksm_index *index, struct ksm_bucket *bucket, uint32_t size)
{
    struct ksm_bucket other = {.size = size, .used = bucket->used};

    other.marks = size ? calloc(1, bytes_of(size)) : NULL; /* marks that are compared are defined */
    if (size && !other.marks)
        return -ENOMEM;
    if (other.marks && bucket->marks) {
        memcpy(other.marks, bucket->marks, bucket->used);
        memcpy(refs_of(&other), refs_of(bucket), bucket->used * sizeof(uint32_t));
    }
    index->bytes += bytes_of(size);
    index->bytes -= bytes_of(bucket->size);
    free(bucket->marks);
    *bucket = other;
    return 0;
}

static int make_room(struct ksm_index *index, struct ksm_bucket *bucket, uint32_t entries)
{
    uint32_t wanted = (bucket->used + entries + STEP - 1) / STEP * STEP;

    return wanted > bucket->size ? resize(index, bucket, wanted) : 0;
}

static void leave_room(struct ksm_index *index, struct ksm_bucket *bucket)
{
    if (bucket->size - bucket->used >= 2 * STEP)
        (void)resize(index, bucket, (bucket->used + STEP - 1) / STEP * STEP);
}

/* There is room. */
static void append(struct ksm_bucket *bucket, uint8_t mark, uint32_t ref)
{
    bucket->marks[bucket->used] = mark;
    refs_of(bucket)[bucket->used++] = ref;
}

/* What stands from `first` on. There is room. */
static void move_tail(struct ksm_bucket *from, uint32_t first, struct ksm_bucket *to)
{
    uint32_t count = from->used - first;

    if (count == 0 || !to->marks)
        return; /* (who has something to move has made room) */
    memcpy(to->marks + to->used, from->marks + first, count);
    memcpy(refs_of(to) + to->used, refs_of(from) + first, count * sizeof(uint32_t));
    to->used += count;
    from->used = first;
}

static void take_out(struct ksm_bucket *bucket, uint32_t at)
{
    uint32_t *refs = refs_of(bucket);

    bucket->used--;
    bucket->marks[at] = bucket->marks[bucket->used];
    refs[at] = refs[bucket->used];
}

typedef uint8_t many_marks __attribute__((vector_size(STEP)));

/* The next place from `at` on that has this mark; `used` or more: there is none. A step's marks are
 * compared at once: a byte of `same` is 0xff where they are equal. */
static uint32_t find_mark(const struct ksm_bucket *bucket, uint8_t mark, uint32_t at)
{
    while (at < bucket->used) {
        uint32_t start = at - at % STEP;
        many_marks marks;
        uint64_t same[2];

        memcpy(&marks, bucket->marks + start, sizeof(marks));
        marks = (many_marks)(marks == mark);
        memcpy(same, &marks, sizeof(same));
        for (; (same[0] | same[1]) && at < start + STEP; at += 8 - at % 8) {
            uint64_t rest = same[at % STEP / 8] >> at % 8 * 8;

            if (rest)
                return at + (uint32_t)__builtin_ctzll(rest) / 8; /* little-endian */
        }
        at = start + STEP;
    }
    return bucket->used;
}

/* ---- which bucket ---- */

/* A keyed permutation of 32 bits (multiply by an odd number and fold, twice). */
static uint32_t mix(const struct ksm_index *index, uint32_t tag)
{
    uint32_t mixed = (tag ^ index->key[0]) * 0x9e3779b1U;

    mixed = (mixed ^ mixed >> 15) * (index->key[1] | 1);
    return mixed ^ mixed >> 16;
}

static uint8_t mark_of(uint32_t mixed)
{
    return (uint8_t)(mixed >> 24);
}

static uint32_t tag_of(const struct ksm_index *index, uint32_t ref)
{
    return *index->tag_at(index->owner, ref);
}

/* As many low bits as number all buckets; what would lie behind the last has not been split off. */
static uint32_t number_of(const struct ksm_index *index, uint32_t mixed)
{
    uint32_t mask = UINT32_MAX >> __builtin_clz(index->bucket_count | 1);
    uint32_t number = mixed & mask;

    return number < index->bucket_count ? number : number & mask >> 1;
}

static struct ksm_bucket *bucket_of(const struct ksm_index *index, uint32_t mixed)
{
    return &index->buckets[number_of(index, mixed)];
}

/* The bucket that bucket `number` was split off, by its top bit. */
static struct ksm_bucket *origin_of(const struct ksm_index *index, uint32_t number)
{
    return &index->buckets[number & ~(1U << (31 - __builtin_clz(number)))];
}

static int widen(struct ksm_index *index)
{
    size_t bytes = index->bucket_room * sizeof(*index->buckets);
    void *wider;

    if (index->bucket_count < index->bucket_room)
        return 0;
    wider = mremap(index->buckets, bytes, bytes * 2, MREMAP_MAYMOVE);
    if (wider == MAP_FAILED)
        return -ENOMEM;
    index->buckets = wider;
    index->bucket_room *= 2;
    return 0;
}

/* Orders the bucket: first the entries that stay when it is split by this bit. Returns how many. */
static uint32_t part(const struct ksm_index *index, struct ksm_bucket *bucket, uint32_t bit)
{
    uint32_t *refs = refs_of(bucket), stay = 0;

    for (uint32_t i = 0; i < bucket->used; i++) {
        uint32_t ref = refs[i];
        uint8_t mark = bucket->marks[i];

        if (i + AHEAD < bucket->used)
            __builtin_prefetch(index->tag_at(index->owner, refs[i + AHEAD]));
        if (mix(index, tag_of(index, ref)) & bit)
            continue;
        refs[i] = refs[stay];
        bucket->marks[i] = bucket->marks[stay];
        refs[stay] = ref;
        bucket->marks[stay++] = mark;
    }
    return stay;
}

/* Without memory the buckets only become longer. */
static void split_one(struct ksm_index *index)
{
    uint32_t number = index->bucket_count, stay;
    struct ksm_bucket *from, *to;

    if (widen(index))
        return;
    from = origin_of(index, number);
    to = &index->buckets[number];
    *to = (struct ksm_bucket){0};
    stay = part(index, from, 1U << (31 - __builtin_clz(number)));
    if (make_room(index, to, from->used - stay))
        return;
    move_tail(from, stay, to);
    index->bucket_count++;
    index->bytes += sizeof(*to);
    leave_room(index, from);
}

/* The last bucket goes back to where it was split off. */
static void join_one(struct ksm_index *index)
{
    uint32_t number = index->bucket_count - 1;
    struct ksm_bucket *from = &index->buckets[number], *to = origin_of(index, number);

    if (make_room(index, to, from->used))
        return;
    move_tail(from, 0, to);
    (void)resize(index, from, 0);
    index->bucket_count--;
    index->bytes -= sizeof(*from);
}

/* ---- the index ---- */

int ksm_index_start(struct ksm_index *index,
                    const uint32_t *(*tag_at)(const void *owner, uint32_t ref), const void *owner)
{
    void *buckets = mmap(NULL, FIRST_ROOM * sizeof(struct ksm_bucket), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int result;

    if (buckets == MAP_FAILED)
        return -errno;
    *index = (struct ksm_index){.buckets = buckets,
                                .bucket_count = 1,
                                .bucket_room = FIRST_ROOM,
                                .tag_at = tag_at,
                                .owner = owner};
    result = host_random(index->key, sizeof(index->key));
    if (result)
        ksm_index_stop(index);
    return result;
}

void ksm_index_stop(struct ksm_index *index)
{
    if (!index->buckets)
        return;
    for (uint32_t i = 0; i < index->bucket_count; i++)
        free(index->buckets[i].marks);
    munmap(index->buckets, index->bucket_room * sizeof(*index->buckets));
    index->buckets = NULL;
}

int ksm_index_add(struct ksm_index *index, uint32_t tag, uint32_t ref)
{
    uint32_t mixed = mix(index, tag);
    struct ksm_bucket *bucket = bucket_of(index, mixed);
    int result = make_room(index, bucket, 1);

    if (result)
        return result;
    append(bucket, mark_of(mixed), ref);
    index->used++;
    if (index->used > (uint64_t)index->bucket_count * KSM_INDEX_BUCKET)
        split_one(index);
    return 0;
}

void ksm_index_expect(const struct ksm_index *index, uint32_t tag, bool soon)
{
    uint32_t mixed = mix(index, tag), at = 0;
    const struct ksm_bucket *bucket = bucket_of(index, mixed);

    if (!soon) {
        for (; at < bucket->used; at += LINE_BYTES)
            __builtin_prefetch(bucket->marks + at);
        if (bucket->size > 0) /* what is not found is added */
            __builtin_prefetch(refs_of(bucket) + bucket->used);
        return;
    }
    while ((at = find_mark(bucket, mark_of(mixed), at)) < bucket->used)
        __builtin_prefetch(index->tag_at(index->owner, refs_of(bucket)[at++]));
}

uint32_t ksm_index_next(const struct ksm_index *index, uint32_t tag,
                        struct ksm_index_cursor *cursor)
{
    uint32_t mixed = mix(index, tag);
    const struct ksm_bucket *bucket = bucket_of(index, mixed);

    while ((cursor->at = find_mark(bucket, mark_of(mixed), cursor->at)) < bucket->used) {
        uint32_t ref = refs_of(bucket)[cursor->at++];

        if (tag_of(index, ref) == tag)
            return ref;
    }
    return KSM_REF_NONE;
}

bool ksm_index_remove(struct ksm_index *index, uint32_t tag, uint32_t ref)
{
    uint32_t mixed = mix(index, tag), at = 0;
    struct ksm_bucket *bucket = bucket_of(index, mixed);

    while ((at = find_mark(bucket, mark_of(mixed), at)) < bucket->used &&
           refs_of(bucket)[at] != ref)
        at++;
    if (at >= bucket->used)
        return false;
    take_out(bucket, at);
    leave_room(index, bucket);
    index->used--;
    if (index->bucket_count > 1 && index->used < (uint64_t)index->bucket_count * FEW)
        join_one(index);
    return true;
}
