"""Bad prompts, weights that are not numbers and failing steps: the culprit gets a typed error, the others go on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.engine import TorchEngine
from moebeam.model_runner.torch_engine.schedule.sequences import Finished
from moebeam.schemas.errors import ContextOverflow, EngineFailed, RowError
from tests.support.models.checkpoint_layouts import (
    UNSAID_TOKEN,
    VOCAB_SIZE,
    Layout,
    OpenLayout,
    load_engine,
    make_prompt,
    make_prompts,
    random_tokens,
    run_all,
    with_tensors,
)

MODEL_TYPES = ["v3", "v4", "mixtral"]


def answers(found: dict[str, Finished]) -> dict[str, list[int]]:
    """The answers that did not fail."""
    return {name: finished.token_ids for name, finished in found.items() if finished.error is None}


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "error", "message"),
    [
        ([5, VOCAB_SIZE], 3, EngineFailed, r"expected token ids from 0 to 96, found 5 to 97"),
        ([-1, 5], 3, EngineFailed, r"expected token ids from 0 to 96, found -1 to 5"),
        ([], 3, EngineFailed, r"at least one token, found none"),
        ([5], 0, EngineFailed, r"max_tokens of at least 1, found 0"),
        ([5] * 8190, 3, ContextOverflow, r"8190 prompt tokens and max_tokens 3 exceed .* 8192"),
    ],
)
def test_prompt_that_cannot_run_is_refused_while_others_go_on(
    open_layout: OpenLayout, token_ids: list[int], max_tokens: int, error: type[RowError], message: str
) -> None:
    layout = open_layout("v3")
    good = make_prompts([[5], random_tokens(1, 20)], 4)
    bad = make_prompt(token_ids, max_tokens, "bad")
    found = run_all(layout.engine(), [good[0], bad, good[1]])
    refused = found["bad"]
    assert type(refused.error) is error
    with pytest.raises(error, match=message):
        raise refused.error
    assert (refused.finish_reason, refused.token_ids) == ("error", [])
    assert answers(found) == answers(run_all(layout.engine(), good))


def test_only_bad_prompts_all_get_their_error(open_layout: OpenLayout) -> None:
    found = run_all(open_layout("v3").engine(), [make_prompt([], 1, str(i)) for i in range(5)])
    assert all(isinstance(finished.error, EngineFailed) for finished in found.values())


def test_whole_context_may_be_used(open_layout: OpenLayout) -> None:
    layout = open_layout("v3")
    token_ids = [5, 6] * 4095
    (finished,) = run_all(layout.engine(), [make_prompt(token_ids, 2)]).values()
    assert (finished.error, len(finished.token_ids)) == (None, 2)


@pytest.fixture(scope="module")
def poisoned(open_layout: OpenLayout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in which the embedding of `UNSAID_TOKEN` is not a number."""

    def poison(weights: dict[str, Tensor]) -> None:
        name = next(name for name in weights if name in ("model.embed_tokens.weight", "embed.weight"))
        weights[name][UNSAID_TOKEN] = torch.nan

    return {name: with_tensors(open_layout(name), tmp_path_factory.mktemp("poisoned"), poison) for name in MODEL_TYPES}


