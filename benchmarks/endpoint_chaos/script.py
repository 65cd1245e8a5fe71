"""Scripts: what a provider does to a run, and when the run is stopped, drawn from a seed.

A phase begins once the server has given so many answers, so that each is met however fast the run is, and ends after
seconds or after calls.
"""

import json
import random
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias, get_args

from pydantic import TypeAdapter

Outage: TypeAlias = Literal[
    "closed_port",
    "unknown_name",
    "expired_certificate",
    "overloaded",
    "overloaded_retry_after",
    "server_errors",
    "bad_key",
    "no_credit",
    "no_such_model",
    "no_such_path",
]
"""Everybody is failed, for seconds. `no_such_model` is DeepSeek's 400 "Model Not Exist", `no_such_path` a 404."""

Trouble: TypeAlias = Literal["some_server_errors", "resets", "truncated", "slow", "silent"]
"""A share of the calls is failed, for a number of calls."""

OUTAGES: tuple[Outage, ...] = get_args(Outage)
TROUBLES: tuple[Trouble, ...] = get_args(Trouble)
CUTTING_OUTAGES = frozenset({"closed_port", "unknown_name", "expired_certificate"})
"""Open connections are cut as they begin."""
TLS_OUTAGES = frozenset({"expired_certificate"})
NAME_OUTAGES = frozenset({"unknown_name"})

Stop: TypeAlias = Literal["SIGTERM", "SIGINT", "SIGKILL", "max_requests", "max_cost"]

START_ALLOWANCE_S = 8.0
"""Added to an outage that is there from the beginning: the command line takes seconds until its first call."""

SHORTEST_OUTAGE_S, LONGEST_OUTAGE_S = 1.0, 90.0
PATIENCE_S = 600.0
"""`max_outage_s` of most jobs: no outage lasts so long."""

MAX_SAME_REFUSALS = 6
"""Of the jobs; more rows than that are left whenever `no_such_model` begins, and fewer are refused for good."""

MAX_TROUBLES_A_ROW = 2
"""Calls of one row that trouble may hit in a script: more is no trouble of the provider but one of the row."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One behaviour for a while.

    Attributes:
        num_answers_before: given since the script began.
        lasts_s: of an outage, and of each wait within trouble; `num_calls` of trouble.
        share: of calls that are hit.
    """

    kind: str
    num_answers_before: int
    lasts_s: float
    num_calls: int = 0
    share: float = 1.0

    @property
    def is_outage(self) -> bool:
        """Whether everybody is failed."""
        return self.kind in OUTAGES


@dataclass(frozen=True, slots=True)
class StoppedRun:
    """A run of the command line that is stopped.

    Attributes:
        num_answers_before: the server's answers, since the script began, after which a signal is sent; -1 is in the
            middle of `phase`.
        delay_s: of the signal after that.
        limit: of the budget, beyond what earlier runs asked: requests, or a share of the price of the whole table.
    """

    stop: Stop
    num_answers_before: int = 0
    phase: int = 0
    delay_s: float = 0.0
    limit: float = 0.0

    @property
    def signal_number(self) -> signal.Signals | None:
        """The signal; None for a budget."""
        return signal.Signals[self.stop] if self.stop.startswith("SIG") else None


