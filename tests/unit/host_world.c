/* SPDX-License-Identifier: Apache-2.0 */
#include "host_world.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "log.h"
#include "send_with.h"

/* ---- the daemon ---- */

static void write_config(const struct world *world, const char *config)
{
    char path[128];
    FILE *file;

    snprintf(path, sizeof(path), "%s/memd.conf", world->dir);
    file = fopen(path, "w");
    cr_assert_not_null(file);
    fprintf(file, "[host]\nsocket = %s/memd.sock\nstate_dir = %s/state\ngrace_s = %u\n%s\n",
            world->dir, world->dir, world->grace_s ? world->grace_s : 2, config);
    fclose(file);
}

void world_restart(struct world *world, const char *config)
{
    char path[128], error[CONFIG_ERROR_BYTES];
    struct config parsed;

    log_setup(getenv("MEMD_TEST_LOG") ? LOG_LEVEL_DETAIL : LOG_LEVEL_ERROR);
    write_config(world, config);
    snprintf(path, sizeof(path), "%s/memd.conf", world->dir);
    cr_assert_eq(config_load(path, &parsed, error), 0, "%s", error);
    cr_assert_eq(daemon_start(&world->daemon, &parsed, path), 0);
    world->running = true;
}

void world_start(struct world *world, const char *config)
{
    *world = (struct world){.running = false};
    strcpy(world->dir, "/tmp/memd-unit-XXXXXX");
    cr_assert_not_null(mkdtemp(world->dir));
    world_restart(world, config);
}

static int remove_one(const char *path, const struct stat *about, int kind, struct FTW *walk)
{
    (void)about;
    (void)kind;
    (void)walk;
    return remove(path);
}

void world_remove(struct world *world)
{
    nftw(world->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

void world_stop(struct world *world)
{
    if (world->running)
        daemon_stop(&world->daemon);
    world->running = false;
    world_remove(world);
}

void world_turn(struct world *world)
{
    cr_assert_eq(loop_turn(&world->daemon.loop, 1000000), 0);
}

struct guest *world_register(struct world *world, const char *name, const char *domain)
{
    struct guest_request request = {.pid = getpid(), .uid = getuid(), .engine = ENGINE_AGENT};
    struct guest *guest = NULL;
    char words[512] = "";

    strcpy(request.name, name);
    strcpy(request.vmm, "test");
    request.wish.has_max = true;
    request.wish.max_bytes = 1 << 30;
    if (domain) {
        request.wish.has_domain = true;
        strcpy(request.wish.domain, domain);
    }
    cr_assert_eq(registry_add(&world->daemon, &request, &guest, words, sizeof(words)), 0, "%s",
                 words);
    return guest;
}

const char *world_web(void)
{
    static char config[64];

    snprintf(config, sizeof(config), "[domain web]\nuids = 0 %u\n", (unsigned)getuid());
    return config;
}

/* ---- an agent ---- */

void fake_content(uint32_t color, void *into)
{
    uint32_t *words = into, state = color * 2654435761U + 1;

    memset(into, 0, PAGE_BYTES);
    for (size_t i = 0; color && i < PAGE_BYTES / sizeof(*words); i++) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        words[i] = state;
    }
    if (color)
        words[7] = color;
}

static uint64_t hash_of(const struct fake *fake, uint32_t color)
{
    _Alignas(8) uint8_t content[PAGE_BYTES];

    fake_content(color, content);
    return hash_page(&fake->secret, content);
}

/* No test may start or stop the ksmd of the host that it runs on. */
const char *__wrap_host_ksm_directory(void);

const char *__wrap_host_ksm_directory(void)
{
    return "/nonexistent/ksm";
}

void fake_connect(struct fake *fake, struct world *world, const char *token)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    *fake = (struct fake){.world = world, .fd = -1, .ring_fd = -1, .answers = true};
    for (int i = 0; i < FAKE_SEGMENTS; i++)
        fake->segments[i] = -1;
    snprintf(fake->token, sizeof(fake->token), "%s", token);
    fake->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/memd.sock.agent", world->dir);
    cr_assert_eq(connect(fake->fd, (struct sockaddr *)&address, sizeof(address)), 0);
}

