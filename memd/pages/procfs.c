/* SPDX-License-Identifier: Apache-2.0 */
#include "procfs.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>

#include "sys.h"

#define LINE_BYTES  512
#define CHUNK_BYTES 4096

struct line_buffer {
    char text[LINE_BYTES];
    size_t length;
};

/* Appends a piece of the file; false when the callback has heard enough. */
static bool feed(struct line_buffer *buffer, const char *bytes, size_t count,
                 bool (*line)(void *, const char *), void *context)
{
    for (size_t i = 0; i < count; i++) {
        if (bytes[i] != '\n') {
            if (buffer->length < LINE_BYTES - 1)
                buffer->text[buffer->length++] = bytes[i];
            continue;
        }
        buffer->text[buffer->length] = 0;
        buffer->length = 0;
        if (!line(context, buffer->text))
            return false;
    }
    return true;
}

int procfs_lines(const char *path, bool (*line)(void *context, const char *text), void *context)
{
    int fd = (int)sys_call4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    struct line_buffer buffer = {.length = 0};
    char bytes[CHUNK_BYTES];
    long got;

    if (fd < 0)
        return fd;
    do {
        got = sys_read(fd, bytes, sizeof(bytes));
    } while (got > 0 && feed(&buffer, bytes, (size_t)got, line, context));
    sys_close(fd);
    return got < 0 ? (int)got : 0;
}

/* A number in hexadecimal or decimal at *text; moves *text behind it. */
static uint64_t number(const char **text, unsigned base)
{
    uint64_t value = 0;

    for (;; (*text)++) {
        char c = **text;
        unsigned digit;
        if (c >= '0' && c <= '9')
            digit = (unsigned)(c - '0');
        else if (base == 16 && c >= 'a' && c <= 'f')
            digit = (unsigned)(c - 'a') + 10;
        else
            return value;
        value = value * base + digit;
    }
}

struct inspection {
    uintptr_t start, end;
    uintptr_t reached; /* covered so far, from start */
    bool inside;       /* the VMA that is being read overlaps the range */
    struct procfs_range range;
};

/* "7f00-7f10 rw-p 00000000 00:00 1234   path" */
static bool read_head(struct inspection *in, const char *text)
{
    const char *at = text;
    uintptr_t start = (uintptr_t)number(&at, 16);
    uintptr_t end;

    if (at == text || *at != '-')
        return false;
    at++;
    end = (uintptr_t)number(&at, 16);
    in->inside = start < in->end && end > in->start;
    if (!in->inside)
        return true;
    if (start <= in->reached && end > in->reached)
        in->reached = end;
    if (strncmp(at, " rw", 3) != 0)
        in->range.read_write = false;
    if (strlen(at) > 4 && at[4] == 's')
        in->range.shared = true;
    at = strchr(at, '/');
    if (at)
        in->range.file = true;
    return true;
}

static void read_flag(struct procfs_range *range, const char *flag)
{
    const struct {
        char name[3];
        bool *at;
    } flags[] = {
        {"sh", &range->shared},      {"ht", &range->hugetlb},     {"io", &range->special},
        {"pf", &range->special},     {"mm", &range->special},     {"lo", &range->locked},
        {"um", &range->userfaultfd}, {"uw", &range->userfaultfd}, {"ui", &range->userfaultfd},
        {"dc", &range->dontfork},    {"dd", &range->dontdump},    {"hg", &range->hugepage},
        {"nh", &range->nohugepage},
    };

    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
        if (memcmp(flag, flags[i].name, 2) == 0)
            *flags[i].at = true;
}

static bool inspect_line(void *context, const char *text)
{
    struct inspection *in = context;

    if (strncmp(text, "VmFlags:", 8) == 0) {
        for (const char *at = text + 8; in->inside && at[0] == ' ' && at[1]; at += 3)
            read_flag(&in->range, at + 1);
        return true;
    }
    if (text[0] >= 'A' && text[0] <= 'Z')
        return true;
    read_head(in, text);
    return true;
}

int procfs_inspect(const void *base, size_t bytes, struct procfs_range *ret_range)
{
    struct inspection in = {
        .start = (uintptr_t)base,
        .end = (uintptr_t)base + bytes,
        .reached = (uintptr_t)base,
        .range = {.read_write = true},
    };
    int r = procfs_lines("/proc/self/smaps", inspect_line, &in);

    if (r < 0)
        return r;
    in.range.covered = in.reached >= in.end;
    *ret_range = in.range;
    return 0;
}

int procfs_count_vmas(void)
{
    int fd = (int)sys_call4(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC, 0);
    char bytes[CHUNK_BYTES];
    int vmas = 0;
    long got;

    if (fd < 0)
        return fd;
    while ((got = sys_read(fd, bytes, sizeof(bytes))) > 0)
        for (long i = 0; i < got; i++)
            vmas += bytes[i] == '\n';
    sys_close(fd);
    return got < 0 ? (int)got : vmas;
}

static bool number_line(void *context, const char *text)
{
    *(long *)context = (long)number(&text, 10);
    return false;
}

long procfs_number(const char *path)
{
    long value = -ENODATA;
    int r = procfs_lines(path, number_line, &value);

    return r < 0 ? r : value;
}

struct release {
    uint64_t major, minor;
};

static bool release_line(void *context, const char *text)
{
    struct release *release = context;

    release->major = number(&text, 10);
    if (*text == '.') {
        text++;
        release->minor = number(&text, 10);
    }
    return false;
}

bool procfs_kernel_below(unsigned major, unsigned minor)
{
    struct release release = {0};

    if (procfs_lines("/proc/sys/kernel/osrelease", release_line, &release) < 0)
        return false;
    return release.major < major || (release.major == major && release.minor < minor);
}

static bool count_line(void *context, const char *text)
{
    (void)text;
    ++*(unsigned *)context;
    return true;
}

bool procfs_swap_is_on(void)
{
    unsigned lines = 0;

    return procfs_lines("/proc/swaps", count_line, &lines) < 0 || lines > 1; /* a heading first */
}

/* Sizes of this process in pages: the first and the sixth number of /proc/self/statm. */
struct statm {
    uint64_t total, data;
};

static bool statm_line(void *context, const char *text)
{
    struct statm *statm = context;

    statm->total = number(&text, 10);
    for (int i = 0; i < 5 && *text == ' '; i++) {
        text++;
        statm->data = number(&text, 10);
    }
    return false;
}

bool procfs_within_limits(void)
{
    struct rlimit64 space = {0}, data = {0};
    struct statm statm = {0};

    if (sys_call4(SYS_prlimit64, 0, RLIMIT_AS, NULL, &space) < 0 ||
        sys_call4(SYS_prlimit64, 0, RLIMIT_DATA, NULL, &data) < 0)
        return false;
    if (space.rlim_cur == RLIM64_INFINITY && data.rlim_cur == RLIM64_INFINITY)
        return true;
    return procfs_lines("/proc/self/statm", statm_line, &statm) == 0 &&
           statm.total <= space.rlim_cur / 4096 && statm.data <= data.rlim_cur / 4096;
}
