/* SPDX-License-Identifier: Apache-2.0 */
#include "link.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- certificates ---- */

struct link_tls {
    SSL_CTX *context;
};

static void last_words(char *words, size_t bytes, const char *what)
{
    const char *reason = NULL;
    unsigned long error;

    /* The newest word, unless the system has said why. */
    while ((error = ERR_get_error())) {
        reason = ERR_SYSTEM_ERROR(error) ? strerror(ERR_GET_REASON(error))
                                         : ERR_reason_error_string(error);
        if (ERR_SYSTEM_ERROR(error))
            break;
    }
    snprintf(words, bytes, "%s: %s", what, reason ? reason : "TLS failed");
    ERR_clear_error();
}

int link_tls_open(const char *cert, const char *key, const char *authority,
                  struct link_tls **ret_tls, char *words, size_t words_bytes)
{
    struct link_tls *tls = calloc(1, sizeof(*tls));
    const char *failed = NULL;

    if (!tls)
        return -ENOMEM;
    ERR_clear_error();
    tls->context = SSL_CTX_new(TLS_method());
    if (!tls->context) {
        free(tls);
        return -ENOMEM;
    }
    SSL_CTX_set_min_proto_version(tls->context, TLS1_3_VERSION);
    SSL_CTX_set_session_cache_mode(tls->context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(tls->context, 0);
    SSL_CTX_set_options(tls->context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION);
    SSL_CTX_set_mode(tls->context,
                     SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_verify(tls->context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    if (SSL_CTX_use_certificate_chain_file(tls->context, cert) != 1)
        failed = cert;
    else if (SSL_CTX_use_PrivateKey_file(tls->context, key, SSL_FILETYPE_PEM) != 1 ||
             SSL_CTX_check_private_key(tls->context) != 1)
        failed = key;
    else if (SSL_CTX_load_verify_locations(tls->context, authority, NULL) != 1)
        failed = authority;
    if (failed) {
        last_words(words, words_bytes, failed);
        link_tls_close(tls);
        return -EINVAL;
    }
    *ret_tls = tls;
    return 0;
}

void link_tls_close(struct link_tls *tls)
{
    if (tls)
        SSL_CTX_free(tls->context);
    free(tls);
}

/* The other's certificate must bear this name, or this address. */
static bool expect_name(SSL *ssl, const char *host)
{
    unsigned char address[sizeof(struct in6_addr)];

    if (inet_pton(AF_INET, host, address) == 1 || inet_pton(AF_INET6, host, address) == 1)
        return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), host) == 1;
    SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return SSL_set1_host(ssl, host) == 1 && SSL_set_tlsext_host_name(ssl, host) == 1;
}

static bool remember_print(struct link *link)
{
    X509 *certificate = SSL_get1_peer_certificate(link->ssl);
    unsigned bytes = LINK_PRINT_BYTES;
    bool good = certificate && X509_digest(certificate, EVP_sha256(), link->print, &bytes) == 1;

    X509_free(certificate);
    return good && SSL_get_verify_result(link->ssl) == X509_V_OK;
}

/* ---- making one ---- */

/* A page that is waited for is one small packet, and one lost host must not be waited for long. */
static void tune(int fd)
{
    int on = 1, unacknowledged_ms = 3000;

    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unacknowledged_ms,
                     sizeof(unacknowledged_ms));
}

static int make(struct link *link, int fd, struct link_tls *tls, uint64_t now_ns)
{
    *link = (struct link){.fd = fd, .deadline_ns = now_ns + LINK_GREETING_NS, .heard_ns = now_ns};
    link->in = malloc(LINK_BUFFER_BYTES);
    link->out = malloc(LINK_BUFFER_BYTES);
    link->ssl = tls ? SSL_new(tls->context) : NULL;
    if (!link->in || !link->out || (tls && (!link->ssl || SSL_set_fd(link->ssl, fd) != 1))) {
        link_close(link);
        return -ENOMEM;
    }
    tune(fd);
    return 0;
}

int link_connect(struct link *link, const struct sockaddr *address, socklen_t address_bytes,
                 struct link_tls *tls, const char *host, const struct peer_greeting *greeting,
                 uint64_t now_ns)
{
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), result;

    if (fd < 0)
        return -errno;
    result = make(link, fd, tls, now_ns);
    if (result)
        return result;
    link->connector = true;
    link->mine = *greeting;
    if (tls) {
        SSL_set_connect_state(link->ssl);
        if (host && !expect_name(link->ssl, host)) {
            link_close(link);
            return -EINVAL;
        }
    }
    link->state = LINK_CONNECTING;
    if (connect(fd, address, address_bytes) && errno != EINPROGRESS) {
        result = -errno;
        link_close(link);
    }
    return result;
}

