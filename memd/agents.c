/* SPDX-License-Identifier: Apache-2.0 */
#include "agents.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon.h"
#include "host.h"
#include "log.h"
#include "session.h"

#define CONNECTIONS_MAX 4096U
/* Of those that have said no HELLO yet (no token, so anybody's), who is not root has together, and
 * each such user: nobody keeps the others' agents out. Hundreds of agents of one user that come at
 * once, as after memd was restarted, are greeted in a few turns, and who finds no room comes again
 * a second later. */
#define STRANGERS       256U
#define STRANGERS_A_UID 32U
#define ACCEPT_TURN     16
#define PERMILLE_LEAST  5U

/* ---- scanning: how often and how hard ---- */

uint32_t agents_cpu_permille(const struct daemon *daemon)
{
    uint32_t active = daemon->agents.sharing ? daemon->agents.sharing : 1;
    uint32_t permille = daemon->config.cpu_percent * 10 / active;

    return permille > PERMILLE_LEAST ? permille : PERMILLE_LEAST;
}

static void send_tune(struct session *session, uint32_t flags)
{
    const struct daemon *daemon = session->daemon;
    struct message_tune tune = {{MESSAGE_TUNE, sizeof(tune)},
                                (uint32_t)(daemon->config.revisit_s * 1000),
                                agents_cpu_permille(daemon),
                                flags,
                                0};

    (void)session_send(session, &tune, sizeof(tune), NULL, 0);
}

static bool is_welcome(const struct session *session)
{
    return session->state == SESSION_HOLDING || session->state == SESSION_SERVING;
}

void agents_tune(struct daemon *daemon)
{
    for (struct session *session = daemon->agents.first; session; session = session->next) {
        if (is_welcome(session) && session->features & FEATURE_SHARE)
            send_tune(session, 0);
    }
}

bool agents_can_move(const struct session *session)
{
    return is_welcome(session) && session->features & FEATURE_MOVE;
}

int agents_give_mover(struct guest *guest, uint32_t role, int socket)
{
    struct message_mover message = {{MESSAGE_MOVER, sizeof(message)}, role, 0};

    if (!guest->session || !is_welcome(guest->session))
        return -ENOTCONN;
    if (!agents_can_move(guest->session))
        return -EOPNOTSUPP;
    return session_send(guest->session, &message, sizeof(message), &socket, 1);
}

/* ---- HELLO ---- */

static int refuse(struct session *session, int error, const char *text)
{
    struct message_words words = {{MESSAGE_REFUSED, sizeof(words)}, (uint32_t)error, 0, ""};

    snprintf(words.text, sizeof(words.text), "%s", text);
    (void)session_send(session, &words, sizeof(words), NULL, 0);
    log_warning("agent of pid %d, uid %d was refused: %s", (int)session->pid, (int)session->uid,
                text);
    return -EPIPE;
}

/* The handler answers faults: it goes first. The scanner stays as it is. */
static void schedule_handler(const struct session *session)
{
    struct sched_param first = {.sched_priority = 1};

    if (!session->handler)
        log_detail("guest '%s': its agent's threads are not visible from here, their scheduling "
                   "stays as it is",
                   session->guest->name);
    else if (sched_setscheduler(session->handler, SCHED_FIFO | SCHED_RESET_ON_FORK, &first))
        log_detail("guest '%s': no real-time scheduling for its fault handler (%s): faults wait "
                   "longer on a busy host",
                   session->guest->name, strerror(errno));
}

static uint64_t read_threads_cpu(const struct session *session)
{
    uint64_t scanner = 0, handler = 0;

    if (session->scanner)
        (void)host_thread_cpu_ns(session->pid, session->scanner, &scanner);
    if (session->handler)
        (void)host_thread_cpu_ns(session->pid, session->handler, &handler);
    return scanner + handler;
}

