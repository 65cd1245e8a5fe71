"""A whole run against a server that is not ours and misbehaves: every row is there, paid once, to the last decimal."""

from pathlib import Path

import pytest

from tests.support.jobs.chaos_job import run_chaos

pytestmark = pytest.mark.integration

NUM_ROWS = 600


def test_a_run_through_chaos_loses_no_row_and_pays_none_twice(tmp_path: Path) -> None:
    found = run_chaos(tmp_path, NUM_ROWS)
    assert (found.num_results, found.num_rejects) == (NUM_ROWS, 0)
    assert (found.num_twice, found.num_wrong_usage, found.num_lines) == (0, 0, NUM_ROWS)
    assert found.cost == found.fixtures_cost > 0
    assert found.num_calls == found.num_results + sum(found.failed_calls.values())
    for kind in ("engine_failed", "malformed_response", "engine_overloaded"):
        assert found.failed_calls[kind] > NUM_ROWS * 0.02, kind
    # What was cut off or unreadable may be billed, what was refused is not.
    assert found.failed_calls["malformed_response"] < found.num_lost_calls < NUM_ROWS * 0.2
    assert found.num_lost_calls == found.num_lost_calls_of_engine
    assert found.lost_cost_at_most > 0
    assert set(found.checks.values()) == {"equal", "the engine does not count"}
