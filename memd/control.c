/* SPDX-License-Identifier: Apache-2.0 */
#include "control.h"

#include <errno.h>
#include <grp.h>
#include <jansson.h>
#include <microhttpd.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "daemon.h"
#include "log.h"
#include "status.h"

#define NS_PER_S      1000000000ULL
#define BODY_MAX      65536U
#define DETACH_WAIT_S 60
#define CONNECTIONS   256U
#define ACCEPT_TURN   16
#define WORDS         512U
/* Of those on the control socket, who is neither root nor in group memd has together, and each such
 * user: nobody keeps the operator out, and none of them the others. */
#define STRANGERS       (CONNECTIONS / 2)
#define STRANGERS_A_UID 16U

/* One of the two servers: the control socket, and [metrics] listen. */
struct server {
    struct control *control;
    struct MHD_Daemon *mhd;
    struct loop_watch watch;
    /* Of the control socket; the other one's is MHD's. It is watched through an epoll of its own:
     * what io_uring polls outlives a memd that was killed for a moment, and would answer the next
     * one. */
    struct loop_watch arrivals;
    int listener;
    bool metrics_only;
};

/* A connection of somebody who is neither root nor in group memd. */
struct stranger {
    uid_t uid;
    struct stranger *next, **place;
};

struct control {
    struct daemon *daemon;
    struct server main, metrics;
    struct loop_timer second;
    bool keeps_time;                        /* `second` is set */
    char metrics_listen[CONFIG_WORD_BYTES]; /* where it does listen; "": nowhere */
    struct request *requests;
    struct stranger *strangers;
    gid_t group; /* memd; (gid_t)-1: this host has none */
    bool stopping;
};

enum phase {
    PHASE_BODY,
    PHASE_ACT,
    PHASE_SAVING,
    PHASE_SAVED,
    PHASE_SAMPLING,
    PHASE_SAMPLED,
    PHASE_DETACHING,
    PHASE_DETACHED,
    PHASE_ANSWERED
};

struct request {
    struct control *control;
    struct server *server;
    struct MHD_Connection *connection;
    const struct route *route;
    char name[NAME_BYTES];
    enum phase phase;
    bool suspended, detached_well;
    char *body;
    size_t body_bytes;
    uint64_t deadline_ns;
    /* POST: the guest that was registered, and the list that has to be saved with it in it. */
    char token[PROTOCOL_TOKEN_BYTES + 1];
    uint64_t list;
    struct pss_waiter sample;
    /* GET /v1/events */
    bool streaming, hung_up;
    struct events_subscriber subscriber;
    struct loop_watch hangup;
    struct request *next, **place;
};

/* Who may: the operator only, or also the uid that runs the guest that is named. */
enum right { RIGHT_OPERATOR, RIGHT_OWNER, RIGHT_ANYBODY };

struct route {
    const char *method, *path; /* a path that ends with a slash is followed by a guest's name... */
    const char *tail;          /* ...and that by this */
    enum right right;
    bool samples; /* wants fresh PSS first */
    enum MHD_Result (*handle)(struct request *request);
};

/* ---- suspending ---- */

static void suspend(struct request *request)
{
    request->suspended = true;
    MHD_suspend_connection(request->connection);
}

static void resume(struct request *request)
{
    if (!request->suspended)
        return;
    request->suspended = false;
    MHD_resume_connection(request->connection);
}

/* ---- answers ---- */

static enum MHD_Result answer_text(struct request *request, unsigned status, char *text,
                                   const char *type)
{
    struct MHD_Response *response;
    enum MHD_Result result;

    request->phase = PHASE_ANSWERED;
    if (!text)
        return MHD_NO;
    response = MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE);
    if (!response) {
        free(text);
        return MHD_NO;
    }
    MHD_add_response_header(response, "Content-Type", type);
    result = MHD_queue_response(request->connection, status, response);
    MHD_destroy_response(response);
    return result;
}

/* Consumes json. */
static enum MHD_Result answer(struct request *request, unsigned status, json_t *json)
{
    char *text = json ? json_dumps(json, JSON_COMPACT) : NULL;

    json_decref(json);
    return answer_text(request, status, text, "application/json");
}

static enum MHD_Result answer_error(struct request *request, unsigned status, const char *words)
{
    return answer(request, status, json_pack("{s:s}", "error", words));
}

static unsigned status_of(int error)
{
    switch (error) {
    case -EEXIST:
    case -ENOSPC:
    case -EPERM: return MHD_HTTP_CONFLICT;
    case -EBUSY:
    case -ENOMEM:
    case -EIO: return MHD_HTTP_SERVICE_UNAVAILABLE;
    default: return MHD_HTTP_BAD_REQUEST;
    }
}

/* ---- who asks ---- */

static int fd_of(struct MHD_Connection *connection)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);

    return info ? info->connect_fd : -1;
}

