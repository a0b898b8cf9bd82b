/* SPDX-License-Identifier: Apache-2.0 */
/* A mover, an agent without hooks and QEMU's monitor: together they are to be an agent that has
 * hooks. The test is the mover and the agent. */
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "drive_qemu.h"
#include "mover_protocol.h"
#include "scripted_qemu.h"

#define PATIENCE_MS 20000 /* never reached when all is well */

static int mover, agent; /* our ends */

static int connect_monitor(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(address.sun_path, scripted_qemu.path);
    cr_assert(connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    return fd;
}

static void start_drive(bool takes_over)
{
    int ends[2];

    cr_assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    agent = ends[0];
    cr_assert(drive_qemu_start(ends[1], connect_monitor(), takes_over, &mover) == 0);
}

static void start(const char *status, const struct scripted_answer *odd, size_t odd_count)
{
    scripted_qemu_start(status, odd, odd_count);
    start_drive(false);
}

static void stop(void)
{
    close(mover);
    close(agent);
    scripted_qemu_stop();
}

/* ---- messages ---- */

static void say(int to, const void *message, size_t bytes, int fd)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } room = {.header = {CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    struct iovec piece = {(void *)message, bytes};
    struct msghdr header = {.msg_iov = &piece, .msg_iovlen = 1};

    if (fd >= 0) {
        memcpy(CMSG_DATA(&room.header), &fd, sizeof(fd));
        header.msg_control = room.bytes;
        header.msg_controllen = sizeof(room.bytes);
    }
    cr_assert(sendmsg(to, &header, MSG_NOSIGNAL) == (ssize_t)bytes);
}

/* The next message, which must be of this type. Its descriptor, or -1. */
static int hear(int from, uint32_t type, void *ret_message, size_t bytes)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } room;
    uint8_t message[MOVER_MAX_MESSAGE] = {0};
    struct iovec piece = {message, sizeof(message)};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = room.bytes,
                            .msg_controllen = sizeof(room.bytes)};
    struct pollfd poller = {.fd = from, .events = POLLIN};
    const struct cmsghdr *rights;
    int fd = -1;

    cr_assert(poll(&poller, 1, PATIENCE_MS) == 1, "nothing comes where %u should", type);
    cr_assert(recvmsg(from, &header, MSG_CMSG_CLOEXEC) >= (ssize_t)sizeof(struct mover_header));
    cr_assert(((struct mover_header *)message)->type == type, "%u and not %u",
              ((struct mover_header *)message)->type, type);
    memcpy(ret_message, message, bytes);
    rights = CMSG_FIRSTHDR(&header);
    if (rights)
        memcpy(&fd, CMSG_DATA(rights), sizeof(fd));
    return fd;
}

static struct mover_hello greet(uint32_t role, uint32_t phase)
{
    struct mover_hello hello = {.header = {MOVER_HELLO, sizeof(hello)},
                                .version = MOVER_VERSION,
                                .role = role,
                                .phase = phase};

    say(agent, &hello, sizeof(hello), -1);
    hear(mover, MOVER_HELLO, &hello, sizeof(hello));
    return hello;
}

static void ask(uint32_t what)
{
    struct mover_plain plain = {{what, sizeof(plain)}};

    say(mover, &plain, sizeof(plain), -1);
}

static void answer(uint32_t what, int result)
{
    struct mover_done done = {.header = {MOVER_DONE, sizeof(done)}, .what = what, .result = result};

    say(agent, &done, sizeof(done), -1);
}

static struct mover_done done(uint32_t what, int *ret_fd)
{
    struct mover_done done = {.what = 0};
    int fd = hear(mover, MOVER_DONE, &done, sizeof(done));

    cr_assert(done.what == what);
    if (ret_fd)
        *ret_fd = fd;
    return done;
}

/* The mover stops the guest; the agent hears that it has stopped. */
static void ask_stop(void)
{
    struct mover_stop stop_it = {.header = {MOVER_STOP, sizeof(stop_it)}, .pause = 1};
    struct mover_done stopped;

    say(mover, &stop_it, sizeof(stop_it), -1);
    hear(agent, MOVER_STOP, &stop_it, sizeof(stop_it));
    cr_expect(stop_it.pause == 0 && scripted_qemu_was_asked("migrate"));
    answer(MOVER_STOP, 0);
    stopped = done(MOVER_STOP, NULL);
    cr_expect(stopped.result == 0 && stopped.value > 0, "nobody knows how long it has stood still");
}

