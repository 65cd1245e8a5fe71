"""Engines in other processes give back what they are at: calls end soon, and nobody else's call does."""

import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.engine_process import host_runner
from moebeam.model_runner.engine_process.host_runner import HostRunner
from moebeam.model_runner.engine_process.isolated_runner import IsolatedRunner
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.records import Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config

WAIT_S = 60


@pytest.fixture
def hanging(tmp_path: Path) -> EngineConfig:
    """An engine that answers at once, but for one request over which it hangs for ever."""
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"rules": [{"contains": "HANG", "accident": "hang"}]}))
    return engine_config("fake", "", "model", "revision", script=str(script))


@pytest.fixture
def host_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short one: a socket's address has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="h") as name:
        monkeypatch.setattr(host_runner, "host_folder", lambda: Path(name))
        yield Path(name)


def request(number: int, text: str = "x") -> Request:
    return Request(str(number), np.zeros(1, np.int32), (Message("user", text),), Sampling(5))


def answered(runner: Any, *texts: str) -> list[str]:
    return [one.request_id for one in runner.generate(request(number, text) for number, text in enumerate(texts))]


def assert_gives_back(runner: Any) -> None:
    found: list[str] = []
    call = threading.Thread(target=lambda: found.extend(answered(runner, "a", "b", "HANG", "c")), daemon=True)
    call.start()
    call.join(1.0)
    assert call.is_alive()
    runner.give_back()
    call.join(WAIT_S)
    assert not call.is_alive()
    assert found == ["0", "1"]
    assert answered(runner, "a") == [], "for good"


def test_an_engine_of_its_own_ends(hanging: EngineConfig) -> None:
    runner = IsolatedRunner(hanging)
    try:
        assert_gives_back(runner)
    finally:
        runner.close()


def test_an_engine_of_the_host_goes_on_for_the_others(hanging: EngineConfig, host_folder: Path) -> None:
    first, second = HostRunner(hanging), HostRunner(hanging)
    try:
        assert answered(second, "a") == ["0"]
        assert_gives_back(first)
        assert answered(second, "a", "b") == ["0", "1"]
    finally:
        first.close()
        second.close()
