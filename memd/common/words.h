/* SPDX-License-Identifier: Apache-2.0 */
/* What memd and memctl both read from people: names and addresses. */
#ifndef MEMD_COMMON_WORDS_H
#define MEMD_COMMON_WORDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NAME_BYTES 64 /* of a guest or a trust domain, with its end mark */

/* [A-Za-z0-9][A-Za-z0-9._-]{0,62} */
bool words_are_name(const char *text);

/* HOST:PORT or [HOST]:PORT cut in two; false when it is neither, or HOST does not fit. PORT is from
 * 0 to 65535: whether 0 means anything is the caller's affair. */
bool words_split_address(const char *text, char *host, size_t host_bytes, uint16_t *ret_port);

#endif
