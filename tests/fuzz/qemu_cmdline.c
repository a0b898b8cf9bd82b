/* SPDX-License-Identifier: Apache-2.0 */
/* QEMU's command line, a word a line, and each of its words as an option string. */
#include "cmdline.h"
#include "fuzz.h"
#include "optstr.h"

#define WORDS_MAX 64U

static const char *const seeds[] = {
    "qemu-system-x86_64\n-m\n1G\n-smp\n4\n-M\nq35,mem-merge=on\n-nographic\n-kernel\n/x",
    "qemu-system-x86_64\n-m\nsize=512M,slots=4,maxmem=8G\n-object\n"
    "memory-backend-ram,id=m,size=1G\n-device\npc-dimm,memdev=m\n-numa\nnode,memdev=m",
    "qemu-system-aarch64\n-machine\ntype=virt,memory-backend=mem0\n-object\n"
    "{\"qom-type\":\"memory-backend-file\",\"id\":\"mem0\",\"size\":1073741824,\"share\":true}",
    "kvm\n-m\n1.5G\n-overcommit\nmem-lock=on\n-monitor\nstdio\n-daemonize\n-readconfig\n/x,,y",
    "qemu-system-i386\n-display\nnone\n-serial\nmon:stdio\n-qmp\nunix:/"
    "a,,b,server=on\n-sandbox\non",
};

size_t fuzz_seed(size_t number, uint8_t *into, size_t room)
{
    return fuzz_seed_of(seeds, sizeof(seeds) / sizeof(seeds[0]), number, into, room);
}

static void look_at_word(const char *word)
{
    uint64_t size = 0;
    char *text = qemu_optstr_escape(word), *back;

    FUZZ_REQUIRE(text);
    /* What is escaped is read back as it was, where it is a value. */
    if (word[0] && !strchr(word, '=')) {
        back = qemu_optstr_get(text, "file", "file");
        FUZZ_REQUIRE(text[0] == '{' || (back && strcmp(back, word) == 0));
        free(back);
    }
    free(text);
    free(qemu_optstr_get(word, "type", "id"));
    free(qemu_optstr_get(word, NULL, "size"));
    (void)qemu_optstr_says_no(word, "mem-merge");
    (void)qemu_optstr_says_yes(word, "share");
    (void)qemu_optstr_size(word, 'M', &size);
}

static void look_at_line(char **argv)
{
    struct qemu_extras extras = {"/run/x,y.qmp", "/dev/shm/x", true};
    struct qemu_cmdline cmdline;
    char **longer = NULL;

    if (qemu_cmdline_read(argv, &cmdline) == 0 &&
        qemu_cmdline_extend(&cmdline, &extras, argv, &longer) == 0) {
        for (size_t i = 0; argv[i]; i++)
            FUZZ_REQUIRE(longer[i] && strcmp(longer[i], argv[i]) == 0);
        qemu_cmdline_free_argv(longer);
    }
    FUZZ_REQUIRE(cmdline.word_count <= QEMU_CMDLINE_WORDS_MAX);
    FUZZ_REQUIRE(cmdline.backend_count <= QEMU_CMDLINE_BACKENDS_MAX);
    qemu_cmdline_free(&cmdline);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    char *argv[WORDS_MAX + 1], *text = malloc(bytes + 1), *rest = text;
    size_t count = 0;

    FUZZ_REQUIRE(text);
    if (bytes)
        memcpy(text, data, bytes);
    text[bytes] = '\0';
    while (rest && count < WORDS_MAX)
        argv[count++] = strsep(&rest, "\n");
    argv[count] = NULL;
    (void)qemu_cmdline_is_qemu(argv[0]);
    for (size_t i = 0; i < count; i++)
        look_at_word(argv[i]);
    look_at_line(argv);
    free(text);
    return 0;
}
