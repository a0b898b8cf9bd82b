/* SPDX-License-Identifier: Apache-2.0 */
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#define PIECE 64U /* pages a writev */

int ksm_store_start(struct ksm_store *store, struct ksm_budget *budget)
{
    void *by_id = mmap(NULL, sizeof(struct ksm_segment *) * SEGMENTS_MAX, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (by_id == MAP_FAILED)
        return -errno;
    *store = (struct ksm_store){.by_id = by_id, .budget = budget};
    return 0;
}

void ksm_store_stop(struct ksm_store *store)
{
    if (!store->by_id)
        return;
    for (struct ksm_segment *segment = store->first, *next; segment; segment = next) {
        next = segment->next;
        ksm_store_close(store, segment);
    }
    munmap(store->by_id, sizeof(struct ksm_segment *) * SEGMENTS_MAX);
    store->by_id = NULL;
}

struct ksm_segment *ksm_store_segment(const struct ksm_store *store, uint32_t id)
{
    return id < KSM_SEGMENT_IDS ? store->by_id[id] : NULL;
}

/* ---- making and closing segments ---- */

static int take_id(struct ksm_store *store, uint32_t *ret_id)
{
    if (store->segment_count >= KSM_SEGMENT_IDS)
        return -ENOSPC;
    while (store->by_id[store->next_id])
        store->next_id = (store->next_id + 1) % KSM_SEGMENT_IDS;
    *ret_id = store->next_id;
    store->next_id = (store->next_id + 1) % KSM_SEGMENT_IDS;
    return 0;
}

static struct ksm_segment *new_segment(struct ksm_store *store, uint32_t id, uint32_t pages)
{
    struct ksm_segment *segment = calloc(1, sizeof(*segment));

    if (!segment)
        return NULL;
    *segment = (struct ksm_segment){.id = id, .pages = pages, .fd = -1};
    segment->tags = calloc(pages, sizeof(*segment->tags));
    segment->users_of = calloc(pages, sizeof(*segment->users_of));
    if (!segment->tags || !segment->users_of) {
        free(segment->tags);
        free(segment->users_of);
        free(segment);
        return NULL;
    }
    segment->next = store->first;
    if (store->first)
        store->first->previous = segment;
    store->first = segment;
    store->by_id[id] = segment;
    store->segment_count++;
    store->pages += pages;
    store->budget->used_pages += pages;
    return segment;
}

int ksm_store_create(struct ksm_store *store, uint32_t pages, struct ksm_segment **ret_segment)
{
    struct ksm_budget *budget = store->budget;
    struct ksm_segment *segment;
    uint32_t id;
    int result;

    if (pages == 0 || pages > SEGMENT_MAX_PAGES)
        return -EINVAL;
    if (budget->used_pages + pages > budget->limit_pages) {
        budget->refused_pages += pages;
        return -ENOSPC;
    }
    result = take_id(store, &id);
    if (result)
        return result;
    segment = new_segment(store, id, pages);
    if (!segment)
        return -ENOMEM;
    segment->fd = memfd_create("memd-store", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (segment->fd < 0 || ftruncate(segment->fd, (off_t)pages * (off_t)PAGE_BYTES)) {
        result = -errno;
        ksm_store_close(store, segment);
        return result;
    }
    *ret_segment = segment;
    return 0;
}

int ksm_store_write(struct ksm_segment *segment, uint32_t first, const void *const *pages,
                    uint32_t count)
{
    struct iovec pieces[PIECE];

    for (uint32_t done = 0; done < count;) {
        uint32_t now = count - done < PIECE ? count - done : PIECE;
        ssize_t wrote;

        for (uint32_t i = 0; i < now; i++)
            pieces[i] = (struct iovec){(void *)pages[done + i], PAGE_BYTES};
        wrote = pwritev(segment->fd, pieces, (int)now, (off_t)(first + done) * (off_t)PAGE_BYTES);
        if (wrote < 0)
            return -errno;
        if ((size_t)wrote != now * PAGE_BYTES)
            return -ENOSPC;
        done += now;
    }
    return 0;
}

int ksm_store_seal(struct ksm_store *store, struct ksm_segment *segment)
{
    struct stat about;

    if (fcntl(segment->fd, F_ADD_SEALS, SEALS) || fstat(segment->fd, &about))
        return -errno;
    segment->device = about.st_dev;
    segment->inode = about.st_ino;
    segment->state = SEGMENT_LIVE;
    segment->age = store->published++;
    return 0;
}

static bool is_sealed_file(int fd, uint64_t device, uint64_t inode, uint32_t pages)
{
    struct stat about;
    int seals = fcntl(fd, F_GET_SEALS);

    return seals >= 0 && (seals & SEALS) == SEALS && fstat(fd, &about) == 0 &&
           about.st_dev == device && about.st_ino == inode && about.st_uid == geteuid() &&
           about.st_size == (off_t)pages * (off_t)PAGE_BYTES;
}

int ksm_store_adopt(struct ksm_store *store, uint32_t id, uint32_t pages, uint64_t device,
                    uint64_t inode, int fd, struct ksm_segment **ret_segment)
{
    struct ksm_segment *segment;

    if (id >= KSM_SEGMENT_IDS || pages == 0 || pages > SEGMENT_MAX_PAGES)
        return -EPERM;
    if (store->by_id[id])
        return -EEXIST;
    if (!is_sealed_file(fd, device, inode, pages))
        return -EPERM;
    segment = new_segment(store, id, pages);
    if (!segment)
        return -ENOMEM;
    segment->fd = fd;
    segment->device = device;
    segment->inode = inode;
    segment->state = SEGMENT_TAKEN_BACK;
    segment->age = store->published++;
    *ret_segment = segment;
    return 0;
}

bool ksm_store_is(const struct ksm_segment *segment, int fd)
{
    return is_sealed_file(fd, segment->device, segment->inode, segment->pages);
}

void ksm_store_close(struct ksm_store *store, struct ksm_segment *segment)
{
    if (segment->previous)
        segment->previous->next = segment->next;
    else
        store->first = segment->next;
    if (segment->next)
        segment->next->previous = segment->previous;
    store->by_id[segment->id] = NULL;
    store->segment_count--;
    store->pages -= segment->pages;
    store->budget->used_pages -= segment->pages;
    store->used -= segment->used;
    store->users -= segment->users;
    if (segment->fd >= 0)
        close(segment->fd);
    free(segment->tags);
    free(segment->users_of);
    free(segment->moved);
    free(segment);
}

int ksm_store_read(const struct ksm_segment *segment, uint32_t page, uint32_t count, void *buffer)
{
    ssize_t got = pread(segment->fd, buffer, count * PAGE_BYTES, (off_t)page * (off_t)PAGE_BYTES);

    if (got < 0)
        return -errno;
    return (size_t)got == count * PAGE_BYTES ? 0 : -EIO;
}

/* ---- slots ---- */

static struct ksm_segment *segment_of(const struct ksm_store *store, uint32_t slot)
{
    struct ksm_segment *segment =
        slot == SLOT_NONE ? NULL : ksm_store_segment(store, SLOT_SEGMENT(slot));

    return segment && SLOT_PAGE(slot) < segment->pages ? segment : NULL;
}

const uint32_t *ksm_store_tag_at(const struct ksm_store *store, uint32_t slot)
{
    static const uint32_t nothing = 0;
    const struct ksm_segment *segment = segment_of(store, slot);

    return segment ? &segment->tags[SLOT_PAGE(slot)] : &nothing;
}

bool ksm_store_usable(const struct ksm_store *store, uint32_t slot, uint32_t tag)
{
    const struct ksm_segment *segment = segment_of(store, slot);

    return segment && segment->state == SEGMENT_LIVE && segment->tags[SLOT_PAGE(slot)] == tag &&
           segment->users_of[SLOT_PAGE(slot)] < KSM_SLOT_USERS_MAX;
}

bool ksm_store_has(const struct ksm_store *store, uint32_t slot)
{
    const struct ksm_segment *segment = segment_of(store, slot);

    return segment && segment->state != SEGMENT_WRITING;
}

void ksm_store_use(struct ksm_store *store, uint32_t slot)
{
    struct ksm_segment *segment = segment_of(store, slot);

    if (segment->users_of[SLOT_PAGE(slot)]++ == 0) {
        segment->used++;
        store->used++;
    }
    segment->users++;
    store->users++;
}

bool ksm_store_release(struct ksm_store *store, uint32_t slot)
{
    struct ksm_segment *segment = segment_of(store, slot);

    if (--segment->users_of[SLOT_PAGE(slot)] == 0) {
        segment->used--;
        store->used--;
    }
    segment->users--;
    store->users--;
    return segment->users == 0;
}
