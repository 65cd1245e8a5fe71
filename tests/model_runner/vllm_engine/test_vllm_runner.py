"""The vLLM engine: against a scripted worker, the worker against a scripted vLLM, and both against the real one.

The real one is in `test_real_vllm.py`.
"""

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.engine_process.process_link import EngineExit
from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.model_runner.vllm_engine import process as vllm_process
from moebeam.model_runner.vllm_engine import runner as vllm_runner
from moebeam.model_runner.vllm_engine.engine_arguments import ARGUMENTS_VARIABLE
from moebeam.model_runner.vllm_engine.prefix_units import unit_key
from moebeam.model_runner.vllm_engine.process import PYTHON_VARIABLE
from moebeam.model_runner.vllm_engine.runner import VllmRunner, load_vllm_runner
from moebeam.schemas.errors import ContextOverflow, EngineFailed, EngineLoadError
from moebeam.schemas.records import Request, Sampling, TokenLogprob
from tests.support.engines.fake_vllm import Fake, by_id, config_of, request
from tests.support.engines.tiny_requests import EOS_ID

DIE, DIE_ONCE, REFUSE, ABORT, GARBAGE, ENDLESS = 255, 254, 253, 252, 251, 250
"""What the scripted worker does over a prompt whose last token is this; else it answers with the prompt's tokens."""


def test_what_is_given_back_is_withdrawn_and_has_no_completion(runner: VllmRunner, fake: Fake) -> None:
    found: list[str] = []
    for completion in runner.generate(request(str(number), [70, 71]) for number in range(30)):
        found.append(completion.request_id)
        runner.give_back()
    assert len(found) == 1
    assert list(runner.generate([request("again", [70])])) == []


def test_requests_are_sent_in_token_order_tenants_apart(runner: VllmRunner, fake: Fake) -> None:
    rng = np.random.default_rng(0)
    requests = [request(str(i), [70, *rng.integers(70, 74, 5)], tenant=("", "a", "b")[i % 3]) for i in range(30)]
    assert len(by_id(runner.generate(requests))) == 30
    unit = runner.limits.prefix_unit
    keys = {id(one): (unit_key(one, unit, None), prefix_key(one.tenant, one.prompt_token_ids)) for one in requests}
    expected = sorted(requests, key=lambda one: keys[id(one)])
    asks = fake.asks()
    assert [ask["prompt_token_ids"] for ask in asks] == [one.prompt_token_ids.tolist() for one in expected]
    salts = [ask["cache_salt"] for ask in asks]
    assert [salt is None for salt in salts] == [one.tenant == "" for one in expected]
    assert len(set(zip(salts, (one.tenant for one in expected), strict=True))) == len(set(salts)) == 3
    assert not {"a", "b"} & set(salts)


def test_what_is_in_flight_and_what_is_pulled_ahead_is_bounded(
    fake: Fake, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_runner, "NUM_WINDOW_REQUESTS", 10)
    runner = load_vllm_runner(config_of(tiny_checkpoint, batch_size=2))
    num_pulled = 0

    def source() -> Iterator[Request]:
        nonlocal num_pulled
        for i in range(25):
            num_pulled += 1
            yield request(str(i), [70 + i])

    most_ahead = max(num_pulled - i for i, _ in enumerate(runner.generate(source())))
    runner.close()
    assert most_ahead == 10
    assert max(ask["num_unanswered"] for ask in fake.asks()) == 4
    assert len(fake.asks()) == 25
    # The first window is sent before anything of the second.
    assert {ask["prompt_token_ids"][1] for ask in fake.asks()[:10]} == {70 + i for i in range(10)}


def test_usage_finish_reason_and_logprobs_are_vllms(runner: VllmRunner) -> None:
    whole = request("length", [70, 71, 72], max_tokens=2, logprobs=True)
    ended = request("stop", [70, EOS_ID, 72], max_tokens=3)
    found = by_id(runner.generate([whole, ended]))
    one, other = found["length"], found["stop"]
    assert (one.finish_reason, one.logprobs, one.error) == ("length", (-70.0, -71.0), None)
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.cached_tokens) == (4, 2, 3)
    assert one.text == runner._tokenizer.decode([70, 71])
    assert (other.finish_reason, other.logprobs, other.usage.completion_tokens) == ("stop", None, 2)
    assert other.text == runner._tokenizer.decode([70])
    assert (one.provider, one.model, one.model_revision) == ("local", "tiny", "r")
    assert one.latency_ms > 0