static int peer_at(int fd, struct ucred *ret_peer)
{
    socklen_t bytes = sizeof(*ret_peer);

    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, ret_peer, &bytes) ? -EPERM : 0;
}

static bool in_group(const struct control *control, int fd, const struct ucred *peer)
{
    gid_t groups[256], wanted = control->group;
    socklen_t bytes = sizeof(groups);

    if (wanted == (gid_t)-1)
        return false;
    if (peer->gid == wanted)
        return true;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &bytes))
        return false;
    for (size_t i = 0; i < bytes / sizeof(gid_t); i++) {
        if (groups[i] == wanted)
            return true;
    }
    return false;
}

static bool is_operator(const struct control *control, int fd, const struct ucred *peer)
{
    return peer->uid == 0 || peer->uid == geteuid() || in_group(control, fd, peer);
}

static bool may(const struct request *request)
{
    int fd = fd_of(request->connection);
    const struct guest *guest;
    struct ucred peer;

    if (request->route->right == RIGHT_ANYBODY)
        return true;
    if (request->server->metrics_only || peer_at(fd, &peer))
        return false;
    if (is_operator(request->control, fd, &peer))
        return true;
    guest = request->name[0] ? registry_find(request->control->daemon, request->name) : NULL;
    return request->route->right == RIGHT_OWNER && guest && guest->uid == peer.uid;
}

/* ---- reading bodies ---- */

/* A size: a number of bytes, or a word with K, M, G, T. */
static bool read_size(const json_t *value, uint64_t *ret_bytes)
{
    if (json_is_string(value))
        return config_size_parse(json_string_value(value), ret_bytes);
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return false;
    *ret_bytes = (uint64_t)json_integer_value(value);
    return true;
}

static bool read_wish_member(const char *key, const json_t *value, void *into, bool *ret_good)
{
    struct guest_wish *wish = into;
    json_int_t shares = json_integer_value(value);
    const char *domain = json_string_value(value);

    if (strcmp(key, "max_bytes") == 0) {
        wish->has_max = *ret_good = read_size(value, &wish->max_bytes) && wish->max_bytes > 0;
    } else if (strcmp(key, "min_bytes") == 0) {
        wish->has_min = *ret_good = read_size(value, &wish->min_bytes);
    } else if (strcmp(key, "shares") == 0) {
        wish->has_shares = *ret_good = json_is_integer(value) && shares > 0 && shares <= 1000000;
        wish->shares = (uint32_t)shares;
    } else if (strcmp(key, "domain") == 0) {
        wish->has_domain = *ret_good = domain && (!domain[0] || words_are_name(domain));
        if (*ret_good)
            strcpy(wish->domain, domain);
    } else {
        return false;
    }
    return true;
}

static bool copy_word(const json_t *value, char *into, size_t bytes)
{
    const char *word = json_string_value(value);

    if (!word || strlen(word) >= bytes)
        return false;
    strcpy(into, word);
    return true;
}

static bool read_request_member(const char *key, const json_t *value, void *into, bool *ret_good)
{
    struct guest_request *asked = into;
    const char *word = json_string_value(value);

    if (read_wish_member(key, value, &asked->wish, ret_good))
        return true;
    if (strcmp(key, "name") == 0) {
        *ret_good =
            word && words_are_name(word) && copy_word(value, asked->name, sizeof(asked->name));
    } else if (strcmp(key, "pid") == 0) {
        *ret_good = json_is_integer(value) && json_integer_value(value) > 0 &&
                    json_integer_value(value) <= INT32_MAX;
        asked->pid = (pid_t)json_integer_value(value);
    } else if (strcmp(key, "vmm") == 0) {
        *ret_good = copy_word(value, asked->vmm, sizeof(asked->vmm));
    } else if (strcmp(key, "reason") == 0) {
        *ret_good = copy_word(value, asked->reason, sizeof(asked->reason));
    } else if (strcmp(key, "qmp") == 0) {
        *ret_good = copy_word(value, asked->qmp, sizeof(asked->qmp));
    } else if (strcmp(key, "engine") == 0) {
        *ret_good = word && (strcmp(word, "agent") == 0 || strcmp(word, "kernel") == 0);
        asked->engine = *ret_good && word[0] == 'k' ? ENGINE_KERNEL : ENGINE_AGENT;
    } else if (strcmp(key, "daemonizes") == 0) {
        *ret_good = json_is_boolean(value);
        asked->daemonizes = json_is_true(value);
    } else {
        return false;
    }
    return true;
}

/* The body as an object, or NULL and words. */
static json_t *read_body(const struct request *request, char *words)
{
    json_error_t error;
    json_t *json = json_loadb(request->body ? request->body : "", request->body_bytes,
                              JSON_REJECT_DUPLICATES, &error);

    if (!json_is_object(json)) {
        snprintf(words, WORDS, "the body is no JSON object: %s", json ? "" : error.text);
        json_decref(json);
        return NULL;
    }
    return json;
}

