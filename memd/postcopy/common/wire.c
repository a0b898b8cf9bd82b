/* SPDX-License-Identifier: Apache-2.0 */
#include "wire.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

/* What the page field of a frame is. */
enum page_field {
    FIELD_NOTHING,  /* 0 */
    FIELD_RANGE,    /* first of `count` pages that exist */
    FIELD_BITS,     /* likewise, on a multiple of 64, and so is count but at the end of all pages */
    FIELD_TOTAL,    /* the number of all pages */
    FIELD_CONTENT,  /* a content's number */
    FIELD_CONTENTS, /* how many contents */
    FIELD_REGION,   /* a region's number */
};

#define BOTH (WIRE_AT_DESTINATION_URGENT | WIRE_AT_DESTINATION_BULK)

struct rule {
    const char *name;
    uint32_t readers;     /* enum wire_reader of those who may be sent it */
    uint32_t least, most; /* count */
    uint32_t unit_bytes;  /* of payload for each of count */
    enum page_field field;
};

static const struct rule rules[] = {
    [WIRE_DATA] = {"DATA", BOTH, 1, WIRE_DATA_MAX, WIRE_PAGE_BYTES, FIELD_RANGE},
    [WIRE_ZERO] = {"ZERO", BOTH, 1, WIRE_RUN_MAX, 0, FIELD_RANGE},
    [WIRE_CONTENT] = {"CONTENT", WIRE_AT_DESTINATION_BULK, 1, 1, WIRE_PAGE_BYTES, FIELD_CONTENT},
    [WIRE_REF] = {"REF", WIRE_AT_DESTINATION_BULK, 1, WIRE_REF_MAX, 4, FIELD_RANGE},
    [WIRE_PASS] = {"PASS", WIRE_AT_DESTINATION_BULK, 1, UINT32_MAX, 0, FIELD_NOTHING},
    [WIRE_MAP] = {"MAP", WIRE_AT_DESTINATION_BULK, 1, WIRE_MAP_MAX, 16, FIELD_NOTHING},
    [WIRE_MAP_END] = {"MAP_END", WIRE_AT_DESTINATION_BULK, 0, 0, 0, FIELD_TOTAL},
    [WIRE_NOTHING_LEFT] = {"NOTHING_LEFT", WIRE_AT_DESTINATION_BULK, 0, 0, 0, FIELD_NOTHING},
    [WIRE_PROVEN] = {"PROVEN", WIRE_AT_DESTINATION_URGENT, 0, 4095, 0, FIELD_REGION},
    [WIRE_WANT] = {"WANT", WIRE_AT_SOURCE, 1, 1, 0, FIELD_RANGE},
    [WIRE_HAVE] = {"HAVE", WIRE_AT_SOURCE, 1, WIRE_BITS_MAX, 0, FIELD_BITS},
    [WIRE_HAVE_END] = {"HAVE_END", WIRE_AT_SOURCE, 0, 0, 0, FIELD_CONTENTS},
    [WIRE_PLACED] = {"PLACED", WIRE_AT_SOURCE, 1, WIRE_BITS_MAX, 0, FIELD_BITS},
    [WIRE_DONE] = {"DONE", WIRE_AT_SOURCE, 0, WIRE_SUMS_MAX, 8, FIELD_NOTHING},
};

static const struct rule *find_rule(uint32_t type)
{
    if (type >= sizeof(rules) / sizeof(rules[0]) || !rules[type].name)
        return NULL;
    return &rules[type];
}

const char *wire_type_name(uint32_t type)
{
    const struct rule *rule = find_rule(type);

    return rule ? rule->name : "unknown";
}

static bool is_range(const struct wire_limits *limits, const struct wire_frame *frame)
{
    return frame->count <= limits->pages && frame->page <= limits->pages - frame->count;
}

static bool field_is_right(const struct wire_limits *limits, const struct wire_frame *frame,
                           enum page_field field)
{
    switch (field) {
    case FIELD_NOTHING: return frame->page == 0;
    case FIELD_RANGE: return is_range(limits, frame);
    case FIELD_BITS:
        return is_range(limits, frame) && frame->page % 64 == 0 &&
               (frame->count % 64 == 0 || frame->page + frame->count == limits->pages);
    case FIELD_TOTAL: return frame->page == limits->pages;
    case FIELD_CONTENT: return frame->page < limits->contents;
    case FIELD_CONTENTS: return frame->page <= limits->contents;
    case FIELD_REGION: return frame->count == 0 ? frame->page == 0 : frame->page < limits->regions;
    }
    return false;
}

