/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sequence
 * ------------
 *   source                                  destination
 *   CONNECTING, ASKING    -- HELLO -->      WAITING, STARTING (memd starts the VMM)
 *   LINKING               <-- OK --         LINKING  (urgent and bulk are made)
 *                         <-- EXPECTING --  EXPECTING, FILLING
 *   PRECOPY, STOPPING, SAVING
 *   OFFERED               -- STATE... -->   FILLING, LOADING
 *                         <-- READY --      READY
 *   COMMITTING (agent), COMMITTED
 *                         -- GO -->         RESUMING
 *                         <-- RUNNING --    RUNNING
 *   (agent: PUSH)
 *   PROVEN                <-- PROVEN --     PROVEN
 *                         -- BYE -->
 *
 * The commit fence
 * ----------------
 * At every moment at most one side may let the guest run, whoever dies and whatever is lost or
 * delayed on the way:
 *
 *   1. The source's agent lets the guest run until STOP, and after it only by ABORT. The
 *      destination's agent lets it run only by RUN.
 *   2. The fence is one word in the source's agent: COMMIT. An agent that has taken it answers
 *      ABORT with -EPERM for ever, whichever mover asks. It lives exactly as long as the guest.
 *   3. GO is said only after the agent has answered COMMIT with 0, and RUN is asked only after GO.
 *      So RUN comes after COMMIT, and ABORT never after COMMIT.
 *   4. Until it has said READY the destination gives up by itself at the first cut: no GO can be on
 *      its way. Once it has said READY it can't know, and waits for the source's word however long
 *      that takes. A side that does not know never runs the guest and never kills it.
 *   5. The source gives up at the first cut until COMMIT was asked for. While the agent's answer is
 *      on its way nothing is decided; the answer decides. If the source gave up after the
 *      destination may have said READY, it goes on trying to tell it for a while.
 *   6. End of file, a reset and silence say nothing about the other side but that it can't be
 *      heard. Nothing here takes them for consent, for success or for the other's death.
 *
 * The price: if source and destination lose each other for good between READY and GO, the guest
 * stands still at the destination as well if the source has committed, else it runs at the source,
 * and its paused copy is ended by hand.
 *
 * The source's VMM is ended by memd only after PROVEN: the sums of both sides agree for every page,
 * and the destination has said that the guest runs.
 */
#include "session.h"

#include <assert.h>
#include <errno.h>

/* ---- saying what to do ---- */

static void act(struct session *session, struct session_action action)
{
    assert(session->action_count < SESSION_ACTIONS_MAX);
    session->actions[session->action_count++] = action;
}

static void do_it(struct session *session, enum session_action_type type)
{
    act(session, (struct session_action){.type = type});
}

static void say(struct session *session, enum peer_type frame, int value)
{
    act(session, (struct session_action){.type = ACTION_SAY, .frame = frame, .value = value});
}

static void ask(struct session *session, uint32_t what)
{
    act(session, (struct session_action){.type = ACTION_ASK, .what = what});
}

static void end(struct session *session, enum session_outcome outcome)
{
    session->state = SESSION_OVER;
    session->outcome = outcome;
    do_it(session, ACTION_END);
}

/* ---- giving up before the commit ---- */

static void abort_source(struct session *session, enum session_outcome outcome, int error)
{
    session->outcome = outcome;
    session->error = error;
    session->state = SOURCE_ABORTING;
    ask(session, MOVER_ABORT);
}

/* The guest runs again. If the VMM can't let it, nobody can: the destination never may. */
static void source_is_aborted(struct session *session, int result)
{
    if (result && session->stopped) {
        session->outcome = OUTCOME_GUEST_LOST;
        session->error = result;
    }
    if (session->linked)
        say(session, PEER_ABORT, session->error);
    if (session->linked || !session->peer_waits) {
        end(session, session->outcome);
        return;
    }
    session->state = SOURCE_TELLING;
    do_it(session, ACTION_CONNECT);
}

/* The VMM that was started is ended by memd, whatever its agent says. */
static void abort_destination(struct session *session, enum session_outcome outcome, int error)
{
    session->error = error;
    if (session->linked)
        say(session, PEER_ABORT, error);
    end(session, outcome);
}

