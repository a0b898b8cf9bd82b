/* SPDX-License-Identifier: Apache-2.0 */
#include "ledger.h"

#include <string.h>

void ledger_open(struct ledger *ledger, struct ledger_account *account)
{
    account->next = ledger->first;
    account->place = &ledger->first;
    if (ledger->first)
        ledger->first->place = &account->next;
    ledger->first = account;
}

void ledger_close(struct ledger_account *account)
{
    if (!account->place)
        return;
    ledger_forget_places(account);
    *account->place = account->next;
    if (account->next)
        account->next->place = account->place;
    account->place = NULL;
}

/* Sums that do not fit are as bad as any that is too large. */
static uint64_t add(uint64_t a, uint64_t b)
{
    uint64_t sum;

    return checked_add_u64(a, b, &sum) ? sum : UINT64_MAX;
}

uint64_t ledger_promised_bytes(const struct ledger *ledger)
{
    uint64_t sum = 0;

    for (const struct ledger_account *account = ledger->first; account; account = account->next)
        sum = add(sum, account->max_bytes);
    return sum;
}

uint64_t ledger_guaranteed_bytes(const struct ledger *ledger)
{
    uint64_t sum = 0;

    for (const struct ledger_account *account = ledger->first; account; account = account->next)
        sum = add(sum, account->min_bytes);
    return sum;
}

bool ledger_can_guarantee(const struct ledger *ledger, const struct ledger_account *account,
                          uint64_t min_bytes)
{
    uint64_t sum = min_bytes;

    for (const struct ledger_account *other = ledger->first; other; other = other->next) {
        if (other != account)
            sum = add(sum, other->min_bytes);
    }
    return sum <= ledger->budget_bytes;
}

bool ledger_state_places(struct ledger *ledger, struct ledger_account *account,
                         const uint64_t *places)
{
    uint64_t sum = 0;

    for (int place = 0; place < PLACE_COUNT; place++)
        sum = add(sum, places[place]);
    if (sum != account->managed_pages) {
        ledger->mismatches++;
        return false;
    }
    memcpy(account->places, places, sizeof(account->places));
    return true;
}

void ledger_forget_places(struct ledger_account *account)
{
    memset(account->places, 0, sizeof(account->places));
}

enum host_state ledger_host_state(const struct ledger *ledger, uint64_t used_bytes)
{
    double used = ledger->budget_bytes ? (double)used_bytes / (double)ledger->budget_bytes : 1;

    if (used < 0.90)
        return HOST_HIGH;
    if (used < 0.95)
        return HOST_SOFT;
    return used < 0.98 ? HOST_HARD : HOST_LOW;
}

const char *ledger_host_state_name(enum host_state state)
{
    static const char *const names[HOST_STATE_COUNT] = {"high", "soft", "hard", "low"};

    return state < HOST_STATE_COUNT ? names[state] : "unknown";
}
