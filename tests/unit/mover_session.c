/* SPDX-License-Identifier: Apache-2.0 */
/* The sequence of a migration: every step, and what fails at each of them. Both sides are the pure
 * machine; the world between them is an array of flags. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "session.h"

static void take(struct session *session, enum session_event_type type)
{
    session_take(session, &(struct session_event){.type = type});
}

static void hear(struct session *session, enum peer_type frame, int value)
{
    session_take(session,
                 &(struct session_event){.type = EVENT_FRAME, .frame = frame, .value = value});
}

static void done(struct session *session, uint32_t what, int result)
{
    session_take(session,
                 &(struct session_event){.type = EVENT_DONE, .what = what, .value = result});
}

static void cut(struct session *session)
{
    session_take(session, &(struct session_event){.type = EVENT_CUT, .value = -ECONNRESET});
}

static bool says(const struct session *session, enum peer_type frame)
{
    for (uint32_t i = 0; i < session->action_count; i++) {
        if (session->actions[i].type == ACTION_SAY && session->actions[i].frame == frame)
            return true;
    }
    return false;
}

static bool asks(const struct session *session, uint32_t what)
{
    for (uint32_t i = 0; i < session->action_count; i++) {
        if (session->actions[i].type == ACTION_ASK && session->actions[i].what == what)
            return true;
    }
    return false;
}

static bool does(const struct session *session, enum session_action_type type)
{
    for (uint32_t i = 0; i < session->action_count; i++) {
        if (session->actions[i].type == type)
            return true;
    }
    return false;
}

/* The usual way, as far as a state. */
static void bring_source(struct session *session, enum session_state to)
{
    session_start(session, MOVER_SOURCE, false);
    cr_assert(does(session, ACTION_CONNECT));
    if (to > SOURCE_CONNECTING)
        take(session, EVENT_LINKED);
    if (to > SOURCE_ASKING)
        hear(session, PEER_OK, 0);
    if (to > SOURCE_LINKING) {
        done(session, MOVER_SET_SESSION, 0);
        take(session, EVENT_DATA_LINKED);
        cr_assert(does(session, ACTION_LINK));
        hear(session, PEER_EXPECTING, 0);
    }
    if (to > SOURCE_PRECOPY)
        take(session, EVENT_SHOULD_STOP);
    if (to > SOURCE_STOPPING)
        done(session, MOVER_STOP, 0);
    if (to > SOURCE_SAVING)
        done(session, MOVER_SAVE, 0);
    if (to > SOURCE_OFFERED) {
        hear(session, PEER_READY, 0);
        cr_assert_not(says(session, PEER_GO), "GO before the agent has committed");
    }
    if (to > SOURCE_COMMITTING) {
        done(session, MOVER_COMMIT, 0);
        cr_assert(says(session, PEER_GO));
    }
    cr_assert_eq(session->state, to, "it is in %s", session_state_name(session->state));
}

static void bring_destination(struct session *session, enum session_state to)
{
    session_start(session, MOVER_DESTINATION, false);
    take(session, EVENT_LINKED);
    if (to > DESTINATION_WAITING)
        hear(session, PEER_HELLO, 0);
    if (to > DESTINATION_STARTING)
        take(session, EVENT_GUEST);
    if (to > DESTINATION_LINKING)
        take(session, EVENT_DATA_LINKED);
    if (to > DESTINATION_EXPECTING)
        done(session, MOVER_EXPECT, 0);
    if (to > DESTINATION_FILLING) {
        take(session, EVENT_MAPPED);
        take(session, EVENT_STATE_HERE);
        cr_assert(asks(session, MOVER_LOAD));
    }
    if (to > DESTINATION_LOADING)
        done(session, MOVER_LOAD, 0);
    if (to > DESTINATION_READY)
        hear(session, PEER_GO, 0);
    if (to > DESTINATION_RESUMING)
        done(session, MOVER_RUN, 0);
    if (to > DESTINATION_RUNNING)
        take(session, EVENT_PROVEN);
    cr_assert_eq(session->state, to, "it is in %s", session_state_name(session->state));
}

