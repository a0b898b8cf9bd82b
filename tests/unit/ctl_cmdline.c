/* SPDX-License-Identifier: Apache-2.0 */
/* What QEMU's command line is taken to say about memory, and what is added to it. */
#include <criterion/criterion.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cmdline.h"
#include "optstr.h"

#define MIB       (1ULL << 20)
#define LINE(...) ((char *const[]){"qemu-system-x86_64", __VA_ARGS__, NULL})

static struct qemu_cmdline read_line(char *const argv[])
{
    struct qemu_cmdline line;

    cr_assert(qemu_cmdline_read(argv, &line) == 0);
    return line;
}

static uint64_t ram_of(char *const argv[])
{
    struct qemu_cmdline line = read_line(argv);
    uint64_t bytes = line.ram_bytes;

    qemu_cmdline_free(&line);
    return bytes;
}

/* Why the RAM must stay, copied; "" when it need not. */
static const char *refusal_of(char *const argv[])
{
    struct qemu_cmdline line = read_line(argv);
    const char *why = line.keep_ram ? line.keep_ram : "";

    qemu_cmdline_free(&line);
    return why;
}

static bool has_word(char *const argv[], const char *part)
{
    struct qemu_cmdline line = read_line(argv);
    bool found = false;

    for (size_t i = 0; i < line.word_count; i++)
        found |= strstr(line.words[i], part) != NULL;
    qemu_cmdline_free(&line);
    return found;
}

/* ---- sizes ---- */

Test(ctl_cmdline, every_form_of_m)
{
    cr_expect(ram_of(LINE("-m", "512")) == 512 * MIB);
    cr_expect(ram_of(LINE("--m", "512M")) == 512 * MIB);
    cr_expect(ram_of(LINE("-m", "2G")) == 2048 * MIB);
    cr_expect(ram_of(LINE("-m", "2g")) == 2048 * MIB);
    cr_expect(ram_of(LINE("-m", "1.5G")) == 1536 * MIB);
    cr_expect(ram_of(LINE("-m", "1048576k")) == 1024 * MIB);
    cr_expect(ram_of(LINE("-m", "size=64,maxmem=4G,slots=2")) == 64 * MIB);
    cr_expect(ram_of(LINE("-m", "maxmem=4G,size=1G,slots=2")) == 1024 * MIB);
    cr_expect(ram_of(LINE("-m", "1G,maxmem=4G,slots=2")) == 1024 * MIB);
    cr_expect(ram_of(LINE("-machine", "q35,memory.size=33554432")) == 32 * MIB);
}

Test(ctl_cmdline, no_m_is_the_default_of_a_pc_and_unknown_elsewhere)
{
    char *const arm[] = {"qemu-system-aarch64", "-M", "virt", NULL};

    cr_expect(ram_of(LINE("-nographic")) == 128 * MIB);
    cr_expect(ram_of(LINE("-m", "slots=2,maxmem=4G")) == 128 * MIB);
    cr_expect(ram_of(LINE("-m", "0")) == 128 * MIB);
    cr_expect(ram_of(LINE("-M", "none")) == 0);
    cr_expect(ram_of(arm) == 0);
    cr_expect(ram_of(LINE("-readconfig", "file")) == 0);
    cr_expect(ram_of(LINE("-readconfig", "file", "-m", "1G")) == 1024 * MIB);
}

Test(ctl_cmdline, the_last_m_wins)
{
    cr_expect(ram_of(LINE("-m", "1G", "-m", "2G")) == 2048 * MIB);
    cr_expect(ram_of(LINE("-m", "1G", "-m", "slots=4")) == 1024 * MIB);
}

Test(ctl_cmdline, an_odd_size_is_rounded_up_as_qemu_does)
{
    cr_expect(ram_of(LINE("-m", "1048577b")) == MIB + 8192);
}

