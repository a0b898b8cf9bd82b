/* SPDX-License-Identifier: Apache-2.0 */
#include "session.h"
#include "send_with.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon.h"
#include "host.h"
#include "log.h"

#define TURN_MESSAGES 32U
#define TURN_ENTRIES  256U
#define TURN_NS       500000ULL
#define OUT_MAX       16384U /* messages that wait; an agent that reads so little is lost */
#define MESSAGE_MAX   1024U
#define FDS_MAX       4

static bool step(struct loop_task *task);

/* ---- out: messages ---- */

static void wait_writable(struct session *session)
{
    if (session->writable.op == LOOP_NOT_QUEUED)
        (void)loop_watch_add(&session->daemon->loop, &session->writable);
}

static int queue_message(struct session *session, const void *message, uint32_t bytes, int fd)
{
    struct outgoing *out;

    if (session->out_count == OUT_MAX)
        return -ENOBUFS;
    out = malloc(sizeof(*out) + bytes);
    if (!out)
        return -ENOMEM;
    *out = (struct outgoing){.fd = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3), .bytes = bytes};
    memcpy(out->message, message, bytes);
    if (fd >= 0 && out->fd < 0) {
        free(out);
        return -errno;
    }
    if (session->last_out)
        session->last_out->next = out;
    else
        session->first_out = out;
    session->last_out = out;
    session->out_count++;
    wait_writable(session);
    return 0;
}

/* Too many descriptors in flight is a full socket too. */
static bool is_full(int error)
{
    return error == -EAGAIN || error == -ENOBUFS || error == -ETOOMANYREFS;
}

int session_send(struct session *session, const void *message, uint32_t bytes, const int *fds,
                 uint32_t fd_count)
{
    int result = -EAGAIN;

    if (session->state == SESSION_OVER)
        return -EPIPE;
    if (!session->first_out)
        result = send_with(session->fd, message, bytes, fds, fd_count, MSG_DONTWAIT);
    if (is_full(result) && fd_count <= 1)
        result = queue_message(session, message, bytes, fd_count ? fds[0] : -1);
    return result;
}

static void free_first_out(struct session *session)
{
    struct outgoing *out = session->first_out;

    session->first_out = out->next;
    if (!out->next)
        session->last_out = NULL;
    session->out_count--;
    if (out->fd >= 0)
        close(out->fd);
    free(out);
}

static void flush_messages(struct session *session)
{
    while (session->first_out) {
        const struct outgoing *out = session->first_out;
        int result = send_with(session->fd, out->message, out->bytes, &out->fd,
                               out->fd >= 0 ? 1 : 0, MSG_DONTWAIT);

        if (is_full(result)) {
            wait_writable(session);
            return;
        }
        free_first_out(session);
    }
}

static void can_write(struct loop_watch *watch, uint32_t events)
{
    struct session *session = watch->owner;

    (void)events;
    loop_watch_remove(&session->daemon->loop, watch);
    session_wake(session);
}

/* ---- out: the ring ---- */

static void mark_lie(struct session *session, const char *lie)
{
    if (session->state == SESSION_OVER)
        return; /* its member is still spoken to until it has left */
    if (!session->lie[0])
        snprintf(session->lie, sizeof(session->lie), "%s", lie);
    session_wake(session);
}

static bool ring_has_room(struct session *session)
{
    uint32_t room = ring_room(&session->ring->to_agent, session->own_head);

    if (room > RING_ENTRIES) {
        mark_lie(session, "it moved the tail of the answers past their head");
        return false;
    }
    return room > 0;
}

static void write_entry(struct session *session, struct ring_entry entry)
{
    ring_put(&session->ring->to_agent, &session->own_head, entry);
    session->wrote = true;
}

static bool put(void *agent, struct ring_entry entry)
{
    struct session *session = agent;

    if (session->state == SESSION_OVER || session->state == SESSION_LEAVING || session->lie[0])
        return false;
    if (session->pending_count == SESSION_PENDING_MAX)
        return false;
    session_wake(session);
    if (!session->pending_count && !session->first_out && ring_has_room(session)) {
        write_entry(session, entry);
        return true;
    }
    session->pending[(session->pending_first + session->pending_count++) % SESSION_PENDING_MAX] =
        entry;
    return true;
}

