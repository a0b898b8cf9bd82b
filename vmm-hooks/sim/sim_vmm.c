/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One simulated VMM with its agent. See sim.h.
 *
 * It keeps the promises of memd/common/protocol.h: answers come in the order of the questions, a
 * message that an entry relies on is read first, a page buffer is memd's until the entry that names
 * it was consumed. When a socket or the ring is full it lets memd have a turn and tries again, as
 * the real agent waits.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "sim.h"

#define TRIES         2000U
#define NEVER_BUSY    24U /* one MERGE in so many is refused for a pinned page */
#define NS_PER_MS     1000000ULL
#define PATIENCE_NS   (5000 * NS_PER_MS) /* rpc.c: GREET_TIMEOUT_S */
#define SEALS         (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#define MESSAGE_BYTES 1024U

static const char *const domain_names[SIM_DOMAINS] = {"red", "blue", NULL};

static bool receive(struct sim_vmm *vmm);

/* ---- out ---- */

static void hang_up(struct sim_vmm *vmm)
{
    if (vmm->ring)
        munmap(vmm->ring, RING_BYTES);
    if (vmm->fd >= 0)
        close(vmm->fd);
    vmm->ring = NULL;
    vmm->fd = -1;
    vmm->todo_count = 0;
    vmm->rung = false;
    vmm->must_end_by = 0;
    vmm->link = SIM_ALONE;
    vmm->next_connect_ns = vmm->sim->host.now_ns + 100 * NS_PER_MS;
}

void sim_vmm_disconnect(struct sim_vmm *vmm)
{
    if (vmm->link == SIM_GREETING || vmm->link == SIM_SERVED)
        hang_up(vmm);
}

static bool send_once(const struct sim_vmm *vmm, const void *message, uint32_t bytes,
                      const int *fds, uint32_t fd_count)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(8 * sizeof(int))];
    } control = {.space = {0}};
    struct iovec piece = {(void *)message, bytes};
    struct msghdr header = {.msg_iov = &piece, .msg_iovlen = 1};

    if (fd_count) {
        header.msg_control = &control;
        header.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(&control.header), fds, sizeof(int) * fd_count);
    }
    return sendmsg(vmm->fd, &header, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 ||
           (errno != EAGAIN && errno != ETOOMANYREFS);
}

void sim_vmm_send(struct sim_vmm *vmm, const void *message, uint32_t bytes, const int *fds,
                  uint32_t fd_count)
{
    for (uint32_t i = 0; i < TRIES && vmm->fd >= 0; i++) {
        if (send_once(vmm, message, bytes, fds, fd_count))
            return;
        if (vmm->sim->still) {
            hang_up(vmm);
            return;
        }
        sim_turn(vmm->sim);
    }
    if (vmm->fd >= 0 && !vmm->liar)
        sim_wrong(vmm->sim, "memd does not read what %s says", vmm->name);
}

static void send_plain(struct sim_vmm *vmm, uint32_t type)
{
    struct message_plain message = {{type, sizeof(message)}};

    sim_vmm_send(vmm, &message, sizeof(message), NULL, 0);
}

void sim_vmm_ring(struct sim_vmm *vmm)
{
    if (vmm->rung && vmm->fd >= 0)
        send_plain(vmm, MESSAGE_DOORBELL);
    vmm->rung = false;
}

void sim_vmm_put(struct sim_vmm *vmm, uint32_t op, uint32_t page, uint64_t arg)
{
    for (uint32_t i = 0; i < TRIES && vmm->ring; i++) {
        uint32_t room = ring_room(&vmm->ring->to_memd, vmm->own_head);

        if (room && room <= RING_ENTRIES) {
            ring_put(&vmm->ring->to_memd, &vmm->own_head, (struct ring_entry){op, page, arg});
            vmm->rung = true;
            return;
        }
        vmm->rung = true;
        sim_vmm_ring(vmm);
        if (vmm->sim->still) {
            sim_vmm_disconnect(vmm);
            return;
        }
        sim_turn(vmm->sim);
    }
    /* memd closes its end without touching the ring: whoever waits for room learns it here. */
    while (vmm->ring && receive(vmm))
        ;
    if (vmm->ring && !vmm->liar)
        sim_wrong(vmm->sim, "memd does not read the ring of %s", vmm->name);
    if (vmm->ring)
        hang_up(vmm);
}

