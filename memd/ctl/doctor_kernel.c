/* SPDX-License-Identifier: Apache-2.0 */
/* What the agent and memd need of the kernel. Most of it is tried, on two pages of our own. */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "doctor.h"
#include "kernel_abi.h"

#define NO_SHARING_COST \
    "no agent can work: only kernel KSM is left, which is slower and spends far more CPU time"
#define NOT_TRIED_COST "nothing perhaps: memd runs as root, and gives VMMs without rights theirs"
#define NOT_TRIED_MEND "run 'memctl doctor' as root"
#define NEWER_KERNEL \
    "boot Linux 6.8 or newer (Debian 12: apt install -t bookworm-backports linux-image-amd64)"

bool ctl_doctor_kernel_is(int major, int minor)
{
    struct utsname name;
    int own_major = 0, own_minor = 0;

    if (uname(&name) < 0 || sscanf(name.release, "%d.%d", &own_major, &own_minor) != 2)
        return false;
    return own_major > major || (own_major == major && own_minor >= minor);
}

void ctl_doctor_kernel(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    struct utsname name;

    (void)arguments;
    uname(&name);
    ctl_finding_set(ret_finding, ctl_doctor_kernel_is(6, 8) ? FINDING_OK : FINDING_PROBLEM,
                    "Linux %s", name.release);
    ret_finding->cost = NO_SHARING_COST;
    ret_finding->mend = NEWER_KERNEL;
}

/* A userfaultfd that sees faults in kernel mode, or -errno. */
static int open_userfaultfd(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    int device, error;

    if (fd >= 0 || errno != EPERM)
        return fd >= 0 ? fd : -errno;
    device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -EPERM;
    fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    error = fd < 0 ? -errno : fd;
    close(device);
    return error;
}

/* The same, with `features` agreed upon (0 and *ret_features: what there is). */
static int open_with_features(uint64_t features, uint64_t *ret_features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    int fd = open_userfaultfd();
    int error;

    if (fd < 0)
        return fd;
    if (ioctl(fd, UFFDIO_API, &api) < 0) {
        error = -errno;
        close(fd);
        return error;
    }
    if (ret_features)
        *ret_features = api.features;
    return fd;
}

/* Whether this user can't try what memd, which is root, may well be able to do. */
static bool is_unknown(struct finding *finding, int error)
{
    if (error != -EPERM || geteuid() == 0)
        return false;
    ctl_finding_set(finding, FINDING_UNKNOWN, "not tried: this user may have no userfaultfd");
    finding->cost = NOT_TRIED_COST;
    finding->mend = NOT_TRIED_MEND;
    return true;
}

void ctl_doctor_userfaultfd(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    int fd = open_userfaultfd();

    (void)arguments;
    if (fd >= 0) {
        ctl_finding_set(ret_finding, FINDING_OK, "works for this user");
        close(fd);
        return;
    }
    if (is_unknown(ret_finding, fd))
        return;
    ctl_finding_set(ret_finding, FINDING_PROBLEM, "can't be opened: %s", strerror(-fd));
    ret_finding->cost = NO_SHARING_COST;
    ret_finding->mend = fd == -EPERM ? "allow memd the system call userfaultfd (seccomp?)"
                                     : "boot a kernel with CONFIG_USERFAULTFD=y";
}

void ctl_doctor_device(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    (void)arguments;
    if (access("/dev/userfaultfd", F_OK) == 0) {
        ctl_finding_set(ret_finding, FINDING_OK, "there");
        return;
    }
    ctl_finding_set(ret_finding, FINDING_NOTE, "not there");
    ret_finding->cost = "VMMs that don't run as root can't share";
    ret_finding->mend =
        ctl_doctor_kernel_is(6, 1)
            ? "mknod /dev/userfaultfd c 10 \"$(awk '/userfaultfd/{print $1}' /proc/misc)\""
            : NEWER_KERNEL;
}

#define FEATURES_CHARS 100

static void append(char *text, size_t room, const char *more)
{
    size_t length = strlen(text);

    snprintf(text + length, room - length, "%s", more);
}

