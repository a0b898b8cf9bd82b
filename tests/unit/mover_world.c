/* SPDX-License-Identifier: Apache-2.0 */
#include "mover_world.h"
#include "send_with.h"

#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REGION_PAGES 4096U
#define STATE_BYTES  200000U /* several frames */

/* ---- certificates ---- */

static EVP_PKEY *make_key(void)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");

    cr_assert(key);
    return key;
}

static X509 *make_certificate(EVP_PKEY *key, const char *name, X509 *issuer, EVP_PKEY *issuer_key)
{
    X509 *certificate = X509_new();
    X509_NAME *subject = X509_get_subject_name(certificate);
    X509V3_CTX context;
    X509_EXTENSION *extension;

    X509_set_version(certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), random() + 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -3600);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 86400);
    X509_set_pubkey(certificate, key);
    X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, (const unsigned char *)name, -1, -1, 0);
    X509_set_issuer_name(certificate, issuer ? X509_get_subject_name(issuer) : subject);
    X509V3_set_ctx(&context, issuer ? issuer : certificate, certificate, NULL, NULL, 0);
    extension =
        X509V3_EXT_conf_nid(NULL, &context, issuer ? NID_subject_alt_name : NID_basic_constraints,
                            issuer ? "IP:127.0.0.1" : "critical,CA:TRUE");
    X509_add_ext(certificate, extension, -1);
    X509_EXTENSION_free(extension);
    cr_assert(X509_sign(certificate, issuer_key, EVP_sha256()));
    return certificate;
}

static FILE *file_at(const struct world *world, const char *name, const char *what, char *ret_path)
{
    FILE *file;

    snprintf(ret_path, ORDERS_WORD_BYTES, "%s/%s.%s", world->dir, name, what);
    file = fopen(ret_path, "w");
    cr_assert(file);
    return file;
}

void world_certify(struct world *world, struct side *side, bool other_authority)
{
    static EVP_PKEY *authority_key;
    static X509 *authority;
    EVP_PKEY *key = make_key(), *issuer_key;
    const char *name = side->source ? "source" : "destination";
    X509 *certificate, *issuer;
    FILE *file;

    if (!authority) {
        authority_key = make_key();
        authority = make_certificate(authority_key, "authority", NULL, authority_key);
    }
    issuer_key = other_authority ? make_key() : authority_key;
    issuer = other_authority ? make_certificate(issuer_key, "other", NULL, issuer_key) : authority;
    certificate = make_certificate(key, name, issuer, issuer_key);
    file = file_at(world, name, "cert", side->start.tls_cert);
    PEM_write_X509(file, certificate);
    fclose(file);
    file = file_at(world, name, "key", side->start.tls_key);
    PEM_write_PrivateKey(file, key, NULL, NULL, 0, NULL, NULL);
    fclose(file);
    file = file_at(world, name, "ca", side->start.tls_ca);
    PEM_write_X509(file, authority);
    fclose(file);
    X509_free(certificate);
    EVP_PKEY_free(key);
    if (other_authority) {
        X509_free(issuer);
        EVP_PKEY_free(issuer_key);
    }
}

/* ---- sockets ---- */

static int listen_at(uint16_t *ret_port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t bytes = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    cr_assert_eq(bind(fd, (struct sockaddr *)&address, bytes), 0);
    cr_assert_eq(listen(fd, 16), 0);
    cr_assert_eq(getsockname(fd, (struct sockaddr *)&address, &bytes), 0);
    *ret_port = ntohs(address.sin_port);
    return fd;
}

