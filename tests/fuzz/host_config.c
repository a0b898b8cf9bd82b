/* SPDX-License-Identifier: Apache-2.0 */
/* memd.conf: whatever is in the file, it is understood as a whole or refused with words. */
#include <sys/mman.h>
#include <unistd.h>

#include "config.h"
#include "fuzz.h"

static const char *const seeds[] = {
    "[host]\nbudget = 48G\nreserve = 1G\nsocket = /run/x.sock\nstate_dir = /x\ngrace_s = 1.5\n",
    "[sharing]\nengine = kernel\nrevisit_s = 2\ncpu_percent = 10\n[store]\nbudget = 1T\n",
    "[domain web]\nuids = root, 2001 3\n   4\nneutral = /a /b,/c\n[guest a]\nmax = 8G\nmin=1\n"
    "shares = 10\ndomain = web\n",
    "[vault]\nbudget=1K\nspill_path=/x\nspill_budget=1M\n[migration]\nlisten=[::1]:80\n"
    "bandwidth=1G\ntls_cert=/a\ntls_key=/b\ntls_ca=/c\nplain=yes\n",
    "# a comment\n; another\n[metrics]\nlisten = localhost:9417\n",
};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    return fuzz_seed_of(seeds, sizeof(seeds) / sizeof(seeds[0]), number, into, room);
}

static void check(const struct config *config)
{
    FUZZ_REQUIRE(config->cpu_percent > 0 && config->revisit_s > 0 && config->grace_s >= 0);
    FUZZ_REQUIRE(memchr(config->socket, 0, sizeof(config->socket)));
    for (size_t i = 0; i < config->domain_count; i++)
        FUZZ_REQUIRE(words_are_name(config->domains[i].name));
    for (size_t i = 0; i < config->guest_count; i++)
        FUZZ_REQUIRE(words_are_name(config->guests[i].name));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    char path[64], error[CONFIG_ERROR_BYTES] = "";
    struct config config;
    int fd = memfd_create("memd.conf", MFD_CLOEXEC);

    FUZZ_REQUIRE(fd >= 0 && write(fd, data, bytes) == (ssize_t)bytes);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    if (config_load(path, &config, error) == 0) {
        check(&config);
        config_free(&config);
    } else {
        FUZZ_REQUIRE(error[0]);
    }
    close(fd);
    return 0;
}
