/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The table below is the language: section, key, how its value is read, where it goes. inih reads
 * lines; it neither counts them for us nor tells a cut line from a whole one, so the reader does.
 */
#include "config.h"

#include <ctype.h>
#include <errno.h>
#include <ini.h>
#include <pwd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "procfs.h"

#define INIH_SECTION_CHARS 49 /* MAX_SECTION in its ini.c, less the end mark */

enum kind {
    KIND_SIZE,
    KIND_SECONDS,
    KIND_PERCENT,
    KIND_PATH,
    KIND_ADDRESS,
    KIND_PORTS,
    KIND_ENGINE,
    KIND_YESNO
};

struct key {
    const char *section, *name;
    enum kind kind;
    size_t offset, bytes;
    double least, most;
};

#define KEY(section, name, kind, field, least, most)                                              \
    {                                                                                             \
        section, name, kind, offsetof(struct config, field), sizeof(((struct config *)0)->field), \
            least, most                                                                           \
    }

static const struct key keys[] = {
    KEY("host", "budget", KIND_SIZE, budget_bytes, 1, 0),
    KEY("host", "reserve", KIND_SIZE, reserve_bytes, 0, 0),
    KEY("host", "socket", KIND_PATH, socket, 0, 0),
    KEY("host", "state_dir", KIND_PATH, state_dir, 0, 0),
    KEY("host", "grace_s", KIND_SECONDS, grace_s, 0, 86400),
    KEY("sharing", "engine", KIND_ENGINE, engine, 0, 0),
    KEY("sharing", "revisit_s", KIND_SECONDS, revisit_s, 0.01, 86400),
    KEY("sharing", "cpu_percent", KIND_PERCENT, cpu_percent, 1, 100000),
    KEY("store", "budget", KIND_SIZE, store_budget_bytes, 1, 0),
    KEY("vault", "budget", KIND_SIZE, vault_budget_bytes, 0, 0),
    KEY("vault", "spill_path", KIND_PATH, spill_path, 0, 0),
    KEY("vault", "spill_budget", KIND_SIZE, spill_budget_bytes, 0, 0),
    KEY("migration", "listen", KIND_ADDRESS, migration_listen, 0, 0),
    KEY("migration", "ports", KIND_PORTS, migration_ports, 0, 0),
    KEY("migration", "bandwidth", KIND_SIZE, migration_bandwidth_bytes, 0, 0),
    KEY("migration", "tls_cert", KIND_PATH, tls_cert, 0, 0),
    KEY("migration", "tls_key", KIND_PATH, tls_key, 0, 0),
    KEY("migration", "tls_ca", KIND_PATH, tls_ca, 0, 0),
    KEY("migration", "plain", KIND_YESNO, plain, 0, 0),
    KEY("metrics", "listen", KIND_ADDRESS, metrics_listen, 0, 0),
};
#define KEY_COUNT (sizeof(keys) / sizeof(keys[0]))

/* ---- one parse ---- */

struct parse {
    const char *path;
    FILE *file;
    int line;
    char section[INI_MAX_LINE]; /* the one that the lines are in */
    struct config config;
    int lines[KEY_COUNT]; /* where each was given; 0: not yet */
    char *error;          /* the first mistake; "" until then */
};

/* "FILE:LINE: words" into `text`, unless something is there already. */
static void __attribute__((format(printf, 3, 0)))
note(const struct parse *parse, char *text, const char *format, va_list arguments)
{
    int used;

    if (text[0])
        return;
    used = snprintf(text, CONFIG_ERROR_BYTES, "%s:%d: ", parse->path, parse->line);
    if (used > 0 && used < CONFIG_ERROR_BYTES)
        vsnprintf(text + used, CONFIG_ERROR_BYTES - (size_t)used, format, arguments);
}

static int __attribute__((format(printf, 2, 3))) fail(struct parse *parse, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    note(parse, parse->error, format, arguments);
    va_end(arguments);
    return 0;
}

