"""Plays many scripts and adds up what was found: the table of `python -m benchmarks.faults --endpoint`."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks.endpoint_chaos.checks import Findings, Rows, check_play, read_rows
from benchmarks.endpoint_chaos.play import Play, ProblemKind, play
from benchmarks.endpoint_chaos.script import draw_script, undisturbed_script


@dataclass(frozen=True, slots=True)
class JudgedScript:
    """A script that was played, without its folder."""

    number: int
    num_rows: int
    kinds: tuple[str, ...]
    num_runs: int
    elapsed_s: float
    found: Findings


def play_scripts(
    folder: Path, *, num_scripts: int, num_requests: int, seed: int, time_scale: float, num_parallel: int
) -> list[JudgedScript]:
    """Play scripts; folders of those without a problem are removed.

    Args:
        num_requests: of all scripts together; each asks an equal share.
        num_parallel: scripts at a time; most of a script's time is waiting.
    """
    num_rows = num_requests // num_scripts
    scripts = [draw_script(seed, number, num_rows=num_rows, time_scale=time_scale) for number in range(num_scripts)]
    tables = sorted({script.table for script in scripts})

    def play_undisturbed(table: tuple[bool, bool]) -> Rows:
        return _play_undisturbed(folder / f"undisturbed-{tables.index(table)}", num_rows, *table)

    def judge(number: int) -> JudgedScript:
        played = play(folder / f"script-{number}", scripts[number])
        return _judge(number, played, undisturbed[scripts[number].table])

    with ThreadPoolExecutor(num_parallel) as pool:
        undisturbed = dict(zip(tables, pool.map(play_undisturbed, tables), strict=True))
        return list(pool.map(judge, range(num_scripts)))


def _play_undisturbed(folder: Path, num_rows: int, has_refusals: bool, may_lack_usage: bool) -> Rows:
    script = undisturbed_script(num_rows, has_refusals=has_refusals, may_lack_usage=may_lack_usage)
    played = play(folder, script)
    problems = [*played.problems, *(problem for run in played.runs for problem in run.problems)]
    if problems or len(played.runs) != 1:
        last = played.runs[-1].answer
        raise RuntimeError(f"the undisturbed run does not pass: {problems}; the command said {last}")
    return read_rows(played.output)


def _judge(number: int, played: Play, undisturbed: Rows) -> JudgedScript:
    found = check_play(played, undisturbed)
    print(
        f"script {number}: {played.elapsed_s:.0f} s, {len(played.runs)} runs, {len(found.problems)} problems",
        file=sys.stderr,
    )
    for problem in found.problems:
        print(f"    {problem.kind}: {problem.text[:600]}", file=sys.stderr)
    if not found.problems:
        shutil.rmtree(played.folder)
    kinds = tuple(played.log.kinds.values())
    return JudgedScript(number, played.script.num_rows, kinds, len(played.runs), played.elapsed_s, found)


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table."""

    name: str
    found: str
    goal: str = ""