/* Each member of the body by `read`, which answers false for one that it does not know (`unknown`
 * says so) and sets *ret_good to false for a value that can't be. */
static int read_members(const struct request *request,
                        bool (*read)(const char *key, const json_t *value, void *asked,
                                     bool *ret_good),
                        void *asked, const char *unknown, char *words)
{
    json_t *json = read_body(request, words), *value;
    const char *key;
    int result = json ? 0 : -EINVAL;

    json_object_foreach(json, key, value)
    {
        bool good = true;

        if (result)
            break;
        result = read(key, value, asked, &good) && good ? 0 : -EINVAL;
        if (result)
            snprintf(words, WORDS, "'%s' %s", key, good ? unknown : "has a value that can't be");
    }
    json_decref(json);
    return result;
}

static int read_registration(const struct request *request, struct guest_request *asked,
                             char *words)
{
    int result = read_members(request, read_request_member, asked, "is not known here", words);

    if (!result && (!asked->name[0] || !asked->pid || !asked->wish.has_max)) {
        snprintf(words, WORDS, "name, pid and max_bytes have to be given");
        result = -EINVAL;
    }
    return result;
}

static int read_wish(const struct request *request, struct guest_wish *wish, char *words)
{
    return read_members(request, read_wish_member, wish,
                        "can't be set; max_bytes, min_bytes, shares and domain can", words);
}

/* ---- the handlers ---- */

static enum MHD_Result get_status(struct request *request)
{
    return answer(request, MHD_HTTP_OK, status_of_host(request->control->daemon));
}

static enum MHD_Result get_metrics(struct request *request)
{
    return answer_text(request, MHD_HTTP_OK, status_metrics(request->control->daemon),
                       "text/plain; version=0.0.4");
}

static struct guest *named_guest(struct request *request)
{
    return registry_find(request->control->daemon, request->name);
}

static enum MHD_Result answer_no_guest(struct request *request)
{
    char words[WORDS];

    snprintf(words, sizeof(words), "there is no guest '%s'; memctl status lists them",
             request->name);
    return answer_error(request, MHD_HTTP_NOT_FOUND, words);
}

static enum MHD_Result get_guest(struct request *request)
{
    struct guest *guest = named_guest(request);

    if (!guest)
        return answer_no_guest(request);
    return answer(request, MHD_HTTP_OK, status_of_guest(request->control->daemon, guest));
}

static enum MHD_Result answer_registered(struct request *request)
{
    struct daemon *daemon = request->control->daemon;
    struct guest *guest = registry_find_token(daemon, request->token);

    if (!guest)
        return answer_error(request, MHD_HTTP_BAD_REQUEST,
                            "its process has ended before the guest was on the list");
    registry_expect_hello(guest);
    return answer(request, MHD_HTTP_CREATED,
                  json_pack("{s:s,s:s,s:s}", "token", guest->token, "agent_socket",
                            daemon->agents.path, "engine", registry_engine_name(guest->engine)));
}

/* Who has the answer may rely on it that the next memd knows the guest too: it waits until the list
 * of guests is on the disk. */
static enum MHD_Result post_guest(struct request *request)
{
    struct daemon *daemon = request->control->daemon;
    struct guest_request asked = {.engine = ENGINE_AGENT};
    char words[WORDS] = "memd has no memory for one more guest";
    struct guest *guest;
    struct ucred peer;
    int result;

    if (request->phase != PHASE_ACT)
        return answer_registered(request);
    result = read_registration(request, &asked, words);
    if (!result)
        result = peer_at(fd_of(request->connection), &peer);
    if (!result) {
        asked.uid = peer.uid;
        result = registry_add(daemon, &asked, &guest, words, sizeof(words));
    }
    if (result)
        return answer_error(request, status_of(result), words);
    memcpy(request->token, guest->token, sizeof(request->token));
    request->list = daemon->registry.saver.asked;
    if (daemon->registry.saver.written >= request->list)
        return answer_registered(request);
    request->phase = PHASE_SAVING;
    suspend(request);
    return MHD_YES;
}

static enum MHD_Result patch_guest(struct request *request)
{
    struct guest *guest = named_guest(request);
    struct guest_wish wish = {.has_max = false};
    char words[WORDS] = "";
    int result;

    if (!guest)
        return answer_no_guest(request);
    result = read_wish(request, &wish, words);
    if (!result)
        result = registry_wish(guest, &wish, words, sizeof(words));
    if (result)
        return answer_error(request, status_of(result), words);
    return answer(request, MHD_HTTP_OK, status_of_guest(request->control->daemon, guest));
}

static enum MHD_Result delete_guest(struct request *request)
{
    struct daemon *daemon = request->control->daemon;
    struct guest *guest;
    int result;