def assert_all_poisoned(found: dict[str, Finished], num_bad: int) -> None:
    """The prompts named `bad ...`, and no others, failed before their first token."""
    failed = [finished for finished in found.values() if finished.error is not None]
    assert sorted(finished.prompt_id for finished in failed) == [f"bad {i}" for i in range(num_bad)]
    for finished in failed:
        assert isinstance(finished.error, EngineFailed)
        assert "not numbers" in str(finished.error)
        assert (finished.finish_reason, finished.token_ids) == ("error", [])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v3", {}),
        ("v3", {"batch_size": 2, "max_step_rows": 7}),
        ("v4", {}),
        ("v4", {"batch_size": 1}),
        ("v4", {"batch_size": 2, "max_step_rows": 7}),
        ("mixtral", {}),
    ],
)
def test_prompts_with_a_poisoned_token_fail_and_no_others(
    open_layout: OpenLayout, poisoned: dict[str, Path], name: str, options: dict[str, int]
) -> None:
    layout = open_layout(name)
    shared = random_tokens(3, 19)
    good = [random_tokens(i, n) for i, n in enumerate((1, 3, 6, 13, 17, 21, 30, 45))]
    good += [[*shared, i] for i in (7, 8, 9)]
    bad = [
        [*random_tokens(20, 29), UNSAID_TOKEN],
        [UNSAID_TOKEN],
        [UNSAID_TOKEN, *random_tokens(21, 40)],
        [*shared, UNSAID_TOKEN, *random_tokens(22, 9)],
        [0, UNSAID_TOKEN, *random_tokens(22, 27), 1],
        [0, UNSAID_TOKEN, *random_tokens(22, 27), 2],
        [0, UNSAID_TOKEN, *random_tokens(22, 27)],
    ]
    prompts = make_prompts(good, 9) + [make_prompt(token_ids, 9, f"bad {i}") for i, token_ids in enumerate(bad)]
    expected = answers(run_all(layout.engine(), make_prompts(good, 9)))
    found = run_all(load_engine(poisoned[name], **options), prompts)
    assert_all_poisoned(found, len(bad))
    assert answers(found) == expected


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_memory_of_poisoned_prompts_serves_others(
    open_layout: OpenLayout, poisoned: dict[str, Path], name: str
) -> None:
    # Bad prompts, and the node that they share, come first. What follows gets their slots, fills only a part of them,
    # and reads them together with longer ones.
    layout = open_layout(name)
    good = [[i + 1, *random_tokens(i, 1 + i % 4 // 2 if i % 2 else 27 + i % 8 // 2)] for i in range(20)]
    bad = [[0, UNSAID_TOKEN, *random_tokens(0, 10), i, *random_tokens(i, 30)] for i in range(3)]
    prompts = make_prompts(good, 9) + [make_prompt(token_ids, 9, f"bad {i}") for i, token_ids in enumerate(bad)]
    expected = answers(run_all(layout.engine(), make_prompts(good, 9)))
    found = run_all(load_engine(poisoned[name], batch_size=5), prompts)
    assert_all_poisoned(found, len(bad))
    assert answers(found) == expected


def test_answer_that_runs_into_a_poisoned_token_is_kept_with_its_error(open_layout: OpenLayout, tmp_path: Path) -> None:
    layout = open_layout("v3")
    prompt = make_prompt([5], 9)
    (expected,) = run_all(layout.engine(), [prompt]).values()
    token = next(token for token in expected.token_ids[2:] if token not in (5, *expected.token_ids[:2]))
    num_good = expected.token_ids.index(token) + 1

    def poison(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][token] = torch.nan

    (finished,) = run_all(load_engine(with_tensors(layout, tmp_path, poison)), [prompt]).values()
    assert isinstance(finished.error, EngineFailed)
    assert f"position {1 + num_good}" in str(finished.error)
    assert (finished.token_ids, finished.finish_reason) == (expected.token_ids[:num_good], "error")


@dataclass
class Fragile:
    """A model whose steps fail when `fails` says so of their token ids."""

    model: Any
    fails: Callable[[list[int]], bool]
    error: type[RuntimeError] = torch.OutOfMemoryError
    num_failed: int = 0
    step_rows: list[int] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def extend(self, batch: Any, cache: Any) -> Tensor:
        """Fails before anything is computed, or computes."""
        self.step_rows.append(batch.num_rows)
        if self.fails(batch.token_ids.tolist()):
            self.num_failed += 1
            raise self.error("out of memory")
        return self.model.extend(batch, cache)


def fragile(layout: Layout, fails: Callable[[list[int]], bool], **options: Any) -> tuple[TorchEngine, Fragile]:
    error = options.pop("error", torch.OutOfMemoryError)
    engine = layout.engine(**options)
    model = Fragile(engine.model, fails, error)
    engine.model = model
    return engine, model


@pytest.mark.parametrize("name", MODEL_TYPES)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_step_that_fails_for_one_prompt_bisects_to_it(
    open_layout: OpenLayout, caplog: pytest.LogCaptureFixture, name: str, error: type[RuntimeError]
) -> None:
    layout = open_layout(name)
    shared = random_tokens(3, 19)
    good = [[*shared, i] for i in range(7)] + [random_tokens(i, 10 + i) for i in range(4)] + [shared]
    prompts = make_prompts(good, 6)
    expected = answers(run_all(layout.engine(), prompts))
    bad = make_prompt([*shared, UNSAID_TOKEN, 3], 6, "bad")
    engine, model = fragile(layout, lambda token_ids: UNSAID_TOKEN in token_ids, error=error)
    found = run_all(engine, [*prompts[:5], bad, *prompts[5:]])
    assert isinstance(found["bad"].error, EngineFailed)
    assert f"{error.__name__}: out of memory" in str(found["bad"].error)
    assert answers(found) == expected
    assert 1 < model.num_failed <= 6
    assert engine.counters.num_failed_steps == model.num_failed
    assert "rows failed and is done again in halves" in caplog.text


def test_answers_continue_where_a_failed_step_left_them(open_layout: OpenLayout) -> None:
    # The step fails once, in the middle of all answers.
    layout = open_layout("v4")
    prompts = make_prompts([random_tokens(i, 5 + 3 * i) for i in range(5)], 20)
    expected = answers(run_all(layout.engine(), prompts))
    engine, model = fragile(layout, lambda token_ids: model.num_failed == 0 and len(model.step_rows) == 8)
    assert answers(run_all(engine, prompts)) == expected
    assert model.num_failed == 1


def test_steps_too_large_for_the_device_become_smaller_and_no_prompt_fails(open_layout: OpenLayout) -> None:
    layout = open_layout("v3")
    prompts = make_prompts([random_tokens(i, 60) for i in range(12)], 4)
    expected = answers(run_all(layout.engine(), prompts))
    engine, model = fragile(layout, lambda token_ids: len(token_ids) > 100)
    assert answers(run_all(engine, prompts)) == expected
    assert model.num_failed > 0


def test_long_prompt_alone_is_tried_in_smaller_steps_before_it_fails(open_layout: OpenLayout) -> None:
    layout = open_layout("v3")
    prompts = make_prompts([random_tokens(1, 300)], 4)
    expected = answers(run_all(layout.engine(), prompts))
    engine, _ = fragile(layout, lambda token_ids: len(token_ids) > 100)
    assert answers(run_all(engine, prompts)) == expected


def test_steps_do_not_become_larger_after_a_failure(open_layout: OpenLayout) -> None:
    layout = open_layout("v3")
    prompts = make_prompts([random_tokens(i, 60) for i in range(4)], 2)
    engine, model = fragile(layout, lambda token_ids: len(model.step_rows) == 3, max_step_rows=10)
    run_all(engine, prompts)
    assert max(model.step_rows) <= 10


def test_batch_grows_again_once_the_culprit_is_gone(open_layout: OpenLayout) -> None:
    layout = open_layout("v3")
    good = make_prompts([[1, *random_tokens(i, 6)] for i in range(64)], 8)
    engine, model = fragile(layout, lambda token_ids: UNSAID_TOKEN in token_ids)
    found = run_all(engine, [make_prompt([0, UNSAID_TOKEN], 2, "bad"), *good])  # first in order: all others follow it
    assert len(answers(found)) == 64
    # One at a time they take 64 * 8 steps.
    assert len(model.step_rows) < 256


def test_engine_serves_the_next_run_after_failures(open_layout: OpenLayout) -> None:
    layout = open_layout("v4")
    prompts = make_prompts([random_tokens(i, 12) for i in range(4)], 5)
    expected = answers(run_all(layout.engine(), prompts))
    engine, _ = fragile(layout, lambda token_ids: UNSAID_TOKEN in token_ids)
    failed = run_all(engine, [make_prompt([UNSAID_TOKEN], 2, "bad")])["bad"]
    assert isinstance(failed.error, EngineFailed)
    assert answers(run_all(engine, prompts)) == expected


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_run_that_is_left_early_does_not_disturb_the_next(open_layout: OpenLayout, name: str) -> None:
    layout = open_layout(name)
    prompts = make_prompts([[*random_tokens(0, 70), i, *random_tokens(i, 50)] for i in range(6)], 12)
    prompts[0] = make_prompt([*random_tokens(0, 70), 0], 1, "0")
    engine = layout.engine()
    expected = answers(run_all(engine, prompts))
    run = engine.run(prompts)
    next(run)
    run.close()
    assert answers(run_all(engine, prompts)) == expected


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_runs_that_are_under_way_together_do_not_disturb_each_other(open_layout: OpenLayout, name: str) -> None:
    layout = open_layout(name)
    engine = layout.engine()
    batches = [make_prompts([[*random_tokens(seed, 60), i] for i in range(5)], 3 + seed) for seed in range(2)]
    expected = [answers(run_all(engine, batch)) for batch in batches]
    found: list[dict[str, Finished]] = [{}, {}]
    for pair in zip(*map(engine.run, batches), strict=True):
        for finished, into in zip(pair, found, strict=True):
            into[finished.prompt_id] = finished
    assert [answers(one) for one in found] == expected
