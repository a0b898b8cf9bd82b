/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The least that a demand fault over a link can cost: a thread touches a missing page, a second one
 * (the handler) asks a third for it through a TCP connection over loopback, gets 4 KiB back and
 * places them with UFFDIO_COPY. Nothing else happens.
 *
 * usage: fault_wire [--pages N] [--cpu N]    --cpu: all three threads on that one
 * Prints a line of JSON: p50_us, p99_us, max_us, and stream_mib_s, what one such connection
 * carries.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/userfaultfd.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES   4096UL
#define STREAM_BYTES (1UL << 30)
#define PIECE_BYTES  (1UL << 18)

static uint8_t *region;
static size_t pages = 20000;
static int uffd, asking, answering;

static void die(const char *what)
{
    fprintf(stderr, "fault_wire: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static void receive_all(int fd, void *into, size_t bytes)
{
    if (recv(fd, into, bytes, MSG_WAITALL) != (ssize_t)bytes)
        die("recv");
}

static void send_all(int fd, const void *from, size_t bytes)
{
    for (const char *at = from; bytes;) {
        ssize_t sent = send(fd, at, bytes, MSG_NOSIGNAL);

        if (sent <= 0)
            die("send");
        at += sent;
        bytes -= (size_t)sent;
    }
}

static void *answer(void *unused)
{
    static uint8_t page[PAGE_BYTES];
    uint64_t wanted;

    for (size_t i = 0; i < pages; i++) {
        receive_all(answering, &wanted, sizeof(wanted));
        memcpy(page, &wanted, sizeof(wanted));
        send_all(answering, page, sizeof(page));
    }
    return unused;
}

static void *handle(void *unused)
{
    static uint8_t page[PAGE_BYTES] __attribute__((aligned(4096)));

    for (size_t i = 0; i < pages; i++) {
        struct pollfd poller = {.fd = uffd, .events = POLLIN};
        struct uffd_msg message;
        struct uffdio_copy copy = {.src = (uintptr_t)page, .len = PAGE_BYTES};

        poll(&poller, 1, -1);
        if (read(uffd, &message, sizeof(message)) != sizeof(message))
            die("userfaultfd");
        copy.dst = message.arg.pagefault.address / PAGE_BYTES * PAGE_BYTES;
        send_all(asking, &(uint64_t){copy.dst}, sizeof(uint64_t));
        receive_all(asking, page, PAGE_BYTES);
        if (ioctl(uffd, UFFDIO_COPY, &copy) < 0)
            die("UFFDIO_COPY");
    }
    return unused;
}

static void connect_both(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

    asking = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, bytes) < 0 || listen(listener, 1) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &bytes) < 0 ||
        connect(asking, (struct sockaddr *)&address, bytes) < 0)
        die("TCP");
    answering = accept(listener, NULL, NULL);
    setsockopt(asking, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    setsockopt(answering, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    close(listener);
}

static void watch_region(void)
{
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING};

    region =
        mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    range.range = (struct uffdio_range){(uintptr_t)region, pages * PAGE_BYTES};
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0 || ioctl(uffd, UFFDIO_REGISTER, &range) < 0)
        die("userfaultfd");
}

static int compare(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;

    return a < b ? -1 : a > b;
}

static void *receive_stream(void *unused)
{
    static char room[PIECE_BYTES];

    for (size_t left = STREAM_BYTES; left; left -= PIECE_BYTES)
        receive_all(answering, room, PIECE_BYTES);
    return unused;
}

static double stream_mib_s(void)
{
    static char piece[PIECE_BYTES];
    uint64_t begun = now_ns();
    pthread_t receiver;

    pthread_create(&receiver, NULL, receive_stream, NULL);
    for (size_t left = STREAM_BYTES; left; left -= PIECE_BYTES)
        send_all(asking, piece, PIECE_BYTES);
    pthread_join(receiver, NULL);
    return (double)STREAM_BYTES / 1048576.0 / ((double)(now_ns() - begun) / 1e9);
}

static void parse(int argc, char **argv)
{
    static const struct option options[] = {
        {"pages", required_argument, NULL, 'p'}, {"cpu", required_argument, NULL, 'c'}, {0}};
    cpu_set_t cpus;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (option == 'p') {
            pages = strtoul(optarg, NULL, 10);
        } else if (option == 'c') {
            CPU_ZERO(&cpus);
            CPU_SET(strtoul(optarg, NULL, 10), &cpus);
            if (sched_setaffinity(0, sizeof(cpus), &cpus) < 0)
                die("--cpu");
        } else {
            exit(2);
        }
}

int main(int argc, char **argv)
{
    pthread_t answerer, handler;
    uint64_t *times;

    parse(argc, argv);
    times = calloc(pages, sizeof(*times));
    connect_both();
    watch_region();
    pthread_create(&answerer, NULL, answer, NULL);
    pthread_create(&handler, NULL, handle, NULL);
    for (size_t i = 0; i < pages; i++) {
        volatile uint8_t *at = region + i * PAGE_BYTES;
        uint64_t begun = now_ns();

        (void)*at;
        times[i] = now_ns() - begun;
    }
    pthread_join(answerer, NULL);
    pthread_join(handler, NULL);
    qsort(times, pages, sizeof(*times), compare);
    printf("{\"p50_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, \"stream_mib_s\": %.0f}\n",
           (double)times[pages / 2] / 1e3, (double)times[pages * 99 / 100] / 1e3,
           (double)times[pages - 1] / 1e3, stream_mib_s());
    return 0;
}
