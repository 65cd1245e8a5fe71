"""The demo's task: a support ticket of an AI cloud reseller in, one JSON object out.

Everything is drawn from one seeded generator, so a seed names a data set. The answer follows from the prompt alone:

- `customer` is copied from the customer block;
- `category`, `product`, `priority` and `refund_requested` follow from the wordings of the problem, the impact and the
  ask (see `wordings`);
- `amount` is the sum named in the ticket, else null; `currency` is the one named beside it, else the contract currency,
  and null without an amount;
- `due_date` is the date named in the ticket, whatever its format, else null; `regions` are those named, in that order.
"""

import datetime
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from moebeam.jobs.demo import wordings
from moebeam.jobs.demo.wordings import HELD_OUT, TRAIN, Wordings

Split = Literal["train", "held_out"]

SYSTEM_PROMPT = (
    "You read support tickets of an AI cloud reseller. Answer with one compact JSON object: customer, product, "
    "category, priority, refund_requested, amount, currency, due_date, regions. Write null for an amount or a date "
    "that is not named. Without a named currency use the contract currency."
)
USER_TEMPLATE = "{{ customer_context }}\n\n{{ ticket_text }}"

SCHEMA_PATH = Path(__file__).with_name("ticket.schema.json")
CATEGORIES: tuple[str, ...] = tuple(TRAIN.problem)
PRIORITIES: tuple[str, ...] = ("low", "normal", "high", "urgent")
PRODUCTS: tuple[str, ...] = tuple(wordings.PRODUCT_PHRASES)

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True, slots=True)
class Customer:
    """A customer of the reseller; `tenant` is the reseller's branch that serves it."""

    name: str
    account_id: str
    tier: str
    currency: str
    tenant: str

    def context(self) -> str:
        """The block that every ticket of this customer starts with."""
        return (
            f"Customer: {self.name}\nAccount: {self.account_id}\nTier: {self.tier}\n"
            f"Contract currency: {self.currency}\nServed by: {self.tenant}"
        )


@dataclass(frozen=True, slots=True)
class Ticket:
    """A ticket with the answer that is expected, as compact JSON in the schema's key order."""

    ticket_id: str
    customer: Customer
    text: str
    answer_json: str

    @property
    def customer_context(self) -> str:
        return self.customer.context()

    @property
    def user_text(self) -> str:
        """What `USER_TEMPLATE` renders to for this ticket."""
        return f"{self.customer_context}\n\n{self.text}"


@dataclass(frozen=True, slots=True)
class Money:
    amount: int | float
    currency: str  # empty when the ticket names none
    text: str


def generate_tickets(num_tickets: int, *, seed: int, split: Split, num_customers: int | None = None) -> list[Ticket]:
    """Draw tickets; the same arguments give the same tickets.

    Args:
        num_tickets: how many.
        seed: names the data set; the two splits of one seed differ in more than wording.
        split: whose wordings to use.
        num_customers: size of the customer base that tickets are drawn from; None gives every ticket a fresh customer,
            as training does so that copying is learnt and no customer is.
    Raises:
        ValueError: a count is not positive.
    """
    if num_tickets < 1 or (num_customers is not None and num_customers < 1):
        raise ValueError(f"expected positive counts, got num_tickets={num_tickets}, num_customers={num_customers}")
    rng = random.Random(f"{split}:{seed}")
    sentences = TRAIN if split == "train" else HELD_OUT
    base = [draw_customer(rng) for _ in range(num_customers or 0)]
    return [
        draw_ticket(f"{split}-{seed}-{index:06d}", rng.choice(base) if base else draw_customer(rng), sentences, rng)
        for index in range(num_tickets)
    ]


def draw_customer(rng: random.Random) -> Customer:
    """A customer drawn field by field, so that hardly any two are alike."""
    first, second = rng.choice(wordings.COMPANY_FIRST), rng.choice(wordings.COMPANY_SECOND)
    return Customer(
        name=f"{first} {second} {rng.choice(wordings.COMPANY_FORM)}",
        account_id=f"{rng.choice('ABCDEFGH')}{rng.choice('KLMNPQRS')}-{rng.randrange(10_000, 100_000)}",
        tier=rng.choice(wordings.TIERS),
        currency=rng.choice(wordings.CURRENCIES),
        tenant=rng.choice(wordings.TENANTS),
    )


