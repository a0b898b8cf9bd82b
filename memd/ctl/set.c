/* SPDX-License-Identifier: Apache-2.0 */
/* memctl set and memctl detach: what changes a guest that runs. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ctl.h"

#define SHARES_MAX 1000000

/* What the value of a key is, and what memd calls it. */
static const struct setting {
    const char *key;
    const char *member;
    enum { SETTING_SIZE, SETTING_NUMBER, SETTING_NAME } kind;
    uint64_t least;
    const char *wanted; /* for who gave something else */
} settings[] = {
    {"max", "max_bytes", SETTING_SIZE, 1, "a size above 0, as 512M or 2G"},
    {"min", "min_bytes", SETTING_SIZE, 0, "a size, as 512M or 2G"},
    {"shares", "shares", SETTING_NUMBER, 1, "a number from 1 to 1000000"},
    {"domain", "domain", SETTING_NAME, 0, "the name of a domain of memd.conf, or nothing"},
};

static const struct setting *find_setting(const char *word, size_t length)
{
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        if (strlen(settings[i].key) == length && strncmp(settings[i].key, word, length) == 0)
            return &settings[i];
    }
    return NULL;
}

static json_t *read_value(const struct setting *setting, const char *text)
{
    uint64_t number;
    int error;

    if (setting->kind == SETTING_NAME)
        return !*text || words_are_name(text) ? json_string(text) : NULL;
    if (setting->kind == SETTING_SIZE)
        error = ctl_value_size(text, &number);
    else
        error = ctl_value_number(text, SHARES_MAX, &number);
    return error < 0 || number < setting->least ? NULL : json_integer((json_int_t)number);
}

/* Puts "key=value" into `body`; complains and returns false when it is none. */
static bool take_word(json_t *body, const char *word)
{
    const char *equals = strchr(word, '=');
    const struct setting *setting = equals ? find_setting(word, (size_t)(equals - word)) : NULL;
    json_t *value;

    if (!setting) {
        ctl_say("set: '%s' is none of max=SIZE, min=SIZE, shares=NUMBER, domain=DOMAIN", word);
        return false;
    }
    if (json_object_get(body, setting->member)) {
        ctl_say("set: %s is given twice; keep one", setting->key);
        return false;
    }
    value = read_value(setting, equals + 1);
    if (!value) {
        ctl_say("set: '%s' is no value for %s: give %s", equals + 1, setting->key, setting->wanted);
        return false;
    }
    json_object_set_new(body, setting->member, value);
    return true;
}

/* The guest's path, or false with words. */
static bool guest_path(const char *name, char path[128])
{
    if (!ctl_value_check_guest_name(name))
        return false;
    snprintf(path, 128, "/v1/guests/%s", name);
    return true;
}

enum ctl_status ctl_set_run(const struct ctl_arguments *arguments)
{
    json_t *body = json_object();
    enum ctl_status status = CTL_USAGE;
    char path[128];
    bool sound = guest_path(arguments->operands[0], path);

    for (char **word = arguments->operands + 1; sound && *word; word++)
        sound = take_word(body, *word);
    if (sound)
        status = ctl_http_call(arguments->socket, "PATCH", path, body, CTL_TIMEOUT_S, NULL);
    json_decref(body);
    return status;
}

/* memd answers when every page is private again, however long that takes. */
enum ctl_status ctl_detach_run(const struct ctl_arguments *arguments)
{
    char path[128];

    if (!guest_path(arguments->operands[0], path))
        return CTL_USAGE;
    return ctl_http_call(arguments->socket, "DELETE", path, NULL, 0, NULL);
}
