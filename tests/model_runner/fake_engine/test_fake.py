"""Scripts of the fake engine: what they may say, and what then comes out."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.fake_engine.runner import FAILURES, FakeRunner, load_fake_runner
from moebeam.schemas.errors import ContentRefused, EngineLoadError, EngineOverloaded
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config

CONFIG = engine_config(engine="fake", path="", name="model", revision="revision")


def load(tmp_path: Path, script: object, path: str = "") -> FakeRunner:
    file = tmp_path / "script.json"
    file.write_text(script if isinstance(script, str) else json.dumps(script))
    return load_fake_runner(engine_config("fake", path, "model", "revision", script=str(file)))


def request(text: str = "hello", *, tokens: tuple[int, ...] = (1, 2, 3), **values: Any) -> Request:
    sampling = Sampling(max_tokens=values.pop("max_tokens", 64))
    values = {"messages": (Message("user", text),), "request_id": text} | values
    return Request(prompt_token_ids=np.array(tokens, dtype=np.int32), sampling=sampling, **values)


def answer(runner: FakeRunner, asked: Request) -> Completion:
    (completion,) = runner.generate([asked])
    return completion


def test_without_a_script_the_answer_is_the_digest_of_the_prompt() -> None:
    completion = answer(load_fake_runner(CONFIG), request(tokens=(1, 2, 300)))
    digest = hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0, 44, 1, 0, 0])).hexdigest()[:16]
    assert json.loads(completion.text) == {"echo": digest, "num_prompt_tokens": 3}
    assert (completion.finish_reason, completion.error) == ("stop", None)
    assert (completion.provider, completion.model, completion.model_revision) == ("fake", "model", "revision")
    assert completion.usage.completion_tokens == -(-len(completion.text) // 4)


def test_first_matching_rule_wins_and_looks_at_the_last_user_message(tmp_path: Path) -> None:
    rules = [{"contains": "a+", "text": "plain"}, {"pattern": "a+", "text": "regex"}, {"contains": "aa", "text": "no"}]
    runner = load(tmp_path, {"default": {"text": "default"}, "rules": rules})
    assert answer(runner, request("xa+")).text == "plain"
    assert answer(runner, request("aab")).text == "regex"
    chat = (Message("user", "aa"), Message("user", "zz"), Message("assistant", "aa"))
    assert answer(runner, request(messages=chat)).text == "default"
    assert answer(runner, request(messages=())).text == "default"


def test_rule_may_hold_for_one_attempt_only(tmp_path: Path) -> None:
    runner = load(tmp_path, {"rules": [{"attempt": 1, "failure": "engine_overloaded"}]})
    assert isinstance(answer(runner, request(attempt=1)).error, EngineOverloaded)
    assert answer(runner, request(attempt=2)).error is None


def test_scripted_failure_is_typed_and_still_counts_the_prompt(tmp_path: Path) -> None:
    reply = {"failure": "refused", "message": "no", "completion_tokens": 2}
    completion = answer(load(tmp_path, {"default": reply}), request())
    assert isinstance(completion.error, ContentRefused)
    assert str(completion.error) == "no"
    assert (completion.text, completion.finish_reason) == ("", "error")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 2)


def test_failures_are_those_of_the_run_stage() -> None:
    assert {"engine_crashed", "engine_failed", "engine_overloaded", "engine_timeout", "refused"} <= set(FAILURES)
    assert all(error.error_stage == "run" for error in FAILURES.values())


def test_simulated_cache_is_per_tenant_and_per_call() -> None:
    runner = load_fake_runner(CONFIG)
    asked = [
        request("1", tokens=(1, 2, 3)),
        request("2", tokens=(1, 2, 4, 5)),
        request("3", tokens=(1, 2, 4), tenant="other"),
        request("4", tokens=(1, 2, 4, 5)),
        request("5", tokens=(), tenant="other"),
    ]
    assert [completion.usage.cached_tokens for completion in runner.generate(asked)] == [0, 2, 0, 4, 0]
    assert [completion.usage.cached_tokens for completion in runner.generate(asked[:1])] == [0]


@pytest.mark.parametrize("cached_tokens", [None, 1])
def test_scripted_cached_tokens_win_and_null_means_unknown(tmp_path: Path, cached_tokens: int | None) -> None:
    runner = load(tmp_path, {"default": {"cached_tokens": cached_tokens}})
    assert answer(runner, request()).usage.cached_tokens == cached_tokens


def test_a_kept_answer_passes_as_it_is_and_the_next_request_shares_with_its_prompt(tmp_path: Path) -> None:
    runner = load(tmp_path, {})
    kept = answer(runner, request())
    found = list(runner.generate([replace(request(), earlier=kept), request()]))
    assert found[0] is kept
    assert found[1].usage.cached_tokens == request().num_prompt_tokens > 0


def test_reasoning_is_part_of_the_completion_tokens(tmp_path: Path) -> None:
    runner = load(tmp_path, {"default": {"text": "12345678", "reasoning_content": "1234"}})
    completion = answer(runner, request())
    assert completion.reasoning_content == "1234"
    assert (completion.usage.completion_tokens, completion.usage.reasoning_tokens) == (3, 1)
    assert answer(runner, request(max_tokens=2)).text == "1234"


def test_long_text_is_cut_at_max_tokens(tmp_path: Path) -> None:
    runner = load(tmp_path, {"default": {"text": "123456789", "finish_reason": "stop"}})
    cut = answer(runner, request(max_tokens=2))
    assert (cut.text, cut.finish_reason, cut.usage.completion_tokens) == ("12345678", "length", 2)
    whole = answer(runner, request(max_tokens=3))
    assert (whole.text, whole.finish_reason, whole.usage.completion_tokens) == ("123456789", "stop", 3)


def test_tokens_are_counted_by_the_checkpoints_tokenizer_when_there_is_one(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    runner = load(tmp_path, {"default": {"text": "12345"}}, str(tiny_checkpoint))
    assert isinstance(runner.encoder, PromptEncoder)
    assert answer(runner, request()).usage.completion_tokens == 5
    cut = answer(runner, request(max_tokens=3))
    assert (cut.text, cut.finish_reason, cut.usage.completion_tokens) == ("123", "length", 3)


def test_scripted_latency_is_reported_as_it_is(tmp_path: Path) -> None:
    completion = answer(load(tmp_path, {"latency_ms": 1.5}), request())
    assert completion.latency_ms == 1.5
    assert completion.started_at.utcoffset() is not None


@pytest.mark.parametrize(
    ("script", "field"),
    [
        ("{", "file"),
        ({"defualt": {}}, "defualt"),
        ({"default": {"failure": "exploded"}}, "default.failure.*engine_failed.*exploded"),
        ({"default": {"message": "x"}}, "default.*failure"),
        ({"default": {"finish_reason": "done"}}, "default.finish_reason"),
        ({"default": {"cached_tokens": -1}}, "default.cached_tokens"),
        ({"rules": [{"contains": "a"}, {"pattern": "("}]}, r"rules\.1\.pattern"),
        ({"rules": [{"text": "x"}]}, r"rules\.0.*always match"),
        ({"rules": [{"contains": "a", "pattern": "b"}]}, r"rules\.0.*not both"),
        ({"latency_ms": -1}, "latency_ms"),
    ],
)
def test_wrong_script_is_refused_naming_file_and_field(tmp_path: Path, script: object, field: str) -> None:
    with pytest.raises(EngineLoadError, match=rf"script\.json: .*{field}"):
        load(tmp_path, script)


def test_missing_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match="nothing-here"):
        load_fake_runner(engine_config("fake", "", "m", "r", script=str(tmp_path / "nothing-here")))
