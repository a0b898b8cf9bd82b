/* SPDX-License-Identifier: Apache-2.0 */
/* How memctl speaks: sizes, tables, JSON, and words on standard error. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ctl.h"

void ctl_say(const char *format, ...)
{
    va_list arguments;

    fflush(stdout);
    fputs("memctl: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
}

void ctl_print_json(const json_t *value)
{
    json_dumpf(value, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(15) | JSON_ENCODE_ANY);
    putchar('\n');
}

const char *ctl_format_size(uint64_t bytes, char text[CTL_SIZE_CHARS])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double number = (double)bytes;
    size_t unit = 0;

    while (number >= 1024) {
        number /= 1024;
        unit++;
    }
    /* One digit behind the point, unless it says nothing. */
    if (number >= 99.95 || number == (double)(uint64_t)number)
        snprintf(text, CTL_SIZE_CHARS, "%.0f %s", number, units[unit]);
    else
        snprintf(text, CTL_SIZE_CHARS, "%.1f %s", number, units[unit]);
    return text;
}

const char *ctl_format_count(uint64_t count, char text[CTL_SIZE_CHARS])
{
    char digits[CTL_SIZE_CHARS];
    size_t length = (size_t)snprintf(digits, sizeof(digits), "%llu", (unsigned long long)count);
    char *to = text;

    for (size_t i = 0; i < length; i++) {
        if (i && (length - i) % 3 == 0)
            *to++ = ',';
        *to++ = digits[i];
    }
    *to = '\0';
    return text;
}

const char *ctl_format_percent(uint64_t part, uint64_t whole, char text[CTL_SIZE_CHARS])
{
    double percent = whole ? 100.0 * (double)part / (double)whole : 0;

    if (!whole)
        snprintf(text, CTL_SIZE_CHARS, "-");
    else if (percent > 0 && percent < 0.05)
        snprintf(text, CTL_SIZE_CHARS, "<0.1 %%");
    else
        snprintf(text, CTL_SIZE_CHARS, percent > 0 && percent < 9.95 ? "%.1f %%" : "%.0f %%",
                 percent);
    return text;
}

/* ---- tables ---- */

struct ctl_table {
    const char *const *headings;
    size_t columns;
    char **cells;
    size_t count;
};

struct ctl_table *ctl_table_new(const char *const headings[], size_t columns)
{
    struct ctl_table *table = calloc(1, sizeof(*table));

    if (!table || columns == 0 || columns > CTL_TABLE_COLUMNS_MAX)
        abort(); /* a few bytes for a screenful of text: there is nothing left to try */
    table->headings = headings;
    table->columns = columns;
    return table;
}

void ctl_table_add(struct ctl_table *table, const char *format, ...)
{
    char **grown = reallocarray(table->cells, table->count + 1, sizeof(*grown));
    va_list arguments;

    if (!grown)
        abort();
    table->cells = grown;
    va_start(arguments, format);
    if (vasprintf(&grown[table->count++], format, arguments) < 0)
        abort();
    va_end(arguments);
}

void ctl_table_add_size(struct ctl_table *table, uint64_t bytes)
{
    char text[CTL_SIZE_CHARS];

    ctl_table_add(table, "%s", ctl_format_size(bytes, text));
}

void ctl_table_add_count(struct ctl_table *table, uint64_t count)
{
    char text[CTL_SIZE_CHARS];

    ctl_table_add(table, "%s", ctl_format_count(count, text));
}

void ctl_table_add_percent(struct ctl_table *table, uint64_t part, uint64_t whole)
{
    char text[CTL_SIZE_CHARS];

    ctl_table_add(table, "%s", ctl_format_percent(part, whole, text));
}

static size_t column_width(const struct ctl_table *table, size_t column)
{
    const char *heading = table->headings[column];
    size_t width = strlen(heading) - (heading[0] == '>');

    for (size_t i = column; i < table->count; i += table->columns) {
        size_t length = strlen(table->cells[i]);

        width = length > width ? length : width;
    }
    return width;
}

static void print_cell(const struct ctl_table *table, size_t column, size_t width, const char *text)
{
    bool last = column == table->columns - 1;

    if (table->headings[column][0] == '>')
        printf("%*s", (int)width, text);
    else
        printf("%-*s", last ? 0 : (int)width, text);
    fputs(last ? "\n" : "  ", stdout);
}

static bool has_headings(const struct ctl_table *table)
{
    for (size_t i = 0; i < table->columns; i++) {
        if (table->headings[i][0] && strcmp(table->headings[i], ">") != 0)
            return true;
    }
    return false;
}

static void free_table(struct ctl_table *table)
{
    for (size_t i = 0; i < table->count; i++)
        free(table->cells[i]);
    free(table->cells);
    free(table);
}

static void print_row(const struct ctl_table *table, const size_t *widths, size_t indent,
                      char *const *cells)
{
    printf("%*s", (int)indent, "");
    for (size_t i = 0; i < table->columns; i++)
        print_cell(table, i, widths[i], cells[i]);
}

void ctl_table_print(struct ctl_table *table, size_t indent)
{
    size_t widths[CTL_TABLE_COLUMNS_MAX];

    for (size_t i = 0; i < table->columns; i++)
        widths[i] = column_width(table, i);
    if (has_headings(table)) {
        printf("%*s", (int)indent, "");
        for (size_t i = 0; i < table->columns; i++)
            print_cell(table, i, widths[i], table->headings[i] + (table->headings[i][0] == '>'));
    }
    for (size_t i = 0; i + table->columns <= table->count; i += table->columns)
        print_row(table, widths, indent, table->cells + i);
    free_table(table);
}

/* ---- JSON ---- */

static const json_t *find(const json_t *object, const char *path)
{
    char key[64];

    for (;;) {
        size_t length = strcspn(path, ".");

        snprintf(key, sizeof(key), "%.*s", (int)length, path);
        object = json_object_get(object, key);
        if (path[length] == '\0')
            return object;
        path += length + 1;
    }
}

uint64_t ctl_json_u64(const json_t *object, const char *path)
{
    const json_t *value = find(object, path);
    double number = json_number_value(value);

    if (json_is_integer(value))
        return json_integer_value(value) > 0 ? (uint64_t)json_integer_value(value) : 0;
    return number > 0 ? (uint64_t)number : 0;
}

double ctl_json_real(const json_t *object, const char *path)
{
    return json_number_value(find(object, path));
}

const char *ctl_json_text(const json_t *object, const char *path)
{
    const char *text = json_string_value(find(object, path));

    return text ? text : "";
}
