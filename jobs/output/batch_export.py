"""A run's answers as the two files of OpenAI's Batch API: `output.jsonl` and `error.jsonl`.

Implements `moebeam export OUTPUT --openai-batch FOLDER`, after *publish*. Specification: OpenAI's batch request output
object, whose body is a chat completion. The results of a row are one line of the first file, a choice a sample, and its
rejects one of the second, in the tables' order; the same run gives the same bytes. Memory holds a few hundred rows and
the times of one shard.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import pyarrow as pa

from moebeam.jobs.output.batch_responses import AnswerTimes, Row, Samples, answer_line, error_line, format_line
from moebeam.jobs.output.current_run import read_partials
from moebeam.jobs.output.run_record import RunRecord
from moebeam.jobs.output.run_tables import RunShard, RunStatus, find_shards, read_batches
from moebeam.schemas.arrow import list_values
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import CommitError, JobFileError, OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.streamed_file import Write, streamed_file
from moebeam.schemas.tables import TABLES, Table

OUTPUT_FILE = "output.jsonl"
ERROR_FILE = "error.jsonl"

_BATCH_ROWS = 256
_COLUMNS = (
    "custom_id",
    "output_text",
    "reasoning_content",
    "tool_calls",
    "finish_reason",
    "error_type",
    "error_message",
    "error_stage",
    "attempts",
    "logprobs",
    "model",
    "model_revision",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "merged_into",
    "run_id",
    "source_file",
    "source_row",
    "scope",
    "num_rows",
)

_LATER_COLUMNS = ("top_logprobs", "sample")
"""Columns that tables of older versions lack."""

_TIME_COLUMNS = ("custom_id", "started_at", "latency_ms")
_STATUSES = ("ok", "rejected")

_MakeLine: TypeAlias = Callable[[Samples, AnswerTimes], dict[str, Json]]


@dataclass(frozen=True, slots=True)
class BatchExport:
    """The written files, and how complete the run is.

    Attributes:
        num_journaled: how many of both come from journals: they are as the model gave them, and not validated yet.
        num_damaged: answers in journals that cannot be read and are in neither file.
    """

    run_status: RunStatus
    output_file: str
    error_file: str
    num_answers: int
    num_errors: int
    num_journaled: int = 0
    num_damaged: int = 0

    def to_json(self) -> dict[str, Json]:
        return {
            "run_status": self.run_status,
            "output_file": self.output_file,
            "error_file": self.error_file,
            "num_answers": self.num_answers,
            "num_errors": self.num_errors,
            "num_journaled": self.num_journaled,
            "num_damaged_journal_lines": self.num_damaged,
        }


def export_batch(record: RunRecord, folder: str, *, is_partial: bool = False) -> BatchExport:
    """Write both files of a run into a folder, replacing older ones.

    Args:
        folder: on disk or in an object store.
        is_partial: export what an unfinished run has: committed shards, and journaled answers of the others.
    Raises:
        JobFileError: the folder is one of the run's own.
        OutputError: the run is unfinished, one of its files is missing or damaged, or the folder cannot be written.
    """
    layout = record.layout
    _check_folder(layout, folder)
    status, shards = find_shards(layout, is_partial=is_partial)
    output_file, error_file = storage.join(folder, OUTPUT_FILE), storage.join(folder, ERROR_FILE)
    num_answers = num_errors = num_journaled = num_damaged = 0
    try:
        with streamed_file(output_file) as write_answer, streamed_file(error_file) as write_error:
            for shard in shards:
                times = _read_answer_times(shard)
                num_answers += _write_rows(shard, "results", write_answer, times)
                num_errors += _write_rows(shard, "rejects", write_error, times)
            for partial in read_partials(layout) if status == "incomplete" else ():
                arrived: dict[str, int] = {}
                _note_answer_times(partial.lines, arrived)
                read = partial.rows.select([*_COLUMNS, *_LATER_COLUMNS, "status"]).to_pylist()
                rows = {name: [row for row in read if row["status"] == name] for name in _STATUSES}
                num_answers += _write_lines(rows["ok"], write_answer, answer_line, arrived)
                num_errors += _write_lines(rows["rejected"], write_error, error_line, arrived)
                num_journaled += partial.rows.num_rows
                num_damaged += partial.num_damaged
    except (CommitError, OSError) as error:
        raise OutputError(f"{folder}: the batch files cannot be written: {error}") from error
    return BatchExport(status, output_file, error_file, num_answers, num_errors, num_journaled, num_damaged)


def _check_folder(layout: RunLayout, folder: str) -> None:
    for own in (layout.state, layout.partial, *map(layout.table, TABLES)):
        if f"{storage.normalize_path(folder)}/".startswith(f"{storage.normalize_path(own)}/"):
            raise JobFileError(
                f"--openai-batch: expected a folder outside of {own}, which is the run's, found {folder}"
            )


def _read_answer_times(shard: RunShard) -> AnswerTimes:
    """Read when each request of a shard was answered; only rows sent to the model have ledger lines."""
    times: dict[str, int] = {}
    for batch in read_batches(shard["ledger"], _TIME_COLUMNS) if "ledger" in shard else ():
        _note_answer_times(batch, times)
    return times


def _note_answer_times(ledger: pa.Table | pa.RecordBatch, times: dict[str, int]) -> None:
    columns = (list_values(ledger, name) for name in _TIME_COLUMNS)
    for custom_id, started_at, latency_ms in zip(*columns, strict=True):
        answered_at = math.floor(started_at.timestamp() + (latency_ms or 0.0) / 1000)
        times[custom_id] = max(answered_at, times.get(custom_id, 0))


def _write_rows(shard: RunShard, table: Table, write: Write, times: AnswerTimes) -> int:
    batches = read_batches(shard[table], _COLUMNS, _LATER_COLUMNS) if table in shard else ()
    rows = (row for batch in batches for row in batch.to_pylist())
    return _write_lines(rows, write, answer_line if table == "results" else error_line, times)


def _write_lines(rows: Iterable[Row], write: Write, make_line: _MakeLine, times: AnswerTimes) -> int:
    """Write a line for each row of the input; returns the number of rows of the table, which are in input order."""
    num_rows = 0
    lines: list[str] = []
    for _, group in groupby(rows, key=lambda row: (row["source_file"], row["source_row"], row["scope"])):
        samples = list(group)
        num_rows += len(samples)
        lines.append(format_line(make_line(samples, times)))
        if len(lines) == _BATCH_ROWS:
            write("".join(lines).encode())
            lines.clear()
    write("".join(lines).encode())
    return num_rows
