/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memvm's hooks under KVM, called through the agent's gate as memd calls them, with the moving of
 * RAM left to this program: several machines of memvm's parts in one process, and the bare guest
 * that goes from one to the next and says when a byte of it is wrong.
 *
 *   1. it is paused and saved, goes on where it was, is paused and saved again
 *   2. a second machine waits for it (--incoming), and does not run before it has the state and was
 *      resumed; its RAM is empty, and faults are served by a userfaultfd of this program
 *   3. while its vCPUs wait for pages that do not come, it is asked to pause: it does so, or says
 *      that it can't, but does not hang; while they are served it is paused and saved
 *   4. a third machine gets all its RAM at once; a device of it that does not come back makes pause
 *      say -EBUSY, after which everything is as it was
 *
 * usage: move_kvm IMAGE. Prints one line; ends with 0, 1 (something was not so: said), 77 (no
 * userfaultfd).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <linux/virtio_ids.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gate.h"
#include "hook.h"
#include "loader.h"
#include "state.h"
#include "virtio_rng.h"

#define MEMORY_BYTES  (16UL << 20)
#define CPUS          2U
#define LIMIT_MS      60000
#define EXIT_CANT_RUN 77

/* One machine, what its guest says, and the gate to its hooks. */
struct host {
    const char *name;
    struct machine machine;
    struct gate gate;
    int serial_fd;
    struct machine_state state; /* when it was saved last */
};

static struct host first = {.name = "first"}, second = {.name = "second"},
                   third = {.name = "third"};
static int uffd;
static bool serve; /* the faults of the second machine */
static uint32_t served;
static int stuck_fd[2]; /* a pipe: a device that reads from it comes back when something is there */
static bool stuck;

