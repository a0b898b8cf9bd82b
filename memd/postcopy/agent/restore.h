/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A saved guest that runs before its memory was read: pages are `remote`, and the source is a file
 * of this host in place of a connection.
 *
 * Who touches a remote page waits in a fault; the handler reads the page's bytes from the file and
 * places them. A thread of ours brings the rest, from the first page to the last, sixteen at a time
 * under the block's lock. Pages in holes of the file are absent from the beginning. Whatever the
 * guest or its VMM does to a page meanwhile, its bytes in the file count only while it is remote.
 *
 * The scanner may work beside it: remote pages are not its business, others are as ever.
 *
 * Invariants
 *   - a remote page is missing, and its chunk armed, as in a migration (incoming.h);
 *   - while there are remote pages no child of the VMM has this RAM (MADV_DONTFORK).
 *
 * It does not look at what it reads: a file that is changed meanwhile changes the guest. A page
 * that can't be read ends the bringing with an error; whoever touches such a page waits for ever.
 */
#ifndef MEMD_POSTCOPY_AGENT_RESTORE_H
#define MEMD_POSTCOPY_AGENT_RESTORE_H

#include <pthread.h>

#include "ram.h"

#define RESTORE_WINDOW_PAGES 16U

enum restore_state { RESTORE_NONE, RESTORE_RUNS, RESTORE_DONE, RESTORE_FAILED };

struct restore {
    struct guest_ram *ram;
    struct ram_block *block;
    int fd;
    uint64_t offset;
    pthread_t thread;
    uint32_t state;           /* futex; enum restore_state */
    int32_t result;           /* why it failed */
    uint32_t stop;            /* 1: the thread is to end */
    uint8_t page[PAGE_BYTES]; /* what the handler reads into, under the block's lock */
    uint8_t window[RESTORE_WINDOW_PAGES * PAGE_BYTES]; /* the thread's own */
};

/* Empties the block and makes its pages remote: those that [offset, offset + size of the block) of
 * the file has data for. 0 or -errno: -EINVAL (an offset that is no page's), -ENODATA (the file is
 * shorter), -EBUSY (another one runs, or pages are remote already), -EAGAIN (the agent has stood
 * down); then the block is as it was, but it may be empty. The descriptor stays the caller's. */
int restore_begin(struct restore *restore, struct guest_ram *ram, struct ram_block *block, int fd,
                  uint64_t offset);

/* Waits until every page is there: 0, and the file is not needed any more; or the error that ends
 * it. -ENOENT: nothing was begun. Any thread. */
int restore_wait(struct restore *restore);

/* Ends the thread, whatever is left. */
void restore_close(struct restore *restore);

#endif