/* Not before: CPU and link are for the switch-over. And once, whoever says it how often. */
Test(mover_session, pages_are_pushed_when_the_guest_runs)
{
    struct session source;

    bring_source(&source, SOURCE_COMMITTED);
    cr_assert_not(asks(&source, MOVER_PUSH));
    hear(&source, PEER_RUNNING, 0);
    cr_assert(asks(&source, MOVER_PUSH));
    hear(&source, PEER_RUNNING, 0);
    cr_assert_not(asks(&source, MOVER_PUSH));
    bring_source(&source, SOURCE_COMMITTED);
    cut(&source);
    hear(&source, PEER_RESUME, PEER_WAITS);
    cr_assert_not(asks(&source, MOVER_PUSH));
    cut(&source);
    hear(&source, PEER_RESUME, PEER_RUNS);
    cr_assert(asks(&source, MOVER_PUSH), "what it said before the cut was not heard");
}

Test(mover_session, usual_way_ends_completed)
{
    struct session source, destination;

    bring_source(&source, SOURCE_COMMITTED);
    hear(&source, PEER_RUNNING, 0);
    take(&source, EVENT_PROVEN);
    cr_assert_eq(source.state, SOURCE_PROVEN);
    hear(&source, PEER_PROVEN, 0);
    cr_assert(says(&source, PEER_BYE));
    cr_assert_eq(source.outcome, OUTCOME_COMPLETED);
    bring_destination(&destination, DESTINATION_PROVEN);
    cr_assert(says(&destination, PEER_PROVEN));
    hear(&destination, PEER_BYE, 0);
    cr_assert_eq(destination.outcome, OUTCOME_COMPLETED);
}

Test(mover_session, post_copy_alone_stops_at_once)
{
    struct session source;

    session_start(&source, MOVER_SOURCE, false);
    source.at_once = true;
    take(&source, EVENT_LINKED);
    hear(&source, PEER_OK, 0);
    take(&source, EVENT_DATA_LINKED);
    hear(&source, PEER_EXPECTING, 0);
    cr_assert_not(asks(&source, MOVER_STOP), "the VMM is not prepared");
    done(&source, MOVER_SET_SESSION, 0);
    cr_assert_not(asks(&source, MOVER_START_PRECOPY));
    cr_assert(asks(&source, MOVER_STOP));
}

Test(mover_session, a_destination_that_has_given_up_need_not_be_told)
{
    static const enum peer_type frames[] = {PEER_ABORT, PEER_REFUSED};

    for (int i = 0; i < 2; i++) {
        struct session source;

        bring_source(&source, SOURCE_OFFERED);
        hear(&source, frames[i], -EIO);
        cr_assert(asks(&source, MOVER_ABORT));
        cut(&source);
        done(&source, MOVER_ABORT, 0);
        cr_assert_eq(source.state, SESSION_OVER, "it tries to reach it in %s",
                     session_state_name(source.state));
        cr_assert_eq(source.outcome, OUTCOME_SOURCE_RUNS);
    }
}

Test(mover_session, cut_before_commit_leaves_the_guest_at_the_source)
{
    for (enum session_state at = SOURCE_CONNECTING; at < SOURCE_COMMITTING; at++) {
        struct session source;

        bring_source(&source, at);
        cut(&source);
        cr_assert(asks(&source, MOVER_ABORT), "in %s", session_state_name(at));
        cr_assert(source.was_cut);
        cr_assert_eq(source.state, SOURCE_ABORTING);
        done(&source, MOVER_ABORT, 0);
        cr_assert_eq(source.outcome, OUTCOME_SOURCE_RUNS);
        cr_assert_eq(source.state == SOURCE_TELLING, at == SOURCE_OFFERED);
    }
}

