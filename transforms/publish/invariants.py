"""Invariants: what must agree at the end of a run before its manifest is written.

Part of *publish*, after the shards are visible and before the manifest. Compares four accounts of the same work: the
ledger's files, the rows' files, the totals of the commits (with the usage that providers reported), and the engine's
own counters.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moebeam.schemas.answers import ShardCommit, Totals
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import CommitError
from moebeam.schemas.prices import EXACT
from moebeam.schemas.store.checked_file import read_checked
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.commit import costs_by_currency
from moebeam.transforms.money.accelerator_time import NUM_PROMPTS
from moebeam.transforms.publish.reject_messages import MESSAGE_COLUMNS, MessageCount, count_messages, merge_messages
from moebeam.transforms.publish.rollup import GroupSums, Rollup

_ROW_COLUMNS = (
    "prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cost",
    "cost_allocated",
    "currency",
    "costs_by_currency",
)


@dataclass(frozen=True, slots=True)
class RowSums:
    """Sums over the files of results and rejects; costs by currency.

    Attributes:
        messages: of the rejects, the commonest first.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    costs: Mapping[str, Decimal] | None = None
    costs_allocated: Mapping[str, Decimal] | None = None
    messages: tuple[MessageCount, ...] = ()

    def __add__(self, other: "RowSums") -> "RowSums":
        return RowSums(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            _add_costs(self.costs or {}, other.costs or {}),
            _add_costs(self.costs_allocated or {}, other.costs_allocated or {}),
            merge_messages((*self.messages, *other.messages)),
        )


def _add_costs(one: Mapping[str, Decimal], other: Mapping[str, Decimal]) -> dict[str, Decimal]:
    names = sorted({*one, *other})
    return {name: EXACT.add(one.get(name, Decimal(0)), other.get(name, Decimal(0))) for name in names}


def sum_rows(table: pa.Table) -> RowSums:
    """Sum a table of results or rejects."""
    tokens = [int(pc.sum(table.column(name)).as_py() or 0) for name in _ROW_COLUMNS[:3]]
    return RowSums(
        *tokens,
        costs=costs_by_currency(table, "cost"),
        costs_allocated=costs_by_currency(table, "cost_allocated"),
    )


def sum_shard(commit: ShardCommit, layout: RunLayout) -> Iterator[RowSums]:
    """Sum each published file of results or rejects of a shard.

    Raises:
        FileDamaged: a file is not what was committed.
        OSError: the store failed.
    """
    for file in commit.files:
        if file.table != "ledger":
            content = read_checked(layout.published_file(file.table, commit.shard), file.sha256)
            present = set(pq.read_schema(io.BytesIO(content)).names)
            is_reject = file.table == "rejects"
            wanted = (*_ROW_COLUMNS, *MESSAGE_COLUMNS) if is_reject else _ROW_COLUMNS
            table = pq.read_table(io.BytesIO(content), columns=[name for name in wanted if name in present])
            sums = sum_rows(table)
            yield replace(sums, messages=count_messages(table)) if is_reject else sums


def check_invariants(ledger: Rollup, rows: RowSums, totals: Totals, engine: Mapping[str, float]) -> dict[str, Json]:
    """Check the four accounts of a run against each other.

    Args:
        ledger: of the committed shards, without waste.
        totals: of the commits; their tokens are the usage reported with each completion.
        engine: counters of the committed shards; empty if the engine does not count.
    Returns:
        The comparisons, for the manifest: each `equal`, or why it could not be made.
    Raises:
        CommitError: two accounts differ; names both, and their values.
    """
    whole = sum(ledger.by_currency.values(), GroupSums())
    costs = _sum_costs(ledger, "cost")
    for name in ("prompt_tokens", "completion_tokens", "reasoning_tokens"):
        if not whole.num_doubtful_usage:
            _check(name, "the ledger", getattr(whole, name), "the rows", getattr(rows, name))
        _check(name, "the ledger", getattr(whole, name), "the usage in the commits", getattr(totals, name))
    _check("attempts", "the ledger", whole.num_attempts, "the commits", totals.num_attempts)
    unknown = "attempts without a usage"
    _check(unknown, "the ledger", whole.num_unknown_usage, "the commits", totals.num_unknown_usage)
    committed = {currency: Decimal(amount) for currency, amount in (totals.costs or {}).items()}
    _check("cost", "the ledger", costs, "the rows", _plain(rows.costs))
    _check("cost", "the ledger", costs, "the commits", committed)
    _check(
        "cost_allocated", "the ledger", _sum_costs(ledger, "cost_allocated"), "the rows", _plain(rows.costs_allocated)
    )
    _check("cost", "the ledger", costs, "its token classes", _sum_class_costs(ledger))
    return {
        "ledger_and_rows": "equal" if not whole.num_doubtful_usage else _explain_doubtful(whole.num_doubtful_usage),
        "ledger_and_usage": "equal",
        "ledger_and_token_classes": "equal",
        "ledger_and_engine": _check_engine(whole, engine),
    }


