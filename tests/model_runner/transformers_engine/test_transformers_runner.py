"""The oracle engine: batches against single requests, sampling, stops, limits, and one bad request among good ones."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.torch_engine.runner import load_torch_runner
from moebeam.model_runner.transformers_engine import runner as transformers_runner
from moebeam.model_runner.transformers_engine.growing_answers import GrowingAnswer
from moebeam.model_runner.transformers_engine.runner import TransformersRunner, load_transformers_runner, next_batch
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import EngineFailed, EngineLoadError, InvalidGrammar
from moebeam.schemas.records import Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.tiny_requests import CANNOT_RUN, EOS_ID, GRAMMAR, SCHEMA, request_of, run_all, texts


def config_of(path: Path | str, **values: Any) -> EngineConfig:
    return engine_config(**({"engine": "transformers", "path": str(path), "name": "tiny", "revision": "r"} | values))


def random_requests(num_requests: int, num_tokens: int, seed: int = 0, **values: Any) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [request_of(str(i), rng.integers(5, 261, num_tokens).tolist(), **values) for i in range(num_requests)]


def answers(runner: TransformersRunner, requests: list[Request]) -> dict[str, tuple[str, str, int]]:
    return texts(run_all(runner, requests))


@pytest.fixture(scope="module")
def runner(tiny_checkpoint: Path) -> TransformersRunner:
    return load_transformers_runner(config_of(tiny_checkpoint, dtype="float32", device="cpu"))


@pytest.fixture
def batch_sizes(runner: TransformersRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that the model is given from here on."""
    sizes: list[int] = []
    run = runner._run

    def noted(batch: Sequence[Request]) -> Any:
        sizes.append(len(batch))
        return run(batch)

    monkeypatch.setattr(runner, "_run", noted)
    return sizes


def test_batch_of_equal_lengths_answers_as_each_request_alone(
    runner: TransformersRunner, batch_sizes: list[int]
) -> None:
    # Longer than the sliding window of 16, and not a multiple of either compression rate.
    requests = random_requests(7, 37)
    together = answers(runner, requests)
    assert batch_sizes == [7]
    alone: dict[str, tuple[str, str, int]] = {}
    for one in requests:
        alone |= answers(runner, [one])
    assert together == alone
    assert len({text for text, _, _ in together.values()}) > 1


def test_greedy_answer_is_the_argmax_of_a_forward_pass_without_cache(runner: TransformersRunner) -> None:
    (one,) = random_requests(1, 21, max_tokens=8)
    token_ids = one.prompt_token_ids.tolist()
    with torch.inference_mode():
        for _ in range(8):
            logits = runner._model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
            token_ids.append(int(logits.argmax()))
            if token_ids[-1] == EOS_ID:
                break
    expected = runner._tokenizer.decode(token_ids[one.num_prompt_tokens :], skip_special_tokens=True)
    assert answers(runner, [one])["0"][0] == expected


def test_batch_of_mixed_lengths_and_limits_answers_as_each_request_alone(
    runner: TransformersRunner, batch_sizes: list[int]
) -> None:
    # Prompts that end before, at and after compression windows, one of them with the end token inside.
    lengths = [19, 20, 21, 24, 27, 31, 33, 40]
    requests = [
        replace(random_requests(1, length, seed=length, max_tokens=1 + i * 2)[0], request_id=str(i))
        for i, length in enumerate(lengths)
    ]
    requests[6].prompt_token_ids[28] = EOS_ID
    together = answers(runner, requests)
    assert batch_sizes == [8]
    alone: dict[str, tuple[str, str, int]] = {}
    for one in requests:
        alone |= answers(runner, [one])
    assert together == alone
    assert {tokens for _, _, tokens in alone.values()} > {1, 3}


