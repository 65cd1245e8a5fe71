"""The policy against machines of arithmetic: a clock that steps alone move, and steps as long as the machine says."""

import random
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.model_runner.torch_engine.threads.policy import StepTiming, ThreadPolicy

StepTime = Callable[[int], float]
"""Seconds of a step, by its number of threads."""


def quiet(num_threads: int) -> float:
    """Nine tenths of the work scale."""
    return 0.1 + 0.9 / num_threads


def beside_busy_programs(num_cores: int, num_busy: int) -> StepTime:
    """Threads beyond the free cores are waited for, three times as long as the others."""
    return lambda num_threads: quiet(num_threads) * (3.0 if num_threads > num_cores - num_busy else 1.0)


@dataclass
class Machine:
    """Runs steps, of which every `steps_between_readings`th brings a reading of the load, if it tells any."""

    policy: ThreadPolicy
    max_threads: int
    taken_cores: float | None = 0.0
    steps_between_readings: int = 1
    now_s: float = 0.0
    num_steps: int = 0
    used: list[int] = field(default_factory=list[int])

    def run(self, num_steps: int, step_time: StepTime, kinds: Iterator[Hashable] | None = None) -> list[int]:
        """Run steps; the numbers of threads that they ran on."""
        started = len(self.used)
        for _ in range(num_steps):
            num_threads = self.policy.num_threads
            wall_s = step_time(num_threads)
            self.now_s += wall_s
            self.num_steps += 1
            self.used.append(num_threads)
            is_reading = self.num_steps % self.steps_between_readings == 0
            self.policy.observe(
                StepTiming(
                    kind=next(kinds) if kinds is not None else "decode",
                    wall_s=wall_s,
                    cpu_s=0.8 * num_threads * quiet(num_threads),
                    ended_s=self.now_s,
                    max_threads=self.max_threads,
                    taken_cores=self.taken_cores if is_reading else None,
                )
            )
        return self.used[started:]