/* What can't be meant on this host, and could on another, or tomorrow. */
static void __attribute__((format(printf, 2, 3)))
doubt(struct parse *parse, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    note(parse, parse->config.doubt, format, arguments);
    va_end(arguments);
}

static bool section_is_known(const char *section);
static const char *named_section(const char *section, const char *word);
static struct config_domain *domain_of(struct parse *parse, const char *name);

/* A section in which nothing is said is a domain or a guest all the same. */
static bool name_is_good(struct parse *parse, const char *section)
{
    const char *domain = named_section(section, "domain"), *guest = named_section(section, "guest");

    if (!domain && !guest)
        fail(parse, "there is no section [%s]; memd.conf(5) lists them", section);
    else if (!words_are_name(domain ? domain : guest))
        fail(parse, "[%s]: names are letters, digits, '.', '_' and '-', at most 63", section);
    else if (domain && !domain_of(parse, domain))
        fail(parse, "out of memory");
    return !parse->error[0];
}

/* inih says nothing about a section without keys, so sections are looked at here. */
static bool section_is_good(struct parse *parse, const char *line)
{
    const char *end = strchr(line, ']');

    if (line[0] != '[' || !end || (size_t)(end - line) > sizeof(parse->section))
        return true;
    snprintf(parse->section, sizeof(parse->section), "%.*s", (int)(end - line - 1), line + 1);
    return section_is_known(parse->section) || name_is_good(parse, parse->section);
}

/* inih's own buffer has 200 bytes and cuts what is longer into two lines that mean something else.
 */
static char *read_line(char *line, int bytes, void *stream)
{
    struct parse *parse = stream;

    if (parse->error[0] || !fgets(line, bytes, parse->file))
        return NULL;
    parse->line++;
    if (!strchr(line, '\n') && !feof(parse->file)) {
        fail(parse,
             "this line has more than %d characters; break the value, and indent the lines "
             "that carry it on",
             bytes - 2);
        return NULL;
    }
    return section_is_good(parse, line) ? line : NULL;
}

/* ---- values ---- */

bool config_size_parse(const char *word, uint64_t *ret_bytes)
{
    static const char units[] = "KMGT";
    unsigned long long number;
    unsigned shift = 0;
    char *end;

    if (!isdigit((unsigned char)word[0]))
        return false;
    errno = 0;
    number = strtoull(word, &end, 10);
    if (errno)
        return false;
    if (*end) {
        const char *unit = strchr(units, toupper((unsigned char)*end));
        if (!unit || end[1])
            return false;
        shift = 10 * (unsigned)(unit - units + 1);
    }
    if (shift && number >> (64 - shift))
        return false;
    *ret_bytes = (uint64_t)number << shift;
    return true;
}

static bool parse_decimal(const char *word, double least, double most, double *ret_number)
{
    char *end;
    double number = strtod(word, &end);

    if (end == word || *end || !(number >= least) || !(number <= most))
        return false;
    *ret_number = number;
    return true;
}

static int set_word(struct parse *parse, const struct key *key, const char *value)
{
    char host[CONFIG_WORD_BYTES];
    uint16_t port;

    if (strlen(value) >= key->bytes)
        return fail(parse, "%s is too long: at most %zu characters", key->name, key->bytes - 1);
    if (key->kind == KIND_PATH && value[0] != '/')
        return fail(parse, "%s = %s: give an absolute path", key->name, value);
    if (key->kind == KIND_ADDRESS && !words_split_address(value, host, sizeof(host), &port))
        return fail(parse, "%s = %s: give HOST:PORT, with brackets around an IPv6 HOST", key->name,
                    value);
    strcpy((char *)&parse->config + key->offset, value);
    return 1;
}

static int set_engine(struct parse *parse, const struct key *key, const char *value)
{
    static const char *const names[SHARING_ENGINE_COUNT] = {"agent", "kernel", "off"};

    for (int i = 0; i < SHARING_ENGINE_COUNT; i++) {
        if (strcmp(value, names[i]) == 0) {
            parse->config.engine = (enum sharing_engine)i;
            return 1;
        }
    }
    return fail(parse, "%s = %s: give agent, kernel or off", key->name, value);
}

