/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a liar says: one function a lie. `ends` names those that memd must not let pass: the session
 * has to be over some turns later. What may also be read as something that crossed on the way, or
 * harms only the liar's own pages, is let pass or not, as memd likes.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sim.h"

#define ENDS_WITHIN 400U /* turns */
#define FLOOD       3000U

static uint32_t below(struct sim_vmm *vmm, uint32_t count)
{
    return sim_host_below(&vmm->sim->host, count);
}

static uint32_t any_page(struct sim_vmm *vmm)
{
    uint32_t page = sim_vmm_any_page(vmm);

    return page == PAGE_NONE ? 0 : page;
}

static uint32_t any_slot(struct sim_vmm *vmm)
{
    if (vmm->segment_count && below(vmm, 4)) {
        const struct sim_segment *segment = &vmm->segments[below(vmm, vmm->segment_count)];

        return SLOT(segment->id, below(vmm, segment->pages));
    }
    return SLOT(below(vmm, 64), below(vmm, 600));
}

static void say(struct sim_vmm *vmm, const void *message, uint32_t bytes)
{
    sim_vmm_send(vmm, message, bytes, NULL, 0);
}

/* ---- in the ring ---- */

static void offer_out_of_range(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_OFFER, vmm->page_count + below(vmm, 1U << 20), 1);
}

static void offer_wrong_hash(struct sim_vmm *vmm)
{
    uint32_t page = any_page(vmm);

    sim_vmm_put(vmm, RING_OFFER, page, sim_vmm_hash(vmm, 1 + below(vmm, 40)));
}

static void offer_and_change(struct sim_vmm *vmm)
{
    uint32_t page = any_page(vmm);

    if (vmm->pages[page].place == PLACE_PRIVATE && vmm->pages[page].offered)
        vmm->pages[page].content = 1 + below(vmm, 40);
}

static void unknown_op(struct sim_vmm *vmm)
{
    static const uint32_t ops[] = {0, 9, 15, RING_MERGE, RING_WANT, RING_REMAP, 19, UINT32_MAX};

    sim_vmm_put(vmm, ops[below(vmm, 8)], any_page(vmm), any_slot(vmm));
}

static void merged_out_of_range(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_MERGED, any_page(vmm), 1ULL << 32 | any_slot(vmm));
}

static void merged_unasked(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_MERGED, any_page(vmm), any_slot(vmm));
}

static void not_merged_unasked(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_NOT_MERGED, any_page(vmm),
                any_slot(vmm) | (uint64_t)(below(vmm, 8)) << 32);
}

static void broken_unasked(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_BROKEN, any_page(vmm), any_slot(vmm));
}

static void broken_twice(struct sim_vmm *vmm)
{
    uint32_t page = any_page(vmm), slot = vmm->pages[page].slot;

    if (slot == SLOT_NONE)
        return;
    sim_vmm_write(vmm, page, 1);
    sim_vmm_put(vmm, RING_BROKEN, page, slot);
}

static void page_unasked(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_PAGE, any_page(vmm), below(vmm, RING_PAGE_BUFFERS));
}

static void page_buffer_out_of_range(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_PAGE, any_page(vmm), RING_PAGE_BUFFERS + below(vmm, 1000));
}

static void stale_unasked(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_STALE, any_page(vmm), 0);
}

static void have_while_served(struct sim_vmm *vmm)
{
    sim_vmm_put(vmm, RING_HAVE, any_page(vmm), any_slot(vmm));
}

/* Something was asked: it says that it did, and it did not look; or it says nothing, or twice. */
static void answer_blindly(struct sim_vmm *vmm)
{
    struct ring_entry entry;
    uint32_t times = below(vmm, 3);

    if (!vmm->todo_count)
        return;
    entry = vmm->todo[vmm->todo_first];
    vmm->todo_first = (vmm->todo_first + 1) % SIM_TODO_MAX;
    vmm->todo_count--;
    for (uint32_t i = 0; i < times; i++) {
        if (entry.op == RING_WANT)
            sim_vmm_put(vmm, RING_PAGE, entry.page, below(vmm, RING_PAGE_BUFFERS));
        else
            sim_vmm_put(vmm, RING_MERGED, entry.page, entry.arg);
    }
}

static void other_content(struct sim_vmm *vmm)
{
    uint32_t buffer = below(vmm, RING_PAGE_BUFFERS);

    if (!vmm->todo_count || vmm->todo[vmm->todo_first].op != RING_WANT || !vmm->ring)
        return;
    sim_content_expand(1 + below(vmm, 40), vmm->ring->pages[buffer]);
    sim_vmm_put(vmm, RING_PAGE, vmm->todo[vmm->todo_first].page, buffer);
    vmm->todo_first = (vmm->todo_first + 1) % SIM_TODO_MAX;
    vmm->todo_count--;
}