/* ---- pages ---- */

uint64_t sim_vmm_hash(const struct sim_vmm *vmm, uint32_t content)
{
    _Alignas(8) uint8_t bytes[PAGE_BYTES];

    sim_content_expand(content, bytes);
    return hash_page(&vmm->secret, bytes);
}

static bool is_live(const struct sim_vmm *vmm, uint32_t page)
{
    for (uint32_t i = 0; i < vmm->block_count; i++) {
        const struct sim_block *block = &vmm->blocks[i];

        if (page >= block->first_page && page - block->first_page < block->pages)
            return block->live;
    }
    return false;
}

uint32_t sim_vmm_any_page(const struct sim_vmm *vmm)
{
    for (uint32_t tries = 0; vmm->page_count && tries < 16; tries++) {
        uint32_t page = sim_host_below(&vmm->sim->host, vmm->page_count);

        if (is_live(vmm, page))
            return page;
    }
    return PAGE_NONE;
}

/* The share of a page ends, and memd hears of it where there is a memd. */
static void unshare(struct sim_vmm *vmm, uint32_t page)
{
    struct sim_page *one = &vmm->pages[page];
    uint32_t slot = one->slot;

    if (slot == SLOT_NONE)
        return;
    one->slot = SLOT_NONE;
    one->had = false;
    one->place = PLACE_PRIVATE;
    vmm->unmerges++;
    if (vmm->link == SIM_SERVED)
        sim_vmm_put(vmm, RING_BROKEN, page, slot);
}

void sim_vmm_write(struct sim_vmm *vmm, uint32_t page, uint32_t content)
{
    unshare(vmm, page);
    vmm->pages[page].content = content;
    vmm->pages[page].place = PLACE_PRIVATE;
    vmm->pages[page].offered = false;
}

void sim_vmm_discard(struct sim_vmm *vmm, uint32_t page)
{
    unshare(vmm, page);
    vmm->pages[page].content = 0;
    vmm->pages[page].place = PLACE_ABSENT;
    vmm->pages[page].offered = false;
}

static void note_offer(struct sim_page *page)
{
    page->offered = true;
    if (page->offer_count < SIM_OFFERS_KEPT)
        page->offers[page->offer_count] = page->content;
    page->offer_count++;
}

/* Quiet pages are dropped when they are zero, else offered. */
void sim_vmm_pass(struct sim_vmm *vmm, uint32_t first, uint32_t count)
{
    for (uint32_t i = first; i < first + count && i < vmm->page_count && vmm->ring; i++) {
        struct sim_page *page = &vmm->pages[i];

        if (page->place != PLACE_PRIVATE || page->offered || !is_live(vmm, i))
            continue;
        if (page->content == 0) {
            page->place = PLACE_ZERO;
            continue;
        }
        note_offer(page);
        sim_vmm_put(vmm, RING_OFFER, i, sim_vmm_hash(vmm, page->content));
    }
    if (vmm->ring && first + count >= vmm->page_count)
        sim_vmm_put(vmm, RING_PASS, 0, 1);
    sim_vmm_ring(vmm);
}

void sim_vmm_places(const struct sim_vmm *vmm, uint64_t *ret_places)
{
    memset(ret_places, 0, PLACE_COUNT * sizeof(*ret_places));
    for (uint32_t i = 0; i < vmm->block_count; i++) {
        const struct sim_block *block = &vmm->blocks[i];

        for (uint32_t k = 0; block->live && k < block->pages; k++)
            ret_places[vmm->pages[block->first_page + k].place]++;
    }
}

void sim_vmm_say_stats(struct sim_vmm *vmm)
{
    struct message_stats stats = {.header = {MESSAGE_STATS, sizeof(stats)},
                                  .merges = vmm->merges,
                                  .unmerges = vmm->unmerges,
                                  .mismatches = vmm->mismatches};

    sim_vmm_places(vmm, stats.places);
    if (vmm->link == SIM_SERVED)
        sim_vmm_send(vmm, &stats, sizeof(stats), NULL, 0);
}

/* ---- blocks ---- */

