/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Guest RAM as the agent holds it: the blocks that the VMM announced, the table of places, and
 * the descriptors through which the kernel lets us move pages under a running guest.
 *
 * Three userfaultfds, since a VMA belongs to one at a time:
 *   guest_fd   the guest's anonymous memory, where it is armed: MISSING (so that a hole made by a
 *              freeze makes the guest wait) and WP_ASYNC (so that PAGEMAP_SCAN knows what changed)
 *   store_fd   mappings of the store: write-protected, a write is a fault that we serve
 *   shadow_fd  the shadows, see below; never read, only UFFDIO_COPY is done through it
 *
 * The shadow of a block is an anonymous mapping of the same size and attributes, empty at rest. A
 * page that gets a copy of its own (a broken share), or becomes empty (a discard), is prepared in
 * the shadow and moved over the guest's address by one mremap(MREMAP_DONTUNMAP): there is no
 * moment at which the guest could see anything but its bytes. The guest's own memory was moved
 * out of the shadow too when the block was taken in (if nothing was in it yet), so that all of it
 * has the same anon_vma and page offsets and the kernel joins the VMAs again (tried on 6.18: after
 * 4,000 single breaks one VMA is left, where pages prepared elsewhere left one each).
 *
 * Locking: one lock per block, taken by whoever changes mappings or places: interposed calls of
 * the VMM, the fault handler, the scanner (from freeze to thaw). Nobody waits for another thread
 * while holding it.
 */
#ifndef MEMD_PAGES_RAM_H
#define MEMD_PAGES_RAM_H

#include "lock.h"
#include "page_source.h"
#include "transitions.h"
#include "units.h"

#define RAM_MAX_BLOCKS 64U

/* A page's byte in the table of places. */
#define TABLE_PLACE_MASK 0x07U
/* The page must not be frozen: it is private, but in a mapping of the store (the kernel copied it
 * before it was protected, and UFFDIO_MOVE refuses it there), or it could not be registered. Ends
 * with a discard. */
#define TABLE_CAPTIVE       0x08U
#define TABLE_PATIENCE_UNIT 0x10U /* bits 4-5: how often its share was broken, up to 3 */
#define TABLE_PATIENCE_MASK 0x30U
#define TABLE_WAIT_UNIT     0x40U /* bits 6-7: quiet passes still to come before it is a candidate */
#define TABLE_WAIT_MASK     0xc0U
/* A remote page is neither patient nor waiting: there, one of these bits says that somebody waits
 * for it and that it was asked for. */
#define TABLE_REQUESTED 0x10U

/* madvise() attributes that the VMM gave the whole block, and that must survive MAP_FIXED. */
#define RAM_DONTFORK   1U
#define RAM_DONTDUMP   2U
#define RAM_HUGEPAGE   4U
#define RAM_NOHUGEPAGE 8U
/* Not one of madvise()'s: when the guest moves, the VMM moves this block by itself. */
#define RAM_VMM_MOVES 16U

/* How a 2 MiB piece of a block is mapped and whether it is armed. */
enum chunk_state {
    CHUNK_EMPTY, /* nothing there; not armed */
    CHUNK_HUGE,  /* one huge page; not armed */
    CHUNK_HOT,   /* in 4 KiB pages nearly all of which change all the time; not armed */
    CHUNK_ARMED, /* in 4 KiB pages, registered with guest_fd (and partly with store_fd) */
};

/* Pages of a huge block that are hashed to judge it. 16 of 512 find a block of which a quarter
 * changes in 99 of 100 cases, for 13 us. */
#define CHUNK_SAMPLES 16U

/* Pages whose share ended, for the scanner to report: a hint where to look. When it is full,
 * `overflow` says: look everywhere (told bitmap against table of places). */
#define BROKEN_QUEUE 1024U

struct broken_queue {
    struct lock lock;
    bool overflow;
    uint32_t count;
    uint32_t pages[BROKEN_QUEUE]; /* guest page numbers */
};

struct chunk {
    uint8_t state;
    uint8_t sampled;     /* huge: there are samples to compare with */
    uint8_t backoff;     /* hot: passes to skip before it is looked at again */
    uint8_t hot_passes;  /* armed: passes in a row in which nearly all of it was written; huge:
                            the last backoff */
    uint8_t fruitless;   /* armed: looks in a row that found nothing new (scan.h) */
    uint8_t tracked;     /* not armed: registered for write tracking alone, while it migrates */
    uint32_t changed_ms; /* huge: when the samples last were not what they had been */
    uint32_t samples[CHUNK_SAMPLES];
};

