/* SPDX-License-Identifier: Apache-2.0 */
#include "host.h"

#include <errno.h>
#include <ftw.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "log.h"

static struct daemon daemon_of_this_process;

/* memd's time (the linker puts this in the place of clock_gettime, --wrap): it passes when an input
 * says so, and otherwise a microsecond a look. */
int __real_clock_gettime(clockid_t clock, struct timespec *ret_time);
int __wrap_clock_gettime(clockid_t clock, struct timespec *ret_time);
static uint64_t now_ns = 1000000000;

int __wrap_clock_gettime(clockid_t clock, struct timespec *ret_time)
{
    if (clock != CLOCK_MONOTONIC)
        return __real_clock_gettime(clock, ret_time);
    now_ns += 1000;
    *ret_time = (struct timespec){(time_t)(now_ns / 1000000000), (long)(now_ns % 1000000000)};
    return 0;
}

void fuzz_let_pass(uint64_t ns)
{
    now_ns += ns;
    fuzz_turn();
}
static char directory[64];

static int remove_one(const char *path, const struct stat *about, int kind, struct FTW *walk)
{
    (void)about;
    (void)kind;
    (void)walk;
    return remove(path);
}

static void remove_directory(void)
{
    nftw(directory, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* Of no interest here, and it would be most of what the program writes. */
static void be_silent(void)
{
    log_setup(LOG_LEVEL_ERROR);
}

struct daemon *fuzz_daemon(void)
{
    struct config config;

    if (directory[0])
        return &daemon_of_this_process;
    strcpy(directory, "/tmp/memd-fuzz-XXXXXX");
    FUZZ_REQUIRE(mkdtemp(directory));
    atexit(remove_directory);
    be_silent();
    config_defaults(&config);
    snprintf(config.socket, sizeof(config.socket), "%s/memd.sock", directory);
    snprintf(config.state_dir, sizeof(config.state_dir), "%s/state", directory);
    config.grace_s = 0; /* what nobody uses goes at once */
    config.engine = SHARING_AGENT;
    FUZZ_REQUIRE(daemon_start(&daemon_of_this_process, &config, NULL) == 0);
    return &daemon_of_this_process;
}

void fuzz_turn(void)
{
    FUZZ_REQUIRE(loop_turn(&fuzz_daemon()->loop, 0) == 0);
}

struct guest *fuzz_register(const char *name)
{
    struct guest_request request = {.pid = getpid(), .uid = getuid(), .engine = ENGINE_AGENT};
    struct guest *guest = NULL;
    char words[512];

    snprintf(request.name, sizeof(request.name), "%s", name);
    request.wish.has_max = true;
    request.wish.max_bytes = 1 << 30;
    FUZZ_REQUIRE(registry_add(fuzz_daemon(), &request, &guest, words, sizeof(words)) == 0);
    return guest;
}

int fuzz_connect(int type, const char *suffix)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s/memd.sock%s", directory, suffix);
    FUZZ_REQUIRE(connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    return fd;
}

void fuzz_remove_guests(void)
{
    struct daemon *daemon = fuzz_daemon();

    while (daemon->registry.first)
        registry_remove(daemon->registry.first, "guest_gone", "the input has ended");
    /* A member leaves in bounded steps: one that said it was as large as can be takes many. */
    for (int i = 0; i < 400000 && (daemon->domains.first || daemon->agents.count); i++)
        fuzz_let_pass(i < 1000 ? 20000000 : 0);
    FUZZ_REQUIRE(!daemon->domains.first && daemon->agents.count == 0);
    FUZZ_REQUIRE(daemon->domains.budget.used_pages == 0);
}
