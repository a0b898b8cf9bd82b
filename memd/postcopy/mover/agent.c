/* SPDX-License-Identifier: Apache-2.0 */
/* The agent's side: requests go out as they are asked for, answers become events. The agent lives
 * in a VMM that a guest may have taken over: sizes are checked, numbers are only ever shown. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mover.h"
#include "send_with.h"

#define AGENT_TURN 64

/* ---- out ---- */

static int send_message(struct mover *mover, const void *message, uint32_t bytes, int fd)
{
    return send_with(mover->agent, message, bytes, &fd, fd >= 0, 0);
}

static void lose_agent(struct mover *mover, const char *why)
{
    if (mover->agent < 0)
        return;
    close(mover->agent);
    mover->agent = -1;
    mover_say_why(mover, "the agent of this guest is gone: %s", why);
    mover_event(mover, &(struct session_event){.type = EVENT_AGENT_GONE});
}

static int ask_plain(struct mover *mover, uint32_t what)
{
    struct mover_plain message = {{what, sizeof(message)}};

    return send_message(mover, &message, sizeof(message), -1);
}

static int ask_session(struct mover *mover)
{
    struct mover_session message = {
        .header = {MOVER_SET_SESSION, sizeof(message)},
        .tuning = {.bandwidth = mover->start.bandwidth, .switches = mover->start.switches}};

    memcpy(message.session, mover->session_id, sizeof(message.session));
    return send_message(mover, &message, sizeof(message), -1);
}

static int ask_load(struct mover *mover)
{
    struct mover_load message = {.header = {MOVER_LOAD, sizeof(message)},
                                 .bytes = mover->state.bytes};
    int result = send_message(mover, &message, sizeof(message), mover->state.fd);

    close(mover->state.fd);
    mover->state.fd = -1;
    return result;
}

void agent_ask(struct mover *mover, uint32_t what)
{
    /* What must be there before the guest runs can't wait for that. */
    struct mover_stop stop = {{MOVER_STOP, sizeof(stop)}, 1, !mover->start.precopy_only};
    struct mover_link unlink = {{MOVER_UNLINK, sizeof(unlink)}, 0, mover->epoch};
    int result;

    if (mover->agent < 0) {
        if (what == MOVER_ABORT) /* nobody is left who could refuse */
            mover_event(mover, &(struct session_event){.type = EVENT_DONE, .what = what});
        return;
    }
    mover->asked_ns = mover->now_ns;
    switch (what) {
    case MOVER_SET_SESSION: result = ask_session(mover); break;
    case MOVER_STOP:
        mover->stop_ns = mover->now_ns;
        result = send_message(mover, &stop, sizeof(stop), -1);
        break;
    case MOVER_UNLINK: result = send_message(mover, &unlink, sizeof(unlink), -1); break;
    case MOVER_LOAD: result = ask_load(mover); break;
    default: result = ask_plain(mover, what); break;
    }
    if (result)
        lose_agent(mover, strerror(-result));
}

/* One data connection goes to the agent: its socket, or the clear end of a relay. */
static int link_one(struct mover *mover, enum mover_channel channel)
{
    struct mover_link message = {{MOVER_LINK, sizeof(message)}, channel, mover->epoch};
    struct link *link = &mover->data[channel];
    int fd, result;

    mover->held[channel] = fcntl(link->fd, F_DUPFD_CLOEXEC, 0);
    if (link->ssl) {
        result = relay_start(&mover->relays[channel], link, &fd);
        if (result)
            return result;
    } else {
        fd = link_release(link);
    }
    result = send_message(mover, &message, sizeof(message), fd);
    close(fd);
    return result;
}

void agent_link(struct mover *mover)
{
    int result = link_one(mover, MOVER_URGENT);

    if (!result)
        result = link_one(mover, MOVER_BULK);
    if (result)
        lose_agent(mover, strerror(-result));
}

/* ---- in ---- */

/* Reads a message of a type that is known into its struct: what the agent's is shorter, is zero. */
static void take(void *into, size_t room, const uint8_t *message, size_t bytes)
{
    memset(into, 0, room);
    memcpy(into, message, bytes < room ? bytes : room);
}

