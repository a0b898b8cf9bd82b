/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sequence of a migration as a pure state machine, both sides. It is told what happened and
 * says what to do; it does nothing itself, reads no clock and knows no descriptor. session.c opens
 * with the rules that it keeps.
 */
#ifndef MEMD_POSTCOPY_MOVER_SESSION_H
#define MEMD_POSTCOPY_MOVER_SESSION_H

#include "mover_protocol.h"
#include "peer.h"

enum session_state {
    /* source */
    SOURCE_CONNECTING, /* control is being made */
    SOURCE_ASKING,     /* HELLO was said */
    SOURCE_LINKING,    /* urgent and bulk are being made */
    SOURCE_PRECOPY,    /* the guest runs, pass after pass */
    SOURCE_STOPPING,   /* the guest stops, the final map is written */
    SOURCE_SAVING,
    SOURCE_OFFERED,    /* the state is on its way: READY is waited for */
    SOURCE_COMMITTING, /* the agent was asked; its answer decides */
    SOURCE_COMMITTED,
    SOURCE_PROVEN,   /* every page is there and right; the destination's figures may still come */
    SOURCE_ABORTING, /* the agent lets the guest run on */
    SOURCE_TELLING,  /* the destination waits for a GO that never comes: it is to hear that */
    /* destination */
    DESTINATION_WAITING,  /* for HELLO */
    DESTINATION_STARTING, /* memd starts the VMM */
    DESTINATION_LINKING,
    DESTINATION_EXPECTING,
    DESTINATION_FILLING, /* pages, map and state come */
    DESTINATION_LOADING,
    DESTINATION_READY, /* from here on only the source decides */
    DESTINATION_RESUMING,
    DESTINATION_RUNNING,
    DESTINATION_PROVEN,
    SESSION_OVER,
    SESSION_STATE_COUNT
};

enum session_outcome {
    OUTCOME_NONE,
    OUTCOME_COMPLETED,
    OUTCOME_SOURCE_RUNS, /* it failed, and the guest goes on where it was */
    OUTCOME_GUEST_LOST,  /* it runs nowhere, or with bytes that nobody vouches for */
    OUTCOME_CANCELLED,
    OUTCOME_COUNT
};

enum session_event_type {
    EVENT_LINKED,      /* control is up (again) */
    EVENT_CUT,         /* a connection has ended; all of them are closed now. value: -errno */
    EVENT_DATA_LINKED, /* urgent and bulk are up (again) */
    EVENT_FRAME,       /* from the peer: frame, value */
    EVENT_DONE,        /* from the agent: what, value = result */
    EVENT_MAPPED,
    EVENT_PROVEN, /* from the agent; value = result */
    EVENT_AGENT_GONE,
    EVENT_SHOULD_STOP, /* enough of pre-copy */
    EVENT_STATE_HERE,  /* destination: all of the state has come */
    EVENT_GUEST,       /* destination: the VMM is there and fits (0), or not (-errno) */
    EVENT_CANCEL,
    EVENT_LATE, /* a step has taken longer than any should */
};

struct session_event {
    enum session_event_type type;
    enum peer_type frame;
    uint32_t what;
    int value; /* EVENT_FRAME: of RESUME the stand */
};

enum session_action_type {
    ACTION_CONNECT,      /* source: control, as often as it takes once it has committed */
    ACTION_CONNECT_DATA, /* source: urgent and bulk */
    ACTION_DROP_LINKS,   /* close whatever is open towards the peer */
    ACTION_SAY,          /* a frame to the peer: frame, value */
    ACTION_ASK,          /* a request to the agent: what */
    ACTION_LINK,         /* both data connections to the agent */
    ACTION_SEND_STATE,   /* source: what SAVE gave */
    ACTION_NEED_GUEST,   /* destination: have the VMM started */
    ACTION_END,          /* it is over: outcome */
};

struct session_action {
    enum session_action_type type;
    enum peer_type frame;
    uint32_t what;
    int value;
};

#define SESSION_ACTIONS_MAX 8U

struct session {
    enum mover_role role;
    enum session_state state;
    enum session_outcome outcome; /* what it will be when it is over */
    bool linked;                  /* control is up, and who stands where was said */
    bool data_linked, expecting;  /* source, LINKING: both are needed, and */
    bool prepared; /* that the VMM is: what it does now needs no time when it stops */
    bool stopped;  /* source: STOP was asked for */
    bool mapped, state_here, loaded, proven;
    bool all_first;   /* pure pre-copy: every page is there before the guest runs */
    bool at_once;     /* source: no pre-copy at all */
    bool peer_waits;  /* source: the destination may have said READY */
    bool committed;   /* source */
    bool peer_runs;   /* source: the destination has said that the guest runs there */
    bool proof_heard; /* source: the destination's PROVEN has come */
    bool held;        /* destination: the guest was stopped at a cut */
    bool was_cut;     /* source: it failed for nothing but a connection, or a mover, that ended */
    int error;        /* why it failed: -errno */
    struct session_action actions[SESSION_ACTIONS_MAX];
    uint32_t action_count;
};

/* A new migration. Its first actions are there. */
void session_start(struct session *session, enum mover_role role, bool all_first);
/* Takes over from a mover that died: the agent says where it stands, whether all is proven, and
 * whether the guest is paused. */
void session_resume(struct session *session, enum mover_role role, enum mover_phase phase,
                    bool proven, bool held);
/* Takes one event. The actions of it are in `actions`, to be done in order before the next one. */
void session_take(struct session *session, const struct session_event *event);

/* True once the guest never runs at the source again: a cut is repaired, not an end. */
bool session_is_committed(const struct session *session);
/* Where this side stands, for RESUME. */
enum peer_stand session_stand(const struct session *session);
/* May it still be called off at this side? */
bool session_may_cancel(const struct session *session);
const char *session_state_name(enum session_state state);

#endif