/* ---- source ---- */

static void source_when_linked(struct session *session)
{
    if (session->state == SOURCE_CONNECTING) {
        session->linked = true;
        session->state = SOURCE_ASKING;
        say(session, PEER_HELLO, 0);
    } else if (session->state == SOURCE_COMMITTED || session->state == SOURCE_PROVEN ||
               session->state == SOURCE_TELLING) {
        say(session, PEER_RESUME, (int)session_stand(session));
        if (session->state == SOURCE_TELLING)
            end(session, session->outcome);
    }
}

static void source_when_cut(struct session *session, int error)
{
    session->linked = session->data_linked = false;
    do_it(session, ACTION_DROP_LINKS);
    switch (session->state) {
    case SOURCE_ABORTING:
    case SOURCE_COMMITTING: break; /* what comes of it is seen when the agent has answered */
    case SOURCE_TELLING: do_it(session, ACTION_CONNECT); break;
    case SOURCE_PROVEN: end(session, OUTCOME_COMPLETED); break;
    case SOURCE_COMMITTED:
        ask(session, MOVER_UNLINK);
        do_it(session, ACTION_CONNECT);
        break;
    default:
        session->was_cut = true;
        abort_source(session, OUTCOME_SOURCE_RUNS, error);
        break;
    }
}

/* Its own agent's word counts; the destination's brings the figures. Pages that are all there are
 * not enough: the destination must have said that the guest runs. */
static void source_has_proof(struct session *session)
{
    if (!session->proven || !session->committed || !session->peer_runs)
        return;
    session->state = SOURCE_PROVEN;
    if (session->proof_heard)
        say(session, PEER_BYE, 0);
    if (session->proof_heard || !session->linked)
        end(session, OUTCOME_COMPLETED);
}

/* The CPU and the link were for the switch-over until now. */
static void source_hears_it_runs(struct session *session)
{
    if (!session->peer_runs)
        ask(session, MOVER_PUSH);
    session->peer_runs = true;
}

/* After a cut: where the destination stands. The source has committed. */
static void source_hears_stand(struct session *session, enum peer_stand stand)
{
    session->linked = true;
    if (stand == PEER_RUNS || stand == PEER_HAS_ALL)
        source_hears_it_runs(session);
    if (stand == PEER_WAITS)
        say(session, PEER_GO, 0);
    do_it(session, ACTION_CONNECT_DATA);
    source_has_proof(session);
}

static void source_should_stop(struct session *session)
{
    if (session->state != SOURCE_PRECOPY)
        return;
    session->state = SOURCE_STOPPING;
    session->stopped = true;
    ask(session, MOVER_STOP);
}

static void source_links(struct session *session)
{
    if (session->state != SOURCE_LINKING || !session->data_linked || !session->expecting ||
        !session->prepared)
        return;
    session->state = SOURCE_PRECOPY;
    if (session->at_once)
        source_should_stop(session);
    else
        ask(session, MOVER_START_PRECOPY);
}

static void source_hears(struct session *session, const struct session_event *event)
{
    enum session_state state = session->state;

    if (event->frame == PEER_OK && state == SOURCE_ASKING) {
        session->state = SOURCE_LINKING;
        ask(session, MOVER_SET_SESSION);
        do_it(session, ACTION_CONNECT_DATA);
    } else if (event->frame == PEER_EXPECTING && state == SOURCE_LINKING) {
        session->expecting = true;
        source_links(session);
    } else if (event->frame == PEER_READY && state == SOURCE_OFFERED) {
        session->state = SOURCE_COMMITTING;
        ask(session, MOVER_COMMIT);
    } else if (event->frame == PEER_RESUME && state == SOURCE_COMMITTED) {
        source_hears_stand(session, (enum peer_stand)event->value);
    } else if (event->frame == PEER_PROVEN && session->committed) {
        session->proof_heard = true;
        source_hears_it_runs(session);
        source_has_proof(session);
    } else if (event->frame == PEER_RUNNING && session->committed) {
        source_hears_it_runs(session);
        source_has_proof(session);
    } else if (event->frame == PEER_ABORT && session->committed) {
        session->error = event->value ? event->value : -ECONNABORTED;
        end(session, OUTCOME_GUEST_LOST); /* it can't let the guest run */
    } else if ((event->frame == PEER_REFUSED || event->frame == PEER_ABORT) &&
               state < SOURCE_COMMITTING) {
        session->peer_waits = false; /* it need not be told */
        abort_source(session, OUTCOME_SOURCE_RUNS, event->value ? event->value : -ECONNABORTED);
    } else if (state != SOURCE_ABORTING && state != SOURCE_PROVEN) {
        source_when_cut(session, -EPROTO); /* it says what can't be */
    }
}