int link_accept(struct link *link, int fd, struct link_tls *tls, uint64_t now_ns)
{
    int result = make(link, fd, tls, now_ns);

    if (result)
        return result;
    if (tls)
        SSL_set_accept_state(link->ssl);
    link->state = tls ? LINK_SECURING : LINK_GREETING;
    return 0;
}

/* ---- bytes ---- */

/* What an answer of OpenSSL means: -EAGAIN, or why the link has ended. */
static int tls_error(struct link *link, int answer)
{
    int error = SSL_get_error(link->ssl, answer);

    link->wants_write = error == SSL_ERROR_WANT_WRITE;
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
        return -EAGAIN;
    if (error == SSL_ERROR_SYSCALL)
        return errno ? -errno : -ECONNRESET;
    if (error == SSL_ERROR_ZERO_RETURN)
        return -ECONNRESET;
    last_words(link->why, sizeof(link->why), "TLS");
    if (SSL_get_verify_result(link->ssl) != X509_V_OK)
        snprintf(link->why, sizeof(link->why), "TLS: the other host's certificate is not good: %s",
                 X509_verify_cert_error_string(SSL_get_verify_result(link->ssl)));
    return -EKEYREJECTED;
}

/* Bytes read (at least one), or -errno; -EAGAIN: none are there. */
static ssize_t get_bytes(struct link *link, void *into, size_t bytes)
{
    ssize_t got;

    if (link->ssl) {
        ERR_clear_error();
        errno = 0;
        got = SSL_read(link->ssl, into, (int)bytes);
        if (got <= 0)
            return tls_error(link, (int)got);
    } else {
        got = recv(link->fd, into, bytes, MSG_DONTWAIT);
        if (got < 0)
            return errno == EINTR ? -EAGAIN : -errno;
        if (got == 0)
            return -ECONNRESET; /* end of file is never success */
    }
    link->bytes += (uint64_t)got;
    return got;
}

static ssize_t put_bytes(struct link *link, const void *from, size_t bytes)
{
    ssize_t done;

    if (link->ssl) {
        ERR_clear_error();
        errno = 0;
        done = SSL_write(link->ssl, from, (int)bytes);
        if (done <= 0)
            return tls_error(link, (int)done);
    } else {
        done = send(link->fd, from, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done < 0)
            return errno == EINTR ? -EAGAIN : -errno;
    }
    link->bytes += (uint64_t)done;
    return done;
}

static int flush(struct link *link)
{
    while (link->out_used) {
        ssize_t done = put_bytes(link, link->out, link->out_used);

        if (done == -EAGAIN)
            return 0;
        if (done < 0)
            return (int)done;
        link->out_used -= (size_t)done;
        memmove(link->out, link->out + done, link->out_used);
    }
    return 0;
}

/* At most up to `most` bytes are kept in `in`: what belongs to who takes over the socket stays in
 * it. */
static int fill(struct link *link, size_t most, uint64_t now_ns)
{
    while (link->in_used < most) {
        ssize_t got = get_bytes(link, link->in + link->in_used, most - link->in_used);

        if (got == -EAGAIN)
            return 0;
        if (got < 0)
            return (int)got;
        link->in_used += (size_t)got;
        link->heard_ns = now_ns;
    }
    return 0;
}

/* ---- the way up ---- */

static void queue_greeting(struct link *link)
{
    peer_greeting_encode(&link->mine, link->out + link->out_used);
    link->out_used += PEER_GREETING_BYTES;
}

static int step_connecting(struct link *link)
{
    struct pollfd one = {.fd = link->fd, .events = POLLOUT};
    int error = 0;
    socklen_t bytes = sizeof(error);

    if (poll(&one, 1, 0) <= 0)
        return -EAGAIN;
    if (getsockopt(link->fd, SOL_SOCKET, SO_ERROR, &error, &bytes))
        return -errno;
    if (error)
        return -error;
    link->state = link->ssl ? LINK_SECURING : LINK_GREETING;
    if (!link->ssl)
        queue_greeting(link);
    return 0;
}

static int step_securing(struct link *link)
{
    int answer;

    ERR_clear_error();
    errno = 0;
    answer = SSL_do_handshake(link->ssl);
    if (answer != 1)
        return tls_error(link, answer);
    link->wants_write = false;
    if (!remember_print(link))
        return -EKEYREJECTED;
    link->state = LINK_GREETING;
    if (link->connector)
        queue_greeting(link);
    return 0;
}