def test_sampling_is_sent_as_asked_and_seeds_depend_on_the_row_and_its_sample(runner: VllmRunner, fake: Fake) -> None:
    sampled = replace(request("a", [70], temperature=0.7, top_p=0.9, min_p=0.1, grammar="{}"), row_id="row")
    others = [
        replace(sampled, request_id="b", sample=1),
        replace(sampled, request_id="c", sampling=Sampling(6, 0.7, seed=-1)),
        request("d", [71], logprobs=True),
        replace(sampled, request_id="e", attempt=2),
        replace(sampled, request_id="f", row_id="other"),
    ]
    by_id(runner.generate([sampled, *others]))
    first, second, seeded, same, other, greedy = fake.asks()
    assert first["sampling"] | {"seed": None} == {
        "max_tokens": 6,
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": None,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logprobs": None,
        "stop_token_ids": [EOS_ID],
    }
    assert (first["grammar"], greedy["grammar"], greedy["sampling"]["logprobs"]) == ("{}", None, 0)
    assert first["sampling"]["seed"] == same["sampling"]["seed"] != second["sampling"]["seed"]
    assert len({ask["sampling"]["seed"] for ask in (first, second, seeded, other)}) == 4
    assert greedy["sampling"]["seed"] is None


def test_penalties_and_likely_tokens_are_vllms(runner: VllmRunner, fake: Fake) -> None:
    asked = {"frequency_penalty": 0.5, "presence_penalty": -1.0, "logprobs": True}
    found = by_id(
        runner.generate(
            [
                request("one", [70, 71, 72], max_tokens=2, top_logprobs=1, **asked),
                request("two", [70, 71, 72], max_tokens=2, top_logprobs=2, **asked),
                request("none", [70, 71, 72], max_tokens=2, logprobs=True),
            ]
        )
    )
    decode = runner._tokenizer.decode
    assert found["none"].top_logprobs is None
    assert found["one"].top_logprobs == tuple((TokenLogprob(decode([token_id]), -1.0),) for token_id in (70, 71))
    assert found["two"].top_logprobs is not None
    assert found["two"].top_logprobs[0] == (TokenLogprob(decode([70]), -1.0), TokenLogprob(decode([65]), -2.0))
    sent = [ask["sampling"] for ask in fake.asks()]
    assert sorted(sampling["logprobs"] for sampling in sent) == [0, 1, 2]
    assert sorted(sampling["frequency_penalty"] for sampling in sent) == [0.0, 0.5, 0.5]


def test_text_ends_before_a_stop_string_and_the_rest_is_withdrawn(runner: VllmRunner, fake: Fake) -> None:
    letter = runner._tokenizer.decode([75])
    found = by_id(
        runner.generate(
            [
                request("endless", [ENDLESS], max_tokens=50, stop=("never", letter * 3)),
                request("cut", [70, 71, 72, 73], stop=(runner._tokenizer.decode([72, 73]),)),
                request("whole", [70, 71, 72, 73], max_tokens=3, stop=("never",)),
            ]
        )
    )
    assert (found["endless"].text, found["endless"].finish_reason) == ("", "stop")
    assert found["endless"].usage.completion_tokens == 3
    assert (found["cut"].text, found["cut"].finish_reason) == (runner._tokenizer.decode([70, 71]), "stop")
    assert found["cut"].usage.completion_tokens == 4
    assert (found["whole"].text, found["whole"].finish_reason) == (runner._tokenizer.decode([70, 71, 72]), "length")
    assert [ask["is_streamed"] for ask in fake.asks()] == [True] * 3
    runner.close()
    (withdrawn,) = [line["ids"] for line in fake.lines()[1:-1] if line["type"] == "withdraw"]
    assert withdrawn == [next(ask["id"] for ask in fake.asks() if ask["prompt_token_ids"][1] == ENDLESS)]


