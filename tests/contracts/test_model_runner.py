"""What every engine owes its callers. A new engine is one more line in `ENGINES`."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.internal import cloudpickle_pickler
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.protocol import ENGINES as LOADERS
from moebeam.model_runner.protocol import EngineConfig, ModelRunner, StoppableRunner, load_runner
from moebeam.model_runner.run_inference.handler import MoebeamModelHandler
from moebeam.schemas.errors import RequestGivenUp, RowError
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error, with_usage

ENGINES: dict[str, dict[str, str]] = {
    "fake": {"script": "script.json"},
    "openai": {"provider": "vllm"},
    "torch": {"dtype": "float32", "device": "cpu"},
    "transformers": {"dtype": "float32", "device": "cpu"},
}
NUM_MANY = 24
MAX_TOKENS = 14
Answer = tuple[str, str, str]


@pytest.fixture(scope="module", params=sorted(ENGINES))
def config(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineConfig]:
    values: dict[str, Any] = dict(ENGINES[request.param])
    if "script" in values:
        script = tmp_path_factory.mktemp("script") / values["script"]
        script.write_text(json.dumps({"rules": [{"contains": "BREAK", "failure": "engine_failed"}]}))
        values["script"] = str(script)
    with _endpoint(tiny_checkpoint) as served:
        if "provider" in values:
            values["base_url"] = served.base_url
        path = str(tiny_checkpoint)
        yield engine_config(request.param, path, name="tiny", revision=compute_checkpoint_revision(path), **values)


def _endpoint(checkpoint: Path) -> FakeEndpoint:
    """A provider that counts tokens like the checkpoint and fails on the word on which the scripted engine fails."""
    encoder = PromptEncoder.load(str(checkpoint))

    def reply(call: Call) -> Reply:
        text = call.last_user_text
        if text == "BREAK":
            return error(400)
        (token_ids,) = encoder.encode_batch([encoder.render([Message("user", text)])])
        num_tokens = min(10, call.body["max_tokens"])
        reason = "stop" if num_tokens == 10 else "length"
        answer = deepseek(text, completion=num_tokens, finish_reason=reason, model="tiny", system_fingerprint=None)
        return Reply(with_usage(answer, {"prompt_tokens": len(token_ids), "completion_tokens": num_tokens}))

    return FakeEndpoint(reply)


@pytest.fixture(scope="module")
def runner(config: EngineConfig) -> ModelRunner:
    return load_runner(config)


@pytest.fixture(scope="module")
def requests(tiny_checkpoint: Path) -> list[Request]:
    """Prompts that share prefixes, of several lengths, some twice, of two tenants."""
    encoder = PromptEncoder.load(str(tiny_checkpoint))
    chats = [(Message("user", f"shared words, then {i % 20} " + "x" * (i % 3)),) for i in range(NUM_MANY)]
    token_ids = encoder.encode_batch([encoder.render(chat) for chat in chats])
    return [Request(f"r{i}", token_ids[i], chats[i], Sampling(MAX_TOKENS), tenant="ab"[i % 2]) for i in range(NUM_MANY)]


def answers(completions: Iterator[Completion]) -> dict[str, Answer]:
    """What depends on the request alone; cached tokens and times need not."""
    return {c.request_id: (c.text, c.finish_reason, str(c.usage.completion_tokens)) for c in completions}


def test_every_engine_stands_under_this_contract() -> None:
    # `vllm` needs an interpreter of its own and a model that it knows:
    # tests/model_runner/vllm_engine/test_vllm_runner.py.
    assert {*ENGINES, "vllm"} == set(LOADERS)


@pytest.mark.parametrize("num_requests", [0, 1, NUM_MANY])
def test_each_request_gets_exactly_one_completion(
    runner: ModelRunner, requests: list[Request], num_requests: int
) -> None:
    found = Counter(completion.request_id for completion in runner.generate(iter(requests[:num_requests])))
    assert found == Counter(request.request_id for request in requests[:num_requests])


def test_an_engine_that_is_told_to_give_back_ends_its_calls_for_good(
    config: EngineConfig, requests: list[Request]
) -> None:
    runner = load_runner(config)
    assert isinstance(runner, StoppableRunner)
    found: list[str] = []
    endless = (replace(requests[number % NUM_MANY], request_id=str(number)) for number in range(100_000))
    for completion in runner.generate(endless):
        if not isinstance(completion.error, RequestGivenUp):
            found.append(completion.request_id)
        runner.give_back()
    assert 0 < len(found) == len({*found}) < 100_000
    given_up = list(runner.generate(requests[:2]))
    assert all(isinstance(completion.error, RequestGivenUp) for completion in given_up)


def test_input_is_pulled_lazily(runner: ModelRunner, requests: list[Request]) -> None:
    num_pulled = 0
    most = 100_000

    def endless() -> Iterator[Request]:
        nonlocal num_pulled
        while num_pulled < most:
            num_pulled += 1
            yield replace(requests[num_pulled % NUM_MANY], request_id=str(num_pulled))

    assert num_pulled == 0
    first = next(iter(runner.generate(endless())))
    assert 0 < int(first.request_id) <= num_pulled < most // 10


def test_greedy_answers_are_the_same_twice_and_in_any_order(runner: ModelRunner, requests: list[Request]) -> None:
    first = answers(runner.generate(requests))
    assert answers(runner.generate(requests)) == first
    assert answers(runner.generate(requests[::-1])) == first
    assert answers(runner.generate(requests[5:6]))["r5"] == first["r5"]
    assert len(set(first.values())) > 1


def test_same_prompt_gets_the_same_greedy_answer(runner: ModelRunner, requests: list[Request]) -> None:
    twins = [replace(requests[0], request_id="a"), replace(requests[0], request_id="b")]
    found = answers(runner.generate(twins))
    assert found["a"] == found["b"]


def test_usage_adds_up(runner: ModelRunner, requests: list[Request]) -> None:
    by_id = {request.request_id: request for request in requests}
    for completion in runner.generate(requests):
        usage = completion.usage
        assert completion.error is None
        assert usage.prompt_tokens == by_id[completion.request_id].num_prompt_tokens
        assert usage.cached_tokens is None or 0 <= usage.cached_tokens <= usage.prompt_tokens
        assert 0 < usage.completion_tokens <= MAX_TOKENS
        assert 0 <= usage.reasoning_tokens <= usage.completion_tokens


def test_completion_says_when_by_whom_and_by_which_model(
    config: EngineConfig, runner: ModelRunner, requests: list[Request]
) -> None:
    before = datetime.now(UTC)
    (completion,) = runner.generate(requests[:1])
    assert before <= completion.started_at <= datetime.now(UTC)
    assert completion.latency_ms >= 0
    assert completion.provider
    assert (completion.model, completion.model_revision) == (config.name, config.revision)


def test_answer_cut_by_max_tokens_says_so(runner: ModelRunner, requests: list[Request]) -> None:
    one = [replace(request, sampling=Sampling(max_tokens=1)) for request in requests[:3]]
    for completion in runner.generate(one):
        assert completion.usage.completion_tokens == 1
        assert completion.finish_reason in ("length", "stop")


def test_failure_of_one_request_is_a_value_and_leaves_the_others_alone(
    runner: ModelRunner, requests: list[Request]
) -> None:
    # A token that no model here knows, and the word on which the scripted engine fails.
    broken = replace(
        requests[1],
        request_id="broken",
        prompt_token_ids=np.array([0, 99_999], dtype=np.int32),
        messages=(Message("user", "BREAK"),),
    )
    found = {completion.request_id: completion for completion in runner.generate([requests[0], broken, requests[2]])}
    assert isinstance(found["broken"].error, RowError)
    assert found["broken"].error.error_stage == "run"
    assert found["broken"].finish_reason == "error"
    assert found["r0"].error is None
    assert found["r2"].error is None


def test_configuration_and_handler_pickle(config: EngineConfig) -> None:
    assert pickle.loads(pickle.dumps(config)) == config
    handler = cloudpickle_pickler.loads(cloudpickle_pickler.dumps(MoebeamModelHandler(config)))
    assert isinstance(handler, MoebeamModelHandler)
    assert pickle.loads(pickle.dumps(handler)).batch_elements_kwargs() == handler.batch_elements_kwargs()


@pytest.mark.parametrize("is_keyed", [False, True])
def test_plain_run_inference_keeps_answers_with_their_rows(
    config: EngineConfig, runner: ModelRunner, requests: list[Request], is_keyed: bool
) -> None:
    expected = [(request_id, text) for request_id, (text, _, _) in answers(runner.generate(requests)).items()]
    handler = MoebeamModelHandler(config, min_batch_size=4, max_batch_size=8)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        if is_keyed:
            rows = pipeline | beam.Create([(request.request_id, request) for request in requests])
            found = rows | RunInference(KeyedModelHandler(handler)) | beam.MapTuple(_key_and_text)
        else:
            found = pipeline | beam.Create(requests) | RunInference(handler) | beam.Map(_id_and_text)
        assert_that(found, equal_to(expected))


def test_planning_and_fake_runs_need_neither_torch_nor_beam() -> None:
    code = (
        "import sys, moebeam.model_runner.prefix_tree, moebeam.model_runner.encoding.prompt_encoder, "
        "moebeam.model_runner.fake_engine.runner; "
        "print([name for name in ('torch', 'transformers', 'apache_beam') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def _key_and_text(key: str, completion: Completion) -> tuple[str, str]:
    return key, completion.text


def _id_and_text(completion: Completion) -> tuple[str, str]:
    return completion.request_id, completion.text