uint64_t agents_cpu_ns(struct session *session)
{
    uint64_t now;

    if (session->state == SESSION_OVER || session->state == SESSION_GREETING)
        return session->cpu_ns;
    now = read_threads_cpu(session);
    /* Threads that can't be seen any more (or never could) leave what the agent said last. */
    if (now > session->cpu_base_ns && now - session->cpu_base_ns > session->cpu_ns)
        session->cpu_ns = now - session->cpu_base_ns;
    return session->cpu_ns;
}

static void adopt_threads(struct session *session, const struct message_hello *hello)
{
    pid_t scanner = (pid_t)hello->scanner_tid, handler = (pid_t)hello->handler_tid;

    session->scanner = host_process_has_thread(session->pid, scanner) ? scanner : 0;
    session->handler = host_process_has_thread(session->pid, handler) ? handler : 0;
    /* What an agent did under an earlier memd, or in an earlier session, was counted then. */
    if (hello->held || session->guest->presence == AGENT_LOST)
        session->cpu_base_ns = read_threads_cpu(session);
    schedule_handler(session);
}

static int welcome(struct session *session, int ring_fd)
{
    const struct daemon *daemon = session->daemon;
    const struct trust_domain *domain = session->member->domain;
    int fds[2] = {ring_fd, daemon->agents.userfaultfd};
    uint32_t fd_count = fds[1] >= 0 ? 2 : 1;
    struct message_welcome answer = {
        .header = {MESSAGE_WELCOME, sizeof(answer)},
        .version = PROTOCOL_VERSION,
        .guest_id = session->member->id,
        .features = session->features,
        .session = domain->session,
        .secret = domain->secret,
        .ring_bytes = RING_BYTES,
        .have_userfaultfd = fd_count == 2,
        .revisit_ms = (uint32_t)(daemon->config.revisit_s * 1000),
        .cpu_permille = agents_cpu_permille(daemon),
    };

    return session_send(session, &answer, sizeof(answer), fds, fd_count);
}

/* An agent's words for people go into logs and JSON: what is not printable ASCII becomes '?'. */
static void copy_words(char *into, size_t bytes, const char *from, size_t from_bytes)
{
    size_t length = strnlen(from, from_bytes < bytes - 1 ? from_bytes : bytes - 1);

    for (size_t i = 0; i < length; i++)
        into[i] = (char)(from[i] >= ' ' && from[i] <= '~' ? from[i] : '?');
    into[length] = '\0';
}

/* Engine and words for a guest whose agent has come. */
static void choose_engine(struct session *session, const struct message_hello *hello)
{
    struct guest *guest = session->guest;
    char reason[PROTOCOL_TEXT_BYTES];

    copy_words(reason, sizeof(reason), hello->reason, sizeof(hello->reason));
    if (session->features & FEATURE_SHARE)
        registry_set_engine(guest, ENGINE_AGENT, "");
    else if (session->daemon->config.engine == SHARING_OFF)
        registry_set_engine(guest, ENGINE_NONE, "sharing is off in memd.conf");
    else
        registry_set_engine(guest, ENGINE_KERNEL,
                            reason[0] ? reason : "memd.conf says engine = kernel");
}

static const char *hello_is_bad(const struct message_hello *hello)
{
    if (hello->magic != PROTOCOL_MAGIC)
        return "this is no agent of memd";
    if (hello->version != PROTOCOL_VERSION)
        return "this memd speaks another version of the protocol; install agent and memd together";
    if (hello->page_bytes != PAGE_BYTES)
        return "only hosts with pages of 4 KiB are served";
    return NULL;
}