    if (request->phase == PHASE_DETACHED)
        return request->detached_well
                   ? answer(request, MHD_HTTP_OK, json_pack("{s:s}", "detached", request->name))
                   : answer_error(request, MHD_HTTP_SERVICE_UNAVAILABLE,
                                  "its agent did not say that every page is private again; the "
                                  "guest runs on, look at memctl guest");
    guest = named_guest(request);
    if (!guest)
        return answer_no_guest(request);
    /* Half of its memory may be at another host, and it must not run on here. */
    if (migration_moves(daemon, guest->name))
        return answer_error(request, MHD_HTTP_CONFLICT,
                            "it moves from one host to another: wait for that, or call it off "
                            "(memctl migrate --cancel)");
    if (guest->presence == AGENT_NONE) {
        registry_remove(guest, "detached", "detached; it shared nothing through an agent");
        return answer(request, MHD_HTTP_OK, json_pack("{s:s}", "detached", request->name));
    }
    result = guest->session && agents_is_leaving(guest->session)
                 ? 0
                 : agents_detach(guest, false, "the operator detaches this guest");
    if (result)
        return answer_error(request, MHD_HTTP_SERVICE_UNAVAILABLE,
                            "its agent is not connected: its pages can't be made private now; the "
                            "guest runs on, try again when memctl guest shows its agent");
    request->phase = PHASE_DETACHING;
    request->deadline_ns = loop_now(&request->control->daemon->loop) + DETACH_WAIT_S * NS_PER_S;
    suspend(request);
    return MHD_YES;
}

void control_saved(struct daemon *daemon)
{
    if (!daemon->control)
        return;
    for (struct request *request = daemon->control->requests; request; request = request->next) {
        if (request->phase != PHASE_SAVING || daemon->registry.saver.written < request->list)
            continue;
        request->phase = PHASE_SAVED;
        resume(request);
    }
}

void control_detached(struct daemon *daemon, const char *name, bool done)
{
    if (!daemon->control)
        return;
    for (struct request *request = daemon->control->requests; request; request = request->next) {
        if (request->phase != PHASE_DETACHING || strcmp(request->name, name) != 0)
            continue;
        request->phase = PHASE_DETACHED;
        request->detached_well = done;
        resume(request);
    }
}

/* ---- migrations ---- */

static bool read_migration_member(const char *key, const json_t *value, void *into, bool *ret_good)
{
    struct migration_request *asked = into;

    if (strcmp(key, "to") == 0) {
        *ret_good = copy_word(value, asked->to, sizeof(asked->to)) && asked->to[0];
    } else if (strcmp(key, "precopy_only") == 0) {
        *ret_good = json_is_boolean(value);
        asked->precopy_only = json_is_true(value);
    } else if (strcmp(key, "postcopy_only") == 0) {
        *ret_good = json_is_boolean(value);
        asked->postcopy_only = json_is_true(value);
    } else if (strcmp(key, "bandwidth_bytes") == 0) {
        *ret_good = read_size(value, &asked->bandwidth_bytes) && asked->bandwidth_bytes > 0;
    } else {
        return false;
    }
    return true;
}

static int read_migration(const struct request *request, struct migration_request *asked,
                          char *words)
{
    int result = read_members(request, read_migration_member, asked, "is not known here", words);

    if (!result && !asked->to[0]) {
        snprintf(words, WORDS, "'to' has to be given, as HOST:PORT");
        result = -EINVAL;
    }
    if (!result && asked->precopy_only && asked->postcopy_only) {
        snprintf(words, WORDS, "precopy_only and postcopy_only exclude each other");
        result = -EINVAL;
    }
    return result;
}

static enum MHD_Result post_migrate(struct request *request)
{
    struct guest *guest = named_guest(request);
    struct migration_request asked = {.to = ""};
    char words[WORDS] = "";
    int result;

    if (!guest)
        return answer_no_guest(request);
    result = read_migration(request, &asked, words);
    if (!result)
        result = migration_begin(guest, &asked, words, sizeof(words));
    if (result)
        return answer_error(request, result == -EBUSY ? MHD_HTTP_CONFLICT : status_of(result),
                            words);
    return answer(request, MHD_HTTP_ACCEPTED,
                  migration_status(request->control->daemon, request->name));
}

static enum MHD_Result get_migrate(struct request *request)
{
    json_t *json = migration_status(request->control->daemon, request->name);
    char words[WORDS];

    if (json)
        return answer(request, MHD_HTTP_OK, json);
    snprintf(words, sizeof(words), "no guest '%s' has moved from or to this host", request->name);
    return answer_error(request, MHD_HTTP_NOT_FOUND, words);
}

static enum MHD_Result delete_migrate(struct request *request)
{
    char words[WORDS] = "";
    int result = migration_cancel(request->control->daemon, request->name, words, sizeof(words));

