"""What was paid, in one line."""

from typing import Any

from moebeam.jobs.console.paid_line import format_paid
from moebeam.schemas.answers import Totals
from moebeam.transforms.publish.run_account import RunAccount, sum_totals


def account(
    committed: Totals | None = None, journaled: Totals | None = None, wasted: Totals | None = None
) -> dict[str, Any]:
    nothing = sum_totals(())
    return dict(RunAccount(committed or nothing, journaled or nothing, wasted or nothing).by_state())


def test_what_is_journaled_and_wasted_is_named_as_part_of_the_sum() -> None:
    told = account(
        committed=Totals(num_attempts=1, costs={"USD": "1.000000000000"}),
        journaled=Totals(num_attempts=31, costs={"USD": "0.000411300000"}),
        wasted=Totals(num_attempts=2, costs={"USD": "0.250000000000"}),
    )
    assert format_paid(told) == (
        "paid 1.25 USD, of which 0.000411 USD in the journal and 0.250 USD for answers not used"
    )


def test_an_unknown_cost_is_not_nothing() -> None:
    assert format_paid(account()) == "nothing was paid"
    unknown = account(journaled=Totals(num_attempts=3, num_unpriced=3))
    assert format_paid(unknown) == "paid an unknown amount, of which 3 attempts in the journal"
    some = account(committed=Totals(num_attempts=3, num_unpriced=2, costs={"USD": "2"}))
    assert format_paid(some) == "paid 2.00 USD; the cost of 2 attempts is unknown"
    two = account(committed=Totals(num_attempts=2, costs={"CNY": "3", "USD": "2"}))
    assert format_paid(two) == "paid 3.00 CNY and 2.00 USD"
