"""One batch's run, in a process of its own: `python -m moebeam.jobs.serve.batch_process ORDER.json`.

Runs the server's job file over the batch's input, writes the answers as OpenAI's two files, and last the end of the run
as JSON beside them. It needs no server: one that was killed finds the end when it starts again.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from moebeam.jobs.check.job_file import load_job
from moebeam.jobs.console.signals import draining_signals
from moebeam.jobs.output.batch_export import ERROR_FILE, OUTPUT_FILE, export_batch
from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.serve.records import Usage
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import JobError, JobFileError, JobInterrupted, OutputError
from moebeam.schemas.redaction.hide import hide_in_message
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import decode_record, encode_record
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.read.batch_lines import read_custom_id

END_FILE = "end.json"
ORDER_FILE = "order.json"

RunEndKind: TypeAlias = Literal["complete", "deadline", "stopped", "refused", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """What a batch's process is told.

    Attributes:
        job: the server's job file.
        made: folder for the files that it makes.
        batch_id: for the ids of lines that nothing answered.
        expires_at: when the completion window ends, in seconds since the epoch.
        is_cancelled: export what there is, and run nothing.
    """

    job: str
    input: str
    output: str
    made: str
    tenant: str
    batch_id: str
    expires_at: int
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """How a batch's run ended.

    Attributes:
        kind: `refused` if the job cannot run as it is, `failed` if it may go on when it is started again.
        num_completed, num_failed: lines of the two files.
    """

    kind: RunEndKind
    message: str = ""
    num_completed: int = 0
    num_failed: int = 0
    usage: Usage | None = None
    model: str | None = None


def read_order(path: Path) -> BatchOrder:
    """Read what a batch's process was told."""
    return decode_record(path.read_bytes(), BatchOrder)


def main(order_path: str) -> int:
    """Run one batch; 0 if it ended in a way that its server can go on from."""
    order = read_order(Path(order_path))
    end = run_batch(order)
    storage.write_whole(str(Path(order.made) / END_FILE), encode_record(end))
    return 0


def run_batch(order: BatchOrder) -> RunEnd:
    """Run a batch as far as it goes, and export its answers if it goes no further."""
    kind: RunEndKind
    usage: Usage | None = None
    message = ""
    model: str | None = None
    try:
        deadline = datetime.fromtimestamp(order.expires_at, UTC).isoformat()
        settings = {
            "input.path": order.input,
            "input.format": "jsonl",
            "input.tenant": order.tenant,
            "output.path": order.output,
            "limits.deadline": deadline,
        }
        job = load_job(order.job, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        model = job.model.name
        if order.is_cancelled:
            kind = "stopped"
        elif time.time() >= order.expires_at:
            kind = "deadline"
        else:
            from moebeam.jobs.run.launch import launch

            with draining_signals(drain_s=job.failures.drain_s, output=job.output.path, is_process_ours=True) as stop:
                summary = launch(job, stop=stop)
            kind = "complete" if summary.status in ("succeeded", "already_done") else _name_stop(summary.reason)
            message = summary.message or ""
            usage = Usage(
                prompt_tokens=summary.prompt_tokens or 0,
                cached_tokens=summary.cached_tokens or 0,
                completion_tokens=summary.completion_tokens or 0,
                reasoning_tokens=summary.reasoning_tokens or 0,
            )
    except JobInterrupted as error:
        kind, message = "stopped", str(error)
    except (JobFileError, OutputError) as error:
        return RunEnd(kind="refused", message=hide_in_message(str(error)))
    except JobError as error:
        return RunEnd(kind="failed", message=hide_in_message(str(error)))
    num_completed, num_failed = _write_files(order, kind, is_run=True)
    return RunEnd(
        kind=kind,
        message=hide_in_message(message),
        num_completed=num_completed,
        num_failed=num_failed,
        usage=usage,
        model=model,
    )


def end_unstarted(order: BatchOrder) -> RunEnd:
    """End a batch that was cancelled, or whose window ended, before its run was started: without a process."""
    kind: RunEndKind = "stopped" if order.is_cancelled else "deadline"
    num_completed, num_failed = _write_files(order, kind, is_run=False)
    return RunEnd(kind=kind, num_completed=num_completed, num_failed=num_failed)


def _name_stop(reason: str | None) -> RunEndKind:
    if reason == "deadline":
        return "deadline"
    return "stopped" if reason == "signal" else "failed"


def _write_files(order: BatchOrder, kind: RunEndKind, *, is_run: bool) -> tuple[int, int]:
    """Write both files; lines that nothing answered are errors of their own. Returns how many lines each has."""
    made = Path(order.made)
    made.mkdir(parents=True, exist_ok=True)
    for name in (OUTPUT_FILE, ERROR_FILE):
        (made / name).write_bytes(b"")
    # A run that ended before it claimed its folder left nothing to export.
    if is_run and (kind == "complete" or storage.exists(RunLayout(order.output).job)):
        export_batch(read_record(order.output), order.made, is_partial=kind != "complete")
    if kind != "complete":
        answered = {custom_id for name in (OUTPUT_FILE, ERROR_FILE) for custom_id in _list_ids(made / name)}
        code = "batch_expired" if kind == "deadline" else "batch_cancelled"
        text = "the batch's completion window ended" if kind == "deadline" else "the batch was cancelled"
        with open(made / ERROR_FILE, "ab") as sink:
            for number, custom_id in enumerate(_list_ids(Path(order.input))):
                if custom_id not in answered:
                    line: dict[str, Json] = {
                        "id": f"batch_req_{order.batch_id.removeprefix('batch_')}_{number}",
                        "custom_id": custom_id,
                        "response": None,
                        "error": {"code": code, "message": f"{text} before this request was answered"},
                    }
                    sink.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    return _count_lines(made / OUTPUT_FILE), _count_lines(made / ERROR_FILE)


def _list_ids(path: Path) -> Iterator[str | None]:
    """The `custom_id` of each line that is not blank; None where there is none that can be read."""
    with open(path, "rb") as source:
        for line in source:
            if line.strip():
                yield read_custom_id(line)


def _count_lines(path: Path) -> int:
    with open(path, "rb") as source:
        return sum(1 for _ in source)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
