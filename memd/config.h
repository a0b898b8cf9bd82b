/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memd.conf: sections of `key = value` (inih), and nothing that is not in the table in config.c.
 *
 * A configuration is parsed as a whole or not at all: the first mistake is said with file, line and
 * what to do, and the caller keeps what it had. Values stay as the file has them: what `memctl set`
 * changed ranks above them and is kept elsewhere (registry.h).
 */
#ifndef MEMD_CONFIG_H
#define MEMD_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "words.h"

#define CONFIG_WORD_BYTES  256
#define CONFIG_ERROR_BYTES 600

enum sharing_engine { SHARING_AGENT, SHARING_KERNEL, SHARING_OFF, SHARING_ENGINE_COUNT };

/* [domain NAME] */
struct config_domain {
    char name[NAME_BYTES];
    uid_t *uids; /* who may be in it */
    size_t uid_count;
    char **neutral; /* files whose 4 KiB pages everybody may know; empty: no such limit */
    size_t neutral_count;
};

/* [guest NAME]: what the operator says about a guest of that name; has_*: the file says it. */
struct config_guest {
    char name[NAME_BYTES];
    uint64_t max_bytes, min_bytes;
    uint32_t shares;
    char domain[NAME_BYTES];
    bool has_max, has_min, has_shares, has_domain;
    int domain_line;
    /* What is started when a guest of this name arrives: words, NULL behind the last; and as whom.
     */
    char **incoming;
    size_t incoming_count;
    uid_t incoming_uid;
    bool has_incoming_uid;
};

struct port_range {
    uint16_t first, last;
};

struct config {
    /* [host]; budget 0: all of the host's memory but the reserve */
    uint64_t budget_bytes, reserve_bytes;
    char socket[108];
    char state_dir[CONFIG_WORD_BYTES];
    double grace_s;
    /* [sharing] */
    enum sharing_engine engine;
    double revisit_s;
    uint32_t cpu_percent; /* of one core, all scanners together */
    /* [store]; 0: a quarter of the host's memory */
    uint64_t store_budget_bytes;
    /* [vault] */
    uint64_t vault_budget_bytes;
    char spill_path[CONFIG_WORD_BYTES];
    uint64_t spill_budget_bytes;
    bool vault_set;
    /* [migration] */
    char migration_listen[CONFIG_WORD_BYTES];
    struct port_range migration_ports;  /* of the guests that come; 0, 0: any */
    uint64_t migration_bandwidth_bytes; /* a second */
    char tls_cert[CONFIG_WORD_BYTES], tls_key[CONFIG_WORD_BYTES], tls_ca[CONFIG_WORD_BYTES];
    bool plain;
    /* [metrics]; empty: on the control socket only */
    char metrics_listen[CONFIG_WORD_BYTES];

    struct config_domain *domains;
    size_t domain_count;
    struct config_guest *guests;
    size_t guest_count;

    /* The first value that is sound and can't be meant on this host (a file that is not there, more
     * than all memory), with file, line and what to do; "": none. */
    char doubt[CONFIG_ERROR_BYTES];
};

/* What holds where nothing is said. */
void config_defaults(struct config *config);

/* Parses the file into *ret_config (untouched on failure; else the caller's, until config_free).
 * -EINVAL or the errno of reading it, and then words for people in error[CONFIG_ERROR_BYTES]. */
int config_load(const char *path, struct config *ret_config, char *error);
void config_free(struct config *config);
/* Calls `say` for each thing that the file says and that this version of memd does not do yet. */
void config_say_what_waits(const struct config *config, void (*say)(const char *words));

const struct config_domain *config_domain_find(const struct config *config, const char *name);
const struct config_guest *config_guest_find(const struct config *config, const char *name);
bool config_domain_admits(const struct config_domain *domain, uid_t uid);

/* "512M", "1.5G" is refused, "4096": whole numbers with K, M, G or T (powers of 1024). */
bool config_size_parse(const char *word, uint64_t *ret_bytes);

#endif