static void source_committed(struct session *session, int result)
{
    if (result) {
        abort_source(session, OUTCOME_SOURCE_RUNS, result);
        return;
    }
    session->committed = true;
    session->state = SOURCE_COMMITTED;
    if (session->linked) {
        say(session, PEER_GO, 0);
    } else { /* cut while the agent was asked */
        ask(session, MOVER_UNLINK);
        do_it(session, ACTION_CONNECT);
    }
}

static void source_saved(struct session *session)
{
    session->state = SOURCE_OFFERED;
    session->peer_waits = true;
    do_it(session, ACTION_SEND_STATE);
}

/* An agent that refuses what it was asked for in order: before the commit it is given up, after it
 * the links are made anew. */
static void source_is_refused(struct session *session, int result)
{
    if (session->state == SOURCE_COMMITTED)
        source_when_cut(session, result);
    else if (session->state < SOURCE_COMMITTING)
        abort_source(session, OUTCOME_SOURCE_RUNS, result);
}

static void source_done(struct session *session, uint32_t what, int result)
{
    if (what == MOVER_COMMIT && session->state == SOURCE_COMMITTING)
        source_committed(session, result);
    else if (what == MOVER_ABORT && session->state == SOURCE_ABORTING)
        source_is_aborted(session, result);
    else if (what == MOVER_UNLINK)
        return; /* there may have been no link */
    else if (result)
        source_is_refused(session, result);
    else if (what == MOVER_SET_SESSION) {
        session->prepared = true;
        source_links(session);
    } else if (what == MOVER_STOP && session->state == SOURCE_STOPPING) {
        session->state = SOURCE_SAVING;
        ask(session, MOVER_SAVE);
    } else if (what == MOVER_SAVE && session->state == SOURCE_SAVING) {
        source_saved(session);
    }
}

/* Most likely the VMM has ended, and with it what it still had of the guest. A guest that was not
 * stopped by us has lost its agent, not its life. */
static void source_lost_agent(struct session *session)
{
    bool whole = session->state == SOURCE_PROVEN;

    if (session->linked && !session->committed)
        say(session, PEER_ABORT, -EOWNERDEAD);
    session->error = -EOWNERDEAD;
    end(session, whole              ? OUTCOME_COMPLETED
                 : session->stopped ? OUTCOME_GUEST_LOST
                                    : OUTCOME_SOURCE_RUNS);
}

static void source_is_late(struct session *session)
{
    if (session->state == SOURCE_TELLING || session->state == SOURCE_PROVEN)
        end(session, session->state == SOURCE_PROVEN ? OUTCOME_COMPLETED : session->outcome);
    else if (session->state < SOURCE_COMMITTING && session->state != SOURCE_PRECOPY)
        abort_source(session, OUTCOME_SOURCE_RUNS, -ETIMEDOUT);
}

/* In pure pre-copy the proof may come before the commit. */
static void source_proven(struct session *session, int result)
{
    if (result && session->state < SOURCE_COMMITTING) {
        abort_source(session, OUTCOME_SOURCE_RUNS, result);
    } else if (result && session->committed) {
        session->error = result;
        end(session, OUTCOME_GUEST_LOST);
    } else if (!result) {
        session->proven = true;
        source_has_proof(session);
    }
}