def machine(num_cores: int, **settings: object) -> Machine:
    return Machine(ThreadPolicy(num_cores), num_cores, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_cores", [2, 4, 16])
def test_quiet_machine_is_used_whole_and_trials_cost_a_twentieth(num_cores: int) -> None:
    found = machine(num_cores)
    found.run(400, quiet)
    assert found.policy.num_threads == num_cores
    assert found.policy.num_changes == 0
    assert found.now_s < 1.06 * 400 * quiet(num_cores)


@pytest.mark.parametrize("num_cores", [2, 4, 16])
@pytest.mark.parametrize("tells_load", [True, False])
def test_busy_program_is_left_a_core_within_a_few_steps(num_cores: int, tells_load: bool) -> None:
    found = machine(num_cores, taken_cores=0.0 if tells_load else None)
    found.run(40, quiet)
    found.taken_cores = 1.0 if tells_load else None
    used = found.run(40, beside_busy_programs(num_cores, 1))
    free = num_cores - 1 if tells_load else num_cores // 2
    assert used.count(num_cores) <= 10
    assert used.count(free) > 20


@pytest.mark.parametrize("num_cores", [2, 4, 16])
@pytest.mark.parametrize("tells_load", [True, False])
def test_all_cores_are_used_again_once_the_busy_program_is_gone(num_cores: int, tells_load: bool) -> None:
    found = machine(num_cores, taken_cores=1.0 if tells_load else None)
    found.run(60, beside_busy_programs(num_cores, 1))
    assert found.policy.num_threads < num_cores
    found.taken_cores = 0.0 if tells_load else None
    used = found.run(300, quiet)
    assert found.policy.num_threads > 0.9 * num_cores
    if tells_load:
        assert max(used[:20]) == num_cores


def test_engine_that_begins_beside_a_busy_program_yields_at_once() -> None:
    found = machine(2, taken_cores=1.0)
    used = found.run(30, beside_busy_programs(2, 1))
    assert used[:3] == [2, 2, 2]
    assert used[3:5] == [1, 1]
    assert used.count(2) <= 5


def test_short_run_on_a_quiet_machine_spends_nothing_on_trials() -> None:
    assert set(machine(2).run(100, quiet)) == {2}


def test_long_steps_are_tried_on_fewer_threads_only_beside_busy_programs() -> None:
    found = machine(2)
    assert set(found.run(50, lambda num_threads: 40 * quiet(num_threads))) == {2}
    found.taken_cores = 1.0
    found.run(10, lambda num_threads: 40 * beside_busy_programs(2, 1)(num_threads))
    assert found.policy.num_threads == 1


def test_model_too_small_for_threads_runs_on_one() -> None:
    found = machine(16)
    found.run(400, lambda num_threads: 0.07 * num_threads)
    assert set(found.run(40, lambda num_threads: 0.07 * num_threads)) == {1}


def test_more_threads_stay_where_they_win_a_larger_share_of_a_full_machine() -> None:
    found = machine(2, taken_cores=2.0)
    found.run(100, lambda num_threads: 1.0 if num_threads == 2 else 1.6)
    assert found.policy.num_threads == 2


@pytest.mark.parametrize(("num_cores", "best"), [(2, 2), (16, 16)])
def test_steps_that_vary_by_a_fifth_are_no_reason_to_change(num_cores: int, best: int) -> None:
    draw = random.Random(0)
    found = machine(num_cores)
    found.run(500, lambda num_threads: quiet(num_threads) * draw.lognormvariate(0, 0.2))
    assert found.policy.num_changes <= 2
    assert found.used.count(best) > 430


def test_steps_are_compared_with_steps_of_their_own_kind_only() -> None:
    """Prefill takes ten times as long as decoding; mixed in any order that is no reason to change."""
    draw = random.Random(0)
    kinds = [draw.choice(["prefill", "decode"]) for _ in range(400)]
    found = machine(2)
    for kind in kinds:
        scale = 10.0 if kind == "prefill" else 1.0
        found.run(1, lambda num_threads, scale=scale: scale * quiet(num_threads), iter([kind]))
    assert found.policy.num_threads == 2
    assert found.policy.num_changes == 0


def test_trial_of_a_kind_of_step_that_no_longer_comes_ends_soon() -> None:
    found = machine(2)
    for _ in range(150):
        if found.policy.num_threads == 2:
            found.run(1, quiet, iter(["prefill"]))
    assert found.policy.num_threads == 1  # the trial has begun
    used = found.run(30, quiet, iter(["decode"] * 30))
    assert used.count(1) <= 4 + 3  # the rest of the first trial, and one among steps of decoding


def test_steps_that_grow_with_their_answers_are_not_slow() -> None:
    found = machine(2)
    for step in range(300):
        found.run(1, lambda num_threads, step=step: quiet(num_threads) * (1 + 0.01 * step))
    assert found.policy.num_changes == 0
    assert found.used.count(1) < 25


def test_limit_that_shrinks_holds_for_the_next_step_and_one_that_grows_is_used() -> None:
    found = machine(8)
    found.run(20, quiet)
    found.max_threads = 3
    used = found.run(60, quiet)
    assert max(used[1:]) == 3
    found.max_threads = 8
    found.run(60, quiet)
    assert found.policy.num_threads == 8


def test_one_core_is_never_asked_for_more() -> None:
    found = machine(1)
    assert set(found.run(50, quiet)) == {1}


def test_two_engines_that_crowd_each_other_settle_on_a_core_each() -> None:
    """As measured: with 2 + 2 threads on two cores each took twice as long as with 1 + 1, with 1 + 2 almost as long."""
    times = {(2, 2): 0.8, (1, 2): 0.42, (2, 1): 0.43, (1, 1): 0.40}
    engines = [machine(2, taken_cores=1.0), machine(2, taken_cores=1.0)]
    for _ in range(200):
        for own, other in (engines, reversed(engines)):
            own.run(1, lambda num_threads, other=other: times[num_threads, other.policy.num_threads])
    assert [engine.policy.num_threads for engine in engines] == [1, 1]
    assert all(engine.used[-100:].count(1) > 85 for engine in engines)


@settings(deadline=None)
@given(
    num_cores=st.integers(1, 32),
    walls=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10), st.floats(0, 40)), max_size=200),
)
def test_any_timings_leave_a_number_within_the_limit(num_cores: int, walls: list[tuple[str, float, float]]) -> None:
    policy = ThreadPolicy(num_cores)
    now_s = 0.0
    for kind, wall_s, taken_cores in walls:
        now_s += wall_s
        policy.observe(StepTiming(kind, wall_s, wall_s, now_s, num_cores, taken_cores))
        assert 1 <= policy.num_threads <= num_cores
