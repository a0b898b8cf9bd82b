/* SPDX-License-Identifier: Apache-2.0 */
/* The control connection: frames in and out, heartbeats, the state of vCPUs and devices. */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mover.h"

#if defined(__x86_64__)
#define MACHINE EM_X86_64
#elif defined(__aarch64__)
#define MACHINE EM_AARCH64
#else
#define MACHINE EM_NONE
#endif

#define FEATURE_ALL_FIRST 1U /* of HELLO: pure pre-copy */
#define FRAMES_TURN       64

/* ---- out ---- */

static void fill_hello(const struct mover *mover, struct peer_hello *hello)
{
    hello->version = PEER_VERSION;
    hello->machine = MACHINE;
    hello->page_bytes = PAGE_BYTES;
    hello->features = mover->start.precopy_only ? FEATURE_ALL_FIRST : 0;
    memcpy(hello->name, mover->start.name, sizeof(hello->name));
    memcpy(hello->vmm, mover->start.vmm, sizeof(hello->vmm));
    hello->region_count = mover->region_count;
    for (uint32_t i = 0; i < mover->region_count; i++)
        hello->regions[i] =
            (struct peer_region){mover->regions[i].first_page, mover->regions[i].pages};
}

static void fill_words(const struct mover *mover, int value, struct peer_words *words)
{
    words->code = (uint32_t)(value < 0 ? -value : value);
    snprintf(words->text, sizeof(words->text), "%s",
             mover->words[0] ? mover->words
             : value         ? strerror((int)words->code)
                             : "");
}

static void fill_figures(const struct mover *mover, struct peer_figures *figures)
{
    const struct mover_proven *proof = &mover->proof;

    *figures = (struct peer_figures){.pages_demand = proof->faults.count,
                                     .pages_placed = proof->pages_placed,
                                     .bytes = proof->pages.bytes_received,
                                     .fault_p50_us = proof->faults.p50_us,
                                     .fault_p99_us = proof->faults.p99_us,
                                     .fault_p999_us = proof->faults.p999_us,
                                     .fault_max_us = proof->faults.max_us};
}

static void send_frame(struct mover *mover, const struct peer_frame *frame)
{
    int result = link_send(&mover->control, frame, mover->now_ns);

    if (result)
        mover_cut(mover, result, strerror(-result));
}

void talk_say(struct mover *mover, enum peer_type type, int value)
{
    struct peer_frame frame = {.type = type};

    if (mover->control.state != LINK_UP)
        return;
    switch (type) {
    case PEER_HELLO: fill_hello(mover, &frame.hello); break;
    case PEER_OK: frame.port = mover->data_port; break;
    case PEER_RUNNING: frame.ago_ns = mover->now_ns - mover->run_ns; break;
    case PEER_REFUSED:
    case PEER_ABORT: fill_words(mover, value, &frame.words); break;
    case PEER_RESUME: frame.stand = (enum peer_stand)value; break;
    case PEER_PROVEN: fill_figures(mover, &frame.figures); break;
    default: break;
    }
    send_frame(mover, &frame);
}

static void send_pieces(struct mover *mover)
{
    uint8_t bytes[PEER_CHUNK_BYTES];
    struct transfer *state = &mover->state;

    while (mover->session.state == SOURCE_OFFERED && state->done < state->bytes &&
           link_has_room(&mover->control)) {
        uint64_t left = state->bytes - state->done;
        size_t count = left < sizeof(bytes) ? left : sizeof(bytes);
        ssize_t got = pread(state->fd, bytes, count, (off_t)state->done);
        struct peer_frame frame = {.type = PEER_STATE,
                                   .state = {state->done, state->bytes, bytes, (uint32_t)count}};

        if (got != (ssize_t)count) {
            mover_cut(mover, -EIO, "the state of the machine can't be read");
            return;
        }
        state->done += count;
        send_frame(mover, &frame);
    }
}

static void ping_when_due(struct mover *mover)
{
    if (mover->control.state == LINK_UP && mover->now_ns >= mover->control.said_ns + LINK_PING_NS)
        talk_say(mover, PEER_PING, 0);
}

/* ---- in ---- */

/* What can be compared before the guest's VMM is there; words are left where it does not fit. */
static void take_hello(struct mover *mover, const struct peer_hello *hello)
{
    mover->peer = *hello;
    memcpy(mover->start.name, hello->name, sizeof(mover->start.name));
    mover->session.all_first = hello->features & FEATURE_ALL_FIRST;
    if (hello->version != PEER_VERSION)
        mover_say_why(mover, "the movers of the two hosts are of different versions");
    else if (hello->machine != MACHINE || MACHINE == EM_NONE)
        mover_say_why(mover, "the two hosts are of different architectures");
    else if (hello->page_bytes != PAGE_BYTES)
        mover_say_why(mover, "the two hosts have pages of different sizes");
}

