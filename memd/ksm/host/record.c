/* SPDX-License-Identifier: Apache-2.0 */
#include "record.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host.h"

#define BOOT_ID_BYTES 40

static void read_boot_id(char *ret_id)
{
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");

    if (!file || fscanf(file, "%39s", ret_id) != 1)
        strcpy(ret_id, "unknown");
    if (file)
        fclose(file);
}

static void write_hex(const struct hash_secret *secret, char *ret_text)
{
    for (size_t i = 0; i < HASH_SECRET_BYTES; i++)
        sprintf(ret_text + 2 * i, "%02x", secret->bytes[i]);
}

static bool read_hex(const char *text, struct hash_secret *ret_secret)
{
    if (strlen(text) != 2UL * HASH_SECRET_BYTES)
        return false;
    for (size_t i = 0; i < HASH_SECRET_BYTES; i++) {
        unsigned byte;

        if (sscanf(text + 2 * i, "%2x", &byte) != 1)
            return false;
        ret_secret->bytes[i] = (uint8_t)byte;
    }
    return true;
}

/* ---- reading ---- */

static int keep(struct ksm_record *record, const struct ksm_record_segment *segment)
{
    struct ksm_record_segment *segments =
        realloc(record->segments, (record->segment_count + 1) * sizeof(*segments));

    if (!segments)
        return -ENOMEM;
    record->segments = segments;
    segments[record->segment_count++] = *segment;
    return 0;
}

static void forget(struct ksm_record *record, uint32_t segment)
{
    for (size_t i = 0; i < record->segment_count; i++) {
        if (record->segments[i].segment == segment) {
            record->segments[i] = record->segments[--record->segment_count];
            return;
        }
    }
}

static int read_lines(struct ksm_record *record, FILE *file)
{
    struct ksm_record_segment segment;
    char line[128];
    int result = 0;

    while (!result && fgets(line, sizeof(line), file)) {
        if (!strchr(line, '\n'))
            break; /* cut by the kill: was not acknowledged to anybody */
        if (sscanf(line, "+ %" SCNu32 " %" SCNu32 " %" SCNu64 " %" SCNu64, &segment.segment,
                   &segment.pages, &segment.device, &segment.inode) == 4)
            result = keep(record, &segment);
        else if (sscanf(line, "- %" SCNu32, &segment.segment) == 1)
            forget(record, segment.segment);
    }
    return result;
}

/* 0: taken over; -ENOENT: there is none of this boot. */
static int load(struct ksm_record *record, const char *boot_id, uint64_t *ret_session,
                struct hash_secret *ret_secret)
{
    char secret[2 * HASH_SECRET_BYTES + 1], boot[BOOT_ID_BYTES];
    int fd = openat(record->dir, record->file, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    FILE *file = fd < 0 ? NULL : fdopen(fd, "r");
    int result = -ENOENT;
    uint64_t session;

    if (!file) {
        if (fd >= 0)
            close(fd);
        return result;
    }
    if (fscanf(file, "memd-domain 1 %39s %" SCNx64 " %384s ", boot, &session, secret) == 3 &&
        strcmp(boot, boot_id) == 0 && read_hex(secret, ret_secret)) {
        *ret_session = session;
        result = read_lines(record, file);
    }
    fclose(file);
    return result;
}

/* ---- writing ---- */

static int add_line(int fd, const char *line, int length)
{
    return write(fd, line, (size_t)length) == length ? 0 : -EIO;
}

static int write_segment(int fd, const struct ksm_record_segment *segment)
{
    char line[128];
    int length = snprintf(line, sizeof(line), "+ %" PRIu32 " %" PRIu32 " %" PRIu64 " %" PRIu64 "\n",
                          segment->segment, segment->pages, segment->device, segment->inode);

    return add_line(fd, line, length);
}

/* The record as it is now, into a new file that takes the old one's place. */
static int rewrite(struct ksm_record *record, const char *boot_id, uint64_t session,
                   const struct hash_secret *secret)
{
    char text[2 * HASH_SECRET_BYTES + 1], line[512], fresh[sizeof(record->file) + 8];
    int length, result;

    snprintf(fresh, sizeof(fresh), "%s.new", record->file);
    record->fd =
        openat(record->dir, fresh, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    if (record->fd < 0)
        return -errno;
    write_hex(secret, text);
    length =
        snprintf(line, sizeof(line), "memd-domain 1 %s %" PRIx64 " %s\n", boot_id, session, text);
    result = add_line(record->fd, line, length);
    for (size_t i = 0; i < record->segment_count && !result; i++)
        result = write_segment(record->fd, &record->segments[i]);
    if (!result && renameat(record->dir, fresh, record->dir, record->file))
        result = -errno;
    return result;
}

int ksm_record_start(struct ksm_record *record, int dir, const char *name, uint64_t *ret_session,
                     struct hash_secret *ret_secret, bool *ret_found)
{
    char boot_id[BOOT_ID_BYTES];
    int result;

    *record = (struct ksm_record){.fd = -1, .dir = dir};
    snprintf(record->file, sizeof(record->file), "%s.domain", name);
    read_boot_id(boot_id);
    result = dir < 0 ? -ENOENT : load(record, boot_id, ret_session, ret_secret);
    if (result && result != -ENOENT)
        goto undo;
    *ret_found = result == 0;
    if (result) {
        result = host_random(ret_session, sizeof(*ret_session));
        if (!result)
            result = host_random(ret_secret, sizeof(*ret_secret));
        if (result)
            goto undo;
    }
    result = dir < 0 ? 0 : rewrite(record, boot_id, *ret_session, ret_secret);
    if (result)
        goto undo;
    return 0;
undo:
    ksm_record_stop(record, false);
    return result;
}

void ksm_record_stop(struct ksm_record *record, bool forget_it)
{
    if (record->fd >= 0)
        close(record->fd);
    if (forget_it && record->dir >= 0)
        unlinkat(record->dir, record->file, 0);
    free(record->segments);
    *record = (struct ksm_record){.fd = -1, .dir = -1};
}

int ksm_record_add(struct ksm_record *record, const struct ksm_record_segment *segment)
{
    return record->fd < 0 ? 0 : write_segment(record->fd, segment);
}

int ksm_record_remove(struct ksm_record *record, uint32_t segment)
{
    char line[32];
    int length = snprintf(line, sizeof(line), "- %" PRIu32 "\n", segment);

    forget(record, segment);
    return record->fd < 0 ? 0 : add_line(record->fd, line, length);
}

const struct ksm_record_segment *ksm_record_find(const struct ksm_record *record, uint32_t segment)
{
    for (size_t i = 0; i < record->segment_count; i++) {
        if (record->segments[i].segment == segment)
            return &record->segments[i];
    }
    return NULL;
}
