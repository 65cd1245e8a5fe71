"""What a launch returns and shows, for tests of the commands that start one."""

from decimal import Decimal
from typing import Any

from moebeam.jobs.console.summary import RunSummary
from tests.support.jobs.progress_snapshots import answering_snapshot

SNAPSHOT = answering_snapshot(rows_done=5, rows_total=10, elapsed_s=1.0)


def summary(**changes: Any) -> RunSummary:
    """Ten rows answered for ten cents, but for `changes`."""
    values: dict[str, Any] = {
        "status": "succeeded",
        "exit_code": 0,
        "run_id": "r1",
        "output": "/out",
        "rows_in": 10,
        "num_results": 10,
        "num_rejects": 0,
        "num_unreadable": 0,
        "rejects_by_type": {},
        "prompt_tokens": 100,
        "cached_tokens": 50,
        "computed_tokens": 50,
        "completion_tokens": 10,
        "reasoning_tokens": 0,
        "max_hit_rate": 0.5,
        "cost": Decimal("0.10"),
        "cost_allocated": Decimal("0.10"),
        "cost_basis": "measured",
        "currency": "USD",
        "price_book": "p.csv",
        "elapsed_s": 1.0,
    }
    return RunSummary(**{**values, **changes})