static void announce(struct sim_vmm *vmm)
{
    for (; vmm->announced < vmm->block_count && vmm->link == SIM_SERVED; vmm->announced++) {
        const struct sim_block *block = &vmm->blocks[vmm->announced];
        struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)},
                                  .first_page = block->first_page,
                                  .pages = block->pages,
                                  .hva = block->hva,
                                  .managed = 1};

        sim_vmm_send(vmm, &ram, sizeof(ram), NULL, 0);
    }
    for (uint32_t i = 0; i < vmm->announced && vmm->link == SIM_SERVED; i++) {
        struct message_ram_gone gone = {.header = {MESSAGE_RAM_GONE, sizeof(gone)},
                                        .first_page = vmm->blocks[i].first_page,
                                        .pages = vmm->blocks[i].pages};

        if (vmm->blocks[i].live || vmm->gone_told[i])
            continue;
        vmm->gone_told[i] = true;
        sim_vmm_send(vmm, &gone, sizeof(gone), NULL, 0);
    }
}

void sim_vmm_plug(struct sim_vmm *vmm, uint32_t pages)
{
    if (vmm->block_count == SIM_BLOCKS_MAX || vmm->page_count + pages > SIM_PAGES_MAX)
        return;
    vmm->blocks[vmm->block_count++] =
        (struct sim_block){vmm->page_count, pages, vmm->next_hva, true};
    for (uint32_t i = 0; i < pages; i++)
        vmm->pages[vmm->page_count + i] = (struct sim_page){.slot = SLOT_NONE};
    vmm->page_count += pages;
    vmm->next_hva += (uint64_t)pages * PAGE_BYTES;
    if (vmm->link == SIM_SERVED)
        announce(vmm);
}

/* RAM_GONE ends all shares of its pages: no BROKEN comes. */
void sim_vmm_unplug(struct sim_vmm *vmm, uint32_t number)
{
    struct sim_block *block = &vmm->blocks[number];

    block->live = false;
    for (uint32_t i = 0; i < block->pages; i++)
        vmm->pages[block->first_page + i].slot = SLOT_NONE;
    if (vmm->link == SIM_SERVED)
        announce(vmm);
}

/* ---- segments ---- */

static struct sim_segment *find_segment(struct sim_vmm *vmm, uint32_t id)
{
    for (uint32_t i = 0; i < vmm->segment_count; i++) {
        if (vmm->segments[i].id == id)
            return &vmm->segments[i];
    }
    return NULL;
}

static void remove_segment(struct sim_vmm *vmm, struct sim_segment *segment)
{
    munmap((void *)segment->bytes, segment->pages * PAGE_BYTES);
    close(segment->fd);
    *segment = vmm->segments[--vmm->segment_count];
}

static void take_segment(struct sim_vmm *vmm, const struct message_segment *message, int fd)
{
    struct sim_segment segment = {message->segment, message->pages, fd, NULL};
    int seals = fcntl(fd, F_GET_SEALS);
    struct stat about;

    if (fd < 0 || (seals & SEALS) != SEALS || fstat(fd, &about) ||
        about.st_size != (off_t)(message->pages * PAGE_BYTES))
        sim_wrong(vmm->sim, "%s was given a segment that is not sealed", vmm->name);
    else if (find_segment(vmm, message->segment)) {
        if (!vmm->liar)
            sim_wrong(vmm->sim, "%s was given segment %u twice", vmm->name, message->segment);
    } else if (vmm->segment_count == SIM_SEGMENTS_MAX)
        sim_wrong(vmm->sim, "%s holds too many segments", vmm->name);
    else {
        segment.bytes = mmap(NULL, message->pages * PAGE_BYTES, PROT_READ, MAP_SHARED, fd, 0);
        vmm->segments[vmm->segment_count++] = segment;
        sim_check_segment(vmm, &segment);
        return;
    }
    if (fd >= 0)
        close(fd);
}

static void drop_segment(struct sim_vmm *vmm, const struct message_segment *message)
{
    struct message_segment done = *message;
    struct sim_segment *segment = find_segment(vmm, message->segment);

    vmm->sim->dropped++;
    for (uint32_t i = 0; i < vmm->page_count; i++) {
        struct sim_page *page = &vmm->pages[i];

        if (page->slot == SLOT_NONE || SLOT_SEGMENT(page->slot) != message->segment)
            continue;
        if (!page->had && !vmm->liar)
            sim_wrong(vmm->sim, "%s shall drop segment %u, which it uses", vmm->name,
                      message->segment);
        unshare(vmm, i);
    }
    if (segment)
        remove_segment(vmm, segment);
    else if (!vmm->liar)
        sim_wrong(vmm->sim, "%s shall drop segment %u, which it hasn't", vmm->name,
                  message->segment);
    sim_vmm_ring(vmm);
    done.header.type = MESSAGE_DROPPED;
    sim_vmm_send(vmm, &done, sizeof(done), NULL, 0);
}