static int set_yes_no(struct parse *parse, const struct key *key, const char *value)
{
    bool *place = (bool *)((char *)&parse->config + key->offset);

    if (strcmp(value, "yes") != 0 && strcmp(value, "no") != 0)
        return fail(parse, "%s = %s: give yes or no", key->name, value);
    *place = value[0] == 'y';
    return 1;
}

static int set_ports(struct parse *parse, const struct key *key, const char *value)
{
    struct port_range *place = (struct port_range *)(void *)((char *)&parse->config + key->offset);
    unsigned int first, last;
    int used = 0;

    if (sscanf(value, "%5u - %5u%n", &first, &last, &used) != 2 || value[used] || first == 0 ||
        last > UINT16_MAX || first > last)
        return fail(parse, "%s = %s: give FIRST-LAST, as 7008-7039", key->name, value);
    *place = (struct port_range){(uint16_t)first, (uint16_t)last};
    return 1;
}

static int set_size(struct parse *parse, const struct key *key, const char *value)
{
    uint64_t *place = (uint64_t *)(void *)((char *)&parse->config + key->offset);

    if (!config_size_parse(value, place))
        return fail(parse, "%s = %s: give a size, as 4096, 512M or 2G", key->name, value);
    if ((double)*place < key->least)
        return fail(parse, "%s = %s: give more than nothing, or leave the line out for the default",
                    key->name, value);
    return 1;
}

static int set_number(struct parse *parse, const struct key *key, const char *value)
{
    char *place = (char *)&parse->config + key->offset;
    double number, host = 100.0 * (double)sysconf(_SC_NPROCESSORS_ONLN);

    if (!parse_decimal(value, key->least, key->most, &number))
        return fail(parse, "%s = %s: give a number from %g to %g", key->name, value, key->least,
                    key->most);
    if (key->kind == KIND_PERCENT && number > host)
        doubt(parse, "%s = %s is more than this host's CPUs have: give a number from %g to %g",
              key->name, value, key->least, host);
    if (key->kind == KIND_SECONDS)
        *(double *)(void *)place = number;
    else
        *(uint32_t *)(void *)place = (uint32_t)number;
    return 1;
}

static int set_key(struct parse *parse, size_t index, const char *value)
{
    const struct key *key = &keys[index];

    if (parse->lines[index])
        return fail(parse, "%s is given twice, in line %d and here; keep one", key->name,
                    parse->lines[index]);
    parse->lines[index] = parse->line;
    parse->config.vault_set |= strcmp(key->section, "vault") == 0;
    switch (key->kind) {
    case KIND_PATH:
    case KIND_ADDRESS: return set_word(parse, key, value);
    case KIND_PORTS: return set_ports(parse, key, value);
    case KIND_ENGINE: return set_engine(parse, key, value);
    case KIND_YESNO: return set_yes_no(parse, key, value);
    case KIND_SIZE: return set_size(parse, key, value);
    default: return set_number(parse, key, value);
    }
}

/* ---- [domain NAME] and [guest NAME] ---- */

static struct config_domain *domain_of(struct parse *parse, const char *name)
{
    struct config *config = &parse->config;
    struct config_domain *domains;

    for (size_t i = 0; i < config->domain_count; i++) {
        if (strcmp(config->domains[i].name, name) == 0)
            return &config->domains[i];
    }
    domains = realloc(config->domains, (config->domain_count + 1) * sizeof(*domains));
    if (!domains)
        return NULL;
    config->domains = domains;
    domains[config->domain_count] = (struct config_domain){.uids = NULL};
    strcpy(domains[config->domain_count].name, name);
    return &domains[config->domain_count++];
}

static struct config_guest *guest_of(struct parse *parse, const char *name)
{
    struct config *config = &parse->config;
    struct config_guest *guests;

