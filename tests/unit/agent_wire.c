/* SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>

#include "wire.h"

static const struct wire_limits source = {WIRE_AT_SOURCE, 1000, 2, 100};
static const struct wire_limits urgent = {WIRE_AT_DESTINATION_URGENT, 1000, 2, 100};
static const struct wire_limits bulk = {WIRE_AT_DESTINATION_BULK, 1000, 2, 100};

/* The size of the payload, or -EPROTO. */
static int64_t read_back(const struct wire_limits *limits, enum wire_type type, uint32_t count,
                         uint64_t page)
{
    uint8_t header[WIRE_HEADER_BYTES];
    struct wire_frame frame;
    const char *reason = NULL;
    uint32_t payload;
    int r;

    wire_write_header(header, type, count, page);
    r = wire_read_header(limits, header, &frame, &payload, &reason);
    if (r < 0) {
        cr_assert_not_null(reason);
        return r;
    }
    cr_assert_eq(frame.type, type);
    cr_assert_eq(frame.count, count);
    cr_assert_eq(frame.page, page);
    return payload;
}

Test(wire, what_is_written_is_read)
{
    cr_assert_eq(read_back(&bulk, WIRE_DATA, 16, 984), 16 * 4096);
    cr_assert_eq(read_back(&urgent, WIRE_DATA, 1, 999), 4096);
    cr_assert_eq(read_back(&bulk, WIRE_ZERO, 1000, 0), 0);
    cr_assert_eq(read_back(&bulk, WIRE_CONTENT, 1, 99), 4096);
    cr_assert_eq(read_back(&bulk, WIRE_REF, 64, 936), 256);
    cr_assert_eq(read_back(&bulk, WIRE_MAP, 1024, 0), 16384);
    cr_assert_eq(read_back(&bulk, WIRE_MAP_END, 0, 1000), 0);
    cr_assert_eq(read_back(&urgent, WIRE_PROVEN, EBADMSG, 1), 0);
    cr_assert_eq(read_back(&source, WIRE_WANT, 1, 999), 0);
    cr_assert_eq(read_back(&source, WIRE_HAVE, 1000, 0), 16 * 8);
    cr_assert_eq(read_back(&source, WIRE_PLACED, 40, 960), 8);
    cr_assert_eq(read_back(&source, WIRE_DONE, 2, 0), 16);
}

Test(wire, pages_that_there_are_not)
{
    cr_assert_eq(read_back(&bulk, WIRE_DATA, 16, 985), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_DATA, 1, UINT64_MAX), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_ZERO, 1001, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_CONTENT, 1, 100), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_MAP_END, 0, 999), -EPROTO);
    cr_assert_eq(read_back(&source, WIRE_WANT, 1, 1000), -EPROTO);
    cr_assert_eq(read_back(&source, WIRE_HAVE, 64, 960), -EPROTO);
    cr_assert_eq(read_back(&source, WIRE_HAVE, 64, 1), -EPROTO);
    cr_assert_eq(read_back(&source, WIRE_HAVE, 30, 0), -EPROTO);
    cr_assert_eq(read_back(&source, WIRE_HAVE_END, 0, 101), -EPROTO);
    cr_assert_eq(read_back(&urgent, WIRE_PROVEN, EBADMSG, 2), -EPROTO);
}

Test(wire, counts_that_can_not_be)
{
    cr_assert_eq(read_back(&bulk, WIRE_DATA, 0, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_DATA, 17, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_CONTENT, 2, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_REF, 65, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_MAP, 1025, 0), -EPROTO);
    cr_assert_eq(read_back(&source, WIRE_WANT, 2, 0), -EPROTO);
    cr_assert_eq(read_back(&source, WIRE_DONE, 1, 0), -EPROTO);
    cr_assert_eq(read_back(&source, WIRE_DONE, 3, 0), -EPROTO);
}

Test(wire, frames_of_the_other_direction_or_channel)
{
    cr_assert_eq(read_back(&source, WIRE_DATA, 1, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_WANT, 1, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, WIRE_PROVEN, 0, 0), -EPROTO);
    cr_assert_eq(read_back(&urgent, WIRE_MAP_END, 0, 1000), -EPROTO);
    cr_assert_eq(read_back(&urgent, WIRE_REF, 1, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, (enum wire_type)10, 0, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, (enum wire_type)0, 0, 0), -EPROTO);
    cr_assert_eq(read_back(&bulk, (enum wire_type)4711, 0, 0), -EPROTO);
}

Test(wire, flags_that_nobody_knows)
{
    uint8_t header[WIRE_HEADER_BYTES];
    struct wire_frame frame;
    const char *reason;
    uint32_t payload;

    wire_write_header(header, WIRE_DATA, 1, 0);
    header[2] = 1;
    cr_assert_eq(wire_read_header(&bulk, header, &frame, &payload, &reason), -EPROTO);
}

Test(wire, runs_of_a_map)
{
    struct wire_run run = {10, 990, WIRE_KIND_HAVE};
    uint8_t payload[16];
    const char *reason;

    wire_write_run(payload, 0, &run);
    memset(&run, 0, sizeof(run));
    cr_assert_eq(wire_read_run(&bulk, payload, 0, 10, &run, &reason), 0);
    cr_assert_eq(run.pages, 990);
    cr_assert_eq(run.kind, WIRE_KIND_HAVE);
    cr_assert_eq(wire_read_run(&bulk, payload, 0, 9, &run, &reason), -EPROTO);
    run = (struct wire_run){10, 991, WIRE_KIND_HAVE};
    wire_write_run(payload, 0, &run);
    cr_assert_eq(wire_read_run(&bulk, payload, 0, 10, &run, &reason), -EPROTO);
    run = (struct wire_run){10, 0, WIRE_KIND_HAVE};
    wire_write_run(payload, 0, &run);
    cr_assert_eq(wire_read_run(&bulk, payload, 0, 10, &run, &reason), -EPROTO);
    run = (struct wire_run){10, 1, 4};
    wire_write_run(payload, 0, &run);
    cr_assert_eq(wire_read_run(&bulk, payload, 0, 10, &run, &reason), -EPROTO);
}
