/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Understands QEMU's command line as far as memory goes.
 *
 * QEMU's options begin with one or two dashes; most take one value, which is the next word
 * whatever it looks like ("-append -m" is a kernel argument), and the table below knows those that
 * take none. An option that it does not know is taken to have a value when the next word does not
 * begin with a dash. Repeated options add up: the last value of a key wins.
 *
 * Invariants: the user's own words are never changed, moved or dropped, only followed by ours; RAM
 * is given a backend of ours only where nothing on the line speaks of guest memory in a way that
 * we would have to join in with. Where it is in doubt, the RAM stays as it is, with a sentence
 * that says why.
 *
 * Not promised: what a configuration file (-readconfig) or a later QMP command adds is not seen.
 */
#include "cmdline.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "optstr.h"

#define DEFAULT_RAM_BYTES (128ULL << 20) /* hw/core/machine.c: default_ram_size */
#define RAM_ALIGN_BYTES   8192ULL        /* softmmu/vl.c rounds the size of RAM up to this */

/* Options of QEMU that take no value. */
static const char *const valueless[] = {
    "h",
    "help",
    "version",
    "mem-prealloc",
    "audio-help",
    "snapshot",
    "usb",
    "nographic",
    "portrait",
    "full-screen",
    "win2k-hack",
    "no-fd-bootchk",
    "no-acpi",
    "no-hpet",
    "singlestep",
    "preconfig",
    "S",
    "s",
    "enable-kvm",
    "xen-attach",
    "xen-domid-restrict",
    "no-reboot",
    "no-shutdown",
    "daemonize",
    "only-migratable",
    "nodefaults",
    "no-user-config",
    "nouserconfig",
    "async-teardown",
    "enable-sync-profile",
    "sdl",
    "curses",
    "alt-grab",
    "ctrl-grab",
    "no-quit",
    "no-frame",
    "old-param",
    "semihosting",
    "enable-fips",
    "enable-hax",
    "no-kvm",
    "tdf",
    "no-kvm-irqchip",
    "no-kvm-pit",
    "no-kvm-pit-reinjection",
    "show-cursor",
    "enable-tcg",
};

__attribute__((format(printf, 2, 3))) static void say(struct qemu_cmdline *line, const char *format,
                                                      ...)
{
    va_list arguments;

    if (line->word_count == QEMU_CMDLINE_WORDS_MAX)
        return;
    va_start(arguments, format);
    if (vasprintf(&line->words[line->word_count], format, arguments) >= 0)
        line->word_count++;
    va_end(arguments);
}

/* The first reason stands. */
static void keep_ram(struct qemu_cmdline *line, const char *why)
{
    if (!line->keep_ram)
        line->keep_ram = why;
}

/* ---- one function for each option that says something about memory ---- */

static int read_size(struct qemu_cmdline *line, const char *option, const char *text, char unit)
{
    uint64_t bytes;

    if (qemu_optstr_size(text, unit, &bytes) < 0) {
        say(line, "%s: '%s' is no size", option, text);
        return -EINVAL;
    }
    if (bytes > 0) { /* QEMU takes 0 for "the default" */
        line->machine_bytes = bytes;
        line->size_given = true;
    }
    return 0;
}

static int take_memory(struct qemu_cmdline *line, const char *value)
{
    char *size = qemu_optstr_get(value, "size", "size");
    int error = size ? read_size(line, "-m", size, 'M') : 0;

    free(size);
    return error;
}

/* memory.size=, or "memory" as an object in JSON, which nobody writes by hand. */
static int take_machine_memory(struct qemu_cmdline *line, const char *value)
{
    char *size = qemu_optstr_get(value, NULL, "memory.size");
    int error = size ? read_size(line, "-machine memory.size", size, 'b') : 0;

    free(size);
    return error;
}

static void take_machine_type(struct qemu_cmdline *line, const char *value)
{
    char *type = qemu_optstr_get(value, "type", "type");

    if (!type)
        return;
    free(line->machine);
    line->machine = type;
    if (strncmp(type, "xen", 3) == 0)
        keep_ram(line, "a Xen guest's memory belongs to Xen");
}

static int take_machine(struct qemu_cmdline *line, const char *value)
{
    static const struct {
        const char *key, *why;
    } refusals[] = {
        {"memory-backend", "-machine memory-backend= already chooses a memory backend"},
        {"confidential-guest-support", "a confidential guest's memory is encrypted and pinned"},
        {"memory-encryption", "a confidential guest's memory is encrypted and pinned"},
    };

    take_machine_type(line, value);
    for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
        char *found = qemu_optstr_get(value, "type", refusals[i].key);

        if (found)
            keep_ram(line, refusals[i].why);
        free(found);
    }
    if (qemu_optstr_says_no(value, "mem-merge"))
        line->merge_off = true;
    else if (qemu_optstr_says_yes(value, "mem-merge"))
        line->merge_off = false;
    return take_machine_memory(line, value);
}