Test(ctl_cmdline, a_size_that_is_none)
{
    struct qemu_cmdline line;

    cr_expect(qemu_cmdline_read(LINE("-m", "lots"), &line) == -EINVAL);
    cr_expect(line.word_count == 1 && strstr(line.words[0], "lots"));
    qemu_cmdline_free(&line);
    cr_expect(qemu_cmdline_read(LINE("-nographic", "-m"), &line) == -EINVAL);
    qemu_cmdline_free(&line);
    cr_expect(qemu_cmdline_read(LINE("-m", "99999999E"), &line) == -EINVAL);
    qemu_cmdline_free(&line);
}

Test(ctl_cmdline, an_m_that_is_another_options_value)
{
    cr_expect(ram_of(LINE("-append", "-m", "-m", "1G")) == 1024 * MIB);
    cr_expect(ram_of(LINE("-name", "-m", "-S", "-m", "64", "-snapshot", "disk.img")) == 64 * MIB);
    cr_expect(ram_of(LINE("disk.img", "-S", "-m", "64")) == 64 * MIB);
}

Test(ctl_cmdline, dimms_are_ram_too)
{
    cr_expect(
        ram_of(LINE("-m", "1G,slots=2,maxmem=4G", "-object", "memory-backend-ram,id=d0,size=512M",
                    "-device", "pc-dimm,memdev=d0", "-object",
                    "{\"qom-type\": \"memory-backend-ram\", \"id\": \"d1\", "
                    "\"size\": 67108864}",
                    "-device", "{\"driver\": \"pc-dimm\", \"memdev\": \"d1\"}", "-object",
                    "memory-backend-ram,id=unused,size=1G")) == (1024 + 512 + 64) * MIB);
}

/* ---- what keeps the RAM where it is ---- */

Test(ctl_cmdline, ram_that_must_not_be_moved_to_our_backend)
{
    cr_expect_str_empty(refusal_of(LINE("-m", "1G")));
    cr_expect_str_empty(refusal_of(LINE("-M", "q35,accel=tcg")));
    cr_expect_str_empty(refusal_of(LINE("-machine", "pc-i440fx-7.2")));
    cr_expect_str_empty(refusal_of(LINE("-chardev", "socket,id=c,path=/tmp/x")));
    cr_expect_str_not_empty(refusal_of(LINE("-M", "xenfv")));
    cr_expect_str_not_empty(refusal_of(LINE("-M", "none")));
    cr_expect_str_not_empty(refusal_of(LINE("-M", "pc,memory-backend=mine")));
    cr_expect_str_not_empty(refusal_of(LINE("-M", "pc,memory-encryption=sev0")));
    cr_expect_str_not_empty(refusal_of(LINE("-M", "pc,mem-merge=off")));
    cr_expect_str_not_empty(refusal_of(LINE("-object", "memory-backend-ram,id=a,size=1G")));
    cr_expect_str_not_empty(refusal_of(LINE("-object", "{\"qom-type\":\"memory-backend-memfd\"}")));
    cr_expect_str_not_empty(refusal_of(LINE("-numa", "node")));
    cr_expect_str_not_empty(refusal_of(LINE("-mem-path", "/hugepages")));
    cr_expect_str_not_empty(refusal_of(LINE("-overcommit", "mem-lock=on")));
    cr_expect_str_empty(refusal_of(LINE("-overcommit", "mem-lock=off,cpu-pm=on")));
    cr_expect_str_not_empty(refusal_of(LINE("-realtime", "mlock=on")));
    cr_expect_str_not_empty(refusal_of(LINE("-device", "vfio-pci,host=01:00.0")));
    cr_expect_str_not_empty(refusal_of(LINE("-device", "{\"driver\":\"vfio-pci\"}")));
    cr_expect_str_not_empty(refusal_of(LINE("-device", "vhost-user-fs-pci,chardev=c")));
    cr_expect_str_not_empty(refusal_of(LINE("-netdev", "vhost-user,id=n,chardev=c")));
    cr_expect_str_not_empty(refusal_of(LINE("-netdev", "type=vhost-vdpa,id=n")));
    cr_expect_str_not_empty(refusal_of(LINE("-readconfig", "file")));
}

