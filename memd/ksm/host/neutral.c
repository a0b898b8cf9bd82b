/* SPDX-License-Identifier: Apache-2.0 */
#include "neutral.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "log.h"

#define STEP_PAGES 16U

struct ksm_neutral {
    struct loop *loop;
    struct loop_task task;
    struct hash_secret secret;
    char **paths;
    size_t path_count, path;
    int fd; /* of the file that is being read; -1: none */
    uint64_t *hashes;
    size_t count, room;
    bool complete;
};

static bool step_reading(struct loop_task *task);

int ksm_neutral_start(struct loop *loop, const struct hash_secret *secret, char *const *paths,
                      size_t path_count, struct ksm_neutral **ret_neutral)
{
    struct ksm_neutral *neutral = calloc(1, sizeof(*neutral));

    if (!neutral)
        return -ENOMEM;
    *neutral = (struct ksm_neutral){.loop = loop, .secret = *secret, .fd = -1};
    neutral->task = (struct loop_task){.step = step_reading, .owner = neutral};
    neutral->paths = calloc(path_count, sizeof(*neutral->paths));
    for (size_t i = 0; neutral->paths && i < path_count; i++) {
        neutral->paths[i] = strdup(paths[i]);
        if (!neutral->paths[i])
            break;
        neutral->path_count++;
    }
    if (neutral->path_count < path_count) {
        ksm_neutral_stop(neutral);
        return -ENOMEM;
    }
    loop_task_add(loop, &neutral->task);
    *ret_neutral = neutral;
    return 0;
}

void ksm_neutral_stop(struct ksm_neutral *neutral)
{
    loop_task_cancel(neutral->loop, &neutral->task);
    if (neutral->fd >= 0)
        close(neutral->fd);
    for (size_t i = 0; i < neutral->path_count; i++)
        free(neutral->paths[i]);
    free(neutral->paths);
    free(neutral->hashes);
    free(neutral);
}

static int by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

    return (a > b) - (a < b);
}

/* The one long turn: sorting, once per domain and start (0.1 s for each GiB of files). */
static void finish(struct ksm_neutral *neutral)
{
    qsort(neutral->hashes, neutral->count, sizeof(*neutral->hashes), by_value);
    neutral->complete = true;
}

static int add(struct ksm_neutral *neutral, uint64_t hash)
{
    if (neutral->count == neutral->room) {
        size_t room = neutral->room ? neutral->room + neutral->room / 2 : 1024;
        uint64_t *hashes = realloc(neutral->hashes, room * sizeof(*hashes));

        if (!hashes)
            return -ENOMEM;
        neutral->hashes = hashes;
        neutral->room = room;
    }
    neutral->hashes[neutral->count++] = hash;
    return 0;
}

/* The next pages of the open file; 0 at its end, or -errno. A last piece of a page counts as the
 * page cache has it: filled up with zeros. */
static int read_some(struct ksm_neutral *neutral)
{
    uint8_t buffer[STEP_PAGES * PAGE_BYTES];
    ssize_t got = read(neutral->fd, buffer, sizeof(buffer));

    if (got <= 0)
        return got < 0 ? -errno : 0;
    memset(buffer + got, 0, sizeof(buffer) - (size_t)got);
    for (ssize_t at = 0; at < got; at += (ssize_t)PAGE_BYTES) {
        int result = add(neutral, hash_page(&neutral->secret, buffer + at));
        if (result)
            return result;
    }
    return 1;
}

static bool step_reading(struct loop_task *task)
{
    struct ksm_neutral *neutral = task->owner;
    const char *path;
    int result;

    if (neutral->path == neutral->path_count) {
        finish(neutral);
        return false;
    }
    path = neutral->paths[neutral->path];
    if (neutral->fd < 0)
        neutral->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    result = neutral->fd < 0 ? -errno : read_some(neutral);
    if (result > 0)
        return true;
    if (result < 0)
        log_warning("neutral file %s: %s: its contents are not shared", path, strerror(-result));
    if (neutral->fd >= 0)
        close(neutral->fd);
    neutral->fd = -1;
    neutral->path++;
    return true;
}

bool ksm_neutral_has(const struct ksm_neutral *neutral, uint64_t hash)
{
    return neutral->complete &&
           bsearch(&hash, neutral->hashes, neutral->count, sizeof(*neutral->hashes), by_value);
}