struct ram_block {
    struct lock lock;
    /* Held by the scanner while it reads the guest's pages (which may have to wait for the fault
     * handler, so it can't hold `lock` then), and taken before `lock` by whoever unmaps them. */
    struct lock reading;
    bool live;
    bool resting;    /* stood down: nothing in it is shared or armed, nothing is to be */
    bool given_back; /* rests for good; here only for what could not be undone */
    uint8_t *base;
    uint8_t *shadow;
    uint32_t pages;
    uint32_t first_page; /* page number of base[0] in the guest */
    uint32_t attributes; /* RAM_... */
    uint32_t chunk_count;
    uint32_t chunk_offset; /* pages of the first 2 MiB unit that lie before base */
    uint8_t *table;        /* one byte a page: place and flags */
    uint32_t *slots;       /* one a page; meaningful while the page is shared */
    uint64_t *told;        /* bitmap: memd was told that the page is shared (scanner only) */
    uint64_t *young; /* bitmap: written at the last scan, not yet offered (consumer: sharing) */
    struct chunk *chunks;
    uint16_t *chunk_shared; /* one a chunk: its pages that are shared */
    uint64_t counts[PLACE_COUNT];
    uint64_t captives;
    void *arrays; /* what the pointers above point into, one mapping */
    size_t arrays_bytes;
};

struct guest_ram {
    int guest_fd;
    int store_fd;
    int shadow_fd;
    int pagemap_fd;
    uint8_t *staging;      /* FREEZE_MAX_PAGES pages, registered with guest_fd */
    uint32_t staged;       /* of these, from the first on: used by freezes that are over */
    uint8_t *huge_staging; /* room for one huge page, likewise; NULL: huge pages are split */
    bool huge_staged;      /* used by a freeze that is over */
    uint8_t *frozen;       /* in one of the two: the first page of the freeze under way */
    uint64_t huge_freezes; /* huge pages that were frozen whole, ever */
    /* Set by who opens a file for direct I/O: nothing is frozen until its file system was looked
     * at. */
    uint32_t direct_io_changed;
    struct page_source sources[PLACE_COUNT];
    struct lock adding; /* held by who takes a block in */
    uintptr_t lowest;   /* of all live blocks */
    uintptr_t highest;
    uint32_t block_count;
    uint32_t next_page;
    struct ram_block blocks[RAM_MAX_BLOCKS];
    struct broken_queue broken;
    uint64_t unmerges; /* shares that ended, ever */
    uint64_t discards; /* those of them that ended by a discard */
    /* The VMAs that shares may cost when they are made or end, from now on, and (an estimate) what
     * they have cost. 0 allowed: nobody counts. */
    int64_t vmas_allowed;
    int64_t vmas_spent;
    uint64_t refused_transitions; /* a defect of ours: reported, never corrected */
};

/*
 * Opens the three userfaultfds and the staging area. `dev_userfaultfd` is a descriptor of
 * /dev/userfaultfd (Linux 6.1) or -1 for the system call. Returns 0, or -errno and one word of
 * what is missing in *ret_reason (static storage): -ENOSYS for a kernel without WP_ASYNC (6.7) or
 * MOVE (6.8), -EPERM where userfaultfd is withheld, -ENOTSUP where mremap may leave a gap.
 */
int ram_open(struct guest_ram *ram, int dev_userfaultfd, const char **ret_reason);

/* Closes what ram_open opened. Every block must have been released. */
void ram_close(struct guest_ram *ram);

/*
 * Takes a block in. The range must be whole pages of one kind: private, anonymous, readable and
 * writable, not locked, not huge TLB, not registered with somebody's userfaultfd (ram_inspect
 * tells). With `fresh` the caller promises that no other thread touches it now; if nothing is in
 * it, it is replaced by a piece of its shadow. Any thread. Returns 0 and the block, or -errno.
 */
int ram_add(struct guest_ram *ram, void *base, size_t bytes, uint32_t attributes, bool fresh,
            struct ram_block **ret_block);

/*
 * Looks at what is mapped at the range (/proc/self/smaps). Returns 0 and the attributes when it
 * can be managed, or -errno with the reason in words (static storage) when it must be left alone.
 */
int ram_inspect(const void *base, size_t bytes, uint32_t *ret_attributes, const char **ret_reason);