static void take_at_source(struct session *session, const struct session_event *event)
{
    switch (event->type) {
    case EVENT_LINKED: source_when_linked(session); break;
    case EVENT_CUT: source_when_cut(session, event->value); break;
    case EVENT_DATA_LINKED:
        session->data_linked = true;
        do_it(session, ACTION_LINK);
        source_links(session);
        break;
    case EVENT_FRAME: source_hears(session, event); break;
    case EVENT_DONE: source_done(session, event->what, event->value); break;
    case EVENT_PROVEN: source_proven(session, event->value); break;
    case EVENT_AGENT_GONE: source_lost_agent(session); break;
    case EVENT_SHOULD_STOP: source_should_stop(session); break;
    case EVENT_CANCEL:
        if (session_may_cancel(session))
            abort_source(session, OUTCOME_CANCELLED, -ECANCELED);
        break;
    case EVENT_LATE: source_is_late(session); break;
    default: break;
    }
}

/* ---- destination ---- */

static void destination_when_linked(struct session *session)
{
    session->linked = session->state == DESTINATION_WAITING;
}

static void destination_when_cut(struct session *session, int error)
{
    session->linked = session->data_linked = false;
    do_it(session, ACTION_DROP_LINKS);
    if (session->state < DESTINATION_READY)
        abort_destination(session, OUTCOME_SOURCE_RUNS, error);
    else
        ask(session, MOVER_UNLINK);
    if (session->state == DESTINATION_RUNNING)
        ask(session, MOVER_HOLD);
}

static void destination_goes_on(struct session *session)
{
    if (session->held)
        ask(session, MOVER_GO);
    session->held = false;
}

/* A guest that waits for pages from a host that can't be heard is better stopped as a whole; where
 * the VMM can't stop it (a vCPU waits for a page), it runs on until it needs one. */
static void destination_is_held(struct session *session)
{
    session->held = true;
    if (session->data_linked || session->state != DESTINATION_RUNNING)
        destination_goes_on(session);
}

/* State and map are here, and the state is loaded: the guest could run. */
static void destination_is_whole(struct session *session)
{
    if (session->all_first && !session->proven)
        return;
    session->state = DESTINATION_READY;
    say(session, PEER_READY, 0);
}

static void destination_fills(struct session *session)
{
    if (session->state != DESTINATION_FILLING || !session->mapped || !session->state_here)
        return;
    session->state = DESTINATION_LOADING;
    session->loaded = false;
    ask(session, MOVER_LOAD);
}

static void destination_may_run(struct session *session)
{
    session->state = DESTINATION_RESUMING;
    ask(session, MOVER_RUN);
}

/* After a cut: the source's word. The connections for the pages follow. */
static void destination_hears_stand(struct session *session, enum peer_stand stand)
{
    session->linked = true;
    if (stand == PEER_BEFORE_COMMIT && session->state == DESTINATION_READY) {
        abort_destination(session, OUTCOME_SOURCE_RUNS, -ECONNABORTED);
        return;
    }
    if (stand != PEER_COMMITTED && stand != PEER_HAS_ALL) {
        destination_when_cut(session, -EPROTO);
        return;
    }
    say(session, PEER_RESUME, (int)session_stand(session));
    if (session->state == DESTINATION_PROVEN)
        say(session, PEER_PROVEN, 0);
}

static void destination_hears(struct session *session, const struct session_event *event)
{
    enum session_state state = session->state;

    if (event->frame == PEER_HELLO && state == DESTINATION_WAITING) {
        session->state = DESTINATION_STARTING;
        do_it(session, ACTION_NEED_GUEST);
    } else if (event->frame == PEER_GO && state == DESTINATION_READY && session->linked) {
        destination_may_run(session);
    } else if (event->frame == PEER_GO && state > DESTINATION_READY) {
        return; /* said again after a cut */
    } else if (event->frame == PEER_RESUME && state >= DESTINATION_READY) {
        destination_hears_stand(session, (enum peer_stand)event->value);
    } else if (event->frame == PEER_ABORT && state <= DESTINATION_READY) {
        session->linked = false; /* no answer */
        abort_destination(session, OUTCOME_SOURCE_RUNS,
                          event->value ? event->value : -ECONNABORTED);
    } else if (event->frame == PEER_BYE && state == DESTINATION_PROVEN) {
        end(session, OUTCOME_COMPLETED);
    } else {
        destination_when_cut(session, -EPROTO);
    }
}