Test(mover_session, destination_waits_for_word_of_a_source_that_gave_up)
{
    struct session source, destination;

    bring_source(&source, SOURCE_OFFERED);
    cut(&source);
    done(&source, MOVER_ABORT, 0);
    cr_assert(does(&source, ACTION_CONNECT));
    take(&source, EVENT_LINKED);
    cr_assert(says(&source, PEER_RESUME));
    cr_assert_eq(source.actions[0].value, PEER_BEFORE_COMMIT);
    cr_assert_eq(source.state, SESSION_OVER);
    bring_destination(&destination, DESTINATION_READY);
    cut(&destination);
    cr_assert_eq(destination.state, DESTINATION_READY);
    take(&destination, EVENT_LINKED);
    hear(&destination, PEER_RESUME, PEER_BEFORE_COMMIT);
    cr_assert_not(asks(&destination, MOVER_RUN));
    cr_assert_eq(destination.outcome, OUTCOME_SOURCE_RUNS);
}

Test(mover_session, cut_before_ready_ends_the_destination)
{
    for (enum session_state at = DESTINATION_WAITING; at < DESTINATION_READY; at++) {
        struct session destination;

        bring_destination(&destination, at);
        cut(&destination);
        cr_assert_eq(destination.state, SESSION_OVER, "in %s", session_state_name(at));
        cr_assert_eq(destination.outcome, OUTCOME_SOURCE_RUNS);
    }
}

Test(mover_session, nothing_but_go_lets_the_guest_run_at_the_destination)
{
    for (enum session_state at = DESTINATION_WAITING; at <= DESTINATION_READY; at++) {
        for (enum peer_type frame = PEER_HELLO; frame < PEER_TYPE_END; frame++) {
            struct session destination;

            if (at == DESTINATION_READY && frame == PEER_GO)
                continue;
            bring_destination(&destination, at);
            hear(&destination, frame, 0);
            cr_assert_not(asks(&destination, MOVER_RUN), "frame %u in %s", frame,
                          session_state_name(at));
        }
    }
}

Test(mover_session, go_of_before_the_cut_does_not_count_after_it)
{
    struct session destination;

    bring_destination(&destination, DESTINATION_READY);
    cut(&destination);
    take(&destination, EVENT_LINKED);
    hear(&destination, PEER_GO, 0);
    cr_assert_not(asks(&destination, MOVER_RUN));
    cr_assert_eq(destination.state, DESTINATION_READY);
}

Test(mover_session, cut_while_the_agent_commits_is_decided_by_the_agent)
{
    struct session source;

    bring_source(&source, SOURCE_COMMITTING);
    cut(&source);
    cr_assert_not(asks(&source, MOVER_ABORT));
    done(&source, MOVER_COMMIT, 0);
    cr_assert_eq(source.state, SOURCE_COMMITTED);
    cr_assert(does(&source, ACTION_CONNECT));
    cr_assert_not(says(&source, PEER_GO));
    bring_source(&source, SOURCE_COMMITTING);
    cut(&source);
    done(&source, MOVER_COMMIT, -EPERM);
    cr_assert(asks(&source, MOVER_ABORT));
}

Test(mover_session, committed_source_never_lets_the_guest_run_again)
{
    static const enum session_event_type others[] = {EVENT_CUT,    EVENT_LINKED, EVENT_AGENT_GONE,
                                                     EVENT_CANCEL, EVENT_LATE,   EVENT_SHOULD_STOP,
                                                     EVENT_PROVEN};
    struct session source;

    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
        bring_source(&source, SOURCE_COMMITTED);
        take(&source, others[i]);
        cr_assert_not(asks(&source, MOVER_ABORT), "event %u", others[i]);
        cr_assert_neq(source.outcome, OUTCOME_SOURCE_RUNS);
        cr_assert_neq(source.outcome, OUTCOME_CANCELLED);
    }
    for (enum peer_type frame = PEER_HELLO; frame < PEER_TYPE_END; frame++) {
        bring_source(&source, SOURCE_COMMITTED);
        hear(&source, frame, 0);
        cr_assert_not(asks(&source, MOVER_ABORT), "frame %u", frame);
        cr_assert_neq(source.outcome, OUTCOME_SOURCE_RUNS);
    }
}