    if (result)
        return answer_error(request, result == -ENOENT ? MHD_HTTP_NOT_FOUND : MHD_HTTP_CONFLICT,
                            words);
    return answer(request, MHD_HTTP_ACCEPTED,
                  migration_status(request->control->daemon, request->name));
}

/* ---- GET /v1/events ---- */

static ssize_t read_events(void *cls, uint64_t position, char *into, size_t bytes)
{
    struct request *request = cls;
    size_t taken;

    (void)position;
    if (request->hung_up || request->control->stopping)
        return MHD_CONTENT_READER_END_OF_STREAM;
    taken = events_take(&request->subscriber, into, bytes);
    if (!taken)
        suspend(request);
    return (ssize_t)taken;
}

static void events_arrived(struct events_subscriber *subscriber)
{
    resume(subscriber->owner);
}

/* Nobody looks at a connection that is suspended, so its end is watched for here. */
static void listener_left(struct loop_watch *watch, uint32_t events)
{
    struct request *request = watch->owner;

    (void)events;
    loop_watch_remove(&request->control->daemon->loop, watch);
    request->hung_up = true;
    resume(request);
}

static enum MHD_Result get_events(struct request *request)
{
    struct daemon *daemon = request->control->daemon;
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(request->connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    struct MHD_Response *response;
    enum MHD_Result result;

    request->subscriber = (struct events_subscriber){.arrived = events_arrived, .owner = request};
    if (!info || events_subscribe(&daemon->events, &request->subscriber))
        return answer_error(request, MHD_HTTP_SERVICE_UNAVAILABLE,
                            "no memory for one listener more");
    request->streaming = true;
    request->hangup = (struct loop_watch){.fd = info->connect_fd,
                                          .events = POLLRDHUP,
                                          .level = true,
                                          .ready = listener_left,
                                          .owner = request,
                                          .op = LOOP_NOT_QUEUED};
    (void)loop_watch_add(&daemon->loop, &request->hangup);
    response =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 4096, read_events, request, NULL);
    if (!response)
        return MHD_NO;
    request->phase = PHASE_ANSWERED;
    MHD_add_response_header(response, "Content-Type", "application/x-ndjson");
    result = MHD_queue_response(request->connection, MHD_HTTP_OK, response);
    MHD_destroy_response(response);
    return result;
}

/* ---- routes ---- */

static const struct route routes[] = {
    {"GET", "/v1/status", "", RIGHT_OPERATOR, true, get_status},
    {"GET", "/v1/guests/", "", RIGHT_OWNER, true, get_guest},
    {"POST", "/v1/guests", "", RIGHT_OPERATOR, false, post_guest},
    {"PATCH", "/v1/guests/", "", RIGHT_OPERATOR, false, patch_guest},
    {"DELETE", "/v1/guests/", "", RIGHT_OPERATOR, false, delete_guest},
    {"POST", "/v1/guests/", "/migrate", RIGHT_OPERATOR, false, post_migrate},
    {"GET", "/v1/guests/", "/migrate", RIGHT_OPERATOR, false, get_migrate},
    {"DELETE", "/v1/guests/", "/migrate", RIGHT_OPERATOR, false, delete_migrate},
    {"GET", "/v1/events", "", RIGHT_OPERATOR, false, get_events},
    {"GET", "/metrics", "", RIGHT_OPERATOR, true, get_metrics},
};

/* What the second listener serves, to whoever reaches it: the operator chose where it listens. */
static const struct route metrics_route = {"GET", "/metrics", "", RIGHT_ANYBODY, true, get_metrics};

static bool path_fits(const struct route *route, const char *url, char *ret_name)
{
    size_t length = strlen(route->path), tail = strlen(route->tail), rest;
    char name[NAME_BYTES];

    if (route->path[length - 1] != '/')
        return strcmp(url, route->path) == 0;
    if (strncmp(url, route->path, length) != 0)
        return false;
    rest = strlen(url + length);
    if (rest < tail || rest - tail >= sizeof(name) ||
        strcmp(url + length + rest - tail, route->tail) != 0)
        return false;
    snprintf(name, sizeof(name), "%.*s", (int)(rest - tail), url + length);
    if (!words_are_name(name))
        return false;
    strcpy(ret_name, name);
    return true;
}

static enum MHD_Result find_route(struct request *request, const char *method, const char *url)
{
    bool path_is_known = false;

    if (request->server->metrics_only) {
        if (strcmp(method, "GET") == 0 && strcmp(url, "/metrics") == 0)
            request->route = &metrics_route;
    } else {
        for (size_t i = 0; i < sizeof(routes) / sizeof(routes[0]) && !request->route; i++) {
            if (!path_fits(&routes[i], url, request->name))
                continue;
            path_is_known = true;
            if (strcmp(method, routes[i].method) == 0)
                request->route = &routes[i];
        }
    }
    if (request->route)
        return MHD_YES;
    return path_is_known
               ? answer_error(request, MHD_HTTP_METHOD_NOT_ALLOWED, "this method does nothing here")
               : answer_error(request, MHD_HTTP_NOT_FOUND, "there is nothing at this path");
}