def _explain_doubtful(num_attempts: int) -> str:
    """Why the run's tokens are not compared; each shard's are at its commit, without the rows in question."""
    return f"costs equal; tokens not comparable: the usage of {num_attempts} attempts is missing or contradicts itself"


def _check_engine(whole: GroupSums, engine: Mapping[str, float]) -> str:
    """Compare with the engine's counters, if they cover exactly this run's lines.

    The engine counts a prompt twice whose work was given up and redone, though it is paid once, and does not count
    prompts that it refused.
    """
    if NUM_PROMPTS not in engine:
        return "the engine does not count"
    if whole.num_failed:
        return f"not comparable: the engine failed on {whole.num_failed} attempts"
    if num_kept := engine.get("num_replayed_answers", 0):
        return f"not comparable: {num_kept:.0f} answers were kept by earlier attempts"
    if engine[NUM_PROMPTS] != whole.num_attempts:
        return (
            f"not comparable: the engine counted {engine[NUM_PROMPTS]:.0f} prompts for {whole.num_attempts} attempts, "
            "as when shards are answered side by side in one process"
        )
    if whole.num_unknown_hits:
        return f"not comparable: cached tokens of {whole.num_unknown_hits} attempts are unknown"
    _check("prompt tokens", "the ledger", whole.prompt_tokens, "the engine", int(engine["num_prompt_tokens"]))
    if engine.get("num_preemptions", 0):
        return f"prompt tokens equal; {engine['num_preemptions']:.0f} prompts were computed twice for want of memory"
    computed = int(engine["num_computed_prefill_tokens"])
    if computed > whole.cache_miss_tokens:
        return f"prompt tokens equal; {computed - whole.cache_miss_tokens} shared tokens were computed again"
    _check("computed prompt tokens", "the ledger", whole.cache_miss_tokens, "the engine", computed)
    _check("cached tokens", "the ledger", whole.cache_hit_tokens, "the engine", whole.prompt_tokens - computed)
    # An answer's last token goes through no step. Older commits lack that count; one per attempt stands in.
    output = int(engine["num_decode_tokens"] + engine.get("num_uncomputed_answer_tokens", whole.num_attempts))
    _check("output tokens", "the ledger", whole.completion_tokens, "the engine", output)
    return "equal"


def _sum_costs(ledger: Rollup, name: str) -> dict[str, Decimal]:
    return {currency: getattr(sums, name) for currency, sums in ledger.by_currency.items() if currency is not None}


def _sum_class_costs(ledger: Rollup) -> dict[str, Decimal]:
    costs: dict[str, Decimal] = {}
    for currency, sums in ledger.by_currency.items():
        if currency is not None:
            total = Decimal(0)
            for part in (sums.cache_hit_cost, sums.cache_miss_cost, sums.visible_output_cost, sums.reasoning_cost):
                total = EXACT.add(total, part)
            costs[currency] = total
    return costs


def _plain(costs: Mapping[str, Decimal] | None) -> dict[str, Decimal]:
    return dict(costs or {})


def _check(what: str, one: str, found: object, other: str, expected: object) -> None:
    if found != expected:
        raise CommitError(
            f"{what}: expected {one} and {other} to agree, "
            f"found {_format_costs(found)} in {one}, {_format_costs(expected)} in {other}"
        )


def _format_costs(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{amount:f} {currency}" for currency, amount in value.items()) or "nothing"
    return str(value)
