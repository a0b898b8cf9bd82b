/* SPDX-License-Identifier: Apache-2.0 */
#include "segments.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "ram.h"
#include "remap.h"

#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

struct held_segment *segments_find(struct segments *segments, uint32_t id)
{
    struct held_segment *held = &segments->table[id % SEGMENTS_HELD_MAX];

    return __atomic_load_n(&held->view, __ATOMIC_ACQUIRE) && held->id == id ? held : NULL;
}

static int check(uint32_t pages, int fd)
{
    struct stat st;
    long seals = sys_call2(SYS_fcntl, fd, F_GET_SEALS);

    if (seals < 0 || (seals & SEALS) != SEALS)
        return -EPERM;
    if (fstat(fd, &st) < 0 || pages == 0 || pages > SEGMENT_MAX_PAGES ||
        st.st_size < (off_t)(pages * PAGE_BYTES))
        return -EINVAL;
    return 0;
}

int segments_add(struct segments *segments, uint32_t id, uint32_t pages, int fd)
{
    struct held_segment *held = &segments->table[id % SEGMENTS_HELD_MAX];
    size_t bytes = (size_t)pages * PAGE_BYTES;
    uint8_t *view;
    int r = check(pages, fd);

    if (r < 0)
        return r;
    if (held->view)
        return held->id == id ? -EEXIST : -ENOSPC;
    view = sys_mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (sys_failed(view))
        return (int)(intptr_t)view;
    ram_apply_attributes(view, bytes, REMAP_VIEW_ATTRIBUTES);
    held->id = id;
    held->pages = pages;
    held->fd = fd;
    held->to_be_dropped = false;
    __atomic_store_n(&held->view, view, __ATOMIC_RELEASE);
    return 0;
}

void segments_remove(struct segments *segments, uint32_t id)
{
    struct held_segment *held = segments_find(segments, id);
    uint8_t *view;

    if (!held)
        return;
    view = held->view;
    __atomic_store_n(&held->view, NULL, __ATOMIC_RELEASE);
    sys_munmap(view, (size_t)held->pages * PAGE_BYTES);
    sys_close(held->fd);
}

uint8_t *segments_view(struct segments *segments, uint32_t slot, uint32_t pages)
{
    struct held_segment *held = segments_find(segments, SLOT_SEGMENT(slot));

    if (!held || SLOT_PAGE(slot) >= held->pages || held->pages - SLOT_PAGE(slot) < pages)
        return NULL;
    return held->view + (size_t)SLOT_PAGE(slot) * PAGE_BYTES;
}

static int fetch(void *self, const struct ram_block *block, uint32_t index, uint32_t pages,
                 const void **ret_bytes)
{
    uint32_t slot = block->slots[index];
    uint32_t run = 1;
    uint8_t *view;

    while (run < pages && block->slots[index + run] == slot + run &&
           SLOT_SEGMENT(slot + run) == SLOT_SEGMENT(slot))
        run++;
    view = segments_view(self, slot, run);
    if (!view)
        return -ENOENT;
    *ret_bytes = view;
    return (int)run;
}

struct page_source segments_source(struct segments *segments)
{
    return (struct page_source){.name = "store", .fetch = fetch, .self = segments};
}
