"""A launcher that may start too few threads says so before anything waits for them."""

import threading

import pytest

from moebeam.jobs.check.process_limits import NUM_THREADS, check_process_limits
from moebeam.schemas.errors import PipelineFailed


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_too_few_threads_are_told_with_their_limits(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real, started = threading.Thread.start, list[threading.Thread]()

    def start(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise error
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(PipelineFailed, match=rf"expected .* {NUM_THREADS} more threads, found 3: .*ulimit -u"):
        check_process_limits()
    assert not any(thread.is_alive() for thread in started)


def test_threads_of_the_check_are_gone_afterwards() -> None:
    before = threading.active_count()
    check_process_limits()
    assert threading.active_count() <= before
