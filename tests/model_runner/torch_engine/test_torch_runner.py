"""The torch engine behind `ModelRunner`: texts, seeds, log probabilities, stops, grammars, usage, and bad requests."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moebeam.model_runner.grammar.constraint import Constraint
from moebeam.model_runner.grammar.json_grammar import json_schema_grammar
from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tree_tokens, prefix_key
from moebeam.model_runner.protocol import EngineConfig, counters_since
from moebeam.model_runner.torch_engine.engine import TorchEngine
from moebeam.model_runner.torch_engine.runner import TorchRunner, load_torch_runner
from moebeam.model_runner.transformers_engine.runner import load_transformers_runner
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import EngineFailed, EngineLoadError, InvalidGrammar
from moebeam.schemas.records import Completion, Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.tiny_requests import (
    CANNOT_RUN,
    END_ID,
    FIRST_ID,
    GRAMMAR,
    SCHEMA,
    request_of,
    run_all,
    texts,
)


def make_config(path: Path | str, **values: Any) -> EngineConfig:
    defaults = {"engine": "torch", "path": str(path), "name": "tiny", "revision": "r"}
    return engine_config(**(defaults | {"dtype": "float32", "device": "cpu"} | values))


def random_requests(num_requests: int, num_tokens: int = 9, **values: Any) -> list[Request]:
    """Prompts of which all share some tokens, and neighbours more."""
    rng = random.Random(0)
    shared = [rng.randrange(FIRST_ID, END_ID) for _ in range(num_tokens)]
    return [request_of(i, shared[: 3 + i % 4] + [FIRST_ID + i] * (1 + i % 5), **values) for i in range(num_requests)]


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Path) -> TorchRunner:
    return load_torch_runner(make_config(tiny_checkpoint))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


def test_greedy_texts_are_those_of_the_transformers_engine(tiny_checkpoint: Path, runner: TorchRunner) -> None:
    requests = [*random_requests(9), request_of("alone", []), request_of("stopped", [70, 71], 20, stop=("e", "a"))]
    oracle = load_transformers_runner(make_config(tiny_checkpoint, engine="transformers"))
    expected = texts({completion.request_id: completion for completion in oracle.generate(requests)})
    assert texts(run_all(runner, requests)) == expected
    assert len(set(expected.values())) > 8


@pytest.mark.parametrize(
    "penalties", [{"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": -0.5}]
)
def test_penalties_give_the_answers_of_the_transformers_engine(
    tiny_checkpoint: Path, runner: TorchRunner, penalties: dict[str, float]
) -> None:
    plain = random_requests(6)
    requests = [replace(one, sampling=replace(one.sampling, max_tokens=24, **penalties)) for one in plain]
    oracle = load_transformers_runner(make_config(tiny_checkpoint, engine="transformers"))
    expected = texts({completion.request_id: completion for completion in oracle.generate(requests)})
    assert texts(run_all(runner, requests)) == expected
    unpunished = [replace(one, sampling=replace(one.sampling, max_tokens=24)) for one in plain]
    if min(penalties.values()) > 0:
        assert texts(run_all(runner, unpunished)) != expected


@pytest.mark.parametrize("kept_rows", [range(0, 12, 2), range(7), range(11, 12)])
def test_kept_answers_pass_as_they_are_and_the_rest_counts_the_hits_of_a_whole_run(
    runner: TorchRunner, kept_rows: range
) -> None:
    requests = random_requests(12)
    whole = run_all(runner, requests)
    before = runner.counters()
    kept = {str(row): whole[str(row)] for row in kept_rows}
    found = run_all(runner, [replace(one, earlier=kept.get(one.request_id)) for one in requests])
    assert {name: (one.text, one.usage) for name, one in found.items()} == {
        name: (one.text, one.usage) for name, one in whole.items()
    }
    assert all(found[name] is one for name, one in kept.items())
    asked = [one for one in requests if one.request_id not in kept]
    counted = counters_since(before, runner.counters())
    assert counted["num_prompts"] == len(asked)
    assert counted["num_computed_prefill_tokens"] == count_tree_tokens(asked)


def test_answer_ends_with_the_checkpoints_end_token_that_its_text_does_not_show(runner: TorchRunner) -> None:
    grammar = json.dumps({"grammars": [{"lark_grammar": 'start: "ab"'}]})
    (found,) = run_all(runner, [request_of(0, [70], 9, grammar=grammar)]).values()
    assert (found.text, found.finish_reason) == ("ab", "stop")
    sampled = run_all(runner, random_requests(20, max_tokens=100, temperature=3.0))
    ended = [one for one in sampled.values() if one.finish_reason == "stop"]
    assert ended
    for one in ended:
        # Special tokens count but are not text.
        assert 1 <= one.usage.completion_tokens < 100
        assert "<|" not in one.text


def test_sampled_text_depends_on_the_request_alone(tiny_checkpoint: Path, runner: TorchRunner) -> None:
    requests = random_requests(6, temperature=1.5, top_p=0.95, min_p=0.01)
    first = texts(run_all(runner, requests))
    assert texts(run_all(runner, requests[::-1])) == first
    for one in requests[:3]:
        assert texts(run_all(runner, [one]))[one.request_id] == first[one.request_id]
    small = load_torch_runner(make_config(tiny_checkpoint, max_cache_bytes=1, batch_size=2))
    assert texts(run_all(small, requests)) == first


def test_seed_row_sample_and_run_change_what_is_drawn_and_attempts_do_not(runner: TorchRunner) -> None:
    prompt = [70, 71, 72]
    seeds = [1, 1, 2, None, None]
    requests = [request_of(i, prompt, 30, temperature=2.0, seed=seed) for i, seed in enumerate(seeds)]
    requests = [replace(one, row_id="row") for one in requests]
    requests += [replace(requests[4], request_id="5", attempt=2), replace(requests[0], request_id="6", row_id="other")]
    requests += [replace(requests[4], request_id="7", run_key="x"), replace(requests[0], request_id="8", sample=1)]
    found = [one.text for _, one in sorted(run_all(runner, requests).items())]
    assert found[0] == found[1]
    assert found[3] == found[4] == found[5]
    assert len(set(found)) == 6


def test_samples_of_a_row_share_one_prefill_and_draw_each_their_own(tiny_checkpoint: Path) -> None:
    runner = load_torch_runner(make_config(tiny_checkpoint))
    prompt = list(range(70, 110))
    samples = [
        request_of(i, prompt, 12, temperature=2.0, seed=3, logprobs=True, row_id="row", sample=i) for i in range(8)
    ]
    found = run_all(runner, samples)
    assert len({one.text for one in found.values()}) == 8
    assert sorted(one.usage.computed_tokens or 0 for one in found.values()) == [0] * 7 + [len(prompt) + 1]
    assert runner.counters()["num_computed_prefill_tokens"] == len(prompt) + 1
    for one in samples[2:4]:
        (alone,) = run_all(load_torch_runner(make_config(tiny_checkpoint)), [one]).values()
        assert alone.text == found[one.request_id].text
        assert alone.logprobs == pytest.approx(found[one.request_id].logprobs, rel=1e-5)


def test_greedy_and_sampled_requests_do_not_change_each_other(runner: TorchRunner) -> None:
    greedy = random_requests(4)
    sampled = [replace(one, request_id=f"s{one.request_id}") for one in random_requests(4, temperature=1.0)]
    together = texts(run_all(runner, [*greedy, *sampled]))
    assert together == texts(run_all(runner, greedy)) | texts(run_all(runner, sampled))


@torch.inference_mode()
def log_softmax(model: PreTrainedModel, token_ids: Sequence[int], answer: Sequence[int]) -> list[float]:
    """The log probability of each token of an answer, by one forward pass."""
    logits = model(torch.tensor([[*token_ids, *answer[:-1]]]), use_cache=False, logits_to_keep=len(answer)).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1).tolist()


def test_logprobs_are_those_of_transformers_one_for_each_completion_token(
    runner: TorchRunner, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, list[int]] = {}
    run = TorchEngine.run

    def noted(engine: TorchEngine, prompts: Any) -> Iterator[Any]:
        for finished in run(engine, prompts):
            answers[finished.prompt_id] = finished.token_ids
            yield finished

    monkeypatch.setattr(TorchEngine, "run", noted)
    requests = random_requests(5, logprobs=True)
    requests.append(request_of("sampled", [90, 91], temperature=1.2, top_p=0.8, logprobs=True))
    requests.append(request_of("plain", [90, 91]))
    found = run_all(runner, requests)
    assert found["plain"].logprobs is None
    for request in requests[:-1]:
        one = found[request.request_id]
        assert one.logprobs is not None
        assert len(one.logprobs) == one.usage.completion_tokens
        expected = log_softmax(model, request.prompt_token_ids.tolist(), answers[request.request_id])
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


def test_text_ends_before_a_stop_string_and_decoding_soon_after(runner: TorchRunner) -> None:
    requests = random_requests(8, max_tokens=20)
    whole = run_all(runner, requests)
    stop = whole["3"].text[4:6]
    cut = run_all(runner, [replace(one, sampling=Sampling(20, stop=("never", stop))) for one in requests])
    for name, one in cut.items():
        text = whole[name].text
        if stop in text:
            assert (one.text, one.finish_reason) == (text[: text.index(stop)], "stop")
            assert one.usage.completion_tokens < whole[name].usage.completion_tokens
        else:
            assert texts({name: one}) == texts({name: whole[name]})
    assert any(stop not in one.text for one in whole.values())


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_constrained_answers_are_valid_and_neighbours_unchanged(runner: TorchRunner, temperature: float) -> None:
    free = random_requests(4)
    bound = [
        replace(one, request_id=f"b{one.request_id}", grammar=GRAMMAR)
        for one in random_requests(6, max_tokens=90, temperature=temperature, logprobs=True)
    ]
    found = run_all(runner, [request for pair in itertools.zip_longest(free, bound) for request in pair if request])
    assert texts({one.request_id: found[one.request_id] for one in free}) == texts(run_all(runner, free))
    schema = AnswerSchema.from_json(SCHEMA, formats="assert", source="tickets")
    for request in bound:
        one = found[request.request_id]
        assert (one.error, one.finish_reason) == (None, "stop")
        assert schema.check(one.text) == json.loads(one.text)
        # Every name of a property is forced, so it costs no draw and is certain.
        assert one.logprobs is not None
        assert len(one.logprobs) == one.usage.completion_tokens
        assert sum(logprob == 0.0 for logprob in one.logprobs) > len('"name":"priority":"is_open":')
    assert len({found[request.request_id].text for request in bound}) > 1


def test_constrained_answers_are_the_same_when_memory_is_short(tiny_checkpoint: Path, runner: TorchRunner) -> None:
    requests = [replace(one, grammar=GRAMMAR) for one in random_requests(5, max_tokens=90)]
    small = load_torch_runner(make_config(tiny_checkpoint, max_cache_bytes=1))
    assert texts(run_all(small, requests)) == texts(run_all(runner, requests))


def test_forced_tokens_are_not_drawn_one_at_a_time(runner: TorchRunner) -> None:
    num_steps = runner.engine.counters.num_steps
    grammar = json_schema_grammar({"const": "a long text of which nothing is left to the model"}, max_whitespace=0)
    (found,) = run_all(runner, [request_of(0, [70], 90, grammar=grammar)]).values()
    assert json.loads(found.text) == "a long text of which nothing is left to the model"
    assert runner.engine.counters.num_steps - num_steps < found.usage.completion_tokens / 4


def test_constrained_answer_that_is_cut_says_so(runner: TorchRunner) -> None:
    (found,) = run_all(runner, [request_of(0, [70], 5, grammar=GRAMMAR)]).values()
    assert (found.finish_reason, found.usage.completion_tokens) == ("length", 5)
    assert '{"name":"'.startswith(found.text)


def test_grammar_that_cannot_be_compiled_fails_its_request_alone(runner: TorchRunner) -> None:
    good = random_requests(3)
    requests = [
        request_of("first", [70], grammar="no grammar"),
        *good,
        request_of("last", [70], grammar=json.dumps({"grammars": [{"json_schema": {"type": "nonsense"}}]})),
    ]
    found = run_all(runner, requests)
    for name in ("first", "last"):
        assert isinstance(found[name].error, InvalidGrammar)
        assert (found[name].finish_reason, found[name].text, found[name].logprobs) == ("error", "", None)
    assert texts({one.request_id: found[one.request_id] for one in good}) == texts(run_all(runner, good))


def test_only_grammars_that_cannot_be_compiled_all_fail(runner: TorchRunner) -> None:
    found = run_all(runner, [request_of(i, [70], grammar="no grammar") for i in range(3)])
    assert all(isinstance(one.error, InvalidGrammar) for one in found.values())


def test_constraint_that_gives_up_fails_its_request_alone(runner: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    # llguidance may run past one of its limits when it takes a token that its mask allowed.
    accept = Constraint.accept
    num_accepted = 0

    def refuse_the_third(constraint: Constraint, token_id: int) -> None:
        nonlocal num_accepted
        num_accepted += 1
        if num_accepted == 3:
            raise EngineFailed("constrained decoding stopped: too complex")
        accept(constraint, token_id)

    good = random_requests(3)
    expected = texts(run_all(runner, good))
    monkeypatch.setattr(Constraint, "accept", refuse_the_third)
    found = run_all(runner, [*good, request_of("bad", [70], 60, grammar=GRAMMAR)])
    assert isinstance(found["bad"].error, EngineFailed)
    assert "too complex" in str(found["bad"].error)
    assert texts({one.request_id: found[one.request_id] for one in good}) == expected


def test_computed_tokens_of_all_requests_are_the_tokens_of_their_prefix_tree(runner: TorchRunner) -> None:
    requests = [*random_requests(12), request_of("twin", [9, 9, 9]), request_of("copy", [9, 9, 9])]
    requests += [replace(one, request_id=f"t{one.request_id}", tenant="other") for one in requests[:4]]
    found = run_all(runner, requests)
    assert sum(one.usage.computed_tokens or 0 for one in found.values()) == count_tree_tokens(requests)
    twins = [found["twin"].usage, found["copy"].usage]
    assert 4 in [usage.cached_tokens for usage in twins]
    for request in requests:
        usage = found[request.request_id].usage
        assert usage.prompt_tokens == request.num_prompt_tokens
        assert usage.completion_tokens == 12 or found[request.request_id].finish_reason == "stop"
        assert usage.reasoning_tokens == 0


def count_tree_tokens(requests: Sequence[Request]) -> int:
    ordered = sorted(requests, key=_key)
    lcps = common_prefix_lengths([_key(one) for one in ordered])
    return num_tree_tokens([one.num_prompt_tokens for one in ordered], lcps)


def _key(request: Request) -> bytes:
    return prefix_key(request.tenant, request.prompt_token_ids)


def test_completion_says_when_by_whom_and_for_how_long(runner: TorchRunner) -> None:
    found = run_all(runner, random_requests(3))
    for one in found.values():
        assert (one.provider, one.model, one.model_revision) == ("local", "tiny", "r")
        assert one.started_at.tzinfo is not None
        assert one.latency_ms > 0


@pytest.mark.parametrize(("bad", "error"), CANNOT_RUN.values(), ids=CANNOT_RUN)
def test_request_that_cannot_run_is_a_typed_failure_among_others(
    runner: TorchRunner, bad: Request, error: type[Exception]
) -> None:
    good = random_requests(3)
    found = run_all(runner, [good[0], bad, *good[1:]])
    refused = found["bad"]
    assert type(refused.error) is error
    assert (refused.finish_reason, refused.text, refused.usage.completion_tokens) == ("error", "", 0)
    assert refused.usage.prompt_tokens == bad.num_prompt_tokens
    assert refused.started_at.year > 2000
    assert texts({one.request_id: found[one.request_id] for one in good}) == texts(run_all(runner, good))


def test_step_out_of_memory_fails_the_request_that_causes_it(
    runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = random_requests(5)
    expected = texts(run_all(runner, good))
    extend = runner.engine.model.extend

    def out_of_memory(batch: Any, cache: Any) -> torch.Tensor:
        if bool((batch.token_ids == 200).any()):
            raise torch.OutOfMemoryError("out of memory")
        return extend(batch, cache)

    monkeypatch.setattr(runner.engine.model, "extend", out_of_memory)
    found = run_all(runner, [*good, request_of("bad", [200, 6])])
    assert isinstance(found["bad"].error, EngineFailed)
    assert found["bad"].usage.completion_tokens == 0
    assert texts({one.request_id: found[one.request_id] for one in good}) == expected


def test_runs_may_be_under_way_at_once(runner: TorchRunner) -> None:
    first, second = random_requests(5), random_requests(5, temperature=1.0)
    expected = texts(run_all(runner, first)), texts(run_all(runner, second))
    found: tuple[dict[str, Completion], dict[str, Completion]] = ({}, {})
    for pair in zip(runner.generate(first), runner.generate(second), strict=True):
        for one, into in zip(pair, found, strict=True):
            into[one.request_id] = one
    assert (texts(found[0]), texts(found[1])) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "/nowhere/at/all"}, "nowhere"),
        ({"device": "nonsense"}, "nonsense"),
        ({"dtype": "float8"}, "float8"),
    ],
    ids=["path", "device", "dtype"],
)
def test_what_cannot_be_loaded_is_an_engine_load_error(
    tiny_checkpoint: Path, values: dict[str, str], message: str
) -> None:
    with pytest.raises(EngineLoadError, match=message):
        load_torch_runner(make_config(**({"path": tiny_checkpoint} | values)))