    for (size_t i = 0; i < config->guest_count; i++) {
        if (strcmp(config->guests[i].name, name) == 0)
            return &config->guests[i];
    }
    guests = realloc(config->guests, (config->guest_count + 1) * sizeof(*guests));
    if (!guests)
        return NULL;
    config->guests = guests;
    guests[config->guest_count] = (struct config_guest){.shares = 0};
    strcpy(guests[config->guest_count].name, name);
    return &guests[config->guest_count++];
}

static int add_uid(struct parse *parse, struct config_domain *domain, const char *word)
{
    const struct passwd *user = getpwnam(word);
    uid_t *uids;
    uint64_t uid;

    if (!user && (!config_size_parse(word, &uid) || uid >= UINT32_MAX ||
                  !isdigit((unsigned char)word[strlen(word) - 1])))
        return fail(parse,
                    "uids: '%s' is neither a number nor a user of this host; 'getent passwd' lists "
                    "these",
                    word);
    uids = realloc(domain->uids, (domain->uid_count + 1) * sizeof(*uids));
    if (!uids)
        return fail(parse, "out of memory");
    domain->uids = uids;
    uids[domain->uid_count++] = user ? user->pw_uid : (uid_t)uid;
    return 1;
}

static int add_neutral(struct parse *parse, struct config_domain *domain, const char *word)
{
    char **files, *copy;
    struct stat st;

    if (word[0] != '/')
        return fail(parse, "neutral: '%s' is no absolute path", word);
    if (stat(word, &st) || access(word, R_OK))
        doubt(parse,
              "neutral: '%s' can't be read (%s), so nothing in it counts as neutral; put it "
              "there, or correct the path",
              word, strerror(errno));
    else if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        doubt(parse, "neutral: '%s' is neither a file nor a disk; name an image", word);
    copy = strdup(word);
    files = realloc(domain->neutral, (domain->neutral_count + 1) * sizeof(*files));
    if (files)
        domain->neutral = files;
    if (!files || !copy) {
        free(copy);
        return fail(parse, "out of memory");
    }
    files[domain->neutral_count++] = copy;
    return 1;
}

static int set_domain(struct parse *parse, const char *name, const char *key, const char *value)
{
    struct config_domain *domain = domain_of(parse, name);
    int (*add)(struct parse *, struct config_domain *, const char *);
    char words[512], *rest = words, *word;

    if (!domain)
        return fail(parse, "out of memory");
    if (strcmp(key, "uids") == 0)
        add = add_uid;
    else if (strcmp(key, "neutral") == 0)
        add = add_neutral;
    else
        return fail(parse, "a domain has no '%s'; it has uids and neutral", key);
    snprintf(words, sizeof(words), "%s", value);
    while ((word = strsep(&rest, " \t,"))) {
        if (word[0] && !add(parse, domain, word))
            return 0;
    }
    return 1;
}

static int set_guest_size(struct parse *parse, const char *key, const char *value, uint64_t *place,
                          bool *has)
{
    if (*has)
        return fail(parse, "%s is given twice; keep one", key);
    if (!config_size_parse(value, place))
        return fail(parse, "%s = %s: give a size, as 512M or 2G", key, value);
    *has = true;
    return 1;
}

static int add_incoming(struct parse *parse, struct config_guest *guest, const char *word,
                        size_t length)
{
    char **words = realloc(guest->incoming, (guest->incoming_count + 2) * sizeof(*words));
    char *copy = strndup(word, length);

    if (words)
        guest->incoming = words;
    if (!words || !copy) {
        free(copy);
        return fail(parse, "out of memory");
    }
    words[guest->incoming_count++] = copy;
    words[guest->incoming_count] = NULL;
    return 1;
}

/* Words between blanks; one in double quotes may have blanks. Nothing else means anything: no shell
 * sees them. Called again for each indented line. */