/* ---- the life of a request ---- */

static void sampled(struct pss_waiter *waiter)
{
    struct request *request =
        (struct request *)(void *)((char *)waiter - offsetof(struct request, sample));

    request->phase = PHASE_SAMPLED;
    resume(request);
}

static enum MHD_Result answer_forbidden(struct request *request)
{
    return answer_error(request, MHD_HTTP_FORBIDDEN,
                        "only root and members of group memd may do this, and a VMM's uid may "
                        "look at its own guest");
}

static bool announces_too_much(const struct request *request)
{
    const char *length =
        MHD_lookup_connection_value(request->connection, MHD_HEADER_KIND, "Content-Length");

    return length && strtoull(length, NULL, 10) > BODY_MAX;
}

/* The headers are here, of the body nothing: who may not ask, or has too much to say, is answered
 * now. */
static enum MHD_Result begin(struct request *request, const char *method, const char *url)
{
    enum MHD_Result result = find_route(request, method, url);

    if (!request->route)
        return result;
    if (!may(request))
        return answer_forbidden(request);
    if (announces_too_much(request))
        return answer_error(request, MHD_HTTP_CONTENT_TOO_LARGE, "the body is more than 64 KiB");
    return MHD_YES;
}

static enum MHD_Result act(struct request *request)
{
    /* Once more: while this one waited, the name may have become another user's guest. */
    if (!may(request))
        return answer_forbidden(request);
    if (request->route->samples && request->phase == PHASE_ACT) {
        request->phase = PHASE_SAMPLING;
        request->sample.sampled = sampled;
        if (!pss_sample(request->control->daemon, &request->sample)) {
            suspend(request);
            return MHD_YES;
        }
    }
    return request->route->handle(request);
}

static struct request *new_request(struct server *server, struct MHD_Connection *connection)
{
    struct request *request = calloc(1, sizeof(*request));
    struct control *control = server->control;

    if (!request)
        return NULL;
    request->control = control;
    request->server = server;
    request->connection = connection;
    request->hangup.op = LOOP_NOT_QUEUED;
    request->next = control->requests;
    request->place = &control->requests;
    if (control->requests)
        control->requests->place = &request->next;
    control->requests = request;
    return request;
}

static enum MHD_Result take_body(struct request *request, const char *data, size_t *bytes)
{
    char *body;

    if (request->body_bytes + *bytes > BODY_MAX)
        return MHD_NO; /* the connection is closed: nobody has that much to say */
    body = realloc(request->body, request->body_bytes + *bytes);
    if (!body)
        return MHD_NO;
    memcpy(body + request->body_bytes, data, *bytes);
    request->body = body;
    request->body_bytes += *bytes;
    *bytes = 0;
    return MHD_YES;
}

static enum MHD_Result handle(void *cls, struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, const char *data,
                              size_t *bytes, void **context)
{
    struct request *request = *context;

    (void)version;
    if (!request) {
        *context = request = new_request(cls, connection);
        return request ? begin(request, method, url) : MHD_NO;
    }
    if (*bytes)
        return take_body(request, data, bytes);
    if (request->phase == PHASE_ANSWERED)
        return MHD_YES;
    if (request->phase == PHASE_BODY)
        request->phase = PHASE_ACT;
    return act(request);
}

static void completed(void *cls, struct MHD_Connection *connection, void **context,
                      enum MHD_RequestTerminationCode code)
{
    struct request *request = *context;

    (void)cls;
    (void)connection;
    (void)code;
    if (!request)
        return;
    pss_cancel(request->control->daemon, &request->sample);
    loop_watch_remove(&request->control->daemon->loop, &request->hangup);
    if (request->streaming)
        events_unsubscribe(&request->control->daemon->events, &request->subscriber);
    *request->place = request->next;
    if (request->next)
        request->next->place = request->place;
    free(request->body);
    free(request);
    *context = NULL;
}

/* ---- who comes in ---- */

static bool may_enter(const struct control *control, int fd)
{
    uint32_t all = 0, own = 0;
    struct ucred peer;

    if (peer_at(fd, &peer))
        return false;
    if (is_operator(control, fd, &peer))
        return true;
    for (const struct stranger *other = control->strangers; other; other = other->next) {
        all++;
        own += other->uid == peer.uid;
    }
    return all < STRANGERS && own < STRANGERS_A_UID;
}

static void add_stranger(struct control *control, uid_t uid, void **context)
{
    struct stranger *stranger = calloc(1, sizeof(*stranger));

    *context = stranger;
    if (!stranger)
        return;
    *stranger =
        (struct stranger){.uid = uid, .next = control->strangers, .place = &control->strangers};
    if (control->strangers)
        control->strangers->place = &stranger->next;
    control->strangers = stranger;
}