static int enter(struct session *session, struct guest *guest, const struct message_hello *hello)
{
    struct daemon *daemon = session->daemon;
    struct trust_domain *domain;
    int ring_fd = -1, result;

    result = domains_for_guest(guest, session->uid, &domain);
    if (result)
        return refuse(session, -result, "memd has no room for one more trust domain");
    result = session_equip(session, domain, &ring_fd);
    if (result)
        return refuse(session, -result, "memd has no memory for one more agent");
    session->features = hello->features & FEATURE_MOVE;
    if (daemon->config.engine == SHARING_AGENT)
        session->features |= hello->features & FEATURE_SHARE;
    if (session->features & FEATURE_SHARE)
        daemon->agents.sharing++;
    adopt_threads(session, hello);
    session->state = hello->held ? SESSION_HOLDING : SESSION_SERVING;
    loop_timer_cancel(&daemon->loop, &session->greeting);
    if (!hello->held)
        registry_let_go(guest);
    copy_words(guest->vmm, sizeof(guest->vmm), hello->vmm, sizeof(hello->vmm));
    choose_engine(session, hello);
    result = welcome(session, ring_fd);
    close(ring_fd);
    return result ? -EPIPE : 0;
}

static int handle_hello(struct session *session, const void *message, int *fds, char *words,
                        size_t words_bytes)
{
    const struct message_hello *hello = message;
    struct daemon *daemon = session->daemon;
    const char *bad = hello_is_bad(hello);
    struct guest *guest;
    int result;

    (void)fds;
    (void)words;
    (void)words_bytes;
    if (bad)
        return refuse(session, EPROTO, bad);
    guest = registry_find_token(daemon, hello->token);
    if (!guest)
        return refuse(
            session, ENOENT,
            "no guest is registered under this token (memctl run registers and passes it)");
    if (guest->session)
        return refuse(session, EBUSY, "this guest has an agent already");
    if (session->pid <= 0)
        session->pid = guest->pid;
    result = registry_agent_came(guest, session, session->pid, session->uid);
    if (result)
        return refuse(session, -result, "the agent's process can't be watched");
    session->guest = guest; /* each knows the other from here on: the session may end at any time */
    result = enter(session, guest, hello);
    if (result)
        return result;
    guest->presence = AGENT_CONNECTED;
    log_notice("guest '%s': agent of pid %d said hello, domain '%s', engine %s%s%s", guest->name,
               (int)session->pid, session->member->domain->name,
               registry_engine_name(guest->engine), guest->reason[0] ? ": " : "", guest->reason);
    events_emit(
        &daemon->events, "agent_connected", guest->name,
        json_pack("{s:i,s:s}", "pid", (int)session->pid, "domain", session->member->domain->name));
    agents_tune(daemon);
    return 0;
}

/* ---- RAM ---- */

static bool overlaps(const struct guest *guest, uint64_t hva, uint32_t pages)
{
    uint64_t end = hva + (uint64_t)pages * PAGE_BYTES;

    for (uint32_t i = 0; i < guest->block_count; i++) {
        const struct guest_block *block = &guest->blocks[i];

        if (block->managed && block->pages && hva < block->hva + block->pages * PAGE_BYTES &&
            block->hva < end)
            return true;
    }
    return false;
}

static int check_ram(const struct session *session, const struct message_ram *ram, char *words,
                     size_t words_bytes)
{
    const char *wrong = NULL;
    uint64_t end;

    if (session->guest->block_count == GUEST_BLOCKS_MAX)
        wrong = "it announced more RAM blocks than memd keeps";
    else if (ram->pages == 0 || ram->hva % PAGE_BYTES ||
             !checked_add_u64(ram->hva, (uint64_t)ram->pages * PAGE_BYTES, &end))
        wrong = "it announced a RAM block that can't be";
    else if (ram->managed && ram->first_page != session->next_page)
        wrong = "its RAM block does not start where the last one ended";
    else if (ram->managed && (uint64_t)ram->first_page + ram->pages > GUEST_MAX_PAGES)
        wrong = "it announced more RAM than a guest can have";
    else if (ram->managed && overlaps(session->guest, ram->hva, ram->pages))
        wrong = "its RAM block overlaps another one";
    if (wrong)
        snprintf(words, words_bytes, "%s", wrong);
    return wrong ? -EPROTO : 0;
}