/* ---- the source ---- */

Test(mover_qemu, agent_without_hooks_has_them)
{
    struct mover_hello hello;

    start("running", NULL, 0);
    hello = greet(MOVER_SOURCE, MOVER_PHASE_FRESH);
    cr_expect(hello.hooks == (MOVER_CAN_PAUSE | MOVER_CAN_SAVE) && !hello.reason[0]);
    ask(MOVER_START_PRECOPY);
    hear(agent, MOVER_START_PRECOPY, &hello.header, sizeof(hello.header));
    answer(MOVER_START_PRECOPY, 0);
    cr_expect(done(MOVER_START_PRECOPY, NULL).result == 0);
    stop();
}

Test(mover_qemu, machine_that_can_not_be_moved_is_said)
{
    static const struct scripted_answer none = {"query-memdev", "{\"return\": []}\n"};
    struct mover_hello hello;

    start("running", &none, 1);
    hello = greet(MOVER_SOURCE, MOVER_PHASE_FRESH);
    cr_expect(strstr(hello.reason, "not all of the guest's RAM"), "%s", hello.reason);
    stop();
    start("running", NULL, 0);
    hello = greet(MOVER_DESTINATION, MOVER_PHASE_FRESH);
    cr_expect(strstr(hello.reason, "does not wait for a guest"), "%s", hello.reason);
    stop();
}

Test(mover_qemu, guest_is_stopped_saved_and_never_runs_again)
{
    struct mover_done saved;
    char text[5];
    int fd;

    start("running", NULL, 0);
    greet(MOVER_SOURCE, MOVER_PHASE_FRESH);
    ask_stop();
    ask(MOVER_SAVE);
    saved = done(MOVER_SAVE, &fd);
    cr_expect(saved.result == 0 && saved.value == 5 && fd >= 0);
    cr_expect(pread(fd, text, 5, 0) == 5 && memcmp(text, "state", 5) == 0);
    cr_expect(fcntl(fd, F_GET_SEALS) & F_SEAL_WRITE);
    close(fd);
    ask(MOVER_COMMIT);
    hear(agent, MOVER_COMMIT, &saved.header, sizeof(saved.header));
    answer(MOVER_COMMIT, 0);
    done(MOVER_COMMIT, NULL);
    ask(MOVER_ABORT);
    hear(agent, MOVER_ABORT, &saved.header, sizeof(saved.header));
    answer(MOVER_ABORT, -EPERM);
    cr_expect(done(MOVER_ABORT, NULL).result == -EPERM);
    cr_expect(!scripted_qemu_was_asked("cont"), "it was let run after it was committed");
    stop();
}

Test(mover_qemu, guest_that_was_stopped_runs_on_after_an_abort)
{
    struct mover_header header;

    start("running", NULL, 0);
    greet(MOVER_SOURCE, MOVER_PHASE_FRESH);
    ask_stop();
    ask(MOVER_ABORT);
    hear(agent, MOVER_ABORT, &header, sizeof(header));
    cr_expect(!scripted_qemu_was_asked("cont"), "it was let run before the agent has let go");
    answer(MOVER_ABORT, 0);
    cr_expect(done(MOVER_ABORT, NULL).result == 0);
    cr_expect_str_eq(scripted_qemu.status, "running");
    stop();
}

/* Who else may have stopped it has his reasons. */
Test(mover_qemu, guest_that_was_not_stopped_is_left_alone_by_an_abort)
{
    struct mover_session session = {.header = {MOVER_SET_SESSION, sizeof(session)}};

    start("running", NULL, 0);
    greet(MOVER_SOURCE, MOVER_PHASE_FRESH);
    say(mover, &session, sizeof(session), -1);
    hear(agent, MOVER_SET_SESSION, &session, sizeof(session));
    cr_expect(strstr(scripted_qemu_asked("migrate-set-capabilities", 0), "x-ignore-shared"));
    answer(MOVER_SET_SESSION, 0);
    done(MOVER_SET_SESSION, NULL);
    scripted_qemu.status = "paused";
    ask(MOVER_ABORT);
    hear(agent, MOVER_ABORT, &session.header, sizeof(session.header));
    answer(MOVER_ABORT, 0);
    cr_expect(done(MOVER_ABORT, NULL).result == 0);
    cr_expect_str_eq(scripted_qemu.status, "paused");
    cr_expect(strstr(scripted_qemu_asked("migrate-set-capabilities", 1), "multifd"),
              "what was changed was not put back");
    stop();
}

