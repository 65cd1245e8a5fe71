from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.vllm_engine.prefix_units import PrefixUnit
from moebeam.transforms.quote.cache_rules import (
    NONE,
    TREE,
    UNITS,
    UNKNOWN,
    CacheRule,
    estimate_hits,
    find_rule,
    unit_rule,
)
from moebeam.transforms.quote.prompt_survey import PromptSurvey

Prompts = list[tuple[int, ...]]


def survey_of(prompts: Prompts, *, max_tokens: int = 8, num_rows: int | None = None) -> PromptSurvey:
    """A survey of prompts, each a request of its own, in one shard."""
    ordered = sorted(prompts)
    shared = [0, *(_common(one, other) for one, other in pairwise(ordered))][: len(ordered)]
    lengths = np.array([len(prompt) for prompt in ordered], dtype=np.int64)
    shared_tokens = np.array(shared, dtype=np.int64)
    size = len(ordered)
    return PromptSurvey(
        num_rows=size if num_rows is None else num_rows,
        num_surveyed_rows=size,
        rejects={},
        num_prompt_tokens=lengths,
        num_shared_tokens=shared_tokens,
        num_nearest_tokens=np.maximum(shared_tokens, np.append(shared_tokens[1:], 0)[:size]),
        max_output_tokens=np.full(size, max_tokens, dtype=np.int64),
        num_group_rows=np.ones(size, dtype=np.int64),
        is_single=np.ones(size, dtype=np.bool_),
        row_starts=np.arange(size),
        starts_shard=np.arange(size) == 0,
        own_terms=np.zeros(size, dtype=np.bool_),
    )


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def units_one_by_one(prompts: Prompts) -> list[int]:
    """The documented rule, as a provider would follow it: all units in a set, every pair of inputs compared."""
    units: set[tuple[int, ...]] = set()
    seen: Prompts = []
    hits: list[int] = []
    for prompt in sorted(prompts):
        hits.append(max((len(unit) for unit in units if prompt[: len(unit)] == unit), default=0))
        units |= {prompt[: _common(prompt, other)] for other in seen} | {prompt}
        seen.append(prompt)
    return hits


prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), max_size=20)


@given(prompts_of_few_tokens)
def test_stored_units_hit_what_the_documented_rule_hits(prompts: Prompts) -> None:
    assert estimate_hits(survey_of(prompts), UNITS).tolist() == units_one_by_one(prompts)


@given(prompts_of_few_tokens)
@pytest.mark.parametrize("rule", [TREE, UNITS, NONE, UNKNOWN])
def test_no_rule_hits_more_than_the_tree_shares(rule: CacheRule, prompts: Prompts) -> None:
    survey = survey_of(prompts)
    assert (estimate_hits(survey, rule) <= survey.num_shared_tokens).all()


def test_the_third_request_hits_what_two_were_found_to_share() -> None:
    prefix = (1,) * 6
    hits = estimate_hits(survey_of([(*prefix, 2), (*prefix, 3), (*prefix, 4)]), UNITS)
    assert hits.tolist() == [0, 0, 6]


def test_only_what_runs_here_or_is_documented_has_a_rule() -> None:
    assert find_rule("local", "torch") == find_rule("local", "fake") == TREE
    assert find_rule("local", "transformers") == NONE
    assert find_rule("deepseek", "") == UNITS
    assert find_rule("azure", "") == find_rule("local", "vllm") == UNKNOWN


def test_whole_units_serve_only_what_reaches_a_boundary() -> None:
    survey = survey_of([(1,) * 40, (1,) * 40, (*(1,) * 20, 2), (*(1,) * 10, 3)])
    assert estimate_hits(survey, unit_rule(PrefixUnit(16))).tolist() == [0, 32, 16, 0]
