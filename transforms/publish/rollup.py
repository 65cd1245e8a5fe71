"""Roll-ups: sums of the ledger by any of its columns.

Part of *publish*, which puts the sums by tenant, cost centre and day into the manifest; `moebeam report` asks for other
columns. Amounts of different currencies are never added: the currency is always part of a group. Sums are exact, so
they depend on neither the order nor the split of the lines.
"""

import heapq
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moebeam.schemas.answers import ShardCommit
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import CommitError, JobFileError
from moebeam.schemas.prices import EXACT
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import read_checked
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA
from moebeam.transforms.durable.commit import open_committed

DEFAULT_BY = ("tenant", "cost_center", "day")
MAX_GROUPS = 1000
"""Most groups that a manifest lists; smaller ones are summed as `others`."""

_PERIODS = {"day": "%Y-%m-%d", "month": "%Y-%m", "hour": "%Y-%m-%dT%H:00Z"}
_TAG = "tags."
_COUNTED = ("cache_hit_tokens", "cache_miss_tokens", "visible_output_tokens", "reasoning_tokens")
_AMOUNTS = (
    "cache_hit_cost",
    "cache_miss_cost",
    "visible_output_cost",
    "reasoning_cost",
    "cost",
    "cost_allocated",
)
_COLUMNS = tuple(
    name
    for name in LEDGER_SCHEMA.names
    if name
    not in {
        *_COUNTED,
        *_AMOUNTS,
        *("started_at", "accelerator_s", "tags", "num_lost_calls", "lost_cost_at_most"),
        *("estimated_prompt_tokens", "estimated_completion_tokens"),
    }
)

GroupKey: TypeAlias = tuple[str | None, ...]
"""Values of a roll-up's columns, then the currency; null is a value of its own."""