#define REQUIRE(condition)                                                           \
    do {                                                                             \
        if (!(condition)) {                                                          \
            printf("move_kvm: %s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

/* ---- a device that does not come back ---- */

static void notify_stuck(struct virtio_mmio *transport, uint32_t queue)
{
    char byte;

    if (__atomic_exchange_n(&stuck, false, __ATOMIC_ACQ_REL))
        while (read(stuck_fd[0], &byte, 1) < 0)
            REQUIRE(errno == EINTR);
    virtio_rng_ops.notify(transport, queue);
}

/* ---- machines ---- */

static void open_host(struct host *host, const struct virtio_device_ops *device)
{
    REQUIRE(machine_open(&host->machine, MEMORY_BYTES, CPUS) == 0);
    host->serial_fd = memfd_create(host->name, MFD_CLOEXEC);
    board_open(&host->machine, host->serial_fd);
    board_add_virtio(&host->machine, device);
    REQUIRE(gate_open(&host->gate, &hook_ops, &host->machine) == 0);
}

static void load_guest(struct host *host, const char *image)
{
    char *words[] = {"common=2M", "unique=4M", "hot=2M", "duty=100", "every=1", NULL};
    struct guest_memory *memory = &host->machine.memory;
    struct loaded loaded;

    REQUIRE(loader_load(memory, image, &loaded) == 0);
    REQUIRE(preset_fill(memory, loaded.end, CPUS, 1, words) == 0);
    machine_map_low(&host->machine);
    for (uint32_t i = 0; i < CPUS; i++)
        REQUIRE(machine_boot_vcpu(&host->machine.cpus[i], loaded.entry) == 0);
}

/* What the guest has said on this machine. */
static const char *said(const struct host *host)
{
    static char text[1U << 20];
    ssize_t chars = pread(host->serial_fd, text, sizeof(text) - 1, 0);

    text[chars > 0 ? chars : 0] = '\0';
    return text;
}

static void wait_said(const struct host *host, const char *words)
{
    for (uint32_t ms = 0; !strstr(said(host), words); ms += 10) {
        if (ms > LIMIT_MS || strstr(said(host), "CORRUPT") || strstr(said(host), "CRASH")) {
            printf("move_kvm: on the %s machine '%s' did not come, but: %s\n", host->name, words,
                   said(host));
            exit(1);
        }
        usleep(10000);
    }
}

/* The guest looks at all of its memory. */
static void verify(struct host *host, const char *tag)
{
    char words[64];

    snprintf(words, sizeof(words), "report %s\n", tag);
    board_input(&host->machine, words, strlen(words));
    snprintf(words, sizeof(words), "report tag=%s pages=2048 errors=0 ", tag);
    wait_said(host, words);
}

static void pause_and_save(struct host *host)
{
    size_t bytes = 0;

    REQUIRE(gate_pause(&host->gate) == 0);
    REQUIRE(gate_save(&host->gate, &host->state, sizeof(host->state), &bytes) == 0);
    REQUIRE(bytes == state_bytes(CPUS));
}

static void load_and_run(struct host *host, const struct host *from)
{
    REQUIRE(gate_pause(&host->gate) == 0);
    REQUIRE(gate_load(&host->gate, &from->state, state_bytes(CPUS)) == 0);
    REQUIRE(machine_is_held(&host->machine));
    REQUIRE(gate_resume(&host->gate) == 0);
    REQUIRE(!machine_is_held(&host->machine));
}

/* ---- pages that are not there yet ---- */

static void watch_memory(const struct guest_memory *memory)
{
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.range = {(uintptr_t)memory->base, memory->bytes},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};

    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0) {
        printf("skip move_kvm: userfaultfd: %s\n", strerror(errno));
        exit(EXIT_CANT_RUN);
    }
    REQUIRE(ioctl(uffd, UFFDIO_API, &api) == 0 && ioctl(uffd, UFFDIO_REGISTER, &range) == 0);
}

static void place_page(uint64_t address)
{
    uint64_t page = address / MEMORY_PAGE_BYTES * MEMORY_PAGE_BYTES;
    uint64_t offset = page - (uintptr_t)second.machine.memory.base;
    struct uffdio_copy copy = {.dst = page,
                               .src = (uintptr_t)first.machine.memory.base + offset,
                               .len = MEMORY_PAGE_BYTES};

    if (ioctl(uffd, UFFDIO_COPY, &copy) == 0)
        served++;
    else
        REQUIRE(errno == EEXIST || errno == EAGAIN);
    if (copy.copy != MEMORY_PAGE_BYTES) {
        struct uffdio_range range = {page, MEMORY_PAGE_BYTES};
        REQUIRE(ioctl(uffd, UFFDIO_WAKE, &range) == 0);
    }
}

static void *serve_faults(void *unused)
{
    struct pollfd poller = {.fd = uffd, .events = POLLIN};
    struct uffd_msg message;

    while (__atomic_load_n(&serve, __ATOMIC_ACQUIRE))
        if (poll(&poller, 1, 10) > 0 && read(uffd, &message, sizeof(message)) == sizeof(message))
            place_page(message.arg.pagefault.address);
    return unused;
}

/* A vCPU waits for a page that nobody brings. Where KVM can it calls it away; where it reads the
 * guest's memory itself, as when it interprets an instruction, it can't. */
static void pause_in_a_fault(struct host *host)
{
    struct pollfd poller = {.fd = uffd, .events = POLLIN};
    int r;

    REQUIRE(poll(&poller, 1, LIMIT_MS) == 1);
    r = gate_pause(&host->gate);
    REQUIRE(r == 0 || r == -EBUSY);
    REQUIRE(machine_is_held(&host->machine) == (r == 0));
    if (r == 0)
        REQUIRE(gate_resume(&host->gate) == 0);
}

/* ---- the four parts ---- */

static void leave_first(const char *image)
{
    open_host(&first, &virtio_rng_ops);
    load_guest(&first, image);
    REQUIRE(gate_save(&first.gate, &first.state, sizeof(first.state), &(size_t){0}) == -EBUSY);
    REQUIRE(machine_start(&first.machine) == 0);
    verify(&first, "a");
    pause_and_save(&first);
    REQUIRE(gate_resume(&first.gate) == 0);
    verify(&first, "b");
    pause_and_save(&first);
}

static void arrive_at_second(void)
{
    pthread_t server;

    open_host(&second, &virtio_rng_ops);
    second.machine.incoming = true;
    REQUIRE(machine_start(&second.machine) == 0);
    watch_memory(&second.machine.memory);
    load_and_run(&second, &first);

    pause_in_a_fault(&second);
    serve = true;
    pthread_create(&server, NULL, serve_faults, NULL);
    verify(&second, "c");
    REQUIRE(served > 2048);
    /* While they are served one by one. */
    pause_and_save(&second);
    __atomic_store_n(&serve, false, __ATOMIC_RELEASE);
    pthread_join(server, NULL);
}

/* Pages that are still missing at the second machine are the first one's. */
static void arrive_at_third(void)
{
    const struct guest_memory *from = &second.machine.memory;
    const struct virtio_device_ops device = {
        .device_id = VIRTIO_ID_RNG, .queue_count = 1, .queue_size = 64, .notify = notify_stuck};

    for (uint64_t at = 0; at < from->bytes; at += MEMORY_PAGE_BYTES)
        place_page((uintptr_t)from->base + at);
    REQUIRE(pipe2(stuck_fd, O_CLOEXEC) == 0);
    open_host(&third, &device);
    third.machine.incoming = true;
    memcpy(third.machine.memory.base, from->base, from->bytes);
    load_and_run(&third,
                 &second); /* its threads are not there yet: it can be loaded all the same */
    REQUIRE(machine_start(&third.machine) == 0);
    verify(&third, "d");
    __atomic_store_n(&stuck, true, __ATOMIC_RELEASE);
    while (__atomic_load_n(&stuck, __ATOMIC_ACQUIRE))
        usleep(1000);
    REQUIRE(gate_pause(&third.gate) == -EBUSY);
    REQUIRE(!machine_is_held(&third.machine));
    REQUIRE(write(stuck_fd[1], "", 1) == 1);
    verify(&third, "e");
    pause_and_save(&third);
    REQUIRE(gate_resume(&third.gate) == 0);
    verify(&third, "f");
}

static void end(struct host *host)
{
    machine_end(&host->machine, 0);
    REQUIRE(machine_join(&host->machine) == 0);
    REQUIRE(!host->gate.quarantined);
}

int main(int argc, char **argv)
{
    sigset_t kick;

    REQUIRE(argc == 2);
    sigemptyset(&kick);
    sigaddset(&kick, VCPU_KICK);
    pthread_sigmask(SIG_BLOCK, &kick, NULL); /* only vCPUs take it */
    leave_first(argv[1]);
    arrive_at_second();
    arrive_at_third();
    end(&first);
    end(&second);
    end(&third);
    printf("move_kvm: %u faults served\n", served);
    return 0;
}
