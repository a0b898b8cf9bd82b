/* SPDX-License-Identifier: Apache-2.0 */
/* The control socket: raw bytes, or a body under a good head. The first byte says which. */
#include <sys/socket.h>
#include <unistd.h>

#include "host.h"

static const char *const seeds[] = {
    "0GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
    "0POST /v1/guests HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
    "chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "0GET /metrics HTTP/1.0\r\n\r\nGET /v1/events HTTP/1.1\r\nHost: x\r\nExpect: "
    "100-continue\r\n\r\n",
    "1{\"name\":\"a\",\"pid\":1,\"vmm\":\"qemu\",\"reason\":\"none\",\"qmp\":\"/"
    "x\",\"engine\":\"agent\","
    "\"max_bytes\":\"1G\",\"min_bytes\":1,\"shares\":3,\"domain\":\"\"}",
    "1{\"name\":\"a.b-c\",\"pid\":1,\"max_bytes\":9223372036854775807,\"engine\":\"kernel\"}",
    "2{\"max_bytes\":4096,\"min_bytes\":\"4K\",\"shares\":1000000,\"domain\":\"web\"}",
    "3{}",
};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    return fuzz_seed_of(seeds, sizeof(seeds) / sizeof(seeds[0]), number, into, room);
}

static const char *const heads[] = {"POST /v1/guests", "PATCH /v1/guests/fuzzed",
                                    "DELETE /v1/guests/fuzzed", "GET /v1/guests/fuzzed"};

static void say(int fd, const void *words, size_t bytes)
{
    (void)send(fd, words, bytes, MSG_NOSIGNAL);
    fuzz_turn();
}

/* Until memd has closed, or has nothing more to say to somebody who says nothing more. */
static void hear(int fd)
{
    char answer[4096];

    shutdown(fd, SHUT_WR);
    for (int quiet = 0; quiet < 20;) {
        ssize_t got = read(fd, answer, sizeof(answer));

        if (got == 0)
            break;
        quiet = got > 0 ? 0 : quiet + 1;
        fuzz_turn();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct daemon *daemon = fuzz_daemon();
    char head[256];
    int fd;

    if (bytes == 0)
        return 0;
    fuzz_register("fuzzed");
    fd = fuzz_connect(SOCK_STREAM, "");
    if (data[0] > '0' && data[0] <= '4') {
        snprintf(head, sizeof(head),
                 "%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n",
                 heads[data[0] - '1'], bytes - 1);
        say(fd, head, strlen(head));
    }
    say(fd, data + 1, bytes - 1);
    hear(fd);
    close(fd);
    for (const struct guest *guest = daemon->registry.first; guest; guest = guest->next)
        FUZZ_REQUIRE(words_are_name(guest->name) &&
                     guest->account.min_bytes <= guest->account.max_bytes);
    fuzz_remove_guests();
    return 0;
}
