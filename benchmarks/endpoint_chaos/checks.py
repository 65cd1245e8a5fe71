"""What must hold of a script that was played, whatever happened in it.

The server's own log is the judge: what it answered is held against what the tables say was paid, lost or given up.
"""

import json
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.parquet as pq

from benchmarks.endpoint_chaos.play import Play, PlayedRun, Problem, ProblemKind
from benchmarks.endpoint_chaos.questions import MAX_PRICE, is_refused
from benchmarks.endpoint_chaos.script import CUTTING_OUTAGES, OUTAGES, PATIENCE_S
from benchmarks.endpoint_chaos.server_log import ServedCall
from moebeam.schemas.errors import RequestGivenUp

Rows: TypeAlias = Mapping[int, Mapping[str, Any]]

COMPARED = ("status", "output_text", "finish_reason", "prompt_tokens", "completion_tokens", "error_type", "attempts")
BILLED_PERHAPS = frozenset({"cut", "gone", "502", "504"})
"""Calls without an answer on which a provider may have worked."""

GRACE_S = 1.0
"""Between an answer of the server and the line in the journal, on a machine with more to do than it can."""


@dataclass(slots=True)
class Findings:
    """What was found wrong, and the figures of the table.

    Attributes:
        num_paid_twice: answers of a row beyond its first; all of them stand in the tables as wasted or lost.
        late_calls_s: seconds after the first signal at which the last new call of a run came, where one came.
        views: how many were compared after each run.
        excess: of a budget's end: spending beyond the limit, as a share of the stated bound.
    """

    problems: list[Problem] = field(default_factory=list[Problem])
    num_calls: int = 0
    num_answers: int = 0
    num_paid_twice: int = 0
    num_lost_calls: int = 0
    num_wrong_rejects: int = 0
    views: list[int] = field(default_factory=list[int])
    stops: Counter[str] = field(default_factory=Counter[str])
    stop_s: list[float] = field(default_factory=list[float])
    beyond_drain_s: list[float] = field(default_factory=list[float])
    late_calls_s: list[float] = field(default_factory=list[float])
    excess: list[float] = field(default_factory=list[float])
    num_requests_short: list[int] = field(default_factory=list[int])

    def add(self, kind: ProblemKind, text: str) -> None:
        """Note something that did not hold."""
        self.problems.append(Problem(kind, text))


def read_rows(output: Path) -> Rows:
    """The rows of results and rejects by their place in the input, as far as two runs must agree on them."""
    rows: dict[int, Mapping[str, Any]] = {}
    for table in ("results", "rejects"):
        for row in pq.read_table(output / table).to_pylist():
            rows[row["n"]] = {name: row[name] for name in COMPARED} | {"message": row["error_message"]}
    return rows


def check_play(played: Play, undisturbed: Rows) -> Findings:
    """Judge a script that was played."""
    found = Findings(problems=[*played.problems])
    calls = list(played.log.calls.values())
    found.num_calls, found.num_answers = len(calls), sum(call.how == "answered" for call in calls)
    for run in played.runs:
        where = f"run {len(found.views)} ({run.name})"
        found.problems += [Problem(problem.kind, f"{where}: {problem.text}") for problem in run.problems]
        found.views.append(run.num_views)
        _check_end(played, run, found)
        if run.signalled_at is not None and run.exit_code != -signal.SIGKILL:
            _check_stop(played, run, found)
        if run.limit and run.exit_code == 4 and run.account is not None:
            _check_budget(played, run, found)
    manifest = played.output / "manifest.json"
    if manifest.exists() and json.loads(manifest.read_text())["status"] == "complete":
        _check_rows(played, undisturbed, found)
        _check_payments(played, found)
    else:
        found.add("ends", "the run is not complete")
    return found


def _check_end(played: Play, run: PlayedRun, found: Findings) -> None:
    if run.signalled_at is not None:
        found.stops[f"{run.name} during {run.during}"] += 1
        if run.exit_code == 1 and played.script.max_outage_s >= PATIENCE_S:
            found.add("ends", f"{run.name} during {run.during}: exit code 1, expected 4: {run.answer}")
        return
    if run.exit_code == 4 and run.limit:
        found.stops[run.name] += 1
    elif run.exit_code in (1, 4):
        kinds = {
            played.log.kinds[index]
            for index, begun_at in played.log.begun.items()
            if begun_at < run.ended_at and played.log.ended.get(index, run.ended_at) > run.started_at
        }
        found.stops["ended by the outage"] += 1
        # To a run of little patience a few silent calls are an outage too.
        if not kinds & {*OUTAGES} and not (kinds and played.script.max_outage_s < PATIENCE_S):
            found.add("ends", f"{run.name}: exit code {run.exit_code} without an outage: {run.answer}")