static void destination_has_guest(struct session *session, int result)
{
    if (session->state != DESTINATION_STARTING)
        return;
    if (result) {
        session->error = result;
        if (session->linked)
            say(session, PEER_REFUSED, result);
        end(session, OUTCOME_SOURCE_RUNS);
        return;
    }
    session->state = DESTINATION_LINKING;
    ask(session, MOVER_SET_SESSION);
    say(session, PEER_OK, 0);
}

static void destination_is_proven(struct session *session)
{
    session->state = DESTINATION_PROVEN;
    destination_goes_on(session);
    if (session->linked)
        say(session, PEER_PROVEN, 0);
}

static void destination_runs(struct session *session, int result)
{
    if (result) {
        session->error = result;
        if (session->linked)
            say(session, PEER_ABORT, result);
        end(session, OUTCOME_GUEST_LOST);
        return;
    }
    session->state = DESTINATION_RUNNING;
    if (session->linked)
        say(session, PEER_RUNNING, 0);
    if (session->proven)
        destination_is_proven(session);
}

static void destination_is_refused(struct session *session, int result)
{
    if (session->state < DESTINATION_READY)
        abort_destination(session, OUTCOME_SOURCE_RUNS, result);
    else if (session->state < DESTINATION_PROVEN)
        destination_when_cut(session, result);
}

static void destination_done(struct session *session, uint32_t what, int result)
{
    if (what == MOVER_RUN && session->state == DESTINATION_RESUMING)
        destination_runs(session, result);
    else if (what == MOVER_UNLINK || (what == MOVER_HOLD && result))
        return;
    else if (what == MOVER_HOLD)
        destination_is_held(session);
    else if (result)
        destination_is_refused(session, result);
    else if (what == MOVER_EXPECT && session->state == DESTINATION_EXPECTING) {
        session->state = DESTINATION_FILLING;
        say(session, PEER_EXPECTING, 0);
    } else if (what == MOVER_LOAD && session->state == DESTINATION_LOADING) {
        session->loaded = true;
        destination_is_whole(session);
    }
}

static void destination_links(struct session *session)
{
    session->data_linked = true;
    do_it(session, ACTION_LINK);
    destination_goes_on(session);
    if (session->state != DESTINATION_LINKING)
        return;
    session->state = DESTINATION_EXPECTING;
    ask(session, MOVER_EXPECT);
}

static void destination_proven(struct session *session, int result)
{
    if (result && session->state < DESTINATION_READY) {
        abort_destination(session, OUTCOME_SOURCE_RUNS, result);
        return;
    }
    if (result) {
        session->error = result;
        end(session, OUTCOME_GUEST_LOST);
        return;
    }
    session->proven = true;
    if (session->state == DESTINATION_LOADING && session->loaded)
        destination_is_whole(session);
    if (session->state == DESTINATION_RUNNING)
        destination_is_proven(session);
}

static void destination_lost_agent(struct session *session)
{
    session->error = -EOWNERDEAD;
    if (session->linked && session->state < DESTINATION_PROVEN)
        say(session, PEER_ABORT, -EOWNERDEAD);
    if (session->state <= DESTINATION_READY)
        end(session, OUTCOME_SOURCE_RUNS);
    else
        end(session, session->state == DESTINATION_PROVEN ? OUTCOME_COMPLETED : OUTCOME_GUEST_LOST);
}

static void take_at_destination(struct session *session, const struct session_event *event)
{
    switch (event->type) {
    case EVENT_LINKED: destination_when_linked(session); break;
    case EVENT_CUT: destination_when_cut(session, event->value); break;
    case EVENT_DATA_LINKED: destination_links(session); break;
    case EVENT_FRAME: destination_hears(session, event); break;
    case EVENT_DONE: destination_done(session, event->what, event->value); break;
    case EVENT_MAPPED:
        session->mapped = true;
        destination_fills(session);
        break;
    case EVENT_STATE_HERE:
        session->state_here = true;
        destination_fills(session);
        break;
    case EVENT_PROVEN: destination_proven(session, event->value); break;
    case EVENT_AGENT_GONE: destination_lost_agent(session); break;
    case EVENT_GUEST: destination_has_guest(session, event->value); break;
    case EVENT_CANCEL:
        if (session_may_cancel(session))
            abort_destination(session, OUTCOME_CANCELLED, -ECANCELED);
        break;
    case EVENT_LATE:
        if (session->state == DESTINATION_PROVEN)
            end(session, OUTCOME_COMPLETED);
        else if (session->state <= DESTINATION_LINKING)
            abort_destination(session, OUTCOME_SOURCE_RUNS, -ETIMEDOUT);
        break;
    default: break;
    }
}

