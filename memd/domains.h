/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which trust domain a guest is in: by the configuration and by the credentials of its agent's
 * connection, never by what anybody says. See ksm/host/trust_domain.h for what a domain is.
 */
#ifndef MEMD_DOMAINS_H
#define MEMD_DOMAINS_H

#include "registry.h"
#include "trust_domain.h"

struct daemon;

struct domains {
    struct trust_domain *first;
    struct ksm_budget budget;
    int dir; /* of the records */
    uint64_t settle_until_ns;
    /* Counters of domains that are gone. */
    struct ksm_counters departed;
};

int domains_start(struct daemon *daemon);
void domains_stop(struct daemon *daemon);

/* The domain for a guest whose agent has this uid: the one it is meant for, if that exists and
 * admits the uid; else one of its own, and the reason in guest->domain_note. */
int domains_for_guest(struct guest *guest, uid_t uid, struct trust_domain **ret_domain);

/* Is this uid admitted? NULL, or words why not. */
const char *domains_refusal(const struct daemon *daemon, const char *domain, uid_t uid);

/* Records of domains that nobody can come back to are removed; segments that the service manager
 * held are taken back. */
void domains_tidy(struct daemon *daemon);
/* The configuration has changed. */
void domains_reload(struct daemon *daemon, const struct config *old);
struct ksm_counters domains_counters(const struct daemon *daemon);

#endif