void fake_send(struct fake *fake, const void *message, uint32_t bytes, int fd)
{
    for (int tries = 0; tries < 1000; tries++) {
        if (send_with(fake->fd, message, bytes, &fd, fd >= 0, 0) != -EAGAIN)
            return;
        if (fake->world->running)
            world_turn(fake->world);
    }
}

void fake_put(struct fake *fake, uint32_t op, uint32_t page, uint64_t arg)
{
    for (int tries = 0; tries < 1000 && ring_room(&fake->ring->to_memd, fake->own_head) == 0;
         tries++) {
        fake_bell(fake);
        world_turn(fake->world);
    }
    ring_put(&fake->ring->to_memd, &fake->own_head, (struct ring_entry){op, page, arg});
}

void fake_bell(struct fake *fake)
{
    struct message_plain bell = {{MESSAGE_DOORBELL, sizeof(bell)}};

    fake_send(fake, &bell, sizeof(bell), -1);
}

void fake_ram(struct fake *fake, uint32_t first_page, uint32_t pages, uint64_t hva)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)},
                              .first_page = first_page,
                              .pages = pages,
                              .hva = hva,
                              .managed = 1};

    fake_send(fake, &ram, sizeof(ram), -1);
}

static void take_segment(struct fake *fake, const struct message_segment *message, int fd)
{
    cr_assert_lt(message->segment, FAKE_SEGMENTS);
    cr_assert_eq(fake->segments[message->segment], -1, "a segment came twice");
    fake->segments[message->segment] = fd;
    fake->segment_pages[message->segment] = message->pages;
}

static void drop_segment(struct fake *fake, const struct message_segment *message)
{
    struct message_segment dropped = *message;

    for (uint32_t page = 0; page < fake->page_count; page++)
        cr_assert(fake->pages[page].slot == SLOT_NONE ||
                      SLOT_SEGMENT(fake->pages[page].slot) != message->segment,
                  "DROP of a segment in use");
    close(fake->segments[message->segment]);
    fake->segments[message->segment] = -1;
    fake->drops++;
    dropped.header.type = MESSAGE_DROPPED;
    fake_send(fake, &dropped, sizeof(dropped), -1);
}

static void take_welcome(struct fake *fake, const struct message_welcome *welcome, const int *fds)
{
    fake->secret = welcome->secret;
    fake->session = welcome->session;
    fake->ring_fd = fds[0];
    fake->ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    cr_assert_neq(fake->ring, MAP_FAILED);
    if (fds[1] >= 0)
        close(fds[1]);
}

static void detach(struct fake *fake, const struct message_words *words)
{
    struct message_plain detached = {{MESSAGE_DETACHED, sizeof(detached)}};

    fake->detach = *words;
    fake->detach_came = true;
    for (uint32_t page = 0; page < fake->page_count; page++)
        fake->pages[page].slot = SLOT_NONE;
    fake_send(fake, &detached, sizeof(detached), -1);
}

static bool receive(struct fake *fake)
{
    _Alignas(8) uint8_t message[1024];
    char control[CMSG_SPACE(sizeof(int) * 2)];
    struct iovec piece = {message, sizeof(message)};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = control,
                            .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(fake->fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    struct message_header front;
    int fds[2] = {-1, -1};

    if (got <= 0) {
        fake->ended |= got == 0 || errno == ECONNRESET || errno == EPIPE;
        return false;
    }
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&header); part; part = CMSG_NXTHDR(&header, part))
        memcpy(fds, CMSG_DATA(part), part->cmsg_len - CMSG_LEN(0));
    memcpy(&front, message, sizeof(front));
    cr_assert_eq(front.bytes, (uint32_t)got);
    switch (front.type) {
    case MESSAGE_WELCOME: take_welcome(fake, (void *)message, fds); break;
    case MESSAGE_SEGMENT: take_segment(fake, (void *)message, fds[0]); break;
    case MESSAGE_DROP: drop_segment(fake, (void *)message); break;
    case MESSAGE_DETACH: detach(fake, (void *)message); break;
    case MESSAGE_REFUSED: fake->detach = *(struct message_words *)(void *)message; break;
    case MESSAGE_TUNE: fake->tune = *(struct message_tune *)(void *)message; break;
    case MESSAGE_DOORBELL: break;
    default: cr_assert_fail("memd sent a message %u", front.type);
    }
    return true;
}

