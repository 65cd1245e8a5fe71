"""The queue, over processes that do not do what they should."""

import asyncio
import sys
import time
from pathlib import Path

import pytest

from moebeam.jobs.serve import batch_queue
from moebeam.jobs.serve.batch_process import END_FILE, ORDER_FILE, RunEnd
from moebeam.jobs.serve.batch_queue import MAX_FAILURES, BatchQueue
from moebeam.jobs.serve.records import Batch, StoredFile
from moebeam.jobs.serve.shelf import Shelf
from moebeam.jobs.serve.upload import FileSize, measure_file
from moebeam.schemas.store.record_json import encode_record


async def run_batch(
    shelf: Shelf, content: Path, command: list[str], *, is_cancelled: bool = False
) -> tuple[Batch, int]:
    """Run a batch whose process is `command` and its order's path; also how often it was started.

    Args:
        is_cancelled: the batch was cancelled after an earlier process of it had started.
    """
    num_started = 0

    def make_command(*args: str) -> list[str]:
        nonlocal num_started
        num_started += 1
        return [*command, args[-1]]

    now, ended = int(time.time()), asyncio.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_queue, "python_command", make_command)
        patch.setattr(batch_queue, "_RETRY_S", 0.0)
        patch.setattr(batch_queue, "_LOOK_S", 0.01)
        size = measure_file(content)
        file = StoredFile(
            file_id="file-1",
            tenant="t",
            filename="in.jsonl",
            purpose="batch",
            num_bytes=size.num_bytes,
            num_lines=size.num_lines,
            sha256=size.sha256,
            created_at=now,
        )
        await shelf.put_file(file, content)
        batch = Batch(
            batch_id="batch_1",
            tenant="t",
            input_file_id="file-1",
            endpoint="/v1/chat/completions",
            completion_window="24h",
            created_at=now,
            expires_at=now + 3600,
        )
        if is_cancelled:
            batch = batch.enter("in_progress").enter("cancelling")
            shelf.made_folder(batch).mkdir(parents=True)
            (shelf.made_folder(batch) / ORDER_FILE).touch()
        await shelf.put_batch(batch)
        queue = BatchQueue(shelf, "job.toml", num_runs=1, on_end=lambda batch: ended.set())
        task = asyncio.create_task(queue.run())
        await asyncio.wait_for(ended.wait(), 60)
        queue.stop()
        await asyncio.wait_for(task, 60)
    return Shelf.open(shelf.folder).batches["batch_1"], num_started


def test_a_process_that_leaves_no_word_is_started_so_often_and_no_oftener(tmp_path: Path) -> None:
    content = tmp_path / "in"
    content.write_bytes(b'{"custom_id": "a"}\n')
    batch, num_started = asyncio.run(run_batch(Shelf.open(tmp_path / "s"), content, [sys.executable, "-c", ""]))
    assert (batch.status, num_started) == ("failed", MAX_FAILURES)
    assert [(error.code, "without a word" in error.message) for error in batch.errors] == [("run_failed", True)]


def test_a_process_that_starts_to_end_a_cancelled_batch_is_left_to_do_so(tmp_path: Path) -> None:
    content, script = tmp_path / "in", tmp_path / "late.py"
    content.write_bytes(b'{"custom_id": "a"}\n')
    end = encode_record(RunEnd(kind="stopped"))
    script.write_text(
        "import pathlib, sys, time\ntime.sleep(0.5)\n"
        f"(pathlib.Path(sys.argv[1]).parent / {END_FILE!r}).write_bytes({end!r})\n"
    )
    command = [sys.executable, str(script)]
    batch, num_started = asyncio.run(run_batch(Shelf.open(tmp_path / "s"), content, command, is_cancelled=True))
    assert (batch.status, num_started) == ("cancelled", 1)


@pytest.mark.parametrize(("content", "code"), [(b"\n \n", "empty_file"), (b"\nnot JSON\n", "invalid_json_line")])
def test_a_file_without_a_request_fails_its_batch_before_anything_is_started(
    tmp_path: Path, content: bytes, code: str
) -> None:
    (tmp_path / "in").write_bytes(content)
    batch, num_started = asyncio.run(run_batch(Shelf.open(tmp_path / "s"), tmp_path / "in", []))
    assert (batch.status, [error.code for error in batch.errors], num_started) == ("failed", [code], 0)


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 100])
def test_lines_are_counted_however_they_are_cut(chunk_bytes: int) -> None:
    content = b"a\n\n \nb c\n\td\n  \ne"
    size = FileSize()
    for start in range(0, len(content), chunk_bytes):
        size.add(content[start : start + chunk_bytes])
    assert (size.num_bytes, size.num_lines) == (len(content), 4)
