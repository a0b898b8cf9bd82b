/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Words for the operator: one line each, written once, at the edge where the consequence is known
 * ("guest 'db1': freeze refused (EBUSY), its pages stay private"). Lines go to standard error, with
 * the service manager's priority prefixes when it reads them.
 */
#ifndef MEMD_LOG_H
#define MEMD_LOG_H

#include <stdbool.h>

enum log_level {
    LOG_LEVEL_ERROR,
    LOG_LEVEL_WARNING,
    LOG_LEVEL_NOTICE,
    LOG_LEVEL_DETAIL,
    LOG_LEVEL_COUNT
};

/* What is written from now on: everything up to `level`. Finds out by itself whether standard error
 * leads to the journal. */
void log_setup(enum log_level level);

/* From now on to syslog: standard error is somebody else's. */
void log_to_syslog(void);

/* "error", "warning", "info", "debug" into *ret_level; false for any other word. */
bool log_level_parse(const char *word, enum log_level *ret_level);

void log_write(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...)   log_write(LOG_LEVEL_ERROR, __VA_ARGS__)
#define log_warning(...) log_write(LOG_LEVEL_WARNING, __VA_ARGS__)
#define log_notice(...)  log_write(LOG_LEVEL_NOTICE, __VA_ARGS__)
#define log_detail(...)  log_write(LOG_LEVEL_DETAIL, __VA_ARGS__)

#endif