static int set_incoming(struct parse *parse, struct config_guest *guest, const char *value)
{
    for (const char *at = value + strspn(value, " \t"); *at; at += strspn(at, " \t")) {
        bool quoted = *at == '"';
        size_t length = quoted ? strcspn(++at, "\"") : strcspn(at, " \t");

        if (quoted && !at[length])
            return fail(parse, "incoming: a double quote is not closed in this line");
        if (!guest->incoming_count && *at != '/')
            return fail(parse, "incoming: '%s' does not begin with the absolute path of a VMM",
                        value);
        if (!add_incoming(parse, guest, at, length))
            return 0;
        at += length + quoted;
    }
    return 1;
}

static int set_incoming_user(struct parse *parse, struct config_guest *guest, const char *word)
{
    const struct passwd *user = getpwnam(word);
    uint64_t uid;

    if (guest->has_incoming_uid)
        return fail(parse, "incoming_user is given twice; keep one");
    if (!user && (!config_size_parse(word, &uid) || uid >= UINT32_MAX ||
                  !isdigit((unsigned char)word[strlen(word) - 1])))
        return fail(parse, "incoming_user: '%s' is neither a number nor a user of this host", word);
    guest->incoming_uid = user ? user->pw_uid : (uid_t)uid;
    guest->has_incoming_uid = true;
    return 1;
}

/* Checked at once where the section says both, so that the line is that of the second one. */
static int check_guest_sizes(struct parse *parse, const struct config_guest *guest)
{
    if (guest->has_min && guest->has_max && guest->min_bytes > guest->max_bytes)
        return fail(parse,
                    "[guest %s]: min is more than max; a guest can't be guaranteed more than it is "
                    "promised",
                    guest->name);
    return 1;
}

static int set_guest(struct parse *parse, const char *name, const char *key, const char *value)
{
    struct config_guest *guest = guest_of(parse, name);
    double shares;

    if (!guest)
        return fail(parse, "out of memory");
    if (strcmp(key, "max") == 0)
        return set_guest_size(parse, key, value, &guest->max_bytes, &guest->has_max) &&
               check_guest_sizes(parse, guest);
    if (strcmp(key, "min") == 0)
        return set_guest_size(parse, key, value, &guest->min_bytes, &guest->has_min) &&
               check_guest_sizes(parse, guest);
    if (strcmp(key, "shares") == 0) {
        if (guest->has_shares || !parse_decimal(value, 1, 1000000, &shares))
            return fail(parse, "shares = %s: give one number from 1 to 1000000", value);
        guest->shares = (uint32_t)shares;
        guest->has_shares = true;
        return 1;
    }
    if (strcmp(key, "domain") == 0) {
        if (guest->has_domain || !words_are_name(value))
            return fail(parse, "domain = %s: give the name of one [domain NAME]", value);
        strcpy(guest->domain, value);
        guest->has_domain = true;
        guest->domain_line = parse->line;
        return 1;
    }
    if (strcmp(key, "incoming") == 0)
        return set_incoming(parse, guest, value);
    if (strcmp(key, "incoming_user") == 0)
        return set_incoming_user(parse, guest, value);
    return fail(parse,
                "a guest has no '%s'; it has max, min, shares, domain, incoming and incoming_user",
                key);
}

/* "domain web" into "web"; NULL when the section is no such thing. */
static const char *named_section(const char *section, const char *word)
{
    size_t length = strlen(word);

    if (strncmp(section, word, length) != 0 || section[length] != ' ')
        return NULL;
    section += length;
    return section + strspn(section, " ");
}

static bool section_is_known(const char *section)
{
    for (size_t i = 0; i < KEY_COUNT; i++) {
        if (strcmp(keys[i].section, section) == 0)
            return true;
    }
    return false;
}

/* inih cuts the name of a section to 49 characters, and ours may have more. */
static const char *whole_section(const struct parse *parse, const char *cut)
{
    size_t length = strlen(cut);

    return length >= INIH_SECTION_CHARS && strncmp(parse->section, cut, length) == 0
               ? parse->section
               : cut;
}

