/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A daemon in this very thread, and agents that are no more than the protocol: an array of pages, a
 * socket, a ring. Nothing runs by itself: a test turns the loop until what it waits for is there.
 */
#ifndef TESTS_UNIT_HOST_WORLD_H
#define TESTS_UNIT_HOST_WORLD_H

#include "daemon.h"
#include "member.h"
#include "protocol.h"

struct world {
    struct daemon daemon;
    char dir[64];
    bool running;
    unsigned grace_s; /* 0: 2 */
};

#define FAKE_SEGMENTS 4096

/* What the fake agent believes about each of its pages. */
struct fake_page {
    uint32_t color; /* its content; 0 is the zero page */
    uint32_t slot;  /* SLOT_NONE: private */
    bool offered;
};

struct fake {
    struct world *world;
    struct guest *guest; /* NULL once it is gone */
    char token[PROTOCOL_TOKEN_BYTES + 1];
    int fd, ring_fd;
    struct ring *ring;
    uint32_t own_head, own_tail; /* of to_memd and to_agent */
    struct hash_secret secret;
    uint64_t session;
    uint32_t page_count;
    struct fake_page *pages;
    int segments[FAKE_SEGMENTS]; /* descriptors; -1: not held */
    uint32_t segment_pages[FAKE_SEGMENTS];
    bool lies;             /* it sends other content than it offered */
    bool answers;          /* false: it reads nothing and says nothing */
    bool ended;            /* the connection was closed by memd */
    uint32_t busy_percent; /* MERGEs that it refuses as pinned */
    uint64_t wants, merges, remaps, drops;
    struct message_words detach; /* the last DETACH or REFUSED */
    struct message_tune tune;
    bool detach_came;
};

/* Lines of memd.conf: a domain "web" that admits this process. */
const char *world_web(void);
/* config: lines of memd.conf behind the usual [host]; may be "". */
void world_start(struct world *world, const char *config);
void world_stop(struct world *world);
/* As start, on the state of a world that was stopped (or killed). */
void world_restart(struct world *world, const char *config);
void world_remove(struct world *world);
void world_turn(struct world *world);

/* Turns the loop (and lets fakes answer) until condition is true, or fails after 20 s. */
#define UNTIL(world, fakes, count, condition)                      \
    do {                                                           \
        int turns_;                                                \
        for (turns_ = 0; turns_ < 20000 && !(condition); turns_++) \
            fakes_turn(world, fakes, count);                       \
        cr_assert((condition), "never came: %s", #condition);      \
    } while (0)

/* A guest that is registered with this process as its VMM. domain may be NULL. */
struct guest *world_register(struct world *world, const char *name, const char *domain);

void fake_connect(struct fake *fake, struct world *world, const char *token);
/* HELLO and WELCOME. false: refused, or the connection ended. */
bool fake_hello(struct fake *fake, bool held);
/* Registers, connects, says hello and announces its pages. */
void fake_join(struct fake *fake, struct world *world, const char *name, const char *domain,
               uint32_t pages);
void fake_ram(struct fake *fake, uint32_t first_page, uint32_t pages, uint64_t hva);
void fake_send(struct fake *fake, const void *message, uint32_t bytes, int fd);
void fake_put(struct fake *fake, uint32_t op, uint32_t page, uint64_t arg);
void fake_bell(struct fake *fake);
/* Reads and answers what there is. */
void fake_turn(struct fake *fake);
void fakes_turn(struct world *world, struct fake *fakes, size_t count);
void fake_close(struct fake *fake);
/* The connection goes, the memory and the segments stay. */
void fake_disconnect(struct fake *fake);

/* Writes other content into a page; a share of it ends. */
void fake_write(struct fake *fake, uint32_t page, uint32_t color);
void fake_offer(struct fake *fake, uint32_t page);
void fake_offer_all(struct fake *fake);
void fake_stats(struct fake *fake);
uint32_t fake_shared(const struct fake *fake);
/* Starts the world with two guests of the domain "web", "a" and "b", that share all their pages. */
void fakes_share(struct world *world, struct fake *fakes, uint32_t pages);
/* The bytes behind a color. */
void fake_content(uint32_t color, void *into);

struct trust_domain *fake_domain(const struct fake *fake);

#endif