static int handle_ram(struct session *session, const void *message, int *fds, char *words,
                      size_t words_bytes)
{
    const struct message_ram *ram = message;
    struct guest *guest = session->guest;
    struct guest_block *block;
    bool had_room = session->member->pages == session->member->announced;
    int result = check_ram(session, ram, words, words_bytes);

    (void)fds;
    if (result)
        return result;
    if (ram->managed) {
        if (ksm_member_grow(session->member, ram->first_page + ram->pages) && had_room)
            log_warning(
                "guest '%s': its trust domain has no room to know all of its RAM: what lies "
                "behind the first %u pages is not shared",
                guest->name, session->member->pages);
        session->next_page = ram->first_page + ram->pages;
        guest->account.managed_pages += ram->pages;
        guest->places_stated = false;
    }
    block = &guest->blocks[guest->block_count++];
    *block = (struct guest_block){ram->first_page, ram->pages, ram->hva, ram->managed != 0, ""};
    copy_words(block->reason, sizeof(block->reason), ram->reason, sizeof(ram->reason));
    return 0;
}

static int handle_ram_gone(struct session *session, const void *message, int *fds, char *words,
                           size_t words_bytes)
{
    const struct message_ram_gone *gone = message;
    struct guest *guest = session->guest;

    (void)fds;
    for (uint32_t i = 0; i < guest->block_count; i++) {
        struct guest_block *block = &guest->blocks[i];

        if (!block->managed || block->first_page != gone->first_page || block->pages != gone->pages)
            continue;
        if (ksm_member_pages_gone(session->member, gone->first_page,
                                  gone->first_page + gone->pages)) {
            snprintf(words, words_bytes, "memd has no memory to note that RAM has gone");
            return -EPROTO;
        }
        guest->account.managed_pages -= gone->pages;
        guest->places_stated = false;
        *block = guest->blocks[--guest->block_count];
        return 0;
    }
    snprintf(words, words_bytes, "the RAM block that it says is gone was never there");
    return -EPROTO;
}

/* ---- segments ---- */

static int handle_dropped(struct session *session, const void *message, int *fds, char *words,
                          size_t words_bytes)
{
    const struct message_segment *dropped = message;
    struct trust_domain *domain = session->member->domain;
    struct ksm_segment *segment = ksm_store_segment(&domain->store, dropped->segment);

    (void)fds;
    if (!segment || segment->state != SEGMENT_DROPPING ||
        !ksm_member_holds(session->member, dropped->segment)) {
        snprintf(words, words_bytes, "it dropped segment %u without being asked", dropped->segment);
        return -EPROTO;
    }
    ksm_member_clear_holds(session->member, segment);
    trust_domain_dropped(domain, segment);
    return 0;
}

static int handle_held(struct session *session, const void *message, int *fds, char *words,
                       size_t words_bytes)
{
    const struct message_segment *held = message;
    struct trust_domain *domain = session->member->domain;
    int result = trust_domain_take_back(domain, held->segment, held->pages, fds[0]);

    (void)words;
    (void)words_bytes;
    if (result == 0)
        fds[0] = -1;
    if (result == 0 || result == -EEXIST) {
        trust_domain_held(session->member, ksm_store_segment(&domain->store, held->segment));
        return 0;
    }
    if (!is_welcome(session))
        return 0; /* it has been told to start afresh */
    /* It is not what the records say, or they are lost. */
    log_warning("guest '%s': segment %u can't be taken back (%s): its pages become private",
                session->guest->name, held->segment, strerror(-result));
    /* Who can't be told has hung up, and what it has said of the segment is still in the ring: that
     * is no lie. */
    return agents_detach(session->guest, true, "memd does not know a segment that you hold")
               ? -EPIPE
               : 0;
}

static int handle_held_end(struct session *session, const void *message, int *fds, char *words,
                           size_t words_bytes)
{
    (void)message;
    (void)fds;
    (void)words;
    (void)words_bytes;
    if (session->state != SESSION_HOLDING)
        return 0;
    session->state = SESSION_SERVING;
    registry_let_go(session->guest);
    log_notice("guest '%s': %llu shared pages taken back", session->guest->name,
               (unsigned long long)session->member->shared);
    trust_domain_retire_soon(session->member->domain);
    return 0;
}