@pytest.mark.parametrize(
    ("lengths", "batch"),
    [
        ([7], (0, 1)),
        ([1, 2, 3], (0, 3)),
        ([1, 2, 3, 4, 5], (0, 4)),
        ([1, 10, 11, 12, 13], (1, 5)),
        ([1, 33], (0, 2)),
        ([1, 34], (0, 1)),
        ([1, 60, 90], (1, 3)),
        ([1, 9, 60, 67, 100], (2, 4)),
        ([10, 10, 10, 10, 10], (0, 4)),
    ],
)
def test_next_batch_is_the_largest_and_then_the_closest(lengths: list[int], batch: tuple[int, int]) -> None:
    assert next_batch(lengths, 4) == batch


def test_window_bounds_what_is_pulled(runner: TransformersRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_runner, "NUM_WINDOW_REQUESTS", 4)
    pulled: list[str] = []

    def source() -> Iterator[Request]:
        for one in random_requests(10, 4, max_tokens=1):
            pulled.append(one.request_id)
            yield one

    completions = runner.generate(source())
    next(completions)
    assert len(pulled) == 4
    assert len(list(completions)) == 9


def test_sampled_answer_depends_on_request_seed_and_sample_alone(
    runner: TransformersRunner, batch_sizes: list[int]
) -> None:
    requests = random_requests(4, 9, temperature=1.5)
    first = answers(runner, requests)
    assert set(batch_sizes) == {1}
    torch.manual_seed(99)
    assert answers(runner, requests[::-1]) == first
    assert answers(runner, requests[2:3])["2"] == first["2"]
    assert answers(runner, [replace(requests[0], attempt=2)])["0"] == first["0"]
    assert answers(runner, [replace(requests[0], sample=1)])["0"] != first["0"]
    seeded = [replace(requests[0], sampling=Sampling(12, 1.5, seed=seed)) for seed in (1, 1, 2)]
    one, same, other = (answers(runner, [r])["0"] for r in seeded)
    assert one == same != other


def test_sampling_leaves_the_callers_random_numbers_alone(runner: TransformersRunner) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    answers(runner, random_requests(1, 9, temperature=1.0))
    assert torch.equal(torch.rand(3), expected)


