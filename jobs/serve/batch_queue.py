"""Runs batches, a few at a time, each in a process of its own, and brings their ends to the shelf.

A batch that waits or runs is known by its record alone. A server that starts takes up those that are not ended: it
waits for a process that outlived the last server, and starts the others again, which go on where they stopped.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from moebeam.jobs.output.batch_export import ERROR_FILE, OUTPUT_FILE
from moebeam.jobs.output.run_state import RunWatch
from moebeam.jobs.serve.batch_process import END_FILE, ORDER_FILE, BatchOrder, RunEnd, end_unstarted, read_order
from moebeam.jobs.serve.records import Batch, BatchError, BatchStatus, StoredFile
from moebeam.jobs.serve.shelf import Shelf
from moebeam.jobs.serve.upload import measure_file
from moebeam.model_runner.python_process import python_command, python_environment
from moebeam.schemas.errors import CommitError
from moebeam.schemas.store.record_json import encode_record, read_record
from moebeam.schemas.store.run_layout import RunLayout

MAX_FAILURES = 5
"""How often the runs of a batch may fail; a stop of the server is no failure."""

_RETRY_S = 5.0
_LOOK_S = 1.0
_JANITOR_S = 30.0
_PROCESS_FILE = "process.json"
_MAX_MESSAGE = 2_000
_LOGGER = logging.getLogger(__name__)


class BatchQueue:
    """Takes the batches of a shelf from `validating` to their end."""

    def __init__(
        self, shelf: Shelf, job: str, *, num_runs: int, on_end: Callable[[Batch], None] = lambda batch: None
    ) -> None:
        self._shelf = shelf
        self._job = job
        self._num_runs = num_runs
        self._on_end = on_end
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._processes: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._is_stopping = False

    def notice(self) -> None:
        """Look for batches that wait, now rather than later."""
        self._wake.set()

    async def run(self) -> None:
        """Work until `stop`; then stop all runs, which go on when a server starts again."""
        while not self._is_stopping:
            self._start_waiting()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_JANITOR_S):
                    await self._wake.wait()
            await self._remove_expired_files()
        for batch_id in list(self._processes):
            self._signal(batch_id)
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def stop(self) -> None:
        """Let `run` return. Not by cancelling it, which a batch that ends at this moment could hide."""
        self._is_stopping = True
        self.notice()

    def cancel(self, batch: Batch) -> None:
        """Stop the run of a batch that is `cancelling`; one that waits is ended by its turn."""
        self._signal(batch.batch_id)
        self.notice()

    def _start_waiting(self) -> None:
        """Start batches while there is room: the tenant with the fewest at work first, and of it the oldest."""
        while len(self._tasks) < self._num_runs:
            waiting = [
                batch
                for batch in self._shelf.batches.values()
                if not batch.has_ended and batch.batch_id not in self._tasks
            ]
            if not waiting:
                return
            at_work = [self._shelf.batches[batch_id].tenant for batch_id in self._tasks]
            batch = min(waiting, key=lambda batch: (at_work.count(batch.tenant), batch.batch_id))
            task = asyncio.create_task(self._work_off(batch.batch_id), name=batch.batch_id)
            self._tasks[batch.batch_id] = task
            task.add_done_callback(self._end_task)

    def _end_task(self, task: "asyncio.Task[None]") -> None:
        batch_id = task.get_name()
        self._tasks.pop(batch_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOGGER.error("batch %s: %s: %s", batch_id, type(error).__name__, error)
            asyncio.get_running_loop().call_later(_RETRY_S, self.notice)
            return
        self.notice()

    async def _work_off(self, batch_id: str) -> None:
        batch = self._shelf.batches[batch_id]
        if batch.status == "validating":
            validated = await asyncio.to_thread(self._validate, batch)
            # It may have been cancelled meanwhile.
            if self._shelf.batches[batch_id].status == "validating":
                batch = await self._shelf.put_batch(validated)
            if batch.status == "failed":
                self._on_end(batch)
                return
        while not self._is_stopping:
            end = await self._run_once(batch_id) or RunEnd(kind="failed", message="its process ended without a word")
            batch = self._shelf.batches[batch_id]
            if (status := judge_end(batch, end)) is not None:
                self._on_end(await self._finalize(batch, end, status))
                return
            if end.kind == "failed" and not self._is_stopping:
                await self._shelf.put_batch(replace(batch, num_failures=batch.num_failures + 1))
                await asyncio.sleep(_RETRY_S)

    def _validate(self, batch: Batch) -> Batch:
        """Look at a batch's input: a line that is wrong is that line's error, but none at all is the batch's."""
        file = self._shelf.files.get(batch.input_file_id)
        if file is None:
            return batch.fail(
                BatchError(code="file_not_found", message=f"{batch.input_file_id}: there is no such file")
            )
        if not file.num_lines:
            return batch.fail(BatchError(code="empty_file", message="expected a request on each line, found no line"))
        with open(self._shelf.content_path(file), "rb") as source:
            first = next(line for line in source if line.strip())
        try:
            is_object = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            message = "expected a JSON object on each line, found something else on the first one"
            return batch.fail(BatchError(code="invalid_json_line", message=message, line=1))
        return replace(batch.enter("in_progress"), num_lines=file.num_lines)

    async def _run_once(self, batch_id: str) -> RunEnd | None:
        """Run a batch's process to its end, or wait for one of an earlier server; None if it left no word."""
        batch = self._shelf.batches[batch_id]
        made = self._shelf.made_folder(batch)
        pid = await asyncio.to_thread(_find_process, made)
        if pid is None:
            end = await asyncio.to_thread(_read_end, made)
            if end is not None and judge_end(batch, end) is not None:
                return end
            batch = self._shelf.batches[batch_id]
            was_started = (made / ORDER_FILE).exists()
            if not was_started and (batch.status == "cancelling" or batch.expires_at <= time.time()):
                return await asyncio.to_thread(end_unstarted, self._make_order(batch))
            pid = await self._start(batch)
        self._processes[batch_id] = pid
        try:
            is_cancelling = self._shelf.batches[batch_id].status == "cancelling"
            # A process that was told so from the start is about to end by itself, and not yet ready for signals.
            if self._is_stopping or (is_cancelling and not read_order(made / ORDER_FILE).is_cancelled):
                self._signal(batch_id)
            await self._watch(batch_id, made)
        finally:
            del self._processes[batch_id]
        return await asyncio.to_thread(_read_end, made)

    def _make_order(self, batch: Batch) -> BatchOrder:
        file = self._shelf.files[batch.input_file_id]
        return BatchOrder(
            job=self._job,
            input=str(self._shelf.content_path(file)),
            output=str(self._shelf.run_folder(batch)),
            made=str(self._shelf.made_folder(batch)),
            tenant=batch.tenant,
            batch_id=batch.batch_id,
            expires_at=batch.expires_at,
            is_cancelled=batch.status == "cancelling",
        )

    async def _start(self, batch: Batch) -> int:
        made = self._shelf.made_folder(batch)
        made.mkdir(parents=True, exist_ok=True)
        for name in (END_FILE, OUTPUT_FILE, ERROR_FILE, _PROCESS_FILE):
            (made / name).unlink(missing_ok=True)
        (made / ORDER_FILE).write_bytes(encode_record(self._make_order(batch)))
        command = python_command("moebeam.jobs.serve.batch_process", str(made / ORDER_FILE))
        with open(made / "log", "ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=python_environment(),
                # A signal from a terminal is for the server, which passes it on.
                start_new_session=True,
            )
        with contextlib.suppress(psutil.Error):  # it may have ended already
            started = psutil.Process(process.pid).create_time()
            (made / _PROCESS_FILE).write_text(json.dumps({"pid": process.pid, "started": started}))
        return process.pid

    async def _watch(self, batch_id: str, made: Path) -> None:
        """Keep a batch's counts while its process lives."""
        batch = self._shelf.batches[batch_id]
        watch = RunWatch(
            RunLayout(str(self._shelf.run_folder(batch))), rows_total=batch.num_lines or None, currency=None
        )
        while await asyncio.to_thread(_find_process, made) is not None:
            with contextlib.suppress(OSError, CommitError):
                seen = await asyncio.to_thread(watch.snapshot)
                if seen.stage != "plan":
                    batch = self._shelf.batches[batch_id]
                    num_failed = min(seen.num_rejects, batch.num_lines)
                    num_completed = max(0, min(seen.rows_done, batch.num_lines) - num_failed)
                    # Not on disk: after a restart they are read from the run.
                    self._shelf.batches[batch_id] = replace(batch, num_completed=num_completed, num_failed=num_failed)
            await asyncio.sleep(_LOOK_S)

    async def _finalize(self, batch: Batch, end: RunEnd, status: BatchStatus) -> Batch:
        if status == "failed":
            error = BatchError(code="run_failed", message=end.message[:_MAX_MESSAGE])
            return await self._shelf.put_batch(batch.fail(error))
        if status == "completed":
            batch = await self._shelf.put_batch(batch.enter("finalizing"))
        made = self._shelf.made_folder(batch)
        output_id = await self._take(batch, made / OUTPUT_FILE, "output")
        error_id = await self._take(batch, made / ERROR_FILE, "error")
        batch = replace(
            self._shelf.batches[batch.batch_id].enter(status),
            output_file_id=output_id,
            error_file_id=error_id,
            num_completed=end.num_completed,
            num_failed=end.num_failed,
            usage=end.usage,
            model=end.model,
        )
        batch = await self._shelf.put_batch(batch)
        await self._shelf.remove_made(batch)
        return batch

    async def _take(self, batch: Batch, path: Path, name: str) -> str | None:
        """Put a file that a batch made on the shelf, under an id of its own; None if it is empty."""
        file_id = f"file-{batch.batch_id.removeprefix('batch_')}-{name}"
        if file_id in self._shelf.files:  # a server was killed right after
            return file_id
        if not path.exists() or not path.stat().st_size:
            return None
        size = await asyncio.to_thread(measure_file, path)
        now = int(time.time())
        after_s = batch.output_expires_after_s
        file = StoredFile(
            file_id=file_id,
            tenant=batch.tenant,
            filename=f"{batch.batch_id}_{name}.jsonl",
            purpose="batch_output",
            num_bytes=size.num_bytes,
            num_lines=size.num_lines,
            sha256=size.sha256,
            created_at=now,
            expires_at=None if after_s is None else now + after_s,
        )
        await self._shelf.put_file(file, path)
        return file_id

    def _signal(self, batch_id: str) -> None:
        pid = self._processes.get(batch_id)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    async def _remove_expired_files(self) -> None:
        now = time.time()
        needed = {batch.input_file_id for batch in self._shelf.batches.values() if not batch.has_ended}
        for file in list(self._shelf.files.values()):
            if file.expires_at is not None and file.expires_at <= now and file.file_id not in needed:
                await self._shelf.remove_file(file)


def judge_end(batch: Batch, end: RunEnd) -> BatchStatus | None:
    """What a batch becomes after its run ended so; None if it must be started again."""
    if end.kind == "complete":
        return "completed"
    if end.kind == "refused" or (end.kind == "failed" and batch.num_failures + 1 >= MAX_FAILURES):
        return "failed"
    if end.kind == "deadline":
        return "expired"
    return "cancelled" if end.kind == "stopped" and batch.status == "cancelling" else None


def _read_end(made: Path) -> RunEnd | None:
    return read_record(str(made / END_FILE), RunEnd, "the end of a batch's run")


def _find_process(made: Path) -> int | None:
    """The process of a batch that is at work, whichever server started it."""
    with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
        known = json.loads((made / _PROCESS_FILE).read_text())
        process = psutil.Process(known["pid"])
        if process.create_time() == known["started"] and process.status() != psutil.STATUS_ZOMBIE:
            return process.pid
    return None