static bool hello_is_good(struct mover *mover)
{
    const struct mover_hello *hello = &mover->hello;

    if (hello->version != MOVER_VERSION || hello->role != mover->start.role)
        mover_say_why(mover, "the agent of this guest speaks another version");
    else if (hello->reason[0])
        mover_say_why(mover, "the agent can't move this guest: %.120s", hello->reason);
    else if (hello->unmanaged_pages)
        mover_say_why(mover,
                      "%llu MiB of this guest's RAM are not managed by memd, and can't be moved; "
                      "memctl guest says why",
                      (unsigned long long)hello->unmanaged_pages * PAGE_BYTES >> 20);
    else if (hello->page_bytes != PAGE_BYTES || hello->region_count == 0 ||
             hello->region_count > PEER_REGIONS_MAX)
        mover_say_why(mover, "the agent tells of %u blocks of RAM", hello->region_count);
    else if ((hello->hooks & (MOVER_CAN_PAUSE | MOVER_CAN_SAVE)) !=
             (MOVER_CAN_PAUSE | MOVER_CAN_SAVE))
        mover_say_why(mover, "the VMM gives memd no way to pause, save and load its machine");
    else
        return true;
    return false;
}

/* The first thing that a source does, and a mover that takes over. */
static void begin(struct mover *mover, bool good)
{
    if (mover->start.takes_over) {
        if (mover->hello.epoch > mover->epoch)
            mover->epoch = mover->hello.epoch;
        memcpy(mover->session_id, mover->hello.session, sizeof(mover->session_id));
        session_resume(&mover->session, (enum mover_role)mover->start.role,
                       (enum mover_phase)mover->hello.phase,
                       mover->hello.proven && mover->hello.proven_result == 0, mover->hello.paused);
        if (!session_is_committed(&mover->session))
            mover_say_why(mover, "its mover died before the guest was handed over");
    } else {
        session_start(&mover->session, MOVER_SOURCE, mover->start.precopy_only);
        mover->session.at_once = mover->start.postcopy_only;
        if (!good)
            session_take(&mover->session, &(struct session_event){.type = EVENT_LATE});
    }
    mover_event(mover, NULL);
}

/* HELLO and all regions are here. */
static void meet(struct mover *mover)
{
    bool good = hello_is_good(mover);
    const char *why = NULL;

    mover->agent_is_known = true;
    if (mover->start.takes_over || mover->start.role == MOVER_SOURCE) {
        begin(mover, good || mover->start.takes_over);
        return;
    }
    if (good)
        why = talk_compare(mover);
    if (why)
        mover_say_why(mover, "%s", why);
    mover_event(mover, &(struct session_event){.type = EVENT_GUEST,
                                               .value = good && !why ? 0 : -EOPNOTSUPP});
}

static void take_hello(struct mover *mover, const uint8_t *message, size_t bytes)
{
    take(&mover->hello, sizeof(mover->hello), message, bytes);
    mover->hello.reason[sizeof(mover->hello.reason) - 1] = '\0';
    mover->region_count = 0;
    if (mover->hello.region_count == 0)
        meet(mover);
}

static void take_region(struct mover *mover, const uint8_t *message, size_t bytes)
{
    if (mover->agent_is_known || mover->region_count >= PEER_REGIONS_MAX)
        return;
    take(&mover->regions[mover->region_count++], sizeof(mover->regions[0]), message, bytes);
    if (mover->region_count == mover->hello.region_count)
        meet(mover);
}

static void take_state(struct mover *mover, const struct mover_done *done, int fd)
{
    if (mover->state.fd >= 0)
        close(mover->state.fd);
    mover->state = (struct transfer){.fd = fd, .bytes = done->value};
}

/* What was not done, for people. */
static const char *undone(uint32_t what)
{
    switch (what) {
    case MOVER_STOP: return "the guest can't be stopped";
    case MOVER_SAVE: return "the state of its virtual CPUs and devices can't be saved";
    case MOVER_LOAD:
        return "the VMM at the destination can't load the state of its virtual CPUs and devices; "
               "it "
               "has to be the same machine, and may have said why";
    case MOVER_RUN: return "the guest can't be let run at the destination";
    case MOVER_EXPECT: return "the RAM of the VMM at the destination can't be prepared";
    case MOVER_ABORT: return "the guest can't be let go on";
    default: return "the agent of this guest refuses a step";
    }
}

