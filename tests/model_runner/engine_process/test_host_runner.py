"""One engine for all processes of a host: started once, shared, ended after the last, and never in anybody's way."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from moebeam.model_runner.engine_process import host_runner
from moebeam.model_runner.engine_process.host_runner import HostRunner
from moebeam.model_runner.fake_engine.runner import load_fake_runner
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.paths import ROOT

pytestmark = pytest.mark.integration

WAIT_S = 60


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The host's folder; a short one: a socket's address has at most 107 bytes, and `tmp_path` is long under xdist."""
    with tempfile.TemporaryDirectory(prefix="h") as name:
        place = Path(name)
        monkeypatch.setattr(host_runner, "host_folder", lambda: place)
        yield place


def config(tmp_path: Path, **script: Any) -> EngineConfig:
    file = tmp_path / "script.json"
    file.write_text(json.dumps(script))
    return engine_config("fake", "", "model", "revision", script=str(file))


@pytest.fixture
def shared() -> Iterator[list[HostRunner]]:
    """Runners that a test has made, to be closed; their host's process ends before the next test."""
    made: list[HostRunner] = []
    yield made
    for runner in made:
        runner.close()
    for process in hosts():
        process.kill()
        process.wait(WAIT_S)


def hosts() -> list[psutil.Process]:
    """The processes that hold an engine in this test's folder."""
    place = str(host_runner.host_folder())
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and any(word.startswith(place) for word in child.cmdline())
    ]


def requests(*texts: str) -> list[Request]:
    return [
        Request(str(place), np.array([place, 1], np.int32), (Message("user", text),), Sampling(max_tokens=64))
        for place, text in enumerate(texts)
    ]


def said(completions: list[Completion]) -> dict[str, Any]:
    return {one.request_id: type(one.error).__name__ if one.error else one.text for one in completions}


def test_two_runners_share_one_engine_and_answer_as_it_does(tmp_path: Path, shared: list[HostRunner]) -> None:
    given = config(tmp_path, rules=[{"contains": "no", "failure": "refused"}])
    shared += [HostRunner(given), HostRunner(given)]
    assert len(hosts()) == 1
    asked = requests("a", "no", "b")
    expected = said(list(load_fake_runner(given).generate(asked)))
    assert [said(list(runner.generate(asked))) for runner in shared] == [expected, expected]


def test_another_configuration_is_another_engine(tmp_path: Path, shared: list[HostRunner]) -> None:
    given = config(tmp_path)
    shared += [HostRunner(given), HostRunner(given, max_silence_s=60.0)]
    assert len(hosts()) == 2


def test_calls_run_side_by_side(tmp_path: Path, shared: list[HostRunner]) -> None:
    shared += [HostRunner(given := config(tmp_path)), HostRunner(given)]
    first, second = (runner.generate(requests("a", "b")) for runner in shared)
    found = [next(first), next(second), next(second), next(first)]
    assert [one.request_id for one in found] == ["0", "0", "1", "1"]


def test_a_row_that_kills_the_engine_fails_alone(tmp_path: Path, shared: list[HostRunner]) -> None:
    shared.append(runner := HostRunner(config(tmp_path, rules=[{"contains": "poison", "accident": "crash"}])))
    found = said(list(runner.generate(requests("a", "poison", "b"))))
    assert found.pop("1") == "EngineCrashed" and all("echo" in text for text in found.values())


def test_an_engine_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    given = engine_config("fake", "", "model", "revision", script=str(tmp_path / "missing.json"))
    with pytest.raises(EngineLoadError, match=r"missing\.json"):
        HostRunner(given)


def test_a_worker_that_dies_leaves_the_engine_to_the_others(
    tmp_path: Path, folder: Path, shared: list[HostRunner]
) -> None:
    given = config(tmp_path, latency_ms=20)
    shared.append(mine := HostRunner(given))
    code = (
        "import sys, pickle; from pathlib import Path; from moebeam.model_runner.engine_process import host_runner\n"
        "host_runner.host_folder = lambda: Path(sys.argv[1])\n"
        "config, asked = pickle.loads(bytes.fromhex(sys.argv[2]))\n"
        "answers = host_runner.HostRunner(config).generate(asked)\n"
        "next(answers); print('answering', flush=True); sys.stdin.read()"
    )
    told = pickle.dumps((given, requests(*"abcdef"))).hex()
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), told], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == b"answering\n"
    other.kill()
    other.wait()
    other.stdout.close()
    assert other.stdin is not None
    other.stdin.close()
    assert len(hosts()) == 1
    assert len(list(mine.generate(requests("a", "b")))) == 2


def test_the_engine_of_a_host_that_was_killed_is_started_again_and_no_row_is_lost(
    tmp_path: Path, shared: list[HostRunner]
) -> None:
    shared.append(runner := HostRunner(config(tmp_path, latency_ms=20)))
    answers = runner.generate(requests(*"abcdefgh"))
    found = [next(answers), next(answers)]
    os.kill(hosts()[0].pid, signal.SIGKILL)
    found += answers
    assert sorted(said(found)) == [*"01234567"] and len(found) == 8


def test_a_host_whose_engine_always_ends_is_given_up(
    tmp_path: Path, shared: list[HostRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_runner, "MAX_EXITS", 2)
    shared.append(runner := HostRunner(config(tmp_path, latency_ms=10)))

    def killing() -> Iterator[Request]:
        for request in requests(*"abc"):
            for process in hosts():
                process.kill()
            yield request

    with pytest.raises(EngineLoadError, match="ended 2x"):
        list(runner.generate(killing()))


def test_the_engine_ends_after_the_last_that_held_it(
    tmp_path: Path, shared: list[HostRunner], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.append(HostRunner(config(tmp_path)))
    (host,) = hosts()
    family = [host, *host.children(recursive=True)]
    shared.pop().close()
    gone, alive = psutil.wait_procs(family, timeout=WAIT_S)
    assert not alive and len(gone) == 2
    assert not list((folder / "engines").glob("*.socket"))


def test_those_that_start_at_once_start_one(tmp_path: Path, shared: list[HostRunner]) -> None:
    given = config(tmp_path)
    threads = [threading.Thread(target=lambda: shared.append(HostRunner(given))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(shared) == 6 and len(hosts()) == 1


def test_an_address_that_was_left_behind_is_no_hindrance(tmp_path: Path, shared: list[HostRunner]) -> None:
    given = config(tmp_path)
    shared.append(HostRunner(given))
    hosts()[0].kill()
    deadline = time.monotonic() + WAIT_S
    while hosts() and time.monotonic() < deadline:
        time.sleep(0.01)
    shared.append(runner := HostRunner(given))
    assert len(list(runner.generate(requests("a")))) == 1