/* inih's handler: 1 goes on, 0 is a mistake. */
static int take_line(void *user, const char *cut, const char *name, const char *value)
{
    struct parse *parse = user;
    const char *section = whole_section(parse, cut);
    const char *of_domain = named_section(section, "domain");
    const char *of_guest = named_section(section, "guest");

    if (parse->error[0])
        return 0;
    if (strstr(value, " #") || strstr(value, "\t#") || value[0] == '#')
        return fail(parse, "%s: a comment that begins with '#' needs a line of its own", name);
    if (of_domain || of_guest) {
        if (!words_are_name(of_domain ? of_domain : of_guest))
            return fail(parse, "[%s]: names are letters, digits, '.', '_' and '-', at most 63",
                        section);
        return of_domain ? set_domain(parse, of_domain, name, value)
                         : set_guest(parse, of_guest, name, value);
    }
    for (size_t i = 0; i < KEY_COUNT; i++) {
        if (strcmp(keys[i].section, section) == 0 && strcmp(keys[i].name, name) == 0)
            return set_key(parse, i, value);
    }
    return fail(parse, "[%s] has no key '%s'; memd.conf(5) lists them", section, name);
}

/* ---- the whole ---- */

void config_defaults(struct config *config)
{
    *config = (struct config){
        .reserve_bytes = 512ULL << 20,
        .socket = "/run/memd/memd.sock",
        .state_dir = "/var/lib/memd",
        .grace_s = 30,
        .engine = SHARING_AGENT,
        .revisit_s = 10,
        .cpu_percent = 50,
    };
}

static bool guests_domains_exist(struct parse *parse)
{
    for (size_t i = 0; i < parse->config.guest_count; i++) {
        const struct config_guest *guest = &parse->config.guests[i];

        if (guest->incoming_count && (!guest->has_max || !guest->has_incoming_uid)) {
            fail(parse, "[guest %s]: incoming needs max and incoming_user with it", guest->name);
            return false;
        }
        if (!guest->has_domain || config_domain_find(&parse->config, guest->domain))
            continue;
        parse->line = guest->domain_line;
        fail(parse, "[guest %s]: there is no [domain %s]; add it with its uids", guest->name,
             guest->domain);
        return false;
    }
    return true;
}

/* Who takes guests from other hosts says how they prove who they are. */
static bool migration_is_safe(struct parse *parse)
{
    const struct config *config = &parse->config;
    bool some = config->tls_cert[0] || config->tls_key[0] || config->tls_ca[0];
    bool all = config->tls_cert[0] && config->tls_key[0] && config->tls_ca[0];

    if ((some && !all) || (config->migration_listen[0] && !all && !config->plain)) {
        fail(parse, "[migration]: give tls_cert, tls_key and tls_ca, all three (or plain = yes, "
                    "where everybody on the network may read and change your guests)");
        return false;
    }
    return true;
}

/* The line of a key that was given. */
static int line_of(const struct parse *parse, const char *section, const char *name)
{
    for (size_t i = 0; i < KEY_COUNT; i++) {
        if (strcmp(keys[i].section, section) == 0 && strcmp(keys[i].name, name) == 0)
            return parse->lines[i];
    }
    return 0;
}

/* A budget that this host can't have. */
static void doubt_sizes(struct parse *parse)
{
    const struct config *config = &parse->config;
    uint64_t memory = procfs_host_memory_bytes();
    unsigned long long mib = (unsigned long long)memory >> 20;

    if (config->budget_bytes > memory) {
        parse->line = line_of(parse, "host", "budget");
        doubt(parse, "[host] budget is more than the %llu MiB that this host has; give less", mib);
    } else if (!config->budget_bytes && config->reserve_bytes >= memory) {
        parse->line = line_of(parse, "host", "reserve");
        doubt(parse,
              "[host] reserve leaves nothing of the %llu MiB that this host has; give less, or "
              "give a budget",
              mib);
    }
    if (config->store_budget_bytes > memory) {
        parse->line = line_of(parse, "store", "budget");
        doubt(parse, "[store] budget is more than the %llu MiB that this host has; give less", mib);
    }
}

