"""Chooses the number of threads from what steps took; free of torch, of clocks and of the machine.

Threads meet after each of a step's thousands of operations. When another program holds one of their cores, all of them
wait for the one that waits for the scheduler: fewer threads are faster then, and the more so the busier the machine
(`docs/adr/0014`). So another number is tried for a few steps whenever there is a reason to: the steps became slower or
got less CPU time, the load of other programs changed, or enough time has passed. Steps are compared with steps of their
own kind only, and trials may cost about a twentieth of the time.
"""

import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

NUM_TRIAL_STEPS, _NUM_CLOSE_STEPS = 3, 6
"""Steps of a trial, and of one that wins closely; medians are compared."""

_CLEARLY_SLOWER, _CLEARLY_FASTER = 1.2, 0.67
"""Two steps with such shares of the time before end a trial; one that loses wrongly costs little."""

_WINNING_RATIO, _CLOSE_RATIO = 0.92, 0.8
"""A trial wins with at most this share of the time; closely with more than the second."""

_SLOW, _SLIGHTLY_SLOW, _STARVED, _VERY_SLOW = 1.3, 1.1, 0.8, 2.0
"""A step is slow if it took this times the usual, or the second with this share of the usual CPU time a second. Three
slow steps in turn are a reason for a trial, or two that are very slow."""

_NUM_SLOW_STEPS, _NUM_VERY_SLOW_STEPS = 3, 2
_DEVIATIONS = 3.0
"""Times its usual deviation that a slow step is above the usual."""

_USUAL_WEIGHT, _FIRST_DEVIATION = 0.2, 0.1
"""Weight of the newest step in what is usual: answers grow, and with them the time of a step."""

_BUSY_CORES = 0.4
"""Load of other programs, and change of it, that counts."""

_MIN_PAUSE_S, _MAX_PAUSE_S = 2.0, 60.0
_PAUSE_PER_LOST_S = 20.0
"""How long to pause for each second that trials lost; where there is a reason to try again, a second, doubled with each
reason in turn that led to nothing."""

_NUM_QUIET_STEPS, _NUM_UNSEEN_STEPS = 100, 40
"""A trial without a reason begins after the time of so many such steps, the second where nobody tells the load of other
programs: it loses about one, and a short run would never gain that back."""

_LONG_STEP_S = 10.0
"""Steps so long, as of streamed weights, are not tried on fewer threads without a reason: a run may have few."""

_NUM_KEPT_STEPS = 32
"""Newest steps on the chosen number that a trial is held against."""

_MAX_OTHER_STEPS = 2
"""Steps of other kinds that a trial bears: where prefill ends in the middle of one, decoding must not wait for more."""


@dataclass(frozen=True, slots=True)
class StepTiming:
    """What one step took.

    Attributes:
        kind: equal for steps of about equal work.
        cpu_s: CPU time of all of the process's threads.
        ended_s: when the step ended, by any monotonic clock.
        max_threads: most threads that may be used from now on.
        taken_cores: how many of `max_threads` cores other programs kept busy of late; None between readings, and where
            nobody knows.
    """

    kind: Hashable
    wall_s: float
    cpu_s: float
    ended_s: float
    max_threads: int
    taken_cores: float | None = None


@dataclass(slots=True)
class _Usual:
    wall_s: float
    cores: float
    deviation: float = _FIRST_DEVIATION

    def is_exceeded(self, timing: StepTiming) -> bool:
        is_starved = timing.cpu_s / timing.wall_s < _STARVED * self.cores
        bar = max(_SLIGHTLY_SLOW if is_starved else _SLOW, 1 + _DEVIATIONS * self.deviation)
        return timing.wall_s > bar * self.wall_s

    def add(self, timing: StepTiming) -> None:
        self.deviation += _USUAL_WEIGHT * (abs(timing.wall_s / self.wall_s - 1) - self.deviation)
        self.wall_s += _USUAL_WEIGHT * (timing.wall_s - self.wall_s)
        self.cores += _USUAL_WEIGHT * (timing.cpu_s / timing.wall_s - self.cores)