/* ---- both ---- */

void session_start(struct session *session, enum mover_role role, bool all_first)
{
    *session = (struct session){.role = role, .all_first = all_first};
    session->state = role == MOVER_SOURCE ? SOURCE_CONNECTING : DESTINATION_WAITING;
    if (role == MOVER_SOURCE)
        do_it(session, ACTION_CONNECT);
}

static void resume_source(struct session *session, enum mover_phase phase)
{
    session->peer_waits = session->stopped = phase == MOVER_PHASE_STOPPED;
    session->committed = phase == MOVER_PHASE_COMMITTED;
    if (!session->committed) {
        session->was_cut = true;
        abort_source(session, OUTCOME_SOURCE_RUNS, -EINTR);
        return;
    }
    session->state = SOURCE_COMMITTED;
    ask(session, MOVER_UNLINK);
    do_it(session, ACTION_CONNECT);
}

/* What has been loaded may have been said READY of: it waits for the source's word. */
static void resume_destination(struct session *session, enum mover_phase phase)
{
    if (phase != MOVER_PHASE_LOADED && phase != MOVER_PHASE_RUNNING) {
        session->state = DESTINATION_STARTING;
        abort_destination(session, OUTCOME_SOURCE_RUNS, -EINTR);
        return;
    }
    session->mapped = session->state_here = session->loaded = true;
    session->state = phase == MOVER_PHASE_LOADED ? DESTINATION_READY
                     : session->proven           ? DESTINATION_PROVEN
                                                 : DESTINATION_RUNNING;
    ask(session, MOVER_UNLINK);
    if (session->state == DESTINATION_PROVEN)
        destination_goes_on(session);
}

void session_resume(struct session *session, enum mover_role role, enum mover_phase phase,
                    bool proven, bool held)
{
    *session = (struct session){.role = role, .proven = proven};
    session->held = held && phase == MOVER_PHASE_RUNNING;
    if (role == MOVER_SOURCE)
        resume_source(session, phase);
    else
        resume_destination(session, phase);
}

void session_take(struct session *session, const struct session_event *event)
{
    session->action_count = 0;
    if (session->state == SESSION_OVER)
        return;
    if (session->role == MOVER_SOURCE)
        take_at_source(session, event);
    else
        take_at_destination(session, event);
}

bool session_is_committed(const struct session *session)
{
    if (session->role == MOVER_SOURCE)
        return session->committed;
    return session->state >= DESTINATION_READY && session->state < SESSION_OVER;
}

enum peer_stand session_stand(const struct session *session)
{
    if (session->role == MOVER_SOURCE)
        return !session->committed ? PEER_BEFORE_COMMIT
               : session->proven   ? PEER_HAS_ALL
                                   : PEER_COMMITTED;
    return session->state == DESTINATION_PROVEN  ? PEER_HAS_ALL
           : session->state == DESTINATION_READY ? PEER_WAITS
                                                 : PEER_RUNS;
}

bool session_may_cancel(const struct session *session)
{
    if (session->role == MOVER_SOURCE)
        return session->state < SOURCE_COMMITTING;
    return session->state >= DESTINATION_WAITING && session->state < DESTINATION_READY;
}

const char *session_state_name(enum session_state state)
{
    static const char *const names[] = {
        "connecting", "asking",     "linking",  "precopy",   "stopping", "saving",
        "offered",    "committing", "postcopy", "proven",    "aborting", "telling",
        "waiting",    "starting",   "linking",  "expecting", "filling",  "loading",
        "ready",      "resuming",   "postcopy", "proven",    "over"};

    static_assert(sizeof(names) / sizeof(names[0]) == SESSION_STATE_COUNT, "a name for each state");
    return names[state];
}
