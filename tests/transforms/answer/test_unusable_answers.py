"""Answers that no table can hold become rejects; the others of their shard are committed."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from moebeam.schemas.arrow import list_values
from moebeam.schemas.errors import CommitError
from moebeam.schemas.records import Completion, LostCall, Usage
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.shard_tables import shard_tables
from moebeam.transforms.answer.unusable.answers import TABLE_ERRORS, find_unusable, reject_unusable
from moebeam.transforms.durable.commit import sum_tables
from tests.transforms.answer.test_shard_tables import RUN, accounted, planned

NUM_ROWS = 9


def poison(completion: Completion, kind: str) -> Completion:
    match kind:
        case "a surrogate":
            return replace(completion, text="half \ud83d")
        case "a huge count":
            usage = Usage(None, None).with_estimates(10**26, 1)
            return replace(completion, usage=usage)
        case "a type":
            return replace(completion, latency_ms="soon")  # pyright: ignore[reportArgumentType]
        case _:
            call = LostCall("p", "m", "engine_timeout", completion.started_at, 10**26, 1)
            return replace(completion, lost_calls=(call,), reasoning_content=b"\xff")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["a surrogate", "a huge count", "a type", "bytes"])
def test_only_the_rows_that_no_table_can_hold_are_rejected(kind: str, tmp_path: Path) -> None:
    rows = planned([[1, 2, row] for row in range(NUM_ROWS)], [None] * NUM_ROWS)
    answers = {row: [accounted(row, Usage(3, 1, 0))] for row in range(NUM_ROWS)}
    for row in (2, 7):
        (found,) = answers[row]
        broken = poison(found.answer.completion, kind)
        answers[row] = [replace(found, answer=replace(found.answer, completion=broken))]
    with pytest.raises(TABLE_ERRORS):
        sum_tables(shard_tables("s0", rows, answers, RUN))
    assert [*find_unusable("s0", rows, answers, RUN)] == [2, 7]
    layout = RunLayout(str(tmp_path))
    sound = reject_unusable(layout, "s0", rows, answers, RUN)
    tables = shard_tables("s0", rows, sound, RUN)
    totals = sum_tables(tables)
    assert (totals.num_results, totals.num_rejects, totals.num_unknown_usage) == (NUM_ROWS - 2, 2, 2)
    assert totals.rejects_by_type == {"malformed_response": 2}
    assert all("no table can hold" in text for text in list_values(tables["rejects"], "error_message"))
    assert storage.list_names(layout.damaged) == ["answer~s0~2", "answer~s0~7"]


def test_a_failure_that_is_no_answers_fault_stays_one() -> None:
    rows = planned([[1, 2, row] for row in range(3)], [None] * 3)
    answers = {row: [accounted(row, Usage(3, 1, 0))] for row in range(3)}
    assert find_unusable("s0", rows, answers, RUN) == {}
    assert issubclass(CommitError, TABLE_ERRORS) and issubclass(pa.ArrowInvalid, TABLE_ERRORS)
    assert not issubclass(OSError, TABLE_ERRORS)