static void remember_backend(struct qemu_cmdline *line, const char *value)
{
    struct qemu_backend *backend = &line->backends[line->backend_count];
    char *size = qemu_optstr_get(value, "qom-type", "size");

    if (line->backend_count < QEMU_CMDLINE_BACKENDS_MAX) {
        backend->id = qemu_optstr_get(value, "qom-type", "id");
        if (backend->id && size && qemu_optstr_size(size, 'b', &backend->bytes) == 0)
            line->backend_count++;
        else
            free(backend->id);
    }
    free(size);
}

static void warn_about_backend(struct qemu_cmdline *line, const char *type, const char *value)
{
    bool shared = qemu_optstr_says_yes(value, "share");

    if (strcmp(type, "memory-backend-memfd") == 0)
        shared = !qemu_optstr_says_no(value, "share");
    if (strcmp(type, "memory-backend-file") == 0 || strcmp(type, "memory-backend-epc") == 0 ||
        shared)
        say(line, "-object %s: memory on a file or shared with others is left alone", type);
}

static int take_object(struct qemu_cmdline *line, const char *value)
{
    char *type = qemu_optstr_get(value, "qom-type", "qom-type");

    if (type && strncmp(type, "memory-backend-", 15) == 0) {
        keep_ram(line, "the command line brings its own memory backend");
        remember_backend(line, value);
        warn_about_backend(line, type, value);
    }
    free(type);
    return 0;
}

static void take_vfio(struct qemu_cmdline *line, const char *device)
{
    keep_ram(line, "a device that is passed through pins all of the guest's memory");
    say(line, "%s pins all of the guest's memory: nothing of it will be shared", device);
}

static void take_vhost_user(struct qemu_cmdline *line)
{
    keep_ram(line, "a vhost-user process maps the guest's memory too");
    say(line, "vhost-user: memory that another process maps is left alone");
}

static int take_device(struct qemu_cmdline *line, const char *value)
{
    char *driver = qemu_optstr_get(value, "driver", "driver");
    char *backend = qemu_optstr_get(value, "driver", "memdev");

    if (driver && (strncmp(driver, "vfio-", 5) == 0 || strncmp(driver, "vhost-vdpa-", 11) == 0))
        take_vfio(line, driver);
    if (driver && strncmp(driver, "vhost-user-", 11) == 0)
        take_vhost_user(line);
    if (backend && line->dimm_count < QEMU_CMDLINE_BACKENDS_MAX)
        line->dimms[line->dimm_count++] = backend;
    else
        free(backend);
    free(driver);
    return 0;
}

static int take_netdev(struct qemu_cmdline *line, const char *value)
{
    char *type = qemu_optstr_get(value, "type", "type");

    if (type && strcmp(type, "vhost-user") == 0)
        take_vhost_user(line);
    if (type && strcmp(type, "vhost-vdpa") == 0)
        take_vfio(line, "vhost-vdpa");
    free(type);
    return 0;
}

static int take_numa(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    keep_ram(line, "-numa divides the guest's memory");
    return 0;
}

static int take_mem_path(struct qemu_cmdline *line, const char *value)
{
    keep_ram(line, "-mem-path already chooses a file");
    say(line, "-mem-path %s: memory on a file is left alone: nothing of it will be shared", value);
    return 0;
}

static int take_mem_prealloc(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    say(line, "-mem-prealloc: the guest takes all of its memory when it starts");
    return 0;
}

static int take_overcommit(struct qemu_cmdline *line, const char *value)
{
    if (qemu_optstr_says_yes(value, "mem-lock") || qemu_optstr_says_yes(value, "mlock")) {
        keep_ram(line, "the VMM locks its memory");
        say(line, "locked memory is left alone: nothing of it will be shared");
    }
    return 0;
}

static int take_incoming(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    line->incoming = true;
    say(line, "-incoming: the guest's memory has the same name here as there only if its source "
              "was started in the same way (both with --no-migrate, or both without)");
    return 0;
}

static int take_readconfig(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    line->size_elsewhere = true;
    keep_ram(line, "a configuration file (-readconfig, -set) may speak of memory");
    return 0;
}

static int take_monitor(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    line->default_monitor = false;
    return 0;
}

static int take_serial(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    line->default_serial = false;
    return 0;
}

static int take_nodefaults(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    line->default_monitor = line->default_serial = false;
    return 0;
}

static int take_nographic(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    line->nographic = true;
    line->graphical = false;
    return 0;
}

static int take_display(struct qemu_cmdline *line, const char *value)
{
    if (strcmp(value, "none") == 0)
        line->graphical = false;
    return 0;
}

