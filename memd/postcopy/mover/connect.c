/* SPDX-License-Identifier: Apache-2.0 */
/* Connections to the other mover. The source makes them, first control, then urgent and bulk; the
 * destination takes them, and nobody else's: they bear the session's number, the epoch that is
 * due, and (under TLS) the certificate that the session began with. */
#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mover.h"

#define BACKOFF_FIRST_NS (50 * NS_PER_MS)
#define BACKOFF_MOST_NS  NS_PER_S
/* How long one try to come back may take: a host that drops packets does not answer at all. */
#define TRY_NS (1 * NS_PER_S)

/* For a greeting, with TLS before it, between hosts that are not far from each other. */
#define GREETED_LEAST_NS (500 * NS_PER_MS)

static const struct link closed = {.fd = -1};

static bool has_both(const struct mover *mover)
{
    return mover->data[MOVER_URGENT].state == LINK_UP && mover->data[MOVER_BULK].state == LINK_UP;
}

static void data_is_linked(struct mover *mover)
{
    connect_reset_backoff(mover);
    mover_event(mover, &(struct session_event){.type = EVENT_DATA_LINKED});
}

/* ---- counting ---- */

static uint64_t bytes_of(int fd)
{
    struct tcp_info info = {0};
    socklen_t bytes = sizeof(info);

    if (fd < 0 || getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes))
        return 0;
    return info.tcpi_bytes_sent + info.tcpi_bytes_received;
}

uint64_t connect_bytes(const struct mover *mover)
{
    return mover->past_bytes + bytes_of(mover->control.fd) + bytes_of(mover->held[0]) +
           bytes_of(mover->held[1]);
}

/* ---- dropping ---- */

void connect_init(struct mover *mover)
{
    mover->control = closed;
    for (int channel = 0; channel < MOVER_CHANNELS; channel++) {
        mover->data[channel] = closed;
        mover->held[channel] = -1;
    }
    for (unsigned i = 0; i < GREETED_MAX; i++)
        mover->greeted[i] = closed;
    connect_reset_backoff(mover);
}

static void drop_data(struct mover *mover, int channel)
{
    if (mover->held[channel] >= 0) {
        shutdown(mover->held[channel], SHUT_RDWR); /* the agent's, too */
        close(mover->held[channel]);
    }
    mover->held[channel] = -1;
    relay_stop(&mover->relays[channel]);
    link_close(&mover->data[channel]);
    mover->data[channel] = closed;
}

void connect_drop(struct mover *mover)
{
    mover->past_bytes = connect_bytes(mover);
    link_close(&mover->control);
    mover->control = closed;
    for (int channel = 0; channel < MOVER_CHANNELS; channel++)
        drop_data(mover, channel);
    mover->connecting = false;
}

/* ---- who it is ---- */

/* A mover that takes over has not seen the certificate that the session began with: the number of
 * the session, which only the two hosts know, has to do until one comes that bears it. */
static bool same_host(const struct mover *mover, const struct link *link)
{
    return !mover->has_print || memcmp(mover->print, link->print, LINK_PRINT_BYTES) == 0;
}

static void remember_host(struct mover *mover, const struct link *link)
{
    memcpy(mover->print, link->print, sizeof(mover->print));
    mover->has_print = true;
}

/* ---- source: making them ---- */

static struct peer_greeting greeting_for(const struct mover *mover, enum peer_channel channel)
{
    struct peer_greeting greeting = {.channel = channel, .epoch = mover->epoch};

    memcpy(greeting.session, mover->session_id, sizeof(greeting.session));
    return greeting;
}

static void set_port(struct sockaddr_storage *address, uint32_t port)
{
    if (address->ss_family == AF_INET6)
        ((struct sockaddr_in6 *)(void *)address)->sin6_port = htons((uint16_t)port);
    else
        ((struct sockaddr_in *)(void *)address)->sin_port = htons((uint16_t)port);
}

static int make(struct mover *mover, enum peer_channel channel, struct link *link)
{
    struct peer_greeting greeting = greeting_for(mover, channel);

    return link_connect(link, (const struct sockaddr *)&mover->address, mover->address_bytes,
                        mover->tls, mover->start.host, &greeting, mover->now_ns);
}

