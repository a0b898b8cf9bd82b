/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the bytes of a page come from when nobody holds them in the guest's own memory. There is
 * one source for each place (guest_ram.sources); the fault handler asks the one that belongs to
 * the page's place and puts what it gets under the guest.
 */
#ifndef MEMD_PAGES_PAGE_SOURCE_H
#define MEMD_PAGES_PAGE_SOURCE_H

#include "units.h"

struct ram_block;

struct page_source {
    const char *name;
    /*
     * The contents of pages `index`, `index` + 1, ... of `block`, as many as lie one behind the
     * other in the source, at most `pages`. Called with the block's lock held, on the handler's
     * thread or on one that un-shares; must not touch guest RAM and must not wait for another
     * thread of this process. Returns how many (at least 1) and their address in *ret_bytes,
     * valid until the lock is released; or -errno, *ret_bytes untouched. -EINPROGRESS: the bytes
     * were asked for, and the source places them by itself when they come.
     */
    int (*fetch)(void *self, const struct ram_block *block, uint32_t index, uint32_t pages,
                 const void **ret_bytes);
    void *self;
};

#endif
