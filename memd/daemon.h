/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The daemon as a whole: its parts, and the order in which they start. There is one of these in a
 * process (tests may have more); nothing here is global.
 */
#ifndef MEMD_DAEMON_H
#define MEMD_DAEMON_H

#include "agents.h"
#include "config.h"
#include "control.h"
#include "domains.h"
#include "events.h"
#include "kernel_ksm.h"
#include "ledger.h"
#include "loop.h"
#include "migration.h"
#include "pss.h"
#include "registry.h"

struct daemon {
    struct config config;
    char config_path[CONFIG_WORD_BYTES]; /* "": no file, all defaults */
    struct loop loop;
    struct loop_watch signals;
    struct loop_timer steering;
    int state_dir, state_lock;
    uint64_t started_ns;
    struct events events;
    struct ledger ledger;
    struct registry registry;
    struct domains domains;
    struct agents agents;
    struct migrations migrations;
    struct kernel_ksm kernel_ksm;
    struct pss pss;
    struct control *control;
};

/* Starts every part in order; on failure what was started is stopped backwards and the reason is in
 * the log. Takes over *config (also on failure). config_path may be NULL. */
int daemon_start(struct daemon *daemon, struct config *config, const char *config_path);
/* Stops everything and leaves every guest running. */
void daemon_stop(struct daemon *daemon);
/* Until SIGTERM or SIGINT. */
int daemon_run(struct daemon *daemon);
/* SIGHUP: reads the configuration again; a bad one changes nothing. */
void daemon_reload(struct daemon *daemon);
/* A guest needs kernel KSM: from now on it is steered, until none does. */
void daemon_steer(struct daemon *daemon);

#endif