int config_load(const char *path, struct config *ret_config, char *error)
{
    struct parse parse = {.path = path, .error = error};
    struct stat st;
    int bad_line;

    error[0] = '\0';
    parse.file = fopen(path, "re");
    if (!parse.file) {
        int result = -errno;
        snprintf(error, CONFIG_ERROR_BYTES, "%s: %s", path, strerror(errno));
        return result;
    }
    if (fstat(fileno(parse.file), &st) || S_ISDIR(st.st_mode)) {
        fclose(parse.file);
        snprintf(error, CONFIG_ERROR_BYTES, "%s: is no file", path);
        return -EINVAL;
    }
    config_defaults(&parse.config);
    bad_line = ini_parse_stream(read_line, &parse, take_line, &parse);
    fclose(parse.file);
    if (bad_line && !error[0]) {
        parse.line = bad_line;
        fail(&parse, "neither [section] nor key = value");
    }
    if (error[0] || !guests_domains_exist(&parse) || !migration_is_safe(&parse)) {
        config_free(&parse.config);
        return -EINVAL;
    }
    doubt_sizes(&parse);
    *ret_config = parse.config;
    return 0;
}

/* It may still come: no reason to refuse the file. */
static void say_what_is_missing(const char *what, const char *path, int mode,
                                void (*say)(const char *words))
{
    char words[CONFIG_WORD_BYTES + 128];

    if (!path[0] || access(path, mode) == 0)
        return;
    snprintf(words, sizeof(words), "%s: %s: %s: no guest can move with that", what, path,
             strerror(errno));
    say(words);
}

void config_say_what_waits(const struct config *config, void (*say)(const char *words))
{
    bool promised = false, weighed = false;

    for (size_t i = 0; i < config->guest_count; i++) {
        promised |= config->guests[i].has_max;
        weighed |= config->guests[i].has_shares;
        say_what_is_missing("incoming of a guest",
                            config->guests[i].incoming_count ? config->guests[i].incoming[0] : "",
                            X_OK, say);
    }
    say_what_is_missing("tls_cert", config->tls_cert, R_OK, say);
    say_what_is_missing("tls_key", config->tls_key, R_OK, say);
    say_what_is_missing("tls_ca", config->tls_ca, R_OK, say);
    if (config->vault_set)
        say("[vault] has no effect: this version of memd evicts nothing yet");
    if (promised)
        say("max of a guest is what it is counted with; this version of memd does not keep a guest "
            "below it yet");
    if (weighed)
        say("shares of a guest have no effect: this version of memd takes memory from no guest "
            "yet");
}

void config_free(struct config *config)
{
    for (size_t i = 0; i < config->domain_count; i++) {
        struct config_domain *domain = &config->domains[i];

        for (size_t file = 0; file < domain->neutral_count; file++)
            free(domain->neutral[file]);
        free(domain->neutral);
        free(domain->uids);
    }
    for (size_t i = 0; i < config->guest_count; i++) {
        for (size_t word = 0; word < config->guests[i].incoming_count; word++)
            free(config->guests[i].incoming[word]);
        free(config->guests[i].incoming);
    }
    free(config->domains);
    free(config->guests);
    config->domains = NULL;
    config->guests = NULL;
    config->domain_count = config->guest_count = 0;
}

const struct config_domain *config_domain_find(const struct config *config, const char *name)
{
    for (size_t i = 0; i < config->domain_count; i++) {
        if (strcmp(config->domains[i].name, name) == 0)
            return &config->domains[i];
    }
    return NULL;
}

const struct config_guest *config_guest_find(const struct config *config, const char *name)
{
    for (size_t i = 0; i < config->guest_count; i++) {
        if (strcmp(config->guests[i].name, name) == 0)
            return &config->guests[i];
    }
    return NULL;
}

bool config_domain_admits(const struct config_domain *domain, uid_t uid)
{
    for (size_t i = 0; i < domain->uid_count; i++) {
        if (domain->uids[i] == uid)
            return true;
    }
    return false;
}
