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
