"""The cut into shards: as few as the limits allow, even, and nothing apart that must stay together."""

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.job.sections import PlanSection
from moebeam.transforms.plan.shard_cut import RowCosts, cut_rows, estimate_output_tokens

PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=9)


def costs_of(prompts: list[list[int]], outputs: list[int], can_begin: list[bool] | None = None) -> RowCosts:
    """What prompts in token order cost; a row that may not begin a shard is answered by the one before, for nothing."""
    begins = [True, *(can_begin or [True] * len(prompts))[1 : len(prompts)]]
    shared = [0] + [
        next((n for n, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        for x, y in pairwise(prompts)
    ]
    tokens = [len(p) - s + o if b else 0 for p, s, o, b in zip(prompts, shared, outputs, begins, strict=True)]
    ones = np.ones(len(prompts), dtype=np.int64)
    return RowCosts(np.array(tokens), np.array(shared), ones, ones, np.array(begins))


def cost_of(costs: RowCosts, start: int, end: int) -> int:
    """What a shard costs, its first path included."""
    return int(costs.tokens[start:end].sum() + costs.shared_tokens[start])


@given(prompts=PATHS, data=st.data(), max_shard_tokens=st.integers(1, 40), max_shard_rows=st.integers(1, 5))
def test_no_cut_within_the_limits_has_fewer_shards_or_a_smaller_largest_one(
    prompts: list[list[int]], data: st.DataObject, max_shard_tokens: int, max_shard_rows: int
) -> None:
    prompts = sorted(prompts)
    num = len(prompts)
    outputs = data.draw(st.lists(st.integers(0, 9), min_size=num, max_size=num))
    costs = costs_of(prompts, outputs)
    section = PlanSection(max_shard_tokens=max_shard_tokens, max_shard_rows=max_shard_rows)
    starts = cut_rows(costs, section)
    assert starts[0] == 0

    def is_allowed(cut: tuple[int, ...]) -> bool:
        return all(
            end - start == 1 or (costs.tokens[start:end].sum() <= max_shard_tokens and end - start <= max_shard_rows)
            for start, end in pairwise([0, *cut, num])
        )

    def thousandths(cut: tuple[int, ...]) -> int:
        """How much of the limits, the first paths counted, the fullest shard takes that is not a single row."""
        return max(
            [1]
            + [
                -(-1000 * taken // limit)
                for start, end in pairwise([0, *cut, num])
                for taken, limit in ((cost_of(costs, start, end), max_shard_tokens), (end - start, max_shard_rows))
                if end - start > 1
            ]
        )

    cuts = [cut for k in range(num) for cut in combinations(range(1, num), k)]
    fewest = min(len(cut) for cut in cuts if is_allowed(cut))
    assert len(starts) - 1 == fewest
    assert is_allowed(tuple(starts[1:]))
    others = [cut for cut in cuts if len(cut) == fewest and is_allowed(cut)]
    assert thousandths(tuple(starts[1:])) == min(map(thousandths, others))


@given(prompts=PATHS, data=st.data(), max_shard_tokens=st.integers(1, 40), max_shard_rows=st.integers(1, 5))
def test_a_shard_costs_its_limit_and_one_path_at_most(
    prompts: list[list[int]], data: st.DataObject, max_shard_tokens: int, max_shard_rows: int
) -> None:
    prompts = sorted(prompts)
    num = len(prompts)
    outputs = data.draw(st.lists(st.integers(0, 9), min_size=num, max_size=num))
    can_begin = data.draw(st.lists(st.booleans(), min_size=num, max_size=num))
    costs = costs_of(prompts, outputs, can_begin)
    starts = cut_rows(costs, PlanSection(max_shard_tokens=max_shard_tokens, max_shard_rows=max_shard_rows))
    assert all(costs.can_begin[start] for start in starts)
    for start, end in pairwise([*starts, num]):
        if costs.can_begin[start + 1 : end].any():
            assert end - start <= max_shard_rows
            assert cost_of(costs, start, end) <= max_shard_tokens + max(map(len, prompts))


def test_shards_are_even_and_not_full_with_a_rest() -> None:
    costs = costs_of([[row] for row in range(101)], [9] * 101)
    starts = cut_rows(costs, PlanSection(max_shard_tokens=500))
    sizes = [end - start for start, end in pairwise([*starts, 101])]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 2


def test_how_even_shards_are_is_told_with_the_path_that_each_begins_with() -> None:
    tokens, shared = np.array([21, 6, 6, 6]), np.array([0, 15, 18, 0])
    ones = np.ones(4, dtype=np.int64)
    starts = cut_rows(RowCosts(tokens, shared, ones, ones, ones.astype(np.bool_)), PlanSection(max_shard_tokens=33))
    # Without paths 21 and 18 look evener than 27 and 12; with them the second shards cost 33 and 30.
    assert starts == [0, 2]


def test_limits_below_a_path_do_not_make_a_shard_of_each_row() -> None:
    root = [7] * 100
    costs = costs_of([[*root, row] for row in range(50)], [9] * 50)
    # 100 once, and 10 a row: with the path to count against the limit, every row would be a shard.
    assert len(cut_rows(costs, PlanSection(max_shard_tokens=60))) <= 1 + 50 * 10 // 60 + 1


def test_no_rows_make_no_shard() -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert cut_rows(RowCosts(empty, empty, empty, empty, np.zeros(0, dtype=np.bool_)), PlanSection()) == []


@given(st.integers(1, 1 << 20), st.integers(0, 1000))
def test_expected_output_grows_with_what_is_allowed_and_stays_within_it(max_tokens: int, more: int) -> None:
    expected = estimate_output_tokens(max_tokens)
    assert 1 <= expected <= max_tokens
    assert expected <= estimate_output_tokens(max_tokens + more)
    if max_tokens <= 256:
        assert expected == max_tokens
    else:
        assert (expected - 1) ** 2 < 256 * max_tokens < (expected + 1) ** 2, "as far above 256 as below what is allowed"
