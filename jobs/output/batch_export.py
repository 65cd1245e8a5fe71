"""A run's answers as the two files of OpenAI's Batch API: `output.jsonl` and `error.jsonl`.

Implements `moebeam export OUTPUT --openai-batch FOLDER`, after *publish*. Specification: OpenAI's batch request output
object, whose body is a chat completion. Each result is a line of the first file and each reject a line of the second,
in the tables' order; the same run gives the same bytes. Memory holds a few hundred rows and the times of one shard.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.output.current_run import read_current_run, read_partials
from moebeam.jobs.output.run_record import RunRecord
from moebeam.jobs.output.run_state import read_manifest
from moebeam.schemas.arrow import list_values
from moebeam.schemas.canonical import Json, fingerprint
from moebeam.schemas.errors import CommitError, JobFileError, OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.streamed_file import Write, streamed_file
from moebeam.schemas.tables import TABLES, Table
from moebeam.transforms.durable.commit import list_committed_shards, read_commit

OUTPUT_FILE = "output.jsonl"
ERROR_FILE = "error.jsonl"

_BATCH_ROWS = 256
_LEAST_LOGPROB = -9999.0
"""OpenAI's value for a token of almost no probability; JSON has no infinity."""

_OPENAI_FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter")
_LINE_BREAKS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""JSON allows these unescaped in strings, but readers that split at Unicode line breaks would break there."""

_STATUS_CODES: Mapping[str, int] = {
    "refused": 400,
    "request_refused": 400,
    "invalid_grammar": 400,
    "engine_overloaded": 503,
    "answer_interrupted": 503,
    "engine_timeout": 504,
    "malformed_response": 502,
}
"""Error type -> HTTP status of a response without an answer; 500 for all others."""

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

_LATER_COLUMNS = ("top_logprobs",)
"""Columns that tables of older versions lack."""

_TIME_COLUMNS = ("custom_id", "started_at", "latency_ms")
_STATUSES = ("ok", "rejected")

Row: TypeAlias = Mapping[str, Any]
AnswerTimes: TypeAlias = Mapping[str, int]
"""custom_id -> when its last attempt was answered, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class BatchExport:
    """The written files, and how complete the run is.

    Attributes:
        num_journaled: how many of both come from journals: they are as the model gave them, and not validated yet.
    """

    run_status: Literal["complete", "incomplete"]
    output_file: str
    error_file: str
    num_answers: int
    num_errors: int
    num_journaled: int = 0

    def to_json(self) -> dict[str, Json]:
        return {
            "run_status": self.run_status,
            "output_file": self.output_file,
            "error_file": self.error_file,
            "num_answers": self.num_answers,
            "num_errors": self.num_errors,
            "num_journaled": self.num_journaled,
        }


@dataclass(frozen=True, slots=True)
class _ShardFile:
    path: str
    num_rows: int


_Shard: TypeAlias = Mapping[Table, _ShardFile]
"""A shard's files; an empty table has none."""


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
    status, shards = _find_shards(layout, is_partial=is_partial)
    output_file, error_file = storage.join(folder, OUTPUT_FILE), storage.join(folder, ERROR_FILE)
    num_answers = num_errors = num_journaled = 0
    try:
        with streamed_file(output_file) as write_answer, streamed_file(error_file) as write_error:
            for shard in shards:
                times = _read_answer_times(shard)
                num_answers += _write_rows(shard, "results", write_answer, times)
                num_errors += _write_rows(shard, "rejects", write_error, times)
            for partial in read_partials(layout) if status == "incomplete" else ():
                times = _list_answer_times(partial.lines)
                rows = {name: [row for row in partial.rows.to_pylist() if row["status"] == name] for name in _STATUSES}
                write_answer("".join(format_line(answer_line(row, times)) for row in rows["ok"]).encode())
                write_error("".join(format_line(error_line(row, times)) for row in rows["rejected"]).encode())
                num_answers += len(rows["ok"])
                num_errors += len(rows["rejected"])
                num_journaled += partial.rows.num_rows
    except (CommitError, OSError) as error:
        raise OutputError(f"{folder}: the batch files cannot be written: {error}") from error
    return BatchExport(status, output_file, error_file, num_answers, num_errors, num_journaled)


