/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ledger: who was promised what, and where each guest's pages are.
 *
 * Two rules. What is guaranteed (the sum of every guest's min) fits the budget, or the guarantee is
 * refused. What an agent says about the places of its pages sums to the pages that it announced, or
 * it is not taken; no number is corrected.
 */
#ifndef MEMD_OVERCOMMIT_LEDGER_H
#define MEMD_OVERCOMMIT_LEDGER_H

#include "places.h"
#include "units.h"

struct ledger_account {
    uint64_t max_bytes, min_bytes; /* promised, guaranteed */
    uint32_t shares;
    uint64_t managed_pages; /* of all RAM blocks that are managed now */
    uint64_t places[PLACE_COUNT];
    struct ledger_account *next, **place;
};

struct ledger {
    struct ledger_account *first;
    uint64_t budget_bytes;
    uint64_t mismatches; /* statements that did not sum, ever */
};

enum host_state { HOST_HIGH, HOST_SOFT, HOST_HARD, HOST_LOW, HOST_STATE_COUNT };

void ledger_open(struct ledger *ledger, struct ledger_account *account);
void ledger_close(struct ledger_account *account);

uint64_t ledger_promised_bytes(const struct ledger *ledger);
uint64_t ledger_guaranteed_bytes(const struct ledger *ledger);

/* Could this account (NULL: a new one) have this guarantee? */
bool ledger_can_guarantee(const struct ledger *ledger, const struct ledger_account *account,
                          uint64_t min_bytes);

/* The agent's latest statement. False when it does not sum to managed_pages: it lies, and the
 * account is as it was. */
bool ledger_state_places(struct ledger *ledger, struct ledger_account *account,
                         const uint64_t *places);
/* The agent is gone: nothing is stated about its pages any more. */
void ledger_forget_places(struct ledger_account *account);

/* high: less than 90 % of the budget is used; soft: less than 95 %; hard: less than 98 %; low. */
enum host_state ledger_host_state(const struct ledger *ledger, uint64_t used_bytes);
const char *ledger_host_state_name(enum host_state state);

#endif
