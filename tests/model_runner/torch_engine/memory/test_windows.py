"""Sliding windows and compression windows, on the steps of a real schedule, against plain loops over each path."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.model_runner.torch_engine.layers.attention import Merged
from moebeam.model_runner.torch_engine.memory.cache import RingKind
from moebeam.model_runner.torch_engine.memory.windows import HeadGroup, plan_compression, plan_window
from moebeam.model_runner.torch_engine.schedule.steps import Step
from tests.support.jobs.driven_steps import CPU, Path, make_cache, plain_attention, prompt_lists, run_steps, vectors

NUM_HEADS, WIDTH = 2, 5
options = st.fixed_dictionaries(
    {"max_step_rows": st.sampled_from([1_000, 40, 7, 1]), "max_running": st.sampled_from([100, 3])}
)


@settings(max_examples=15)
@given(prompts=prompt_lists, size=st.sampled_from([1, 4, 16, 128]), options=options)
def test_rows_attend_to_the_last_positions_of_their_own_path(
    prompts: list[list[int]], size: int, options: dict[str, int]
) -> None:
    cache = make_cache(rings=[RingKind("other", 1, 3, 2), RingKind("window", 2, size, WIDTH)])

    def read_step(step: Step, paths: list[Path]) -> None:
        ring = cache.rings[1]
        plan = plan_window(step.spans, step.logit_spans(), ring, CPU)
        for layer in range(2):
            query = vectors(f"query {layer}", paths, NUM_HEADS * WIDTH).view(len(paths), NUM_HEADS, WIDTH)
            merged = Merged(len(paths), NUM_HEADS, WIDTH, CPU)
            plan.read(ring, layer, vectors(f"key {layer}", paths, WIDTH), [HeadGroup(query, merged)])
            for row, path in enumerate(paths):
                seen = [path[:end] for end in range(max(1, len(path) - size + 1), len(path) + 1)]
                keys = vectors(f"key {layer}", seen, WIDTH)
                expected = plain_attention(query[row], keys, keys)
                torch.testing.assert_close(merged.result()[row], expected, atol=1e-5, rtol=1e-4)
            drawn = Merged(len(step.logit_rows), NUM_HEADS, WIDTH, CPU)
            keys = vectors(f"key {layer}", paths, WIDTH)
            plan.read_last_rows(ring, layer, keys, [HeadGroup(query[step.logit_rows], drawn)])
            torch.testing.assert_close(drawn.result(), merged.result()[step.logit_rows], atol=1e-5, rtol=1e-4)

    run_steps(prompts, cache, read_step, max_tokens=20, **options)


@settings(max_examples=15)
@given(prompts=prompt_lists, rate=st.sampled_from([1, 4, 8, 32]), has_overlap=st.booleans(), options=options)
def test_each_window_that_a_step_closes_has_the_rows_of_its_own_path(
    prompts: list[list[int]], rate: int, has_overlap: bool, options: dict[str, int]
) -> None:
    num_overlap = rate if has_overlap else 0
    cache = make_cache(rings=[RingKind("open", 2, rate + num_overlap, WIDTH)])

    def read_step(step: Step, paths: list[Path]) -> None:
        ring = cache.rings[0]
        plan = plan_compression(step.spans, ring, rate, num_overlap, CPU)
        closing = [path for path in paths if len(path) % rate == 0]
        assert plan.num_windows == len(closing)
        assert plan.positions.tolist() == [len(path) - rate for path in closing]
        assert plan.is_first.tolist() == [len(path) == rate for path in closing]
        for layer in range(2):
            found = plan.gather(ring, layer, vectors(f"row {layer}", paths, WIDTH))
            assert found.shape == (len(closing), num_overlap + rate, WIDTH)
            for window, path in zip(found, closing, strict=True):
                # What precedes the first window is not looked at.
                num_rows = min(len(path), num_overlap + rate)
                expected = [path[:end] for end in range(len(path) - num_rows + 1, len(path) + 1)]
                assert torch.equal(window[-num_rows:], vectors(f"row {layer}", expected, WIDTH))

    run_steps(prompts, cache, read_step, max_tokens=20, **options)


def test_children_start_from_what_their_parent_had_kept() -> None:
    # Both children write over the ring that they got; each has a copy of its own.
    cache = make_cache(rings=[RingKind("open", 1, 8, WIDTH)])
    seen: list[tuple[int, ...]] = []

    def read_step(step: Step, paths: list[Path]) -> None:
        ring = cache.rings[0]
        plan = plan_compression(step.spans, ring, 8, 0, CPU)
        closing = [path for path in paths if len(path) % 8 == 0]
        found = plan.gather(ring, 0, vectors("row", paths, WIDTH))
        for window, path in zip(found, closing, strict=True):
            assert torch.equal(
                window, vectors("row", [path[:end] for end in range(len(path) - 7, len(path) + 1)], WIDTH)
            )
            seen.append(path)

    run_steps([[1, 2, 3, 4, 5, i] for i in range(3)], cache, read_step, max_tokens=12)
    assert len({path for path in seen if len(path) == 8}) == 3
    assert len({path for path in seen if len(path) == 16}) == 3