static void try_control(struct mover *mover)
{
    int result;

    mover->connecting = false;
    if (mover->data_port)
        set_port(&mover->address, mover->data_port);
    mover->epoch++;
    result = make(mover, PEER_CONTROL, &mover->control);
    if (result) {
        mover->control = closed;
        mover_cut(mover, result, strerror(-result));
    } else if (mover->data_port) {
        mover->control.deadline_ns = mover->now_ns + TRY_NS;
    }
}

/* The first try is made at once, and ends it when it fails. After a cut the other mover is asked at
 * its own port, again and again. */
void connect_control(struct mover *mover)
{
    if (!mover->data_port) {
        try_control(mover);
        return;
    }
    mover->connecting = true;
    mover->retry_due_ns = mover->now_ns + mover->backoff_ns;
    mover->backoff_ns =
        mover->backoff_ns * 2 < BACKOFF_MOST_NS ? mover->backoff_ns * 2 : BACKOFF_MOST_NS;
}

void connect_reset_backoff(struct mover *mover)
{
    mover->backoff_ns = BACKOFF_FIRST_NS;
}

void connect_data(struct mover *mover)
{
    if (mover->data_port)
        set_port(&mover->address, mover->data_port);
    for (int channel = 0; channel < MOVER_CHANNELS; channel++) {
        int result =
            make(mover, channel == MOVER_URGENT ? PEER_URGENT : PEER_BULK, &mover->data[channel]);

        if (result) {
            mover->data[channel] = closed;
            mover_cut(mover, result, strerror(-result));
            return;
        }
        mover->data[channel].deadline_ns = mover->now_ns + LINK_GREETING_NS;
    }
}

/* ---- destination: taking them ---- */

static uint32_t judge(const struct mover *mover, const struct link *link)
{
    const struct peer_greeting *greeting = &link->theirs;
    int channel = greeting->channel == PEER_URGENT ? MOVER_URGENT : MOVER_BULK;

    if (memcmp(greeting->session, mover->session_id, sizeof(mover->session_id)) != 0 ||
        !same_host(mover, link))
        return PEER_OTHER_SESSION;
    if (greeting->channel == PEER_CONTROL)
        return greeting->epoch > mover->epoch && session_is_committed(&mover->session)
                   ? PEER_WELCOME
                   : PEER_OLD_EPOCH;
    return greeting->epoch == mover->epoch && mover->control.state == LINK_UP &&
                   mover->data[channel].state == LINK_NONE && mover->held[channel] < 0
               ? PEER_WELCOME
               : PEER_OLD_EPOCH;
}

/* A control connection in the place of the one that was: that one is cut, if it was not known. */
static void take_control(struct mover *mover, struct link *link)
{
    struct link fresh = *link;

    *link = closed;
    if (mover->control.state != LINK_NONE)
        mover_cut(mover, -ECONNRESET, "the source has come back by another connection");
    mover->epoch = fresh.theirs.epoch;
    mover->control = fresh;
    remember_host(mover, &fresh);
    mover->reconnects++;
    mover_event(mover, &(struct session_event){.type = EVENT_LINKED});
}

static void take_data(struct mover *mover, struct link *link)
{
    int channel = link->theirs.channel == PEER_URGENT ? MOVER_URGENT : MOVER_BULK;

    mover->data[channel] = *link;
    *link = closed;
    if (has_both(mover))
        data_is_linked(mover);
}

static void welcome(struct mover *mover, struct link *link)
{
    uint32_t verdict = judge(mover, link);

    if (link_answer(link, verdict, mover->now_ns) || verdict != PEER_WELCOME) {
        link_close(link);
        *link = closed;
    } else if (link->theirs.channel == PEER_CONTROL) {
        take_control(mover, link);
    } else {
        take_data(mover, link);
    }
}

/* memd has taken the first connection, and a session begins with it: its first word says which. */
static void welcome_first(struct mover *mover)
{
    struct link *link = &mover->control;
    bool good = link->theirs.channel == PEER_CONTROL && link->theirs.epoch > 0;
    int result = link_answer(link, good ? PEER_WELCOME : PEER_OTHER_SESSION, mover->now_ns);

    if (result || !good) {
        mover_cut(mover, result ? result : -EPROTO, "its greeting begins no session");
        return;
    }
    memcpy(mover->session_id, link->theirs.session, sizeof(mover->session_id));
    remember_host(mover, link);
    mover->epoch = link->theirs.epoch;
    mover_event(mover, &(struct session_event){.type = EVENT_LINKED});
}

