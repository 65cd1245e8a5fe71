"""Usage is as it was reported, says what is wrong with it, and never lets an estimate into a count."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.records import MAX_COUNTED_TOKENS, TokenClasses, Usage

figures = st.one_of(
    st.none(), st.integers(-3, 30), st.sampled_from([2**63, -(10**30), 10**26, MAX_COUNTED_TOKENS, 10**12 + 1])
)


@pytest.mark.parametrize(
    ("usage", "status", "classes"),
    [
        (Usage(10, 5), "reported", TokenClasses(None, 10, 5, 0)),
        (Usage(10, 5, 4, 2), "reported", TokenClasses(4, 6, 3, 2)),
        (Usage(None, None), "missing", TokenClasses(None, None, None, None)),
        (Usage(10, None), "missing", TokenClasses(None, 10, None, None)),
        (Usage(10, 5, 11), "contradictory", TokenClasses(None, 21, 5, 0)),
        (Usage(10, 5, 0, 6), "contradictory", TokenClasses(0, 10, 5, 6)),
        (Usage(10, 5, -1), "contradictory", TokenClasses(None, 10, 5, 0)),
        (Usage(10, 5, 0, -1), "contradictory", TokenClasses(0, 10, 5, 0)),
        (Usage(-1, 5), "contradictory", TokenClasses(None, None, 5, 0)),
        (Usage(10, 10**26), "contradictory", TokenClasses(None, 10, None, None)),
    ],
)
def test_status_and_disjoint_classes_follow_from_the_figures(usage: Usage, status: str, classes: TokenClasses) -> None:
    assert (usage.status, usage.classes) == (status, classes)


def test_parts_beyond_their_wholes_stay_as_they_were_reported() -> None:
    usage = Usage(10, 5, 20, 300)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.reasoning_tokens) == (10, 20, 300)
    assert usage.computed_tokens is None
    assert usage.is_known


@given(figures, figures, figures, figures.map(lambda figure: figure or 0))
def test_no_usage_holds_a_figure_that_counts_nothing(
    prompt: int | None, completion: int | None, cached: int | None, reasoning: int
) -> None:
    usage = Usage(prompt, completion, cached, reasoning)
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens)
    assert all(count is None or 0 <= count <= MAX_COUNTED_TOKENS for count in counts)
    assert (usage.status == "reported") <= usage.is_known
    assert Usage(**asdict(usage)) == usage
    classes = usage.classes
    assert (classes.cache_miss is None) == (usage.prompt_tokens is None)
    assert (classes.visible_output is None) == (usage.completion_tokens is None)
    if usage.status == "reported":
        assert classes.num_prompt_tokens == usage.prompt_tokens
        assert (classes.visible_output or 0) + (classes.reasoning or 0) == usage.completion_tokens
    else:
        assert classes.num_prompt_tokens >= (usage.prompt_tokens or 0)
        assert (classes.visible_output or 0) + (classes.reasoning or 0) >= (usage.completion_tokens or 0)


def test_estimates_stand_only_where_a_count_is_unknown() -> None:
    half = Usage(10, None).with_estimates(7, 3)
    assert (half.prompt_tokens, half.estimated_prompt_tokens, half.likely_prompt_tokens) == (10, None, 10)
    assert (half.completion_tokens, half.estimated_completion_tokens, half.likely_completion_tokens) == (None, 3, 3)
    assert Usage(10, 5).with_estimates(7, 3) == Usage(10, 5)
    assert Usage(None, None).likely_prompt_tokens == 0
