"""Who is at work on a run, and how far it is, as its files tell."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.output.run_state import (
    LauncherPresence,
    announce_presence,
    launchers_folder,
    read_launchers,
    read_manifest,
    read_modified_at,
)
from moebeam.jobs.output.run_state import find_signs_of_life as life_of
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.lease import host_identity
from moebeam.transforms.durable.progress import ProgressWriter, ShardProgress


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(str(tmp_path / "out"))


def leave(layout: RunLayout, name: str, beat: LauncherPresence) -> None:
    path = Path(launchers_folder(layout)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(beat)))


def own_beat() -> LauncherPresence:
    return LauncherPresence(host_identity(), "here", os.getpid(), time.time())


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_a_launcher_is_seen_while_it_is_present_and_leaves_nothing(layout: RunLayout) -> None:
    assert not life_of(layout).is_alive
    with announce_presence(layout):
        assert life_of(layout).is_alive
        assert len(read_launchers(layout)) == 1
    assert not life_of(layout).is_alive
    assert not Path(launchers_folder(layout)).exists()


def test_a_killed_launcher_is_told_by_its_process_or_its_silence(layout: RunLayout) -> None:
    leave(layout, "a", replace(own_beat(), pid=ended_process()))
    leave(layout, "b", replace(own_beat(), host="elsewhere", at=time.time() - 90))
    life = life_of(layout)
    assert (life.is_alive, life.was_killed) == (False, True)
    assert life.last_sign_s is not None and life.last_sign_s < 60


def test_a_launcher_elsewhere_is_believed_while_it_speaks(layout: RunLayout) -> None:
    leave(layout, "a", replace(own_beat(), host="elsewhere", host_name="far", pid=1))
    assert life_of(layout).who == ("a launcher on far (process 1)",)


def test_what_killed_launchers_left_goes_with_the_next_one_and_living_ones_stay(layout: RunLayout) -> None:
    leave(layout, "dead", replace(own_beat(), pid=ended_process()))
    leave(layout, "alive", own_beat())
    with announce_presence(layout):
        pass
    assert list(read_launchers(layout)) == ["alive.json"]


def test_a_worker_that_plans_without_a_launcher_is_seen_by_its_heartbeat(layout: RunLayout) -> None:
    ProgressWriter(layout, "plan").write("000000", ShardProgress(rows_done=1))
    assert life_of(layout).who == ("a worker that is planning",)
    Path(layout.failure).write_text("{}")
    assert not life_of(layout).is_alive


@pytest.mark.parametrize(
    ("info", "instant"),
    [
        ({"mtime": 5.5}, 5.5),
        ({"LastModified": datetime(1970, 1, 1, 0, 1, tzinfo=UTC)}, 60.0),
        ({"updated": "1970-01-01T00:01:00Z"}, 60.0),
        ({"updated": "yesterday"}, None),
        ({}, None),
    ],
)
def test_stores_tell_in_their_own_ways_when_a_file_was_written(info: dict[str, Any], instant: float | None) -> None:
    assert read_modified_at(info) == instant


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "fine"}'])
def test_a_damaged_manifest_is_told_with_what_to_do(layout: RunLayout, content: str) -> None:
    assert read_manifest(layout) is None
    Path(layout.output).mkdir()
    Path(layout.manifest).write_text(content)
    with pytest.raises(OutputError, match="found a damaged file; remove it and resume the run"):
        read_manifest(layout)