/* Does the slot have the bytes that this page has? */
static bool same_content(const struct fake *fake, uint32_t page, uint32_t slot)
{
    uint8_t mine[PAGE_BYTES], theirs[PAGE_BYTES];
    int fd = fake->segments[SLOT_SEGMENT(slot)];

    cr_assert_geq(fd, 0, "a slot of a segment that never came");
    cr_assert_lt(SLOT_PAGE(slot), fake->segment_pages[SLOT_SEGMENT(slot)]);
    cr_assert_eq(pread(fd, theirs, PAGE_BYTES, (off_t)SLOT_PAGE(slot) * (off_t)PAGE_BYTES),
                 (ssize_t)PAGE_BYTES);
    fake_content(fake->pages[page].color, mine);
    return memcmp(mine, theirs, PAGE_BYTES) == 0;
}

static void answer_want(struct fake *fake, struct ring_entry entry)
{
    struct fake_page *page = &fake->pages[entry.page];
    uint32_t buffer;

    if (page->slot != SLOT_NONE || hash_tag(hash_of(fake, page->color)) != hash_tag(entry.arg)) {
        fake_put(fake, RING_STALE, entry.page, 0);
        return;
    }
    buffer = (uint32_t)(fake->wants++ % RING_PAGE_BUFFERS);
    /* The buffer is memd's until it has read the entry: this fake asks for the lot to be read. */
    if (buffer == 0) {
        fake_bell(fake);
        while (ring_room(&fake->ring->to_memd, fake->own_head) < RING_ENTRIES)
            world_turn(fake->world);
    }
    fake_content(page->color + fake->lies, fake->ring->pages[buffer]);
    fake_put(fake, RING_PAGE, entry.page, buffer);
}

static void answer_merge(struct fake *fake, struct ring_entry entry)
{
    struct fake_page *page = &fake->pages[entry.page];
    uint32_t slot = (uint32_t)entry.arg;
    uint64_t why = 0;

    if (entry.op == RING_MERGE ? page->slot != SLOT_NONE : page->slot == SLOT_NONE)
        why = NOT_MERGED_GONE;
    else if ((uint32_t)rand() % 100 < fake->busy_percent)
        why = NOT_MERGED_BUSY;
    else if (!same_content(fake, entry.page, slot))
        why = NOT_MERGED_MISMATCH;
    if (why) {
        page->offered = page->slot != SLOT_NONE && page->offered;
        fake_put(fake, RING_NOT_MERGED, entry.page, slot | why << 32);
        return;
    }
    page->slot = slot;
    fake_put(fake, RING_MERGED, entry.page, slot);
}

static void answer(struct fake *fake, struct ring_entry entry)
{
    cr_assert_lt(entry.page, fake->page_count);
    fake->merges += entry.op == RING_MERGE;
    fake->remaps += entry.op == RING_REMAP;
    switch (entry.op) {
    case RING_WANT: answer_want(fake, entry); break;
    case RING_MERGE:
    case RING_REMAP: answer_merge(fake, entry); break;
    default: cr_assert_fail("memd wrote an entry %u", entry.op);
    }
}

void fake_turn(struct fake *fake)
{
    uint32_t head = fake->own_head;

    if (fake->fd < 0 || !fake->answers)
        return;
    while (receive(fake))
        ;
    if (!fake->ring || fake->ended || !fake->pages)
        return;
    while (ring_filled(&fake->ring->to_agent, fake->own_tail)) {
        struct ring_entry entry = ring_peek(&fake->ring->to_agent, fake->own_tail);

        while (receive(fake))
            ;
        ring_release(&fake->ring->to_agent, &fake->own_tail);
        answer(fake, entry);
    }
    if (head != fake->own_head)
        fake_bell(fake);
}

void fakes_turn(struct world *world, struct fake *fakes, size_t count)
{
    world_turn(world);
    for (size_t i = 0; i < count; i++)
        fake_turn(&fakes[i]);
}

