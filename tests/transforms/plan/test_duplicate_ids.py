"""Duplicate ids are found in buckets, and the first in input order survives."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.tables import READ_SCHEMA
from moebeam.transforms.plan.duplicate_ids import digest_ids, find_duplicates


def batch_of(ids: list[str], unit: int = 0, first_row: int = 0) -> pa.RecordBatch:
    rows = [
        {"custom_id": custom_id, "unit": unit, "source_row": first_row + row, "scope": "row"}
        for row, custom_id in enumerate(ids)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=READ_SCHEMA)


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6), min_size=1, max_size=5), st.randoms())
def test_exactly_the_later_rows_are_found_whatever_the_order_of_batches(units: list[list[str]], random: object) -> None:
    buckets: dict[int, list[bytes]] = {}
    batches = [batch_of(ids, unit) for unit, ids in enumerate(units) if ids]
    random.shuffle(batches)  # type: ignore[attr-defined]
    for batch in batches:
        for bucket, packed in digest_ids(batch):
            buckets.setdefault(bucket, []).append(packed)
    found = {
        (unit, row) for chunks in buckets.values() for unit, rows in find_duplicates(chunks).items() for row in rows
    }
    seen: set[str] = set()
    expected: set[tuple[int, int]] = set()
    for unit, ids in enumerate(units):
        for row, custom_id in enumerate(ids):
            if custom_id in seen:
                expected.add((unit, row))
            seen.add(custom_id)
    assert found == expected


def test_rows_without_an_id_of_their_own_take_no_part() -> None:
    rows = [
        {"custom_id": "a", "unit": 0, "source_row": 0, "scope": "row", "error_type": "invalid_id"},
        {"custom_id": "a", "unit": 0, "source_row": 1, "scope": "row_group", "error_type": "unreadable_row_group"},
    ]
    assert list(digest_ids(pa.RecordBatch.from_pylist(rows, schema=READ_SCHEMA))) == []
