"""The engine's greedy answers in float32 against `transformers` at batch size 1, however prompts share and run."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebeam.model_runner.torch_engine import engine as engine_module
from moebeam.model_runner.torch_engine.engine import TorchEngine
from moebeam.model_runner.torch_engine.memory import chosen_entries
from moebeam.model_runner.torch_engine.models import deepseek_v4, latent_expansion
from moebeam.schemas.errors import EngineFailed
from moebeam.schemas.records import Sampling
from tests.support.models.checkpoint_layouts import (
    LAYOUTS,
    Layout,
    OpenLayout,
    greedy,
    make_prompt,
    make_prompts,
    random_tokens,
    run_all,
)
from tests.support.models.shared_prompts import (
    BASE,
    CASES,
    Prompts,
    branches_everywhere,
    mixed_prompts,
    nested_sharing,
    no_sharing,
    prefixes_of_each_other,
)

MAIN_LAYOUTS = ["v3", "v4", "v4 choosing entries", "mixtral", "qwen3_moe"]


NUM_ANSWER_TOKENS = 6


@pytest.fixture(autouse=True)
def _no_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails is done again in halves, which would hide a fault of ours here."""

    def recover(run: Any, failure: EngineFailed) -> Any:
        raise AssertionError(str(failure))

    monkeypatch.setattr(engine_module._Run, "_recover", recover)


def check(layout: Layout, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
    for token_ids, answer in zip(prompts, answers, strict=True):
        layout.oracle.check(token_ids, answer)


@pytest.mark.parametrize("name", MAIN_LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_greedy_answers_are_those_of_transformers(
    open_layout: OpenLayout, name: str, case: Callable[[], Prompts]
) -> None:
    layout = open_layout(name)
    prompts = case()
    check(layout, prompts, greedy(layout.engine(), prompts, NUM_ANSWER_TOKENS))


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - set(MAIN_LAYOUTS)))
@pytest.mark.parametrize(
    ("seed", "options"),
    [(0, {"max_step_rows": 50}), (1, {"batch_size": 3, "max_step_rows": 7, "max_cache_bytes": 60_000})],
    ids=["chunks", "tiny budgets"],
)
def test_other_settings_of_an_architecture_give_the_answers_of_transformers(
    open_layout: OpenLayout, name: str, seed: int, options: dict[str, int]
) -> None:
    layout = open_layout(name)
    prompts = mixed_prompts(seed)[:8]
    check(layout, prompts, greedy(layout.engine(**options), prompts, NUM_ANSWER_TOKENS))


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_oracle_answers_as_transformers_generate_does(open_layout: OpenLayout, name: str) -> None:
    layout = open_layout(name)
    layout.model.generation_config.eos_token_id = None
    for token_ids in ([5], BASE[:19]):
        ids = torch.tensor([token_ids])
        found = layout.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        answer = found[0, len(token_ids) :].tolist()
        layout.oracle.check(token_ids, answer)
        with pytest.raises(AssertionError, match="token 11 of the answer"):
            layout.oracle.check(token_ids, [*answer[:11], (answer[11] + 1) % 97])


@pytest.mark.parametrize("name", MAIN_LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_step_rows": 1},
        {"max_step_rows": 7},
        {"max_step_rows": 33},
        {"max_cache_bytes": 1},
        {"batch_size": 1},
        {"batch_size": 3},
        {"batch_size": 3, "max_step_rows": 7, "max_cache_bytes": 60_000},
    ],
    ids=str,
)
def test_chunks_budgets_and_batch_sizes_change_no_answer(
    open_layout: OpenLayout, name: str, options: dict[str, int]
) -> None:
    layout = open_layout(name)
    prompts = mixed_prompts(2)[:7]
    check(layout, prompts, greedy(layout.engine(**options), prompts, 4))


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_order_of_a_batch_changes_no_answer(open_layout: OpenLayout, name: str) -> None:
    layout = open_layout(name)
    prompts = mixed_prompts(3)
    expected = greedy(layout.engine(), prompts, 5)
    check(layout, prompts, expected)
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    found = greedy(layout.engine(), [prompts[i] for i in order], 5)
    assert found == [expected[i] for i in order]