Test(ctl_cmdline, a_machine_of_another_architecture)
{
    char *const virt[] = {"/usr/bin/qemu-system-aarch64", "-M", "virt-7.2", "-m", "1G", NULL};
    char *const board[] = {"qemu-system-arm", "-M", "raspi2b", "-m", "1G", NULL};
    char *const none[] = {"qemu-system-aarch64", "-m", "1G", NULL};

    cr_expect_str_empty(refusal_of(virt));
    cr_expect_str_not_empty(refusal_of(board));
    cr_expect_str_not_empty(refusal_of(none));
}

Test(ctl_cmdline, what_can_not_be_shared_gets_a_word)
{
    cr_expect(has_word(LINE("-M", "mem-merge=off"), "mem-merge"));
    cr_expect_not(has_word(LINE("-M", "mem-merge=off", "-M", "mem-merge=on"), "mem-merge"));
    cr_expect(has_word(LINE("-overcommit", "mem-lock=on"), "locked"));
    cr_expect(has_word(LINE("-device", "vfio-pci,host=01:00.0"), "vfio-pci"));
    cr_expect(has_word(LINE("-mem-path", "/x"), "/x"));
    cr_expect(has_word(LINE("-object", "memory-backend-ram,id=a,size=1G,share=on"), "shared"));
    cr_expect_not(has_word(LINE("-object", "memory-backend-ram,id=a,size=1G"), "shared"));
    cr_expect(has_word(LINE("-mem-prealloc", "-incoming", "defer"), "-incoming"));
}

Test(ctl_cmdline, more_backends_than_there_is_room_for)
{
    char *argv[2 * (QEMU_CMDLINE_BACKENDS_MAX + 8) + 2] = {"qemu-system-x86_64"};

    for (size_t i = 1; i + 1 < sizeof(argv) / sizeof(argv[0]); i += 2) {
        argv[i] = "-object";
        argv[i + 1] = "memory-backend-file,id=a,size=1G,mem-path=/x";
    }
    argv[sizeof(argv) / sizeof(argv[0]) - 1] = NULL;
    cr_expect_str_not_empty(refusal_of(argv));
}

/* ---- additions ---- */

/* The extended line as one string. */
static const char *extend(char *const argv[], const char *qmp, const char *directory, bool incoming)
{
    static char text[4096];
    struct qemu_extras extras = {.qmp_path = qmp, .ram_directory = directory, .incoming = incoming};
    struct qemu_cmdline line = read_line(argv);
    char **result;

    cr_assert(qemu_cmdline_extend(&line, &extras, argv, &result) == 0);
    text[0] = '\0';
    for (char **word = result; *word; word++) {
        strcat(text, word == result ? "" : " ");
        strcat(text, *word);
    }
    qemu_cmdline_free_argv(result);
    qemu_cmdline_free(&line);
    return text;
}

static const char *extended(char *const argv[], const char *qmp, const char *directory)
{
    return extend(argv, qmp, directory, false);
}

Test(ctl_cmdline, a_guest_is_waited_for)
{
    struct qemu_cmdline line = read_line(LINE("-incoming", "defer"));

    cr_expect(line.incoming);
    qemu_cmdline_free(&line);
    cr_expect_str_eq(extend(LINE("-S"), NULL, NULL, true),
                     "qemu-system-x86_64 -S -S -incoming defer");
}

Test(ctl_cmdline, the_users_words_stay_as_they_are)
{
    cr_expect_str_eq(extended(LINE("-S", "-append", "a  b", "disk.img"), NULL, NULL),
                     "qemu-system-x86_64 -S -append a  b disk.img");
}

Test(ctl_cmdline, ram_on_our_backend_has_the_size_that_qemu_checks_it_against)
{
    const char *text = extended(LINE("-nodefaults", "-m", "1048577b"), NULL, "/dev/shm");

    cr_expect(strstr(text, "-object memory-backend-file,id=memd.ram,size=1056768,mem-path=/dev/shm,"
                           "share=on,align=2097152 -machine memory-backend=memd.ram"),
              "%s", text);
}

Test(ctl_cmdline, a_comma_in_a_path)
{
    const char *text = extended(LINE("-nodefaults"), "/run/a,b/c.qmp", "/x,y");

    cr_expect(strstr(text, "-qmp unix:/run/a,,b/c.qmp,server=on,wait=off"), "%s", text);
    cr_expect(strstr(text, "mem-path=/x,,y,"), "%s", text);
}