/* ---- the rest ---- */

static int handle_detached(struct session *session, const void *message, int *fds, char *words,
                           size_t words_bytes)
{
    (void)message;
    (void)fds;
    (void)words;
    (void)words_bytes;
    session->detached = true;
    return -EPIPE;
}

static void say_state(struct guest *guest, enum agent_state before, enum agent_state now,
                      const char *reason)
{
    static const char *const events[AGENT_STATE_COUNT] = {"agent_resumed", "agent_standing_down",
                                                          "agent_gave_up"};

    if (before == now)
        return;
    log_notice("guest '%s': its agent %s%s%s", guest->name,
               now == AGENT_ACTIVE          ? "shares again"
               : now == AGENT_STANDING_DOWN ? "stands down, nothing is shared meanwhile"
                                            : "has given up, nothing will be shared",
               reason[0] ? ": " : "", reason);
    events_emit(&guest->daemon->events, events[now], guest->name,
                json_pack("{s:s}", "reason", reason));
}

static int handle_stats(struct session *session, const void *message, int *fds, char *words,
                        size_t words_bytes)
{
    const struct message_stats *stats = message;
    struct guest *guest = session->guest;
    enum agent_state before =
        guest->has_stats ? (enum agent_state)guest->stats.state : AGENT_ACTIVE;

    (void)fds;
    if (stats->state >= AGENT_STATE_COUNT) {
        snprintf(words, words_bytes, "it is in no state that there is");
        return -EPROTO;
    }
    if (!ledger_state_places(&session->daemon->ledger, &guest->account, stats->places)) {
        snprintf(words, words_bytes,
                 "the places of its pages do not sum to the %llu pages that are managed",
                 (unsigned long long)guest->account.managed_pages);
        events_emit(&session->daemon->events, "ledger_mismatch", guest->name,
                    json_pack("{s:I}", "managed_pages", (json_int_t)guest->account.managed_pages));
        return -EPROTO;
    }
    guest->stats = *stats;
    copy_words(guest->stats.reason, sizeof(guest->stats.reason), stats->reason,
               sizeof(stats->reason));
    guest->has_stats = guest->places_stated = true;
    if (!session->scanner && !session->handler)
        session->cpu_ns = stats->cpu_ns;
    say_state(guest, before, (enum agent_state)stats->state, guest->stats.reason);
    session->ring_ready = true;
    return 0;
}

static int handle_doorbell(struct session *session, const void *message, int *fds, char *words,
                           size_t words_bytes)
{
    (void)message;
    (void)fds;
    (void)words;
    (void)words_bytes;
    session->ring_ready = true;
    return 0;
}

/* As the fault handler's; the one before is as it was. */
static int handle_urgent(struct session *session, const void *message, int *fds, char *words,
                         size_t words_bytes)
{
    const struct message_urgent *urgent = message;
    struct sched_param first = {.sched_priority = 1}, usual = {0};
    pid_t tid = (pid_t)urgent->tid;

    (void)fds;
    (void)words;
    (void)words_bytes;
    if (session->urgent && host_process_has_thread(session->pid, session->urgent))
        (void)sched_setscheduler(session->urgent, SCHED_OTHER, &usual);
    session->urgent = tid > 0 && tid != session->handler && tid != session->scanner &&
                              host_process_has_thread(session->pid, tid)
                          ? tid
                          : 0;
    if (session->urgent &&
        sched_setscheduler(session->urgent, SCHED_FIFO | SCHED_RESET_ON_FORK, &first))
        log_detail("guest '%s': no real-time scheduling for the thread that answers faults (%s)",
                   session->guest->name, strerror(errno));
    return 0;
}

#define WELCOMED (IN_STATE(SESSION_HOLDING) | IN_STATE(SESSION_SERVING) | IN_STATE(SESSION_LEAVING))

#define FROM_BEFORE (IN_STATE(SESSION_HOLDING) | IN_STATE(SESSION_LEAVING))