def draw_ticket(ticket_id: str, customer: Customer, sentences: Wordings, rng: random.Random) -> Ticket:
    """Build one ticket and its answer from one side's wordings."""
    category = rng.choice(CATEGORIES)
    product = rng.choice(PRODUCTS)
    priority = rng.choice(PRIORITIES)
    is_refund = rng.random() < 0.4
    money = draw_money(rng) if rng.random() < 0.6 else None
    due_date = draw_date(rng) if rng.random() < 0.6 else None
    regions = rng.sample(wordings.REGIONS, rng.choice((0, 0, 1, 1, 2, 3)))

    phrase = rng.choice(wordings.PRODUCT_PHRASES[product])
    facts = [fill_wording(rng.choice(sentences.impact[priority]), rng)]
    if regions:
        facts.append(fill_wording(rng.choice(sentences.regions), rng, regions=enumerate_names(regions)))
    if money is not None:
        facts.append(fill_wording(rng.choice(sentences.money), rng, money=money.text))
    if due_date is not None:
        facts.append(fill_wording(rng.choice(sentences.due_date), rng, due_date=write_date(due_date, rng)))
    facts.append(fill_wording(rng.choice(sentences.aside), rng, number=str(rng.randrange(11, 9_000)), year=_year(rng)))
    rng.shuffle(facts)
    parts = [
        fill_wording(rng.choice(sentences.greeting), rng),
        fill_wording(rng.choice(sentences.problem[category]), rng, product=phrase),
        *facts,
        fill_wording(rng.choice(sentences.ask[is_refund]), rng),
        fill_wording(rng.choice(sentences.closing), rng),
    ]
    answer = {
        "customer": {"name": customer.name, "account_id": customer.account_id, "tier": customer.tier},
        "product": product,
        "category": category,
        "priority": priority,
        "refund_requested": is_refund,
        "amount": None if money is None else money.amount,
        "currency": None if money is None else (money.currency or customer.currency),
        "due_date": None if due_date is None else due_date.isoformat(),
        "regions": regions,
    }
    text = " ".join(part for part in parts if part)
    return Ticket(ticket_id, customer, text, json.dumps(answer, separators=(",", ":"), ensure_ascii=False))


def expand_wording(wording: str, rng: random.Random) -> str:
    """Choose one of each bracket's alternatives; slots in braces stay."""
    return _ALTERNATIVES.sub(lambda match: rng.choice(match.group(1).split("|")), wording)


def make_tickets_table(tickets: Sequence[Ticket]) -> pa.Table:
    """The input of a job: what a user has, without the answers."""
    return pa.table(
        {
            "ticket_id": [ticket.ticket_id for ticket in tickets],
            "customer_id": [ticket.customer.account_id for ticket in tickets],
            "tenant": [ticket.customer.tenant for ticket in tickets],
            "customer_context": [ticket.customer_context for ticket in tickets],
            "ticket_text": [ticket.text for ticket in tickets],
        },
        schema=pa.schema(
            [(name, pa.string()) for name in ("ticket_id", "customer_id", "tenant", "customer_context", "ticket_text")]
        ),
    )


def list_expected_answers(tickets: Sequence[Ticket]) -> dict[str, str]:
    """Expected JSON by ticket id."""
    return {ticket.ticket_id: ticket.answer_json for ticket in tickets}


def answer_schema() -> Mapping[str, object]:
    """The answer's JSON Schema (draft 2020-12), as a job file hands it over."""
    customer = {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "account_id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{5}$"},
        "tier": {"enum": list(wordings.TIERS)},
    }
    properties: dict[str, object] = {
        "customer": _make_closed_object(customer),
        "product": {"enum": list(PRODUCTS)},
        "category": {"enum": list(CATEGORIES)},
        "priority": {"enum": list(PRIORITIES)},
        "refund_requested": {"type": "boolean"},
        "amount": {"type": ["number", "null"], "exclusiveMinimum": 0},
        "currency": {"enum": [*wordings.CURRENCIES, None]},
        "due_date": {"type": ["string", "null"], "format": "date", "maxLength": 10},
        "regions": {"type": "array", "items": {"enum": list(wordings.REGIONS)}, "maxItems": 3, "uniqueItems": True},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Support ticket",
        **_make_closed_object(properties),
    }


def write_schema(path: Path = SCHEMA_PATH) -> None:
    """Write the committed copy of `answer_schema`."""
    path.write_text(json.dumps(answer_schema(), indent=2) + "\n", encoding="utf-8")


def _make_closed_object(properties: Mapping[str, object]) -> dict[str, object]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def fill_wording(wording: str, rng: random.Random, **slots: str) -> str:
    """Expand a wording, fill its slots and begin it with a capital letter."""
    sentence = expand_wording(wording, rng).format(**slots)
    return sentence[:1].upper() + sentence[1:]


def enumerate_names(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def draw_money(rng: random.Random) -> Money:
    """A sum as a number, and as a ticket writes it: `1,250.75 EUR`, `EUR 480`, `480`.

    Cents never end in zero, so the JSON number has the ticket's own digits.
    """
    whole = rng.randrange(10, 10_000)
    cents = 0 if rng.random() < 0.5 else 10 * rng.randrange(10) + rng.randrange(1, 10)
    digits = f"{whole:,}" if rng.random() < 0.5 else str(whole)
    if cents:
        digits = f"{digits}.{cents:02d}"
    amount = whole + cents / 100 if cents else whole
    currency = rng.choice((*wordings.CURRENCIES, "", ""))
    text = digits if not currency else rng.choice((f"{currency} {digits}", f"{digits} {currency}"))
    return Money(amount, currency, text)


def draw_date(rng: random.Random) -> datetime.date:
    return datetime.date(2026, 1, 1) + datetime.timedelta(days=rng.randrange(730))


def write_date(date: datetime.date, rng: random.Random) -> str:
    """One of three formats: `2026-03-04`, `4 March 2026`, `March 4, 2026`."""
    month = wordings.MONTHS[date.month - 1]
    return rng.choice((date.isoformat(), f"{date.day} {month} {date.year}", f"{month} {date.day}, {date.year}"))


def _year(rng: random.Random) -> str:
    return str(rng.randrange(2019, 2026))


if __name__ == "__main__":
    write_schema()
