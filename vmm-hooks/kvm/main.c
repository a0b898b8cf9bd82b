/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memvm: a small VMM on /dev/kvm, which shows how a VMM links memd, and runs memd's own test guest.
 *
 * Start-up, in order: read the options; make the machine; attach to memd (while RAM is empty); load
 * a guest or a saved machine, or neither, when a running one is to come from another host; start
 * the vCPUs. From then on this thread brings input to the serial port, and ends the machine when it
 * is told to, with or without saving it first.
 *
 * What it does not do: interrupts, PCI, disks, networks, firmware. A guest is a 64-bit ELF program
 * that lives with what address_map.h says.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "hook.h"
#include "loader.h"
#include "machine.h"
#include "snapshot.h"
#include "virtio_rng.h"

#define DEFAULT_MEMORY (16UL << 20)
#define INPUT_FULL_MS  20 /* the guest has to read first, or is held: look again after so long */

enum { STATUS_FAILED = 1, STATUS_USAGE = 2 };

struct options {
    uint64_t memory_bytes;
    uint32_t cpus;
    const char *serial, *save, *load;
    bool incoming;
    bool sized;      /* --memory or --cpus */
    bool lazy;       /* --restore: what is loaded runs before its memory was read */
    char **operands; /* the image, then the words for it */
};

static const char usage[] =
    "usage: memvm [OPTION...] IMAGE [NAME=VALUE...]\n"
    "       memvm --load FILE | --restore FILE [--serial FILE] [--save FILE]\n"
    "       memvm --incoming [OPTION...]\n"
    "\n"
    "  --memory SIZE   the guest's RAM (16M)\n"
    "  --cpus NUMBER   its vCPUs, 1 to 8 (1)\n"
    "  --serial FILE   what it says goes there, not to standard output\n"
    "  --save FILE     on SIGTERM save the whole machine there before ending\n"
    "  --load FILE     go on with a machine that was saved\n"
    "  --restore FILE  the same, but at once: its memory comes while it runs\n"
    "  --incoming      wait for a machine that memd moves here\n"
    "  --help, --version\n"
    "\n"
    "See memvm(1).\n";

/* ---- options ---- */

static bool read_memory(struct options *options, const char *text)
{
    uint64_t bytes;

    if (preset_size(text, &bytes) < 0 || bytes % MEMORY_PAGE_BYTES || bytes <= ADDRESS_KERNEL ||
        bytes > ADDRESS_RAM_END) {
        fprintf(stderr, "memvm: --memory: '%s' is no size above 1M, up to 3G\n", text);
        return false;
    }
    options->memory_bytes = bytes;
    return true;
}

static bool read_cpus(struct options *options, const char *text)
{
    uint64_t number;

    if (preset_size(text, &number) < 0 || number < 1 || number > MACHINE_MAX_CPUS) {
        fprintf(stderr, "memvm: --cpus: '%s' is no number from 1 to %u\n", text, MACHINE_MAX_CPUS);
        return false;
    }
    options->cpus = (uint32_t)number;
    return true;
}

/* False: it was wrong, and has been said. --help and --version end here. */
static bool read_option(struct options *options, int option)
{
    switch (option) {
    case 'm': options->sized = true; return read_memory(options, optarg);
    case 'c': options->sized = true; return read_cpus(options, optarg);
    case 'o': options->serial = optarg; return true;
    case 's': options->save = optarg; return true;
    case 'l': options->load = optarg; return true;
    case 'r':
        options->load = optarg;
        options->lazy = true;
        return true;
    case 'i': options->incoming = true; return true;
    case 'h': fputs(usage, stdout); exit(fflush(stdout) == 0 ? 0 : STATUS_FAILED);
    case 'v': puts("memvm " MEMD_VERSION); exit(fflush(stdout) == 0 ? 0 : STATUS_FAILED);
    default: return false;
    }
}

/* The machine comes from one place: an image, a file or another host. */
static bool check_origin(const struct options *options)
{
    bool image = options->operands[0];

    if (options->load && options->sized)
        fputs("memvm: what is saved has its own memory and vCPUs\n", stderr);
    else if (options->incoming && options->load)
        fputs("memvm: --incoming or a saved machine?\n", stderr);
    else if (image && (options->load || options->incoming))
        fputs("memvm: what is saved or moved here brings its own image and words\n", stderr);
    else if (!image && !options->load && !options->incoming)
        fputs("memvm: which image?\n", stderr);
    else
        return true;
    return false;
}

static bool read_options(int argc, char **argv, struct options *options)
{
    static const struct option known[] = {
        {"memory", required_argument, NULL, 'm'}, {"cpus", required_argument, NULL, 'c'},
        {"serial", required_argument, NULL, 'o'}, {"save", required_argument, NULL, 's'},
        {"load", required_argument, NULL, 'l'},   {"restore", required_argument, NULL, 'r'},
        {"incoming", no_argument, NULL, 'i'},     {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'v'},      {0}};
    int option;

    while ((option = getopt_long(argc, argv, "+", known, NULL)) != -1)
        if (!read_option(options, option))
            return false;
    options->operands = argv + optind;
    return check_origin(options);
}

/* ---- start-up ---- */