Test(mover_session, cut_after_commit_is_repaired)
{
    struct session source, destination;

    bring_source(&source, SOURCE_COMMITTED);
    cut(&source);
    cr_assert(asks(&source, MOVER_UNLINK));
    take(&source, EVENT_LINKED);
    cr_assert(says(&source, PEER_RESUME));
    cr_assert_eq(source.actions[0].value, PEER_COMMITTED);
    hear(&source, PEER_RESUME, PEER_WAITS);
    cr_assert(says(&source, PEER_GO));
    cr_assert(does(&source, ACTION_CONNECT_DATA));
    take(&source, EVENT_DATA_LINKED);
    cr_assert(does(&source, ACTION_LINK));
    bring_destination(&destination, DESTINATION_RUNNING);
    cut(&destination);
    cr_assert(asks(&destination, MOVER_UNLINK));
    cr_assert(asks(&destination, MOVER_HOLD));
    done(&destination, MOVER_HOLD, 0);
    take(&destination, EVENT_LINKED);
    hear(&destination, PEER_RESUME, PEER_COMMITTED);
    cr_assert(says(&destination, PEER_RESUME));
    cr_assert_eq(destination.actions[0].value, PEER_RUNS);
    take(&destination, EVENT_DATA_LINKED);
    cr_assert(does(&destination, ACTION_LINK));
    cr_assert(asks(&destination, MOVER_GO));
}

Test(mover_session, guest_that_can_not_be_held_is_no_failure)
{
    struct session destination;

    bring_destination(&destination, DESTINATION_RUNNING);
    cut(&destination);
    done(&destination, MOVER_HOLD, -EBUSY);
    cr_assert_eq(destination.action_count, 0);
    take(&destination, EVENT_LINKED);
    hear(&destination, PEER_RESUME, PEER_COMMITTED);
    take(&destination, EVENT_DATA_LINKED);
    cr_assert_not(asks(&destination, MOVER_GO));
}

Test(mover_session, guest_that_was_held_goes_on_when_nothing_is_missing_any_more)
{
    struct session destination;

    bring_destination(&destination, DESTINATION_RUNNING);
    cut(&destination);
    done(&destination, MOVER_HOLD, 0);
    take(&destination, EVENT_PROVEN);
    cr_assert(asks(&destination, MOVER_GO));
    bring_destination(&destination, DESTINATION_RUNNING);
    cut(&destination);
    take(&destination, EVENT_PROVEN);
    cr_assert_not(asks(&destination, MOVER_GO));
    done(&destination, MOVER_HOLD, 0);
    cr_assert(asks(&destination, MOVER_GO));
}

Test(mover_session, source_is_not_done_before_the_guest_runs_elsewhere)
{
    struct session source;

    bring_source(&source, SOURCE_COMMITTED);
    take(&source, EVENT_PROVEN);
    cr_assert_eq(source.state, SOURCE_COMMITTED);
    cut(&source);
    cr_assert_eq(source.state, SOURCE_COMMITTED);
    take(&source, EVENT_LINKED);
    hear(&source, PEER_RESUME, PEER_RUNS);
    cr_assert_eq(source.state, SOURCE_PROVEN);
}

Test(mover_session, word_of_the_destination_alone_proves_nothing)
{
    struct session source;

    bring_source(&source, SOURCE_COMMITTED);
    hear(&source, PEER_PROVEN, 0);
    cr_assert_eq(source.state, SOURCE_COMMITTED);
}