void ctl_doctor_features(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    static const struct {
        uint64_t bit;
        const char *name;
    } needed[] = {
        {UFFD_FEATURE_PAGEFAULT_FLAG_WP, " WP"},
        {UFFD_FEATURE_WP_UNPOPULATED, " WP_UNPOPULATED"},
        {UFFD_FEATURE_WP_ASYNC, " WP_ASYNC"},
        {UFFD_FEATURE_MOVE, " MOVE"},
    };
    char there[FEATURES_CHARS] = " MISSING", missing[FEATURES_CHARS] = "";
    uint64_t features = 0;
    int fd = open_with_features(0, &features);

    (void)arguments;
    ret_finding->cost = NO_SHARING_COST;
    ret_finding->mend = fd < 0 ? "see userfaultfd above" : NEWER_KERNEL;
    if (is_unknown(ret_finding, fd))
        return;
    if (fd < 0) {
        ctl_finding_set(ret_finding, FINDING_PROBLEM, "there is no userfaultfd to ask");
        return;
    }
    for (size_t i = 0; i < sizeof(needed) / sizeof(needed[0]); i++)
        append(features & needed[i].bit ? there : missing, FEATURES_CHARS, needed[i].name);
    ctl_finding_set(ret_finding, missing[0] ? FINDING_PROBLEM : FINDING_OK, "%s%s%s", there + 1,
                    missing[0] ? "; not there:" : "", missing);
    close(fd);
}

/* ---- UFFDIO_MOVE and PAGEMAP_SCAN, tried ---- */

struct two_pages {
    int fd;
    unsigned char *memory; /* two pages */
};

static int register_page(int fd, const void *page, uint64_t mode)
{
    struct uffdio_register area = {
        .range = {.start = (uintptr_t)page, .len = PAGE_BYTES},
        .mode = mode,
    };

    return ioctl(fd, UFFDIO_REGISTER, &area) < 0 ? -errno : 0;
}

static int open_two_pages(uint64_t features, uint64_t mode, struct two_pages *ret_pages)
{
    struct two_pages pages;
    int error;

    pages.fd = open_with_features(features, NULL);
    if (pages.fd < 0)
        return pages.fd;
    pages.memory =
        mmap(NULL, 2 * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages.memory == MAP_FAILED) {
        error = -ENOMEM;
        goto close_fd;
    }
    madvise(pages.memory, 2 * PAGE_BYTES, MADV_NOHUGEPAGE);
    error = register_page(pages.fd, pages.memory, mode);
    if (error)
        goto unmap;
    *ret_pages = pages;
    return 0;

unmap:
    munmap(pages.memory, 2 * PAGE_BYTES);
close_fd:
    close(pages.fd);
    return error;
}

static void close_two_pages(struct two_pages *pages)
{
    munmap(pages->memory, 2 * PAGE_BYTES);
    close(pages->fd);
}

/* Moves the second page into the hole that the first one is. */
static int try_move(void)
{
    struct two_pages pages = {0};
    struct uffdio_move move = {.len = PAGE_BYTES};
    int error = open_two_pages(UFFD_FEATURE_MOVE, UFFDIO_REGISTER_MODE_MISSING, &pages);

    if (error)
        return error;
    memset(pages.memory + PAGE_BYTES, 0x6d, PAGE_BYTES);
    move.dst = (uintptr_t)pages.memory;
    move.src = (uintptr_t)pages.memory + PAGE_BYTES;
    if (ioctl(pages.fd, UFFDIO_MOVE, &move) < 0)
        error = -errno;
    else if (move.move != (int64_t)PAGE_BYTES || pages.memory[0] != 0x6d ||
             pages.memory[PAGE_BYTES - 1] != 0x6d)
        error = -EIO;
    close_two_pages(&pages);
    return error;
}

