/* SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>

#include "ledger.h"

Test(host_ledger, guarantees_beyond_the_budget_are_refused)
{
    struct ledger ledger = {.budget_bytes = 100};
    struct ledger_account a = {.max_bytes = 90, .min_bytes = 60}, b = {.max_bytes = 90};

    ledger_open(&ledger, &a);
    ledger_open(&ledger, &b);
    cr_assert_eq(ledger_promised_bytes(&ledger), 180, "promises may be more than there is");
    cr_assert(ledger_can_guarantee(&ledger, &b, 40));
    cr_assert_not(ledger_can_guarantee(&ledger, &b, 41));
    cr_assert(ledger_can_guarantee(&ledger, &a, 100), "its own old guarantee does not count");
    cr_assert_not(ledger_can_guarantee(&ledger, NULL, UINT64_MAX), "the sum does not wrap");
    ledger_close(&a);
    cr_assert(ledger_can_guarantee(&ledger, &b, 100));
    ledger_close(&b);
}

Test(host_ledger, places_that_do_not_sum_are_not_taken_and_not_corrected)
{
    struct ledger ledger = {.budget_bytes = 100};
    struct ledger_account a = {.managed_pages = 10};
    uint64_t places[PLACE_COUNT] = {[PLACE_PRIVATE] = 6, [PLACE_ZERO] = 3};

    ledger_open(&ledger, &a);
    cr_assert_not(ledger_state_places(&ledger, &a, places));
    cr_assert_eq(a.places[PLACE_PRIVATE], 0);
    cr_assert_eq(ledger.mismatches, 1);
    places[PLACE_SHARED] = 1;
    cr_assert(ledger_state_places(&ledger, &a, places));
    cr_assert_eq(a.places[PLACE_PRIVATE], 6);
    cr_assert_eq(ledger.mismatches, 1);
    places[PLACE_SHARED] = UINT64_MAX;
    cr_assert_not(ledger_state_places(&ledger, &a, places), "the sum does not wrap to 8");
    cr_assert_eq(a.places[PLACE_SHARED], 1);
    ledger_close(&a);
    cr_assert_null(ledger.first);
}

Test(host_ledger, the_host_gets_worse_in_four_states)
{
    struct ledger ledger = {.budget_bytes = 1000};

    cr_assert_eq(ledger_host_state(&ledger, 0), HOST_HIGH);
    cr_assert_eq(ledger_host_state(&ledger, 899), HOST_HIGH);
    cr_assert_eq(ledger_host_state(&ledger, 900), HOST_SOFT);
    cr_assert_eq(ledger_host_state(&ledger, 950), HOST_HARD);
    cr_assert_eq(ledger_host_state(&ledger, 980), HOST_LOW);
    cr_assert_eq(ledger_host_state(&ledger, 5000), HOST_LOW);
    ledger.budget_bytes = 0;
    cr_assert_eq(ledger_host_state(&ledger, 0), HOST_LOW);
}