Test(mover_session, sums_that_differ_are_no_success)
{
    struct session_event differs = {.type = EVENT_PROVEN, .value = -EBADMSG};
    struct session source, destination;

    bring_source(&source, SOURCE_COMMITTED);
    session_take(&source, &differs);
    cr_assert_eq(source.outcome, OUTCOME_GUEST_LOST);
    bring_destination(&destination, DESTINATION_RUNNING);
    session_take(&destination, &differs);
    cr_assert_eq(destination.outcome, OUTCOME_GUEST_LOST);
}

Test(mover_session, pure_precopy_waits_for_all_pages_before_ready)
{
    struct session destination;

    bring_destination(&destination, DESTINATION_LOADING);
    destination.all_first = true;
    done(&destination, MOVER_LOAD, 0);
    cr_assert_not(says(&destination, PEER_READY));
    take(&destination, EVENT_PROVEN);
    cr_assert(says(&destination, PEER_READY));
    hear(&destination, PEER_GO, 0);
    done(&destination, MOVER_RUN, 0);
    cr_assert(says(&destination, PEER_RUNNING));
    cr_assert_eq(destination.state, DESTINATION_PROVEN);
}

Test(mover_session, cancel_is_heard_until_the_commit)
{
    for (enum session_state at = SOURCE_CONNECTING; at <= SOURCE_COMMITTED; at++) {
        struct session source;

        bring_source(&source, at);
        cr_assert_eq(session_may_cancel(&source), at < SOURCE_COMMITTING);
        take(&source, EVENT_CANCEL);
        cr_assert_eq(asks(&source, MOVER_ABORT), at < SOURCE_COMMITTING);
        if (at < SOURCE_COMMITTING)
            done(&source, MOVER_ABORT, 0);
        cr_assert_eq(source.outcome == OUTCOME_CANCELLED, at < SOURCE_COMMITTING);
    }
}

Test(mover_session, agent_that_refuses_a_step_ends_it_before_the_commit)
{
    static const uint32_t steps[] = {MOVER_SET_SESSION, MOVER_START_PRECOPY, MOVER_STOP,
                                     MOVER_SAVE};

    for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
        struct session source;

        bring_source(&source, (enum session_state)(SOURCE_LINKING + (int)i));
        done(&source, steps[i], -EIO);
        cr_assert_eq(source.state, SOURCE_ABORTING);
        cr_assert(asks(&source, MOVER_ABORT));
    }
}

Test(mover_session, guest_that_does_not_resume_is_said_to_be_lost)
{
    struct session source;

    bring_source(&source, SOURCE_OFFERED);
    hear(&source, PEER_ABORT, -EIO);
    cr_assert_not(source.was_cut, "what the destination can't do is begun again in vain");
    done(&source, MOVER_ABORT, -EIO);
    cr_assert_eq(source.outcome, OUTCOME_GUEST_LOST);
}

Test(mover_session, state_that_does_not_load_is_told)
{
    struct session destination;

    bring_destination(&destination, DESTINATION_LOADING);
    done(&destination, MOVER_LOAD, -EINVAL);
    cr_assert(says(&destination, PEER_ABORT));
    cr_assert_eq(destination.outcome, OUTCOME_SOURCE_RUNS);
}

Test(mover_session, deaths_of_the_vmms_are_said_plainly)
{
    struct session session;

    bring_source(&session, SOURCE_PRECOPY);
    take(&session, EVENT_AGENT_GONE);
    cr_assert_eq(session.outcome, OUTCOME_SOURCE_RUNS);
    bring_source(&session, SOURCE_COMMITTED);
    take(&session, EVENT_AGENT_GONE);
    cr_assert_eq(session.outcome, OUTCOME_GUEST_LOST);
    bring_destination(&session, DESTINATION_FILLING);
    take(&session, EVENT_AGENT_GONE);
    cr_assert_eq(session.outcome, OUTCOME_SOURCE_RUNS);
    bring_destination(&session, DESTINATION_RUNNING);
    take(&session, EVENT_AGENT_GONE);
    cr_assert(says(&session, PEER_ABORT));
    cr_assert_eq(session.outcome, OUTCOME_GUEST_LOST);
}

