"""An engine's seconds are spread over its own lines whole, and over no other's."""

import pyarrow as pa
import pytest

from moebeam.schemas.tables import LEDGER_SCHEMA
from moebeam.transforms.money.accelerator_time import engine_seconds, with_accelerator_seconds

SECONDS = {"plan_s": 1.0, "extend_s": 5.0, "sample_s": 1.0, "retire_s": 1.0}


def ledger(*tokens: tuple[int | None, int, int, int]) -> pa.Table:
    names = ("cache_hit_tokens", "cache_miss_tokens", "visible_output_tokens", "reasoning_tokens")
    return pa.Table.from_pylist([dict(zip(names, counts, strict=True)) for counts in tokens], schema=LEDGER_SCHEMA)


def test_seconds_follow_computed_tokens_and_add_up() -> None:
    found = with_accelerator_seconds(ledger((100, 1, 1, 0), (None, 2, 3, 1)), {**SECONDS, "num_prompts": 2})
    assert found.column("accelerator_s").to_pylist() == [2.0, 6.0]
    assert found.schema.equals(LEDGER_SCHEMA)


def test_lines_without_a_computed_token_share_evenly() -> None:
    found = with_accelerator_seconds(ledger((1, 0, 0, 0), (1, 0, 0, 0)), {**SECONDS, "num_prompts": 2})
    assert found.column("accelerator_s").to_pylist() == [4.0, 4.0]


@pytest.mark.parametrize("counters", [None, {}, {"num_prompts": 1}, {**SECONDS, "num_prompts": 2}])
def test_seconds_that_are_not_known_stay_null(counters: dict[str, float] | None) -> None:
    found = with_accelerator_seconds(ledger((0, 1, 1, 0)), counters)
    assert found.column("accelerator_s").to_pylist() == [None]


def test_an_engine_that_does_not_tell_all_its_phases_tells_no_time() -> None:
    assert engine_seconds({"plan_s": 1.0}) is None
    assert engine_seconds(SECONDS) == 8.0