bool fake_hello(struct fake *fake, bool held)
{
    struct message_hello hello = {.header = {MESSAGE_HELLO, sizeof(hello)},
                                  .magic = PROTOCOL_MAGIC,
                                  .version = PROTOCOL_VERSION,
                                  .features = FEATURE_SHARE,
                                  .page_bytes = PAGE_BYTES,
                                  .held = held,
                                  .vmm = "test"};

    memcpy(hello.token, fake->token, PROTOCOL_TOKEN_BYTES);
    fake_send(fake, &hello, sizeof(hello), -1);
    for (int i = 0; i < 1000 && !fake->ring && !fake->ended && !fake->detach.header.type; i++)
        fakes_turn(fake->world, fake, 1);
    if (fake->ring)
        fake->guest = registry_find_token(&fake->world->daemon, fake->token);
    return fake->ring != NULL;
}

void fake_join(struct fake *fake, struct world *world, const char *name, const char *domain,
               uint32_t pages)
{
    struct guest *guest = world_register(world, name, domain);

    fake_connect(fake, world, guest->token);
    cr_assert(fake_hello(fake, false));
    fake->pages = calloc(pages, sizeof(*fake->pages));
    fake->page_count = pages;
    for (uint32_t page = 0; page < pages; page++)
        fake->pages[page].slot = SLOT_NONE;
    fake_ram(fake, 0, pages, 0x7f0000000000);
}

void fake_disconnect(struct fake *fake)
{
    if (fake->ring)
        munmap(fake->ring, RING_BYTES);
    if (fake->ring_fd >= 0)
        close(fake->ring_fd);
    if (fake->fd >= 0)
        close(fake->fd);
    fake->ring = NULL;
    fake->fd = fake->ring_fd = -1;
}

void fake_close(struct fake *fake)
{
    fake_disconnect(fake);
    for (int i = 0; i < FAKE_SEGMENTS; i++) {
        if (fake->segments[i] >= 0)
            close(fake->segments[i]);
    }
    free(fake->pages);
    fake->pages = NULL;
}

void fake_write(struct fake *fake, uint32_t page, uint32_t color)
{
    fake->pages[page].color = color;
    fake->pages[page].offered = false;
    if (fake->pages[page].slot == SLOT_NONE)
        return;
    fake_put(fake, RING_BROKEN, page, fake->pages[page].slot);
    fake->pages[page].slot = SLOT_NONE;
}

void fake_offer(struct fake *fake, uint32_t page)
{
    fake->pages[page].offered = true;
    fake_put(fake, RING_OFFER, page, hash_of(fake, fake->pages[page].color));
}

void fake_offer_all(struct fake *fake)
{
    for (uint32_t page = 0; page < fake->page_count; page++) {
        if (fake->pages[page].slot == SLOT_NONE && !fake->pages[page].offered &&
            fake->pages[page].color)
            fake_offer(fake, page);
    }
    fake_put(fake, RING_PASS, 0, 1);
    fake_bell(fake);
}

void fake_stats(struct fake *fake)
{
    struct message_stats stats = {.header = {MESSAGE_STATS, sizeof(stats)}};

    for (uint32_t page = 0; page < fake->page_count; page++)
        stats.places[fake->pages[page].slot == SLOT_NONE ? PLACE_PRIVATE : PLACE_SHARED]++;
    fake_send(fake, &stats, sizeof(stats), -1);
}

uint32_t fake_shared(const struct fake *fake)
{
    uint32_t count = 0;

    for (uint32_t page = 0; page < fake->page_count; page++)
        count += fake->pages[page].slot != SLOT_NONE;
    return count;
}

struct trust_domain *fake_domain(const struct fake *fake)
{
    return agents_member(fake->guest->session)->domain;
}

void fakes_share(struct world *world, struct fake *fakes, uint32_t pages)
{
    world_start(world, world_web());
    for (int i = 0; i < 2; i++) {
        fake_join(&fakes[i], world, i ? "b" : "a", "web", pages);
        for (uint32_t page = 0; page < pages; page++)
            fake_write(&fakes[i], page, page + 1);
        fake_offer_all(&fakes[i]);
    }
    UNTIL(world, fakes, 2, fake_shared(&fakes[0]) + fake_shared(&fakes[1]) == 2 * pages);
}
