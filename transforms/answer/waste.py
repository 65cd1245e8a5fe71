"""Waste: what was paid for answers that were not used, kept so that no money is hidden.

Part of *answer*, where an attempt of a shard is given up: a limit was reached, a row must not fail, a step broke. Its
ledger lines, with outcome `wasted`, become one file under `_moebeam/wasted/`; *publish* copies them to `ledger/` and
adds up what they cost. What a process had paid when it was killed is not here: it could tell nobody.

Where answers are journaled none of this happens: the next attempt uses them. What of a shard's journal its committed
ledger does not name was paid for nothing, and becomes waste when the shard is published, each time anew.
"""

import contextlib
import hashlib
import io
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow.parquet as pq

from moebeam.schemas.answers import AccountedAnswer, Totals, ValidatedAnswer
from moebeam.schemas.arrow import parquet_bytes, values_of, with_column
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.durable.commit import ledger_totals
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.money.account import Accounting, account
from moebeam.transforms.plan.sorted_runs import read_rows

WASTED = "wasted"
"""Outcome of these lines in the ledger."""

_SUFFIX = ".parquet-staged"


@dataclass(frozen=True, slots=True)
class Waste:
    """The lines of one attempt that was given up, as a file of the ledger.

    Attributes:
        path: of the published file, relative to the output folder.
    """

    path: str
    num_rows: int
    num_bytes: int
    sha256: str
    totals: Totals


def waste_folder(layout: RunLayout) -> str:
    """Where waste is kept until the run is cleaned, also after its lines are in the ledger."""
    return storage.join(layout.state, "wasted")


def waste_names(layout: RunLayout) -> list[str]:
    """One name for each attempt that was given up."""
    return storage.list_names(waste_folder(layout), _SUFFIX)


def record_waste(
    layout: RunLayout,
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Sequence[AccountedAnswer]],
    accounting: Accounting,
) -> None:
    """Keep the ledger lines of an attempt that will not be committed; nothing where nothing was answered.

    Args:
        answers: the attempts of those of `rows.asked` that have any.
    Raises:
        OSError: the store failed.
    """
    if not answers:
        return
    _write_waste(layout, shard, rows, answers, accounting, uuid.uuid4().hex)
    # From here on the shard's last heartbeat would count the same money again.
    storage.remove_files([layout.heartbeat("answer", shard)])


def record_unused(layout: RunLayout, shard: str, accounting: Accounting) -> None:
    """Keep the ledger lines of journaled answers that a published shard did not use; can be repeated.

    Raises:
        OSError: the store failed.
    """
    entries = read_journal(layout, shard).entries
    if not entries:
        return
    used: set[str] = set()
    with contextlib.suppress(FileNotFoundError), storage.open_input(layout.published("ledger", shard)) as file:
        used = {*values_of(pq.read_table(file, columns=["journal"]), "journal")}
    unused = [entry for entry in entries if entry.reference not in used]
    if not unused:
        return
    validated = (
        ValidatedAnswer(entry.completion, None, entry.completion.error, attempt=entry.attempt) for entry in unused
    )
    answers: dict[int, list[AccountedAnswer]] = {}
    for entry, answer in zip(unused, account(validated, accounting), strict=True):
        row = int(entry.completion.request_id)
        answers.setdefault(row, []).append(replace(answer, journal=entry.reference))
    rows = PlannedRows.of(read_rows(layout.shard_plan(shard)))
    _write_waste(layout, shard, rows, answers, accounting, "journal")


def _write_waste(
    layout: RunLayout,
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Sequence[AccountedAnswer]],
    accounting: Accounting,
    attempt: str,
) -> None:
    answered = replace(rows, asked=tuple(row for row in rows.asked if row in answers))
    ledger = shard_tables(shard, answered, answers, accounting)["ledger"]
    ledger = with_column(ledger, "outcome", [WASTED] * ledger.num_rows)
    path = storage.join(waste_folder(layout), f"{shard}.{attempt}{_SUFFIX}")
    storage.write_whole(path, parquet_bytes(ledger))


def read_waste(layout: RunLayout, name: str) -> Waste:
    """One attempt's lines, added up.

    Raises:
        OSError: the store failed.
    """
    content = storage.read_bytes(storage.join(waste_folder(layout), name))
    ledger = pq.read_table(io.BytesIO(content))
    return Waste(
        path=_published(layout, name).removeprefix(layout.output.rstrip("/") + "/"),
        num_rows=ledger.num_rows,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        totals=ledger_totals(ledger),
    )


def publish_waste(layout: RunLayout) -> list[Waste]:
    """Make all waste visible in the ledger, under names that follow from the attempts; can be repeated."""
    wastes: list[Waste] = []
    for name in waste_names(layout):
        storage.copy_whole(storage.join(waste_folder(layout), name), _published(layout, name))
        wastes.append(read_waste(layout, name))
    return wastes


def _published(layout: RunLayout, name: str) -> str:
    shard, _, attempt = name.removesuffix(_SUFFIX).rpartition(".")
    return layout.published("ledger", f"{shard}-{WASTED}-{attempt}")
