"""The value chain: what the customer pays is the first revenue and everybody's margins, to the last place."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.errors import JobFileError
from moebeam.schemas.records import Usage
from moebeam.schemas.value_chain import Attempt, Money, Rates, Seller, ValueChain, parse_markup, round_amount

AT = datetime(2026, 11, 24, 9, tzinfo=UTC)


def attempt(cost: Decimal | None = Decimal(1), *, tenant: str = "a", is_answered: bool = True) -> Attempt:
    money = None if cost is None else Money(cost, "USD")
    return Attempt(tenant, "2026-11-24", AT, "p", "m", is_answered, Usage(1, 1), money)


def from_ledger(found: Attempt) -> Money | None:
    return found.cost


def chain(*sellers: Seller, rates: Rates | None = None) -> ValueChain:
    first = Seller("provider", from_ledger)
    return ValueChain((first, *sellers), "customer", rates or Rates("USD"))


COSTS = st.decimals(0, Decimal("1e9"), places=12)
PERCENTS = st.decimals(-100, 1000, places=4)


@given(
    st.lists(st.tuples(COSTS, st.sampled_from(["a", "b"]), st.booleans()), max_size=20),
    st.lists(st.tuples(PERCENTS, st.booleans()), min_size=1, max_size=4),
)
def test_margins_and_the_first_revenue_are_what_the_customer_pays(
    lines: list[tuple[Decimal, str, bool]], markups: list[tuple[Decimal, bool]]
) -> None:
    made = chain(
        *(
            Seller(f"s{place}", None, parse_markup(percent), charges_failed=charges_failed)
            for place, (percent, charges_failed) in enumerate(markups)
        )
    )
    for cost, tenant, is_answered in lines:
        made.add(attempt(cost, tenant=tenant, is_answered=is_answered))
    assert made.difference == 0
    first, *others = made.names[:-1]
    margins = [made.of_party(name).margin for name in others]
    assert made.of_party(first).charged + sum(margins) == made.of_party("customer").paid
    assert made.of_party(first).charged == sum(cost for cost, _, _ in lines)


def test_an_agent_recognises_its_margin_and_a_principal_all_that_it_charges() -> None:
    made = chain(Seller("cloud", None, Decimal("0.25"), "net"))
    made.add(attempt(Decimal(8)))
    cloud = made.of_party("cloud")
    assert (cloud.charged, cloud.paid, cloud.margin) == (Decimal(10), Decimal(8), Decimal(2))
    assert (cloud.recognise_revenue("gross"), cloud.recognise_revenue("net")) == (Decimal(10), Decimal(2))


def test_who_charges_answers_alone_bears_what_failed_attempts_cost() -> None:
    made = chain(Seller("application", None, Decimal(1), charges_failed=False))
    made.add(attempt(Decimal(1)))
    made.add(attempt(Decimal(1), is_answered=False))
    assert made.of_party("application").margin == Decimal(0)
    assert made.of_party("customer").paid == Decimal(2)


def test_a_line_that_one_party_cannot_price_is_in_no_sum_and_counted() -> None:
    made = chain(Seller("cloud", lambda found: None))
    made.add(attempt())
    made.add(attempt(None))
    assert (made.num_unpriced, dict(made.sums)) == ({"cloud": 1, "provider": 1}, {})


def test_amounts_of_other_currencies_need_a_rate_and_keep_what_was_billed() -> None:
    yuan = Seller("cloud", lambda found: Money(Decimal(10), "CNY"))
    with pytest.raises(JobFileError, match=r"rates: expected a rate from CNY to USD, found none"):
        chain(yuan).add(attempt())
    made = chain(yuan, rates=Rates("USD", {"CNY": Decimal("0.14")}))
    made.add(attempt(Decimal(1)))
    assert made.of_party("cloud").charged == Decimal("1.40")
    assert made.of_party("cloud").billed == {"CNY": Decimal(10)}


def test_amounts_are_rounded_half_to_even_at_the_twelfth_place() -> None:
    assert round_amount(Decimal("0.0000000000005")) == Decimal(0)
    assert round_amount(Decimal("0.0000000000015")) == Decimal("0.000000000002")