def _check_folder(layout: RunLayout, folder: str) -> None:
    for own in (layout.state, layout.partial, *map(layout.table, TABLES)):
        if f"{storage.normalize_path(folder)}/".startswith(f"{storage.normalize_path(own)}/"):
            raise JobFileError(
                f"--openai-batch: expected a folder outside of {own}, which is the run's, found {folder}"
            )


def _find_shards(layout: RunLayout, *, is_partial: bool) -> tuple[Literal["complete", "incomplete"], list[_Shard]]:
    """Find the files of a run, shard by shard, in the tables' order."""
    try:
        manifest = read_current_run(layout).manifest if is_partial else read_manifest(layout)
    except (CommitError, OSError) as error:
        raise OutputError(f"{layout.output}: cannot be looked at: {error}") from error
    if manifest is not None and manifest["status"] == "complete":
        return "complete", _read_manifest_shards(layout, manifest)
    if is_partial:
        return "incomplete", list(_read_committed_shards(layout))
    raise OutputError(
        f"{layout.output}: expected a finished run, found one that is not; moebeam resume {layout.output} finishes it, "
        "--partial exports what it has"
    )


def _read_manifest_shards(layout: RunLayout, manifest: Mapping[str, Any]) -> list[_Shard]:
    found: dict[str, dict[Table, _ShardFile]] = {}
    for table in TABLES:
        for file in manifest["files"][table]:
            path = storage.join(layout.output, file["path"])
            # A shard's tables share one name; ledger files of wasted work have other names.
            name = path.rpartition("/")[2]
            if table != "ledger" or name in found:
                found.setdefault(name, {})[table] = _ShardFile(path, file["num_rows"])
    return [found[name] for name in sorted(found)]


def _read_committed_shards(layout: RunLayout) -> Iterator[_Shard]:
    try:
        for name in list_committed_shards(layout):
            commit = read_commit(layout, name)
            if commit is None:
                raise OutputError(f"{layout.shard_commit(name)}: expected a commit record, found none")
            shard: dict[Table, _ShardFile] = {}
            for file in commit.files:
                published = layout.published_file(file.table, commit.shard)
                is_published = storage.exists(published)
                path = published if is_published else storage.join(layout.output, file.path)
                shard[file.table] = _ShardFile(path, file.num_rows)
            yield shard
    except (CommitError, OSError) as error:
        raise OutputError(f"{layout.output}: its commits cannot be read: {error}") from error


def _read_batches(file: _ShardFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read some columns of a table's file.

    Raises:
        OutputError: the file is missing, damaged, or of a version with other columns.
    """
    try:
        with storage.open_input(file.path) as source, pq.ParquetFile(source, pre_buffer=False) as parquet:
            missing = [name for name in columns if name not in parquet.schema_arrow.names]
            if missing:
                raise OutputError(f"{file.path}: expected the columns {', '.join(missing)}, found none of these names")
            if parquet.metadata.num_rows != file.num_rows:
                raise OutputError(f"{file.path}: expected {file.num_rows} rows, found {parquet.metadata.num_rows}")
            later = [name for name in _LATER_COLUMNS if name in parquet.schema_arrow.names]
            yield from parquet.iter_batches(_BATCH_ROWS, columns=[*columns, *later], use_threads=False)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise OutputError(f"{file.path}: expected a table of the run, found: {error}") from error


def _read_answer_times(shard: _Shard) -> AnswerTimes:
    """Read when each request of a shard was answered; only rows sent to the model have ledger lines."""
    times: dict[str, int] = {}
    for batch in _read_batches(shard["ledger"], _TIME_COLUMNS) if "ledger" in shard else ():
        times |= _list_answer_times(batch)
    return times


def _list_answer_times(ledger: pa.Table | pa.RecordBatch) -> dict[str, int]:
    columns = (list_values(ledger, name) for name in _TIME_COLUMNS)
    # A row's attempts are in order, so the last one wins.
    return {
        custom_id: math.floor(started_at.timestamp() + (latency_ms or 0.0) / 1000)
        for custom_id, started_at, latency_ms in zip(*columns, strict=True)
    }


def _write_rows(shard: _Shard, table: Table, write: Write, times: AnswerTimes) -> int:
    make_line = answer_line if table == "results" else error_line
    num_rows = 0
    for batch in _read_batches(shard[table], _COLUMNS) if table in shard else ():
        write("".join(format_line(make_line(row, times)) for row in batch.to_pylist()).encode())
        num_rows += batch.num_rows
    return num_rows


def format_line(value: Json) -> str:
    """Format a JSON value as one line, for every definition of a line end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_LINE_BREAKS) + "\n"