/* Put right by the next entry that it writes; memd may not have looked by then. */
static void head_too_far(struct sim_vmm *vmm)
{
    if (!vmm->ring)
        return;
    __atomic_store_n(&vmm->ring->to_memd.head,
                     vmm->ring->to_memd.tail + RING_ENTRIES + 1 + below(vmm, 1U << 30),
                     __ATOMIC_RELEASE);
    vmm->rung = true;
}

/* memd sees this one when it wants to write next. */
static void tail_too_far(struct sim_vmm *vmm)
{
    if (vmm->ring)
        __atomic_store_n(&vmm->ring->to_agent.tail,
                         vmm->ring->to_agent.head + 1 + below(vmm, 1U << 30), __ATOMIC_RELEASE);
}

static void garbage_in_ring(struct sim_vmm *vmm)
{
    for (uint32_t i = 0; vmm->ring && i < 64; i++)
        vmm->ring->to_memd.entries[below(vmm, RING_ENTRIES)] = (struct ring_entry){
            below(vmm, 20), below(vmm, 1U << 14), sim_host_chance(&vmm->sim->host)};
    if (vmm->ring)
        __atomic_store_n(&vmm->ring->to_memd.head, vmm->ring->to_memd.tail + RING_ENTRIES,
                         __ATOMIC_RELEASE);
    vmm->rung = true;
}

static void flood_offers(struct sim_vmm *vmm)
{
    for (uint32_t i = 0; i < FLOOD && vmm->ring; i++)
        sim_vmm_put(vmm, RING_OFFER, i % (vmm->page_count ? vmm->page_count : 1),
                    sim_host_chance(&vmm->sim->host));
}

/* ---- messages ---- */

static void message_of_no_type(struct sim_vmm *vmm)
{
    struct message_header header = {below(vmm, 3) ? 16 + below(vmm, 1000) : 0, sizeof(header)};

    say(vmm, &header, sizeof(header));
}

static void message_of_memd(struct sim_vmm *vmm)
{
    static const uint32_t types[] = {MESSAGE_WELCOME, MESSAGE_REFUSED, MESSAGE_SEGMENT,
                                     MESSAGE_DROP,    MESSAGE_TUNE,    MESSAGE_DETACH};
    struct message_words words = {{types[below(vmm, 6)], sizeof(words)}, 0, 0, ""};

    say(vmm, &words, sizeof(words));
}

static void message_too_short(struct sim_vmm *vmm)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)}};

    say(vmm, &ram, 1 + below(vmm, (uint32_t)sizeof(ram) - 1));
}

static void message_too_long(struct sim_vmm *vmm)
{
    uint8_t bytes[2000] = {0};
    struct message_header header = {MESSAGE_STATS, sizeof(bytes)};

    memcpy(bytes, &header, sizeof(header));
    say(vmm, bytes, sizeof(bytes));
}

static void descriptors_unasked(struct sim_vmm *vmm)
{
    struct message_plain bell = {{MESSAGE_DOORBELL, sizeof(bell)}};
    int fds[6];
    uint32_t count = 1 + below(vmm, 6);

    for (uint32_t i = 0; i < count; i++)
        fds[i] = vmm->fd;
    sim_vmm_send(vmm, &bell, sizeof(bell), fds, count);
}

static void hello_twice(struct sim_vmm *vmm)
{
    struct message_hello hello = {.header = {MESSAGE_HELLO, sizeof(hello)},
                                  .magic = PROTOCOL_MAGIC,
                                  .version = PROTOCOL_VERSION,
                                  .page_bytes = PAGE_BYTES};

    say(vmm, &hello, sizeof(hello));
}

static void say_ram(struct sim_vmm *vmm, uint32_t first, uint32_t pages, uint64_t hva)
{
    struct message_ram ram = {.header = {MESSAGE_RAM, sizeof(ram)},
                              .first_page = first,
                              .pages = pages,
                              .hva = hva,
                              .managed = 1};

    say(vmm, &ram, sizeof(ram));
}

static void ram_that_overlaps(struct sim_vmm *vmm)
{
    for (uint32_t i = 0; i < vmm->block_count; i++) {
        if (vmm->blocks[i].live) {
            say_ram(vmm, vmm->page_count, 1, vmm->blocks[i].hva);
            return;
        }
    }
    say_ram(vmm, vmm->page_count, 0, vmm->next_hva);
}

static void ram_in_the_wrong_place(struct sim_vmm *vmm)
{
    say_ram(vmm, vmm->page_count + 1 + below(vmm, 100), 1, 1ULL << 40);
}

