/* SPDX-License-Identifier: Apache-2.0 */
#include "optstr.h"

#include <ctype.h>
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The value of a key of a JSON option ('{"qom-type": ...}'), as text. */
static char *get_json(const char *options, const char *key)
{
    json_t *object = json_loads(options, 0, NULL);
    json_t *value = json_object_get(object, key);
    char *text = NULL;

    if (json_is_string(value))
        text = strdup(json_string_value(value));
    else if (json_is_boolean(value))
        text = strdup(json_is_true(value) ? "on" : "off");
    else if (value)
        text = json_dumps(value, JSON_ENCODE_ANY);
    json_decref(object);
    return text;
}

/* Takes the next word off *cursor, its doubled commas made single; NULL at the end. */
static char *next_word(const char **cursor)
{
    const char *from = *cursor;
    char *word, *to;

    if (!from || !*from)
        return NULL;
    word = to = malloc(strlen(from) + 1);
    if (!word)
        return NULL;
    while (*from) {
        if (*from == ',' && from[1] != ',')
            break;
        if (*from == ',')
            from++;
        *to++ = *from++;
    }
    *to = '\0';
    *cursor = *from ? from + 1 : from;
    return word;
}

/* The value that `word` gives to `key`, or NULL. */
static const char *value_of(const char *word, bool first, const char *implied, const char *key)
{
    const char *equals = strchr(word, '=');
    size_t length = equals ? (size_t)(equals - word) : strlen(word);

    if (!equals && first && implied)
        return strcmp(implied, key) == 0 ? word : NULL;
    if (strlen(key) == length && strncmp(word, key, length) == 0)
        return equals ? equals + 1 : "on";
    if (!equals && strncmp(word, "no", 2) == 0 && strcmp(word + 2, key) == 0)
        return "off";
    return NULL;
}

char *qemu_optstr_get(const char *options, const char *implied, const char *key)
{
    const char *cursor = options;
    char *found = NULL, *word;

    if (options[0] == '{')
        return get_json(options, key);
    for (bool first = true; (word = next_word(&cursor)); first = false) {
        const char *value = value_of(word, first, implied, key);

        if (value) {
            free(found);
            found = strdup(value);
        }
        free(word);
    }
    return found;
}

static bool says(const char *options, const char *key, const char *const words[])
{
    char *value = qemu_optstr_get(options, NULL, key);
    bool found = false;

    for (size_t i = 0; value && words[i]; i++)
        found |= strcmp(value, words[i]) == 0;
    free(value);
    return found;
}

bool qemu_optstr_says_no(const char *options, const char *key)
{
    return says(options, key, (const char *const[]){"off", "no", "false", "n", NULL});
}

bool qemu_optstr_says_yes(const char *options, const char *key)
{
    return says(options, key, (const char *const[]){"on", "yes", "true", "y", "on-fault", NULL});
}

int qemu_optstr_size(const char *text, char unit, uint64_t *ret_bytes)
{
    static const char units[] = "bkmgtpe";
    const char *letter;
    char *end;
    double number;

    if (!isdigit((unsigned char)text[0]))
        return -EINVAL;
    number = strtod(text, &end);
    if (*end)
        unit = *end++;
    letter = strchr(units, tolower((unsigned char)unit));
    if (*end || !letter || !*letter)
        return -EINVAL;
    number = ldexp(number, 10 * (int)(letter - units));
    if (!(number < ldexp(1, 63)))
        return -ERANGE;
    *ret_bytes = (uint64_t)number;
    return 0;
}

char *qemu_optstr_escape(const char *text)
{
    char *escaped = malloc(2 * strlen(text) + 1), *to = escaped;

    if (!escaped)
        return NULL;
    for (; *text; text++) {
        if (*text == ',')
            *to++ = ',';
        *to++ = *text;
    }
    *to = '\0';
    return escaped;
}
