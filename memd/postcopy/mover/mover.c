/* SPDX-License-Identifier: Apache-2.0 */
/* The loop of a mover, and the way from what happened to what is done about it. */
#include "mover.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define STEP_NS      (60 * NS_PER_S)  /* a step of the sequence in which nothing grows */
#define FIGURES_NS   (2 * NS_PER_S)   /* the destination's figures after the proof */
#define LISTEN_NS    (600 * NS_PER_S) /* a source that was cut off may still ask how it ended */
#define HELLO_NS     (10 * NS_PER_S)  /* the agent's first word */
#define LINGER_NS    (1 * NS_PER_S)
#define WAIT_MOST_MS 50 /* heartbeats are due each 100 ms */

void mover_say_why(struct mover *mover, const char *format, ...)
{
    va_list arguments;

    if (mover->words[0])
        return;
    va_start(arguments, format);
    vsnprintf(mover->words, sizeof(mover->words), format, arguments);
    va_end(arguments);
}

uint64_t mover_time(const struct mover *mover, uint64_t least_ns, uint64_t ago_ns)
{
    return mover->now_ns > least_ns && ago_ns < mover->now_ns - least_ns ? mover->now_ns - ago_ns
                                                                         : least_ns;
}

/* ---- what is done ---- */

static void end(struct mover *mover)
{
    mover->end_ns = mover->now_ns;
    mover->linger_ns = mover->now_ns + LINGER_NS;
    mover->status_news = true;
}

static void need_guest(struct mover *mover)
{
    if (mover->words[0]) /* it does not fit, whatever VMM there is */
        mover_event(mover, &(struct session_event){.type = EVENT_GUEST, .value = -EOPNOTSUPP});
    else
        orders_need_guest(mover);
}

static void do_action(struct mover *mover, const struct session_action *action)
{
    switch (action->type) {
    case ACTION_CONNECT: connect_control(mover); break;
    case ACTION_CONNECT_DATA: connect_data(mover); break;
    case ACTION_DROP_LINKS: connect_drop(mover); break;
    case ACTION_SAY: talk_say(mover, action->frame, action->value); break;
    case ACTION_ASK: agent_ask(mover, action->what); break;
    case ACTION_LINK: agent_link(mover); break;
    case ACTION_SEND_STATE: mover->state.done = 0; break; /* talk_step() sends it */
    case ACTION_NEED_GUEST: need_guest(mover); break;
    case ACTION_END: end(mover); break;
    }
}

/* How long a state may last. */
static uint64_t patience(enum session_state state)
{
    switch (state) {
    case SOURCE_PROVEN: return FIGURES_NS;
    case DESTINATION_PROVEN: return LISTEN_NS;
    case SOURCE_PRECOPY:
    case SOURCE_COMMITTING:
    case SOURCE_COMMITTED:
    case DESTINATION_FILLING:
    case DESTINATION_READY:
    case DESTINATION_RUNNING:
    case SESSION_OVER: return 0;
    default: return STEP_NS;
    }
}

static void enter(struct mover *mover, enum session_state state)
{
    uint64_t most = patience(state);

    mover->late_ns = most ? mover->now_ns + most : 0;
    mover->status_news = true;
    if (state == SOURCE_PRECOPY)
        mover->precopy_ns = mover->now_ns;
    if (state == DESTINATION_RUNNING && !mover->run_ns)
        mover->run_ns = mover->now_ns;
}

static void do_actions(struct mover *mover, enum session_state before)
{
    struct session_action actions[SESSION_ACTIONS_MAX];
    uint32_t count = mover->session.action_count;

    memcpy(actions, mover->session.actions, sizeof(actions));
    mover->session.action_count = 0;
    if (mover->session.state != before)
        enter(mover, mover->session.state);
    for (uint32_t i = 0; i < count; i++)
        do_action(mover, &actions[i]);
}

/* Events that come of an action wait until the actions before them are done. One more cut than
 * there is room for says nothing new. */
static void put_off(struct mover *mover, const struct session_event *event)
{
    if (event && mover->waiting_count < sizeof(mover->waiting) / sizeof(mover->waiting[0]))
        mover->waiting[mover->waiting_count++] = *event;
}