/* In whatever phase its agent is by then: the map may not have been written, or the agent may have
 * given up. */
Test(mover_qemu, mover_that_takes_over_lets_a_stopped_guest_run)
{
    static const uint32_t phases[] = {MOVER_PHASE_STOPPED, MOVER_PHASE_PRECOPY, MOVER_PHASE_FRESH};
    static const char *const stopped[] = {"paused", "postmigrate"};
    struct mover_header header;

    for (size_t i = 0; i < 6; i++) {
        scripted_qemu_start(stopped[i % 2], NULL, 0);
        start_drive(true);
        cr_expect(!greet(MOVER_SOURCE, phases[i / 2]).reason[0]);
        ask(MOVER_ABORT);
        hear(agent, MOVER_ABORT, &header, sizeof(header));
        cr_expect(!scripted_qemu_was_asked("cont"), "the agent may have committed");
        answer(MOVER_ABORT, 0);
        cr_expect(done(MOVER_ABORT, NULL).result == 0);
        cr_expect_str_eq(scripted_qemu.status, "running", "%s, phase %u", stopped[i % 2],
                         phases[i / 2]);
        cr_expect(strstr(scripted_qemu_asked("migrate-set-capabilities", 0), "x-ignore-shared"),
                  "QEMU's own migrations would leave RAM out");
        stop();
    }
}

/* The mover before has died while QEMU was saving, the guest still running: QEMU will stop it. */
Test(mover_qemu, mover_that_takes_over_ends_what_would_stop_the_guest)
{
    static const struct scripted_answer active = {"query-migrate",
                                                  "{\"return\": {\"status\": \"active\"}}\n"};
    struct mover_header header;

    scripted_qemu_start("running", &active, 1);
    scripted_qemu.until = "migrate_cancel";
    start_drive(true);
    greet(MOVER_SOURCE, MOVER_PHASE_PRECOPY);
    ask(MOVER_ABORT);
    hear(agent, MOVER_ABORT, &header, sizeof(header));
    answer(MOVER_ABORT, 0);
    cr_expect(done(MOVER_ABORT, NULL).result == 0);
    cr_expect(scripted_qemu_was_asked("migrate_cancel"));
    cr_expect_str_eq(scripted_qemu.status, "running");
    stop();
}

Test(mover_qemu, mover_that_takes_over_leaves_a_committed_guest_alone)
{
    struct mover_header header;

    scripted_qemu_start("postmigrate", NULL, 0);
    start_drive(true);
    greet(MOVER_SOURCE, MOVER_PHASE_COMMITTED);
    ask(MOVER_ABORT);
    hear(agent, MOVER_ABORT, &header, sizeof(header));
    answer(MOVER_ABORT, -EPERM);
    cr_expect(done(MOVER_ABORT, NULL).result == -EPERM);
    cr_expect(!scripted_qemu_was_asked("cont"), "it was let run after it was committed");
    stop();
}

static void expect_no_stop(const struct scripted_answer *odd, bool writes_nothing, int error)
{
    struct mover_stop stop_it = {.header = {MOVER_STOP, sizeof(stop_it)}, .pause = 1};
    struct pollfd poller;

    start("running", odd, odd ? 1 : 0);
    scripted_qemu.writes_nothing = writes_nothing;
    greet(MOVER_SOURCE, MOVER_PHASE_FRESH);
    say(mover, &stop_it, sizeof(stop_it), -1);
    cr_expect(done(MOVER_STOP, NULL).result == error);
    poller = (struct pollfd){.fd = agent, .events = POLLIN};
    cr_expect(poll(&poller, 1, 0) == 0, "the agent believes that the guest has stopped");
    stop();
}

