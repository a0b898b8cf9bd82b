/* SPDX-License-Identifier: Apache-2.0 */
/* Asks memd: HTTP/1.1 with JSON bodies over its unix socket. */
#include <curl/curl.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ctl.h"

#define CONNECT_TIMEOUT_S 5L
#define LOOK_MS           200L
#define ANSWER_MAX_BYTES  (256UL << 20) /* memd does not say more than that; somebody else might */

struct buffer {
    char *bytes;
    size_t filled;
};

/* Appends; false when it does not fit. Always ends in a zero byte. */
static bool append(struct buffer *buffer, const char *bytes, size_t count)
{
    char *grown;

    if (count > ANSWER_MAX_BYTES - buffer->filled)
        return false;
    grown = realloc(buffer->bytes, buffer->filled + count + 1);
    if (!grown)
        return false;
    buffer->bytes = grown;
    memcpy(grown + buffer->filled, bytes, count);
    buffer->filled += count;
    grown[buffer->filled] = '\0';
    return true;
}

static size_t on_body(char *bytes, size_t size, size_t count, void *context)
{
    return append(context, bytes, size * count) ? size * count : 0;
}

static CURL *open_request(const char *socket, const char *method, const char *path)
{
    CURL *curl = curl_easy_init();
    char url[512];

    if (!curl)
        return NULL;
    snprintf(url, sizeof(url), "http://memd%s", path);
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_UNIX_SOCKET_PATH, socket);
    curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, method);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_NOPROXY, "*");
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT, CONNECT_TIMEOUT_S);
    return curl;
}

/* What a status other than 2xx means for us, in words and as an exit status. */
static enum ctl_status complain(long http_status, const struct buffer *body)
{
    json_t *object = json_loadb(body->bytes ? body->bytes : "", body->filled, 0, NULL);
    const char *words = json_string_value(json_object_get(object, "error"));

    if (words)
        ctl_say("%s", words);
    else
        ctl_say("memd answered with HTTP status %ld", http_status);
    json_decref(object);
    return http_status == 403 || http_status == 409 ? CTL_REFUSED : CTL_FAILED;
}

static enum ctl_status unreachable(CURL *curl, const char *socket, CURLcode code)
{
    long error = 0;

    curl_easy_getinfo(curl, CURLINFO_OS_ERRNO, &error);
    if (code == CURLE_COULDNT_CONNECT && (error == EACCES || error == EPERM)) {
        ctl_say("this user may not use memd's socket %s", socket);
        return CTL_REFUSED;
    }
    if (code == CURLE_OPERATION_TIMEDOUT)
        ctl_say("memd at %s does not answer in time: it may be stopped, or something else listens "
                "there",
                socket);
    else if (code != CURLE_COULDNT_CONNECT)
        ctl_say("what answers at %s is not memd, or has just ended (%s)", socket,
                curl_easy_strerror(code));
    else if (error == ENOENT)
        ctl_say("no memd at %s: start it (systemctl start memd), or say where it is with --socket",
                socket);
    else
        ctl_say("nobody answers at %s any more: start memd again (systemctl start memd)", socket);
    return code == CURLE_GOT_NOTHING || code == CURLE_RECV_ERROR || code == CURLE_SEND_ERROR
               ? CTL_LOST
               : CTL_UNREACHABLE;
}

static enum ctl_status take_answer(CURL *curl, const struct buffer *body, json_t **ret_answer)
{
    json_error_t error;
    json_t *answer = NULL;
    long http_status = 0;

    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &http_status);
    if (http_status < 200 || http_status > 299)
        return complain(http_status, body);
    if (body->filled) {
        answer = json_loadb(body->bytes, body->filled, 0, &error);
        if (!answer) {
            ctl_say("memd's answer is no JSON: %s", error.text);
            return CTL_FAILED;
        }
    }
    if (ret_answer)
        *ret_answer = answer;
    else
        json_decref(answer);
    return CTL_DONE;
}

/* Sends and receives; everything but the set-up. */
static enum ctl_status perform(CURL *curl, const char *socket, json_t **ret_answer)
{
    struct buffer body = {0};
    enum ctl_status status;
    CURLcode code;

    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, &body);
    code = curl_easy_perform(curl);
    status =
        code == CURLE_OK ? take_answer(curl, &body, ret_answer) : unreachable(curl, socket, code);
    free(body.bytes);
    return status;
}