void mover_event(struct mover *mover, const struct session_event *event)
{
    enum session_state before = SESSION_STATE_COUNT;

    put_off(mover, event);
    if (mover->in_event)
        return;
    mover->in_event = true;
    if (!event)
        do_actions(mover, before);
    while (mover->waiting_count) {
        struct session_event next = mover->waiting[0];

        mover->waiting_count--;
        memmove(&mover->waiting[0], &mover->waiting[1],
                mover->waiting_count * sizeof(mover->waiting[0]));
        before = mover->session.state;
        session_take(&mover->session, &next);
        do_actions(mover, before);
    }
    mover->in_event = false;
}

void mover_cut(struct mover *mover, int error, const char *why)
{
    if (!session_is_committed(&mover->session))
        mover_say_why(mover, "no connection with the other host: %s", why);
    connect_drop(mover);
    mover_event(mover, &(struct session_event){.type = EVENT_CUT, .value = error ? error : -EPIPE});
}

/* ---- the loop ---- */

#define POLLS_MAX (5 + MOVER_CHANNELS + GREETED_MAX)

static void add_link(struct pollfd *polls, nfds_t *count, const struct link *link)
{
    if (link->state != LINK_NONE)
        polls[(*count)++] = (struct pollfd){.fd = link->fd, .events = link_events(link)};
}

/* Data connections that are up are the agent's: nobody else reads them. */
static nfds_t fill_polls(const struct mover *mover, struct pollfd *polls)
{
    const int plain[] = {mover->memd, mover->memd_listener, mover->agent, mover->listener};
    nfds_t count = 0;

    for (size_t i = 0; i < sizeof(plain) / sizeof(plain[0]); i++)
        polls[count++] = (struct pollfd){.fd = plain[i], .events = POLLIN};
    add_link(polls, &count, &mover->control);
    for (int channel = 0; channel < MOVER_CHANNELS; channel++) {
        if (mover->data[channel].state != LINK_UP)
            add_link(polls, &count, &mover->data[channel]);
    }
    for (unsigned i = 0; i < GREETED_MAX; i++)
        add_link(polls, &count, &mover->greeted[i]);
    return count;
}

/* An agent that was never heard was never asked for anything: its guest runs. */
static void give_up_agent(struct mover *mover)
{
    mover_say_why(mover, "the agent of this guest does not answer");
    mover_fail(mover);
}

void mover_fail(struct mover *mover)
{
    mover->session.role = (enum mover_role)mover->start.role;
    mover->session.state = SESSION_OVER;
    mover->session.outcome = OUTCOME_SOURCE_RUNS;
    mover->status_news = true;
}

static void look_at_time(struct mover *mover)
{
    if (mover->start.role == MOVER_SOURCE && !mover->agent_is_known &&
        mover->now_ns > mover->began_ns + HELLO_NS && !mover->start.takes_over) {
        give_up_agent(mover);
        return;
    }
    if (!mover->late_ns || mover->now_ns < mover->late_ns)
        return;
    mover->late_ns = 0;
    if (session_may_cancel(&mover->session))
        mover_say_why(mover, "nothing came of step '%s' for too long",
                      session_state_name(mover->session.state));
    mover_event(mover, &(struct session_event){.type = EVENT_LATE});
}

/* What is said on a socket that has ended counts: it is read before its end is seen. */
static void turn(struct mover *mover)
{
    orders_read(mover);
    if (mover->memd_listener >= 0)
        orders_accept(mover);
    if (mover->agent >= 0)
        agent_read(mover);
    if (mover->session.state == SESSION_OVER) {
        talk_linger(mover);
    } else {
        if (mover->listener >= 0)
            connect_accept(mover);
        connect_step(mover);
        talk_step(mover);
        look_at_time(mover);
    }
    orders_send_status(mover);
}

static bool is_done(const struct mover *mover)
{
    return mover->session.state == SESSION_OVER && mover->forget && mover->control.state != LINK_UP;
}

static int wait_for_news(struct mover *mover)
{
    struct pollfd polls[POLLS_MAX];
    nfds_t count = fill_polls(mover, polls);
    int result = poll(polls, count, WAIT_MOST_MS);

    mover->now_ns = clock_now_ns();
    return result < 0 && errno != EINTR ? -errno : 0;
}

int mover_run(struct mover *mover)
{
    int result = 0;

    while (!result && !is_done(mover)) {
        turn(mover);
        result = wait_for_news(mover);
    }
    connect_drop(mover);
    return result;
}