static void flush_ring(struct session *session)
{
    while (session->pending_count && !session->first_out && ring_has_room(session)) {
        write_entry(session, session->pending[session->pending_first]);
        session->pending_first = (session->pending_first + 1) % SESSION_PENDING_MAX;
        session->pending_count--;
    }
    if (!session->pending_count && session->pending_first) {
        session->pending_first = 0;
        madvise(session->pending, SESSION_PENDING_MAX * sizeof(*session->pending), MADV_DONTNEED);
    }
}

static void ring_bell(struct session *session)
{
    struct message_plain bell = {{MESSAGE_DOORBELL, sizeof(bell)}};

    if (!session->wrote || session->first_out)
        return;
    session->wrote = false;
    /* A full socket has something else to wake it up. */
    (void)send_with(session->fd, &bell, sizeof(bell), NULL, 0, MSG_DONTWAIT);
}

/* A message that the agent must get. Who has hung up is no liar: its end is read in its turn. */
static bool send_surely(struct session *session, const struct message_segment *message,
                        const int *fd)
{
    int result = session_send(session, message, sizeof(*message), fd, fd ? 1 : 0);

    if (result && result != -EPIPE && result != -ECONNRESET)
        mark_lie(session, "it takes no more messages");
    return result == 0;
}

static bool give(void *agent, uint32_t segment, uint32_t pages, int fd)
{
    struct session *session = agent;
    struct message_segment message = {{MESSAGE_SEGMENT, sizeof(message)}, segment, pages};

    return session->state != SESSION_LEAVING && send_surely(session, &message, &fd);
}

static bool drop(void *agent, uint32_t segment, uint32_t pages)
{
    struct session *session = agent;
    struct message_segment message = {{MESSAGE_DROP, sizeof(message)}, segment, pages};

    return send_surely(session, &message, NULL);
}

static void left(void *agent)
{
    struct session *session = agent;

    session->member = NULL;
    session_free_if_done(session);
}

static const struct ksm_member_ops member_ops = {put, give, drop, left};

/* ---- in: the ring ---- */

static int take_page(struct ksm_member *member, struct ring_entry entry, struct ring *ring)
{
    if (entry.arg >= RING_PAGE_BUFFERS)
        return -EPROTO;
    return ksm_match_page(member, entry.page, ring->pages[entry.arg]);
}

static int take_offer(struct ksm_member *member, struct ring_entry entry, struct ring *ring)
{
    (void)ring;
    return ksm_match_offer(member, entry.page, entry.arg);
}

static int take_stale(struct ksm_member *member, struct ring_entry entry, struct ring *ring)
{
    (void)ring;
    return ksm_match_stale(member, entry.page);
}

static int take_merged(struct ksm_member *member, struct ring_entry entry, struct ring *ring)
{
    (void)ring;
    return entry.arg > UINT32_MAX ? -EPROTO
                                  : ksm_match_merged(member, entry.page, (uint32_t)entry.arg);
}

static int take_not_merged(struct ksm_member *member, struct ring_entry entry, struct ring *ring)
{
    (void)ring;
    return ksm_match_not_merged(member, entry.page, (uint32_t)entry.arg,
                                (enum not_merged)(entry.arg >> 32));
}

static int take_broken(struct ksm_member *member, struct ring_entry entry, struct ring *ring)
{
    (void)ring;
    return entry.arg > UINT32_MAX ? -EPROTO
                                  : ksm_match_broken(member, entry.page, (uint32_t)entry.arg);
}

static int take_have(struct ksm_member *member, struct ring_entry entry, struct ring *ring)
{
    (void)ring;
    return entry.arg > UINT32_MAX ? -EPROTO
                                  : ksm_match_have(member, entry.page, (uint32_t)entry.arg);
}

static int take_pass(struct ksm_member *member, struct ring_entry entry, struct ring *ring)
{
    (void)entry;
    (void)ring;
    ksm_match_pass(member);
    return 0;
}

#define ANY_STATE \
    (IN_STATE(SESSION_HOLDING) | IN_STATE(SESSION_SERVING) | IN_STATE(SESSION_LEAVING))
#define NOT_LAST (IN_STATE(SESSION_HOLDING) | IN_STATE(SESSION_SERVING))