Test(mover_session, mover_that_takes_over_goes_by_the_agents_word)
{
    struct session session;

    session_resume(&session, MOVER_SOURCE, MOVER_PHASE_PRECOPY, false, false);
    cr_assert(asks(&session, MOVER_ABORT));
    session_resume(&session, MOVER_SOURCE, MOVER_PHASE_STOPPED, false, false);
    cr_assert(asks(&session, MOVER_ABORT));
    session.action_count = 0;
    done(&session, MOVER_ABORT, 0);
    cr_assert_eq(session.state, SOURCE_TELLING);
    session_resume(&session, MOVER_SOURCE, MOVER_PHASE_COMMITTED, false, false);
    cr_assert_not(asks(&session, MOVER_ABORT));
    cr_assert(does(&session, ACTION_CONNECT));
    session_resume(&session, MOVER_DESTINATION, MOVER_PHASE_MAPPED, false, false);
    cr_assert_eq(session.outcome, OUTCOME_SOURCE_RUNS);
    session_resume(&session, MOVER_DESTINATION, MOVER_PHASE_LOADED, false, false);
    cr_assert_eq(session.state, DESTINATION_READY);
    session_resume(&session, MOVER_DESTINATION, MOVER_PHASE_RUNNING, false, false);
    cr_assert_eq(session.state, DESTINATION_RUNNING);
    session_resume(&session, MOVER_DESTINATION, MOVER_PHASE_RUNNING, false, true);
    take(&session, EVENT_LINKED);
    hear(&session, PEER_RESUME, PEER_COMMITTED);
    take(&session, EVENT_DATA_LINKED);
    cr_assert(asks(&session, MOVER_GO), "the guest that was paused at the cut stays paused");
}

/* ---- both sides at random ---- */

/* The agents keep the fence: what they were asked, in order. */
struct world {
    struct session source, destination;
    bool commit_asked, committed, source_may_run, destination_runs, linked, over;
};

static void answer_asks(struct world *world, struct session *session)
{
    for (uint32_t i = 0; i < session->action_count; i++) {
        const struct session_action *action = &session->actions[i];

        if (action->type != ACTION_ASK)
            continue;
        if (action->what == MOVER_STOP)
            world->source_may_run = false;
        if (action->what == MOVER_ABORT && session == &world->source) {
            cr_assert_not(world->committed, "ABORT after COMMIT");
            world->source_may_run = true;
        }
        if (action->what == MOVER_COMMIT)
            world->commit_asked = true;
        if (action->what == MOVER_RUN) {
            cr_assert(world->committed, "RUN before COMMIT");
            world->destination_runs = true;
        }
    }
    cr_assert_not(world->source_may_run && world->destination_runs, "two running copies");
}

static struct session_event chance(unsigned *seed)
{
    static const uint32_t whats[] = {MOVER_SET_SESSION, MOVER_STOP,   MOVER_SAVE, MOVER_COMMIT,
                                     MOVER_ABORT,       MOVER_EXPECT, MOVER_LOAD, MOVER_RUN};

    return (struct session_event){.type =
                                      (enum session_event_type)(rand_r(seed) % (EVENT_LATE + 1)),
                                  .frame = (enum peer_type)(1 + rand_r(seed) % (PEER_TYPE_END - 1)),
                                  .what = whats[rand_r(seed) % 8],
                                  .value = rand_r(seed) % 3 == 0 ? -EIO : 0};
}