@pytest.mark.parametrize("name", ["v3", "v4 choosing entries", "mixtral"])
def test_long_answers_that_preempt_each_other_are_those_of_transformers(open_layout: OpenLayout, name: str) -> None:
    # Longer than what is set aside at first, so that segments move to larger blocks, and memory runs out on the way.
    layout = open_layout(name)
    prompts = [[*BASE[:9], 10 + i] for i in range(4)]
    spacious = layout.engine()
    expected = greedy(spacious, prompts, 80)
    check(layout, prompts, expected)
    assert spacious.counters.num_preemptions == 0
    tight = layout.engine(max_cache_bytes=spacious.counters.peak_live_bytes - 1)
    assert greedy(tight, prompts, 80) == expected
    assert tight.counters.num_preemptions > 0
    assert tight.counters.peak_live_bytes <= tight.max_cache_bytes
    assert tight.counters.num_tree_tokens == spacious.counters.num_computed_prefill_tokens == 13
    assert tight.counters.num_computed_prefill_tokens > 13


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_siblings_of_a_fork_do_not_change_each_other(open_layout: OpenLayout, name: str) -> None:
    # The first decodes far past the window while the others still stand at the fork.
    layout = open_layout(name)
    lengths = [25, 1, 25, 12]
    forks = [[*BASE[:21], 30 + i] for i in range(4)]
    prompts = [make_prompt(fork, n, str(i)) for i, (fork, n) in enumerate(zip(forks, lengths, strict=True))]
    together = run_all(layout.engine(), prompts)
    late = run_all(layout.engine(batch_size=2), prompts)
    for prompt in prompts:
        alone = run_all(layout.engine(), [prompt])[prompt.prompt_id].token_ids
        assert together[prompt.prompt_id].token_ids == alone
        assert late[prompt.prompt_id].token_ids == alone
        layout.oracle.check(prompt.token_ids.tolist(), alone)


def test_branches_at_real_compression_rates_and_window(open_layout: OpenLayout) -> None:
    # Rates 4 and 128, a window of 128: branches inside, at the end of and behind both.
    layout = open_layout("v4 at real rates")
    base = random_tokens(8, 300)
    cuts = [3, 120, 126, 127, 128, 129, 131, 132, 191, 254, 255, 256, 257, 299]
    prompts = [base[:p] + random_tokens(p, 3 + p % 5) for p in cuts]
    prompts += [base, base[:128], base[:255], base[:256] + random_tokens(0, 140)]
    for options in ({}, {"max_step_rows": 100}):
        check(layout, prompts, greedy(layout.engine(**options), prompts, 5))


@pytest.mark.parametrize("name", ["v3", "v4 at real rates", "v4 choosing entries", "mixtral"])
def test_contexts_of_thousands_of_tokens_give_the_answers_of_transformers(open_layout: OpenLayout, name: str) -> None:
    # More keys than a tile holds, more rows than a step; two readers of the long prefix, and one that leaves it early.
    layout = open_layout(name)
    base = random_tokens(4, 4096 if name in ("v3", "v4 at real rates") else 2100)
    prompts = [base, base[:-30] + random_tokens(5, 30), base[:700]]
    check(layout, prompts, greedy(layout.engine(), prompts, 4))


@pytest.mark.parametrize("name", ["v3", "v4", "qwen3_moe"])
def test_logprobs_are_the_log_softmax_of_transformers(open_layout: OpenLayout, name: str) -> None:
    layout = open_layout(name)
    prompts = mixed_prompts(4)
    asked = [make_prompt(p, 6, str(i), sampling=Sampling(6, logprobs=True)) for i, p in enumerate(prompts)]
    for i, finished in run_all(layout.engine(max_step_rows=20), asked).items():
        answer = finished.token_ids
        logits = layout.oracle.logits([*prompts[int(i)], *answer[:-1]], len(answer))
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(finished.logprobs), expected, atol=1e-4, rtol=0)
    without = run_all(layout.engine(), make_prompts(prompts, 2)).values()
    assert all(finished.logprobs == [] for finished in without)


