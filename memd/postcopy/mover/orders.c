/* SPDX-License-Identifier: Apache-2.0 */
/* memd's side: START at the beginning, then STATUS one way and a few words the other way. A mover
 * whose memd has gone goes on, and listens for the next one. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "drive_qemu.h"
#include "mover.h"

#define FDS_MAX      5
#define STATUS_DUE   (200 * NS_PER_MS)
#define START_WAIT_S 10

/* ---- in ---- */

static uint32_t collect(struct msghdr *header, int *fds)
{
    uint32_t count = 0;

    for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
        size_t bytes = part->cmsg_len - CMSG_LEN(0);

        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < bytes / sizeof(int) && count < FDS_MAX; i++)
            memcpy(&fds[count++], CMSG_DATA(part) + i * sizeof(int), sizeof(int));
    }
    return count;
}

/* One message: its bytes, 0 at the end of the connection, or -errno. */
static ssize_t receive(int socket, void *into, size_t room, int *fds, uint32_t *ret_count, int how)
{
    char control[CMSG_SPACE(sizeof(int) * FDS_MAX)];
    struct iovec piece = {into, room};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = control,
                            .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(socket, &header, how | MSG_CMSG_CLOEXEC);

    if (got < 0)
        return -errno;
    *ret_count = collect(&header, fds);
    return header.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? -EMSGSIZE : got;
}

static bool texts_end(const struct order_start *start)
{
    return memchr(start->name, 0, sizeof(start->name)) &&
           memchr(start->vmm, 0, sizeof(start->vmm)) &&
           memchr(start->host, 0, sizeof(start->host)) &&
           memchr(start->tls_cert, 0, sizeof(start->tls_cert)) &&
           memchr(start->tls_key, 0, sizeof(start->tls_key)) &&
           memchr(start->tls_ca, 0, sizeof(start->tls_ca));
}

/* The descriptors of START go to their places. */
static bool place(struct mover *mover, const int *fds, uint32_t count)
{
    bool source = mover->start.role == MOVER_SOURCE, takes_over = mover->start.takes_over;
    uint32_t wanted = (source ? 2 : 3) + (mover->start.has_monitor ? 1 : 0), next = 0;

    if (count != wanted)
        return false;
    mover->memd_listener = fds[next++];
    if (source || takes_over)
        mover->agent = fds[next++];
    if (!source)
        mover->listener = fds[next++];
    if (!source && !takes_over)
        mover->first = fds[next++];
    if (mover->start.has_monitor)
        mover->monitor = fds[next];
    return true;
}

static void close_all(const int *fds)
{
    for (int i = 0; i < FDS_MAX; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
    }
}