@dataclass(frozen=True, slots=True)
class Script:
    """All that happens to one job.

    Attributes:
        has_refusals: whether some rows are refused for what they hold.
        may_lack_usage: whether the answers of some rows do not say what they cost.
        max_outage_s: of the job; shorter than some outages, so that the run ends unfinished.
        timeout_s: of the job; shorter than `silent` calls.
    """

    seed: int
    num_rows: int
    has_refusals: bool
    may_lack_usage: bool
    is_tls: bool
    by_name: bool
    mode: Literal["plain", "stream"]
    max_concurrency: int
    max_retries: int
    max_outage_s: float
    timeout_s: float
    drain_s: float
    answer_s: float
    phases: tuple[Phase, ...]
    stopped_runs: tuple[StoppedRun, ...]

    def write(self, path: Path) -> None:
        """Write it for the server's process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        return TypeAdapter(cls).validate_json(path.read_bytes())

    @property
    def table(self) -> tuple[bool, bool]:
        """What decides the tables of its run; the disturbances do not."""
        return self.has_refusals, self.may_lack_usage


def undisturbed_script(num_rows: int, *, has_refusals: bool, may_lack_usage: bool) -> Script:
    """A provider that does nothing wrong."""
    return Script(
        seed=-1,
        num_rows=num_rows,
        has_refusals=has_refusals,
        may_lack_usage=may_lack_usage,
        is_tls=False,
        by_name=False,
        mode="plain",
        max_concurrency=8,
        max_retries=3,
        max_outage_s=PATIENCE_S,
        timeout_s=30.0,
        drain_s=5.0,
        answer_s=0.005,
        phases=(),
        stopped_runs=(),
    )


def draw_script(seed: int, number: int, *, num_rows: int, time_scale: float) -> Script:
    """The script of a seed and a number; `number` makes sure that all outages and troubles come up.

    Args:
        time_scale: multiplies outages, waits and time-outs.
    """
    dice = random.Random(f"{seed} {number}")
    kinds: list[str] = [OUTAGES[number % len(OUTAGES)], TROUBLES[number % len(TROUBLES)]]
    others = [kind for kind in (*OUTAGES, *TROUBLES) if kind not in kinds]
    kinds += dice.sample(others, dice.randint(0, 2))
    is_tls = "expired_certificate" in kinds or dice.random() < 0.2
    kinds = [kind for kind in kinds if is_tls or kind not in TLS_OUTAGES]
    dice.shuffle(kinds)
    timeout_s = 1.5 + 20 * time_scale
    phases = tuple(
        sorted(
            (_draw_phase(dice, kind, num_rows, time_scale, timeout_s) for kind in kinds),
            key=lambda phase: phase.num_answers_before,
        )
    )
    stopped_runs = tuple(
        _draw_stopped_run(dice, num_rows, phases, time_scale) for _ in range(dice.choice((1, 2, 2, 3)))
    )
    # A run with `max_cost` stops at the first answer of unknown cost: that alone would be seen of budgets.
    is_cost_limited = any(run.stop == "max_cost" for run in stopped_runs)
    longest_s = max(phase.lasts_s for phase in phases if phase.is_outage)
    return Script(
        seed=seed,
        num_rows=num_rows,
        has_refusals=dice.random() < 0.4,
        may_lack_usage=dice.random() < (0.15 if is_cost_limited else 0.6),
        is_tls=is_tls,
        by_name=is_tls or any(kind in NAME_OUTAGES for kind in kinds),
        mode=dice.choice(("plain", "stream")),
        max_concurrency=dice.choice((2, 4, 8)),
        max_retries=dice.choice((MAX_TROUBLES_A_ROW, 6)),
        max_outage_s=PATIENCE_S if dice.random() < 0.75 else max(1.0, longest_s * dice.uniform(0.2, 0.6)),
        timeout_s=timeout_s,
        drain_s=dice.choice((0.0, 1.0, 5.0)),
        answer_s=dice.uniform(0.1, 0.4),
        phases=phases,
        stopped_runs=stopped_runs,
    )


def _draw_phase(dice: random.Random, kind: str, num_rows: int, time_scale: float, timeout_s: float) -> Phase:
    if kind in OUTAGES:
        lasts_s = time_scale * SHORTEST_OUTAGE_S * (LONGEST_OUTAGE_S / SHORTEST_OUTAGE_S) ** dice.random()
        # A name that is unknown from the beginning is not in the client's cache.
        is_first = dice.random() < (0.6 if kind in NAME_OUTAGES else 0.1)
        latest = num_rows - 2 * MAX_SAME_REFUSALS if kind == "no_such_model" else num_rows - 1
        before = 0 if is_first else dice.randint(1, latest)
        return Phase(kind, before, lasts_s + (0.0 if before else START_ALLOWANCE_S))
    share = 1.0 if kind == "slow" else dice.uniform(0.2, 0.7)
    waits_s = timeout_s * (dice.uniform(0.1, 0.6) if kind == "slow" else 3)
    return Phase(kind, dice.randint(0, num_rows - 5), waits_s, dice.randint(4, 14), share)


def _draw_stopped_run(dice: random.Random, num_rows: int, phases: tuple[Phase, ...], time_scale: float) -> StoppedRun:
    stop: Stop = dice.choices(
        ("SIGTERM", "SIGINT", "SIGKILL", "max_requests", "max_cost"), weights=(30, 10, 30, 15, 15)
    )[0]
    if stop == "max_requests":
        return StoppedRun(stop, limit=dice.randint(1, num_rows * 2 // 3))
    if stop == "max_cost":
        return StoppedRun(stop, limit=dice.uniform(0.05, 0.7))
    delay_s = dice.uniform(0, 0.5)
    if dice.random() < 0.5:
        phase = dice.randrange(len(phases))
        if phases[phase].is_outage:
            delay_s += dice.uniform(0.1, 0.9) * (phases[phase].lasts_s if time_scale >= 0.1 else 1.0)
        return StoppedRun(stop, -1, phase, delay_s)
    return StoppedRun(stop, dice.randint(1, num_rows - 2), delay_s=delay_s)
