/* SPDX-License-Identifier: Apache-2.0 */
/* What users write: sizes, numbers and names. */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ctl.h"

/* The power of two of a suffix, or -EINVAL. */
static int suffix_shift(const char *suffix)
{
    static const char letters[] = "KMGT";
    const char *letter;

    if (strcmp(suffix, "") == 0 || strcmp(suffix, "B") == 0)
        return 0;
    letter = strchr(letters, toupper((unsigned char)suffix[0]));
    if (!letter || !*letter)
        return -EINVAL;
    if (strcmp(suffix + 1, "") != 0 && strcmp(suffix + 1, "B") != 0 &&
        strcmp(suffix + 1, "iB") != 0)
        return -EINVAL;
    return 10 * (int)(letter - letters + 1);
}

int ctl_value_size(const char *text, uint64_t *ret_bytes)
{
    size_t digits = strspn(text, "0123456789.");
    double number;
    char *end;
    int shift;

    if (!isdigit((unsigned char)text[0]))
        return -EINVAL;
    number = strtod(text, &end);
    if (end != text + digits)
        return -EINVAL; /* an exponent, or two points */
    shift = suffix_shift(end);
    if (shift < 0)
        return shift;
    number = ldexp(number, shift);
    if (!(number < ldexp(1, 53)))
        return -ERANGE; /* beyond 8 PiB a double loses bytes */
    *ret_bytes = (uint64_t)number;
    return 0;
}

int ctl_value_number(const char *text, uint64_t most, uint64_t *ret_number)
{
    unsigned long long number;
    char *end;

    if (!isdigit((unsigned char)text[0]))
        return -EINVAL;
    errno = 0;
    number = strtoull(text, &end, 10);
    if (*end)
        return -EINVAL;
    if (errno || number < 1 || number > most)
        return -ERANGE;
    *ret_number = number;
    return 0;
}

bool ctl_value_check_guest_name(const char *text)
{
    if (words_are_name(text))
        return true;
    ctl_say("'%s' is no name for a guest: up to 63 letters, digits and . _ -, the first one a "
            "letter or a digit",
            text);
    return false;
}