static void ram_that_cannot_be(struct sim_vmm *vmm)
{
    say_ram(vmm, vmm->page_count, below(vmm, 2) ? 0 : 2, UINT64_MAX - PAGE_BYTES + 1);
}

/* 1 TiB that it does not have: must cost memd next to nothing, now and when it leaves. */
static void ram_without_end(struct sim_vmm *vmm)
{
    say_ram(vmm, vmm->page_count, 1U << 28, 1ULL << 42);
    sim_turn(vmm->sim);
    sim_vmm_disconnect(vmm);
    vmm->held = false;
}

/* As much as page numbers go: neighbours must get theirs all the same. */
static void ram_for_all(struct sim_vmm *vmm)
{
    say_ram(vmm, vmm->page_count, GUEST_MAX_PAGES - vmm->page_count, 1ULL << 42);
}

static void ram_that_never_was(struct sim_vmm *vmm)
{
    struct message_ram_gone gone = {{MESSAGE_RAM_GONE, sizeof(gone)}, 1 + below(vmm, 50), 7777};

    say(vmm, &gone, sizeof(gone));
}

/* Blocks that come and go at once. */
static void ram_that_flickers(struct sim_vmm *vmm)
{
    uint32_t first = vmm->page_count;

    for (uint32_t i = 0; i < 200 && vmm->link == SIM_SERVED; i++, first++) {
        struct message_ram_gone gone = {{MESSAGE_RAM_GONE, sizeof(gone)}, first, 1};

        say_ram(vmm, first, 1, 1ULL << 43);
        say(vmm, &gone, sizeof(gone));
    }
    sim_vmm_disconnect(vmm);
    vmm->held = false;
}

static void dropped_unasked(struct sim_vmm *vmm)
{
    struct message_segment dropped = {
        {MESSAGE_DROPPED, sizeof(dropped)}, SEGMENTS_MAX - 1 + below(vmm, 100), 1};

    say(vmm, &dropped, sizeof(dropped));
}

static void detached_unasked(struct sim_vmm *vmm)
{
    struct message_plain detached = {{MESSAGE_DETACHED, sizeof(detached)}};

    say(vmm, &detached, sizeof(detached));
}

static void held_while_served(struct sim_vmm *vmm)
{
    struct message_segment held = {{MESSAGE_HELD, sizeof(held)}, below(vmm, 64), 1};

    sim_vmm_send(vmm, &held, sizeof(held), &vmm->fd, 1);
}

static void stats_of_no_state(struct sim_vmm *vmm)
{
    struct message_stats stats = {.header = {MESSAGE_STATS, sizeof(stats)},
                                  .state = AGENT_STATE_COUNT + below(vmm, 100)};

    say(vmm, &stats, sizeof(stats));
}

static void stats_that_do_not_sum(struct sim_vmm *vmm)
{
    struct message_stats stats = {.header = {MESSAGE_STATS, sizeof(stats)},
                                  .places = {UINT64_MAX, 5, 7},
                                  .merges = UINT64_MAX};

    memset(stats.reason, 'x', sizeof(stats.reason));
    say(vmm, &stats, sizeof(stats));
}

static void flood_messages(struct sim_vmm *vmm)
{
    struct message_plain bell = {{MESSAGE_DOORBELL, sizeof(bell)}};

    for (uint32_t i = 0; i < FLOOD && vmm->link == SIM_SERVED; i++)
        say(vmm, &bell, sizeof(bell));
}

/* ---- greetings ---- */

/* A connection of its own that says part of a HELLO, or a HELLO that is wrong somewhere. */
static void bad_hello(struct sim_vmm *vmm)
{
    struct message_hello hello = {.header = {MESSAGE_HELLO, sizeof(hello)},
                                  .magic = PROTOCOL_MAGIC,
                                  .version = PROTOCOL_VERSION,
                                  .features = UINT64_MAX,
                                  .page_bytes = PAGE_BYTES};
    uint32_t bytes = sizeof(hello);
    struct sim_vmm *other = vmm;

    sim_vmm_disconnect(vmm);
    sim_vmm_connect(other); /* says a good HELLO; what follows comes in GREETING or later */
    memcpy(hello.token, vmm->token, sizeof(hello.token));
    switch (below(vmm, 6)) {
    case 0: bytes = 1 + below(vmm, bytes - 1); break;
    case 1: hello.magic++; break;
    case 2: hello.version += 1 + below(vmm, 5); break;
    case 3: hello.page_bytes = 65536; break;
    case 4: hello.token[below(vmm, PROTOCOL_TOKEN_BYTES)] ^= 1; break;
    default: memset(hello.vmm, 'v', sizeof(hello.vmm)); break;
    }
    say(vmm, &hello, bytes);
}