int connect_take_first(struct mover *mover, int fd)
{
    return link_accept(&mover->control, fd, mover->tls, mover->now_ns);
}

/* A place for one more connection that has not said what it is for. When all are taken, the one
 * that has been silent for longest goes: whoever means it says so at once. */
static struct link *place_for_one(struct mover *mover)
{
    struct link *oldest = &mover->greeted[0];

    for (unsigned i = 0; i < GREETED_MAX; i++) {
        if (mover->greeted[i].state == LINK_NONE)
            return &mover->greeted[i];
        if (mover->greeted[i].deadline_ns < oldest->deadline_ns)
            oldest = &mover->greeted[i];
    }
    if (mover->now_ns + LINK_GREETING_NS < oldest->deadline_ns + GREETED_LEAST_NS)
        return NULL;
    link_close(oldest);
    *oldest = closed;
    return oldest;
}

void connect_accept(struct mover *mover)
{
    struct pollfd arrivals = {.fd = mover->listener, .events = POLLIN};
    struct link *place;

    for (unsigned i = 0; i < GREETED_MAX && poll(&arrivals, 1, 0) > 0; i++) {
        int fd;

        place = place_for_one(mover);
        if (!place)
            return;
        fd = accept4(mover->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd < 0)
            return;
        if (link_accept(place, fd, mover->tls, mover->now_ns))
            *place = closed;
    }
}

static void step_greeted(struct mover *mover)
{
    for (unsigned i = 0; i < GREETED_MAX; i++) {
        struct link *link = &mover->greeted[i];

        if (link->state == LINK_NONE)
            continue;
        if (link_step(link, mover->now_ns)) {
            link_close(link);
            *link = closed;
        } else if (link->state == LINK_ASKED) {
            welcome(mover, link);
        }
    }
}

/* ---- both: on the way up ---- */

static const char *words_for(const struct link *link, int error)
{
    if (link->why[0])
        return link->why;
    if (error == -ECONNREFUSED && link->theirs.verdict)
        return peer_verdict_words(link->theirs.verdict);
    if (error == -ECONNREFUSED)
        return "nobody listens there (is its memd up, and [migration] listen in its memd.conf?)";
    return strerror(-error);
}

static void fail(struct mover *mover, const struct link *link, int error)
{
    char why[sizeof(link->why)];

    snprintf(why, sizeof(why), "%s", words_for(link, error));
    mover_cut(mover, error, why);
}

static void control_is_up(struct mover *mover)
{
    if (!same_host(mover, &mover->control)) {
        mover_cut(mover, -EKEYREJECTED, "the other host shows another certificate than before");
        return;
    }
    remember_host(mover, &mover->control);
    if (mover->data_port)
        mover->reconnects++;
    mover_event(mover, &(struct session_event){.type = EVENT_LINKED});
}

static void step_control(struct mover *mover)
{
    struct link *link = &mover->control;
    int result;

    if (link->state == LINK_NONE || link->state == LINK_UP)
        return;
    result = link_step(link, mover->now_ns);
    if (result)
        fail(mover, link, result);
    else if (link->state == LINK_UP)
        control_is_up(mover);
    else if (link->state == LINK_ASKED)
        welcome_first(mover);
}

static void step_data(struct mover *mover)
{
    for (int channel = 0; channel < MOVER_CHANNELS; channel++) {
        struct link *link = &mover->data[channel];
        int result;

        if (link->state == LINK_NONE || link->state == LINK_UP)
            continue;
        result = link_step(link, mover->now_ns);
        if (!result && link->state == LINK_UP && !same_host(mover, link))
            result = -EKEYREJECTED;
        if (result) {
            fail(mover, link, result);
            return;
        }
        if (has_both(mover)) {
            data_is_linked(mover);
            return;
        }
    }
}

void connect_step(struct mover *mover)
{
    step_control(mover);
    step_data(mover);
    step_greeted(mover);
    if (mover->connecting && mover->now_ns >= mover->retry_due_ns)
        try_control(mover);
}
