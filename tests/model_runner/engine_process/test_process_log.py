"""The end of a process's log."""

import io
import logging

import pytest

from moebeam.model_runner.engine_process.process_log import ProcessLog


def test_only_the_last_lines_are_held_and_every_line_is_told_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    log = ProcessLog(io.BytesIO(b"one\ntwo\r\nthree"), logging.getLogger("engine"), max_lines=2)
    log.wait(timeout_s=60)
    assert list(log) == ["two", "three"]
    assert caplog.messages == ["one", "two", "three"]


def test_bytes_that_are_no_text_do_not_end_the_log() -> None:
    stderr = io.BytesIO(b"\xff\xfe\nafter\n")
    log = ProcessLog(stderr, logging.getLogger("engine"), max_lines=9)
    log.wait(timeout_s=60)
    assert list(log)[-1] == "after"
    assert stderr.closed
