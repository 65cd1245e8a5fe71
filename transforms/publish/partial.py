"""Partial answers: what is journaled of shards that are not committed, as tables.

Part of *publish*, of a run that was stopped or killed. `partial/` has a file a shard with a line an answer, priced and
named as its ledger line will be. The files are made anew from the journals and removed when the run is complete.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moebeam.schemas.answers import AccountedAnswer
from moebeam.schemas.arrow import encode_parquet_file, replace_column
from moebeam.schemas.canonical import Json
from moebeam.schemas.column_types import loosen_sizes
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA, PARTIAL_SCHEMA
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.answer.waste import account_entries
from moebeam.transforms.durable.journal_file import list_journaled_shards, read_journal
from moebeam.transforms.durable.journal_lines import is_paid
from moebeam.transforms.money.account import Accounting

JOURNALED = "journaled"
"""Outcome of these lines."""

_SUFFIX = ".parquet"


@dataclass(frozen=True, slots=True)
class PartialShard:
    """Journaled answers of a shard that is not committed.

    Attributes:
        lines: in `PARTIAL_SCHEMA`, in token order.
        rows: those that have an answer, merged rows included, as *answer* would write them without validation: columns
            of results and rejects in plan order.
        num_damaged: lines of the journal that cannot be read; what they cost is unknown.
    """

    lines: pa.Table
    rows: pa.Table
    num_damaged: int


def read_partial(layout: RunLayout, shard: str, accounting: Accounting) -> PartialShard:
    """Read and price the journal of a shard.

    Raises:
        OSError: the store failed.
    """
    found = read_journal(layout, shard)
    rows, answers, num_unusable = account_entries(layout, shard, found.entries, accounting)
    # A call that was given up, or was in flight at a kill, brought no answer.
    arrived = {row: kept for row, attempts in answers.items() if (kept := [a for a in attempts if _is_answer(a)])}
    return PartialShard(
        _lines(shard, rows, answers, accounting),
        _answered_rows(shard, rows, arrived, accounting),
        found.num_damaged + num_unusable,
    )


def _is_answer(answer: AccountedAnswer) -> bool:
    return is_paid(answer.answer.completion)


def _lines(
    shard: str, rows: PlannedRows, answers: dict[int, list[AccountedAnswer]], accounting: Accounting
) -> pa.Table:
    asked = rows.with_asked(answers)
    ledger = shard_tables(shard, asked, answers, accounting)["ledger"]
    ledger = replace_column(ledger, "outcome", [JOURNALED] * ledger.num_rows)
    in_order = [answer.answer for row in asked.asked for answer in answers[row]]
    texts: dict[str, list[Any]] = {
        "output_text": [answer.completion.text for answer in in_order],
        "reasoning_content": [answer.completion.reasoning_content for answer in in_order],
        "tool_calls": [
            [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in answer.completion.tool_calls]
            or None
            for answer in in_order
        ],
        "error_message": [None if answer.error is None else str(answer.error) for answer in in_order],
    }
    added = [pa.array(values, PARTIAL_SCHEMA.field(name).type) for name, values in texts.items()]
    return pa.table([*(ledger.column(name) for name in LEDGER_SCHEMA.names), *added], schema=PARTIAL_SCHEMA)


def _answered_rows(
    shard: str, rows: PlannedRows, answers: dict[int, list[AccountedAnswer]], accounting: Accounting
) -> pa.Table:
    """The last answer of each row decides; rows that were not asked, or not answered, are left out."""
    kept, places = rows.restrict_to(answers)
    tables = shard_tables(shard, kept, {places[row]: attempts for row, attempts in answers.items()}, accounting)
    return pa.concat_tables([loosen_sizes(tables["results"]), tables["rejects"]])


def write_partials(layout: RunLayout, accounting: Accounting, committed: Collection[str]) -> list[dict[str, Json]]:
    """Write `partial/` anew: a file for each journaled shard that is not committed, and no other; idempotent.

    Returns:
        The files, as the manifest lists them.
    Raises:
        OSError: the store failed.
    """
    files: list[dict[str, Json]] = []
    for shard in list_journaled_shards(layout):
        if shard in committed or not (lines := read_partial(layout, shard, accounting).lines).num_rows:
            continue
        path, content = layout.partial_file(shard), encode_parquet_file(lines)
        storage.write_whole(path, content)
        files.append(
            {
                "path": layout.relative(path),
                "num_rows": lines.num_rows,
                "num_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    kept = {str(file["path"]).rpartition("/")[2] for file in files}
    stale = [name for name in storage.list_names(layout.partial, _SUFFIX) if name not in kept]
    storage.remove_files([storage.join(layout.partial, name) for name in stale])
    return files
