/* SPDX-License-Identifier: Apache-2.0 */
#include "words.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

bool words_are_name(const char *text)
{
    static const char allowed[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    size_t length = strlen(text);

    return length >= 1 && length < NAME_BYTES && !strchr("._-", text[0]) &&
           strspn(text, allowed) == length;
}

bool words_split_address(const char *text, char *host, size_t host_bytes, uint16_t *ret_port)
{
    const char *colon = strrchr(text, ':');
    unsigned long port;
    size_t length;
    char *end;

    if (!colon || colon == text || !isdigit((unsigned char)colon[1]))
        return false;
    port = strtoul(colon + 1, &end, 10);
    length = (size_t)(colon - text);
    if (text[0] == '[') {
        if (colon[-1] != ']' || length < 3)
            return false;
        text++;
        length -= 2;
    } else if (memchr(text, ':', length)) {
        return false;
    }
    if (*end || port > UINT16_MAX || length >= host_bytes)
        return false;
    memcpy(host, text, length);
    host[length] = '\0';
    *ret_port = (uint16_t)port;
    return true;
}