/* It says that it held segments of an earlier memd, and hands over something else. */
static void false_claims(struct sim_vmm *vmm)
{
    int fd;

    sim_vmm_disconnect(vmm);
    vmm->held = true;
    vmm->session = below(vmm, 2) ? vmm->session : 0;
    for (uint32_t i = 0; i < vmm->segment_count; i++) {
        if (below(vmm, 3))
            continue;
        fd = vmm->segments[i].fd;
        switch (below(vmm, 4)) {
        case 0: vmm->segments[i].fd = open("/dev/null", O_RDWR | O_CLOEXEC); break;
        case 1: vmm->segments[i].fd = memfd_create("not-the-store", MFD_CLOEXEC); break;
        case 2:
            vmm->segments[i].id = (vmm->segments[i].id + 1) % 100;
            vmm->segments[i].fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
            break;
        default:
            vmm->segments[i].fd =
                fcntl(vmm->segments[below(vmm, vmm->segment_count)].fd, F_DUPFD_CLOEXEC, 3);
            break;
        }
        close(fd);
    }
    for (uint32_t i = 0; i < vmm->page_count; i++) {
        if (below(vmm, 8) == 0)
            vmm->pages[i].slot = any_slot(vmm);
    }
}

static void silence(struct sim_vmm *vmm)
{
    vmm->stalled = 2000;
}

static const struct {
    const char *name;
    void (*say)(struct sim_vmm *vmm);
    bool ends;
} lies[] = {
    {"offer out of range", offer_out_of_range, true},
    {"offer with a wrong hash", offer_wrong_hash, false},
    {"content that changes after the offer", offer_and_change, false},
    {"unknown op", unknown_op, true},
    {"MERGED out of range", merged_out_of_range, true},
    {"MERGED unasked", merged_unasked, false},
    {"NOT_MERGED unasked", not_merged_unasked, false},
    {"BROKEN unasked", broken_unasked, false},
    {"BROKEN twice", broken_twice, false},
    {"PAGE unasked", page_unasked, false},
    {"PAGE in no buffer", page_buffer_out_of_range, true},
    {"STALE unasked", stale_unasked, false},
    {"HAVE while served", have_while_served, true},
    {"blind answer", answer_blindly, false},
    {"other content", other_content, false},
    {"head of the ring too far", head_too_far, false},
    {"tail of the ring too far", tail_too_far, false},
    {"garbage in the ring", garbage_in_ring, false},
    {"flood of offers", flood_offers, false},
    {"message of no type", message_of_no_type, true},
    {"message of memd", message_of_memd, true},
    {"message too short", message_too_short, true},
    {"message too long", message_too_long, true},
    {"descriptors unasked", descriptors_unasked, true},
    {"HELLO twice", hello_twice, true},
    {"RAM that overlaps", ram_that_overlaps, true},
    {"RAM in the wrong place", ram_in_the_wrong_place, true},
    {"RAM that can't be", ram_that_cannot_be, true},
    {"RAM without end", ram_without_end, false},
    {"RAM for all", ram_for_all, false},
    {"RAM that never was", ram_that_never_was, true},
    {"RAM that flickers", ram_that_flickers, false},
    {"DROPPED unasked", dropped_unasked, true},
    {"DETACHED unasked", detached_unasked, true},
    {"HELD while served", held_while_served, true},
    {"STATS of no state", stats_of_no_state, true},
    {"STATS that do not sum", stats_that_do_not_sum, true},
    {"flood of messages", flood_messages, false},
    {"bad HELLO", bad_hello, false},
    {"false claims", false_claims, false},
    {"silence", silence, false},
};
#define LIES (sizeof(lies) / sizeof(lies[0]))

bool sim_lie_number(struct sim_vmm *vmm, uint32_t number)
{
    const struct guest *guest = registry_find(&vmm->sim->daemon, vmm->name);

    if (number >= LIES)
        return false;
    if (vmm->link != SIM_SERVED)
        return true;
    lies[number].say(vmm);
    vmm->lie = lies[number].name;
    vmm->sim->lies++;
    /* An agent that is being detached may say many things late. */
    if (lies[number].ends && vmm->link == SIM_SERVED && guest && guest->session &&
        !agents_is_leaving(guest->session) && !vmm->must_end_by)
        vmm->must_end_by = vmm->sim->turns + ENDS_WITHIN;
    sim_vmm_ring(vmm);
    return true;
}

void sim_lie(struct sim_vmm *vmm)
{
    (void)sim_lie_number(vmm, below(vmm, LIES));
}
