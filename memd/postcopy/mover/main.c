/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memd-mover: one side of one migration. memd starts it and nobody else; it ends when memd has
 * noted how the migration ended.
 *
 * It makes (source) or takes (destination) three connections to its like on the other host:
 * *control*, which it keeps, and *urgent* and *bulk*, on which the agents of the two VMMs move the
 * guest's pages without it. It runs the sequence of a migration (session.c), notices when the link
 * is cut or silent, and brings it back.
 *
 * It holds nothing that a migration can't do without: the agent in the VMM keeps where it stands,
 * so that a mover that dies is replaced by memd, and a memd that dies is waited for.
 *
 * Start-up, in order: START from memd; certificates; the address of the other host; the sandbox.
 * Only then is a byte read that a stranger wrote.
 *
 * What it does not do: move pages, decide what is started, or know of any file but its three.
 */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "mover.h"
#include "sandbox.h"

static int read_certificates(struct mover *mover)
{
    const struct order_start *start = &mover->start;

    if (start->plain)
        return 0;
    return link_tls_open(start->tls_cert, start->tls_key, start->tls_ca, &mover->tls, mover->words,
                         sizeof(mover->words));
}

/* Once: the destination stays where it was found. */
static int find_host(struct mover *mover)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    char port[8];
    int result;

    if (mover->start.role != MOVER_SOURCE)
        return 0;
    snprintf(port, sizeof(port), "%u", mover->start.port);
    result = getaddrinfo(mover->start.host, port, &hints, &found);
    if (result) {
        mover_say_why(mover, "%s: %s", mover->start.host, gai_strerror(result));
        return -EHOSTUNREACH;
    }
    memcpy(&mover->address, found->ai_addr, found->ai_addrlen);
    mover->address_bytes = found->ai_addrlen;
    freeaddrinfo(found);
    return 0;
}

static int close_sandbox(struct mover *mover)
{
    const char *stage;
    int result = sandbox_enter(mover->start.uid, mover->start.gid, &stage);

    if (result)
        mover_say_why(mover, "the mover's sandbox (%s): %s", stage, strerror(-result));
    return result;
}

static int take_first(struct mover *mover)
{
    if (mover->first < 0)
        return 0;
    session_start(&mover->session, MOVER_DESTINATION, false);
    return connect_take_first(mover, mover->first);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*start)(struct mover *mover);
    } parts[] = {
        {"orders", orders_receive_start},
        {"certificates", read_certificates},
        {"the other host", find_host},
        {"the sandbox", close_sandbox},
        {"QEMU's monitor", orders_drive_monitor},
        {"the first connection", take_first},
    };
    static struct mover mover = {.memd = STDIN_FILENO,
                                 .memd_listener = -1,
                                 .agent = -1,
                                 .monitor = -1,
                                 .listener = -1,
                                 .first = -1,
                                 .state = {.fd = -1}};

    if (argc != 1) {
        fprintf(stderr, "memd-mover %s: memd starts this program, nobody else does\n",
                MEMD_VERSION);
        return argc == 2 && strcmp(argv[1], "--version") == 0 ? 0 : 2;
    }
    signal(SIGPIPE, SIG_IGN);
    connect_init(&mover);
    mover.began_ns = mover.now_ns = clock_now_ns();
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        int result = parts[i].start(&mover);

        if (result && i == 0) {
            fprintf(stderr, "memd-mover: %s: %s\n", parts[i].name, strerror(-result));
            return 1;
        }
        if (result) {
            mover_say_why(&mover, "%s: %s", parts[i].name, strerror(-result));
            mover_fail(&mover); /* told to memd like any other end: nothing has been touched */
            break;
        }
    }
    return mover_run(&mover) ? 1 : 0;
}