int orders_receive_start(struct mover *mover)
{
    struct order_start *start = &mover->start;
    struct timeval patience = {.tv_sec = START_WAIT_S};
    int fds[FDS_MAX] = {-1, -1, -1, -1, -1};
    uint32_t count = 0;
    ssize_t got;

    (void)setsockopt(mover->memd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    got = receive(mover->memd, start, sizeof(*start), fds, &count, 0);
    if (got != sizeof(*start) || start->header.type != ORDER_START ||
        start->version != ORDERS_VERSION || !texts_end(start) ||
        (start->role != MOVER_SOURCE && start->role != MOVER_DESTINATION) ||
        !place(mover, fds, count)) {
        close_all(fds);
        return got < 0 ? (int)got : -EPROTO;
    }
    memcpy(mover->session_id, start->session, sizeof(mover->session_id));
    mover->epoch = start->epoch;
    mover->data_port = start->data_port;
    mover->precopy.only = start->precopy_only;
    for (uint32_t i = 0; i < count; i++)
        (void)fcntl(fds[i], F_SETFL, fcntl(fds[i], F_GETFL) | O_NONBLOCK);
    return 0;
}

int orders_drive_monitor(struct mover *mover)
{
    int agent = mover->agent, monitor = mover->monitor;

    if (agent < 0 || monitor < 0)
        return 0;
    mover->agent = mover->monitor = -1;
    return drive_qemu_start(agent, monitor, mover->start.takes_over, &mover->agent);
}

/* fds: the agent's socket, and perhaps the monitor's. */
static void take_guest(struct mover *mover, const struct order_guest *guest, int *fds)
{
    if (mover->session.state != DESTINATION_STARTING || mover->agent >= 0)
        return;
    if (guest->result || fds[0] < 0) {
        mover_say_why(mover, "%.*s", (int)sizeof(guest->words) - 1, guest->words);
        mover_event(mover,
                    &(struct session_event){.type = EVENT_GUEST,
                                            .value = guest->result ? guest->result : -EBADF});
        return;
    }
    mover->agent = fds[0]; /* its HELLO comes now */
    fds[0] = -1;
    if (guest->has_monitor) {
        mover->monitor = fds[1];
        fds[1] = -1;
    }
    if (orders_drive_monitor(mover) < 0)
        mover_event(mover, &(struct session_event){.type = EVENT_GUEST, .value = -ENOMEM});
}

static void take(struct mover *mover, const uint8_t *message, size_t bytes, int *fds)
{
    struct order_header header;
    struct order_guest guest;

    if (bytes < sizeof(header))
        return;
    memcpy(&header, message, sizeof(header));
    if (header.type == ORDER_GUEST && bytes == sizeof(guest)) {
        memcpy(&guest, message, sizeof(guest));
        take_guest(mover, &guest, fds);
    } else if (header.type == ORDER_CANCEL) {
        if (session_may_cancel(&mover->session))
            mover_say_why(mover, "it was cancelled");
        mover_event(mover, &(struct session_event){.type = EVENT_CANCEL});
    } else if (header.type == ORDER_FORGET) {
        mover->forget = true;
    }
}

static void lose_memd(struct mover *mover)
{
    close(mover->memd);
    mover->memd = -1;
}

void orders_read(struct mover *mover)
{
    while (mover->memd >= 0) {
        _Alignas(8) uint8_t message[ORDERS_MAX_MESSAGE];
        int fds[FDS_MAX] = {-1, -1, -1, -1, -1};
        uint32_t count = 0;
        ssize_t got = receive(mover->memd, message, sizeof(message), fds, &count, MSG_DONTWAIT);

        if (got == -EAGAIN || got == -EINTR)
            return;
        if (got > 0)
            take(mover, message, (size_t)got, fds);
        else
            lose_memd(mover);
        close_all(fds);
    }
}

void orders_accept(struct mover *mover)
{
    int fd = accept4(mover->memd_listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (fd < 0)
        return;
    if (mover->memd >= 0)
        lose_memd(mover);
    mover->memd = fd;
    mover->status_news = true;
    /* What the one before was asked, and did not answer. */
    if (mover->session.state == DESTINATION_STARTING && mover->agent < 0)
        orders_need_guest(mover);
}

/* ---- out ---- */

static void send_message(struct mover *mover, const void *message, size_t bytes)
{
    if (mover->memd >= 0 && send(mover->memd, message, bytes, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 &&
        errno != EAGAIN && errno != ENOBUFS)
        lose_memd(mover);
}

void orders_need_guest(struct mover *mover)
{
    struct order_need_guest need = {.header = {ORDER_NEED_GUEST, sizeof(need)}};

    memcpy(need.name, mover->peer.name, sizeof(need.name));
    memcpy(need.vmm, mover->peer.vmm, sizeof(need.vmm));
    memcpy(need.session, mover->session_id, sizeof(need.session));
    for (uint32_t i = 0; i < mover->peer.region_count; i++)
        need.pages += mover->peer.regions[i].pages;
    send_message(mover, &need, sizeof(need));
}

static enum order_stage stage_of(const struct session *session)
{
    switch (session->state) {
    case SOURCE_PRECOPY:
    case DESTINATION_FILLING: return ORDER_STAGE_PRECOPY;
    case SOURCE_STOPPING:
    case SOURCE_SAVING:
    case SOURCE_OFFERED:
    case SOURCE_COMMITTING:
    case SOURCE_ABORTING:
    case SOURCE_TELLING:
    case DESTINATION_LOADING:
    case DESTINATION_READY:
    case DESTINATION_RESUMING: return ORDER_STAGE_SWITCH;
    case SOURCE_COMMITTED:
    case DESTINATION_RUNNING: return ORDER_STAGE_POSTCOPY;
    case SOURCE_PROVEN:
    case DESTINATION_PROVEN:
    case SESSION_OVER: return ORDER_STAGE_DONE;
    default: return ORDER_STAGE_PREPARE;
    }
}

/* The destination has its outcome as soon as all is proven, though its mover still waits for the
 * source to have heard it. */
static enum order_outcome outcome_of(const struct session *session)
{
    static const enum order_outcome outcomes[OUTCOME_COUNT] = {
        [OUTCOME_NONE] = ORDER_GOES_ON,
        [OUTCOME_COMPLETED] = ORDER_COMPLETED,
        [OUTCOME_SOURCE_RUNS] = ORDER_SOURCE_RUNS,
        [OUTCOME_GUEST_LOST] = ORDER_GUEST_LOST,
        [OUTCOME_CANCELLED] = ORDER_CANCELLED,
    };

    if (session->state == DESTINATION_PROVEN)
        return ORDER_COMPLETED;
    return session->state == SESSION_OVER ? outcomes[session->outcome] : ORDER_GOES_ON;
}

static uint64_t since(uint64_t from, uint64_t to)
{
    return from && to > from ? to - from : 0;
}

static void fill_times(const struct mover *mover, struct order_status *status)
{
    uint64_t now = mover->end_ns ? mover->end_ns : mover->now_ns;

    status->elapsed_ns = since(mover->began_ns, now);
    status->precopy_ns = since(mover->precopy_ns, mover->stop_ns ? mover->stop_ns : now);
    if (mover->start.role == MOVER_SOURCE)
        status->downtime_ns = since(mover->stop_ns, mover->run_ns);
    status->postcopy_ns = mover->run_ns ? since(mover->run_ns, now) : 0;
}

static void fill_pages(const struct mover *mover, struct order_status *status)
{
    const struct mover_progress *progress = &mover->progress;

    status->pages = mover->hello.pages;
    status->pass = progress->pass;
    status->pages_left = mover->session.proven ? 0 : progress->pages_left;
    status->rate_bytes = progress->rate * PAGE_BYTES;
    status->pages_data = progress->pages_data;
    status->pages_demand = progress->pages_demand;
    status->pages_slot = progress->pages_slot;
    status->pages_zero = progress->pages_zero;
    status->pages_resent = progress->pages_resent;
    if (mover->proof.header.type) {
        status->pages_data = mover->proof.pages.data;
        status->pages_demand = mover->proof.pages.demand;
        status->pages_slot = mover->proof.pages.slot;
        status->pages_zero = mover->proof.pages.zero;
        status->pages_resent = mover->proof.pages.resent;
    }
    status->pages_pushed =
        status->pages_data > status->pages_demand ? status->pages_data - status->pages_demand : 0;
}

static void fill_faults(const struct mover *mover, struct order_status *status)
{
    const struct peer_figures *there = &mover->peer_figures;

    status->fault_p50_us = there->fault_p50_us;
    status->fault_p99_us = there->fault_p99_us;
    status->fault_p999_us = there->fault_p999_us;
    status->fault_max_us = there->fault_max_us;
    if (mover->start.role != MOVER_DESTINATION)
        return;
    status->fault_p50_us = mover->proof.faults.p50_us;
    status->fault_p99_us = mover->proof.faults.p99_us;
    status->fault_p999_us = mover->proof.faults.p999_us;
    status->fault_max_us = mover->proof.faults.max_us;
}

void orders_send_status(struct mover *mover)
{
    struct order_status status = {.header = {ORDER_STATUS, sizeof(status)}};

    if (!mover->status_news && mover->now_ns < mover->status_due_ns)
        return;
    mover->status_news = false;
    mover->status_due_ns = mover->now_ns + STATUS_DUE;
    status.stage = stage_of(&mover->session);
    status.outcome = outcome_of(&mover->session);
    status.may_cancel = session_may_cancel(&mover->session);
    status.was_cut = mover->session.was_cut;
    status.linked = mover->control.state == LINK_UP;
    status.epoch = mover->epoch;
    status.data_port = mover->start.role == MOVER_SOURCE ? mover->data_port : 0;
    status.reconnects = mover->reconnects;
    status.bytes_sent = connect_bytes(mover);
    fill_times(mover, &status);
    fill_pages(mover, &status);
    fill_faults(mover, &status);
    snprintf(status.words, sizeof(status.words), "%s", mover->words);
    memcpy(status.session, mover->session_id, sizeof(status.session));
    send_message(mover, &status, sizeof(status));
}
