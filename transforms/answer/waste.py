"""Waste: ledger lines of paid answers that were not used, so that no money is hidden.

Part of *answer*. Answers of an attempt at a shard that ended before its commit stay in the shard's journal, and the
next attempt uses them. What is journaled and the committed ledger does not name becomes waste when the shard is
published, computed anew each time: answers that two attempts at once or a changed step left over, and calls that may be
billed since they were given up or in flight when their process died. Their ledger lines, with outcome `wasted`, become
one file under `_moebeam/wasted/`, which *publish* copies to `ledger/` and adds up. What a killed process had paid
without a journal is not here: it could not report it.
"""

import hashlib
import io
import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.answers import AccountedAnswer, ShardCommit, Totals, ValidatedAnswer
from moebeam.schemas.arrow import encode_parquet_file, list_values, replace_column
from moebeam.schemas.errors import FileDamaged
from moebeam.schemas.records import Completion
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_file import PARQUET_END, read_sealed, seal
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.answer.unusable.answers import find_unusable
from moebeam.transforms.durable.commit import ledger_totals, open_committed
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.durable.journal_lines import Entry
from moebeam.transforms.money.account import Accounting, account
from moebeam.transforms.plan.sorted_runs import read_rows

_LOGGER = logging.getLogger(__name__)

WASTED = "wasted"
"""Outcome of these ledger lines."""

_SUFFIX = ".parquet-staged"


@dataclass(frozen=True, slots=True)
class Waste:
    """Ledger lines of a shard's answers that were not used, as a published file.

    Attributes:
        path: relative to the output folder.
    """

    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    totals: Totals


def waste_folder(layout: RunLayout) -> str:
    """Where waste stays until the run is cleaned up, even once its lines are in the ledger."""
    return storage.join(layout.state, "wasted")


def waste_names(layout: RunLayout) -> list[str]:
    """File names of waste, one for each shard that has any."""
    return storage.list_names(waste_folder(layout), _SUFFIX)


def record_unused(layout: RunLayout, commit: ShardCommit, accounting: Accounting) -> int:
    """Write the ledger lines of journaled answers that a committed shard did not use; idempotent.

    Returns:
        Bytes of the journal of which the ledger now tells everything.
    Raises:
        CommitError: the shard's ledger is missing or damaged.
        OSError: the store failed.
    """
    kept = read_journal(layout, commit.shard)
    if not kept.entries:
        return kept.num_bytes
    used = set[str]()
    if (source := open_committed(layout, commit, "ledger")) is not None:
        with source:
            used = find_used(pq.read_table(source, columns=["journal"]))
    if (ledger := unused_lines(layout, commit.shard, kept.entries, used, accounting)) is not None:
        path = storage.join(waste_folder(layout), unused_name(commit.shard))
        storage.write_whole(path, seal(encode_parquet_file(ledger)))
    return kept.num_bytes


def find_used(ledger: pa.Table) -> set[str]:
    """The journaled answers that a committed ledger names."""
    return {reference for reference in list_values(ledger, "journal") if reference is not None}


def unused_lines(
    layout: RunLayout, shard: str, entries: Sequence[Entry], used: Container[str], accounting: Accounting
) -> pa.Table | None:
    """The ledger lines of journaled answers that a committed shard did not use; None if there are none.

    Args:
        entries: of the shard's journal.
        used: as `find_used` reads it from the committed ledger.
    Raises:
        OSError: the store failed.
    """
    unused = [entry for entry in entries if entry.reference not in used]
    if not unused:
        return None
    rows, answers, _ = account_entries(layout, shard, unused, accounting)
    return _wasted_lines(shard, rows, answers, accounting) if answers else None


def unused_name(shard: str) -> str:
    """File name of the waste that `record_unused` writes."""
    return f"{shard}.journal{_SUFFIX}"


def account_entries(
    layout: RunLayout, shard: str, entries: Sequence[Entry], accounting: Accounting
) -> tuple[PlannedRows, dict[int, list[AccountedAnswer]], int]:
    """Price journaled answers as an attempt at the shard would.

    Returns:
        The shard's plan, row -> its answers, and how many answers are left out, since no table can hold them.
    """
    rows = PlannedRows.from_table(read_rows(layout.shard_plan(shard)))
    num_all, asked = len(entries), {str(row) for row in rows.asked}
    entries = [entry for entry in entries if entry.completion.request_id in asked]
    completions = [_name_provider(entry.completion) for entry in entries]
    validated = (
        ValidatedAnswer(completion, None, completion.error, attempt=entry.attempt)
        for entry, completion in zip(entries, completions, strict=True)
    )
    answers: dict[int, list[AccountedAnswer]] = {}
    for entry, answer in zip(entries, account(validated, accounting), strict=True):
        row = int(entry.completion.request_id)
        answers.setdefault(row, []).append(replace(answer, journal=entry.reference))
    for row in find_unusable(shard, rows, answers, accounting):
        del answers[row]
    return rows, answers, num_all - sum(map(len, answers.values()))


def _name_provider(completion: Completion) -> Completion:
    """A request that was given up names no provider itself; its lost call does, and so tells in which currency."""
    if completion.provider or not completion.lost_calls:
        return completion
    call = completion.lost_calls[-1]
    return replace(completion, provider=call.provider, model=call.model)


def _wasted_lines(
    shard: str, rows: PlannedRows, answers: Mapping[int, Sequence[AccountedAnswer]], accounting: Accounting
) -> pa.Table:
    ledger = shard_tables(shard, rows.with_asked(answers), answers, accounting)["ledger"]
    return replace_column(ledger, "outcome", [WASTED] * ledger.num_rows)


def read_waste_file(layout: RunLayout, name: str) -> bytes | None:
    """A record of waste, as a Parquet file; None if it is damaged, which stops nobody.

    As long as there is a journal, the next launch writes it again.

    Raises:
        OSError: the store failed.
    """
    try:
        return read_sealed(storage.join(waste_folder(layout), name), PARQUET_END)
    except FileDamaged as error:
        _LOGGER.warning("%s; what it says was paid in vain is in no sum", error)
        return None


def read_waste(layout: RunLayout, name: str) -> Waste | None:
    """Read and add up one attempt's lines; None if the record is damaged.

    Raises:
        OSError: the store failed.
    """
    content = read_waste_file(layout, name)
    return None if content is None else _sum_waste(layout, name, content)


def _sum_waste(layout: RunLayout, name: str, content: bytes) -> Waste:
    ledger = pq.read_table(io.BytesIO(content))
    return Waste(
        path=layout.relative(_published_path(layout, name)),
        num_rows=ledger.num_rows,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        totals=ledger_totals(ledger),
    )


def publish_waste(layout: RunLayout) -> list[Waste]:
    """Publish all waste in the ledger, under names derived from the attempts; idempotent."""
    wastes: list[Waste] = []
    for name in waste_names(layout):
        content = read_waste_file(layout, name)
        if content is not None:
            storage.write_whole(_published_path(layout, name), content)
            wastes.append(_sum_waste(layout, name, content))
    return wastes


def _published_path(layout: RunLayout, name: str) -> str:
    shard, _, attempt = name.removesuffix(_SUFFIX).rpartition(".")
    return layout.published_file("ledger", f"{shard}-{WASTED}-{attempt}")