static const struct {
    const char *name;
    uint32_t states;  /* where it may come; where not, the agent lies */
    uint32_t ignored; /* where it comes late and means nothing */
    int (*take)(struct ksm_member *member, struct ring_entry entry, struct ring *ring);
} ring_ops[] = {
    [RING_OFFER] = {"OFFER", ANY_STATE, IN_STATE(SESSION_LEAVING), take_offer},
    [RING_PAGE] = {"PAGE", ANY_STATE, 0, take_page},
    [RING_STALE] = {"STALE", ANY_STATE, 0, take_stale},
    [RING_MERGED] = {"MERGED", ANY_STATE, 0, take_merged},
    [RING_NOT_MERGED] = {"NOT_MERGED", ANY_STATE, 0, take_not_merged},
    /* Of an agent that leaves HAVE was not heard either; whatever it shares ends when it has left.
     */
    [RING_BROKEN] = {"BROKEN", ANY_STATE, IN_STATE(SESSION_LEAVING), take_broken},
    [RING_HAVE] = {"HAVE", IN_STATE(SESSION_HOLDING) | IN_STATE(SESSION_LEAVING),
                   IN_STATE(SESSION_LEAVING), take_have},
    [RING_PASS] = {"PASS", ANY_STATE, IN_STATE(SESSION_LEAVING), take_pass},
};

static int take_entry(struct session *session, struct ring_entry entry)
{
    const char *name = "?";
    int result = -EPROTO;

    if (entry.op < sizeof(ring_ops) / sizeof(ring_ops[0]) && ring_ops[entry.op].take) {
        name = ring_ops[entry.op].name;
        if (ring_ops[entry.op].ignored & IN_STATE(session->state) ||
            (entry.op == RING_OFFER && !(session->features & FEATURE_SHARE)))
            return 0;
        if (ring_ops[entry.op].states & IN_STATE(session->state))
            result = ring_ops[entry.op].take(session->member, entry, session->ring);
    }
    if (result)
        snprintf(session->lie, sizeof(session->lie),
                 "its ring entry %s (op %u, page %u, arg %llx) contradicts what memd knows", name,
                 entry.op, entry.page, (unsigned long long)entry.arg);
    return result;
}

/* An entry that contradicts while a message waits for the ring may rely on what was said behind
 * that message (RAM that was plugged since). Then it was written after it: the message is taken
 * now, and the entry is looked at again when the socket has been read. */
static bool relies_on_more(struct session *session)
{
    if (!session->late)
        return false;
    session->lie[0] = '\0';
    session->late_head = session->own_tail;
    return true;
}

/* A lookup waits for memory twice, one wait after the other: both begin some entries ahead. */
static void look_ahead(const struct session *session, uint32_t filled)
{
    static const uint32_t distances[] = {4, 20};

    for (int far = 0; far < 2; far++) {
        struct ring_entry entry;

        if (filled <= distances[far])
            return;
        entry = ring_peek(&session->ring->to_memd, session->own_tail + distances[far]);
        if (entry.op == RING_OFFER)
            ksm_match_expect(session->member, entry.arg, far == 0);
    }
}

/* A bounded number of entries, none from `head` on; true when there are more. The clock is read
 * here because one entry may cost a hash of a page or nothing: other agents shall not wait for the
 * sum. */
static bool read_ring(struct session *session, uint32_t head)
{
    struct ring_queue *queue = &session->ring->to_memd;
    uint32_t filled = head - session->own_tail;
    uint64_t start = host_clock_ns();

    if (filled > RING_ENTRIES) {
        mark_lie(session, "it moved the head of its ring past what the ring can hold");
        return false;
    }
    for (uint32_t done = 0; filled; filled--, done++) {
        if (done == TURN_ENTRIES || (done % 32 == 31 && host_clock_ns() - start > TURN_NS))
            return true;
        look_ahead(session, filled);
        if (take_entry(session, ring_peek(queue, session->own_tail)))
            return relies_on_more(session);
        ring_release(queue, &session->own_tail);
    }
    return ring_filled(queue, session->own_tail) != 0;
}

/* ---- in: messages ---- */

static void close_fds(int *fds)
{
    for (int i = 0; i < FDS_MAX; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
        fds[i] = -1;
    }
}

static uint32_t collect_fds(struct msghdr *header, int *fds)
{
    uint32_t count = 0;

    for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
        size_t bytes = part->cmsg_len - CMSG_LEN(0);

        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t i = 0; i < bytes / sizeof(int); i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
            if (count < FDS_MAX)
                fds[count++] = fd;
            else
                close(fd);
        }
    }
    return count;
}

static void put_off(struct session *session, const struct session_message *known,
                    const uint8_t *message)
{
    session->late = known;
    memcpy(&session->late_message, message, known->bytes);
    session->late_head = __atomic_load_n(&session->ring->to_memd.head, __ATOMIC_ACQUIRE);
    session->ring_ready = true;
}

static int take_late(struct session *session)
{
    const struct session_message *known = session->late;

    session->late = NULL;
    return known->handle(session, &session->late_message, NULL, session->lie, sizeof(session->lie));
}

