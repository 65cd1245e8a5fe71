"""Scripts of a failing provider are drawn from seeds alone, and the checks on a played one can fail."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.endpoint_chaos.checks import COMPARED, Findings, Rows, check_play, read_rows
from benchmarks.endpoint_chaos.figures import JudgedScript, format_table, tell_figures
from benchmarks.endpoint_chaos.play import Play, PlayedRun
from benchmarks.endpoint_chaos.questions import find_answer, find_cost
from benchmarks.endpoint_chaos.script import (
    MAX_SAME_REFUSALS,
    OUTAGES,
    TROUBLES,
    Script,
    StoppedRun,
    draw_script,
    undisturbed_script,
)
from benchmarks.endpoint_chaos.server_log import ServedCall, ServerLog
from benchmarks.endpoint_chaos.views import Account, find_differences
from tests.support.jobs.jobs_for_tests import write_parquet

NUM_ROWS = 40
KILLED = -9


def _scripts(seed: int = 1) -> list[Script]:
    return [draw_script(seed, number, num_rows=NUM_ROWS, time_scale=1.0) for number in range(50)]


def test_a_seed_always_draws_the_same_scripts(tmp_path: Path) -> None:
    assert _scripts() == _scripts()
    assert _scripts(1) != _scripts(2)
    script = _scripts()[7]
    script.write(tmp_path / "script.json")
    assert Script.read(tmp_path / "script.json") == script


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fifty_scripts_hold_every_behaviour_and_every_stop(seed: int) -> None:
    scripts = _scripts(seed)
    assert {phase.kind for script in scripts for phase in script.phases} == {*OUTAGES, *TROUBLES}
    stops = {run.stop for script in scripts for run in script.stopped_runs}
    assert stops == {"SIGTERM", "SIGINT", "SIGKILL", "max_requests", "max_cost"}
    outages = [phase for script in scripts for phase in script.phases if phase.kind in OUTAGES]
    assert all(1 <= phase.lasts_s <= 98 for phase in outages)
    assert max(phase.lasts_s for phase in outages) > 60


def test_more_rows_are_left_for_a_wrong_model_than_a_run_needs_to_see_it() -> None:
    wrong = [phase for script in _scripts() for phase in script.phases if phase.kind == "no_such_model"]
    assert wrong
    assert all(NUM_ROWS - phase.num_answers_before > MAX_SAME_REFUSALS for phase in wrong)


def test_an_answer_costs_what_the_price_book_says() -> None:
    usage = find_answer(3, may_lack_usage=False)["usage"]
    hit, miss, output = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"], usage["completion_tokens"]
    assert float(find_cost(3)) == pytest.approx((hit * 0.028 + miss * 0.14 + output * 0.28) / 1e6)
    assert find_answer(3, may_lack_usage=True)["usage"] is None


def test_views_that_differ_are_told_by_name_and_what_a_view_does_not_say_is_no_difference() -> None:
    views = {"status": Account(3, 10, 5), "manifest": Account(3, 10, 6), "export": Account(num_answered_rows=3)}
    assert find_differences(views) == ["completion_tokens differs: status 5, manifest 6"]
    assert find_differences({"status": Account(3), "export": Account(num_answered_rows=3)}) == []


def _played(
    folder: Path, calls: Sequence[ServedCall], runs: Sequence[PlayedRun], *, num_lost_calls: int = 0
) -> tuple[Play, Rows]:
    """A finished run over one row, with one line in its ledger; the tables that it should have."""
    row = dict.fromkeys(COMPARED) | {"status": "ok", "output_text": "fine", "attempts": 1}
    strings = [name for name in COMPARED if row[name] is None or isinstance(row[name], str)]
    columns = {name: pa.array([row[name]], pa.string() if name in strings else pa.int64()) for name in COMPARED}
    columns |= {"n": pa.array([0]), "error_message": pa.array([None], pa.string())}
    output = folder / "out"
    write_parquet(output / "results" / "a.parquet", columns)
    write_parquet(output / "rejects" / "a.parquet", {name: column[:0] for name, column in columns.items()})
    write_parquet(output / "ledger" / "a.parquet", {"source_row": [0], "num_lost_calls": [num_lost_calls]})
    (output / "manifest.json").write_text('{"status": "complete"}')
    log = ServerLog(folder / "calls.jsonl", {call.number: call for call in calls})
    script = undisturbed_script(1, has_refusals=False, may_lack_usage=False)
    return Play(folder, script, log, list(runs)), read_rows(output)


def _call(number: int, arrived_at: float, how: str = "answered") -> ServedCall:
    return ServedCall(number, 0, arrived_at, arrived_at + 0.1, how)


def test_a_row_that_was_paid_twice_is_found(tmp_path: Path) -> None:
    runs = [PlayedRun(None, 0.0, 10.0)]
    once, twice = [_call(0, 1.0)], [_call(0, 1.0), _call(1, 2.0)]
    assert check_play(*_played(tmp_path / "a", once, runs)).problems == []
    (problem,) = check_play(*_played(tmp_path / "b", twice, runs)).problems
    assert problem.kind == "payments"
    assert "the server gave 2 answers" in problem.text


def test_what_was_paid_twice_is_forgiven_where_it_is_told_even_after_a_kill(tmp_path: Path) -> None:
    runs = [PlayedRun(None, 0.0, 10.0)]
    given_up = [_call(0, 1.0, "gone"), _call(1, 2.0)]
    assert [p.kind for p in check_play(*_played(tmp_path / "a", given_up, runs)).problems] == ["payments"]
    assert check_play(*_played(tmp_path / "b", given_up, runs, num_lost_calls=1)).problems == []
    killed = [PlayedRun(StoppedRun("SIGKILL"), 0.0, 1.5, KILLED, signalled_at=1.5), PlayedRun(None, 1.6, 10.0)]
    in_flight = [_call(0, 1.3), _call(1, 2.0)]
    assert [p.kind for p in check_play(*_played(tmp_path / "c", in_flight, killed)).problems] == ["payments"]
    assert check_play(*_played(tmp_path / "d", in_flight, killed, num_lost_calls=1)).problems == []


def test_a_lost_call_that_no_server_saw_is_found(tmp_path: Path) -> None:
    (problem,) = check_play(
        *_played(tmp_path, [_call(0, 1.0)], [PlayedRun(None, 0.0, 10.0)], num_lost_calls=1)
    ).problems
    assert "1 lines and lost calls are of no call" in problem.text


def test_a_row_that_differs_and_a_call_after_the_signal_are_found(tmp_path: Path) -> None:
    stopped = PlayedRun(StoppedRun("SIGTERM"), 0.0, 9.0, 4, signalled_at=1.0)
    played, rows = _played(tmp_path, [_call(0, 5.0)], [stopped, PlayedRun(None, 9.5, 10.0)])
    other = {0: {**rows[0], "output_text": "other"}}
    found = check_play(played, other)
    assert sorted(problem.kind for problem in found.problems) == ["stops", "tables"]
    assert found.stop_s == [8.0]


def test_the_table_has_a_line_for_each_figure() -> None:
    found = Findings(num_calls=3, num_answers=2, stop_s=[0.5, 1.5, 2.5])
    figures = tell_figures([JudgedScript(0, 40, ("closed_port",), 2, 9.0, found)], 60.0)
    table = format_table(figures)
    assert len(table.splitlines()) == len(figures) + 2
    assert "| seconds from a signal to the end | p50 1.50, p99 2.50, max 2.50 (3) |" in table