void sim_vmm_lose_store(struct sim_vmm *vmm)
{
    for (uint32_t i = 0; i < vmm->page_count; i++) {
        if (vmm->pages[i].slot != SLOT_NONE) {
            vmm->pages[i].slot = SLOT_NONE;
            vmm->pages[i].place = PLACE_PRIVATE;
            vmm->unmerges++;
        }
    }
    while (vmm->segment_count)
        remove_segment(vmm, &vmm->segments[0]);
}

/* ---- greeting ---- */

int sim_vmm_register(struct sim_vmm *vmm)
{
    struct guest_request request = {.pid = vmm->pid, .uid = vmm->uid, .engine = ENGINE_AGENT};
    const char *domain = domain_names[vmm->domain];
    struct guest *guest;
    char words[512];
    int result;

    strcpy(request.name, vmm->name);
    strcpy(request.vmm, "sim");
    request.wish.has_max = true;
    request.wish.max_bytes = SIM_PAGES_MAX * PAGE_BYTES;
    request.wish.has_domain = domain != NULL;
    snprintf(request.wish.domain, sizeof(request.wish.domain), "%s", domain ? domain : "");
    result = registry_add(&vmm->sim->daemon, &request, &guest, words, sizeof(words));
    if (!result)
        memcpy(vmm->token, guest->token, sizeof(vmm->token));
    return result;
}

void sim_vmm_connect(struct sim_vmm *vmm)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct message_hello hello = {.header = {MESSAGE_HELLO, sizeof(hello)},
                                  .magic = PROTOCOL_MAGIC,
                                  .version = PROTOCOL_VERSION,
                                  .features = FEATURE_SHARE,
                                  .page_bytes = PAGE_BYTES,
                                  .held = vmm->held,
                                  .vmm = "sim"};

    vmm->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s/memd.sock.agent", vmm->sim->dir);
    if (vmm->fd < 0 || connect(vmm->fd, (struct sockaddr *)&address, sizeof(address))) {
        sim_wrong(vmm->sim, "%s can't connect: %s", vmm->name, strerror(errno));
        return;
    }
    sim_host_connects(&vmm->sim->host, vmm->uid, vmm->pid);
    vmm->link = SIM_GREETING;
    vmm->patience_ns = vmm->sim->host.now_ns + PATIENCE_NS;
    memcpy(hello.token, vmm->token, sizeof(hello.token));
    sim_vmm_send(vmm, &hello, sizeof(hello), NULL, 0);
}

/* Something was sent; the connection may break behind it. */
static void may_be_cut(struct sim_vmm *vmm)
{
    if (vmm->cut_after && --vmm->cut_after == 0)
        sim_vmm_disconnect(vmm);
}

/* Where the connection breaks while it says what it holds: early, late, or just behind it. */
static void choose_cut(struct sim_vmm *vmm)
{
    uint32_t count = vmm->segment_count + 1;

    for (uint32_t i = 0; i < vmm->page_count; i++)
        count += vmm->pages[i].slot != SLOT_NONE;
    vmm->cut_after = 0;
    if (!vmm->sim->options.cuts || sim_host_once_in(&vmm->sim->host, 2))
        return;
    vmm->cut_after =
        sim_host_once_in(&vmm->sim->host, 3) ? count : 1 + sim_host_below(&vmm->sim->host, count);
}

static void offer_held(struct sim_vmm *vmm)
{
    choose_cut(vmm);
    for (uint32_t i = 0; i < vmm->segment_count && vmm->link == SIM_SERVED; i++) {
        struct message_segment held = {
            {MESSAGE_HELD, sizeof(held)}, vmm->segments[i].id, vmm->segments[i].pages};

        sim_vmm_send(vmm, &held, sizeof(held), &vmm->segments[i].fd, 1);
        may_be_cut(vmm);
    }
    for (uint32_t i = 0; i < vmm->page_count && vmm->link == SIM_SERVED; i++) {
        if (vmm->pages[i].slot == SLOT_NONE)
            continue;
        vmm->pages[i].had = true;
        sim_vmm_put(vmm, RING_HAVE, i, vmm->pages[i].slot);
        may_be_cut(vmm);
    }
    if (vmm->link != SIM_SERVED)
        return;
    sim_vmm_ring(vmm);
    send_plain(vmm, MESSAGE_HELD_END);
    may_be_cut(vmm);
}

