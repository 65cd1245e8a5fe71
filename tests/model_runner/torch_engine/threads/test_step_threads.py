"""The engine's steps on the threads that the policy chooses."""

from collections.abc import Iterator

import pytest
import torch

from moebeam.model_runner.torch_engine.counters import EngineCounters
from moebeam.model_runner.torch_engine.threads import step_threads
from moebeam.model_runner.torch_engine.threads.policy import StepTiming, ThreadPolicy
from moebeam.model_runner.torch_engine.threads.step_threads import StepThreads
from tests.support.models.checkpoint_layouts import OpenLayout, greedy
from tests.support.models.shared_prompts import mixed_prompts

CPU = torch.device("cpu")


@pytest.fixture
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(step_threads, "count_usable_cores", lambda: 4)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class _Alternating(ThreadPolicy):
    """One thread and two by turns; the policy's own choice does not matter."""

    def observe(self, timing: StepTiming) -> None:
        self.num_threads = 3 - self.num_threads
        self.num_changes += 1


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("name", ["v3", "v4", "mixtral"])
def test_threads_that_change_with_every_step_change_no_answer(
    open_layout: OpenLayout, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_threads, "ThreadPolicy", _Alternating)
    layout, prompts = open_layout(name), mixed_prompts(4)[:8]
    engine = layout.engine(max_step_rows=33)
    for token_ids, answer in zip(prompts, greedy(engine, prompts, 6), strict=True):
        layout.oracle.check(token_ids, answer)
    counters = engine.counters
    assert counters.num_thread_changes == counters.num_steps > 4
    assert sorted(counters.seconds_by_threads) == [1, 2]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_two_threads")
def test_step_runs_on_the_chosen_threads_and_torch_gets_its_own_number_back() -> None:
    threads = StepThreads(CPU)
    threads.policy.num_threads = 1
    with threads.use():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="out of memory"), threads.use():
        raise RuntimeError("out of memory")
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("usable", "most"), [(1, 1), (2, 2), (64, 2)])
def test_threads_are_at_most_those_of_torch_and_of_the_process(
    usable: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_threads, "count_usable_cores", lambda: usable)
    threads = StepThreads(CPU)
    assert threads.policy.num_threads == most
    assert threads.num_mask_threads == 1


@pytest.mark.usefixtures("_two_threads")
def test_limit_that_shrinks_while_the_engine_runs_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_threads, "_READING_S", 0.0)
    threads, counters = StepThreads(CPU), EngineCounters()
    monkeypatch.setattr(step_threads, "count_usable_cores", lambda: 1)
    for _ in range(2):  # the first reading of the load has nothing to compare with
        threads.start()
        threads.end(1, has_prompts=False, has_masks=False, counters=counters)
    assert threads.policy.num_threads == 1


def test_accelerator_keeps_the_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(step_threads, "count_usable_cores", lambda: 2)
    threads, counters = StepThreads(torch.device("meta")), EngineCounters()
    threads.start()
    threads.end(9, has_prompts=True, has_masks=False, counters=counters)
    assert threads.policy.num_threads == 6
    assert threads.num_mask_threads is None
    assert list(counters.seconds_by_threads) == [6]
