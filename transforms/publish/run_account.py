"""The account of a run: what was answered and paid, by state, from all that its store holds of it.

Part of *publish*, and read by everything that shows money: the manifest, the summary, `moebeam status`, `report` and
`export`. Each answer is in exactly one state: **committed** (a line of the ledger of a committed shard), **journaled**
(kept for a shard that is not committed; the next attempt uses it) or **wasted** (paid and not used). Calls that a
provider may bill without having said so are counted beside the answers, as lost.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from moebeam.schemas.answers import ShardCommit, Totals
from moebeam.schemas.canonical import Json, fingerprint
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import RecordJson
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA
from moebeam.transforms.answer.waste import (
    find_used,
    read_waste_file,
    unused_lines,
    unused_name,
    waste_folder,
    waste_names,
)
from moebeam.transforms.durable.commit import ledger_totals, list_committed_shards, read_commit, read_commits
from moebeam.transforms.durable.journal_file import list_journaled_shards, read_journal
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.publish.partial import read_partial
from moebeam.transforms.publish.rollup import parse_ledger, read_committed_ledger

PaidState: TypeAlias = Literal["committed", "journaled", "wasted"]
PAID_STATES: tuple[PaidState, ...] = ("committed", "journaled", "wasted")

PAID_FIELDS = (
    "num_attempts",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "num_unknown_usage",
    "estimated_prompt_tokens",
    "estimated_completion_tokens",
    "costs",
    "num_unpriced",
    "num_lost_calls",
    "lost_costs_at_most",
)
"""Sums of `Totals` that a state has; the others are about rows, or of tables alone."""


@dataclass(frozen=True, slots=True)
class RunAccount:
    """What a run was answered and has paid; the three states have no answer in common.

    Attributes:
        journaled, wasted: attempts, tokens and money; nothing about rows.
        num_journaled_rows: rows with a journaled answer, merged ones included.
        num_damaged: lines of journals, and records of waste, that cannot be read; what they cost is not known.
    """

    committed: Totals = field(default_factory=lambda: sum_totals(()))
    journaled: Totals = field(default_factory=lambda: sum_totals(()))
    wasted: Totals = field(default_factory=lambda: sum_totals(()))
    num_journaled_rows: int = 0
    num_damaged: int = 0

    @property
    def paid(self) -> Totals:
        """All states together."""
        return self.committed + self.journaled + self.wasted

    @property
    def num_answered_rows(self) -> int:
        """Rows that are answered or rejected, and rows whose answer is in a journal."""
        return self.committed.num_results + self.committed.num_rejects + self.num_journaled_rows

    def to_json(self) -> dict[str, Json]:
        """The keys of the account in the manifest."""
        return {
            "totals": asdict(self.committed),
            "journaled": asdict(self.journaled),
            "wasted": asdict(self.wasted),
            "paid": asdict(self.paid),
            "num_answered_rows": self.num_answered_rows,
            "num_damaged_journal_lines": self.num_damaged,
        }

    def by_state(self) -> dict[str, Json]:
        """The account as commands print it with `--json`; amounts as decimal text by currency."""
        states = {"committed": self.committed, "journaled": self.journaled, "wasted": self.wasted, "paid": self.paid}
        return {
            "num_answered_rows": self.num_answered_rows,
            "num_damaged_journal_lines": self.num_damaged,
            **{state: {name: getattr(totals, name) for name in PAID_FIELDS} for state, totals in states.items()},
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "RunAccount":
        """The account in a manifest; older ones have no key of what is journaled, and no waste."""
        committed, journaled, wasted = (
            _parse_totals(manifest[name]) if name in manifest else sum_totals(())
            for name in ("totals", "journaled", "wasted")
        )
        num_rows = committed.num_results + committed.num_rejects
        return cls(
            committed,
            journaled,
            wasted,
            int(manifest.get("num_answered_rows", num_rows)) - num_rows,
            int(manifest.get("num_damaged_journal_lines", 0)),
        )


def _parse_totals(values: Json) -> Totals:
    return RecordJson(Totals).decode(json.dumps(values).encode())


def sum_totals(totals: Iterable[Totals]) -> Totals:
    """The sum, whose amounts by currency are empty and not null where there are none."""
    return sum(totals, Totals(costs={}, rejects_by_type={}, lost_costs_at_most={}))


@dataclass(frozen=True, slots=True)
class PaidLines:
    """Ledger lines of one shard in one state; `lines` has the columns of `LEDGER_SCHEMA`."""

    state: PaidState
    shard: str
    lines: pa.Table


def read_paid_lines(layout: RunLayout, accounting: Accounting) -> Iterator[PaidLines]:
    """Read every paid attempt of a run once, published or not, in memory of one shard.

    Raises:
        CommitError: a table is missing or damaged.
        OSError: the store failed.
    """
    committed = {*list_committed_shards(layout)}
    journaled = {*list_journaled_shards(layout)}
    for shard in sorted(committed):
        ledger = _read_committed(layout, shard)
        yield PaidLines("committed", shard, ledger)
        if shard in journaled and (unused := _read_unused(layout, shard, ledger, accounting)) is not None:
            yield PaidLines("wasted", shard, unused)
    for name in waste_names(layout):
        shard = name.partition(".")[0]
        is_new = not _is_computed(name, shard, committed & journaled)
        if is_new and (wasted := _read_wasted(layout, name)) is not None:
            yield PaidLines("wasted", shard, wasted)
    for shard in sorted(journaled - committed):
        yield PaidLines("journaled", shard, read_partial(layout, shard, accounting).lines.select(LEDGER_SCHEMA.names))


def _is_computed(name: str, shard: str, anew: set[str]) -> bool:
    """Whether a file of waste repeats what the journals of the shards `anew` say."""
    return name == unused_name(shard) and shard in anew


def _read_unused(layout: RunLayout, shard: str, ledger: pa.Table, accounting: Accounting) -> pa.Table | None:
    entries = read_journal(layout, shard).entries
    return unused_lines(layout, shard, entries, find_used(ledger), accounting)


def _read_wasted(layout: RunLayout, name: str) -> pa.Table | None:
    """The ledger lines of a record of waste; None if it is damaged."""
    content = read_waste_file(layout, name)
    return None if content is None else parse_ledger(io.BytesIO(content), storage.join(waste_folder(layout), name))


def _read_committed(layout: RunLayout, shard: str) -> pa.Table:
    commit = read_commit(layout, shard)
    ledger = read_committed_ledger(layout, commit) if commit is not None else None
    return LEDGER_SCHEMA.empty_table() if ledger is None else ledger


def read_account(
    layout: RunLayout,
    accounting: Accounting,
    commits: Mapping[str, ShardCommit] | None = None,
    *,
    is_waste_recorded: bool = False,
) -> RunAccount:
    """Read the account of a run at which nobody is at work; while somebody is, it is a moment behind.

    Args:
        commits: the run's, by shard; None reads them.
        is_waste_recorded: whether `record_unused` was just done for every committed shard, so that their journals
            need not be read again.
    Raises:
        CommitError: a record or table is missing or damaged.
        OSError: the store failed.
    """
    if commits is None:
        commits = read_commits(layout)
    committed, journaled = {*commits}, {*list_journaled_shards(layout)}
    anew = set[str]() if is_waste_recorded else committed & journaled
    recorded = [
        _read_wasted(layout, name)
        for name in waste_names(layout)
        if not _is_computed(name, name.partition(".")[0], anew)
    ]
    wasted = [ledger_totals(lines) for lines in recorded if lines is not None]
    for shard in sorted(anew):
        unused = _read_unused(layout, shard, _read_committed(layout, shard), accounting)
        wasted += [ledger_totals(unused)] if unused is not None else []
    kept: list[Totals] = []
    num_rows, num_damaged = 0, recorded.count(None)
    for shard in sorted(journaled - committed):
        partial = read_partial(layout, shard, accounting)
        kept.append(ledger_totals(partial.lines))
        num_rows += partial.rows.num_rows
        num_damaged += partial.num_damaged
    return RunAccount(
        sum_totals([commit.totals for commit in commits.values()]),
        sum_totals(kept),
        sum_totals(wasted),
        num_rows,
        num_damaged,
    )


def digest_of_state(layout: RunLayout) -> str:
    """A digest that changes with every commit, record of waste and journaled answer.

    Raises:
        OSError: the store failed.
    """
    journals = sorted(
        [path.rpartition("/_moebeam/")[2], int(info.get("size") or 0)]
        for path, info in storage.list_files(layout.journal)
    )
    return fingerprint([storage.list_names(layout.commits, ".json"), waste_names(layout), journals])
