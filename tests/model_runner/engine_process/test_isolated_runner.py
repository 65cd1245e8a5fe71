"""An engine in a process of its own: the same answers, and what becomes of rows that it dies over."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.engine_process import isolated_runner
from moebeam.model_runner.engine_process.isolated_runner import IsolatedRunner
from moebeam.model_runner.fake_engine.runner import load_fake_runner
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.torch_engine.runner import load_torch_runner
from moebeam.schemas.errors import EngineCrashed, EngineLoadError, EngineTimeout
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config


def config(tmp_path: Path, **script: Any) -> EngineConfig:
    file = tmp_path / "script.json"
    file.write_text(json.dumps(script))
    return engine_config("fake", "", "model", "revision", script=str(file))


def requests(*texts: str) -> list[Request]:
    return [
        Request(
            request_id=str(position),
            prompt_token_ids=np.array([position, 1, 2], dtype=np.int32),
            messages=(Message("user", text),),
            sampling=Sampling(max_tokens=64),
        )
        for position, text in enumerate(texts)
    ]


@pytest.fixture
def isolated() -> Iterator[list[IsolatedRunner]]:
    """Runners that a test has started, to be closed."""
    started: list[IsolatedRunner] = []
    yield started
    for runner in started:
        runner.close()


def said(completions: list[Completion]) -> dict[str, Any]:
    return {one.request_id: type(one.error).__name__ if one.error else one.text for one in completions}


def test_answers_are_those_of_the_engine_in_process(tmp_path: Path, isolated: list[IsolatedRunner]) -> None:
    given = config(tmp_path, rules=[{"contains": "no", "failure": "refused"}])
    isolated.append(runner := IsolatedRunner(given))
    asked = requests("a", "no", "b")
    assert said(list(runner.generate(asked))) == said(list(load_fake_runner(given).generate(asked)))
    assert list(runner.generate([])) == []


@pytest.mark.integration
def test_torch_answers_the_same_and_counts_the_same(tiny_checkpoint: Path, isolated: list[IsolatedRunner]) -> None:
    given = engine_config("torch", str(tiny_checkpoint), "tiny", "r", dtype="float32", device="cpu")
    encoder = PromptEncoder.load(str(tiny_checkpoint))
    chats = [(Message("user", f"shared words, then {row % 7}"),) for row in range(12)]
    token_ids = encoder.encode_batch([encoder.render(chat) for chat in chats])
    asked = [Request(str(row), token_ids[row], chats[row], Sampling(8)) for row in range(12)]
    isolated.append(runner := IsolatedRunner(given))
    found = {one.request_id: (one.text, one.usage) for one in runner.generate(asked)}
    in_process = load_torch_runner(given)
    assert found == {one.request_id: (one.text, one.usage) for one in in_process.generate(asked)}
    counted = in_process.counters()
    assert runner.counters()["num_computed_prefill_tokens"] == counted["num_computed_prefill_tokens"] > 0
    assert runner.counters().keys() == counted.keys()


def test_requests_are_pulled_no_further_than_the_engine_pulls(tmp_path: Path, isolated: list[IsolatedRunner]) -> None:
    isolated.append(runner := IsolatedRunner(config(tmp_path)))
    pulled: list[str] = []

    def source() -> Iterator[Request]:
        for request in requests("a", "b", "c"):
            pulled.append(request.request_id)
            yield request

    answers = runner.generate(source())
    next(answers)
    assert pulled == ["0"], "the fake engine pulls nothing ahead"
    answers.close()
    assert len(list(runner.generate(requests("d")))) == 1, "a call that was left does not stand in the way"


@pytest.mark.parametrize("num_rows", [2, *(pytest.param(num, marks=pytest.mark.integration) for num in (1, 7))])
def test_only_the_row_that_kills_the_engine_fails(
    tmp_path: Path, isolated: list[IsolatedRunner], num_rows: int
) -> None:
    given = config(tmp_path, rules=[{"contains": "poison", "accident": "crash"}])
    isolated.append(runner := IsolatedRunner(given))
    texts = [f"row {row}" for row in range(num_rows)]
    for position in range(num_rows):
        asked = requests(*texts[:position], "poison", *texts[position + 1 :])
        found = said(completions := list(runner.generate(asked)))
        assert len(completions) == num_rows
        assert [found.pop(str(position))] == ["EngineCrashed"]
        assert all('"echo"' in text for text in found.values())


@pytest.mark.integration
def test_of_two_calls_side_by_side_only_the_row_that_kills_the_engine_fails(
    tmp_path: Path, isolated: list[IsolatedRunner]
) -> None:
    given = config(tmp_path, rules=[{"contains": "poison", "accident": "crash"}], latency_ms=5)
    isolated.append(runner := IsolatedRunner(given))
    found: dict[str, dict[str, Any]] = {}

    def call(name: str, *texts: str) -> None:
        found[name] = said(list(runner.generate(requests(*texts))))

    calls = [
        threading.Thread(target=call, args=("one", "a", "b", "poison", "c")),
        threading.Thread(target=call, args=("two", *(f"row {row}" for row in range(40)))),
        threading.Thread(target=call, args=("three", "poison")),
    ]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join(120)
        assert not thread.is_alive()
    assert {(name, row) for name, rows in found.items() for row, text in rows.items() if text == "EngineCrashed"} == {
        ("one", "2"),
        ("three", "0"),
    }
    assert [len(found[name]) for name in ("one", "two", "three")] == [4, 40, 1]


@pytest.mark.integration
def test_an_engine_that_pulls_all_at_once_and_dies_late_is_bisected(
    tmp_path: Path, isolated: list[IsolatedRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `torch` does: nothing of a window is answered before the poison is reached."""
    (tmp_path / "greedy_engine.py").write_text(
        "import dataclasses\n"
        "from moebeam.model_runner.fake_engine.runner import FakeRunner, load_fake_runner\n"
        "from moebeam.model_runner.protocol import ENGINES\n"
        "class Greedy:\n"
        "    def __init__(self, inner): self.inner = inner\n"
        "    def generate(self, requests): return iter(list(self.inner.generate(list(requests))))\n"
        "def load(config): return Greedy(load_fake_runner(config))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "from moebeam.model_runner.protocol import ENGINES\nENGINES['greedy'] = 'greedy_engine:load'\n"
    )
    given = config(tmp_path, rules=[{"contains": "poison", "accident": "crash"}])
    given = replace(given, options=given.options.model_copy(update={"engine": "greedy"}))
    isolated.append(runner := IsolatedRunner(given))
    texts = [f"row {row}" for row in range(33)]
    texts[5] = texts[6] = texts[32] = "poison"
    found = said(list(runner.generate(requests(*texts))))
    assert sorted(found, key=int) == [str(row) for row in range(33)]
    assert {row for row, text in found.items() if text == "EngineCrashed"} == {"5", "6", "32"}


