/* SPDX-License-Identifier: Apache-2.0 */
#include "relay.h"

#include <errno.h>
#include <openssl/err.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

/* Four TLS records. More would not be faster, and would make a page wait behind others. */
#define RELAY_BYTES 65536U
#define STACK_BYTES (256UL << 10)
#define TURN        16 /* buffers one way, then the other way has its turn */

/* One direction: bytes that were read and are not written yet. */
struct half {
    uint8_t *bytes;
    size_t from, to;
};

static bool is_over(const struct link *link, int answer, bool *ret_wants_write)
{
    int error = SSL_get_error(link->ssl, answer);

    *ret_wants_write |= error == SSL_ERROR_WANT_WRITE;
    return error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE;
}

/* To the agent what was read. False: it is over. */
static bool drain(struct relay *relay, struct half *half)
{
    while (half->from < half->to) {
        ssize_t done = send(relay->clear, half->bytes + half->from, half->to - half->from,
                            MSG_DONTWAIT | MSG_NOSIGNAL);

        if (done < 0)
            return errno == EAGAIN || errno == EINTR;
        half->from += (size_t)done;
    }
    return true;
}

/* Network to agent. */
static bool pull(struct relay *relay, struct half *half, bool *ret_wants_write)
{
    for (int i = 0; i < TURN && half->from == half->to; i++) {
        int got;

        ERR_clear_error();
        got = SSL_read(relay->link.ssl, half->bytes, RELAY_BYTES);
        if (got <= 0)
            return !is_over(&relay->link, got, ret_wants_write);
        half->from = 0;
        half->to = (size_t)got;
        if (!drain(relay, half))
            return false;
    }
    return true;
}

/* Agent to network. */
static bool push(struct relay *relay, struct half *half, bool *ret_wants_write)
{
    for (int i = 0; i < TURN; i++) {
        int done;

        if (half->from == half->to) {
            ssize_t got = recv(relay->clear, half->bytes, RELAY_BYTES, MSG_DONTWAIT);

            if (got <= 0)
                return got < 0 && (errno == EAGAIN || errno == EINTR);
            half->from = 0;
            half->to = (size_t)got;
        }
        ERR_clear_error();
        done = SSL_write(relay->link.ssl, half->bytes + half->from, (int)(half->to - half->from));
        if (done <= 0)
            return !is_over(&relay->link, done, ret_wants_write);
        half->from += (size_t)done;
    }
    *ret_wants_write |= half->from < half->to;
    return true;
}

static void *run(void *argument)
{
    struct relay *relay = argument;
    struct half in = {.bytes = malloc(RELAY_BYTES)}, out = {.bytes = malloc(RELAY_BYTES)};
    bool goes_on = in.bytes && out.bytes;

    while (goes_on) {
        bool wants_write = false, behind;
        struct pollfd ends[2] = {{.fd = relay->link.fd}, {.fd = relay->clear}};

        goes_on =
            drain(relay, &in) && pull(relay, &in, &wants_write) && push(relay, &out, &wants_write);
        behind = in.from < in.to;
        ends[0].events = (short)((behind ? 0 : POLLIN) | (wants_write ? POLLOUT : 0));
        ends[1].events = (short)((out.from < out.to ? 0 : POLLIN) | (behind ? POLLOUT : 0));
        /* What TLS has read already, poll() does not see. */
        if (goes_on && poll(ends, 2, !behind && SSL_pending(relay->link.ssl) ? 0 : -1) < 0)
            goes_on = errno == EINTR;
        if (goes_on && (ends[0].revents & (POLLERR | POLLNVAL) || ends[1].revents & POLLNVAL))
            goes_on = false;
    }
    shutdown(relay->clear, SHUT_RDWR);
    shutdown(relay->link.fd, SHUT_RDWR);
    free(in.bytes);
    free(out.bytes);
    return NULL;
}

int relay_start(struct relay *relay, struct link *link, int *ret_agent_fd)
{
    struct sched_param ordinary = {.sched_priority = 0};
    pthread_attr_t attributes;
    int pair[2], result;

    relay->link = *link;
    *link = (struct link){.fd = -1};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) {
        result = -errno;
        link_close(&relay->link);
        return result;
    }
    relay->clear = pair[0];
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    /* It moves bytes for as long as there are any: nobody waits for it at the mover's priority. */
    pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
    pthread_attr_setschedpolicy(&attributes, SCHED_OTHER);
    pthread_attr_setschedparam(&attributes, &ordinary);
    result = pthread_create(&relay->thread, &attributes, run, relay);
    pthread_attr_destroy(&attributes);
    if (result) {
        close(pair[0]);
        close(pair[1]);
        link_close(&relay->link);
        return -result;
    }
    relay->runs = true;
    *ret_agent_fd = pair[1];
    return 0;
}

void relay_stop(struct relay *relay)
{
    if (!relay->runs)
        return;
    shutdown(relay->clear, SHUT_RDWR);
    shutdown(relay->link.fd, SHUT_RDWR);
    pthread_join(relay->thread, NULL);
    close(relay->clear);
    link_close(&relay->link);
    relay->runs = false;
}