@dataclass(frozen=True, slots=True)
class GroupSums:
    """Sums of a group's ledger lines; amounts are in the group's currency.

    Attributes:
        num_unpriced: lines without a price or without a usage, which are in no amount.
        num_unknown_usage: lines whose prompt or output was not counted; what is unknown is in no sum of tokens.
        num_doubtful_usage: lines whose usage is missing or contradicts itself.
        num_unknown_hits: lines whose cached tokens are unknown; `cache_miss_tokens` has their whole prompts.
        num_failed: lines that the engine ended with an error.
        num_untimed: lines without accelerator seconds.
    """

    num_attempts: int = 0
    num_unpriced: int = 0
    num_upper_bound: int = 0
    num_unknown_hits: int = 0
    num_unknown_usage: int = 0
    num_doubtful_usage: int = 0
    num_failed: int = 0
    num_untimed: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    visible_output_tokens: int = 0
    reasoning_tokens: int = 0
    cache_hit_cost: Decimal = Decimal(0)
    cache_miss_cost: Decimal = Decimal(0)
    visible_output_cost: Decimal = Decimal(0)
    reasoning_cost: Decimal = Decimal(0)
    cost: Decimal = Decimal(0)
    cost_allocated: Decimal = Decimal(0)
    accelerator_s: float = 0.0

    def __add__(self, other: "GroupSums") -> "GroupSums":
        return GroupSums(**{name: _add(getattr(self, name), getattr(other, name)) for name in _FIELDS})

    @property
    def prompt_tokens(self) -> int:
        return self.cache_hit_tokens + self.cache_miss_tokens

    @property
    def completion_tokens(self) -> int:
        return self.visible_output_tokens + self.reasoning_tokens

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompt tokens that were cached; None if any line's share is unknown."""
        if self.num_unknown_hits or not self.prompt_tokens:
            return None
        return self.cache_hit_tokens / self.prompt_tokens

    def to_json(self) -> dict[str, Json]:
        """Sums as JSON values; decimals as plain strings."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return {name: format(value, "f") if isinstance(value, Decimal) else value for name, value in values.items()}


_FIELDS = tuple(GroupSums.__dataclass_fields__)


def _add(one: Any, other: Any) -> Any:
    return EXACT.add(one, other) if isinstance(one, Decimal) else one + other


@dataclass(frozen=True, slots=True)
class Rollup:
    """A summed ledger.

    Attributes:
        by: the columns, as requested.
        groups: the largest, by cost and then by key; a key ends with the currency.
        others: all further groups together, by currency.
    """

    by: tuple[str, ...]
    groups: tuple[tuple[GroupKey, GroupSums], ...] = ()
    others: Mapping[str | None, GroupSums] = field(default_factory=dict[str | None, GroupSums])
    num_others: int = 0

    @property
    def by_currency(self) -> dict[str | None, GroupSums]:
        """Sums of the whole ledger; lines without a price are under None."""
        sums = dict(self.others)
        for key, group in self.groups:
            sums[key[-1]] = sums.get(key[-1], GroupSums()) + group
        return dict(sorted(sums.items(), key=lambda entry: (entry[0] is None, entry[0] or "")))

    def to_json(self) -> dict[str, Json]:
        """The roll-up as stored in a manifest."""
        names = (*self.by, "currency")
        return {
            "by": list(self.by),
            "groups": [{**dict(zip(names, key, strict=True)), **sums.to_json()} for key, sums in self.groups],
            "num_other_groups": self.num_others,
            "others": [{"currency": currency, **sums.to_json()} for currency, sums in sort_others(self.others)],
        }


def sort_others(others: Mapping[str | None, GroupSums]) -> list[tuple[str | None, GroupSums]]:
    """Sort by currency, lines without a price last."""
    return sorted(others.items(), key=lambda entry: (entry[0] is None, entry[0] or ""))


def parse_by(text: str, tags: Iterable[str] = ()) -> tuple[str, ...]:
    """Parse column names separated by commas; a tag is `tags.team`, or `team` if `tags` has it and no column does.

    Raises:
        JobFileError: the ledger has no such column.
    """
    known_tags = set(tags)
    by: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name in known_tags and name not in _COLUMNS and name not in _PERIODS:
            by.append(_TAG + name)
        elif name in _COLUMNS or name in _PERIODS or (name.startswith(_TAG) and len(name) > len(_TAG)):
            by.append(name)
        else:
            raise JobFileError(
                f"--by: expected columns of the ledger ({', '.join((*_PERIODS, *_COLUMNS))}) or tags.NAME, "
                f"found {name!r}"
            )
    return tuple(dict.fromkeys(by))


def read_ledger(path: str, sha256: str | None) -> pa.Table:
    """Read a ledger file in the current columns; those that an older version did not write are null.

    Args:
        sha256: its digest; None where an older version recorded none.
    Raises:
        CommitError: the file is missing, damaged or no ledger.
        OSError: the store failed.
    """
    try:
        content = storage.read_bytes(path) if sha256 is None else read_checked(path, sha256)
    except FileNotFoundError as error:
        raise CommitError(f"{path}: expected a file of the ledger, found no such file") from error
    return parse_ledger(io.BytesIO(content), path)


def parse_ledger(source: BinaryIO, path: str) -> pa.Table:
    """As `read_ledger`, from an open file; `path` is its name in messages."""
    try:
        table = pq.read_table(source)
        missing = {name: pa.nulls(table.num_rows, LEDGER_SCHEMA.field(name).type) for name in LEDGER_SCHEMA.names}
        columns = [table.column(name) if name in table.schema.names else missing[name] for name in LEDGER_SCHEMA.names]
        return pa.table(columns, names=LEDGER_SCHEMA.names).cast(LEDGER_SCHEMA)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise CommitError(f"{path}: expected a file of the ledger, found: {error}") from error


def read_committed_ledger(layout: RunLayout, commit: ShardCommit) -> pa.Table | None:
    """The ledger of a committed shard, from where it is published or else staged; None if nothing was asked.

    Raises:
        CommitError: the file is missing or damaged.
        OSError: the store failed.
    """
    source = open_committed(layout, commit, "ledger")
    if source is None:
        return None
    with source:
        return parse_ledger(source, layout.published_file("ledger", commit.shard))


def roll_up(ledger: pa.Table, by: Sequence[str]) -> dict[GroupKey, GroupSums]:
    """Sum ledger lines by columns and currency.

    Args:
        ledger: rows of `moebeam.schemas.tables.LEDGER_SCHEMA`.
        by: as `parse_by` returns it.
    """
    keys = [_key_column(ledger, name) for name in (*by, "currency")]
    measures: dict[str, Any] = {
        "num_unpriced": _ones(pc.is_null(ledger.column("cost"))),
        "num_upper_bound": _ones(pc.equal(ledger.column("cost_basis"), pa.scalar("upper_bound"))),
        "num_unknown_hits": _ones(pc.is_null(ledger.column("cache_hit_tokens"))),
        "num_unknown_usage": _ones(
            pc.or_(pc.is_null(ledger.column("cache_miss_tokens")), pc.is_null(ledger.column("visible_output_tokens")))
        ),
        "num_doubtful_usage": _ones(pc.not_equal(ledger.column("usage_status"), pa.scalar("reported"))),
        "num_failed": _ones(pc.equal(ledger.column("finish_reason"), pa.scalar("error"))),
        "num_untimed": _ones(pc.is_null(ledger.column("accelerator_s"))),
        **{name: ledger.column(name) for name in (*_COUNTED, *_AMOUNTS, "accelerator_s")},
    }
    names = [f"key_{place}" for place in range(len(keys))]
    table = pa.table([*keys, *measures.values()], names=[*names, *measures])
    summed: Any = table.group_by(names).aggregate([([], "count_all"), *((name, "sum") for name in measures)])
    groups: dict[GroupKey, GroupSums] = {}
    for row in summed.to_pylist():
        # A sum over only nulls is null; null lines are counted separately.
        sums = {name: row[f"{name}_sum"] for name in measures if row[f"{name}_sum"] is not None}
        groups[tuple(row[name] for name in names)] = GroupSums(num_attempts=row["count_all"], **sums)
    return groups


def _key_column(ledger: pa.Table, name: str) -> Any:
    if name in _PERIODS:
        return pc.strftime(ledger.column("started_at"), format=_PERIODS[name])
    if name.startswith(_TAG):
        tags: Any = ledger.column("tags")
        return pc.map_lookup(tags, query_key=name.removeprefix(_TAG), occurrence="first")
    return ledger.column(name).cast(pa.string())


def _ones(mask: Any) -> Any:
    return pc.fill_null(mask, False).cast(pa.int64())


def merge_groups(parts: Iterable[Mapping[GroupKey, GroupSums]]) -> dict[GroupKey, GroupSums]:
    """Merge roll-ups of a ledger's parts into that of the whole."""
    merged: dict[GroupKey, GroupSums] = {}
    for part in parts:
        for key, sums in part.items():
            merged[key] = merged[key] + sums if key in merged else sums
    return merged


