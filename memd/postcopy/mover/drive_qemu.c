/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What becomes of a request
 *
 *   HELLO    (from the agent) gets the bits of the hooks; of a migration that has not begun, the
 *            reason for which QEMU can't be moved, if there is one
 *   SESSION  QEMU is prepared, as far as that can be done before the guest stops
 *   STOP     QEMU saves, and so stops; then the agent is told that the guest has stopped
 *   SAVE     gets what QEMU has saved, the agent hears nothing of it
 *   LOAD     QEMU loads, while the agent serves its faults; then the agent is told that it is
 *            loaded
 *   RUN      QEMU runs, then the agent is told
 *   PROVEN   (from the destination's agent) QEMU's capabilities are put back. Not before: a QEMU
 *            that waits for a page answers late, and the page may wait for a new link
 *   ABORT    the agent first: once it has committed it refuses, and then QEMU must not run again.
 *            After its yes a source's QEMU runs on
 *
 * Everything else is passed on as it is. HOLD and GO too, which the agent answers with -ENOTSUP: a
 * QEMU with a vCPU in a fault does not answer its monitor before the page is there.
 *
 * The monitor is asked on this thread and may take its time; the mover's heartbeats go on
 * meanwhile. Requests and answers keep their order, since the mover asks one thing at a time.
 */
#include "drive_qemu.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "migrate.h"
#include "mover_protocol.h"
#include "send_with.h"

#define ALL_SEALS (F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

struct drive {
    int agent, mover;
    struct qemu_migrate *qemu;
    uint32_t role;     /* enum mover_role, once HELLO has said it */
    bool takes_over;   /* from a mover that has died, with what that has done to QEMU */
    bool touched;      /* source: QEMU has been stopped, or may have been */
    bool is_aborting;  /* the agent's answer to ABORT is awaited */
    uint64_t since_ns; /* source: the guest stands still; destination: it runs */
    /* What QEMU has saved and nobody has asked for yet. */
    bool has_saved;
    int saved_result, saved_fd; /* the fd is -1 where that failed */
    uint64_t saved_bytes;
};

struct message {
    union {
        uint8_t bytes[MOVER_MAX_MESSAGE];
        struct mover_header header;
        struct mover_hello hello;
        struct mover_done done;
        struct mover_stop stop;
        struct mover_load load;
    };
    size_t size;
    int fd; /* -1: none */
};

/* ---- messages ---- */

union room {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int))];
};

/* False: the other side has gone, or what came is none. */
static bool receive(int from, struct message *message)
{
    union room room;
    struct iovec piece = {message->bytes, sizeof(message->bytes)};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = room.bytes,
                            .msg_controllen = sizeof(room.bytes)};
    ssize_t got;

    memset(message->bytes, 0, sizeof(message->bytes));
    message->fd = -1;
    got = recvmsg(from, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got < 0)
        return false;
    message->fd = received_fd(&header);
    message->size = (size_t)got;
    return message->size >= sizeof(message->header) && !(header.msg_flags & MSG_TRUNC);
}

static void close_fd(struct message *message)
{
    if (message->fd >= 0)
        close(message->fd);
    message->fd = -1;
}

/* With its descriptor, which is closed here. */
static bool send_on(int to, struct message *message)
{
    union room room = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)),
                                  .cmsg_level = SOL_SOCKET,
                                  .cmsg_type = SCM_RIGHTS}};
    struct iovec piece = {message->bytes, message->size};
    struct msghdr header = {.msg_iov = &piece, .msg_iovlen = 1};
    struct pollfd poller = {.fd = to, .events = POLLOUT};
    ssize_t sent;

    if (message->fd >= 0) {
        memcpy(CMSG_DATA(&room.header), &message->fd, sizeof(int));
        header.msg_control = room.bytes;
        header.msg_controllen = sizeof(room.bytes);
    }
    while ((sent = sendmsg(to, &header, MSG_NOSIGNAL)) < 0 && (errno == EAGAIN || errno == EINTR))
        poll(&poller, 1, -1);
    close_fd(message);
    return sent >= 0;
}