def _check_stop(played: Play, run: PlayedRun, found: Findings) -> None:
    assert run.signalled_at is not None
    stop_s = run.ended_at - run.signalled_at
    found.stop_s.append(stop_s)
    found.beyond_drain_s.append(stop_s - played.script.drain_s)
    late = [call.arrived_at - run.signalled_at for call in _calls_of(played, run) if call.arrived_at > run.signalled_at]
    if late:
        found.late_calls_s.append(max(late))
    if (num_late := sum(seconds > GRACE_S for seconds in late)) > 0:
        found.add(
            "stops",
            f"{run.name} during {run.during}: {num_late} calls later than {GRACE_S:.0f} s, the last {max(late):.1f} s",
        )


def _check_budget(played: Play, run: PlayedRun, found: Findings) -> None:
    assert run.account is not None
    if run.name == "max_requests":
        limit, asked = int(run.limit), run.account.num_attempts or 0
        found.num_requests_short.append(limit - asked)
        if asked > limit:
            found.add("limits", f"max_requests = {limit}: {asked} were asked")
        return
    spent = run.account.cost or Decimal(0)
    bound = played.script.max_concurrency * MAX_PRICE
    share = float((spent - Decimal(run.limit)) / bound)
    if not played.script.may_lack_usage:
        # Else it may have stopped at an answer of unknown cost, anywhere below its limit.
        found.excess.append(share)
    if share > 1:
        found.add("limits", f"max_cost = {run.limit}: {spent} was spent, the bound is {bound} beyond")


def _check_rows(played: Play, undisturbed: Rows, found: Findings) -> None:
    rows = read_rows(played.output)
    if rows.keys() != undisturbed.keys():
        found.add("tables", f"rows {sorted(undisturbed.keys() ^ rows.keys())} are lost, or there twice")
    for number, row in sorted(rows.items()):
        is_wrong = row["status"] == "rejected" and not (played.script.has_refusals and is_refused(number))
        if is_wrong and undisturbed[number]["status"] != "rejected":
            found.num_wrong_rejects += 1
            found.add("rejects", f"row {number}: rejected for the provider's fault: {row['message']}")
            continue
        differing = [name for name in COMPARED if row[name] != undisturbed.get(number, row)[name]]
        if differing:
            expected = {name: undisturbed[number][name] for name in differing}
            found.add("tables", f"row {number}: expected {expected}, found {[row[name] for name in differing]}")


def _check_payments(played: Play, found: Findings) -> None:
    lines: Counter[int] = Counter()
    lost: Counter[int] = Counter()
    for line in pq.read_table(played.output / "ledger").to_pylist():
        lost[line["source_row"]] += line["num_lost_calls"] or 0
        # What was given up, or in flight at a kill, has a line for its lost call alone.
        lines[line["source_row"]] += line.get("error_type") != RequestGivenUp.error_type
    found.num_lost_calls = lost.total()
    served: dict[int, list[ServedCall]] = defaultdict(list)
    for call in played.log.calls.values():
        served[call.row].append(call)
    num_unseen = 0
    for row, calls in sorted(served.items()):
        if played.script.has_refusals and is_refused(row):
            continue
        num_whole = sum(call.how == "answered" for call in calls)
        num_perhaps = sum(call.how in BILLED_PERHAPS or call.ended_at is None for call in calls)
        num_told = lines[row] + lost[row]
        found.num_paid_twice += max(0, num_whole - 1)
        if num_whole + num_perhaps > num_told:
            found.add(
                "payments",
                f"row {row}: the server gave {num_whole} answers and {num_perhaps} that may be billed; the ledger has "
                f"{lines[row]} lines and {lost[row]} lost calls; {_tell_calls(played, calls)}",
            )
        num_unseen += max(0, num_told - num_whole - num_perhaps)
    # A request that was sent as its connection was cut is rightly lost for the client; the server never read it. So is
    # one that was journaled when its process was killed. A canary asks for one row and is a lost call of another.
    num_cuts = sum(kind in CUTTING_OUTAGES for kind in played.log.kinds.values())
    num_cuts += sum(run.exit_code == -signal.SIGKILL for run in played.runs)
    num_canaries = sum(call.how == "canary" for call in played.log.calls.values())
    if num_unseen > num_cuts * played.script.max_concurrency + num_canaries:
        found.add(
            "payments", f"{num_unseen} lines and lost calls are of no call that the server saw; it cut {num_cuts} times"
        )
    if missing := [row for row in lines if lines[row] and not served.get(row)]:
        found.add("payments", f"rows {missing} have ledger lines, and the server was not asked")


def _tell_calls(played: Play, calls: list[ServedCall]) -> str:
    told: list[str] = []
    for call in calls:
        run = next((n for n, run in enumerate(played.runs) if run.started_at < call.arrived_at < run.ended_at), -1)
        told.append(f"run {run}: {call.how or 'open'}")
    return ", ".join(told)


def _calls_of(played: Play, run: PlayedRun) -> Iterator[ServedCall]:
    return (call for call in played.log.calls.values() if run.started_at < call.arrived_at < run.ended_at)