def largest_groups(
    groups: Iterable[tuple[GroupKey, GroupSums]], by: Sequence[str], max_groups: int | None = None
) -> Rollup:
    """List the most expensive groups and sum the rest as `others`; each key must come once."""
    ordered = sorted(groups, key=_by_cost)
    kept = ordered if max_groups is None else ordered[:max_groups]
    others: dict[str | None, GroupSums] = {}
    for key, sums in ordered[len(kept) :]:
        others[key[-1]] = others.get(key[-1], GroupSums()) + sums
    return Rollup(tuple(by), tuple(kept), others, len(ordered) - len(kept))


def _by_cost(group: tuple[GroupKey, GroupSums]) -> tuple[Decimal, tuple[tuple[bool, str], ...]]:
    key, sums = group
    return sums.cost.copy_negate(), tuple((part is None, part or "") for part in key)


def merge_largest(rollups: Iterable[Rollup], by: Sequence[str], max_groups: int) -> Rollup:
    """Merge partial results of `largest_groups` in bounded memory.

    Each group is in one part only, so a group too small for one merge stays too small.
    """
    merged = Rollup(tuple(by))
    for part in rollups:
        ordered = tuple(heapq.merge(merged.groups, part.groups, key=_by_cost))
        others = dict(merged.others)
        dropped = [(key[-1], sums) for key, sums in ordered[max_groups:]]
        for currency, sums in (*part.others.items(), *dropped):
            others[currency] = others.get(currency, GroupSums()) + sums
        num_others = merged.num_others + part.num_others + len(dropped)
        merged = replace(merged, groups=ordered[:max_groups], others=others, num_others=num_others)
    return merged