def test_answer_is_cut_where_the_oracle_cuts_it(runner: VllmRunner, tiny_checkpoint: Path) -> None:
    """In `tokens` a bar is the end token; `yz` stops, and four tokens are the most."""
    from moebeam.model_runner.transformers_engine.growing_answers import GrowingAnswer

    tokenizer = runner._tokenizer
    for tokens in ("k", "k|k", "klm|", "klmno", "|klm", "kyzl", "kly|", "klyz", "ky|z"):
        token_ids = [EOS_ID if token == "|" else tokenizer.token_to_id(token) for token in tokens]
        asked = request("x", [70], max_tokens=4, stop=("yz", "never"))
        oracle = GrowingAnswer(asked.sampling, tokenizer, frozenset({EOS_ID}))
        for token_id in token_ids:
            oracle.append(token_id)
        answer = runner._start_answer(asked)
        answer.extend(vllm_process.TokenUpdate("0", token_ids))
        assert (answer.finish_reason, answer.token_ids) == (oracle.finish_reason, oracle.token_ids)
        if answer.finish_reason is not None:
            assert runner._complete(answer, None).text == oracle.text


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (replace(request("x", []), prompt_token_ids=np.array([], dtype=np.int32)), EngineFailed, "at least one token"),
        (request("x", [261]), EngineFailed, "0 to 260"),
        (request("x", [-1]), EngineFailed, "0 to 260"),
        (request("x", [70], max_tokens=0), EngineFailed, "max_tokens"),
        (request("x", [70] * 58), ContextOverflow, "59 prompt tokens and max_tokens 6 exceed the context of 64"),
        (request("x", [REFUSE]), EngineFailed, "VLLMValidationError: no"),
        (request("x", [ABORT]), EngineFailed, "after 1 tokens, its reason: 'abort'"),
    ],
)
def test_request_that_cannot_run_is_a_typed_failure_and_the_rest_go_on(
    runner: VllmRunner, asked: Request, error: type[Exception], words: str
) -> None:
    found = by_id(runner.generate([request("a", [70]), asked, request("b", [80])]))
    assert type(found["x"].error) is error
    assert words in str(found["x"].error)
    assert found["x"].finish_reason == "error"
    assert found["a"].error is found["b"].error is None


@pytest.mark.parametrize("cause", [DIE_ONCE, GARBAGE])
def test_death_of_vllm_costs_no_answer_when_it_does_not_repeat(runner: VllmRunner, fake: Fake, cause: int) -> None:
    """Garbage is answered by no process, so its request fails; a death that does not come again costs nothing."""
    requests = [request(str(i), [70 + i]) for i in range(12)] + [request("x", [cause])]
    found = by_id(runner.generate(requests))
    assert {name for name, completion in found.items() if completion.error} == ({"x"} if cause == GARBAGE else set())
    assert fake.num_processes == (3 if cause == GARBAGE else 2)


