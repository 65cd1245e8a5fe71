"""The quote saved in a run's output folder, and its comparison with the actual run.

`moebeam estimate --save` writes it before the run; `moebeam report` reads it after.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from moebeam.jobs.check.identity import JobIdentity
from moebeam.jobs.output.run_state import read_manifest
from moebeam.jobs.quotes.quote_job import Quote
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_json import seal_json, unseal_json
from moebeam.transforms.plan.plan_record import read_plan

QuoteUnit: TypeAlias = Literal["rows", "tokens", "money"]


@dataclass(frozen=True, slots=True)
class QuotedFigure:
    """One figure of a quote with the actual one.

    Attributes:
        low, expected, high: from the quote; None if absent.
        currency: for money; None for anything else.
    """

    name: str
    unit: QuoteUnit
    low: Decimal | None
    expected: Decimal | None
    high: Decimal | None
    actual: Decimal | None
    currency: str | None = None

    @property
    def is_within(self) -> bool | None:
        """Whether the actual figure is within the quote's bounds; None if it, or both bounds, are unknown."""
        if self.actual is None or (self.low is None and self.high is None):
            return None
        return (self.low is None or self.low <= self.actual) and (self.high is None or self.actual <= self.high)

    @property
    def relative_error(self) -> Decimal | None:
        """Expected minus actual, as a share of actual; None if actual is unknown or 0."""
        if self.expected is None or not self.actual:
            return None
        return (self.expected - self.actual) / self.actual


def save_quote(quote: Quote, identity: JobIdentity) -> str:
    """Write a quote into the output folder; returns its path.

    Raises:
        OutputError: the output folder belongs to another job, or cannot be written.
    """
    layout = RunLayout(quote.output)
    identity.check_output(layout)
    content = seal_json(json.dumps(quote.to_json(), indent=2, ensure_ascii=False).encode())
    try:
        storage.write_whole(layout.quote, content)
    except OSError as error:
        raise OutputError(f"{layout.quote}: the quote cannot be written: {error}") from error
    return layout.quote


def compare_quote_with_run(layout: RunLayout, manifest: Mapping[str, Any] | None = None) -> list[QuotedFigure]:
    """Compare each quoted figure with the run, without wasted work.

    Without a quote of this job, the plan is used instead: its prompt tokens and how many they can share.

    Args:
        manifest: of a run that may not have published one; None reads it.
    Raises:
        OutputError: the run has no manifest, or its quote is damaged.
    """
    try:
        manifest = manifest or read_manifest(layout)
        if manifest is None:
            raise OutputError(f"{layout.manifest}: expected the manifest of a run, found none")
        totals: Mapping[str, Any] = manifest["totals"]
        fingerprint = manifest["job_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{layout.manifest}: expected the manifest of a run, found: {error!r}") from error
    try:
        quote: dict[str, Any] = json.loads(unseal_json(storage.read_bytes(layout.quote)))
        if quote["job_fingerprint"] == fingerprint:
            return list(_compare_with_quote(quote, totals))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{layout.quote}: expected a quote, found a damaged file: {error!r}; remove it, or write it again by "
            "moebeam estimate JOB.toml --save"
        ) from error
    return list(_compare_with_plan(layout, totals))


def _compare_with_quote(quote: Mapping[str, Any], totals: Mapping[str, Any]) -> Iterator[QuotedFigure]:
    own = quote["offers"][0]
    rows = Decimal(int(quote["num_rows"]))
    num_rows = Decimal(totals["num_results"] + totals["num_rejects"] - totals.get("num_further_samples", 0))
    yield QuotedFigure("rows", "rows", None, rows, None, num_rows)
    prompts = quote["prompt_tokens"]
    # No upper bound: retries add tokens too.
    yield QuotedFigure(
        "prompt tokens",
        "tokens",
        _to_decimal(prompts["low"]),
        _to_decimal(prompts["expected"]),
        None,
        _read_total(totals, "prompt"),
    )
    hits = _to_decimal(own["expected_hits"])
    yield QuotedFigure("cache hits", "tokens", None, hits, None, _read_total(totals, "cached"))
    outputs = _to_decimal(quote["expected_output_tokens"])
    yield QuotedFigure("output tokens", "tokens", None, outputs, None, _read_total(totals, "completion"))
    cost = own["cost"]
    if cost is not None:
        costs: Mapping[str, str] = totals["costs"] or {}
        is_comparable = set(costs) == {own["currency"]}
        yield QuotedFigure(
            "cost",
            "money",
            Decimal(cost["low"]),
            Decimal(cost["expected"]),
            None if cost["high"] is None else Decimal(cost["high"]),
            Decimal(costs[own["currency"]]) if is_comparable and not totals["num_unpriced"] else None,
            own["currency"],
        )


def _compare_with_plan(layout: RunLayout, totals: Mapping[str, Any]) -> Iterator[QuotedFigure]:
    plan = read_plan(layout)
    if plan is None:
        return
    num_tokens = sum(shard.num_prompt_tokens for shard in plan.shards)
    num_shared = num_tokens - sum(shard.num_tree_tokens for shard in plan.shards)
    yield QuotedFigure("prompt tokens", "tokens", None, Decimal(num_tokens), None, _read_total(totals, "prompt"))
    yield QuotedFigure("cache hits", "tokens", None, Decimal(num_shared), None, _read_total(totals, "cached"))


def _to_decimal(value: object) -> Decimal | None:
    return None if value is None else Decimal(str(value))


def _read_total(totals: Mapping[str, Any], name: str) -> Decimal | None:
    """A sum of tokens; None if some attempt's are unknown."""
    if totals.get("num_unknown_usage", 0):
        return None
    return _to_decimal(totals[f"{name}_tokens"])
