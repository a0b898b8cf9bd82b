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

Test(host_config, a_domain_of_which_nothing_is_said_is_one)
{
    char error[CONFIG_ERROR_BYTES];
    struct config config;

    cr_assert_eq(load("[domain web]\n[guest a]\ndomain = web\n", &config, error), 0, "%s", error);
    cr_assert_not_null(config_domain_find(&config, "web"));
    cr_assert_not(config_domain_admits(config_domain_find(&config, "web"), 0));
    config_free(&config);
}

#define LONG_NAME "a123456789012345678901234567890123456789012345678901234567890"

Test(host_config, names_are_not_cut)
{
    char error[CONFIG_ERROR_BYTES];
    struct config config;

    cr_assert_eq(load("[domain " LONG_NAME "b]\nuids = 1\n[domain " LONG_NAME "c]\nuids = 2\n"
                      "[guest " LONG_NAME "b]\nmax = 1G\n[guest " LONG_NAME "c]\nmax = 2G\n",
                      &config, error),
                 0, "%s", error);
    cr_assert(config_domain_admits(config_domain_find(&config, LONG_NAME "b"), 1));
    cr_assert_not(config_domain_admits(config_domain_find(&config, LONG_NAME "b"), 2));
    cr_assert_eq(config_guest_find(&config, LONG_NAME "c")->max_bytes, 2ULL << 30);
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
        {"[host]\nbudget = 1\nbudget = 2\n", ":3: budget is given twice, in line 2"},
        {"[host]\nbudget = 0\n", ":2: budget = 0: give more than nothing"},
        {"[store]\nbudget = 0\n", ":2: budget = 0: give more than nothing"},
        {"[host]\nsocket = run/x\n", ":2: socket = run/x: give an absolute path"},
        {"[host]\nnonsense\n", ":2: neither"},
        {"[sharing]\nengine = ksm\n", ":2: engine = ksm: give agent, kernel or off"},
        {"[sharing]\ncpu_percent = 0\n", ":2: cpu_percent"},
        {"[sharing]\nrevisit_s = soon\n", ":2: revisit_s"},
        {"[sharing]\nrevisit_s = 0\n", ":2: revisit_s = 0: give a number from 0.01"},
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
        {"[domain web]\nuids = 0 1 # root\n", ":2: uids: a comment that begins with '#'"},
        {"[host]\nbudget = # much\n", ":2: budget: a comment"},
        {"[domain ../x]\nuids = 1\n", ":1: [domain ../x]: names are"},
        {"[host]\n[guest ]\n", ":2: [guest ]: names are"},
        {"[guest a]\nmax = x\n", ":2: max = x"},
        {"[guest a]\nshares = 0\n", ":2: shares = 0"},
        {"[guest a]\ndomain = web\nmax = 1G\n[host]\n", ":2: [guest a]: there is no [domain web]"},
        {"[guest a]\nmax = 1G\nmin = 2G\nshares = 3\n", ":3: [guest a]: min is more than max"},
        {"[guest a]\nmin = 2G\nmax = 1G\n", ":3: [guest a]: min is more than max"},
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

/* What is sound, and can't be meant on this host: taken, with a word about the first of it. */
ParameterizedTestParameters(host_config, what_can_not_be_meant_here_is_doubted)
{
    static struct mistake doubts[] = {
        {"[sharing]\nrevisit_s = 1\ncpu_percent = 99999\n", ":3: cpu_percent = 99999 is more than"},
        {"[domain a]\nuids = 0\nneutral = /dev/null/x\n",
         ":3: neutral: '/dev/null/x' can't be read"},
        {"[domain a]\nneutral = /etc/passwd\n   /no/such\n",
         ":3: neutral: '/no/such' can't be read"},
        {"[domain a]\nneutral = /dev/null\n", ":2: neutral: '/dev/null' is neither"},
        {"[host]\nreserve = 1G\nbudget = 4096T\n", ":3: [host] budget is more than"},
        {"[host]\nreserve = 4096T\n[store]\n", ":2: [host] reserve leaves nothing"},
        {"[store]\n# all\nbudget = 4096T\n", ":3: [store] budget is more than"},
        {"[domain a]\nneutral = /etc/passwd\n[host]\nreserve = 4096T\nbudget = 1G\n", ""},
    };

    return cr_make_param_array(struct mistake, doubts, sizeof(doubts) / sizeof(doubts[0]));
}

ParameterizedTest(struct mistake *mistake, host_config, what_can_not_be_meant_here_is_doubted)
{
    char error[CONFIG_ERROR_BYTES];
    struct config config;

    cr_assert_eq(load(mistake->text, &config, error), 0, "%s", error);
    cr_assert_eq(config.doubt[0] == '\0', mistake->words[0] == '\0', "'%s'", config.doubt);
    cr_assert_not_null(strstr(config.doubt, mistake->words), "'%s' does not say '%s'", config.doubt,
                       mistake->words);
    config_free(&config);
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