/* memd knows nothing of what was offered before. */
static void begin_anew(struct sim_vmm *vmm)
{
    for (uint32_t i = 0; i < vmm->page_count; i++) {
        vmm->pages[i].offered = false;
        vmm->pages[i].offer_count = 0;
    }
    vmm->announced = 0;
    memset(vmm->gone_told, 0, sizeof(vmm->gone_told));
    vmm->todo_count = 0;
    vmm->rung = false;
}

static void take_welcome(struct sim_vmm *vmm, const struct message_welcome *welcome, const int *fds)
{
    void *ring;

    if (welcome->have_userfaultfd)
        close(fds[1]);
    ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    close(fds[0]);
    if (ring == MAP_FAILED) {
        sim_wrong(vmm->sim, "%s was given no ring", vmm->name);
        return;
    }
    vmm->ring = ring;
    vmm->own_head = vmm->own_tail = vmm->buffer = 0;
    vmm->secret = welcome->secret;
    vmm->link = SIM_SERVED;
    begin_anew(vmm);
    announce(vmm);
    if (vmm->held && welcome->session != vmm->session)
        sim_vmm_lose_store(vmm);
    vmm->session = welcome->session;
    if (vmm->held)
        offer_held(vmm);
    vmm->held = true;
    sim_vmm_say_stats(vmm);
}

static void take_refusal(struct sim_vmm *vmm, const struct message_words *words)
{
    /* Its last connection may not have been found ended yet. */
    if (!vmm->liar && words->code != EBUSY)
        sim_wrong(vmm->sim, "%s was refused: %s", vmm->name, words->text);
    hang_up(vmm);
}

/* ---- messages ---- */

static void detach(struct sim_vmm *vmm, const struct message_words *words)
{
    sim_vmm_lose_store(vmm);
    sim_vmm_say_stats(vmm);
    vmm->detached = !words->rejoin;
    send_plain(vmm, MESSAGE_DETACHED);
    hang_up(vmm);
    vmm->held = false;
}

static void take_message(struct sim_vmm *vmm, const void *message, uint32_t type, const int *fds)
{
    switch (type) {
    case MESSAGE_WELCOME: take_welcome(vmm, message, fds); break;
    case MESSAGE_REFUSED: take_refusal(vmm, message); break;
    case MESSAGE_SEGMENT: take_segment(vmm, message, fds[0]); break;
    case MESSAGE_DROP: drop_segment(vmm, message); break;
    case MESSAGE_DETACH: detach(vmm, message); break;
    case MESSAGE_TUNE:
        if (((const struct message_tune *)message)->flags & TUNE_REPORT)
            sim_vmm_say_stats(vmm);
        break;
    case MESSAGE_DOORBELL: break;
    default: sim_wrong(vmm->sim, "memd said message %u to %s", type, vmm->name);
    }
}

static void was_ended(struct sim_vmm *vmm)
{
    vmm->sim->sessions_lost++;
    if (!vmm->liar && !vmm->sim->detach_on_way) {
        const struct guest *guest = registry_find(&vmm->sim->daemon, vmm->name);

        sim_wrong(vmm->sim, "%s is honest and lost its session: %s", vmm->name,
                  guest ? guest->reason : "its guest is not registered");
    }
    hang_up(vmm);
}

static bool receive(struct sim_vmm *vmm)
{
    _Alignas(8) uint8_t message[MESSAGE_BYTES];
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control;
    struct iovec piece = {message, sizeof(message)};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = &control,
                            .msg_controllen = sizeof(control)};
    struct message_header front;
    int fds[2] = {-1, -1};
    ssize_t got = recvmsg(vmm->fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    const struct cmsghdr *rights = got > 0 ? CMSG_FIRSTHDR(&header) : NULL;

    if (got < 0 && errno == EAGAIN)
        return false;
    if (got <= 0) {
        was_ended(vmm);
        return false;
    }
    if (rights)
        memcpy(fds, CMSG_DATA(rights), rights->cmsg_len - CMSG_LEN(0));
    memcpy(&front, message, sizeof(front));
    if (front.bytes != (uint32_t)got)
        sim_wrong(vmm->sim, "memd sent a message of the wrong length");
    sim_trace(vmm->sim, message, (size_t)got);
    take_message(vmm, message, front.type, fds);
    return vmm->fd >= 0;
}