def test_a_process_that_is_killed_once_costs_no_row(tmp_path: Path, isolated: list[IsolatedRunner]) -> None:
    isolated.append(runner := IsolatedRunner(config(tmp_path, latency_ms=20)))
    answers = runner.generate(requests(*"abcdefgh"))
    found = [next(answers), next(answers)]
    os.kill(runner._supervisor.last.popen.pid, signal.SIGKILL)
    found += answers
    assert all('"echo"' in text for text in said(found).values()) and len(found) == 8


@pytest.mark.integration
def test_an_engine_that_hangs_is_ended_and_its_row_times_out(tmp_path: Path, isolated: list[IsolatedRunner]) -> None:
    given = config(tmp_path, rules=[{"contains": "stuck", "accident": "hang"}])
    isolated.append(runner := IsolatedRunner(given, max_silence_s=0.5))
    completions = list(runner.generate(requests("a", "stuck", "b")))
    found = said(completions)
    assert found["1"] == "EngineTimeout" and '"echo"' in found["0"] and '"echo"' in found["2"]
    (failed,) = [one.error for one in completions if one.error is not None]
    assert isinstance(failed, EngineTimeout) and "0.5 s" in str(failed)


def test_an_engine_that_waits_for_work_is_not_silent(tmp_path: Path, isolated: list[IsolatedRunner]) -> None:
    isolated.append(runner := IsolatedRunner(config(tmp_path), max_silence_s=0.3))
    process = runner._supervisor.last
    threading.Event().wait(0.5)
    assert len(list(runner.generate(requests("a")))) == 1
    assert runner._supervisor.last is process


@pytest.mark.integration
def test_an_engine_that_dies_over_everything_stops_the_job(
    tmp_path: Path, isolated: list[IsolatedRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated_runner, "MAX_FRUITLESS_RESTARTS", 5)
    isolated.append(runner := IsolatedRunner(config(tmp_path, default={"accident": "crash"})))
    with pytest.raises(EngineLoadError, match=r"died 5 times without an answer: its process ended with signal 9"):
        list(runner.generate(requests(*"abcdefgh")))


def test_an_engine_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"none\.json: expected a script"):
        IsolatedRunner(engine_config("fake", "", "model", "revision", script=str(tmp_path / "none.json")))


def test_a_crash_names_its_signal(tmp_path: Path, isolated: list[IsolatedRunner]) -> None:
    isolated.append(runner := IsolatedRunner(config(tmp_path, default={"accident": "crash"})))
    (completion,) = runner.generate(requests("a"))
    assert isinstance(completion.error, EngineCrashed) and "signal 9" in str(completion.error)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (0, 0)


def test_a_closed_runner_says_so(tmp_path: Path) -> None:
    runner = IsolatedRunner(config(tmp_path))
    process = runner._supervisor.last.popen
    runner.close()
    assert process.poll() is not None
    with pytest.raises(EngineLoadError, match="was closed"):
        list(runner.generate(requests("a")))