static int dispatch(struct session *session, const uint8_t *message, size_t bytes, int *fds,
                    uint32_t fd_count)
{
    struct message_header header = {0, 0};

    memcpy(&header, message, bytes < sizeof(header) ? bytes : sizeof(header));
    for (size_t i = 0; i < session_message_count; i++) {
        const struct session_message *known = &session_messages[i];

        if (known->type != header.type)
            continue;
        if (known->bytes != bytes || header.bytes != bytes || known->fds != fd_count ||
            !(known->states & IN_STATE(session->state)))
            break;
        if (known->after_ring) {
            put_off(session, known, message);
            return 0;
        }
        return known->handle(session, message, fds, session->lie, sizeof(session->lie));
    }
    snprintf(session->lie, sizeof(session->lie),
             "its message %u of %zu bytes with %u descriptors is not allowed here", header.type,
             bytes, fd_count);
    return -EPROTO;
}

/* One message. 0; -EAGAIN: there is none; -EPIPE: the connection has ended; -EPROTO: a lie. */
static int receive(struct session *session)
{
    _Alignas(8) uint8_t message[MESSAGE_MAX];
    char control[CMSG_SPACE(sizeof(int) * FDS_MAX)];
    struct iovec piece = {message, sizeof(message)};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = control,
                            .msg_controllen = sizeof(control)};
    int fds[FDS_MAX] = {-1, -1, -1, -1}, result;
    ssize_t got = recvmsg(session->fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    uint32_t fd_count;

    /* An agent that closes before it has read all is told of once, and before its last messages:
     * these are still there. */
    if (got < 0 && errno == ECONNRESET)
        got = recvmsg(session->fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? -EAGAIN : -EPIPE;
    fd_count = collect_fds(&header, fds);
    if (got == 0 && fd_count == 0) {
        result = -EPIPE;
    } else if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
        snprintf(session->lie, sizeof(session->lie), "its message is larger than any there is");
        result = -EPROTO;
    } else {
        result = dispatch(session, message, (size_t)got, fds, fd_count);
    }
    close_fds(fds);
    return result;
}

/* A bounded number of messages. 0, or what ends the session. */
static int read_socket(struct session *session)
{
    for (uint32_t i = 0; i < TURN_MESSAGES && !session->late; i++) {
        int result = receive(session);

        if (result == -EAGAIN) {
            session->socket_ready = false;
            return 0;
        }
        if (result)
            return result;
    }
    return 0;
}

/* ---- a step ---- */

static uint32_t head_of(const struct session *session)
{
    return session->ring ? __atomic_load_n(&session->ring->to_memd.head, __ATOMIC_ACQUIRE) : 0;
}

/* What comes in. The ring and the socket are two ways, and what an entry relies on was said in a
 * message before it was written. So an entry is read when it was there before the socket was found
 * empty; and a message that is for after the ring waits, with all that follow, for the entries
 * before it. */
static int read_both(struct session *session)
{
    uint32_t head = head_of(session);
    int result = session->socket_ready && !session->late ? read_socket(session) : 0;

    if (result || session->lie[0] || !session->ring)
        return result;
    if (session->late)
        head = session->late_head;
    if (session->ring_ready && (session->late || !session->socket_ready))
        session->ring_ready = read_ring(session, head);
    if (session->late && !session->lie[0] &&
        (!session->ring_ready || session->own_tail == session->late_head))
        return take_late(session);
    return 0;
}

static bool step(struct loop_task *task)
{
    struct session *session = task->owner;
    int result = read_both(session);

    if (result == -EPIPE && session->detached) {
        agents_detached(session);
        return false;
    }
    if (result || session->lie[0]) {
        session_end(session, session->lie[0] ? session->lie : "its connection has ended",
                    session->lie[0]);
        return false;
    }
    flush_messages(session);
    if (session->ring)
        flush_ring(session);
    ring_bell(session);
    return session->socket_ready || session->ring_ready;
}

void session_wake(struct session *session)
{
    loop_task_add(&session->daemon->loop, &session->task);
}

static void can_read(struct loop_watch *watch, uint32_t events)
{
    struct session *session = watch->owner;

    (void)events;
    session->socket_ready = true;
    session_wake(session);
}

/* ---- start and end ---- */

static void says_nothing(struct loop_timer *timer)
{
    struct session *session = timer->owner;

    session_end(session, "it said no HELLO within 10 s", true);
}