@pytest.mark.parametrize("name", ["v3", "v4", "mixtral"])
def test_bfloat16_drifts_little_from_float32(open_layout: OpenLayout, name: str) -> None:
    # Tokens need not agree; how likely they are is compared, in standard deviations of the logits.
    layout = open_layout(name)
    prompts = mixed_prompts(5)
    engine = TorchEngine.load(str(layout.path), dtype="bfloat16", device="cpu")
    asked = [make_prompt(p, 3, str(i), sampling=Sampling(3, logprobs=True)) for i, p in enumerate(prompts)]
    drifts: list[float] = []
    for i, finished in run_all(engine, asked).items():
        assert finished.error is None
        assert len(finished.token_ids) == 3
        logits = layout.oracle.logits([*prompts[int(i)], *finished.token_ids[:-1]], 3)
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(finished.token_ids).unsqueeze(1)).squeeze(1)
        drift = (torch.tensor(finished.logprobs) - expected).abs() / logits.std()
        drifts += drift.tolist()
    # As for transformers' own bfloat16: 0.005 to 0.035 in the middle, up to 0.9 where the choice of an expert flips.
    drifts.sort()
    assert drifts[len(drifts) // 2] < 0.05
    assert drifts[len(drifts) * 4 // 5] < 0.2


def test_counters_add_up(open_layout: OpenLayout) -> None:
    engine = open_layout("v3").engine()
    prompts = branches_everywhere()
    found = run_all(engine, make_prompts(prompts, 3))
    counters = engine.counters
    num_prompt_tokens = sum(map(len, prompts))
    num_cached = sum(finished.num_cached_tokens for finished in found.values())
    assert (counters.num_prompts, counters.num_prompt_tokens) == (len(prompts), num_prompt_tokens)
    num_tree_tokens = counters.num_tree_tokens
    assert num_prompt_tokens - num_cached == num_tree_tokens == counters.num_computed_prefill_tokens
    assert counters.num_decode_tokens == 2 * len(prompts)
    # The last layer of a row from which nothing is drawn is not gone through.
    assert (
        0
        < counters.flops
        < engine.model.flops(num_tree_tokens, num_tree_tokens) + counters.num_decode_tokens * (engine.model.flops(1, 1))
    )
    assert counters.peak_live_bytes > 0
    assert all(seconds > 0 for seconds in counters.seconds.values())
    run_all(engine, make_prompts(prompts, 3))
    assert (counters.num_prompts, counters.num_tree_tokens) == (2 * len(prompts), 2 * num_tree_tokens)


# A small set of prompts, rich in shared prefixes, so that the oracle has seen most of them.
CUTS = st.integers(1, 22)


TAILS = st.sampled_from([[], [3], [3, 5], [7], random_tokens(9, 11), random_tokens(9, 30)])


pooled_prompts = st.builds(
    lambda base, cut, tail: random_tokens(base, cut) + tail, st.sampled_from([20, 21]), CUTS, TAILS
)


@pytest.mark.parametrize("name", ["v3", "v4 choosing entries", "v4 without sliding layers", "mixtral"])
# Not random: a batch in which two experts or entries score alike within float32 would fail one run in thousands.
@settings(max_examples=10, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(pooled_prompts, min_size=1, max_size=10),
    lengths=st.lists(st.integers(1, 7), min_size=10, max_size=10),
    batch_size=st.sampled_from([0, 1, 2, 5]),
    max_step_rows=st.sampled_from([2048, 1, 3, 10, 33]),
    max_cache_bytes=st.sampled_from([1 << 30, 1, 30_000, 100_000]),
)
def test_any_batch_gives_the_answers_of_transformers(
    open_layout: OpenLayout,
    name: str,
    prompts: Prompts,
    lengths: list[int],
    batch_size: int,
    max_step_rows: int,
    max_cache_bytes: int,
) -> None:
    layout = open_layout(name)
    engine = layout.engine(batch_size=batch_size, max_step_rows=max_step_rows, max_cache_bytes=max_cache_bytes)
    asked = [make_prompt(p, n, str(i)) for i, (p, n) in enumerate(zip(prompts, lengths, strict=False))]
    for i, finished in run_all(engine, asked).items():
        assert len(finished.token_ids) == lengths[int(i)]
        layout.oracle.check(prompts[int(i)], finished.token_ids)


@pytest.mark.parametrize("min_entries_a_chosen", [0, 5, 10**9])
def test_chosen_entries_are_gathered_or_others_masked(
    open_layout: OpenLayout, monkeypatch: pytest.MonkeyPatch, min_entries_a_chosen: int
) -> None:
    """Rows with many entries beside rows with few and none; chunks that end inside a compression window."""
    layout = open_layout("v4 choosing entries")
    num_gathered: list[int] = []
    read_chosen = deepseek_v4.read_chosen

    def counted(places: Any, layer: int, query: torch.Tensor, *others: Any) -> None:
        num_gathered.append(query.shape[0])
        read_chosen(places, layer, query, *others)

    monkeypatch.setattr(deepseek_v4, "read_chosen", counted)
    monkeypatch.setattr(deepseek_v4, "MIN_ENTRIES_A_CHOSEN", min_entries_a_chosen)
    monkeypatch.setattr(chosen_entries, "_MAX_GATHERED", 1000)
    prompts = [*nested_sharing(), *no_sharing(), *prefixes_of_each_other()]
    for max_step_rows, num_tokens in ((2048, 1), (2048, NUM_ANSWER_TOKENS), (37, NUM_ANSWER_TOKENS)):
        check(layout, prompts, greedy(layout.engine(max_step_rows=max_step_rows), prompts, num_tokens))
    assert bool(num_gathered) == (min_entries_a_chosen < 10**9)


@dataclass
class WideReads:
    """How the wide reads of all steps were done, as (rows, keys)."""

    copied: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    expanded_once: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    absorbed: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


@pytest.fixture
def wide_reads(monkeypatch: pytest.MonkeyPatch) -> WideReads:
    found = WideReads()
    choose = latent_expansion.Expansion.choose

    def counted(expansion: Any, wide: Any, cache: Any) -> Any:
        expanded, absorbed = choose(expansion, wide, cache)
        for read in expanded:
            kind = found.copied if read.has_copy else found.expanded_once
            kind.append((read.end_row - read.first_row, read.num_keys))
        found.absorbed += [(read.end_row - read.first_row, read.num_keys) for read in absorbed]
        return expanded, absorbed

    monkeypatch.setattr(latent_expansion.Expansion, "choose", counted)
    return found


DOCUMENTS = [random_tokens(900 + i, 60) for i in range(6)]


QUESTIONS = [[*document, *random_tokens(10 * i, 2)] for document in DOCUMENTS for i in range(3)]


NUM_DOCUMENT_BYTES = 115_200
"""Of the expanded copies of one document."""


def test_idle_expanded_copies_give_way_to_those_of_the_next_document(
    open_layout: OpenLayout, wide_reads: WideReads
) -> None:
    layout = open_layout("v3")
    engine = layout.engine(max_step_rows=60)
    expected = greedy(engine, QUESTIONS, 3)
    assert engine.counters.peak_expanded_bytes > 2 * NUM_DOCUMENT_BYTES
    engine = layout.engine(max_step_rows=60, max_cache_bytes=2 * NUM_DOCUMENT_BYTES)  # half of it for copies
    assert greedy(engine, QUESTIONS, 3) == expected
    assert engine.counters.peak_expanded_bytes == NUM_DOCUMENT_BYTES
    assert wide_reads.copied
    assert wide_reads.expanded_once == wide_reads.absorbed == []


def test_what_has_no_room_for_copies_is_expanded_for_the_step_alone(
    open_layout: OpenLayout, wide_reads: WideReads
) -> None:
    layout = open_layout("v3")
    prompts = [[*random_tokens(50 + i, 200), 10 + i] for i in range(3)]
    expected = greedy(layout.engine(max_step_rows=200), prompts, 3)
    wide_reads.copied.clear()
    engine = layout.engine(max_step_rows=200, max_cache_bytes=NUM_DOCUMENT_BYTES)
    assert greedy(engine, prompts, 3) == expected
    assert engine.counters.peak_expanded_bytes == 0
    assert wide_reads.copied == []
    assert wide_reads.expanded_once[0] == (200, 200)
