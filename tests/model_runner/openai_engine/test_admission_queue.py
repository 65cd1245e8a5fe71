"""The queue: who may be sent is asked once a place is there, and what is not admitted is never sent."""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.admission import AdmittingRunner, Unlimited, Verdict
from moebeam.model_runner.openai_engine import concurrency
from moebeam.model_runner.openai_engine.admission_queue import AdmissionQueue, NotAdmitted
from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.model_runner.openai_engine.runner import OpenAIRunner, load_openai_runner
from moebeam.schemas.errors import EngineFailed, EngineUnavailable
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.remote_engines import FAST, brief
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(concurrency, "host_folder", lambda: tmp_path)


def request(name: int, num_shared: int = 0) -> Request:
    ids = np.append(np.zeros(num_shared, np.int32), np.int32(name + 1)).astype(np.int32)
    return Request(str(name), ids, (Message("user", f"question {name}"),), Sampling(10))


def fallback(served: FakeEndpoint) -> FallbackSection:
    return FallbackSection(provider="vllm", base_url=served.base_url)


@dataclass
class Few(Unlimited):
    """Admits so many in all, at most `most_away` at a time."""

    most: int
    most_away: int = 10**9
    admitted: list[str] = field(default_factory=list[str])
    away: set[str] = field(default_factory=set[str])
    peak_away: int = 0

    def admit(self, request: Request) -> Verdict:
        if request.request_id in self.away:
            return "send"
        if len(self.admitted) == self.most:
            return "stop"
        if len(self.away) >= self.most_away:
            return "wait"
        self.admitted.append(request.request_id)
        self.away.add(request.request_id)
        self.peak_away = max(self.peak_away, len(self.away))
        return "send"

    def settle(self, completion: Completion) -> None:
        self.away.discard(completion.request_id)


def runner(served: FakeEndpoint, **values: Any) -> OpenAIRunner:
    given: dict[str, Any] = {"provider": "vllm", "base_url": served.base_url, "max_retries": 1, **values}
    found = load_openai_runner(engine_config("openai", "", "m", "r", **given), FAST, brief())
    assert isinstance(found, OpenAIRunner) and isinstance(found, AdmittingRunner)
    return found


def answered(call: Call) -> Reply:
    return Reply(deepseek(call.last_user_text), delay_s=0.01)


def test_those_who_wait_are_let_in_one_after_the_other_in_their_order() -> None:
    async def scene() -> list[int]:
        admission, entered = Few(most=5, most_away=1), list[int]()
        queue = AdmissionQueue(admission)

        async def acquire(name: int) -> None:
            await queue.wait(request(name))
            while not queue.admit(request(name)):
                await queue.wait(request(name), is_first=True)
            entered.append(name)

        tasks = [asyncio.create_task(acquire(name)) for name in range(7)]
        for name in range(5):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert entered == list(range(name + 1))
            queue.settle(Completion.from_error(str(name), EngineFailed("broke")))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in found] == [type(None)] * 5 + [NotAdmitted] * 2
        return entered

    assert asyncio.run(scene()) == list(range(5))


@pytest.mark.parametrize("status", [500, 503, 401])
def test_those_who_wait_for_another_try_end_at_once_where_no_try_is_allowed_any_more(status: int) -> None:
    @dataclass
    class Stopping(Few):
        is_stopped: bool = False

        def admit(self, request: Request) -> Verdict:
            return "stop" if self.is_stopped else super().admit(request)

    admission = Stopping(most=10**9)

    def reply(call: Call) -> Reply:
        return answered(call) if call.number < 3 else replace(error(status, retry_after="300"), delay_s=0.1)

    found: list[Completion] = []
    with FakeEndpoint(reply) as served:
        # Waits as they are by default: whoever waited for their end would wait for minutes.
        asking = load_openai_runner(
            engine_config("openai", "", "m", "r", provider="vllm", base_url=served.base_url, max_concurrency=4)
        )
        assert isinstance(asking, OpenAIRunner)
        run = threading.Thread(
            target=lambda: found.extend(asking.generate_admitted(map(request, range(50)), admission))
        )
        run.start()
        while len(served.calls) < 6 or served.num_in_flight:
            time.sleep(0.01)
        admission.is_stopped = True
        run.join(20)
        assert not run.is_alive() and len(served.calls) <= 7
    assert {type(one.error) for one in found} == {type(None)} and len(found) == 3


@pytest.mark.parametrize("num_shared", [0, 64])
def test_what_is_not_admitted_is_never_sent_and_what_was_sent_comes_out(num_shared: int) -> None:
    admission = Few(most=23)
    pulled: list[int] = []

    def pull() -> Iterator[Request]:
        for name in range(200):
            pulled.append(name)
            yield request(name, num_shared)

    with FakeEndpoint(answered) as served:
        found = list(runner(served, max_concurrency=8).generate_admitted(pull(), admission))
        assert len(served.calls) == 23
    assert {one.request_id for one in found} == {*admission.admitted}
    # Those that wait for others of their prefix are pulled ahead; else no more is pulled once it was told to stop.
    assert num_shared or len(pulled) < 200


def test_no_more_are_in_flight_than_were_admitted_at_a_time() -> None:
    admission = Few(most=100, most_away=3)
    with FakeEndpoint(answered) as served:
        found = list(runner(served, max_concurrency=16).generate_admitted(map(request, range(40)), admission))
        assert served.peak_in_flight == admission.peak_away == 3
    assert len(found) == 40 and admission.away == set()


def test_a_request_goes_on_to_the_next_provider_without_being_admitted_again() -> None:
    admission = Few(most=30, most_away=4)
    with FakeEndpoint(lambda call: error(402, "no balance")) as first, FakeEndpoint(answered) as second:
        asking = runner(first, fallbacks=(fallback(second),), max_concurrency=4)
        found = list(asking.generate_admitted(map(request, range(30)), admission))
    assert len(found) == len(admission.admitted) == 30
    assert all(one.error is None for one in found)


def test_those_who_wait_at_the_door_are_let_go_where_no_provider_is_left() -> None:
    admission = Few(most=30, most_away=1)
    with FakeEndpoint(lambda call: error(402, "no balance")) as served:
        asking = runner(served, max_concurrency=4)
        with pytest.raises(EngineUnavailable, match="no balance"):
            list(asking.generate_admitted(map(request, range(30)), admission))
        assert len(served.calls) == 1
