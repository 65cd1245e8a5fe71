"""Waste: ledger lines of paid answers that were not used, so that no money is hidden.

Part of *answer*. An attempt at a shard is given up when a limit is reached, a row fails that must not, or a step
breaks. Its ledger lines, with outcome `wasted`, become one file under `_moebeam/wasted/`; *publish* copies them to
`ledger/` and adds up their cost. What a killed process had paid is not here: it could not report it.

With a journal nothing is recorded at that point, since the next attempt uses the answers. Journaled answers that the
committed ledger does not name become waste when the shard is published, computed anew each time.
"""

import contextlib
import hashlib
import io
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow.parquet as pq

from moebeam.schemas.answers import AccountedAnswer, Totals, ValidatedAnswer
from moebeam.schemas.arrow import encode_parquet_file, list_values, replace_column
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.durable.commit import ledger_totals
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.money.account import Accounting, account
from moebeam.transforms.plan.sorted_runs import read_rows

WASTED = "wasted"
"""Outcome of these ledger lines."""

_SUFFIX = ".parquet-staged"


@dataclass(frozen=True, slots=True)
class Waste:
    """Ledger lines of one attempt that was given up, as a published file.

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
    """File names of waste, one for each attempt that was given up."""
    return storage.list_names(waste_folder(layout), _SUFFIX)


def record_waste(
    layout: RunLayout,
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Sequence[AccountedAnswer]],
    accounting: Accounting,
) -> None:
    """Write the ledger lines of an attempt that will not be committed; without answers, write nothing.

    Args:
        answers: row -> its attempts, for those of `rows.asked` that have any.
    Raises:
        OSError: the store failed.
    """
    if not answers:
        return
    _write_waste(layout, shard, rows, answers, accounting, uuid.uuid4().hex)
    # The shard's progress would count the same money again.
    storage.remove_files([layout.progress_file("answer", shard)])


def record_unused(layout: RunLayout, shard: str, accounting: Accounting) -> None:
    """Write the ledger lines of journaled answers that a published shard did not use; idempotent.

    Raises:
        OSError: the store failed.
    """
    entries = read_journal(layout, shard).entries
    if not entries:
        return
    used: set[str] = set()
    with contextlib.suppress(FileNotFoundError), storage.open_input(layout.published_file("ledger", shard)) as file:
        used = {*list_values(pq.read_table(file, columns=["journal"]), "journal")}
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
    rows = PlannedRows.from_table(read_rows(layout.shard_plan(shard)))
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
    ledger = replace_column(ledger, "outcome", [WASTED] * ledger.num_rows)
    path = storage.join(waste_folder(layout), f"{shard}.{attempt}{_SUFFIX}")
    storage.write_whole(path, encode_parquet_file(ledger))


def read_waste(layout: RunLayout, name: str) -> Waste:
    """Read and add up one attempt's lines.

    Raises:
        OSError: the store failed.
    """
    content = storage.read_bytes(storage.join(waste_folder(layout), name))
    ledger = pq.read_table(io.BytesIO(content))
    return Waste(
        path=_published_path(layout, name).removeprefix(layout.output.rstrip("/") + "/"),
        num_rows=ledger.num_rows,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        totals=ledger_totals(ledger),
    )


def publish_waste(layout: RunLayout) -> list[Waste]:
    """Copy all waste to the ledger, under names derived from the attempts; idempotent."""
    wastes: list[Waste] = []
    for name in waste_names(layout):
        storage.copy_whole(storage.join(waste_folder(layout), name), _published_path(layout, name))
        wastes.append(read_waste(layout, name))
    return wastes


def _published_path(layout: RunLayout, name: str) -> str:
    shard, _, attempt = name.removesuffix(_SUFFIX).rpartition(".")
    return layout.published_file("ledger", f"{shard}-{WASTED}-{attempt}")