static void remove_stranger(struct stranger *stranger)
{
    *stranger->place = stranger->next;
    if (stranger->next)
        stranger->next->place = stranger->place;
    free(stranger);
}

/* A connection to the control socket has begun, or has ended. */
static void connection_changed(void *cls, struct MHD_Connection *connection, void **context,
                               enum MHD_ConnectionNotificationCode code)
{
    struct server *server = cls;
    int fd = fd_of(connection);
    struct ucred peer;

    if (code == MHD_CONNECTION_NOTIFY_CLOSED && *context)
        remove_stranger(*context);
    else if (code == MHD_CONNECTION_NOTIFY_STARTED && !server->metrics_only &&
             !peer_at(fd, &peer) && !is_operator(server->control, fd, &peer))
        add_stranger(server->control, peer.uid, context);
}

static void turn_away(int fd)
{
    static const char body[] = "{\"error\":\"too many connections of this user are open\"}";
    char answer[256];
    int length = snprintf(answer, sizeof(answer),
                          "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"
                          "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                          sizeof(body) - 1, body);

    (void)send(fd, answer, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
    close(fd);
}

/* ---- the servers ---- */

static void keep_time(struct control *control)
{
    if (control->keeps_time)
        return;
    control->keeps_time = true;
    loop_timer_set(&control->daemon->loop, &control->second, NS_PER_S);
}

static bool has_connections(const struct server *server)
{
    return server->mhd &&
           MHD_get_daemon_info(server->mhd, MHD_DAEMON_INFO_CURRENT_CONNECTIONS)->num_connections;
}

static void serve(struct loop_watch *watch, uint32_t events)
{
    struct server *server = watch->owner;

    (void)events;
    MHD_run(server->mhd);
    keep_time(server->control);
}

/* The control socket: who may come in is decided here, before MHD sees it. */
static void can_accept(struct loop_watch *watch, uint32_t events)
{
    static const struct sockaddr_un nobody = {.sun_family = AF_UNIX};
    struct server *server = watch->owner;

    (void)events;
    for (int i = 0; i < ACCEPT_TURN; i++) {
        int fd = accept4(server->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

        if (fd < 0)
            break;
        if (!may_enter(server->control, fd)) {
            turn_away(fd);
            continue;
        }
        /* MHD owns the descriptor, also when it takes no more. It counts with the next run. */
        (void)MHD_add_connection(server->mhd, fd, (const struct sockaddr *)&nobody, sizeof(nobody));
        MHD_run(server->mhd);
    }
    keep_time(server->control);
}

static int start_listening(struct server *server)
{
    struct epoll_event event = {.events = EPOLLIN};
    int fd = epoll_create1(EPOLL_CLOEXEC);

    if (fd < 0)
        return -errno;
    server->arrivals = (struct loop_watch){.fd = fd,
                                           .events = POLLIN,
                                           .level = true,
                                           .ready = can_accept,
                                           .owner = server,
                                           .op = LOOP_NOT_QUEUED};
    if (epoll_ctl(fd, EPOLL_CTL_ADD, server->listener, &event))
        return -errno;
    return loop_watch_add(&server->control->daemon->loop, &server->arrivals);
}

static void stop_listening(struct server *server)
{
    loop_watch_remove(&server->control->daemon->loop, &server->arrivals);
    if (server->arrivals.fd >= 0)
        close(server->arrivals.fd);
    if (server->listener >= 0)
        close(server->listener);
    server->arrivals.fd = server->listener = -1;
}

static void stop_server(struct control *control, struct server *server)
{
    if (!server->mhd)
        return;
    for (struct request *request = control->requests; request; request = request->next) {
        if (request->server == server) {
            request->hung_up = true;
            resume(request);
        }
    }
    MHD_run(server->mhd);
    stop_listening(server);
    loop_watch_remove(&control->daemon->loop, &server->watch);
    MHD_stop_daemon(server->mhd);
    server->mhd = NULL;
}

/* Owns listener, also on failure. */
static int start_server(struct control *control, struct server *server, int listener,
                        bool metrics_only)
{
    const union MHD_DaemonInfo *info;
    int result;

    *server = (struct server){.control = control,
                              .metrics_only = metrics_only,
                              .listener = metrics_only ? -1 : listener,
                              .arrivals = {.fd = -1, .op = LOOP_NOT_QUEUED}};
    server->mhd = MHD_start_daemon(
        MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | (metrics_only ? 0 : MHD_USE_NO_LISTEN_SOCKET), 0,
        NULL, NULL, handle, server, MHD_OPTION_NOTIFY_COMPLETED, completed, NULL,
        MHD_OPTION_NOTIFY_CONNECTION, connection_changed, server, MHD_OPTION_CONNECTION_LIMIT,
        CONNECTIONS, MHD_OPTION_CONNECTION_TIMEOUT, 120U,
        metrics_only ? MHD_OPTION_LISTEN_SOCKET : MHD_OPTION_END, listener, MHD_OPTION_END);
    if (!server->mhd) {
        close(listener);
        return -EIO;
    }
    info = MHD_get_daemon_info(server->mhd, MHD_DAEMON_INFO_EPOLL_FD);
    server->watch = (struct loop_watch){.fd = info->epoll_fd,
                                        .events = POLLIN,
                                        .level = true,
                                        .ready = serve,
                                        .owner = server,
                                        .op = LOOP_NOT_QUEUED};
    result = loop_watch_add(&control->daemon->loop, &server->watch);
    if (!result && !metrics_only)
        result = start_listening(server);
    if (result)
        stop_server(control, server);
    return result;
}

static int listen_unix(const struct control *control, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), result;

    if (fd < 0)
        return -errno;
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    unlink(path); /* check_alone() found nobody behind it */
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) || chmod(path, 0666) ||
        (control->group != (gid_t)-1 && chown(path, (uid_t)-1, control->group)) ||
        listen(fd, 128)) {
        result = -errno;
        close(fd);
        return result;
    }
    return fd;
}