/* Scans one page for PAGE_IS_WRITTEN; the number of such ranges (0 or 1) or -errno. */
static int scan_page(int pagemap, const void *page, uint64_t flags)
{
    struct page_region region;
    struct pm_scan_arg scan = {
        .size = sizeof(scan),
        .flags = flags,
        .start = (uintptr_t)page,
        .end = (uintptr_t)page + PAGE_BYTES,
        .vec = (uintptr_t)&region,
        .vec_len = 1,
        .category_mask = PAGE_IS_WRITTEN,
        .return_mask = PAGE_IS_WRITTEN,
    };
    int ranges = ioctl(pagemap, PAGEMAP_SCAN, &scan);

    return ranges < 0 ? -errno : ranges;
}

/* Arms a page, looks, writes to it, looks again. */
static int try_scan_page(int pagemap, unsigned char *page)
{
    int ranges;

    page[0] = 1;
    ranges = scan_page(pagemap, page, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC);
    if (ranges >= 0)
        ranges = scan_page(pagemap, page, 0) == 0 ? 0 : -EIO;
    if (ranges < 0)
        return ranges;
    page[0] = 2;
    return scan_page(pagemap, page, 0) == 1 ? 0 : -EIO;
}

static int try_scan(void)
{
    struct two_pages pages = {0};
    int error = open_two_pages(UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED,
                               UFFDIO_REGISTER_MODE_WP, &pages);
    int pagemap;

    if (error)
        return error;
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    error = pagemap < 0 ? -errno : try_scan_page(pagemap, pages.memory);
    if (pagemap >= 0)
        close(pagemap);
    close_two_pages(&pages);
    return error;
}

static void report_trial(struct finding *finding, int error, const char *success)
{
    if (is_unknown(finding, error))
        return;
    if (error == 0)
        ctl_finding_set(finding, FINDING_OK, "%s", success);
    else if (error == -EIO)
        ctl_finding_set(finding, FINDING_PROBLEM, "tried, and did something else");
    else
        ctl_finding_set(finding, FINDING_PROBLEM, "tried, and failed: %s", strerror(-error));
    finding->cost = NO_SHARING_COST;
    finding->mend = error == -EPERM ? "see userfaultfd above" : NEWER_KERNEL;
}

void ctl_doctor_move(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    (void)arguments;
    report_trial(ret_finding, try_move(), "moved a page");
}

void ctl_doctor_scan(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    (void)arguments;
    report_trial(ret_finding, try_scan(), "saw a page being written");
}

/* ---- swap, io_uring ---- */

static bool swap_is_on(void)
{
    char line[256];
    FILE *file = fopen("/proc/swaps", "re");
    int lines = 0;

    if (!file)
        return false;
    while (fgets(line, sizeof(line), file))
        lines++;
    fclose(file);
    return lines > 1; /* the first one is the heading */
}

void ctl_doctor_swap(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    bool on = swap_is_on(), sound = !on || ctl_doctor_kernel_is(6, 16);

    (void)arguments;
    ctl_finding_set(ret_finding, sound ? FINDING_OK : FINDING_PROBLEM, "%s",
                    !on     ? "off"
                    : sound ? "on"
                            : "on, and this kernel's UFFDIO_MOVE races with it");
    ret_finding->cost =
        "a page that is swapped while it is moved could be lost: memd uses no agents";
    ret_finding->mend = "swapoff -a, or boot Linux 6.16 or newer";
}

void ctl_doctor_io_uring(const struct ctl_arguments *arguments, struct finding *ret_finding)
{
    struct io_uring_params parameters = {0};
    int fd = (int)syscall(SYS_io_uring_setup, 4, &parameters);
    int error = errno;

    (void)arguments;
    if (fd >= 0) {
        close(fd);
        ctl_finding_set(ret_finding, FINDING_OK, "works");
        return;
    }
    ctl_finding_set(ret_finding, FINDING_PROBLEM, "can't be set up: %s", strerror(error));
    ret_finding->cost = "memd does not start: its loop waits on io_uring";
    ret_finding->mend =
        "sysctl -w kernel.io_uring_disabled=0 (in a container: allow io_uring_setup)";
}
