/* SPDX-License-Identifier: Apache-2.0 */
/* What users write, and how sizes are shown to them. */
#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

#include "ctl.h"
#include "image.h"

static uint64_t size_of(const char *text)
{
    uint64_t bytes;

    cr_assert(ctl_value_size(text, &bytes) == 0, "%s", text);
    return bytes;
}

Test(ctl_value, sizes)
{
    cr_expect(size_of("0") == 0);
    cr_expect(size_of("4096") == 4096);
    cr_expect(size_of("4k") == 4096);
    cr_expect(size_of("512M") == 512ULL << 20);
    cr_expect(size_of("1.5G") == 1536ULL << 20);
    cr_expect(size_of("2GiB") == 2ULL << 30);
    cr_expect(size_of("2GB") == 2ULL << 30);
    cr_expect(size_of("3T") == 3ULL << 40);
}

Test(ctl_value, sizes_that_are_none)
{
    static const char *const none[] = {"",    "M",    "-1",    "+1",  "1X",  "1MM", "1 M",
                                       "1e9", "0x10", "1.2.3", "nan", "1Mi", "1,5G"};
    uint64_t bytes = 7;

    for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++)
        cr_expect(ctl_value_size(none[i], &bytes) == -EINVAL, "'%s'", none[i]);
    cr_expect(ctl_value_size("99999999T", &bytes) == -ERANGE);
    cr_expect(bytes == 7);
}

Test(ctl_value, numbers_that_are_none)
{
    uint64_t number = 7;

    cr_expect(ctl_value_number("10", 10, &number) == 0 && number == 10);
    cr_expect(ctl_value_number("11", 10, &number) == -ERANGE);
    cr_expect(ctl_value_number("0", 10, &number) == -ERANGE);
    cr_expect(ctl_value_number("99999999999999999999", UINT64_MAX, &number) == -ERANGE);
    cr_expect(ctl_value_number("", 10, &number) == -EINVAL);
    cr_expect(ctl_value_number("-1", 10, &number) == -EINVAL);
    cr_expect(ctl_value_number("1x", 10, &number) == -EINVAL);
}

Test(ctl_value, names_that_no_guest_may_have)
{
    char name[66];

    memset(name, 'a', sizeof(name));
    name[63] = '\0';
    cr_expect(words_are_name(name));
    name[63] = 'a';
    name[64] = '\0';
    cr_expect_not(words_are_name(name));
    cr_expect(words_are_name("9.A_b-c"));
    cr_expect_not(words_are_name(""));
    cr_expect_not(words_are_name(".a"));
    cr_expect_not(words_are_name("a/b"));
    cr_expect_not(words_are_name("a b"));
    cr_expect_not(words_are_name("a\xc3\xa4"));
}

Test(ctl_output, sizes_for_people)
{
    char text[CTL_SIZE_CHARS];

    cr_expect_str_eq(ctl_format_size(0, text), "0 B");
    cr_expect_str_eq(ctl_format_size(1023, text), "1023 B");
    cr_expect_str_eq(ctl_format_size(512ULL << 20, text), "512 MiB");
    cr_expect_str_eq(ctl_format_size(1536ULL << 20, text), "1.5 GiB");
    cr_expect_str_eq(ctl_format_size(UINT64_MAX, text), "16 EiB");
    cr_expect_str_eq(ctl_format_count(1234567, text), "1,234,567");
    cr_expect_str_eq(ctl_format_count(999, text), "999");
    cr_expect_str_eq(ctl_format_percent(1, 3, text), "33 %");
    cr_expect_str_eq(ctl_format_percent(1, 300, text), "0.3 %");
    cr_expect_str_eq(ctl_format_percent(1, 30000, text), "<0.1 %");
    cr_expect_str_eq(ctl_format_percent(0, 3, text), "0 %");
    cr_expect_str_eq(ctl_format_percent(1, 0, text), "-");
}

Test(ctl_output, members_that_are_not_there_or_of_another_kind)
{
    json_t *object =
        json_pack("{s:{s:i, s:f}, s:s, s:i}", "a", "b", 3, "c", 1.5, "d", "e", "f", -1);

    cr_expect(ctl_json_u64(object, "a.b") == 3);
    cr_expect(ctl_json_u64(object, "a.c") == 1);
    cr_expect(ctl_json_real(object, "a.c") == 1.5);
    cr_expect(ctl_json_u64(object, "a.x.y") == 0);
    cr_expect(ctl_json_u64(object, "d") == 0);
    cr_expect(ctl_json_u64(object, "f") == 0);
    cr_expect_str_eq(ctl_json_text(object, "d"), "e");
    cr_expect_str_eq(ctl_json_text(object, "a"), "");
    cr_expect_str_eq(ctl_json_text(NULL, "a"), "");
    json_decref(object);
}

Test(ctl_image, what_can_not_be_started)
{
    char *path, reason[IMAGE_REASON_CHARS];
    bool linked, script;

    cr_expect(ctl_image_find("no.such.program.anywhere", &path) == -ENOENT);
    cr_expect(ctl_image_find("/etc/passwd", &path) == -EACCES);
    cr_expect(ctl_image_find("/tmp", &path) == -EACCES);
    cr_expect(ctl_image_inspect("/etc/passwd", reason, &linked, &script) == -ENOEXEC);
}

Test(ctl_image, a_vmm_that_links_libmemd_needs_no_preloading)
{
    char reason[IMAGE_REASON_CHARS];
    bool linked = true, script = false;

    cr_assert(ctl_image_inspect("/proc/self/exe", reason, &linked, &script) == 0);
    cr_expect(!linked && reason[0] == '\0');
#ifdef MEMVM_PATH
    cr_assert(ctl_image_inspect(MEMVM_PATH, reason, &linked, &script) == 0);
    cr_expect(linked && reason[0] == '\0');
#endif
}