static int refuse(const char *reason, const char **ret_reason)
{
    *ret_reason = reason;
    return -EPROTO;
}

int wire_read_header(const struct wire_limits *limits, const uint8_t *bytes,
                     struct wire_frame *ret_frame, uint32_t *ret_payload_bytes,
                     const char **ret_reason)
{
    struct wire_frame frame;
    const struct rule *rule;

    memcpy(&frame, bytes, sizeof(frame));
    frame.type = le16toh(frame.type);
    frame.flags = le16toh(frame.flags);
    frame.count = le32toh(frame.count);
    frame.page = le64toh(frame.page);
    rule = find_rule(frame.type);
    if (!rule)
        return refuse("a frame of a type that there is not", ret_reason);
    if (!(rule->readers & limits->reader))
        return refuse("a frame that does not belong on this connection", ret_reason);
    if (frame.flags)
        return refuse("a frame with flags", ret_reason);
    if (frame.count < rule->least || frame.count > rule->most)
        return refuse("a frame with a count that can't be", ret_reason);
    if (frame.type == WIRE_DONE && frame.count != limits->regions)
        return refuse("sums of other regions than there are", ret_reason);
    if (!field_is_right(limits, &frame, rule->field))
        return refuse("a frame of pages outside of the regions", ret_reason);
    *ret_frame = frame;
    *ret_payload_bytes =
        rule->field == FIELD_BITS ? (frame.count + 63) / 64 * 8 : frame.count * rule->unit_bytes;
    return 0;
}

void wire_write_header(uint8_t *bytes, enum wire_type type, uint32_t count, uint64_t page)
{
    struct wire_frame frame = {
        .type = htole16((uint16_t)type), .count = htole32(count), .page = htole64(page)};

    memcpy(bytes, &frame, sizeof(frame));
}

int wire_read_run(const struct wire_limits *limits, const uint8_t *payload, uint32_t i,
                  uint64_t expected, struct wire_run *ret_run, const char **ret_reason)
{
    struct wire_run run;

    memcpy(&run, payload + (size_t)i * sizeof(run), sizeof(run));
    run.page = le64toh(run.page);
    run.pages = le32toh(run.pages);
    run.kind = le32toh(run.kind);
    if (run.page != expected)
        return refuse("a map with gaps, or out of order", ret_reason);
    if (run.pages == 0 || run.page > limits->pages || run.pages > limits->pages - run.page)
        return refuse("a map of pages outside of the regions", ret_reason);
    if (run.kind < WIRE_KIND_HAVE || run.kind > WIRE_KIND_EMPTY)
        return refuse("a map of a kind that there is not", ret_reason);
    *ret_run = run;
    return 0;
}

void wire_write_run(uint8_t *payload, uint32_t i, const struct wire_run *run)
{
    struct wire_run stored = {
        .page = htole64(run->page), .pages = htole32(run->pages), .kind = htole32(run->kind)};

    memcpy(payload + (size_t)i * sizeof(stored), &stored, sizeof(stored));
}

uint64_t wire_read_u64(const uint8_t *payload, uint32_t i)
{
    uint64_t value;

    memcpy(&value, payload + (size_t)i * sizeof(value), sizeof(value));
    return le64toh(value);
}

void wire_write_u64(uint8_t *payload, uint32_t i, uint64_t value)
{
    value = htole64(value);
    memcpy(payload + (size_t)i * sizeof(value), &value, sizeof(value));
}

uint32_t wire_read_u32(const uint8_t *payload, uint32_t i)
{
    uint32_t value;

    memcpy(&value, payload + (size_t)i * sizeof(value), sizeof(value));
    return le32toh(value);
}

void wire_write_u32(uint8_t *payload, uint32_t i, uint32_t value)
{
    value = htole32(value);
    memcpy(payload + (size_t)i * sizeof(value), &value, sizeof(value));
}