static int take_daemonize(struct qemu_cmdline *line, const char *value)
{
    (void)value;
    line->daemonizes = true;
    return 0;
}

static const struct {
    const char *name;
    int (*take)(struct qemu_cmdline *line, const char *value); /* value is "" where none is */
} handlers[] = {
    {"m", take_memory},
    {"M", take_machine},
    {"machine", take_machine},
    {"object", take_object},
    {"device", take_device},
    {"netdev", take_netdev},
    {"net", take_netdev},
    {"numa", take_numa},
    {"mem-path", take_mem_path},
    {"mem-prealloc", take_mem_prealloc},
    {"overcommit", take_overcommit},
    {"realtime", take_overcommit},
    {"incoming", take_incoming},
    {"readconfig", take_readconfig},
    {"set", take_readconfig},
    {"qmp", take_monitor},
    {"qmp-pretty", take_monitor},
    {"mon", take_monitor},
    {"monitor", take_monitor},
    {"serial", take_serial},
    {"nodefaults", take_nodefaults},
    {"nographic", take_nographic},
    {"display", take_display},
    {"daemonize", take_daemonize},
};

/* ---- the line as a whole ---- */

static bool known_valueless(const char *name)
{
    for (size_t i = 0; i < sizeof(valueless) / sizeof(valueless[0]); i++) {
        if (strcmp(valueless[i], name) == 0)
            return true;
    }
    return false;
}

/* Reads the option at argv[0]; *ret_words is how many words it took. */
static int read_option(struct qemu_cmdline *line, char *const argv[], int *ret_words)
{
    const char *name = argv[0] + (argv[0][1] == '-' ? 2 : 1);
    bool valued = !known_valueless(name);

    for (size_t i = 0; i < sizeof(handlers) / sizeof(handlers[0]); i++) {
        if (strcmp(handlers[i].name, name) != 0)
            continue;
        if (valued && !argv[1]) {
            say(line, "%s needs a value", argv[0]);
            return -EINVAL;
        }
        *ret_words = valued ? 2 : 1;
        return handlers[i].take(line, valued ? argv[1] : "");
    }
    *ret_words = valued && argv[1] ? 2 : 1;
    return 0;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? slash + 1 : path;
}

static bool is_pc(const char *program)
{
    const char *name = base_name(program);

    if (strncmp(name, "qemu-system-x86_64", 18) == 0 || strcmp(name, "qemu-system-i386") == 0)
        return true;
#ifdef __x86_64__
    return strcmp(name, "kvm") == 0 || strcmp(name, "qemu-kvm") == 0;
#else
    return false;
#endif
}

bool qemu_cmdline_is_qemu(const char *program)
{
    const char *name = base_name(program);

    return strncmp(name, "qemu-system-", 12) == 0 || strcmp(name, "kvm") == 0 ||
           strcmp(name, "qemu-kvm") == 0;
}

/* Machine types that were seen to take their RAM from -machine memory-backend=. */
static bool machine_takes_backend(const struct qemu_cmdline *line)
{
    static const char *const types[] = {
        "pc", "q35", "isapc", "microvm", "virt", "s390-ccw-virtio", "pseries"};

    if (!line->machine)
        return line->x86;
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        size_t length = strlen(types[i]);

        if (strncmp(line->machine, types[i], length) == 0 &&
            (line->machine[length] == '\0' || line->machine[length] == '-'))
            return true;
    }
    return false;
}

static uint64_t dimm_bytes(const struct qemu_cmdline *line)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < line->dimm_count; i++) {
        for (size_t j = 0; j < line->backend_count; j++) {
            if (strcmp(line->dimms[i], line->backends[j].id) == 0)
                checked_add_u64(bytes, line->backends[j].bytes, &bytes);
        }
    }
    return bytes;
}

/* What the options mean together. */
static void conclude(struct qemu_cmdline *line)
{
    bool none = line->machine && strcmp(line->machine, "none") == 0;

    if (!line->size_given && !line->size_elsewhere && line->x86 && !none)
        line->machine_bytes = DEFAULT_RAM_BYTES;
    line->machine_bytes = (line->machine_bytes + RAM_ALIGN_BYTES - 1) & ~(RAM_ALIGN_BYTES - 1);
    if (line->machine_bytes)
        checked_add_u64(line->machine_bytes, dimm_bytes(line), &line->ram_bytes);
    if (!line->machine_bytes)
        keep_ram(line, "the command line does not say how much RAM the machine has");
    if (!machine_takes_backend(line))
        keep_ram(line, "this machine type is not known to take a memory backend");
    if (line->merge_off) {
        keep_ram(line, "mem-merge=off asks for memory that is not shared");
        say(line, "mem-merge=off: nothing of this guest's memory will be shared");
    }
}