/* ---- the ring ---- */

/* Buffers go round: all are ours but those of the PAGE entries that memd has not consumed. */
static bool page_buffer(struct sim_vmm *vmm, uint32_t *ret_buffer)
{
    const struct ring_queue *queue = &vmm->ring->to_memd;
    uint32_t used = 0;

    for (uint32_t at = queue->tail; at != vmm->own_head; at++)
        used += queue->entries[at % RING_ENTRIES].op == RING_PAGE;
    *ret_buffer = vmm->buffer;
    return used < RING_PAGE_BUFFERS;
}

static void answer_want(struct sim_vmm *vmm, struct ring_entry entry)
{
    const struct sim_page *page = &vmm->pages[entry.page];
    uint32_t buffer = 0;

    vmm->sim->wanted++;
    if (page->place != PLACE_PRIVATE || !is_live(vmm, entry.page) ||
        hash_tag(sim_vmm_hash(vmm, page->content)) != hash_tag(entry.arg)) {
        sim_vmm_put(vmm, RING_STALE, entry.page, 0);
        return;
    }
    for (uint32_t i = 0; i < TRIES && vmm->ring && !page_buffer(vmm, &buffer); i++) {
        vmm->rung = true;
        sim_vmm_ring(vmm);
        if (vmm->sim->still)
            sim_vmm_disconnect(vmm);
        else
            sim_turn(vmm->sim);
    }
    if (!vmm->ring)
        return;
    /* A liar promises one content and hands over another. */
    sim_content_expand(vmm->liar && sim_host_once_in(&vmm->sim->host, 3) ? page->content + 1
                                                                         : page->content,
                       vmm->ring->pages[buffer]);
    vmm->buffer = (buffer + 1) % RING_PAGE_BUFFERS;
    sim_vmm_put(vmm, RING_PAGE, entry.page, buffer);
}

static bool was_offered(const struct sim_page *page, const uint8_t *bytes)
{
    uint32_t content;

    if (page->offer_count > SIM_OFFERS_KEPT || sim_content_read(bytes, &content))
        return page->offer_count > SIM_OFFERS_KEPT;
    for (uint32_t i = 0; i < page->offer_count; i++) {
        if (page->offers[i] == content)
            return true;
    }
    return false;
}

static const uint8_t *slot_bytes(struct sim_vmm *vmm, uint32_t slot)
{
    const struct sim_segment *segment = find_segment(vmm, SLOT_SEGMENT(slot));

    if (segment && SLOT_PAGE(slot) < segment->pages)
        return segment->bytes + SLOT_PAGE(slot) * PAGE_BYTES;
    if (!vmm->liar)
        sim_wrong(vmm->sim, "%s shall use slot %x of a segment that it hasn't", vmm->name, slot);
    return NULL;
}

/* Why not, or 0. */
static enum not_merged judge(struct sim_vmm *vmm, struct ring_entry entry, const uint8_t *bytes)
{
    const struct sim_page *page = &vmm->pages[entry.page];
    _Alignas(8) uint8_t own[PAGE_BYTES];

    if (entry.op == RING_MERGE && !vmm->sim->options.weak_hashes && !was_offered(page, bytes) &&
        !vmm->liar)
        sim_wrong(vmm->sim, "%s shall share page %u as what it never was", vmm->name, entry.page);
    if (page->place != (entry.op == RING_MERGE ? PLACE_PRIVATE : PLACE_SHARED))
        return NOT_MERGED_GONE;
    if (sim_host_once_in(&vmm->sim->host, NEVER_BUSY))
        return sim_host_once_in(&vmm->sim->host, 2) ? NOT_MERGED_BUSY : NOT_MERGED_BUDGET;
    sim_content_expand(page->content, own);
    if (memcmp(own, bytes, PAGE_BYTES) != 0) {
        vmm->mismatches++;
        vmm->sim->mismatched++;
        if (entry.op == RING_REMAP && !vmm->liar)
            sim_wrong(vmm->sim, "%s shall move a share to other content", vmm->name);
        return NOT_MERGED_MISMATCH;
    }
    return 0;
}