def answer_line(row: Row, times: AnswerTimes) -> dict[str, Json]:
    """Build the line of a result."""
    digest = _digest(row)
    return _line(row, digest, _response(digest, 200, _chat_completion(row, digest, times)), None)


def error_line(row: Row, times: AnswerTimes) -> dict[str, Json]:
    """Build the line of a reject.

    A row that was never sent has no response. A row whose answer was not accepted has that answer with status 200,
    because it arrived and was billed. A row without an answer has the status of its failure.
    """
    digest = _digest(row)
    message = row["error_message"]
    if row["scope"] != "row":
        stands_for = "an unknown number of" if row["num_rows"] is None else row["num_rows"]
        message = f"{message} (this line stands for {stands_for} rows)"
    error: dict[str, Json] = {"code": row["error_type"], "message": message}
    if not row["attempts"] and row["merged_into"] is None:
        return _line(row, digest, None, error)
    if row["error_stage"] == "validate" and row["finish_reason"] in _OPENAI_FINISH_REASONS:
        return _line(row, digest, _response(digest, 200, _chat_completion(row, digest, times)), error)
    body: dict[str, Json] = {"error": {**error, "type": row["error_stage"], "param": None}, "usage": _usage(row)}
    return _line(row, digest, _response(digest, _STATUS_CODES.get(row["error_type"], 500), body), error)


def _line(row: Row, digest: str, response: Json, error: Json) -> dict[str, Json]:
    return {"id": f"batch_req_{digest}", "custom_id": row["custom_id"], "response": response, "error": error}


def _response(digest: str, status_code: int, body: Json) -> Json:
    return {"status_code": status_code, "request_id": f"req_{digest}", "body": body}


def _digest(row: Row) -> str:
    """Derive a row's id from its place in the input, because rejected duplicates share a custom_id."""
    return fingerprint([row["run_id"], row["source_file"], row["source_row"], row["scope"]])[:32]


def _chat_completion(row: Row, digest: str, times: AnswerTimes) -> Json:
    text: str | None = row["output_text"]
    calls: list[Json] = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in row["tool_calls"] or ()
    ]
    message: dict[str, Json] = {
        "role": "assistant",
        "content": None if calls and not text else text,
        "refusal": None,
    }
    if row["reasoning_content"] is not None:
        message["reasoning_content"] = row["reasoning_content"]
    if calls:
        message["tool_calls"] = calls
    return {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        # A row reused from an earlier run was not answered in this one.
        "created": times.get(row["merged_into"] or row["custom_id"], 0),
        "model": row["model"] or "",
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": _logprobs(row["logprobs"], row.get("top_logprobs")),
                "finish_reason": row["finish_reason"],
            }
        ],
        "usage": _usage(row),
        "system_fingerprint": row["model_revision"] or None,
    }


def _logprobs(logprobs: Sequence[float] | None, likeliest: Sequence[Sequence[Row]] | None) -> Json:
    """Log probabilities; a run keeps the texts of the likeliest tokens, not those of the drawn ones."""
    if logprobs is None:
        return None
    return {
        "content": [
            {
                "token": "",
                "bytes": None,
                "logprob": _finite(logprob),
                "top_logprobs": [
                    {"token": likely["token"], "bytes": None, "logprob": _finite(likely["logprob"])} for likely in place
                ],
            }
            for logprob, place in zip(logprobs, likeliest or [()] * len(logprobs), strict=True)
        ],
        "refusal": None,
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def _usage(row: Row) -> Json:
    """Usage of all attempts of a row; unknown tokens are null, not zero."""
    prompt, completion, cached = row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]
    if prompt is None or completion is None:
        return None
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": row["reasoning_tokens"]},
    }