/* An answer of ours, in the agent's place. */
static bool answer(const struct drive *drive, uint32_t what, int result, uint64_t value, int fd)
{
    struct message message = {.size = sizeof(message.done), .fd = fd};

    message.done = (struct mover_done){.header = {MOVER_DONE, sizeof(message.done)},
                                       .what = what,
                                       .result = result,
                                       .value = value};
    return send_on(drive->mover, &message);
}

/* ---- requests that QEMU serves ---- */

static void forget_saved(struct drive *drive)
{
    if (drive->has_saved && drive->saved_fd >= 0)
        close(drive->saved_fd);
    drive->has_saved = false;
}

static void save(struct drive *drive)
{
    int fd = memfd_create("memd-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int r = fd < 0 ? -errno : qemu_migrate_save(drive->qemu, fd, &drive->since_ns);
    off_t bytes = r == 0 ? lseek(fd, 0, SEEK_END) : 0;

    if (r == 0 && (bytes <= 0 || fcntl(fd, F_ADD_SEALS, ALL_SEALS) < 0))
        r = -EIO;
    if (r < 0 && fd >= 0)
        close(fd);
    forget_saved(drive);
    drive->has_saved = true;
    drive->saved_result = r;
    drive->saved_fd = r < 0 ? -1 : fd;
    drive->saved_bytes = r < 0 ? 0 : (uint64_t)bytes;
}

static bool stop(struct drive *drive, struct message *message)
{
    int r;

    if (!message->stop.pause)
        return send_on(drive->agent, message);
    drive->touched = true;
    save(drive);
    if (drive->saved_result < 0)
        return answer(drive, MOVER_STOP, drive->saved_result, 0, -1);
    message->stop.pause = 0;
    if (!send_on(drive->agent, message))
        return false;
    r = qemu_migrate_check_saved(drive->qemu);
    if (r < 0) {
        close(drive->saved_fd);
        drive->saved_fd = -1;
        drive->saved_result = r;
    }
    return true;
}

static bool give_saved(struct drive *drive)
{
    if (!drive->has_saved)
        return answer(drive, MOVER_SAVE, -EPERM, 0, -1);
    drive->has_saved = false;
    return answer(drive, MOVER_SAVE, drive->saved_result, drive->saved_bytes, drive->saved_fd);
}

static bool load(struct drive *drive, struct message *message)
{
    int r = message->fd >= 0 ? qemu_migrate_load(drive->qemu, message->fd) : -EBADF;

    close_fd(message);
    if (r < 0)
        return answer(drive, MOVER_LOAD, r, 0, -1);
    message->load.bytes = 0;
    return send_on(drive->agent, message);
}

static bool run(struct drive *drive, struct message *message)
{
    int r = qemu_migrate_run(drive->qemu, &drive->since_ns);

    return r < 0 ? answer(drive, MOVER_RUN, r, 0, -1) : send_on(drive->agent, message);
}

/* Should it fail, it is tried again when it is needed, and said then. */
static void prepare(struct drive *drive)
{
    if (drive->role == MOVER_DESTINATION)
        (void)qemu_migrate_await(drive->qemu);
    else
        (void)qemu_migrate_prepare(drive->qemu);
}

static bool from_mover(struct drive *drive, struct message *message)
{
    switch (message->header.type) {
    case MOVER_STOP: return stop(drive, message);
    case MOVER_SAVE: return give_saved(drive);
    case MOVER_LOAD: return load(drive, message);
    case MOVER_RUN: return run(drive, message);
    case MOVER_SET_SESSION: prepare(drive); break;
    case MOVER_ABORT: drive->is_aborting = true; break;
    default: break;
    }
    return send_on(drive->agent, message);
}

/* ---- what the agent says ---- */

/* Of a guest that has not begun to move: can QEMU move it? */
static void judge(struct drive *drive, struct mover_hello *hello)
{
    int r = hello->role == MOVER_SOURCE ? qemu_migrate_check(drive->qemu)
                                        : qemu_migrate_check_incoming(drive->qemu);

    if (r < 0 && !hello->reason[0])
        snprintf(hello->reason, sizeof(hello->reason), "%s", qemu_migrate_why(drive->qemu));
}

/* The mover before may have stopped QEMU, and the agent not know it: it has not written its map, or
 * has given the migration up meanwhile. Whoever else has stopped a guest that moves has done it at
 * the wrong time. */
static bool was_touched(const struct drive *drive, const struct mover_hello *hello)
{
    if (hello->role != MOVER_SOURCE || hello->phase == MOVER_PHASE_COMMITTED)
        return false;
    return hello->phase == MOVER_PHASE_STOPPED ||
           (drive->takes_over && qemu_migrate_is_stopped(drive->qemu));
}

static void meet(struct drive *drive, struct mover_hello *hello)
{
    drive->role = hello->role;
    drive->touched = was_touched(drive, hello);
    hello->hooks |= MOVER_CAN_PAUSE | MOVER_CAN_SAVE;
    if (drive->takes_over)
        qemu_migrate_inherit(drive->qemu);
    else if (hello->phase == MOVER_PHASE_FRESH)
        judge(drive, hello);
}

static void finish_abort(struct drive *drive, struct mover_done *done)
{
    drive->is_aborting = false;
    forget_saved(drive);
    if (done->result < 0 || drive->role != MOVER_SOURCE)
        return;
    if (!drive->touched) {
        qemu_migrate_unprepare(drive->qemu);
        return;
    }
    done->result = qemu_migrate_resume(drive->qemu);
    drive->touched = done->result < 0;
}

static bool from_agent(struct drive *drive, struct message *message)
{
    uint32_t type = message->header.type;
    uint64_t begun = clock_now_ns();

    if (type == MOVER_HELLO) {
        meet(drive, &message->hello);
        message->size =
            sizeof(message->hello) > message->size ? sizeof(message->hello) : message->size;
    } else if (type == MOVER_DONE && message->done.what == MOVER_ABORT && drive->is_aborting) {
        finish_abort(drive, &message->done);
        message->done.ns += clock_now_ns() - begun;
    } else if (type == MOVER_DONE && message->done.result == 0 && drive->since_ns &&
               (message->done.what == MOVER_STOP || message->done.what == MOVER_RUN)) {
        message->done.value = begun - drive->since_ns;
    } else if (type == MOVER_PROVEN && drive->role == MOVER_DESTINATION) {
        qemu_migrate_unprepare(drive->qemu); /* before: the mover may end when it has heard it */
    }
    return send_on(drive->mover, message);
}

/* ---- the thread ---- */

static void *pass_on(void *context)
{
    struct drive *drive = context;
    struct message message = {.fd = -1};
    bool goes_on = true;

    while (goes_on) {
        struct pollfd from[] = {{.fd = drive->agent, .events = POLLIN},
                                {.fd = drive->mover, .events = POLLIN}};

        if (poll(from, 2, -1) < 0 && errno != EINTR)
            break;
        if (from[0].revents)
            goes_on = receive(drive->agent, &message) && from_agent(drive, &message);
        if (goes_on && from[1].revents)
            goes_on = receive(drive->mover, &message) && from_mover(drive, &message);
        close_fd(&message);
    }
    forget_saved(drive);
    close(drive->agent);
    close(drive->mover);
    qemu_migrate_close(drive->qemu);
    free(drive);
    return NULL;
}

static int start_thread(struct drive *drive)
{
    sigset_t all, old;
    pthread_t thread;
    int r;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    r = -pthread_create(&thread, NULL, pass_on, drive);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r == 0)
        pthread_detach(thread);
    return r;
}

int drive_qemu_start(int agent, int qmp, bool takes_over, int *ret_mover)
{
    struct drive *drive = calloc(1, sizeof(*drive));
    int ends[2] = {-1, -1};
    int r = -ENOMEM;

    if (!drive)
        goto close_both;
    r = qemu_migrate_open_fd(qmp, &drive->qemu);
    qmp = -1;
    if (r == 0 && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
        r = -errno;
    drive->agent = agent;
    drive->takes_over = takes_over;
    drive->mover = ends[1];
    if (r == 0)
        r = start_thread(drive);
    if (r == 0) {
        *ret_mover = ends[0];
        return 0;
    }
    if (ends[0] >= 0) {
        close(ends[0]);
        close(ends[1]);
    }
    qemu_migrate_close(drive->qemu);
    free(drive);
close_both:
    if (qmp >= 0)
        close(qmp);
    close(agent);
    return r;
}