static void bring_up(struct link *link, uint64_t now_ns)
{
    link->state = LINK_UP;
    link->heard_ns = link->said_ns = now_ns;
}

/* An answer must be about what was asked. */
static int judge_answer(struct link *link, uint64_t now_ns)
{
    const struct peer_greeting *mine = &link->mine, *theirs = &link->theirs;

    if (theirs->channel != mine->channel || theirs->epoch != mine->epoch ||
        memcmp(theirs->session, mine->session, PEER_SESSION_BYTES) != 0)
        return -EPROTO;
    if (theirs->verdict != PEER_WELCOME)
        return -ECONNREFUSED;
    bring_up(link, now_ns);
    return 0;
}

static int step_greeting(struct link *link, uint64_t now_ns)
{
    int result = flush(link);

    if (!result)
        result = fill(link, PEER_GREETING_BYTES, now_ns);
    if (result)
        return result;
    if (link->in_used < PEER_GREETING_BYTES)
        return -EAGAIN;
    result = peer_greeting_decode(link->in, &link->theirs);
    if (result)
        return result;
    link->in_used = 0;
    if (link->connector)
        return judge_answer(link, now_ns);
    link->state = LINK_ASKED;
    return 0;
}

static int step_up(struct link *link, uint64_t now_ns)
{
    int result = flush(link);

    if (!result && link->theirs.channel == PEER_CONTROL)
        result = fill(link, LINK_BUFFER_BYTES, now_ns);
    if (!result && link->theirs.channel == PEER_CONTROL &&
        now_ns >= link->heard_ns + LINK_SILENT_NS)
        result = -ETIMEDOUT;
    return result;
}

static int step_once(struct link *link, uint64_t now_ns)
{
    switch (link->state) {
    case LINK_CONNECTING: return step_connecting(link);
    case LINK_SECURING: return step_securing(link);
    case LINK_GREETING: return step_greeting(link, now_ns);
    default: return -EAGAIN;
    }
}

int link_step(struct link *link, uint64_t now_ns)
{
    int result = 0;

    while (result == 0 && link->state != LINK_UP && link->state != LINK_ASKED)
        result = step_once(link, now_ns);
    if (link->state == LINK_UP && result == 0)
        return step_up(link, now_ns);
    if (result == -EAGAIN || result == 0)
        return now_ns >= link->deadline_ns ? -ETIMEDOUT : 0;
    return result;
}

short link_events(const struct link *link)
{
    if (link->state == LINK_CONNECTING)
        return POLLOUT;
    return (short)(POLLIN | (link->wants_write || link->out_used ? POLLOUT : 0));
}

int link_answer(struct link *link, uint32_t verdict, uint64_t now_ns)
{
    int result;

    link->mine = link->theirs;
    link->mine.verdict = verdict;
    queue_greeting(link);
    result = flush(link);
    if (!result && verdict == PEER_WELCOME)
        bring_up(link, now_ns);
    return result;
}

/* ---- frames ---- */

bool link_has_room(const struct link *link)
{
    return LINK_BUFFER_BYTES - link->out_used >= 2 * (size_t)PEER_FRAME_MAX;
}

int link_send(struct link *link, const struct peer_frame *frame, uint64_t now_ns)
{
    if (LINK_BUFFER_BYTES - link->out_used < PEER_FRAME_MAX)
        return -ENOBUFS;
    link->out_used += peer_frame_encode(frame, link->out + link->out_used);
    link->said_ns = now_ns;
    return flush(link);
}

int link_frame(struct link *link, struct peer_frame *ret_frame)
{
    int bytes = peer_frame_size(link->in, link->in_used);

    if (bytes <= 0)
        return bytes;
    return peer_frame_decode(link->in, (size_t)bytes, ret_frame) ? -EPROTO : 1;
}

void link_frame_done(struct link *link)
{
    int bytes = peer_frame_size(link->in, link->in_used);

    if (bytes <= 0)
        return;
    link->in_used -= (size_t)bytes;
    memmove(link->in, link->in + bytes, link->in_used);
}

/* ---- the end ---- */

int link_release(struct link *link)
{
    int fd = link->fd;

    link->fd = -1;
    link_close(link);
    return fd;
}

void link_close(struct link *link)
{
    if (link->ssl)
        SSL_free(link->ssl);
    if (link->fd >= 0)
        close(link->fd);
    free(link->in);
    free(link->out);
    link->ssl = NULL;
    link->fd = -1;
    link->in = link->out = NULL;
    link->in_used = link->out_used = 0;
    link->state = LINK_NONE;
}