static void take_done(struct mover *mover, const uint8_t *message, size_t bytes, int *fd)
{
    struct mover_done done;

    take(&done, sizeof(done), message, bytes);
    if (done.what == MOVER_SAVE && done.result == 0) {
        if (*fd < 0 || done.value == 0 || done.value > PEER_STATE_MAX) {
            mover_say_why(mover, "the state of the machine has %llu bytes, which can't be",
                          (unsigned long long)done.value);
            done.result = -E2BIG;
        } else {
            take_state(mover, &done, *fd);
            *fd = -1;
        }
    } else if (done.what == MOVER_STOP && done.value) {
        mover->stop_ns = mover_time(mover, mover->asked_ns, done.value);
    } else if (done.what == MOVER_RUN && done.result == 0) {
        mover->run_ns = mover_time(mover, mover->asked_ns, done.value);
    } else if (done.result && done.what != MOVER_UNLINK && done.what != MOVER_HOLD) {
        mover_say_why(mover, "%s: %s", undone(done.what), strerror(-done.result));
    }
    mover_event(mover, &(struct session_event){
                           .type = EVENT_DONE, .what = done.what, .value = done.result});
}

static void take_progress(struct mover *mover, const uint8_t *message, size_t bytes)
{
    struct mover_progress *progress = &mover->progress;
    uint64_t left = progress->pages_left;

    take(progress, sizeof(*progress), message, bytes);
    if (mover->session.state == SOURCE_OFFERED && progress->pages_left < left)
        mover->late_ns = mover->now_ns + 60 * NS_PER_S; /* pages still move */
    if (mover->session.state != SOURCE_PRECOPY || !progress->pass_ended)
        return;
    switch (precopy_judge(&mover->precopy, progress->pass, progress->pages_left, progress->rate)) {
    case PRECOPY_IS_ENOUGH:
        mover_event(mover, &(struct session_event){.type = EVENT_SHOULD_STOP});
        break;
    case PRECOPY_IS_IN_VAIN:
        mover_say_why(mover, "the guest writes faster than its memory can be sent");
        mover_event(mover, &(struct session_event){.type = EVENT_CANCEL});
        break;
    default: break;
    }
}

static void take_proven(struct mover *mover, const uint8_t *message, size_t bytes)
{
    take(&mover->proof, sizeof(mover->proof), message, bytes);
    if (mover->proof.result)
        mover_say_why(mover, "the pages that were sent and those that came differ in region %u",
                      mover->proof.region);
    mover_event(mover, &(struct session_event){.type = EVENT_PROVEN, .value = mover->proof.result});
}

static void take_cut(struct mover *mover, const uint8_t *message, size_t bytes)
{
    struct mover_cut cut;
    char why[sizeof(cut.reason) + 64];

    take(&cut, sizeof(cut), message, bytes);
    cut.reason[sizeof(cut.reason) - 1] = '\0';
    if (cut.epoch != mover->epoch || mover->session.proven)
        return;
    snprintf(why, sizeof(why), "the %s connection: %s",
             cut.channel == MOVER_URGENT ? "urgent" : "bulk",
             cut.reason[0] ? cut.reason : strerror(-cut.result));
    mover_cut(mover, cut.result ? cut.result : -EPIPE, why);
}

static void take_message(struct mover *mover, const uint8_t *message, size_t bytes, int *fd)
{
    struct mover_header header;

    memcpy(&header, message, sizeof(header));
    switch (header.type) {
    case MOVER_HELLO: take_hello(mover, message, bytes); break;
    case MOVER_REGION: take_region(mover, message, bytes); break;
    case MOVER_DONE: take_done(mover, message, bytes, fd); break;
    case MOVER_PROGRESS: take_progress(mover, message, bytes); break;
    case MOVER_MAPPED: mover_event(mover, &(struct session_event){.type = EVENT_MAPPED}); break;
    case MOVER_PROVEN: take_proven(mover, message, bytes); break;
    case MOVER_CUT: take_cut(mover, message, bytes); break;
    default: break; /* of a newer agent */
    }
}

/* False: there is no more. */
static bool receive(struct mover *mover)
{
    _Alignas(8) uint8_t message[MOVER_MAX_MESSAGE];
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec piece = {message, sizeof(message)};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = control,
                            .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(mover->agent, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    int fd;

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    fd = got < 0 ? -1 : received_fd(&header);
    if (got <= 0) {
        lose_agent(mover, got < 0 ? strerror(errno) : "its VMM has ended");
        if (fd >= 0)
            close(fd);
        return false;
    }
    if ((size_t)got >= sizeof(struct mover_header) && !(header.msg_flags & MSG_TRUNC))
        take_message(mover, message, (size_t)got, &fd);
    if (fd >= 0)
        close(fd);
    return true;
}

void agent_read(struct mover *mover)
{
    for (int i = 0; i < AGENT_TURN && mover->agent >= 0; i++) {
        if (!receive(mover))
            return;
    }
}
