"""Stops: a note for all workers, and a word for the threads of the launcher's own process."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable import progress, stop
from moebeam.transforms.durable.progress import OutageNote, OutageWriter, read_outage, read_progress
from moebeam.transforms.durable.stop import (
    BY_SIGNAL,
    StopReason,
    announce_stop,
    find_stop,
    forget_stop,
    hear_stop,
    read_stop,
    request_stop,
    wait_unless_stopped,
)


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[RunLayout]:
    layout = RunLayout(str(tmp_path))
    yield layout
    forget_stop(layout)


def test_the_first_reason_stays(layout: RunLayout) -> None:
    request_stop(layout, first := StopReason("max_cost", "all is spent"))
    request_stop(layout, BY_SIGNAL)
    assert read_stop(layout) == first
    announce_stop(layout, first)
    announce_stop(layout, BY_SIGNAL)
    assert find_stop(layout) == first


def test_an_announcement_needs_no_store_and_holds_for_its_run_alone(layout: RunLayout) -> None:
    other = RunLayout(f"{layout.output}-other")
    event, foreign = threading.Event(), threading.Event()
    with hear_stop(layout, event), hear_stop(other, foreign):
        announce_stop(layout, BY_SIGNAL)
        assert event.is_set() and not foreign.is_set()
        wait_unless_stopped(layout, 3600)
    late = threading.Event()
    with hear_stop(layout, late):
        assert late.is_set()
    assert (find_stop(layout), find_stop(other), read_stop(layout)) == (BY_SIGNAL, None, None)
    forget_stop(layout)
    assert find_stop(layout) is None


def test_the_store_is_looked_at_once_in_a_while(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_stop(layout) is None
    request_stop(layout, BY_SIGNAL)
    assert find_stop(layout) is None
    monkeypatch.setattr(stop, "LOOK_S", 0.0)
    assert find_stop(layout) == BY_SIGNAL


SINCE = datetime(2026, 11, 30, tzinfo=UTC)


def note(written_at: float, message: str = "refused", since: datetime = SINCE) -> OutageNote:
    return OutageNote("deepseek", since, since, message, written_at)


def test_the_longest_outage_is_told_and_one_that_a_dead_worker_left_is_not(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    earlier = note(now, "earlier", datetime(2026, 11, 29, tzinfo=UTC))
    writers = [OutageWriter(layout, name) for name in ("s0", "s1", "s2")]
    for writer, shown in zip(writers, (note(now), earlier, note(now - 3600, "dead")), strict=True):
        writer.show(shown)
    assert read_outage(layout) == earlier
    assert read_progress(layout, "answer") == {}
    writers[1].show(None)
    assert read_outage(layout) == note(now)
    writers[0].show(None)
    assert read_outage(layout) is None


def test_a_note_is_written_when_it_changes_and_renewed_now_and_then(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[OutageNote] = []
    monkeypatch.setattr(progress, "write_note", lambda _, each: written.append(each))
    writer, now = OutageWriter(layout, "s0"), time.time()
    for at, message in ((now, "a"), (now + 1, "a"), (now + 2, "b"), (now + 3, "b"), (now + 30, "b")):
        # As an engine works them out at each look.
        writer.show(note(at, message, SINCE + timedelta(microseconds=at % 7)))
    assert [(each.message, each.written_at - now) for each in written] == [("a", 0), ("b", 2), ("b", 30)]
