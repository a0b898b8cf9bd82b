/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One connection of one agent: messages in, messages out, and the ring. What the messages mean is
 * in agents.c; this file moves them.
 *
 * Incoming: every message is looked up in a table (type, exact size, descriptors, state); anything
 * that is not in it ends the session. Every ring entry is copied before it is looked at.
 * Outgoing: nothing blocks. Messages that the socket can't take wait in a list, entries that the
 * ring can't take wait behind it in order, and an entry never overtakes a message that was sent
 * before it.
 *
 * A session outlives its connection until the domain has let go of its member.
 */
#ifndef MEMD_SESSION_H
#define MEMD_SESSION_H

#include "agents.h"
#include "match.h"

/* So long a connection may say no HELLO. */
#define SESSION_GREETING_NS 10000000000ULL
#define SESSION_PENDING_MAX (1U << 16) /* entries that wait for room in the ring */

enum session_state {
    SESSION_GREETING, /* connected, no HELLO yet */
    SESSION_HOLDING,  /* welcomed; says what it held under an earlier memd */
    SESSION_SERVING,
    SESSION_LEAVING, /* DETACH was sent */
    SESSION_OVER,
    SESSION_STATE_COUNT
};
#define IN_STATE(state) (1U << (state))

struct outgoing {
    struct outgoing *next;
    int fd; /* goes with it and is closed then; -1: none */
    uint32_t bytes;
    uint8_t message[];
};

struct session_message;

struct session {
    struct daemon *daemon;
    struct guest *guest; /* NULL: not greeted, or the guest is gone */
    struct ksm_member *member;
    struct loop_watch watch, writable;
    struct loop_task task;
    struct loop_timer greeting; /* a connection that says nothing goes */
    int fd;
    uid_t uid;
    pid_t pid;
    enum session_state state;
    uint64_t features;
    bool socket_ready, ring_ready, wrote;
    char lie[160]; /* found where the session can't be ended: ends it in its next step */

    struct ring *ring;
    uint32_t own_tail, own_head;
    struct ring_entry *pending; /* a queue of SESSION_PENDING_MAX */
    uint32_t pending_first, pending_count;
    struct outgoing *first_out, *last_out;
    uint32_t out_count;

    uint32_t next_page;     /* where the next managed block starts */
    pid_t scanner, handler; /* confirmed by /proc; else 0 */
    pid_t urgent;           /* likewise: answers the faults of a guest that has moved away */
    uint64_t cpu_base_ns, cpu_ns;
    bool rejoin, detached;
    /* A message that waits until the entries before it are read; the socket waits with it. */
    const struct session_message *late;
    struct message_segment late_message; /* none of them is larger */
    uint32_t late_head;
    struct session *next;
};

/* One incoming message. fds: as many as the table allows; a handler takes one by setting it -1.
 * -EPROTO ends the session with words, -EPIPE without. A handler never ends it itself. */
struct session_message {
    uint32_t type;
    uint32_t bytes;
    uint32_t states;
    uint32_t fds;
    bool after_ring; /* takes effect after every entry that was written before it */
    int (*handle)(struct session *session, const void *message, int *fds, char *words,
                  size_t words_bytes);
};
extern const struct session_message session_messages[];
extern const size_t session_message_count;

int session_start(struct daemon *daemon, int fd, uid_t uid, pid_t pid);
/* Makes ring and member; state is set by the caller. */
int session_equip(struct session *session, struct trust_domain *domain, int *ret_ring_fd);

/* Sends now, or later when the socket is full. fd stays the caller's. -ENOMEM, -EPIPE. */
int session_send(struct session *session, const void *message, uint32_t bytes, const int *fds,
                 uint32_t fd_count);
/* Work for its task. */
void session_wake(struct session *session);
/* Closes the connection; why is for the guest and the log. bad: the agent's fault. */
void session_end(struct session *session, const char *why, bool bad);
/* Frees the session once it is over and its member is gone. */
void session_free_if_done(struct session *session);

#endif
