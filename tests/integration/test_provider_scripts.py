"""Ten scripts of a failing provider with stops in between; `python -m benchmarks.faults --endpoint` plays fifty."""

from pathlib import Path

import pytest

from benchmarks.endpoint_chaos.figures import format_table, play_scripts, tell_figures

pytestmark = pytest.mark.integration

NUM_SCRIPTS = 10


def test_a_run_survives_what_a_provider_does_and_every_stop(tmp_path: Path) -> None:
    scripts = play_scripts(
        tmp_path, num_scripts=NUM_SCRIPTS, num_requests=40 * NUM_SCRIPTS, seed=16, time_scale=0.02, num_parallel=2
    )
    problems = [f"script {script.number}: {problem}" for script in scripts for problem in script.found.problems]
    assert problems == [], format_table(tell_figures(scripts, 0.0))
    assert sum(script.found.num_answers for script in scripts) >= 30 * NUM_SCRIPTS
    assert sum(script.found.stops.total() for script in scripts) >= NUM_SCRIPTS