static void answer_merge(struct sim_vmm *vmm, struct ring_entry entry)
{
    struct sim_page *page = &vmm->pages[entry.page];
    uint32_t slot = (uint32_t)entry.arg;
    const uint8_t *bytes;
    enum not_merged why = NOT_MERGED_GONE;

    /* RAM_GONE has ended what was asked: the segment may be gone as well. */
    if (is_live(vmm, entry.page)) {
        bytes = slot_bytes(vmm, slot);
        why = bytes ? judge(vmm, entry, bytes) : NOT_MERGED_REFUSED;
    }

    if (entry.op == RING_MERGE)
        page->offer_count = 0;
    if (why) {
        page->offered = page->slot != SLOT_NONE;
        sim_vmm_put(vmm, RING_NOT_MERGED, entry.page, slot | (uint64_t)why << 32);
        return;
    }
    vmm->sim->merged += entry.op == RING_MERGE;
    vmm->sim->remapped += entry.op == RING_REMAP;
    vmm->merges += entry.op == RING_MERGE;
    page->slot = slot;
    page->had = false;
    page->place = PLACE_SHARED;
    sim_vmm_put(vmm, RING_MERGED, entry.page, slot);
}

static void answer(struct sim_vmm *vmm, struct ring_entry entry)
{
    if (entry.page >= vmm->page_count) {
        if (!vmm->liar)
            sim_wrong(vmm->sim, "memd asks %s about page %u", vmm->name, entry.page);
        return;
    }
    switch (entry.op) {
    case RING_WANT: answer_want(vmm, entry); break;
    case RING_MERGE:
    case RING_REMAP: answer_merge(vmm, entry); break;
    default: sim_wrong(vmm->sim, "memd wrote entry %u", entry.op);
    }
}

static void take_entries(struct sim_vmm *vmm, uint32_t count)
{
    while (count-- && vmm->todo_count < SIM_TODO_MAX &&
           ring_filled(&vmm->ring->to_agent, vmm->own_tail)) {
        struct ring_entry entry = ring_peek(&vmm->ring->to_agent, vmm->own_tail);

        /* A SEGMENT that it relies on was sent before. */
        while (receive(vmm))
            ;
        if (!vmm->ring)
            return;
        ring_release(&vmm->ring->to_agent, &vmm->own_tail);
        sim_trace(vmm->sim, &entry, sizeof(entry));
        vmm->todo[(vmm->todo_first + vmm->todo_count++) % SIM_TODO_MAX] = entry;
    }
}

bool sim_vmm_is_idle(const struct sim_vmm *vmm)
{
    char byte;

    if (vmm->link == SIM_OFF)
        return true;
    if (vmm->link == SIM_ALONE)
        return vmm->detached;
    return vmm->link == SIM_SERVED && !vmm->todo_count &&
           !ring_filled(&vmm->ring->to_agent, vmm->own_tail) &&
           vmm->ring->to_memd.tail == vmm->own_head &&
           recv(vmm->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN;
}

void sim_vmm_step(struct sim_vmm *vmm, uint32_t read, uint32_t answers)
{
    if (vmm->link == SIM_ALONE && !vmm->detached && vmm->sim->host.now_ns >= vmm->next_connect_ns)
        sim_vmm_connect(vmm);
    for (uint32_t i = 0; i < read && vmm->fd >= 0 && receive(vmm); i++)
        ;
    if (vmm->link == SIM_GREETING && vmm->sim->host.now_ns >= vmm->patience_ns)
        hang_up(vmm);
    if (vmm->link == SIM_SERVED)
        take_entries(vmm, read);
    while (answers-- && vmm->todo_count && vmm->link == SIM_SERVED) {
        struct ring_entry entry = vmm->todo[vmm->todo_first];

        vmm->todo_first = (vmm->todo_first + 1) % SIM_TODO_MAX;
        vmm->todo_count--;
        answer(vmm, entry);
    }
    sim_vmm_ring(vmm);
}

void sim_vmm_die(struct sim_vmm *vmm)
{
    sim_vmm_disconnect(vmm);
    sim_vmm_lose_store(vmm);
    sim_host_kill(&vmm->sim->host, vmm->pid);
    vmm->link = SIM_OFF;
}
