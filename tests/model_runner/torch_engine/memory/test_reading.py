"""What the rows of a step write and read, on the steps of a real schedule, against plain attention over each path."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.model_runner.torch_engine.layers.attention import MASKED, Merged, Partials
from moebeam.model_runner.torch_engine.memory import batch_reads, read_plan
from moebeam.model_runner.torch_engine.memory.cache import Cache
from moebeam.model_runner.torch_engine.memory.read_plan import plan_reads
from moebeam.model_runner.torch_engine.memory.reading import read_shared_keys, write_entries
from moebeam.model_runner.torch_engine.memory.segments import Columns, SegmentKind
from moebeam.model_runner.torch_engine.schedule.steps import Step
from tests.support.jobs.driven_steps import (
    CPU,
    Path,
    make_cache,
    plain_attention,
    prompt_lists,
    run_steps,
    vector,
    vectors,
)
from tests.support.models.checkpoint_layouts import random_tokens

NUM_HEADS, WIDTH = 2, 6


class Reader:
    """One layer of attention over the entries of a kind; entry `i` is known by the path to its last token.

    Attributes:
        num_chosen: entries that a row may read of those that it sees, the lowest by a hash; 0 lets it read all.
    """

    def __init__(self, rate: int, is_value_in_key: bool, num_chosen: int = 0) -> None:
        fields = (("key", WIDTH),) if is_value_in_key else (("key", WIDTH), ("value", 3))
        self.kind = SegmentKind("any", 1, rate, fields)
        self.key = Columns("key", 0, WIDTH)
        self.value = Columns("key", 0, 4) if is_value_in_key else Columns("value", 0, 3)
        self.num_chosen = num_chosen
        self.cache: Cache = make_cache([self.kind])
        self.num_wide = self.num_batches = self.num_tiles = 0

    def __call__(self, step: Step, paths: list[Path]) -> None:
        plan = plan_reads(step.spans, 0, self.kind, CPU)
        self.num_wide += len(plan.wide)
        self.num_batches += len(plan.batches)
        self.num_tiles += sum(len(read.tiles(NUM_HEADS)) for read in plan.wide)
        closing = [path for path in paths if len(path) % self.kind.rate == 0]
        for name, width in self.kind.widths:
            write_entries(plan, 0, name, vectors(name, closing, width))
        query = vectors("query", paths, NUM_HEADS * WIDTH).view(len(paths), NUM_HEADS, WIDTH)
        own = torch.zeros(len(paths), NUM_HEADS)  # a sink, so that rows without an entry have a result
        merged = Merged(len(paths), NUM_HEADS, self.value.width, CPU)
        merged.merge(0, len(paths), Partials(torch.zeros(len(paths), NUM_HEADS, self.value.width), own, own + 1))
        selection = self._selection(paths) if self.num_chosen else None
        read_shared_keys(plan, 0, query, merged, key=self.key, value=self.value, selection=selection)
        expected = torch.stack([self._plain(*item) for item in zip(paths, query, strict=True)])
        torch.testing.assert_close(merged.result(), expected, atol=1e-5, rtol=1e-4)

    def _entries(self, path: Path) -> list[Path]:
        rate = self.kind.rate
        return [path[: (i + 1) * rate] for i in range(len(path) // rate)]

    def _chosen(self, path: Path) -> list[int]:
        scores = [vector("rank", entry, 1)[0] for entry in self._entries(path)]
        return sorted(np.argsort(scores)[: self.num_chosen].tolist()) if self.num_chosen else list(range(len(scores)))

    def _selection(self, paths: list[Path]) -> torch.Tensor:
        most = max(len(path) // self.kind.rate for path in paths)
        selection = torch.full((len(paths), most), MASKED)
        for row, path in enumerate(paths):
            selection[row, self._chosen(path)] = 0.0
        return selection

    def _plain(self, path: Path, query: torch.Tensor) -> torch.Tensor:
        entries = self._entries(path)
        seen = [entries[i] for i in self._chosen(path)]
        key = vectors("key", seen, WIDTH)
        value = key[:, :4] if self.value.field == "key" else vectors("value", seen, 3)
        sink = torch.zeros(1, WIDTH), torch.zeros(1, self.value.width)
        return plain_attention(query, torch.cat((sink[0], key)), torch.cat((sink[1], value)))


@settings(max_examples=25)
@given(
    prompts=prompt_lists,
    rate=st.sampled_from([1, 4, 8]),
    is_value_in_key=st.booleans(),
    num_chosen=st.sampled_from([0, 0, 2]),
    max_step_rows=st.sampled_from([1_000, 40, 7]),
    max_running=st.sampled_from([100, 3]),
)
def test_rows_read_the_entries_of_their_own_path(
    prompts: list[list[int]],
    rate: int,
    is_value_in_key: bool,
    num_chosen: int,
    max_step_rows: int,
    max_running: int,
) -> None:
    reader = Reader(rate, is_value_in_key, num_chosen)
    run_steps(prompts, reader.cache, reader, max_step_rows=max_step_rows, max_running=max_running)
    assert reader.cache.store.num_bytes == 0


@pytest.mark.parametrize(("rate", "max_scores"), [(1, 2_000), (4, read_plan.MAX_SCORES)])
def test_long_segments_are_read_in_tiles(rate: int, max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch_reads, read_plan):
        monkeypatch.setattr(module, "MAX_SCORES", max_scores)
    base = random_tokens(5, 1_200 if rate == 4 else 540)
    prompts = [base, *([*base[:-20], i] for i in range(25)), base[:100]]
    reader = Reader(rate, is_value_in_key=True)
    run_steps(prompts, reader.cache, reader, max_tokens=2, max_step_rows=300)
    assert reader.num_tiles > reader.num_wide > 0
    assert reader.num_batches > 0


def test_preempted_prompts_read_what_they_had_written_again() -> None:
    reader = Reader(1, is_value_in_key=False)
    prompts = [[i, 5, 6] for i in range(4)]
    budget = 90 * 4 * reader.kind.entry_elements() * 3
    schedule = run_steps(prompts, reader.cache, reader, max_tokens=100, max_cache_bytes=budget)
    assert schedule.num_preemptions > 0
