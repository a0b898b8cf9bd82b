/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One TCP connection between two movers, up to the moment at which it is greeted, and for the
 * control connection also afterwards: connect or accept, TLS 1.3, the greeting, then frames.
 *
 * TLS is OpenSSL's (3.0 and later): it lets us own the socket and the poll loop, and libcurl, which
 * memctl uses, brings it anyway. Both sides show a certificate of the authority that the operator
 * named; who connects also checks that the certificate bears the name that it was told to go to.
 * Nothing is resumed and there are no tickets: each connection proves itself anew.
 *
 * Nothing here blocks or waits: the owner polls for link_events() and calls link_step(). Not for
 * several threads at once, but a link that is up can be handed over to one (relay.h).
 *
 * What it does not promise: that what was sent has arrived. End of file, reset, silence and a bad
 * byte are all the same: the link has ended, with an errno that is never 0.
 */
#ifndef MEMD_POSTCOPY_MOVER_LINK_H
#define MEMD_POSTCOPY_MOVER_LINK_H

#include <openssl/ssl.h>
#include <sys/socket.h>

#include "peer.h"

#define LINK_GREETING_NS 5000000000ULL /* connect, TLS and greeting together */
#define LINK_PING_NS     100000000ULL  /* something is said at least so often */
#define LINK_SILENT_NS   300000000ULL  /* nothing was heard for so long: cut */
#define LINK_PRINT_BYTES 32            /* SHA-256 of the other's certificate */

enum link_state {
    LINK_NONE,
    LINK_CONNECTING,
    LINK_SECURING, /* TLS handshake */
    LINK_GREETING, /* who connected waits for the answer, who accepted for the greeting */
    LINK_ASKED,    /* who accepted has the greeting and owes an answer: link_answer() */
    LINK_UP,
    LINK_STATE_COUNT
};

struct link_tls;

struct link {
    int fd;
    SSL *ssl; /* NULL: plain */
    enum link_state state;
    bool connector;
    struct peer_greeting mine, theirs;
    uint8_t print[LINK_PRINT_BYTES]; /* zero without TLS */
    uint64_t deadline_ns;            /* of the greeting */
    uint64_t heard_ns, said_ns;
    uint64_t bytes;    /* both directions, in the clear */
    bool wants_write;  /* TLS can go on only when the socket takes more */
    uint8_t *in, *out; /* of LINK_BUFFER_BYTES each */
    size_t in_used, out_used;
    char why[160]; /* what TLS said when it failed; "" else */
};

#define LINK_BUFFER_BYTES (4 * (size_t)PEER_FRAME_MAX)

/* Reads certificate, key and authority (PEM). -EINVAL: one of them is no good, words says which and
 * why. */
int link_tls_open(const char *cert, const char *key, const char *authority,
                  struct link_tls **ret_tls, char *words, size_t words_bytes);
void link_tls_close(struct link_tls *tls);

/* Both make a link that is to be stepped until it is LINK_UP or LINK_ASKED. tls NULL: plain. host
 * (may be NULL): the name or address that the other's certificate must bear. link_accept() owns fd
 * also on failure. -ENOMEM and what socket() and connect() say. */
int link_connect(struct link *link, const struct sockaddr *address, socklen_t address_bytes,
                 struct link_tls *tls, const char *host, const struct peer_greeting *greeting,
                 uint64_t now_ns);
int link_accept(struct link *link, int fd, struct link_tls *tls, uint64_t now_ns);

/* What to poll its fd for. */
short link_events(const struct link *link);
/* Does what can be done now. 0, or -errno: it has ended, and is to be closed. -ETIMEDOUT: not
 * greeted in time, or silent. -EKEYREJECTED: TLS refused, `why` has the words. -ECONNREFUSED: the
 * answer to the greeting was no welcome (theirs.verdict says why). */
int link_step(struct link *link, uint64_t now_ns);

/* The answer of who accepted. PEER_WELCOME: the link is up. Any other verdict is said, and the link
 * is then to be closed. */
int link_answer(struct link *link, uint32_t verdict, uint64_t now_ns);

/* Queues a frame; -ENOBUFS when the other does not read. */
int link_send(struct link *link, const struct peer_frame *frame, uint64_t now_ns);
/* True when a frame of full size can be queued behind what waits and heartbeats. */
bool link_has_room(const struct link *link);
/* The next frame: 1; 0: none is here yet; -EPROTO. What *ret_frame points to is good until
 * link_frame_done(). */
int link_frame(struct link *link, struct peer_frame *ret_frame);
void link_frame_done(struct link *link);

/* A plain link that is up: its socket is the caller's now, and the link is closed. */
int link_release(struct link *link);
void link_close(struct link *link);

#endif