int control_listen_tcp(const char *where)
{
    char host[CONFIG_WORD_BYTES], port_text[8];
    struct addrinfo hints = {.ai_flags = AI_PASSIVE, .ai_socktype = SOCK_STREAM}, *found;
    int fd = -1, on = 1, result = -EADDRNOTAVAIL;
    uint16_t port;

    if (!words_split_address(where, host, sizeof(host), &port))
        return -EINVAL;
    snprintf(port_text, sizeof(port_text), "%u", port);
    if (getaddrinfo(host, port_text, &hints, &found))
        return -EADDRNOTAVAIL;
    for (struct addrinfo *one = found; one && fd < 0; one = one->ai_next) {
        fd = socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0)
            continue;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
        if (bind(fd, one->ai_addr, one->ai_addrlen) || listen(fd, 128)) {
            result = -errno;
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(found);
    return fd >= 0 ? fd : result;
}

static int start_metrics(struct control *control)
{
    const char *where = control->daemon->config.metrics_listen;
    int fd;

    control->metrics_listen[0] = '\0';
    if (!where[0])
        return 0;
    fd = control_listen_tcp(where);
    if (fd < 0) {
        log_error("[metrics] listen = %s: %s", where, strerror(-fd));
        return fd;
    }
    strcpy(control->metrics_listen, where);
    return start_server(control, &control->metrics, fd, true);
}

void control_reload(struct daemon *daemon)
{
    struct control *control = daemon->control;

    if (strcmp(control->metrics_listen, daemon->config.metrics_listen) == 0)
        return;
    stop_server(control, &control->metrics);
    (void)start_metrics(control);
}

/* Lets libmicrohttpd look at its timeouts, and ours pass, while anybody is connected. */
static void every_second(struct loop_timer *timer)
{
    struct control *control = timer->owner;
    uint64_t now = loop_now(&control->daemon->loop);

    for (struct request *request = control->requests; request; request = request->next) {
        if (request->phase == PHASE_DETACHING && now >= request->deadline_ns) {
            request->phase = PHASE_DETACHED;
            resume(request);
        }
    }
    MHD_run(control->main.mhd);
    if (control->metrics.mhd)
        MHD_run(control->metrics.mhd);
    control->keeps_time = false;
    if (control->requests || has_connections(&control->main) || has_connections(&control->metrics))
        keep_time(control);
}

int control_start(struct daemon *daemon)
{
    struct control *control = calloc(1, sizeof(*control));
    const struct group *group = getgrnam("memd");
    int fd, result;

    if (!control)
        return -ENOMEM;
    control->daemon = daemon;
    control->group = group ? group->gr_gid : (gid_t)-1;
    control->second = (struct loop_timer){.expired = every_second, .owner = control};
    fd = listen_unix(control, daemon->config.socket);
    if (fd < 0) {
        log_error("[host] socket = %s: %s", daemon->config.socket, strerror(-fd));
        free(control);
        return fd;
    }
    daemon->control = control;
    result = start_server(control, &control->main, fd, false);
    if (!result)
        result = start_metrics(control);
    if (result) {
        control_stop(daemon);
        return result;
    }
    return 0;
}

void control_stop(struct daemon *daemon)
{
    struct control *control = daemon->control;

    control->stopping = true;
    loop_timer_cancel(&daemon->loop, &control->second);
    stop_server(control, &control->metrics);
    stop_server(control, &control->main);
    unlink(daemon->config.socket);
    daemon->control = NULL;
    free(control);
}