def test_sampling_follows_temperature_and_top_p(runner: TransformersRunner) -> None:
    (greedy,) = random_requests(1, 9)
    expected = answers(runner, [greedy])["0"]
    for values in ({"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}):
        assert answers(runner, [replace(greedy, sampling=Sampling(12, **values))])["0"] == expected


def test_sampling_uses_what_was_asked_and_no_default_of_transformers(
    runner: TransformersRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = runner._model.generate
    found: list[tuple[object, ...]] = []

    def noted(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        settings = generation_config
        found.append((settings.do_sample, settings.temperature, settings.top_p, settings.top_k))
        return generate(*args, generation_config=generation_config, **kwargs)

    monkeypatch.setattr(runner._model, "generate", noted, raising=False)
    answers(runner, random_requests(1, 4, temperature=0.6, top_p=0.95))
    assert found == [(True, 0.6, 0.95, 0)]


def test_text_ends_before_a_stop_string_that_counts_as_tokens(runner: TransformersRunner) -> None:
    requests = random_requests(6, 11, max_tokens=16)
    whole = answers(runner, requests)
    text = whole["3"][0]
    stop = text[4:6]
    for one in answers(runner, [replace(r, sampling=Sampling(16, stop=("never", stop))) for r in requests]).items():
        request_id, (cut, finish_reason, num_tokens) = one
        full_text, full_reason, full_tokens = whole[request_id]
        if stop in full_text:
            assert (cut, finish_reason) == (full_text[: full_text.index(stop)], "stop")
            assert num_tokens < full_tokens
        else:
            assert (cut, finish_reason, num_tokens) == (full_text, full_reason, full_tokens)


@pytest.mark.parametrize(
    ("tokens", "text", "finish_reason", "num_tokens"),
    [
        ("k", "k", None, 1),
        ("k|k", "k", "stop", 2),
        ("klm|", "klm", "stop", 4),
        ("klmno", "klmn", "length", 4),
        ("|klm", "", "stop", 1),
        ("kyzl", "k", "stop", 3),
        ("kly|", "kly", "stop", 4),
        ("klyz", "kl", "stop", 4),
        ("ky|z", "ky", "stop", 3),
    ],
)
def test_answer_ends_at_end_token_stop_string_or_max_tokens(
    runner: TransformersRunner, tokens: str, text: str, finish_reason: str | None, num_tokens: int
) -> None:
    """In `tokens`, a bar stands for the end token; `yz` stops, and four tokens are the most."""
    growing = GrowingAnswer(Sampling(4, stop=("yz", "never")), runner._tokenizer, frozenset({EOS_ID}))
    for token in tokens:
        growing.append(EOS_ID if token == "|" else runner._tokenizer.token_to_id(token))
    assert (growing.text, growing.finish_reason, len(growing.token_ids)) == (text, finish_reason, num_tokens)


def test_request_that_breaks_a_batch_fails_alone(runner: TransformersRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = runner._model.generate

    def break_on_77(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if bool((input_ids == 77).any()):
            raise torch.OutOfMemoryError("out of memory")
        return generate(input_ids, **kwargs)

    monkeypatch.setattr(runner._model, "generate", break_on_77, raising=False)
    requests = [request_of("a", [70, 71]), request_of("bad", [77, 78]), request_of("c", [72, 73])]
    found = {completion.request_id: completion for completion in runner.generate(requests)}
    assert isinstance(found["bad"].error, EngineFailed)
    assert "out of memory" in str(found["bad"].error)
    assert (found["bad"].usage.prompt_tokens, found["bad"].usage.completion_tokens) == (3, 0)
    assert found["a"].error is None
    assert found["c"].error is None


@pytest.mark.parametrize(("bad", "error"), CANNOT_RUN.values(), ids=CANNOT_RUN)
def test_request_that_cannot_run_is_a_typed_failure_before_its_batch(
    runner: TransformersRunner, bad: Request, error: type[Exception]
) -> None:
    good = request_of("good", bad.prompt_token_ids[1:].clip(5, 200).tolist()[:100])
    found = run_all(runner, [bad, good])
    assert type(found["bad"].error) is error
    assert found["bad"].finish_reason == "error"
    assert found["good"].error is None


def test_whole_context_may_be_used(runner: TransformersRunner) -> None:
    assert answers(runner, [request_of("0", [70] * 510, max_tokens=1)])["0"][2] == 1


def test_checkpoints_own_generation_settings_do_not_leak_in(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    file = folder / "generation_config.json"
    settings = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0, "max_new_tokens": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    requests = random_requests(3, 9)
    plain = load_transformers_runner(config_of(tiny_checkpoint))
    assert answers(load_transformers_runner(config_of(folder)), requests) == answers(plain, requests)


def test_bfloat16_is_loaded_when_asked_for(tiny_checkpoint: Path) -> None:
    loaded = load_transformers_runner(config_of(tiny_checkpoint, dtype="bfloat16"))
    assert loaded._model.lm_head.weight.dtype == torch.bfloat16
    assert len(answers(loaded, random_requests(2, 9, max_tokens=2))) == 2


def test_what_cannot_be_loaded_is_an_engine_load_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    without_weights = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    for config in (
        config_of(tmp_path / "missing"),
        config_of("memory://bucket/model"),
        config_of(without_weights),
        config_of(tiny_checkpoint, device="nonsense"),
        config_of(tiny_checkpoint, dtype="float8"),
    ):
        with pytest.raises(EngineLoadError, match=r"expected .* found"):
            load_transformers_runner(config)


def test_checkpoint_without_an_end_token_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    for name in ("generation_config.json", "config.json"):
        content = json.loads((folder / name).read_text()) | {"eos_token_id": None}
        (folder / name).write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": None, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(EngineLoadError, match="eos_token_id"):
        load_transformers_runner(config_of(folder))


def test_loading_and_answering_writes_nothing_to_the_terminal(
    tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers(load_transformers_runner(config_of(tiny_checkpoint)), random_requests(2, 5, max_tokens=2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_constrained_answers_are_valid_and_neighbours_unchanged(runner: TransformersRunner, temperature: float) -> None:
    free = [replace(one, request_id=f"free{one.request_id}") for one in random_requests(4, 9)]
    bound = [
        replace(one, grammar=GRAMMAR)
        for length in (9, 12)
        for one in random_requests(3, length, seed=length, max_tokens=90, temperature=temperature)
    ]
    bound = [replace(one, request_id=f"bound{index}") for index, one in enumerate(bound)]
    found = {one.request_id: one for one in runner.generate([*free, *bound])}
    alone = answers(runner, free)
    contract = AnswerSchema.from_json(SCHEMA, formats="assert", source="tickets")
    for request in free:
        one = found[request.request_id]
        assert (one.text, one.finish_reason, one.usage.completion_tokens) == alone[request.request_id]
    for request in bound:
        one = found[request.request_id]
        assert (one.error, one.finish_reason) == (None, "stop")
        assert contract.check(one.text) == json.loads(one.text)
    assert len({found[request.request_id].text for request in bound}) > 1


def test_a_grammar_that_ends_ends_the_answer_without_an_end_token(runner: TransformersRunner) -> None:
    grammar = json.dumps({"grammars": [{"lark_grammar": 'start: "ab"'}]})
    (found,) = runner.generate([replace(request_of("0", [70]), grammar=grammar)])
    assert (found.text, found.finish_reason, found.usage.completion_tokens) == ("ab", "stop", 2)


def test_a_constrained_answer_can_be_cut(runner: TransformersRunner) -> None:
    (found,) = runner.generate([replace(request_of("0", [70], max_tokens=5), grammar=GRAMMAR)])
    assert (found.text, found.finish_reason) == ('{"nam', "length")


@pytest.mark.parametrize("grammar", ["", "{}", '{"grammars":[]}', 'start: <unknown> "x"'])
def test_an_invalid_grammar_fails_its_request_alone(runner: TransformersRunner, grammar: str) -> None:
    good, bad = random_requests(2, 9)
    found = {one.request_id: one for one in runner.generate([replace(bad, grammar=grammar), good])}
    assert type(found[bad.request_id].error) is InvalidGrammar
    assert found[bad.request_id].finish_reason == "error"
    assert found[bad.request_id].usage.completion_tokens == 0
    assert found[good.request_id].error is None


def test_a_constraint_that_breaks_fails_its_answer_alone(
    runner: TransformersRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (replace(one, grammar=GRAMMAR) for one in random_requests(2, 9, max_tokens=90))
    compile_grammar = runner._compile_constraint
    num_compiled = 0

    def compile_or_break(one: Request) -> Any:
        nonlocal num_compiled
        constraint = compile_grammar(one)
        num_compiled += 1
        if one.request_id == bad.request_id and num_compiled > 2 and constraint is not None:
            constraint._compile_again = None
            constraint.matcher.consume_token(EOS_ID)
        return constraint

    monkeypatch.setattr(runner, "_compile_constraint", compile_or_break)
    found = {one.request_id: one for one in runner.generate([good, bad])}
    assert isinstance(found[bad.request_id].error, EngineFailed)
    assert found[bad.request_id].finish_reason == "error"
    assert found[good.request_id].error is None
    assert json.loads(found[good.request_id].text)


def test_constrained_greedy_answers_are_those_of_the_torch_engine() -> None:
    """On the demo's checkpoint, whose tokens are longer than a byte, so that forced text has many spellings."""
    path = str(CHECKPOINT_PATH)
    oracle = load_transformers_runner(config_of(path, dtype="float32", device="cpu"))
    engine = load_torch_runner(config_of(path, engine="torch", dtype="float32", device="cpu"))
    rng = np.random.default_rng(0)
    requests = [
        request_of(i, rng.integers(7, 1_700, 6 + i).tolist(), max_tokens=60, grammar=GRAMMAR if i % 3 else None)
        for i in range(9)
    ]
    expected = answers(oracle, requests)
    assert texts(run_all(engine, requests)) == expected
    assert {expected[str(i)][1] for i in range(9) if i % 3} == {"stop"}
