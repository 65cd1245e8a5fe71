"""The idempotency header, for providers that offer one: one key for all tries of an attempt, and for nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moebeam.model_runner.openai_engine import concurrency, endpoint_specs
from moebeam.model_runner.openai_engine.endpoint import RetryPolicy
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.model_runner.openai_engine.runner import load_openai_runner
from moebeam.schemas.records import Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error

HEADER = "Idempotency-Key"
FAST = RetryPolicy(first_wait_s=0.001, max_wait_s=0.002, max_overload_wait_s=0.002)
ASKED = Request("7", np.arange(3, dtype=np.int32), (Message("user", "same"),), Sampling(100), scope="s1")


@pytest.fixture(autouse=True)
def _offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(concurrency, "host_folder", lambda: tmp_path)
    offering = find_profile("vllm").model_copy(update={"idempotency_header": HEADER})
    monkeypatch.setattr(endpoint_specs, "find_profile", lambda name: offering)


def keys_of(*requests: Request, num_failures: int = 0, run_id: str = "run") -> list[list[str]]:
    """The keys of the calls of each request, asked one after the other."""
    calls: list[list[str]] = []

    def reply(call: Call) -> Reply:
        calls[-1].append(call.headers.get(HEADER.lower(), ""))
        return error(500) if len(calls[-1]) <= num_failures else Reply(deepseek("fine"))

    with FakeEndpoint(reply) as served:
        config = engine_config("openai", "", "m", "r", provider="vllm", base_url=served.base_url, run_id=run_id)
        asking = load_openai_runner(config, FAST)
        for request in requests:
            calls.append([])
            (completion,) = asking.generate([request])
            assert completion.error is None
    return calls


def test_tries_of_one_attempt_share_a_key() -> None:
    ((*keys,),) = keys_of(ASKED, num_failures=3)
    assert len(keys) == 4 and len({*keys}) == 1 and keys[0]


def test_rows_that_ask_the_same_have_keys_of_their_own() -> None:
    others = [replace(ASKED, request_id="8"), replace(ASKED, scope="s2")]
    found = [key for keys in keys_of(ASKED, *others) for key in keys]
    assert len({*found}) == 3


def test_a_repair_or_another_attempt_has_a_key_of_its_own() -> None:
    repair = replace(ASKED, messages=(*ASKED.messages, Message("user", "again")), attempt=2)
    found = [key for keys in keys_of(ASKED, repair, replace(ASKED, attempt=2)) for key in keys]
    assert len({*found}) == 3


def test_a_run_that_is_started_again_sends_the_same_keys_and_another_run_others() -> None:
    first, again, other = keys_of(ASKED), keys_of(ASKED), keys_of(ASKED, run_id="other")
    assert first == again != other


def test_where_none_is_offered_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_specs, "find_profile", find_profile)
    assert keys_of(ASKED) == [[""]]
