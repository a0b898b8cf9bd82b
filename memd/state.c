/* SPDX-License-Identifier: Apache-2.0 */
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "log.h"

int state_open(const char *path, int *ret_dir, int *ret_lock)
{
    int dir, lock, result;

    if (mkdir(path, 0700) && errno != EEXIST)
        return -errno;
    dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0)
        return -errno;
    lock = openat(dir, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (lock < 0) {
        result = -errno;
        goto undo_dir;
    }
    if (flock(lock, LOCK_EX | LOCK_NB)) {
        result = errno == EWOULDBLOCK ? -EBUSY : -errno;
        goto undo_lock;
    }
    *ret_dir = dir;
    *ret_lock = lock;
    return 0;
undo_lock:
    close(lock);
undo_dir:
    close(dir);
    return result;
}

int state_subdirectory(int dir, const char *name, int *ret_dir)
{
    int sub;

    if (mkdirat(dir, name, 0700) && errno != EEXIST)
        return -errno;
    sub = openat(dir, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (sub < 0)
        return -errno;
    *ret_dir = sub;
    return 0;
}

/* One write: json_dumpfd() makes one for each token, thousands where there are many guests. */
static int write_json(int fd, const json_t *json)
{
    char *text = json_dumps(json, JSON_INDENT(1));
    size_t length = text ? strlen(text) : 0;
    ssize_t done = text ? write(fd, text, length) : -1;

    free(text);
    return text && done == (ssize_t)length ? 0 : -EIO;
}

int state_write(int dir, const char *name, const json_t *json, bool durable)
{
    char fresh[300];
    int fd, result;

    snprintf(fresh, sizeof(fresh), "%s.new", name);
    fd = openat(dir, fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    result = write_json(fd, json);
    if (!result && durable && fsync(fd))
        result = -errno;
    close(fd);
    if (!result && renameat(dir, fresh, dir, name))
        result = -errno;
    if (!result && durable && fsync(dir))
        result = -errno;
    if (result)
        unlinkat(dir, fresh, 0);
    return result;
}

json_t *state_read(int dir, const char *name)
{
    int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    json_t *json;

    if (fd < 0)
        return NULL;
    json = json_loadfd(fd, 0, NULL);
    close(fd);
    return json;
}

/* ---- in the background ---- */

#define SETTLE_NS 100000000ULL /* a turn of waiting */

enum step { STEP_OPEN, STEP_WRITE, STEP_SYNC, STEP_RENAME };

static void begin(struct state_saver *saver);

static int start_step(struct state_saver *saver)
{
    switch (saver->step) {
    case STEP_OPEN:
        return loop_open_start(saver->loop, &saver->job, saver->dir, saver->fresh,
                               O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW);
    case STEP_WRITE:
        return loop_write_start(saver->loop, &saver->job, saver->fd, saver->text, saver->bytes);
    case STEP_SYNC: return loop_sync_start(saver->loop, &saver->job, saver->fd);
    default:
        return loop_rename_start(saver->loop, &saver->job, saver->dir, saver->fresh, saver->name);
    }
}

static void finish(struct state_saver *saver, int result)
{
    if (saver->fd >= 0)
        close(saver->fd);
    saver->fd = -1;
    free(saver->text);
    saver->text = NULL;
    if (result)
        log_error("%s can't be written (%s): a restarted memd would not know what is new in it",
                  saver->name, strerror(-result));
    saver->written = saver->taken;
    saver->taken = 0;
    if (saver->saved)
        saver->saved(saver->owner);
    if (saver->written < saver->asked)
        begin(saver);
}

static void step_is_done(struct loop_job *job, int result)
{
    struct state_saver *saver = job->owner;

    if (saver->step == STEP_OPEN && result >= 0)
        saver->fd = result;
    if (saver->step == STEP_WRITE && result >= 0 && (uint32_t)result != saver->bytes)
        result = -EIO;
    if (result >= 0 && saver->step++ != STEP_RENAME) {
        result = start_step(saver);
        if (!result)
            return;
    }
    finish(saver, result < 0 ? result : 0);
}

static void begin(struct state_saver *saver)
{
    json_t *json;
    int result;

    if (saver->taken || saver->ending)
        return;
    json = saver->content(saver->owner);
    saver->text = json ? json_dumps(json, JSON_INDENT(1)) : NULL;
    json_decref(json);
    saver->taken = saver->asked;
    saver->bytes = saver->text ? (uint32_t)strlen(saver->text) : 0;
    saver->step = STEP_OPEN;
    saver->fd = -1;
    saver->job = (struct loop_job){.done = step_is_done, .owner = saver};
    snprintf(saver->fresh, sizeof(saver->fresh), "%s.new", saver->name);
    result = saver->text ? start_step(saver) : -ENOMEM;
    if (result)
        finish(saver, result);
}

uint64_t state_saver_ask(struct state_saver *saver)
{
    uint64_t asked = ++saver->asked;

    begin(saver);
    return asked;
}

void state_saver_settle(struct state_saver *saver)
{
    saver->ending = true;
    while (saver->taken && loop_turn(saver->loop, SETTLE_NS) == 0)
        ;
}

void state_saver_end(struct state_saver *saver)
{
    json_t *json;
    int result;

    if (saver->written >= saver->asked)
        return;
    saver->written = saver->asked;
    json = saver->content(saver->owner);
    result = json ? state_write(saver->dir, saver->name, json, true) : -ENOMEM;
    json_decref(json);
    if (result)
        log_error("%s can't be written (%s): the next memd will not know what is new in it",
                  saver->name, strerror(-result));
}