enum ctl_status ctl_http_call(const char *socket, const char *method, const char *path,
                              json_t *body, long timeout_s, json_t **ret_answer)
{
    struct curl_slist *headers = curl_slist_append(NULL, "Content-Type: application/json");
    CURL *curl = open_request(socket, method, path);
    char *text = body ? json_dumps(body, JSON_COMPACT) : NULL;
    enum ctl_status status = CTL_FAILED;

    if (!headers || !curl || (body && !text)) {
        ctl_say("no memory");
        goto clean_up;
    }
    if (text) {
        curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
        curl_easy_setopt(curl, CURLOPT_POSTFIELDS, text);
    }
    curl_easy_setopt(curl, CURLOPT_TIMEOUT, timeout_s);
    status = perform(curl, socket, ret_answer);

clean_up:
    free(text);
    curl_easy_cleanup(curl);
    curl_slist_free_all(headers);
    return status;
}

/* ---- streams ---- */

struct stream {
    CURL *curl;
    struct buffer buffer; /* the part of a line that came so far, or an error's body */
    bool (*line)(void *context, char *text);
    void *context;
    bool ended; /* by `line` */
};

/* Hands out the whole lines that the buffer holds; false when `line` has had enough. */
static bool hand_out(struct stream *stream)
{
    char *start = stream->buffer.bytes, *end;

    while ((end = strchr(start, '\n'))) {
        *end = '\0';
        if (*start && !stream->line(stream->context, start)) {
            stream->ended = true;
            return false;
        }
        start = end + 1;
    }
    stream->buffer.filled -= (size_t)(start - stream->buffer.bytes);
    memmove(stream->buffer.bytes, start, stream->buffer.filled + 1);
    return true;
}

static size_t on_stream(char *bytes, size_t size, size_t count, void *context)
{
    struct stream *stream = context;
    long http_status = 0;

    if (!append(&stream->buffer, bytes, size * count))
        return 0;
    curl_easy_getinfo(stream->curl, CURLINFO_RESPONSE_CODE, &http_status);
    if (http_status == 200 && !hand_out(stream))
        return 0;
    return size * count;
}

static enum ctl_status end_stream(struct stream *stream, const char *socket, CURLcode code)
{
    long http_status = 0;

    if (stream->ended)
        return CTL_DONE;
    curl_easy_getinfo(stream->curl, CURLINFO_RESPONSE_CODE, &http_status);
    if (code == CURLE_OK && http_status != 200)
        return complain(http_status, &stream->buffer);
    if (code == CURLE_COULDNT_CONNECT)
        return unreachable(stream->curl, socket, code);
    ctl_say("memd has ended the stream: it has stopped, or was too busy to wait for us");
    return CTL_UNREACHABLE;
}

enum ctl_status ctl_http_stream(const char *socket, const char *path,
                                bool (*line)(void *context, char *text), void *context)
{
    struct stream stream = {.line = line, .context = context};
    enum ctl_status status;

    stream.curl = open_request(socket, "GET", path);
    if (!stream.curl) {
        ctl_say("no memory");
        return CTL_FAILED;
    }
    curl_easy_setopt(stream.curl, CURLOPT_WRITEFUNCTION, on_stream);
    curl_easy_setopt(stream.curl, CURLOPT_WRITEDATA, &stream);
    status = end_stream(&stream, socket, curl_easy_perform(stream.curl));
    free(stream.buffer.bytes);
    curl_easy_cleanup(stream.curl);
    return status;
}

bool ctl_http_reachable(const char *socket, json_t **ret_status)
{
    CURL *curl = open_request(socket, "GET", "/v1/status");
    struct buffer body = {0};
    long http_status = 0;
    CURLcode code;

    *ret_status = NULL;
    if (!curl)
        return false;
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, &body);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT, CONNECT_TIMEOUT_S);
    code = curl_easy_perform(curl);
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &http_status);
    if (code == CURLE_OK && http_status == 200 && body.filled)
        *ret_status = json_loadb(body.bytes, body.filled, 0, NULL);
    free(body.bytes);
    curl_easy_cleanup(curl);
    return code == CURLE_OK;
}

bool ctl_http_wait(const char *socket, unsigned seconds)
{
    static const struct timespec moment = {.tv_nsec = LOOK_MS * 1000000};

    for (long waited = 0; waited < seconds * 1000L; waited += LOOK_MS) {
        json_t *host = NULL;
        bool reachable = ctl_http_reachable(socket, &host);

        json_decref(host);
        if (reachable)
            return true;
        nanosleep(&moment, NULL);
    }
    return false;
}