const struct session_message session_messages[] = {
    {MESSAGE_HELLO, sizeof(struct message_hello), IN_STATE(SESSION_GREETING), 0, false,
     handle_hello},
    {MESSAGE_RAM, sizeof(struct message_ram), WELCOMED, 0, false, handle_ram},
    {MESSAGE_RAM_GONE, sizeof(struct message_ram_gone), WELCOMED, 0, false, handle_ram_gone},
    {MESSAGE_DROPPED, sizeof(struct message_segment), WELCOMED, 0, true, handle_dropped},
    {MESSAGE_DETACHED, sizeof(struct message_plain), IN_STATE(SESSION_LEAVING), 0, false,
     handle_detached},
    {MESSAGE_STATS, sizeof(struct message_stats), WELCOMED, 0, false, handle_stats},
    {MESSAGE_DOORBELL, sizeof(struct message_plain), WELCOMED, 0, false, handle_doorbell},
    {MESSAGE_URGENT, sizeof(struct message_urgent), WELCOMED, 0, false, handle_urgent},
    {MESSAGE_HELD, sizeof(struct message_segment), FROM_BEFORE, 1, false, handle_held},
    {MESSAGE_HELD_END, sizeof(struct message_plain), FROM_BEFORE, 0, true, handle_held_end},
};
const size_t session_message_count = sizeof(session_messages) / sizeof(session_messages[0]);

/* ---- detaching and ending ---- */

int agents_detach(struct guest *guest, bool rejoin, const char *text)
{
    struct message_words words = {{MESSAGE_DETACH, sizeof(words)}, 0, rejoin, ""};
    struct session *session = guest->session;
    int result;

    if (!session || !is_welcome(session))
        return -ENOTCONN;
    snprintf(words.text, sizeof(words.text), "%s", text);
    result = session_send(session, &words, sizeof(words), NULL, 0);
    if (result)
        return result;
    session->state = SESSION_LEAVING;
    session->rejoin = rejoin;
    return 0;
}

void agents_reload(struct daemon *daemon, const struct config *old)
{
    if (old->engine == daemon->config.engine)
        return;
    for (struct guest *guest = daemon->registry.first; guest; guest = guest->next) {
        if (guest->session)
            (void)agents_detach(guest, true, "the configuration names another engine");
        else if (guest->presence == AGENT_NONE && !guest->waiting_for_hello)
            registry_set_engine(guest, ENGINE_KERNEL, "it has no agent");
    }
}

void agents_detached(struct session *session)
{
    struct guest *guest = session->guest;
    bool rejoin = session->rejoin;

    session_end(session, rejoin ? "it is to say hello again" : "it was detached", false);
    registry_let_go(guest);
    if (!rejoin)
        registry_remove(guest, "detached", "detached: every page is private again");
}

struct session *agents_keep_one(struct session *before, struct session *now)
{
    uint64_t shared = now->member ? now->member->shared : 0;
    bool enough = before && before->member && before->member->shared >= shared;
    struct session *over = enough ? now : before;

    if (over) {
        over->guest = NULL;
        if (over->member)
            ksm_member_leave(over->member);
        else if (over != now)
            session_free_if_done(over);
    }
    return enough ? before : now;
}

void agents_let_go(struct session *session)
{
    session->guest = NULL;
    if (session->member)
        ksm_member_leave(session->member);
    else
        session_free_if_done(session);
}

void agents_forget_guest(struct session *session)
{
    struct guest *guest = session->guest;

    if (guest) {
        guest->agent_cpu_ns += agents_cpu_ns(session);
        session->cpu_ns = 0;
        if (guest->session == session)
            guest->session = NULL;
        if (guest->lost == session)
            guest->lost = NULL;
    }
    session->guest = NULL;
    if (session->state == SESSION_OVER)
        agents_let_go(session);
    else
        session_end(session, "its guest has gone", false);
}

bool agents_is_leaving(const struct session *session)
{
    return session->state == SESSION_LEAVING;
}