@pytest.mark.parametrize(("batch_size", "num_deaths"), [(4, 2), (32, 3)])
def test_only_the_request_that_vllm_dies_over_fails(
    fake: Fake, tiny_checkpoint: Path, batch_size: int, num_deaths: int
) -> None:
    runner = load_vllm_runner(config_of(tiny_checkpoint, batch_size=batch_size))
    found = by_id(runner.generate([request("x", [69, DIE]), *(request(str(i), [70 + i]) for i in range(12))]))
    assert len(found) == 13
    assert isinstance(found["x"].error, EngineFailed)
    assert "exit status -9" in str(found["x"].error)
    assert all(found[str(i)].error is None for i in range(12))
    assert fake.num_processes == num_deaths + 1
    # What was in flight is asked again before anything else, in token order and fewer at once.
    assert [ask["prompt_token_ids"][1] for ask in fake.asks(1)][:3] == [69, 70, 71][: batch_size * 2 // 16 or 1]
    assert max(ask["num_unanswered"] for ask in fake.asks(num_deaths - 1)) == 1
    assert by_id(runner.generate([request("y", [70])]))["y"].error is None
    runner.close()


def test_deaths_with_answers_in_between_do_not_add_up(runner: VllmRunner, fake: Fake) -> None:
    fatal = [request(str(token), [token, DIE]) for token in (69, 85, 99)]
    found = by_id(runner.generate([*fatal, *(request(f"good {i}", [70 + i]) for i in range(28))]))
    assert {name for name, completion in found.items() if completion.error} == {"69", "85", "99"}
    assert len(found) == 31
    assert fake.num_processes == 7


def test_vllm_that_only_dies_is_an_error_of_the_engine(runner: VllmRunner, fake: Fake) -> None:
    completions = runner.generate([request(str(i), [DIE]) for i in range(40)])
    with pytest.raises(EngineLoadError, match=r"died 5 times without an answer.*exit status -9"):
        list(completions)
    assert fake.num_processes == 5


def test_process_killed_from_outside_is_replaced(runner: VllmRunner, fake: Fake) -> None:
    completions = runner.generate([request("a", [ENDLESS], max_tokens=40), *(request(str(i), [70]) for i in range(4))])
    next(completions)
    os.kill(runner._supervisor.last.popen.pid, signal.SIGKILL)
    found = by_id(completions)
    assert found["a"].error is None
    assert found["a"].usage.completion_tokens == 40
    assert fake.num_processes == 2


def test_request_to_a_dead_process_is_told_so(runner: VllmRunner) -> None:
    process = runner._supervisor.last
    os.kill(process.popen.pid, signal.SIGKILL)
    process._reader.join()
    replies: Any = SimpleQueue()
    process.ask("0", {}, replies)
    assert isinstance(replies.get(timeout=10), EngineExit)


def test_two_calls_at_once_get_their_own_answers(runner: VllmRunner) -> None:
    calls = [runner.generate([request(f"{name}{i}", [70 + i]) for i in range(6)]) for name in "ab"]
    found = [[completion.request_id for completion in pair] for pair in zip(*calls, strict=True)]
    assert sorted(pair[0] for pair in found) == [f"a{i}" for i in range(6)]
    assert sorted(pair[1] for pair in found) == [f"b{i}" for i in range(6)]


def test_abandoned_call_withdraws_what_is_in_flight(runner: VllmRunner, fake: Fake) -> None:
    completions = runner.generate([request(str(i), [70]) for i in range(5)])
    next(completions)
    del completions
    gc.collect()
    assert by_id(runner.generate([request("next", [71])]))["next"].error is None
    (line,) = [line for line in fake.lines()[1:] if line["type"] == "withdraw"]
    assert len(line["ids"]) == 4


def test_process_ends_with_its_runner(fake: Fake, tiny_checkpoint: Path) -> None:
    runner = load_vllm_runner(config_of(tiny_checkpoint))
    popen = runner._supervisor.last.popen
    del runner
    gc.collect()
    assert popen.returncode == 0
    assert fake.lines()[-1] == "end"


def test_closed_engine_refuses_to_answer(runner: VllmRunner) -> None:
    runner.close()
    with pytest.raises(EngineLoadError, match="closed"):
        list(runner.generate([request("a", [70])]))


def test_engine_arguments_are_the_jobs_and_the_machines(
    fake: Fake, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ARGUMENTS_VARIABLE, '{"tensor_parallel_size": 8}')
    load_vllm_runner(config_of(tiny_checkpoint, dtype="bfloat16", batch_size=7, device="cpu")).close()
    load_vllm_runner(config_of(tiny_checkpoint)).close()
    arguments = fake.lines(0)[0]
    assert (arguments["model"], arguments["dtype"]) == (str(tiny_checkpoint), "bfloat16")
    assert (arguments["max_num_seqs"], arguments["tensor_parallel_size"]) == (7, 8)
    assert arguments["enable_prefix_caching"] is True
    assert arguments["generation_config"] == "vllm"
    # The checkpoint is float32; vLLM's own `auto` would make bfloat16 of it.
    assert fake.lines(1)[0]["dtype"] == "float32"
    assert "max_num_seqs" not in fake.lines(1)[0]


def test_what_cannot_be_loaded_is_an_engine_load_error(
    fake: Fake, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in (
        config_of(tmp_path / "missing"),
        config_of("memory://bucket/model"),
        config_of(tiny_checkpoint, device="cuda:1"),
        config_of(tiny_checkpoint, dtype="float8"),
    ):
        with pytest.raises(EngineLoadError, match=r"expected .* found"):
            load_vllm_runner(config)
    for arguments, words in (
        ("[]", "JSON object"),
        ("{", "JSON object"),
        ('{"model": "x"}', "model cannot be set"),
        ('{"fail": 1}', "RuntimeError: see above; .*ValueError: the cause"),
    ):
        monkeypatch.setenv(ARGUMENTS_VARIABLE, arguments)
        with pytest.raises(EngineLoadError, match=words):
            load_vllm_runner(config_of(tiny_checkpoint))
    monkeypatch.delenv(ARGUMENTS_VARIABLE)
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "no_python"))
    with pytest.raises(EngineLoadError, match=PYTHON_VARIABLE):
        load_vllm_runner(config_of(tiny_checkpoint))


def test_without_vllm_the_error_says_what_to_do(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(vllm_runner, "find_spec", lambda name: None)
    with pytest.raises(EngineLoadError, match=f"install it into an environment of its own and set {PYTHON_VARIABLE}"):
        load_vllm_runner(config_of(tiny_checkpoint))
