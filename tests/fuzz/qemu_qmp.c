/* SPDX-License-Identifier: Apache-2.0 */
/* What comes out of a QMP socket. A second thread is QEMU: it says the input and hangs up. */
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "fuzz.h"
#include "qmp.h"

#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n{\"return\": {}}\r\n"

static const char *const seeds[] = {
    GREETING "{\"return\": [{\"id\": \"m\", \"size\": 1}]}\r\n{\"return\": {}}\r\n",
    GREETING "{\"timestamp\": {\"seconds\": 1}, \"event\": \"RESUME\"}\r\n{\"return\": {}}\r\n",
    GREETING "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n{\"return\": 1}\r\n",
    "{\"QMP\": 1}\r\n{\"error\": 3}\r\n",
};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    return fuzz_seed_of(seeds, sizeof(seeds) / sizeof(seeds[0]), number, into, room);
}

static int listener = -1;
static struct sockaddr_un address = {.sun_family = AF_UNIX};
static sem_t hung_up;
static const uint8_t *words;
static size_t word_bytes;

static void say_all(int fd)
{
    char answer[512];

    for (size_t said = 0; said < word_bytes;) {
        ssize_t sent = send(fd, words + said, word_bytes - said, MSG_NOSIGNAL);

        if (sent <= 0)
            break;
        said += (size_t)sent;
    }
    shutdown(fd, SHUT_WR);
    while (read(fd, answer, sizeof(answer)) > 0)
        ;
    close(fd);
    sem_post(&hung_up);
}

static void *be_qemu(void *unused)
{
    (void)unused;
    for (;;)
        say_all(accept(listener, NULL, NULL));
    return NULL;
}

static void remove_socket(void)
{
    unlink(address.sun_path);
}

static void start(void)
{
    pthread_t thread;

    snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/memd-fuzz-%d.qmp", (int)getpid());
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    FUZZ_REQUIRE(bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0);
    FUZZ_REQUIRE(listen(listener, 8) == 0);
    FUZZ_REQUIRE(sem_init(&hung_up, 0, 0) == 0);
    atexit(remove_socket);
    FUZZ_REQUIRE(pthread_create(&thread, NULL, be_qemu, NULL) == 0);
}

static void talk(struct qmp *qmp)
{
    for (int i = 0; i < 3; i++) {
        json_t *result = NULL;
        int error = qmp_execute(qmp, "query-memdev", NULL, 5000, &result);

        FUZZ_REQUIRE(error <= 0 && (error != 0 || result));
        FUZZ_REQUIRE(error != -EREMOTEIO || qmp_error(qmp)[0]);
        FUZZ_REQUIRE(error != -ETIMEDOUT);
        json_decref(result);
    }
    qmp_close(qmp);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct qmp *qmp;

    if (listener < 0)
        start();
    words = data;
    word_bytes = bytes;
    if (qmp_open(address.sun_path, 5000, &qmp) == 0)
        talk(qmp);
    while (sem_wait(&hung_up) && errno == EINTR)
        ;
    return 0;
}
