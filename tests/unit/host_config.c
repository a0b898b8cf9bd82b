/* SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "config.h"

static int load(const char *text, struct config *config, char *error)
{
    char path[] = "/tmp/memd-config-XXXXXX";
    int fd = mkstemp(path), result;

    cr_assert_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    result = config_load(path, config, error);
    unlink(path);
    return result;
}

Test(host_config, everything_that_can_be_said_is_understood)
{
    static const char text[] =
        "# a comment\n[host]\nbudget = 28G\nreserve = 1G\nsocket = /run/x.sock\n"
        "state_dir = /var/lib/x\ngrace_s = 1.5\n[sharing]\nengine = kernel\nrevisit_s = 0.5\n"
        "cpu_percent = 150\n[store]\nbudget = 4096\n[vault]\nbudget = 1T\nspill_path = /spill\n"
        "spill_budget = 2K\n[migration]\nlisten = [::1]:700\nbandwidth = 10M\ntls_cert = /c\n"
        "tls_key = /k\ntls_ca = /a\nplain = yes\n[metrics]\nlisten = 127.0.0.1:9417\n"
        "[domain web]\nuids = 0 1001\n    1002\nneutral = /a /b\n[guest db-1.x]\nmax = 4G\n"
        "min = 1G\nshares = 7\ndomain = web\nincoming = /usr/bin/vmm --incoming\n"
        "    \"a b\"  --end\nincoming_user = 1001\n";
    char error[CONFIG_ERROR_BYTES];
    struct config config;

    cr_assert_eq(load(text, &config, error), 0, "%s", error);
    cr_assert_eq(config.budget_bytes, 28ULL << 30);
    cr_assert_eq(config.grace_s, 1.5);
    cr_assert_eq(config.engine, SHARING_KERNEL);
    cr_assert_eq(config.cpu_percent, 150);
    cr_assert_eq(config.vault_budget_bytes, 1ULL << 40);
    cr_assert(config.plain && config.vault_set && config.migration_listen[0]);
    cr_assert_eq(config.domains[0].uid_count, 3);
    cr_assert(config_domain_admits(&config.domains[0], 1002));
    cr_assert_not(config_domain_admits(&config.domains[0], 1003));
    cr_assert_eq(config.domains[0].neutral_count, 2);
    cr_assert_str_eq(config.domains[0].neutral[1], "/b");
    cr_assert_eq(config_guest_find(&config, "db-1.x")->shares, 7);
    cr_assert_eq(config.guests[0].incoming_count, 4);
    cr_assert_str_eq(config.guests[0].incoming[0], "/usr/bin/vmm");
    cr_assert_str_eq(config.guests[0].incoming[2], "a b");
    cr_assert_str_eq(config.guests[0].incoming[3], "--end");
    cr_assert_null(config.guests[0].incoming[4]);
    cr_assert_eq(config.guests[0].incoming_uid, 1001);
    config_free(&config);
}

Test(host_config, what_is_not_said_has_its_default)
{
    char error[CONFIG_ERROR_BYTES];
    struct config config;

    cr_assert_eq(load("", &config, error), 0);
    cr_assert_str_eq(config.socket, "/run/memd/memd.sock");
    cr_assert_eq(config.reserve_bytes, 512ULL << 20);
    cr_assert_eq(config.revisit_s, 10);
    cr_assert_eq(config.cpu_percent, 50);
    config_free(&config);
}

struct mistake {
    char text[400];
    char words[80]; /* what the error has to contain */
};

ParameterizedTestParameters(host_config, a_mistake_is_named_with_its_line)
{
    static struct mistake mistakes[] = {
        {"[host]\nbudgt = 1G\n", ":2: [host] has no key 'budgt'"},
        {"[hots]\n", ":1: there is no section [hots]"},
        {"\n[hots]\nbudget = 1G\n", ":2: there is no section [hots]"},
        {"[host]\nbudget = 1.5G\n", ":2: budget = 1.5G: give a size"},
        {"[host]\nbudget = 99999999999T\n", ":2: budget"},
        {"[host]\nbudget = -1\n", ":2: budget"},
        {"[host]\nbudget = 1\nbudget = 2\n", ":3: budget is given twice"},
        {"[host]\nsocket = run/x\n", ":2: socket = run/x: give an absolute path"},
        {"[host]\nnonsense\n", ":2: neither"},
        {"[sharing]\nengine = ksm\n", ":2: engine = ksm: give agent, kernel or off"},
        {"[sharing]\ncpu_percent = 0\n", ":2: cpu_percent"},
        {"[sharing]\nrevisit_s = soon\n", ":2: revisit_s"},
        {"[metrics]\nlisten = 9417\n", ":2: listen = 9417: give HOST:PORT"},
        {"[metrics]\nlisten = ::1:9417\n", ":2: listen"},
        {"[migration]\nlisten = a:1\n", "tls_cert, tls_key and tls_ca, all three"},
        {"[migration]\ntls_cert = /a\nplain = yes\n", "all three"},
        {"[guest a]\nincoming = vmm\n", "does not begin with the absolute path"},
        {"[guest a]\nincoming = /vmm \"a\n", "is not closed"},
        {"[guest a]\nmax = 1G\nincoming = /vmm\n", "incoming needs max and incoming_user"},
        {"[guest a]\nincoming_user = nobody-here\n", "neither a number nor a user"},
        {"[migration]\nplain = maybe\n", ":2: plain = maybe: give yes or no"},
        {"[domain web]\nuid = 1\n", ":2: a domain has no 'uid'"},
        {"[domain web]\nuids = 1 no-such-user-here\n", ":2: uids: 'no-such-user-here'"},
        {"[domain web]\nneutral = image\n", ":2: neutral: 'image' is no absolute path"},
        {"[domain ../x]\nuids = 1\n", ":2: [domain ../x]: names are"},
        {"[guest a]\nmax = x\n", ":2: max = x"},
        {"[guest a]\nshares = 0\n", ":2: shares = 0"},
        {"[guest a]\ndomain = web\n", "there is no [domain web]"},
        {"[guest a]\nmax = 1G\nmin = 2G\n", "min is more than max"},
        {"[host]\nsocket = "
         "/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
         "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n",
         ":2: socket is too long"},
        {"[domain a]\nneutral = "
         "/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
         "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
         "aa"
         "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n",
         ":2: this line has more than"},
    };

    return cr_make_param_array(struct mistake, mistakes, sizeof(mistakes) / sizeof(mistakes[0]));
}

ParameterizedTest(struct mistake *mistake, host_config, a_mistake_is_named_with_its_line)
{
    char error[CONFIG_ERROR_BYTES];
    struct config config = {.budget_bytes = 77};

    cr_assert_neq(load(mistake->text, &config, error), 0, "taken: %s", mistake->text);
    cr_assert_not_null(strstr(error, mistake->words), "'%s' does not say '%s'", error,
                       mistake->words);
    cr_assert_eq(config.budget_bytes, 77, "the caller's configuration was touched");
}

Test(host_config, a_file_that_is_not_there_is_an_error)
{
    char error[CONFIG_ERROR_BYTES];
    struct config config;

    cr_assert_eq(config_load("/nowhere/memd.conf", &config, error), -ENOENT);
    cr_assert_not_null(strstr(error, "/nowhere/memd.conf"));
    cr_assert_eq(config_load("/tmp", &config, error), -EINVAL);
    cr_assert_not_null(strstr(error, "is no file"));
}