int qemu_cmdline_read(char *const argv[], struct qemu_cmdline *ret_cmdline)
{
    int error, words;

    *ret_cmdline = (struct qemu_cmdline){
        .graphical = true,
        .default_monitor = true,
        .default_serial = true,
        .x86 = is_pc(argv[0]),
    };
    for (char *const *word = argv + 1; *word; word += words) {
        words = 1;
        if (word[0][0] != '-')
            continue; /* a disk image */
        error = read_option(ret_cmdline, word, &words);
        if (error < 0)
            return error;
    }
    conclude(ret_cmdline);
    return 0;
}

/* ---- the line with our additions ---- */

struct argv_builder {
    char **argv;
    size_t count;
    bool failed;
};

__attribute__((format(printf, 2, 3))) static void add(struct argv_builder *builder,
                                                      const char *format, ...)
{
    char **grown = reallocarray(builder->argv, builder->count + 2, sizeof(*grown));
    va_list arguments;

    if (!grown) {
        builder->failed = true;
        return;
    }
    builder->argv = grown;
    va_start(arguments, format);
    if (vasprintf(&grown[builder->count], format, arguments) < 0) {
        builder->failed = true;
        grown[builder->count] = NULL;
    } else {
        grown[++builder->count] = NULL;
    }
    va_end(arguments);
}

/*
 * A QMP socket of ours, and back what it takes away: QEMU makes its default monitor only if no
 * other is asked for, and without it -nographic would no longer hand Ctrl-C to the guest.
 */
static void add_monitor(struct argv_builder *builder, const struct qemu_cmdline *line,
                        const char *path)
{
    char *escaped = qemu_optstr_escape(path);

    if (!escaped) {
        builder->failed = true;
        return;
    }
    add(builder, "-qmp");
    add(builder, "unix:%s,server=on,wait=off", escaped);
    free(escaped);
    if (!line->default_monitor)
        return;
    if (line->nographic && line->default_serial) {
        add(builder, "-serial");
        add(builder, "mon:stdio");
    } else if (line->graphical) {
        add(builder, "-monitor");
        add(builder, "vc:80Cx24C");
    }
}

/*
 * With a directory as mem-path QEMU makes a file there and unlinks it at once, so that nothing is
 * left behind however it ends. The alignment lets the kernel use huge pages: without it QEMU
 * aligns to the file's 4 KiB pages.
 */
static void add_backend(struct argv_builder *builder, const struct qemu_cmdline *line,
                        const char *directory)
{
    char *escaped = qemu_optstr_escape(directory);

    if (!escaped) {
        builder->failed = true;
        return;
    }
    add(builder, "-object");
    add(builder, "memory-backend-file,id=%s,size=%llu,mem-path=%s,share=on,align=%lu",
        QEMU_BACKEND_ID, (unsigned long long)line->machine_bytes, escaped, HUGE_BYTES);
    add(builder, "-machine");
    add(builder, "memory-backend=%s", QEMU_BACKEND_ID);
    free(escaped);
}

int qemu_cmdline_extend(const struct qemu_cmdline *cmdline, const struct qemu_extras *extras,
                        char *const argv[], char ***ret_argv)
{
    struct argv_builder builder = {0};

    for (; *argv; argv++)
        add(&builder, "%s", *argv);
    if (extras->qmp_path)
        add_monitor(&builder, cmdline, extras->qmp_path);
    if (extras->ram_directory)
        add_backend(&builder, cmdline, extras->ram_directory);
    if (extras->incoming) {
        add(&builder, "-S"); /* the guest runs when memd says so, whatever its state says */
        add(&builder, "-incoming");
        add(&builder, "defer");
    }
    if (builder.failed) {
        qemu_cmdline_free_argv(builder.argv);
        return -ENOMEM;
    }
    *ret_argv = builder.argv;
    return 0;
}

char *qemu_cmdline_ram_prefix(const char *directory)
{
    char *prefix;

    /* QEMU, file_ram_open() in softmmu/physmem.c: "%s/qemu_back_mem.%s.XXXXXX" */
    if (asprintf(&prefix, "%s/qemu_back_mem.%s.", directory, QEMU_BACKEND_ID) < 0)
        return NULL;
    return prefix;
}

void qemu_cmdline_free(struct qemu_cmdline *cmdline)
{
    free(cmdline->machine);
    for (size_t i = 0; i < cmdline->word_count; i++)
        free(cmdline->words[i]);
    for (size_t i = 0; i < cmdline->backend_count; i++)
        free(cmdline->backends[i].id);
    for (size_t i = 0; i < cmdline->dimm_count; i++)
        free(cmdline->dimms[i]);
    *cmdline = (struct qemu_cmdline){0};
}

void qemu_cmdline_free_argv(char **argv)
{
    for (char **word = argv; word && *word; word++)
        free(*word);
    free(argv);
}