static void pair_of(int *ret_ours, int *ret_theirs)
{
    int pair[2];

    cr_assert_eq(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
    *ret_ours = pair[0];
    *ret_theirs = pair[1];
}

static ssize_t receive(int socket, void *into, size_t room, int *ret_fd)
{
    char control[CMSG_SPACE(sizeof(int) * 4)];
    struct iovec piece = {into, room};
    struct msghdr header = {.msg_iov = &piece,
                            .msg_iovlen = 1,
                            .msg_control = control,
                            .msg_controllen = sizeof(control)};
    ssize_t got = recvmsg(socket, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    const struct cmsghdr *part = got > 0 ? CMSG_FIRSTHDR(&header) : NULL;

    *ret_fd = -1;
    if (part && part->cmsg_type == SCM_RIGHTS)
        memcpy(ret_fd, CMSG_DATA(part), sizeof(int));
    return got;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- the agent ---- */

static void agent_says_hello(struct side *side)
{
    struct mover_hello hello = {
        .header = {MOVER_HELLO, sizeof(hello)},
        .version = MOVER_VERSION,
        .role = side->start.role,
        .phase = side->phase,
        .hooks = MOVER_CAN_PAUSE | MOVER_CAN_SAVE,
        .page_bytes = 4096,
        .region_count = 1,
        .pages = side->pages,
        .epoch = side->epoch,
        .proven = side->proven,
    };
    struct mover_region region = {{MOVER_REGION, sizeof(region)}, 0, 0, 0, side->pages};

    memcpy(hello.session, side->session, sizeof(hello.session));
    cr_assert_eq(send_with(side->agent, &hello, sizeof(hello), NULL, 0, 0), 0);
    cr_assert_eq(send_with(side->agent, &region, sizeof(region), NULL, 0, 0), 0);
}

static void say_plain(struct side *side, uint32_t type)
{
    struct mover_plain plain = {{type, sizeof(plain)}};

    cr_assert_eq(send_with(side->agent, &plain, sizeof(plain), NULL, 0, 0), 0);
}

static void prove(struct side *side)
{
    struct mover_proven proven = {.header = {MOVER_PROVEN, sizeof(proven)},
                                  .pages_placed = side->pages,
                                  .faults = {.count = 3, .p50_us = 50, .max_us = 900}};

    if (side->proven)
        return;
    side->proven = true;
    cr_assert_eq(send_with(side->agent, &proven, sizeof(proven), NULL, 0, 0), 0);
}

static void answer(struct side *side, uint32_t what, int result, uint64_t value, int fd)
{
    struct mover_done done = {{MOVER_DONE, sizeof(done)}, what, result, value, 0};

    cr_assert_eq(send_with(side->agent, &done, sizeof(done), &fd, fd >= 0, 0), 0);
}

static void write_word(struct side *side, enum mover_channel channel, const char *word)
{
    if (side->links[channel] >= 0)
        (void)send(side->links[channel], word, 4, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void take_link(struct side *side, const struct mover_link *link, int *fd)
{
    close_fd(&side->links[link->channel]);
    side->links[link->channel] = *fd;
    *fd = -1;
    side->epoch = link->epoch;
    /* After a cut the destination says by itself what it has. */
    if (!side->source && side->phase == MOVER_PHASE_RUNNING && link->channel == MOVER_URGENT)
        write_word(side, MOVER_URGENT, "want");
}

static void save_state(struct side *side)
{
    int fd = memfd_create("state", MFD_CLOEXEC);

    cr_assert_eq(ftruncate(fd, STATE_BYTES), 0);
    for (uint32_t i = 0; i < STATE_BYTES; i += 4)
        cr_assert_eq(pwrite(fd, &i, 4, i), 4);
    answer(side, MOVER_SAVE, 0, STATE_BYTES, fd);
    close(fd);
}

static void check_state(const struct mover_load *load, int fd)
{
    cr_assert_eq(load->bytes, STATE_BYTES);
    for (uint32_t i = 0; i < STATE_BYTES; i += 4) {
        uint32_t value;

        cr_assert_eq(pread(fd, &value, 4, i), 4);
        cr_assert_eq(value, i);
    }
}

static int precopy(struct side *side)
{
    struct mover_progress progress = {.header = {MOVER_PROGRESS, sizeof(progress)},
                                      .phase = MOVER_PHASE_PRECOPY,
                                      .pass = 1,
                                      .pass_ended = 1,
                                      .rate = 1000};

    side->phase = MOVER_PHASE_PRECOPY;
    answer(side, MOVER_START_PRECOPY, 0, 0, -1);
    cr_assert_eq(send_with(side->agent, &progress, sizeof(progress), NULL, 0, 0), 0);
    return 1;
}

static int refuse_or(struct side *side, bool refused, enum mover_phase next)
{
    if (!refused)
        side->phase = next;
    return refused ? -EPERM : 0;
}

/* What the agent does when asked; 1: it has answered already. */
static int serve(struct side *side, uint32_t what, const void *message, int *fd)
{
    switch (what) {
    case MOVER_SET_SESSION:
        memcpy(side->session, ((const struct mover_session *)message)->session,
               sizeof(side->session));
        return 0;
    case MOVER_LINK: take_link(side, message, fd); return 0;
    case MOVER_UNLINK:
        close_fd(&side->links[0]);
        close_fd(&side->links[1]);
        return 0;
    case MOVER_START_PRECOPY: return precopy(side);
    case MOVER_STOP:
        write_word(side, MOVER_BULK, "map!");
        return refuse_or(side, false, MOVER_PHASE_STOPPED);
    case MOVER_SAVE: save_state(side); return 1;
    case MOVER_COMMIT: return refuse_or(side, side->refuses_commit, MOVER_PHASE_COMMITTED);
    case MOVER_ABORT:
        cr_assert(side->source, "the destination's agent goes with its VMM");
        return refuse_or(side, side->phase == MOVER_PHASE_COMMITTED, MOVER_PHASE_FRESH);
    case MOVER_EXPECT: return refuse_or(side, false, MOVER_PHASE_EXPECTING);
    case MOVER_LOAD:
        check_state(message, *fd);
        return refuse_or(side, side->phase != MOVER_PHASE_MAPPED, MOVER_PHASE_LOADED);
    case MOVER_RUN:
        cr_assert_eq(side->world->source.phase, MOVER_PHASE_COMMITTED, "two running copies");
        return refuse_or(side, side->phase != MOVER_PHASE_LOADED, MOVER_PHASE_RUNNING);
    default: return 0;
    }
}

static void agent_reads(struct side *side)
{
    _Alignas(8) uint8_t message[MOVER_MAX_MESSAGE];
    struct mover_header header;
    int fd, result;

    while (side->agent >= 0 && receive(side->agent, message, sizeof(message), &fd) > 0) {
        memcpy(&header, message, sizeof(header));
        cr_assert_lt(header.type, 32);
        side->asked[header.type]++;
        result = serve(side, header.type, message, &fd);
        if (result <= 0)
            answer(side, header.type, result, 0, -1);
        if (fd >= 0)
            close(fd);
    }
}

static void say_cut(struct side *side, int channel, int result)
{
    struct mover_cut cut = {.header = {MOVER_CUT, sizeof(cut)},
                            .epoch = side->epoch,
                            .channel = (uint32_t)channel,
                            .result = result};

    close_fd(&side->links[channel]);
    side->cuts++;
    cr_assert_eq(send_with(side->agent, &cut, sizeof(cut), NULL, 0, 0), 0);
}

/* "map!" on bulk; "want" and "have" on urgent stand for the pages. */
static void take_word(struct side *side, int channel, const char *word)
{
    if (!side->source && channel == MOVER_BULK && memcmp(word, "map!", 4) == 0) {
        side->phase = MOVER_PHASE_MAPPED;
        say_plain(side, MOVER_MAPPED);
    } else if (side->source && channel == MOVER_URGENT && memcmp(word, "want", 4) == 0) {
        write_word(side, MOVER_URGENT, "have");
        prove(side);
    } else if (!side->source && channel == MOVER_URGENT && memcmp(word, "have", 4) == 0) {
        prove(side);
    } else {
        cr_assert_fail("%.4s on channel %d", word, channel);
    }
}

static void links_read(struct side *side)
{
    for (int channel = 0; channel < MOVER_CHANNELS; channel++) {
        char word[4];
        ssize_t got;

        if (side->links[channel] < 0 || (!side->source && side->phase < MOVER_PHASE_EXPECTING))
            continue;
        got = recv(side->links[channel], word, sizeof(word), MSG_DONTWAIT);
        if (got == sizeof(word))
            take_word(side, channel, word);
        else if (got == 0)
            say_cut(side, channel, -EPIPE);
        else if (got < 0 && errno != EAGAIN)
            say_cut(side, channel, -errno);
    }
}

/* ---- memd ---- */

static void give_guest(struct side *side)
{
    struct order_guest guest = {.header = {ORDER_GUEST, sizeof(guest)}};

    side->needs++;
    cr_assert_eq(send_with(side->memd, &guest, sizeof(guest), &side->offered_agent, 1, 0), 0);
    close_fd(&side->offered_agent);
    agent_says_hello(side);
}

static void memd_reads(struct side *side)
{
    _Alignas(8) uint8_t message[ORDERS_MAX_MESSAGE];
    struct order_header header;
    int fd;

    while (side->memd >= 0) {
        ssize_t got = receive(side->memd, message, sizeof(message), &fd);

        if (got < 0)
            return;
        if (got == 0) {
            close_fd(&side->memd);
            return;
        }
        memcpy(&header, message, sizeof(header));
        if (header.type == ORDER_STATUS)
            memcpy(&side->status, message, sizeof(side->status));
        else if (header.type == ORDER_NEED_GUEST)
            give_guest(side);
    }
}

/* Movers outlive who started them: of a test that failed none may stay. */
static pid_t started[64];
static unsigned started_count;

void world_kill_all(void)
{
    for (unsigned i = 0; i < started_count; i++)
        kill(started[i], SIGKILL);
}

/* As memd does: heartbeats come in time on a busy machine, too. */
static void schedule(pid_t pid)
{
    struct sched_param first = {.sched_priority = 1};

    (void)sched_setscheduler(pid, SCHED_FIFO | SCHED_RESET_ON_FORK, &first);
    cr_assert_lt(started_count, sizeof(started) / sizeof(started[0]));
    started[started_count++] = pid;
}

static void start_mover(struct side *side, const int *fds, size_t count)
{
    int theirs;

    side->start.header = (struct order_header){ORDER_START, sizeof(side->start)};
    side->start.version = ORDERS_VERSION;
    side->start.plain = !side->world->tls;
    side->start.uid = side->start.gid = 65534;
    pair_of(&side->memd, &theirs);
    cr_assert_eq(send_with(side->memd, &side->start, sizeof(side->start), fds, count, 0), 0);
    side->mover = fork();
    if (side->mover == 0) {
        dup2(theirs, STDIN_FILENO);
        execl(MOVER_PATH, "memd-mover", (char *)NULL);
        _exit(127);
    }
    close(theirs);
    schedule(side->mover);
}

static int next_listener(struct side *side)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s/%s", side->world->dir,
             side->source ? "out" : "in");
    unlink(address.sun_path);
    cr_assert_eq(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    cr_assert_eq(listen(fd, 4), 0);
    return fd;
}

/* memd of the destination takes what comes to its port. */
static void accept_peer(struct world *world)
{
    struct side *side = &world->destination;
    int peer = accept4(world->listener, NULL, NULL, SOCK_CLOEXEC);

    if (peer < 0 || side->mover)
        return;
    int fds[3] = {next_listener(side), fcntl(world->data_listener, F_DUPFD_CLOEXEC, 3), peer};

    pair_of(&side->agent, &side->offered_agent);
    start_mover(side, fds, 3);
    for (int i = 0; i < 3; i++)
        close(fds[i]);
}

void world_begin(struct world *world)
{
    struct side *side = &world->source;
    int fds[2] = {next_listener(side), -1};

    pair_of(&side->agent, &fds[1]);
    strcpy(side->start.name, "moved");
    strcpy(side->start.vmm, "test");
    if (!side->start.host[0])
        strcpy(side->start.host, "127.0.0.1");
    side->start.port = world->port;
    memset(side->start.session, 7, sizeof(side->start.session));
    start_mover(side, fds, 2);
    agent_says_hello(side);
    close(fds[0]);
    close(fds[1]);
}

static void reap(struct side *side)
{
    if (side->mover > 0) {
        kill(side->mover, SIGKILL);
        waitpid(side->mover, NULL, 0);
    }
    side->mover = 0;
}

void world_replace(struct side *side)
{
    int fds[3] = {next_listener(side), -1, -1};

    reap(side);
    close_fd(&side->memd);
    close_fd(&side->agent);
    pair_of(&side->agent, &fds[1]);
    side->start.takes_over = 1;
    side->start.epoch = side->status.epoch;
    side->start.data_port = side->status.data_port;
    if (!side->source)
        fds[2] = fcntl(side->world->data_listener, F_DUPFD_CLOEXEC, 3);
    start_mover(side, fds, side->source ? 2 : 3);
    agent_says_hello(side);
    for (int i = 0; i < 3; i++)
        close_fd(&fds[i]);
}

void world_cut(struct side *side)
{
    for (int channel = 0; channel < MOVER_CHANNELS; channel++) {
        if (side->links[channel] >= 0)
            shutdown(side->links[channel], SHUT_RDWR);
    }
}

/* ---- turning ---- */

static void turn_side(struct side *side)
{
    memd_reads(side);
    agent_reads(side);
    links_read(side);
}

void world_turn(struct world *world, int wait_ms)
{
    struct timespec time = {0, wait_ms * 1000000L};

    accept_peer(world);
    turn_side(&world->source);
    turn_side(&world->destination);
    nanosleep(&time, NULL);
}

void world_until(struct world *world, const char *what, bool (*so)(struct world *world))
{
    for (int i = 0; i < 10000; i++) {
        if (so(world))
            return;
        world_turn(world, 2);
    }
    cr_assert_fail("waited in vain until %s; source: outcome %u, '%s'; destination: outcome %u, "
                   "'%s'",
                   what, world->source.status.outcome, world->source.status.words,
                   world->destination.status.outcome, world->destination.status.words);
}

static void open_side(struct world *world, struct side *side, bool source)
{
    *side = (struct side){.world = world,
                          .source = source,
                          .memd = -1,
                          .agent = -1,
                          .offered_agent = -1,
                          .links = {-1, -1},
                          .pages = REGION_PAGES};
    side->start.role = source ? MOVER_SOURCE : MOVER_DESTINATION;
    if (world->tls)
        world_certify(world, side, false);
}

void world_open(struct world *world, bool tls)
{
    *world = (struct world){.tls = tls, .dir = "/tmp/memd-mover-XXXXXX"};
    cr_assert(mkdtemp(world->dir));
    world->listener = listen_at(&world->port);
    world->data_listener = listen_at(&world->data_port);
    open_side(world, &world->source, true);
    open_side(world, &world->destination, false);
    world->destination.start.data_port = world->data_port;
}

static void close_side(struct side *side)
{
    reap(side);
    close_fd(&side->memd);
    close_fd(&side->agent);
    close_fd(&side->offered_agent);
    close_fd(&side->links[0]);
    close_fd(&side->links[1]);
}

void world_close(struct world *world)
{
    static const char *const names[] = {"out",
                                        "in",
                                        "source.cert",
                                        "source.key",
                                        "source.ca",
                                        "destination.cert",
                                        "destination.key",
                                        "destination.ca"};
    char path[128];

    close_side(&world->source);
    close_side(&world->destination);
    close_fd(&world->listener);
    close_fd(&world->data_listener);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        snprintf(path, sizeof(path), "%s/%s", world->dir, names[i]);
        unlink(path);
    }
    rmdir(world->dir);
}
