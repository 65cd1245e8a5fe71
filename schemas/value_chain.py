"""The value chain: who charges whom for the tokens of a run, and where the margin stays.

Used by reports only; it changes neither answers nor the ledger. Parties are ordered from the model provider to the
customer, and each but the last sells to the next. A party pays what the one before it charges, so the provider's
revenue plus all margins equals what the customer pays, to the last decimal place.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, Inexact, InvalidOperation, Overflow
from typing import Literal, TypeAlias

from moebeam.schemas.errors import JobFileError
from moebeam.schemas.records import Usage

Recognition: TypeAlias = Literal["gross", "net"]
"""A principal's revenue is all that it charges, an agent's only its margin."""

_EXACT = Context(prec=60, traps=[Inexact, InvalidOperation, Overflow])
_ROUNDING = Context(prec=60, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation, Overflow])
_PLACE = Decimal("1e-12")
_HUNDRED = Decimal(100)


@dataclass(frozen=True, slots=True)
class Money:
    """An amount in a currency."""

    amount: Decimal
    currency: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """The part of a ledger line that pricing needs.

    Attributes:
        day: UTC date of the start.
        cost: from the run's own ledger; None without a price.
    """

    tenant: str | None
    day: str
    started_at: datetime
    provider: str
    model: str
    is_answered: bool
    usage: Usage
    cost: Money | None


PriceOf: TypeAlias = Callable[[Attempt], Money | None]


@dataclass(frozen=True, slots=True)
class Seller:
    """A party that sells, at its own prices or at cost plus a markup.

    Attributes:
        price_of: None if it sells at a markup.
        markup: factor minus one; 0.25 adds a quarter.
        charges_failed: whether attempts without a valid answer are charged.
    """

    name: str
    price_of: PriceOf | None = None
    markup: Decimal = Decimal(0)
    recognition: Recognition = "gross"
    charges_failed: bool = True


@dataclass(frozen=True, slots=True)
class PartySums:
    """What a party charged and paid, in the report's currency.

    Attributes:
        billed: what it charged, in the currencies of its prices.
    """

    num_attempts: int = 0
    charged: Decimal = Decimal(0)
    paid: Decimal = Decimal(0)
    billed: Mapping[str, Decimal] = field(default_factory=dict[str, Decimal])

    def __add__(self, other: "PartySums") -> "PartySums":
        names = sorted({*self.billed, *other.billed})
        return PartySums(
            self.num_attempts + other.num_attempts,
            _EXACT.add(self.charged, other.charged),
            _EXACT.add(self.paid, other.paid),
            {n: _EXACT.add(self.billed.get(n, Decimal(0)), other.billed.get(n, Decimal(0))) for n in names},
        )

    @property
    def margin(self) -> Decimal:
        return _EXACT.subtract(self.charged, self.paid)

    def recognise_revenue(self, recognition: Recognition) -> Decimal:
        """Return recognised revenue: all that a principal charges, or what an agent keeps."""
        return self.charged if recognition == "gross" else self.margin


@dataclass(frozen=True, slots=True)
class Rates:
    """Fixed exchange rates of one report.

    Attributes:
        currency: the report's.
        per_unit: other currency -> units of `currency` for one unit of it.
    """

    currency: str
    per_unit: Mapping[str, Decimal] = field(default_factory=dict[str, Decimal])

    def convert(self, money: Money) -> Decimal:
        """Convert an amount to the report's currency, rounded half to even to 12 decimal places.

        Raises:
            JobFileError: there is no rate.
        """
        if money.currency == self.currency:
            return money.amount
        if money.currency not in self.per_unit:
            raise JobFileError(
                f"[value_chain] rates: expected a rate from {money.currency} to {self.currency}, found none; add "
                f'{money.currency} = "…" from a source of yours'
            )
        return round_amount(_ROUNDING.multiply(money.amount, self.per_unit[money.currency]))


def round_amount(amount: Decimal) -> Decimal:
    """Round to 12 decimal places, half to even. A value chain rounds nowhere else: once per line and party."""
    return _ROUNDING.quantize(amount, _PLACE)


ChainKey: TypeAlias = tuple[str, str | None, str]
"""Party, tenant, day."""


@dataclass(slots=True)
class ValueChain:
    """A run's value chain, summed line by line.

    Attributes:
        sums: by party, tenant and day; the customer only pays.
        num_unpriced: by party, lines that it has no price for; no party's sums include them.
    """

    sellers: tuple[Seller, ...]
    customer: str
    rates: Rates
    sums: dict[ChainKey, PartySums] = field(default_factory=dict[ChainKey, PartySums])
    num_unpriced: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, attempt: Attempt) -> None:
        """Charge one ledger line through the chain.

        Raises:
            JobFileError: a rate is missing.
        """
        charges = self._charges(attempt)
        if charges is None:
            return
        paid = Decimal(0)
        for seller, (charged, billed) in zip(self.sellers, charges, strict=True):
            sums = PartySums(1, charged, paid, {billed.currency: billed.amount})
            self._note((seller.name, attempt.tenant, attempt.day), sums)
            paid = charged
        self._note((self.customer, attempt.tenant, attempt.day), PartySums(1, Decimal(0), paid))

    def _charges(self, attempt: Attempt) -> list[tuple[Decimal, Money]] | None:
        """Each seller's charge, in the report's currency and as billed; None if one has no price."""
        charges: list[tuple[Decimal, Money]] = []
        for seller in self.sellers:
            if not seller.charges_failed and not attempt.is_answered:
                money: Money | None = Money(Decimal(0), self.rates.currency)
            elif seller.price_of is not None:
                money = seller.price_of(attempt)
            else:
                assert charges, "a markup needs somebody to buy from"
                factor = _EXACT.add(Decimal(1), seller.markup)
                money = Money(round_amount(_ROUNDING.multiply(charges[-1][0], factor)), self.rates.currency)
            if money is None:
                self.num_unpriced[seller.name] = self.num_unpriced.get(seller.name, 0) + 1
                return None
            charges.append((self.rates.convert(money), money))
        return charges

    def _note(self, key: ChainKey, sums: PartySums) -> None:
        self.sums[key] = self.sums[key] + sums if key in self.sums else sums

    def of_party(self, name: str) -> PartySums:
        """Sum a party over all tenants and days."""
        return total(sums for (party, _, _), sums in self.sums.items() if party == name)

    @property
    def names(self) -> tuple[str, ...]:
        """All parties in order, the customer last."""
        return (*(seller.name for seller in self.sellers), self.customer)

    @property
    def difference(self) -> Decimal:
        """The customer's payments minus the first seller's revenue and the others' margins; 0 unless a line is lost."""
        first, *others = self.sellers
        parts = [self.of_party(first.name).charged, *(self.of_party(other.name).margin for other in others)]
        left = self.of_party(self.customer).paid
        for part in parts:
            left = _EXACT.subtract(left, part)
        return left


def total(sums: Iterable[PartySums]) -> PartySums:
    """Add up the sums of several groups."""
    added = PartySums()
    for part in sums:
        added = added + part
    return added


def parse_markup(percent: Decimal) -> Decimal:
    """Convert a markup in percent to a share, exactly."""
    return _EXACT.divide(percent, _HUNDRED)


def make_group_order(names: Sequence[str]) -> Callable[[ChainKey], tuple[int, bool, str, str]]:
    """Sort key of a chain's groups: parties in their order, then tenants, then days."""
    places = {name: place for place, name in enumerate(names)}
    return lambda key: (places[key[0]], key[1] is None, key[1] or "", key[2])