/* What brings a side one step further, so that walks get far. */
static struct session_event usual(const struct session *session)
{
    static const struct {
        enum session_state state;
        enum session_event_type type;
        uint32_t what;
    } steps[] = {
        {SOURCE_CONNECTING, EVENT_LINKED, 0},
        {SOURCE_LINKING, EVENT_DATA_LINKED, 0},
        {SOURCE_PRECOPY, EVENT_SHOULD_STOP, 0},
        {SOURCE_STOPPING, EVENT_DONE, MOVER_STOP},
        {SOURCE_SAVING, EVENT_DONE, MOVER_SAVE},
        {SOURCE_COMMITTING, EVENT_DONE, MOVER_COMMIT},
        {SOURCE_COMMITTED, EVENT_LINKED, 0},
        {SOURCE_ABORTING, EVENT_DONE, MOVER_ABORT},
        {DESTINATION_WAITING, EVENT_LINKED, 0},
        {DESTINATION_STARTING, EVENT_GUEST, 0},
        {DESTINATION_LINKING, EVENT_DATA_LINKED, 0},
        {DESTINATION_EXPECTING, EVENT_DONE, MOVER_EXPECT},
        {DESTINATION_FILLING, EVENT_STATE_HERE, 0},
        {DESTINATION_LOADING, EVENT_DONE, MOVER_LOAD},
        {DESTINATION_RESUMING, EVENT_DONE, MOVER_RUN},
        {DESTINATION_RUNNING, EVENT_PROVEN, 0},
    };

    if (session->state == SOURCE_LINKING && !session->prepared)
        return (struct session_event){.type = EVENT_DONE, .what = MOVER_SET_SESSION};
    if (session->state == DESTINATION_FILLING && !session->mapped)
        return (struct session_event){.type = EVENT_MAPPED};
    for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
        if (steps[i].state == session->state)
            return (struct session_event){.type = steps[i].type, .what = steps[i].what};
    }
    return (struct session_event){.type = EVENT_SHOULD_STOP};
}

/* Frames reach the other side as they were said, or not at all. What agents answer is at random;
 * COMMIT and ABORT exclude each other, as in the agent. */
static void deliver(struct world *world, struct session *from, struct session *to)
{
    struct session_action actions[SESSION_ACTIONS_MAX];
    uint32_t count = from->action_count;

    memcpy(actions, from->actions, sizeof(actions));
    from->action_count = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (actions[i].type != ACTION_SAY || !world->linked)
            continue;
        hear(to, actions[i].frame, actions[i].value);
        answer_asks(world, to);
    }
}

static void random_step(struct world *world, unsigned *seed)
{
    struct session *one = rand_r(seed) % 2 ? &world->source : &world->destination;
    struct session *other = one == &world->source ? &world->destination : &world->source;
    struct session_event event = rand_r(seed) % 8 ? usual(one) : chance(seed);

    if (event.type == EVENT_FRAME) /* frames come from the other side alone */
        return;
    if (event.type == EVENT_DONE && event.what == MOVER_COMMIT && !world->commit_asked)
        return;
    if (event.type == EVENT_DONE && event.what == MOVER_COMMIT && world->source_may_run)
        return;
    if (event.type == EVENT_DONE && event.what == MOVER_COMMIT)
        world->committed |= event.value == 0;
    if (event.type == EVENT_CUT)
        world->linked = false;
    if (event.type == EVENT_LINKED)
        world->linked = true;
    session_take(one, &event);
    answer_asks(world, one);
    deliver(world, one, other);
    deliver(world, other, one);
    other->action_count = one->action_count = 0;
}

Test(mover_session, no_order_of_events_makes_two_running_copies)
{
    unsigned seed = 7;
    uint32_t ran = 0;

    for (int walk = 0; walk < 50000; walk++) {
        struct world world = {.source_may_run = true, .linked = true};

        session_start(&world.source, MOVER_SOURCE, false);
        session_start(&world.destination, MOVER_DESTINATION, false);
        world.source.action_count = 0;
        for (int i = 0; i < 100; i++)
            random_step(&world, &seed);
        ran += world.destination_runs;
    }
    cr_assert_gt(ran, 1000, "only %u walks came as far as RUN", ran);
}