Test(mover_qemu, guest_that_can_not_be_stopped)
{
    static const struct scripted_answer no = {"migrate", "{\"error\": {\"desc\": \"no\"}}\n"};

    expect_no_stop(&no, false, -EREMOTEIO);
    expect_no_stop(NULL, true, -EIO); /* an empty state is none */
}

/* The agent has heard of the stop by then. */
Test(mover_qemu, state_with_ram_in_it_is_none)
{
    static const struct scripted_answer moved = {
        "query-migrate",
        "{\"return\": {\"status\": \"completed\", \"ram\": {\"total\": 67633152}}}\n"};
    int fd;

    start("running", &moved, 1);
    greet(MOVER_SOURCE, MOVER_PHASE_FRESH);
    ask_stop();
    ask(MOVER_SAVE);
    cr_expect(done(MOVER_SAVE, &fd).result == -EXDEV && fd < 0);
    stop();
}

/* ---- the destination ---- */

Test(mover_qemu, state_is_loaded_before_the_agent_hears_of_it)
{
    struct mover_load load = {.header = {MOVER_LOAD, sizeof(load)}, .bytes = 5};
    struct mover_session session = {.header = {MOVER_SET_SESSION, sizeof(session)}};
    struct mover_proven proven = {.header = {MOVER_PROVEN, sizeof(proven)}};
    int fd = memfd_create("state", MFD_CLOEXEC);
    struct mover_header header;

    cr_assert(write(fd, "state", 5) == 5);
    start("inmigrate", NULL, 0);
    cr_expect(!greet(MOVER_DESTINATION, MOVER_PHASE_FRESH).reason[0]);
    say(mover, &session, sizeof(session), -1);
    hear(agent, MOVER_SET_SESSION, &session, sizeof(session));
    cr_expect(scripted_qemu_was_asked("migrate-incoming"), "QEMU does not wait for its state");
    say(mover, &load, sizeof(load), fd);
    cr_expect(hear(agent, MOVER_LOAD, &load, sizeof(load)) < 0 && load.bytes == 0);
    cr_expect_str_eq(scripted_qemu.loaded, "state");
    answer(MOVER_LOAD, 0);
    cr_expect(done(MOVER_LOAD, NULL).result == 0);
    cr_expect(!scripted_qemu_was_asked("cont"));
    ask(MOVER_RUN);
    hear(agent, MOVER_RUN, &header, sizeof(header));
    cr_expect_str_eq(scripted_qemu.status, "running");
    answer(MOVER_RUN, 0);
    cr_expect(done(MOVER_RUN, NULL).result == 0);
    cr_expect_str_eq(scripted_qemu_asked("migrate-set-capabilities", 1), "", "pages are to come");
    say(agent, &proven, sizeof(proven), -1);
    hear(mover, MOVER_PROVEN, &proven, sizeof(proven));
    cr_expect(strstr(scripted_qemu_asked("migrate-set-capabilities", 1), "multifd"),
              "what was changed was not put back");
    stop();
    close(fd);
}

Test(mover_qemu, state_that_can_not_be_loaded)
{
    static const struct scripted_answer odd = {"migrate-incoming", CLOSE};
    struct mover_load load = {.header = {MOVER_LOAD, sizeof(load)}, .bytes = 5};
    int fd = memfd_create("state", MFD_CLOEXEC);
    struct pollfd poller;

    start("inmigrate", &odd, 1);
    greet(MOVER_DESTINATION, MOVER_PHASE_FRESH);
    say(mover, &load, sizeof(load), fd);
    cr_expect(done(MOVER_LOAD, NULL).result == -ECONNRESET);
    poller = (struct pollfd){.fd = agent, .events = POLLIN};
    cr_expect(poll(&poller, 1, 0) == 0, "the agent believes that it is loaded");
    stop();
    close(fd);
}

/* ---- who goes ---- */

static bool hears_the_end(int fd)
{
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    char byte;

    return poll(&poller, 1, PATIENCE_MS) == 1 && recv(fd, &byte, 1, 0) == 0;
}

Test(mover_qemu, either_hears_that_the_other_has_gone)
{
    start("running", NULL, 0);
    shutdown(agent, SHUT_RDWR);
    cr_expect(hears_the_end(mover));
    stop();
    start("running", NULL, 0);
    shutdown(mover, SHUT_RDWR);
    cr_expect(hears_the_end(agent));
    stop();
}