class ThreadPolicy:
    """Hill climbing over numbers of threads, one step's timing at a time.

    Attributes:
        num_threads: for the next step.
        num_changes: how often another number was chosen, trials that failed not counted.
    """

    def __init__(self, max_threads: int) -> None:
        self.num_threads = max_threads
        self.num_changes = 0
        self._max_threads = max_threads
        self._chosen = max_threads
        self._lately: deque[StepTiming] = deque(maxlen=_NUM_KEPT_STEPS)
        self._usual: dict[Hashable, _Usual] = {}
        self._slow: deque[StepTiming] = deque(maxlen=_NUM_KEPT_STEPS)
        self._round: _Round | None = None
        self._pause_s = _MIN_PAUSE_S
        self._next_round_s = self._next_triggered_s = -math.inf
        self._stepped_s = 0.0
        self._is_due = False
        self._num_false_alarms = 0
        self._taken_cores = 0.0
        self._settled_cores: float | None = None

    def observe(self, timing: StepTiming) -> None:
        """Take in the timing of a step that ran on `num_threads`, and choose those of the next."""
        if timing.wall_s <= 0:
            return
        self._limit(timing.max_threads)
        self._stepped_s += timing.wall_s
        if timing.taken_cores is not None:
            self._taken_cores = max(0.0, timing.taken_cores)
            if self._settled_cores is None:
                self._settled_cores = self._taken_cores
        if self._max_threads == 1:
            return
        if self._round is None:
            self._observe_chosen(timing)
        else:
            self._observe_trial(self._round, timing)

    def _limit(self, max_threads: int) -> None:
        if max_threads == self._max_threads:
            return
        was_at_most = self._chosen == self._max_threads
        self._max_threads = max_threads
        self._round = None
        self._choose(max_threads if was_at_most else min(self._chosen, max_threads))
        self._next_round_s = self._next_triggered_s = -math.inf

    def _observe_chosen(self, timing: StepTiming) -> None:
        self._lately.append(timing)
        usual = self._usual.get(timing.kind)
        is_very_slow = usual is not None and timing.wall_s > _VERY_SLOW * usual.wall_s
        if usual is None:
            self._usual[timing.kind] = _Usual(timing.wall_s, timing.cpu_s / timing.wall_s)
        elif usual.is_exceeded(timing):
            self._slow.append(timing)
        else:
            self._slow.clear()
            usual.add(timing)
        if timing.ended_s < self._next_triggered_s:
            return
        if _count_kind(self._slow, timing.kind) >= (_NUM_VERY_SLOW_STEPS if is_very_slow else _NUM_SLOW_STEPS):
            slow = list(self._slow)
            self._forget()
            self._lately.extend(slow)
            self._begin_round(is_alarm=True)
        elif self._has_load_changed() and not self._is_due:
            self._forget()
            self._is_due = True
        elif self._may_try(timing) and _count_kind(self._lately, timing.kind) >= NUM_TRIAL_STEPS:
            self._begin_round(is_alarm=self._is_due)

    def _may_try(self, timing: StepTiming) -> bool:
        if self._is_due:
            return True
        num_steps = _NUM_UNSEEN_STEPS if self._settled_cores is None else _NUM_QUIET_STEPS
        is_earned = timing.wall_s < min(_LONG_STEP_S, self._stepped_s / num_steps)
        return (is_earned or self._taken_cores >= _BUSY_CORES) and timing.ended_s >= self._next_round_s

    def _has_load_changed(self) -> bool:
        """Whether others take another share of the machine than at the end of the last round; true once a change."""
        if self._settled_cores is None or abs(self._taken_cores - self._settled_cores) < _BUSY_CORES:
            return False
        self._settled_cores = self._taken_cores
        return True

    def _begin_round(self, *, is_alarm: bool) -> None:
        self._is_due = False
        self._num_false_alarms = self._num_false_alarms + 1 if is_alarm else 0
        lower, higher = self._neighbours()
        is_quiet = self._taken_cores < _BUSY_CORES
        candidates = (higher, lower) if is_quiet else (lower, higher)
        self._round = _Round([num for num in candidates if num is not None], _walls_by_kind(self._lately))
        self._next_trial(self._round)

    def _neighbours(self) -> tuple[int | None, int | None]:
        """The next lower and the next higher number that is worth a try: halves, and the number of free cores."""
        halves = {max(1, self._max_threads >> shift) for shift in range(self._max_threads.bit_length())}
        numbers = halves | {max(1, self._max_threads - round(self._taken_cores))}
        lower = [num for num in numbers if num < self._chosen]
        higher = [num for num in numbers if num > self._chosen]
        return max(lower, default=None), min(higher, default=None)

    def _next_trial(self, round_: "_Round") -> None:
        round_.begin_trial()
        self.num_threads = round_.candidates.pop(0)

    def _observe_trial(self, round_: "_Round", timing: StepTiming) -> None:
        round_.add(timing)
        verdict = round_.verdict()
        if verdict is None:
            return
        if verdict:
            before = self._chosen
            self._choose(self.num_threads)
            self._lately.extend(round_.timings)
            self.num_changes += 1
            round_.base = _walls_by_kind(round_.timings)
            lower, higher = self._neighbours()
            further = lower if self._chosen < before else higher
            round_.candidates = [] if further is None else [further]
            round_.has_won = True
        if round_.candidates:
            self._next_trial(round_)
        else:
            self._end_round(round_, timing.ended_s)

    def _end_round(self, round_: "_Round", now_s: float) -> None:
        self._round = None
        self.num_threads = self._chosen
        self._pause_s = _MIN_PAUSE_S if round_.has_won else min(_MAX_PAUSE_S, 2 * self._pause_s)
        self._next_round_s = now_s + max(self._pause_s, _PAUSE_PER_LOST_S * round_.lost_s)
        if round_.has_won:
            self._num_false_alarms = 0
        self._next_triggered_s = now_s + min(_PAUSE_PER_LOST_S, 2.0**self._num_false_alarms) * round_.lost_s
        if self._settled_cores is not None:
            self._settled_cores = self._taken_cores

    def _choose(self, num_threads: int) -> None:
        self.num_threads = self._chosen = num_threads
        self._forget()

    def _forget(self) -> None:
        self._usual = {}
        self._slow.clear()
        self._lately.clear()