int session_start(struct daemon *daemon, int fd, uid_t uid, pid_t pid)
{
    struct session *session = calloc(1, sizeof(*session));
    int result;

    if (!session)
        return -ENOMEM;
    *session = (struct session){.daemon = daemon, .fd = fd, .uid = uid, .pid = pid};
    session->watch = (struct loop_watch){
        .fd = fd, .events = POLLIN, .ready = can_read, .owner = session, .op = LOOP_NOT_QUEUED};
    session->writable = (struct loop_watch){.fd = fd,
                                            .events = POLLOUT,
                                            .level = true,
                                            .ready = can_write,
                                            .owner = session,
                                            .op = LOOP_NOT_QUEUED};
    session->task = (struct loop_task){.step = step, .owner = session};
    session->greeting = (struct loop_timer){.expired = says_nothing, .owner = session};
    result = loop_watch_add(&daemon->loop, &session->watch);
    if (result) {
        free(session);
        return result;
    }
    loop_timer_set(&daemon->loop, &session->greeting, SESSION_GREETING_NS);
    session->next = daemon->agents.first;
    daemon->agents.first = session;
    daemon->agents.count++;
    session->socket_ready = true;
    session_wake(session);
    return 0;
}

static int make_ring(struct ring **ret_ring, int *ret_fd)
{
    int fd = memfd_create("memd-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING), result;
    void *ring;

    if (fd < 0)
        return -errno;
    if (ftruncate(fd, RING_BYTES) ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        goto undo;
    ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ring == MAP_FAILED)
        goto undo;
    *ret_ring = ring;
    *ret_fd = fd;
    return 0;
undo:
    result = -errno;
    close(fd);
    return result;
}

int session_equip(struct session *session, struct trust_domain *domain, int *ret_ring_fd)
{
    int result;
    void *pending =
        mmap(NULL, SESSION_PENDING_MAX * sizeof(*session->pending), PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (pending == MAP_FAILED)
        return -ENOMEM;
    session->pending = pending;
    result = make_ring(&session->ring, ret_ring_fd);
    if (result)
        return result; /* the queue goes with the session */
    result = ksm_member_join(domain, &member_ops, session, &session->member);
    if (result) {
        close(*ret_ring_fd);
        *ret_ring_fd = -1;
    }
    return result;
}

/* Everything that needs the connection; the member may stay for a while. */
static void disconnect(struct session *session)
{
    struct loop *loop = &session->daemon->loop;

    loop_timer_cancel(loop, &session->greeting);
    loop_task_cancel(loop, &session->task);
    loop_watch_remove(loop, &session->watch);
    loop_watch_remove(loop, &session->writable);
    while (session->first_out)
        free_first_out(session);
    if (session->ring)
        munmap(session->ring, RING_BYTES);
    if (session->pending)
        munmap(session->pending, SESSION_PENDING_MAX * sizeof(*session->pending));
    session->ring = NULL;
    session->pending = NULL;
    session->pending_count = 0;
    close(session->fd);
    session->fd = -1;
    session->state = SESSION_OVER;
    session->daemon->agents.count--;
}

void session_end(struct session *session, const char *why, bool bad)
{
    struct daemon *daemon = session->daemon;
    struct guest *guest = session->guest;
    char words[200];
    bool cut = session->state == SESSION_LEAVING && !session->detached && !session->rejoin;

    if (session->state == SESSION_OVER)
        return;
    snprintf(words, sizeof(words), "%s", why);
    if (session->state != SESSION_GREETING && session->features & FEATURE_SHARE) {
        daemon->agents.sharing--;
        agents_tune(daemon);
    }
    (void)agents_cpu_ns(session);
    disconnect(session);
    if (bad) {
        daemon->agents.ended_badly++;
        log_warning("agent of '%s' (pid %d, uid %d): session ended: %s", guest ? guest->name : "?",
                    (int)session->pid, (int)session->uid, words);
        events_emit(&daemon->events, "session_ended", guest ? guest->name : NULL,
                    json_pack("{s:s}", "reason", words));
    }
    if (guest)
        registry_agent_left(guest, words);
    if (guest && cut)
        control_detached(daemon, guest->name, false);
    if (!guest && session->member)
        ksm_member_leave(session->member);
    session_free_if_done(session);
}

void session_free_if_done(struct session *session)
{
    struct session **place = &session->daemon->agents.first;

    if (session->state != SESSION_OVER || session->member || session->guest)
        return;
    while (*place != session)
        place = &(*place)->next;
    *place = session->next;
    free(session);
}