const char *talk_compare(const struct mover *mover)
{
    static char why[PEER_TEXT_BYTES];

    if (mover->region_count != mover->peer.region_count) {
        snprintf(why, sizeof(why),
                 "the guest has %u blocks of RAM, the VMM that was started for it has %u: it must "
                 "be the same machine, with the same devices",
                 mover->peer.region_count, mover->region_count);
        return why;
    }
    for (uint32_t i = 0; i < mover->region_count; i++) {
        const struct mover_region *here = &mover->regions[i];
        const struct peer_region *there = &mover->peer.regions[i];

        if (here->first_page == there->first_page && here->pages == there->pages)
            continue;
        snprintf(why, sizeof(why),
                 "block %u of the guest's RAM has %llu pages at the source, and %llu in the VMM at "
                 "the destination",
                 i, (unsigned long long)there->pages, (unsigned long long)here->pages);
        return why;
    }
    return NULL;
}

/* Pieces come in order, of one whole that never changes its size. */
static int take_piece(struct mover *mover, const struct peer_state *piece)
{
    struct transfer *state = &mover->state;

    if (mover->session.state != DESTINATION_FILLING || piece->offset != state->done ||
        (state->done && piece->total != state->bytes) || mover->session.state_here)
        return -EPROTO;
    if (state->fd < 0) {
        state->fd = memfd_create("memd-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        state->bytes = piece->total;
    }
    if (state->fd < 0)
        return -errno;
    if (pwrite(state->fd, piece->bytes, piece->count, (off_t)piece->offset) !=
        (ssize_t)piece->count)
        return -ENOMEM;
    state->done += piece->count;
    if (state->done == state->bytes) {
        (void)fcntl(state->fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW);
        mover_event(mover, &(struct session_event){.type = EVENT_STATE_HERE});
    }
    return 0;
}

static void hear_words(struct mover *mover, const struct peer_frame *frame)
{
    if (frame->words.text[0])
        mover_say_why(mover, "%s", frame->words.text);
}

/* The value that the session sees, or 1: the frame is not for it. */
static int look_at(struct mover *mover, const struct peer_frame *frame)
{
    switch (frame->type) {
    case PEER_PING: return 1;
    case PEER_STATE: return take_piece(mover, &frame->state) ? -EPROTO : 1;
    case PEER_HELLO:
        if (mover->session.state == DESTINATION_WAITING)
            take_hello(mover, &frame->hello);
        return 0;
    case PEER_OK: mover->data_port = frame->port; return 0;
    case PEER_REFUSED:
    case PEER_ABORT:
        hear_words(mover, frame);
        return frame->words.code ? -(int)frame->words.code : 0;
    case PEER_PROVEN: mover->peer_figures = frame->figures; return 0;
    case PEER_RUNNING: mover->run_ns = mover_time(mover, mover->stop_ns, frame->ago_ns); return 0;
    case PEER_RESUME:
        if (!mover->run_ns && (frame->stand == PEER_RUNS || frame->stand == PEER_HAS_ALL))
            mover->run_ns = mover->now_ns;
        return (int)frame->stand;
    default: return 0;
    }
}

static void take_frame(struct mover *mover, const struct peer_frame *frame)
{
    int value = look_at(mover, frame);
    struct session_event event = {.type = EVENT_FRAME, .frame = frame->type, .value = value};

    if (value == 1 && frame->type != PEER_RESUME)
        return;
    if (value == -EPROTO && frame->type == PEER_STATE)
        mover_cut(mover, -EPROTO, "it says what does not fit");
    else
        mover_event(mover, &event);
}

static void read_frames(struct mover *mover)
{
    for (int i = 0; i < FRAMES_TURN && mover->control.state == LINK_UP; i++) {
        struct peer_frame frame;
        int there = link_frame(&mover->control, &frame);

        if (there == 0)
            return;
        if (there < 0) {
            mover_cut(mover, there, "it says what is no frame");
            return;
        }
        take_frame(mover, &frame);
        if (mover->control.state == LINK_UP)
            link_frame_done(&mover->control);
    }
}

void talk_step(struct mover *mover)
{
    int result;

    if (mover->control.state != LINK_UP)
        return;
    result = link_step(&mover->control, mover->now_ns);
    /* What came before the end counts. */
    read_frames(mover);
    if (result && mover->control.state == LINK_UP)
        mover_cut(mover, result,
                  result == -ETIMEDOUT ? "nothing is heard of the other host" : strerror(-result));
    send_pieces(mover);
    ping_when_due(mover);
}

void talk_linger(struct mover *mover)
{
    struct link *link = &mover->control;
    int result;

    if (link->state != LINK_UP)
        return;
    link->in_used = 0; /* nothing that it says counts any more */
    result = link_step(link, mover->now_ns);
    if (!mover->said_all && link->out_used == 0) {
        mover->said_all = true;
        shutdown(link->fd, SHUT_WR);
    }
    if ((result && result != -ETIMEDOUT) || mover->now_ns >= mover->linger_ns)
        connect_drop(mover);
}
