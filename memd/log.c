/* SPDX-License-Identifier: Apache-2.0 */
#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <syslog.h>
#include <systemd/sd-daemon.h>

/* The only state that belongs to the process and not to a struct: there is one standard error. */
static enum log_level written_up_to = LOG_LEVEL_NOTICE;
static bool to_journal, to_syslog;

static const char *const level_names[LOG_LEVEL_COUNT] = {"error", "warning", "info", "debug"};
static const char *const journal_prefixes[LOG_LEVEL_COUNT] = {SD_ERR, SD_WARNING, SD_NOTICE,
                                                              SD_DEBUG};

static const int priorities[LOG_LEVEL_COUNT] = {LOG_ERR, LOG_WARNING, LOG_NOTICE, LOG_DEBUG};

/* JOURNAL_STREAM names the device and inode of the journal's socket; a standard error that was
 * redirected since is another one. */
static bool stderr_is_journal(void)
{
    const char *stream = getenv("JOURNAL_STREAM");
    unsigned long long device, inode;
    struct stat about;

    return stream && sscanf(stream, "%llu:%llu", &device, &inode) == 2 && fstat(2, &about) == 0 &&
           about.st_dev == device && about.st_ino == inode;
}

void log_setup(enum log_level level)
{
    written_up_to = level;
    to_journal = stderr_is_journal();
}

void log_to_syslog(void)
{
    openlog("memd", LOG_PID, LOG_DAEMON);
    to_syslog = true;
}

bool log_level_parse(const char *word, enum log_level *ret_level)
{
    for (int i = 0; i < LOG_LEVEL_COUNT; i++) {
        if (strcmp(word, level_names[i]) == 0) {
            *ret_level = (enum log_level)i;
            return true;
        }
    }
    return false;
}

void log_write(enum log_level level, const char *format, ...)
{
    char line[1024];
    va_list arguments;

    if (level > written_up_to)
        return;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    if (to_syslog)
        syslog(priorities[level], "%s", line);
    else if (to_journal)
        fprintf(stderr, "%s%s\n", journal_prefixes[level], line);
    else
        fprintf(stderr, "memd: %s%s\n",
                level <= LOG_LEVEL_WARNING ? (level == LOG_LEVEL_ERROR ? "error: " : "warning: ")
                                           : "",
                line);
}