def tell_figures(scripts: Sequence[JudgedScript], elapsed_s: float) -> list[Figure]:
    """The lines of the table."""
    found = [script.found for script in scripts]
    problems = Counter(problem.kind for one in found for problem in one.problems)
    kinds = Counter(kind for script in scripts for kind in script.kinds)
    stops = sum((one.stops for one in found), Counter[str]())
    by_stop: Counter[str] = Counter()
    for name, count in stops.items():
        by_stop[name.split(" during ")[0]] += count
    stop_s = [seconds for one in found for seconds in one.stop_s]
    beyond_s = [seconds for one in found for seconds in one.beyond_drain_s]
    late_s = [seconds for one in found for seconds in one.late_calls_s]
    excess = [share for one in found for share in one.excess]
    short = [number for one in found for number in one.num_requests_short]
    views = [number for one in found for number in one.views if number]
    return [
        Figure("scripts, rows", f"{len(scripts)}, {sum(script.num_rows for script in scripts):,}"),
        Figure("runs of the command line", f"{sum(script.num_runs for script in scripts):,}"),
        Figure("calls, answers of the server", f"{_sum(found, 'num_calls'):,}, {_sum(found, 'num_answers'):,}"),
        Figure("what the server did", _tell_counts(kinds)),
        Figure("what ended the runs", _tell_counts(by_stop)),
        Figure("rows rejected for the provider's fault", str(_sum(found, "num_wrong_rejects")), "0"),
        Figure("answers paid twice, in the ledger as wasted or lost", str(_sum(found, "num_paid_twice"))),
        Figure("rows paid twice, or paid and not told", str(problems["payments"]), "0"),
        Figure("lost calls in the ledger", f"{_sum(found, 'num_lost_calls'):,}"),
        Figure("views compared", f"{sum(views):,} after {len(views):,} runs; {problems['views']} differences", "0"),
        Figure("rows that differ from an undisturbed run", str(problems["tables"]), "0"),
        Figure("seconds from a signal to the end", _tell_quantiles(stop_s), "p99 < 5 + drain_s"),
        Figure("the same without drain_s", _tell_quantiles(beyond_s), "p99 < 5"),
        Figure("seconds from a signal to the last new call", _tell_quantiles(late_s), "< 1"),
        Figure("spent beyond `max_cost`, share of the bound", _tell_quantiles(excess), "<= 1"),
        Figure("requests short of `max_requests`", _tell_quantiles([float(number) for number in short]), ">= 0"),
        Figure("runs that ended otherwise than they should", str(problems["ends"]), "0"),
        Figure("minutes", f"{elapsed_s / 60:.1f}"),
    ]


def _sum(found: Iterable[Findings], name: str) -> int:
    return sum(getattr(one, name) for one in found)


def _tell_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _tell_quantiles(values: Sequence[float]) -> str:
    """Median, 99th percentile (the nearest rank) and largest value."""
    if not values:
        return "none"
    ordered = sorted(values)
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99))
    return f"p50 {p50:.2f}, p99 {p99:.2f}, max {ordered[-1]:.2f} ({len(ordered)})"


def format_table(figures: Iterable[Figure]) -> str:
    """The lines as Markdown."""
    lines = ["| figure | found | goal |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {figure.name} | {figure.found} | {figure.goal} |" for figure in figures)])


def count_endpoint_faults(
    folder: Path, *, num_scripts: int, num_requests: int, seed: int, time_scale: float, num_parallel: int
) -> dict[str, Any]:
    """Play scripts and print the table; all that was found, with its problems."""
    started = time.monotonic()
    scripts = play_scripts(
        folder,
        num_scripts=num_scripts,
        num_requests=num_requests,
        seed=seed,
        time_scale=time_scale,
        num_parallel=num_parallel,
    )
    figures = tell_figures(scripts, time.monotonic() - started)
    print(format_table(figures), file=sys.stderr)
    problems = [(script, problem) for script in scripts for problem in script.found.problems]
    return {
        "seed": seed,
        "time_scale": time_scale,
        "figures": {figure.name: figure.found for figure in figures},
        "problems": [f"script {script.number}: {problem.kind}: {problem.text}" for script, problem in problems],
        "problems_by_kind": {kind: sum(one.kind == kind for _, one in problems) for kind in get_args(ProblemKind)},
        "scripts": [_tell_script(script) for script in scripts],
    }


def _tell_script(script: JudgedScript) -> dict[str, Any]:
    found = script.found
    return {
        "number": script.number,
        "kinds": script.kinds,
        "num_runs": script.num_runs,
        "elapsed_s": script.elapsed_s,
        "num_calls": found.num_calls,
        "num_answers": found.num_answers,
        "stops": dict(found.stops),
        "stop_s": found.stop_s,
        "late_calls_s": found.late_calls_s,
        "excess": found.excess,
        "num_requests_short": found.num_requests_short,
    }