class _Round:
    """Trials of one number of threads after the other.

    Attributes:
        base: seconds of a step of each kind on the chosen number.
        timings: of the steps of the trial, those of kinds in `base`.
        lost_s: what trials took longer than steps on the chosen number would have, as far as that is known.
    """

    def __init__(self, candidates: list[int], base: dict[Hashable, float]) -> None:
        self.candidates = candidates
        self.base = base
        self.lost_s = 0.0
        self.has_won = False
        self.begin_trial()

    def begin_trial(self) -> None:
        self.timings: list[StepTiming] = []
        self._num_other_steps = 0

    def add(self, timing: StepTiming) -> None:
        base = self.base.get(timing.kind)
        if base is None:
            self._num_other_steps += 1
            self.lost_s += timing.wall_s / 2  # as nobody knows what it would have taken
            return
        self.timings.append(timing)
        self.lost_s += max(0.0, timing.wall_s - base)

    def verdict(self) -> bool | None:
        """Whether the trial wins; None while that is open."""
        ratios = [timing.wall_s / self.base[timing.kind] for timing in self.timings]
        if len(ratios) >= NUM_TRIAL_STEPS or _is_clear(ratios):
            ratio = median(ratios)
            if not _CLOSE_RATIO < ratio <= _WINNING_RATIO or len(ratios) >= _NUM_CLOSE_STEPS:
                return ratio <= _WINNING_RATIO
        return False if self._num_other_steps > _MAX_OTHER_STEPS else None


def _count_kind(timings: Iterable[StepTiming], kind: Hashable) -> int:
    return sum(timing.kind == kind for timing in timings)


def _is_clear(ratios: Sequence[float]) -> bool:
    return len(ratios) >= 2 and (min(ratios) >= _CLEARLY_SLOWER or max(ratios) <= _CLEARLY_FASTER)


def _walls_by_kind(timings: Iterable[StepTiming]) -> dict[Hashable, float]:
    """The median time of the newest steps of each kind; a single step is none to compare with."""
    walls: dict[Hashable, list[float]] = {}
    for timing in timings:
        walls.setdefault(timing.kind, []).append(timing.wall_s)
    return {kind: median(found[-_NUM_CLOSE_STEPS:]) for kind, found in walls.items() if len(found) > 1}
