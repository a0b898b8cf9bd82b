/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the commands of memctl have in common.
 *
 * A command is an entry in main.c's table with a table of its options; `main` reads the options
 * and calls it. Data goes to standard output, words to standard error. A command returns its exit
 * status, and whoever finds out that something is wrong says so, once.
 */
#ifndef MEMD_CTL_CTL_H
#define MEMD_CTL_CTL_H

#include <jansson.h>

#include "units.h"
#include "words.h"

enum ctl_status {
    CTL_DONE = 0,
    CTL_FAILED = 1,
    CTL_USAGE = 2,
    CTL_UNREACHABLE = 3, /* memd does not answer */
    CTL_REFUSED = 4,     /* by policy, or for lack of rights */
    CTL_LOST = 5,        /* it ended while it was asked, and may be back soon; main: 3 */
};

#define CTL_OPTIONS_MAX     16
#define CTL_DEFAULT_SOCKET  "/run/memd/memd.sock"
#define CTL_SUMMARY_COLUMNS 24

/* An option of one command. A table of them ends with an entry without a name. */
struct ctl_option {
    const char *name;  /* without dashes */
    const char *value; /* what its value is called in the usage; NULL: it takes none */
    const char *help;
    bool repeats; /* may be given several times */
};

/* The values of an option that repeats, in the order in which they were given. */
struct ctl_values {
    const char **at;
    size_t count;
};

/* What the user wrote behind the command's name. */
struct ctl_arguments {
    const char *socket; /* --socket, or where memd's control socket is looked for */
    bool json;
    const char *value[CTL_OPTIONS_MAX]; /* by index in the table: the text, "" where the option
                                           takes none, NULL when it was not given */
    struct ctl_values repeated[CTL_OPTIONS_MAX]; /* of those that repeat, likewise by index */
    char **operands;                             /* NULL at the end, like argv */
    size_t operand_count;
};

struct ctl_command {
    const char *name;
    const char *operands; /* for the usage line; "" when there are none */
    const char *summary;
    const struct ctl_option *options;
    bool prints_data; /* it takes --json */
    bool wraps;       /* everything from the first operand on belongs to another program */
    size_t operands_min, operands_max;
    enum ctl_status (*run)(const struct ctl_arguments *arguments);
};

/* ---- options.c ---- */

/* Reads argv (argv[0] is the command's name). True when the command shall run; else it is done
 * with *ret_status, the usage or the complaint printed. `ret_arguments` borrows from argv, and is
 * freed with ctl_options_free(). */
bool ctl_options_read(const struct ctl_command *command, int argc, char **argv,
                      struct ctl_arguments *ret_arguments, enum ctl_status *ret_status);
void ctl_options_free(struct ctl_arguments *arguments);

/* ---- http.c ---- */

/* One request to memd. `body` (borrowed) may be NULL. CTL_DONE: *ret_answer is the answer's JSON
 * (NULL when it had none), a reference of the caller's; ret_answer may be NULL. Else the words
 * have been printed. timeout_s 0: as long as it takes. */
enum ctl_status ctl_http_call(const char *socket, const char *method, const char *path,
                              json_t *body, long timeout_s, json_t **ret_answer);

/* GET of an endless answer: `line` gets each line, without its end and ending in a zero byte, and
 * ends it all by returning false. CTL_DONE when `line` ended it; else the words have been
 * printed. */
enum ctl_status ctl_http_stream(const char *socket, const char *path,
                                bool (*line)(void *context, char *text), void *context);

/* True when memd answers at `socket`; prints nothing. *ret_status: what it says of the host, a
 * reference of the caller's, or NULL when it does not tell this user. */
bool ctl_http_reachable(const char *socket, json_t **ret_status);

/* Waits so many seconds at most for a memd that is started again; false: there is none. */
bool ctl_http_wait(const char *socket, unsigned seconds);

#define CTL_TIMEOUT_S 30L

/* ---- output.c ---- */

/* Words for the user, on standard error, with "memctl: " in front and a line end behind. */
void ctl_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Prints `value` as indented JSON on standard output. */
void ctl_print_json(const json_t *value);

/* "512 MiB", "1.5 GiB", "17 B": three digits or so. Into `text`, returned for convenience. */
#define CTL_SIZE_CHARS 32
const char *ctl_format_size(uint64_t bytes, char text[CTL_SIZE_CHARS]);

/* "131,072" */
const char *ctl_format_count(uint64_t count, char text[CTL_SIZE_CHARS]);

/* "35 %"; "-" when the whole is 0. */
const char *ctl_format_percent(uint64_t part, uint64_t whole, char text[CTL_SIZE_CHARS]);

/* A table with aligned columns. The heading's letter case is as given; a column whose heading
 * begins with '>' is set flush right; a table of empty headings has no heading line. */
#define CTL_TABLE_COLUMNS_MAX 16
struct ctl_table;
struct ctl_table *ctl_table_new(const char *const headings[], size_t columns);
/* The next cell, copied; cells go row by row. */
void ctl_table_add(struct ctl_table *table, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void ctl_table_add_size(struct ctl_table *table, uint64_t bytes);
void ctl_table_add_count(struct ctl_table *table, uint64_t count);
void ctl_table_add_percent(struct ctl_table *table, uint64_t part, uint64_t whole);
/* Prints with `indent` blanks before each line, and frees it. */
void ctl_table_print(struct ctl_table *table, size_t indent);

/* Members of a JSON object by path ("places.zero"); 0 or "" where there is none. */
uint64_t ctl_json_u64(const json_t *object, const char *path);
double ctl_json_real(const json_t *object, const char *path);
const char *ctl_json_text(const json_t *object, const char *path);

/* ---- value.c: what users write ---- */

/* A size: digits, perhaps with a fraction, and one of K, M, G, T (powers of 1024), "KiB" and "KB"
 * meaning the same. -EINVAL or -ERANGE. */
int ctl_value_size(const char *text, uint64_t *ret_bytes);

/* A whole number from 1 to `most`. -EINVAL or -ERANGE. */
int ctl_value_number(const char *text, uint64_t most, uint64_t *ret_number);

/* The same, with words when it is none. */
bool ctl_value_check_guest_name(const char *text);

/* ---- the commands, a file for each family ---- */

enum ctl_status ctl_analyze_run(const struct ctl_arguments *arguments);
enum ctl_status ctl_detach_run(const struct ctl_arguments *arguments);
enum ctl_status ctl_doctor_run(const struct ctl_arguments *arguments);
enum ctl_status ctl_events_run(const struct ctl_arguments *arguments);
enum ctl_status ctl_guest_run(const struct ctl_arguments *arguments);
enum ctl_status ctl_migrate_run(const struct ctl_arguments *arguments);
enum ctl_status ctl_run_run(const struct ctl_arguments *arguments);
enum ctl_status ctl_set_run(const struct ctl_arguments *arguments);
enum ctl_status ctl_status_run(const struct ctl_arguments *arguments);

extern const struct ctl_option ctl_analyze_options[];
extern const struct ctl_option ctl_events_options[];
extern const struct ctl_option ctl_migrate_options[];
extern const struct ctl_option ctl_run_options[];

#endif