Test(ctl_cmdline, a_qmp_socket_does_not_take_the_default_monitor_away)
{
    cr_expect(strstr(extended(LINE("-nographic"), "/q", NULL), " -serial mon:stdio"));
    cr_expect(strstr(extended(LINE("-vnc", ":1"), "/q", NULL), " -monitor vc:80Cx24C"));
    cr_expect_not(strstr(extended(LINE("-nographic", "-nodefaults"), "/q", NULL), "mon:stdio"));
    cr_expect_not(strstr(extended(LINE("-nographic", "-serial", "null"), "/q", NULL), "mon:stdio"));
    cr_expect_not(
        strstr(extended(LINE("-nographic", "-monitor", "none"), "/q", NULL), "mon:stdio"));
    cr_expect_not(strstr(extended(LINE("-qmp", "unix:/x"), "/q", NULL), "-monitor"));
    cr_expect_not(strstr(extended(LINE("-display", "none"), "/q", NULL), "-monitor"));
    cr_expect_not(strstr(extended(LINE("-nographic"), NULL, NULL), "mon:stdio"));
}

Test(ctl_cmdline, names_of_qemu)
{
    cr_expect(qemu_cmdline_is_qemu("/usr/bin/qemu-system-x86_64"));
    cr_expect(qemu_cmdline_is_qemu("qemu-system-x86_64-microvm"));
    cr_expect(qemu_cmdline_is_qemu("/usr/libexec/qemu-kvm"));
    cr_expect(qemu_cmdline_is_qemu("kvm"));
    cr_expect_not(qemu_cmdline_is_qemu("qemu-img"));
    cr_expect_not(qemu_cmdline_is_qemu("/opt/qemu-system-x/firecracker"));
}

/* ---- option strings ---- */

static bool gives(const char *options, const char *implied, const char *key, const char *want)
{
    char *value = qemu_optstr_get(options, implied, key);
    bool same = want ? value && strcmp(value, want) == 0 : !value;

    if (!same)
        fprintf(stderr, "%s: %s is %s\n", options, key, value ? value : "(none)");
    free(value);
    return same;
}

Test(ctl_optstr, values_are_found)
{
    cr_expect(gives("q35,accel=kvm:tcg", "type", "type", "q35"));
    cr_expect(gives("q35,accel=kvm:tcg", "type", "accel", "kvm:tcg"));
    cr_expect(gives("accel=kvm,type=pc", "type", "type", "pc"));
    cr_expect(gives("a=1,a=2", NULL, "a", "2"));
    cr_expect(gives("path=/x,,y,b=1", NULL, "path", "/x,y"));
    cr_expect(gives("path=/x,,", NULL, "path", "/x,"));
    cr_expect(gives("a=1,flag", NULL, "flag", "on"));
    cr_expect(gives("a=1,noflag", NULL, "flag", "off"));
    cr_expect(gives("ab=1", NULL, "a", NULL));
    cr_expect(gives("", "type", "type", NULL));
    cr_expect(gives("a=", NULL, "a", ""));
    cr_expect(gives("{\"a\": {\"b\": 1}, \"c\": true}", NULL, "c", "on"));
    cr_expect(gives("{\"a\"", NULL, "a", NULL));
}

Test(ctl_optstr, sizes_that_are_none)
{
    uint64_t bytes = 7;

    cr_expect(qemu_optstr_size("", 'M', &bytes) == -EINVAL);
    cr_expect(qemu_optstr_size("-1", 'M', &bytes) == -EINVAL);
    cr_expect(qemu_optstr_size("M", 'M', &bytes) == -EINVAL);
    cr_expect(qemu_optstr_size("1MB", 'M', &bytes) == -EINVAL);
    cr_expect(qemu_optstr_size("1x", 'M', &bytes) == -EINVAL);
    cr_expect(qemu_optstr_size("16E", 'M', &bytes) == -ERANGE);
    cr_expect(bytes == 7);
}
