"""What a run cost and how fast it was, in figures that stand beside those of another run."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moebeam.jobs.console.formats import format_money
from moebeam.jobs.output.current_run import CurrentRun
from moebeam.schemas.canonical import Json
from moebeam.schemas.determinism import Determinism

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RunFigures:
    """A run's sums, over all that was paid.

    Attributes:
        cached_tokens: None where a provider did not count them all.
        hit_rate, max_hit_rate: cached tokens over prompt tokens, 0 to 1; and what the plan allowed.
        costs: currency -> decimal text; empty without prices.
        answering_s: from the first request to the last answer, pauses of a stopped run included.
        rows_per_s: answered and rejected rows over that.
        latency_p50_ms, latency_p95_ms: of requests.
        determinism: what the engine promised; None in runs of older versions, and where nothing was asked.
    """

    output: str
    run_id: str
    status: str
    num_results: int
    num_rejects: int
    num_journaled: int
    num_reused: int
    num_attempts: int
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    reasoning_tokens: int
    hit_rate: float | None
    max_hit_rate: float | None
    costs: Mapping[str, str]
    answering_s: float | None
    rows_per_s: float | None
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    determinism: Determinism | None

    def to_json(self) -> dict[str, Json]:
        return asdict(self)


def read_figures(run: CurrentRun, manifest: Mapping[str, Any]) -> RunFigures:
    """Sum up a run as it is now.

    Raises:
        CommitError: a table of its ledger is missing or damaged.
        OSError: the store failed.
    """
    committed, paid = run.account.committed, run.account.paid
    times = _read_times(run.read_ledgers())
    num_rows = committed.num_results + committed.num_rejects + run.account.num_journaled_rows
    promise = manifest.get("determinism")
    return RunFigures(
        output=run.layout.output,
        run_id=manifest["run_id"],
        status=manifest["status"],
        num_results=committed.num_results,
        num_rejects=committed.num_rejects,
        num_journaled=run.account.num_journaled_rows,
        num_reused=committed.num_reused,
        num_attempts=paid.num_attempts,
        prompt_tokens=paid.prompt_tokens,
        cached_tokens=paid.cached_tokens,
        completion_tokens=paid.completion_tokens,
        reasoning_tokens=paid.reasoning_tokens,
        hit_rate=None if paid.cached_tokens is None else paid.cached_tokens / max(1, paid.prompt_tokens),
        max_hit_rate=manifest.get("max_hit_rate"),
        costs=dict(paid.costs or {}),
        answering_s=times.answering_s,
        rows_per_s=num_rows / times.answering_s if times.answering_s else None,
        latency_p50_ms=times.percentile_ms(50),
        latency_p95_ms=times.percentile_ms(95),
        determinism=promise and Determinism(**promise),
    )


@dataclass(frozen=True, slots=True)
class _Times:
    """When requests began, and how long they took; both in seconds, shape (num_requests,)."""

    starts: Seconds
    latencies: Seconds

    @property
    def answering_s(self) -> float | None:
        if not len(self.starts):
            return None
        return float((self.starts + self.latencies).max() - self.starts.min())

    def percentile_ms(self, percent: float) -> float | None:
        return float(np.percentile(self.latencies, percent)) * 1000 if len(self.latencies) else None


def _read_times(ledgers: Iterable[pa.Table]) -> _Times:
    starts, latencies = [np.zeros(0)], [np.zeros(0)]
    for ledger in ledgers:
        timed: Any = ledger.select(["started_at", "latency_ms"]).drop_null()
        starts.append(timed.column("started_at").cast(pa.timestamp("us")).cast(pa.int64()).to_numpy() / 1e6)
        latencies.append(timed.column("latency_ms").to_numpy() / 1000)
    return _Times(np.concatenate(starts), np.concatenate(latencies))


def list_figures(a: RunFigures, b: RunFigures) -> Iterator[tuple[str, str, str]]:
    """A line a figure, for people: its name, and what it is in both runs."""
    names: tuple[tuple[str, str], ...] = (
        ("results", "num_results"),
        ("rejects", "num_rejects"),
        ("in journals, not validated", "num_journaled"),
        ("taken over from earlier runs", "num_reused"),
        ("requests", "num_attempts"),
        ("prompt tokens", "prompt_tokens"),
        ("cached tokens", "cached_tokens"),
        ("answer tokens", "completion_tokens"),
        ("reasoning tokens", "reasoning_tokens"),
    )
    yield "output", a.output, b.output
    yield "run", a.run_id, b.run_id
    yield "status", a.status, b.status
    for title, name in names:
        one, other = getattr(a, name), getattr(b, name)
        if one or other or name == "num_results":
            yield title, _count(one), _count(other)
    yield "cached share of the prompt", _share(a), _share(b)
    yield "cost", _money(a.costs), _money(b.costs)
    yield "rows/s", _number(a.rows_per_s, "{:,.2f}"), _number(b.rows_per_s, "{:,.2f}")
    yield "seconds from first to last", _number(a.answering_s, "{:,.1f}"), _number(b.answering_s, "{:,.1f}")
    yield "latency, median", _number(a.latency_p50_ms, "{:,.0f} ms"), _number(b.latency_p50_ms, "{:,.0f} ms")
    yield "latency, 95%", _number(a.latency_p95_ms, "{:,.0f} ms"), _number(b.latency_p95_ms, "{:,.0f} ms")
    yield "promise", _name_promise(a), _name_promise(b)


def _name_promise(side: RunFigures) -> str:
    return "unknown" if side.determinism is None else side.determinism.promise


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


def _share(side: RunFigures) -> str:
    most = "" if side.max_hit_rate is None else f" of {side.max_hit_rate:.1%} possible"
    return "unknown" if side.hit_rate is None else f"{side.hit_rate:.1%}{most}"


def _money(costs: Mapping[str, str]) -> str:
    return ", ".join(format_money(Decimal(amount), currency) for currency, amount in costs.items()) or "no prices"