struct ksm_member *agents_member(const struct session *session)
{
    return session->member;
}

/* ---- the listener ---- */

static bool has_room(const struct daemon *daemon, uid_t uid)
{
    uint32_t all = 0, own = 0;

    if (daemon->agents.count >= CONNECTIONS_MAX)
        return false;
    if (uid == 0 || uid == geteuid())
        return true;
    for (const struct session *other = daemon->agents.first; other; other = other->next) {
        bool stranger =
            other->state == SESSION_GREETING && other->uid != 0 && other->uid != geteuid();
        all += stranger;
        own += stranger && other->uid == uid;
    }
    return all < STRANGERS && own < STRANGERS_A_UID;
}

/* Said once in the time that a connection may be silent: who is turned away comes again. */
static void turn_away(struct daemon *daemon, int fd, uid_t uid)
{
    struct agents *agents = &daemon->agents;
    struct message_words words = {
        {MESSAGE_REFUSED, sizeof(words)}, EAGAIN, 0, "too many connections of this user are open"};

    if (agents->turned_away == 0 ||
        loop_now(&daemon->loop) - agents->turned_away_ns >= SESSION_GREETING_NS) {
        log_warning("connections of uid %d to the agents' socket are turned away: %u are open, and "
                    "too many of them say no HELLO",
                    (int)uid, agents->count);
        agents->turned_away_ns = loop_now(&daemon->loop);
    }
    agents->turned_away++;
    (void)send(fd, &words, sizeof(words), MSG_DONTWAIT | MSG_NOSIGNAL);
    close(fd);
}

static void accept_one(struct daemon *daemon, int fd)
{
    uid_t uid;
    pid_t pid;

    if (host_peer(fd, &uid, &pid)) {
        close(fd);
    } else if (!has_room(daemon, uid)) {
        turn_away(daemon, fd, uid);
    } else if (session_start(daemon, fd, uid, pid)) {
        log_warning("an agent's connection was not taken: no memory");
        close(fd);
    }
}

static void can_accept(struct loop_watch *watch, uint32_t events)
{
    struct daemon *daemon = watch->owner;

    (void)events;
    for (int i = 0; i < ACCEPT_TURN; i++) {
        int fd = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd < 0)
            return;
        accept_one(daemon, fd);
    }
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd, result;

    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    strcpy(address.sun_path, path);
    fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    unlink(path);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || chmod(path, 0666) ||
        listen(fd, 128)) {
        result = -errno;
        close(fd);
        return result;
    }
    return fd;
}

int agents_start(struct daemon *daemon)
{
    struct agents *agents = &daemon->agents;
    int fd;

    snprintf(agents->path, sizeof(agents->path), "%s.agent", daemon->config.socket);
    /* For VMMs that may not create a userfaultfd themselves (vm.unprivileged_userfaultfd is 0). */
    agents->userfaultfd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    fd = listen_at(agents->path);
    if (fd < 0) {
        log_error("%s: %s: no agent could connect", agents->path, strerror(-fd));
        return fd;
    }
    agents->listener = (struct loop_watch){.fd = fd,
                                           .events = POLLIN,
                                           .level = true,
                                           .ready = can_accept,
                                           .owner = daemon,
                                           .op = LOOP_NOT_QUEUED};
    return loop_watch_add(&daemon->loop, &agents->listener);
}

void agents_stop(struct daemon *daemon)
{
    struct agents *agents = &daemon->agents;

    /* The guests have left the registry, and what members used stays on record for the next memd:
     * connections are closed, nobody is asked to leave. */
    while (agents->first) {
        struct session *session = agents->first;

        session_end(session, "memd stops", false);
        if (agents->first == session) {
            agents->first = session->next;
            free(session);
        }
    }
    loop_watch_remove(&daemon->loop, &agents->listener);
    if (agents->listener.fd >= 0)
        close(agents->listener.fd);
    agents->listener.fd = -1;
    if (agents->userfaultfd >= 0)
        close(agents->userfaultfd);
    unlink(agents->path);
}