/* Gives a mapping the attributes (RAM_...). */
void ram_apply_attributes(uint8_t *at, size_t bytes, uint32_t attributes);

/* Gives the block's shadow, and so what is made of it, a NUMA policy: mbind(2)'s arguments. */
void ram_apply_policy(const struct ram_block *block, int mode, const unsigned long *mask,
                      unsigned long max);

/* The live block that holds `address`, or NULL. */
struct ram_block *ram_find(struct guest_ram *ram, const void *address);
/* The live block that holds guest page `page`, or NULL. */
struct ram_block *ram_find_page(struct guest_ram *ram, uint32_t page);

/* Memory of a block is no longer ours: forgets it. Caller holds the lock and has un-shared it or
 * is about to unmap it. */
void ram_forget(struct guest_ram *ram, struct ram_block *block);

/* Takes the lock of every live block (around fork). */
void ram_lock_all(struct guest_ram *ram);
void ram_unlock_all(struct guest_ram *ram);
/* The same in the child. */
void ram_reset_locks(struct guest_ram *ram);

static inline uint8_t *ram_address(const struct ram_block *block, uint32_t index)
{
    return block->base + (size_t)index * PAGE_BYTES;
}

/* Remote, and somebody waits for it. */
static inline bool ram_requested(const struct ram_block *block, uint32_t index)
{
    return (block->table[index] & (TABLE_PLACE_MASK | TABLE_REQUESTED)) ==
           (PLACE_REMOTE | TABLE_REQUESTED);
}

static inline uint8_t *ram_shadow(const struct ram_block *block, uint32_t index)
{
    return block->shadow + (size_t)index * PAGE_BYTES;
}

static inline enum place ram_place(const struct ram_block *block, uint32_t index)
{
    return (enum place)(block->table[index] & TABLE_PLACE_MASK);
}

static inline bool ram_captive(const struct ram_block *block, uint32_t index)
{
    return block->table[index] & TABLE_CAPTIVE;
}

/* First page of chunk `c`, and the page behind its last one. */
static inline uint32_t ram_chunk_first(const struct ram_block *block, uint32_t c)
{
    return c == 0 ? 0 : c * (uint32_t)HUGE_PAGES - block->chunk_offset;
}

static inline uint32_t ram_chunk_end(const struct ram_block *block, uint32_t c)
{
    uint32_t end = (c + 1) * (uint32_t)HUGE_PAGES - block->chunk_offset;

    return end < block->pages ? end : block->pages;
}

static inline uint32_t ram_chunk_of(const struct ram_block *block, uint32_t index)
{
    return (index + block->chunk_offset) / (uint32_t)HUGE_PAGES;
}

/* Every page of the chunk is shared: whoever writes there runs into the fault handler. */
static inline bool ram_chunk_is_shared(const struct ram_block *block, uint32_t c)
{
    return block->chunk_shared[c] == ram_chunk_end(block, c) - ram_chunk_first(block, c);
}

static inline bool ram_young(const struct ram_block *block, uint32_t index)
{
    return block->young[index / 64] >> (index % 64) & 1;
}

static inline void ram_set_young(struct ram_block *block, uint32_t index, bool young)
{
    uint64_t bit = 1ULL << (index % 64);

    if (young)
        block->young[index / 64] |= bit;
    else
        block->young[index / 64] &= ~bit;
}

/* Moves the place of `pages` pages from `index` by a transition. Caller holds the lock. A
 * transition that the table refuses leaves that page's place alone and is counted. */
void ram_move_places(struct guest_ram *ram, struct ram_block *block, uint32_t index, uint32_t pages,
                     enum transition transition);

/* Notes that the shares of these pages have ended. Caller holds the block's lock. */
void ram_note_broken(struct guest_ram *ram, const struct ram_block *block, uint32_t index,
                     uint32_t pages);

/* Pages [index, index + pages) are to leave the store's mappings. How many VMAs that makes, -2 to
 * 2, if the kernel joins what it can. Caller holds the lock. */
int ram_split_cost(const struct ram_block *block, uint32_t index, uint32_t pages);
/* May so many be spent? If not, the VMM itself would soon get no mapping any more. */
bool ram_may_spend(const struct guest_ram *ram, int vmas);
void ram_spend(struct guest_ram *ram, int vmas);

/* Sets or clears the captive flag. Caller holds the lock. */
void ram_set_captive(struct ram_block *block, uint32_t index, bool captive);

#endif