static int open_serial(const struct options *options)
{
    int fd = options->serial
                 ? open(options->serial, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644)
                 : STDOUT_FILENO;

    if (fd < 0)
        fprintf(stderr, "memvm: %s: %s\n", options->serial, strerror(errno));
    return fd;
}

/* SIGTERM and SIGINT are read from the descriptor; no thread takes them otherwise, and a serial
 * port without a listener is no reason to die. */
static int open_signals(void)
{
    sigset_t ours;

    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&ours);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, VCPU_KICK);
    pthread_sigmask(SIG_BLOCK, &ours, NULL);
    sigdelset(&ours, VCPU_KICK);
    return signalfd(-1, &ours, SFD_CLOEXEC | SFD_NONBLOCK);
}

static int load_image(struct machine *machine, const struct options *options)
{
    struct loaded loaded;
    int r = loader_load(&machine->memory, options->operands[0], &loaded);

    if (r == 0)
        r = preset_fill(&machine->memory, loaded.end, machine->cpu_count,
                        machine->board.virtio_count, options->operands + 1);
    if (r < 0)
        return r;
    machine_map_low(machine);
    for (uint32_t i = 0; r == 0 && i < machine->cpu_count; i++)
        r = machine_boot_vcpu(&machine->cpus[i], loaded.entry);
    return r;
}

/* What runs, or will: from where the options say. */
static int load(struct machine *machine, const struct options *options, struct snapshot *snapshot)
{
    if (options->load)
        return snapshot_load(snapshot, machine, options->lazy);
    if (!options->incoming)
        return load_image(machine, options);
    if (machine->memd)
        return 0;
    fputs("memvm: --incoming: without memd nothing can come\n", stderr);
    return -ENOTCONN;
}

static int set_up(struct machine *machine, struct options *options, int serial_fd)
{
    static struct snapshot snapshot;
    int r = options->load ? snapshot_open(options->load, &snapshot) : 0;

    if (r == 0 && options->load) {
        options->memory_bytes = snapshot.state.memory_bytes;
        options->cpus = snapshot.state.cpu_count;
    }
    if (r == 0)
        r = machine_open(machine, options->memory_bytes, options->cpus);
    if (r < 0)
        return r;
    machine->incoming = options->incoming;
    board_open(machine, serial_fd);
    board_add_virtio(machine, &virtio_rng_ops);
    hook_attach(machine);
    r = load(machine, options, &snapshot);
    return r == 0 ? machine_start(machine) : r;
}

/* ---- while it runs ---- */

/* Returns false when there will be no more input. */
static bool bring_input(struct machine *machine, size_t room)
{
    char bytes[SERIAL_INPUT_BYTES];
    ssize_t got = read(STDIN_FILENO, bytes, room);

    if (got > 0)
        board_input(machine, bytes, (size_t)got);
    return got > 0 || (got < 0 && (errno == EINTR || errno == EAGAIN));
}

/* A machine that is incoming still has nothing to be saved. One that is leaving may run at another
 * host: saved here, it would be there twice. */
static int save(struct machine *machine, const char *path)
{
    bool leaving = __atomic_load_n(&machine->leaving, __ATOMIC_ACQUIRE);
    int r = machine->incoming ? -ENODATA : leaving ? -EBUSY : machine_pause(machine);

    if (r < 0) {
        fprintf(stderr, "memvm: %s: nothing saved: %s\n", path,
                leaving ? "the machine has left for another host" : strerror(-r));
        return r;
    }
    r = snapshot_save(machine, path);
    machine_end(machine, r == 0 ? 0 : STATUS_FAILED);
    machine_resume(machine);
    return r;
}

static void end_by_signal(struct machine *machine, const struct options *options)
{
    if (!options->save)
        machine_end(machine, 0);
    else if (save(machine, options->save) < 0)
        machine_end(machine, STATUS_FAILED);
}

/* While the machine is held its input waits where it is: it goes to where the machine goes. */
static size_t input_room(struct machine *machine)
{
    return machine_is_held(machine) ? 0 : board_input(machine, NULL, 0);
}

static void attend(struct machine *machine, const struct options *options, int signal_fd)
{
    bool input = true;

    for (;;) {
        size_t room = input_room(machine);
        struct pollfd from[] = {
            {.fd = machine->ended_fd, .events = POLLIN},
            {.fd = signal_fd, .events = POLLIN},
            {.fd = input && room ? STDIN_FILENO : -1, .events = POLLIN},
        };

        if (poll(from, 3, input && !room ? INPUT_FULL_MS : -1) < 0 && errno != EINTR)
            machine_end(machine, STATUS_FAILED);
        if (from[0].revents)
            return;
        if (from[1].revents)
            end_by_signal(machine, options);
        if (from[2].revents)
            input = bring_input(machine, room);
    }
}

int main(int argc, char **argv)
{
    static struct machine machine;
    struct options options = {.memory_bytes = DEFAULT_MEMORY, .cpus = 1};
    int serial_fd, signal_fd;

    if (!read_options(argc, argv, &options)) {
        fputs("Try memvm --help.\n", stderr);
        return STATUS_USAGE;
    }
    serial_fd = open_serial(&options);
    signal_fd = open_signals();
    if (serial_fd < 0 || signal_fd < 0 || set_up(&machine, &options, serial_fd) < 0)
        return STATUS_FAILED;
    attend(&machine, &options, signal_fd);
    return machine_join(&machine);
}
