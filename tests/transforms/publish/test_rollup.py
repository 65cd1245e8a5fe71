"""Roll-ups: exact, independent of how the ledger is cut, never across currencies, and nothing left out."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.testing.util import assert_that
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.answers import ShardCommit, StagedFile, Totals
from moebeam.schemas.errors import CommitError, JobFileError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA
from moebeam.transforms.publish.rollup import (
    GroupSums,
    Rollup,
    largest_groups,
    merge_groups,
    parse_by,
    read_ledger,
    roll_up,
)
from moebeam.transforms.publish.step import RollUpLedger

START = datetime(2026, 11, 23, 23, 30, tzinfo=UTC)


def line(**values: Any) -> dict[str, Any]:
    return {
        "tenant": "a",
        "outcome": "answered",
        "finish_reason": "stop",
        "started_at": START,
        "cache_hit_tokens": 1,
        "cache_miss_tokens": 2,
        "visible_output_tokens": 3,
        "reasoning_tokens": 4,
        "cost": Decimal("0.1"),
        "cost_allocated": Decimal("0.1"),
        "currency": "USD",
        "cost_basis": "exact",
        **values,
    }


def ledger(*lines: Mapping[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([dict(found) for found in lines], schema=LEDGER_SCHEMA)


def test_lines_without_a_usage_are_counted_and_in_no_sum_of_tokens() -> None:
    classes = ("cache_hit_tokens", "cache_miss_tokens", "visible_output_tokens", "reasoning_tokens")
    unknown = line(**dict.fromkeys(classes), cost=None, currency=None, usage_status="missing")
    doubtful = line(cache_hit_tokens=None, cache_miss_tokens=5, usage_status="contradictory")
    groups = roll_up(ledger(line(usage_status="reported"), unknown, doubtful), ())
    sums = sum(groups.values(), GroupSums())
    assert (sums.num_attempts, sums.num_unknown_usage, sums.num_doubtful_usage, sums.num_unknown_hits) == (3, 1, 2, 2)
    assert (sums.prompt_tokens, sums.completion_tokens) == (8, 14)
    assert sums.hit_rate is None


def test_amounts_of_different_currencies_are_never_added() -> None:
    table = ledger(line(), line(currency="CNY", cost=Decimal(7)), line(cost=None, currency=None, cost_basis=None))
    groups = roll_up(table, ("tenant",))
    assert {key: sums.cost for key, sums in groups.items()} == {
        ("a", "USD"): Decimal("0.1"),
        ("a", "CNY"): Decimal(7),
        ("a", None): Decimal(0),
    }
    assert groups["a", None].num_unpriced == 1
    assert largest_groups(groups.items(), ("tenant",)).by_currency["USD"].cost == Decimal("0.1")


def test_a_line_belongs_to_the_utc_day_of_its_start_and_a_tag_to_its_value() -> None:
    table = ledger(line(tags=[("team", "x")]), line(started_at=START + timedelta(hours=1)))
    assert set(roll_up(table, ("day", "tags.team"))) == {("2026-11-23", "x", "USD"), ("2026-11-24", None, "USD")}
    assert {key[0] for key in roll_up(table, ("hour",))} == {"2026-11-23T23:00Z", "2026-11-24T00:00Z"}


def test_unknown_cached_tokens_leave_no_hit_rate() -> None:
    ((_, known),) = roll_up(ledger(line(), line()), ()).items()
    assert (known.hit_rate, known.prompt_tokens, known.completion_tokens) == (1 / 3, 6, 14)
    ((_, unknown),) = roll_up(ledger(line(), line(cache_hit_tokens=None)), ()).items()
    assert (unknown.hit_rate, unknown.num_unknown_hits) == (None, 1)


AMOUNTS = st.decimals(0, Decimal("1e12"), places=12)


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", None]), st.sampled_from(["USD", "CNY"]), AMOUNTS, st.integers(0, 9)),
        max_size=30,
    ),
    st.data(),
)
def test_sums_do_not_depend_on_how_the_ledger_is_cut(rows: list[tuple[Any, ...]], data: st.DataObject) -> None:
    table = ledger(
        *(
            line(tenant=tenant, currency=currency, cost=cost, cache_miss_tokens=misses)
            for tenant, currency, cost, misses in rows
        )
    )
    whole = roll_up(table, ("tenant",))
    cut = data.draw(st.integers(0, len(rows)))
    assert merge_groups([roll_up(table.slice(0, cut), ("tenant",)), roll_up(table.slice(cut), ("tenant",))]) == whole
    expected: dict[tuple[str | None, ...], Decimal] = {}
    for tenant, currency, cost, _ in rows:
        expected[tenant, currency] = expected.get((tenant, currency), Decimal(0)) + cost
    assert {key: sums.cost for key, sums in whole.items()} == expected


def test_groups_beyond_the_bound_are_added_up_and_counted() -> None:
    groups = {(f"t{number}", "USD"): GroupSums(num_attempts=1, cost=Decimal(number)) for number in range(5)}
    found = largest_groups(groups.items(), ("tenant",), max_groups=2)
    assert [key for key, _ in found.groups] == [("t4", "USD"), ("t3", "USD")]
    assert (found.num_others, found.others["USD"].cost, found.others["USD"].num_attempts) == (3, Decimal(3), 3)
    assert found.by_currency["USD"].cost == Decimal(10)


@pytest.mark.parametrize("max_groups", [2, 100])
def test_the_transform_gives_the_roll_up_of_all_shards(tmp_path: Path, max_groups: int) -> None:
    layout = RunLayout(str(tmp_path))
    tables = [
        ledger(*(line(tenant=f"t{place % 4}", cost=Decimal(place)) for place in range(start, start + 6)))
        for start in (0, 5, 9)
    ]
    commits: list[ShardCommit] = []
    for number, table in enumerate(tables):
        path = Path(layout.published_file("ledger", f"s{number}"))
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path)
        file = StagedFile("ledger", "x", table.num_rows, 1, hashlib.sha256(path.read_bytes()).hexdigest())
        commits.append(ShardCommit(f"s{number}", "run", "x", "x", (file,), Totals()))
    commits.append(ShardCommit("without", "run", "x", "x", (), Totals()))
    expected = largest_groups(roll_up(pa.concat_tables(tables), ("tenant",)).items(), ("tenant",), max_groups)

    def check(found: list[Rollup]) -> None:
        assert found == [expected]

    with beam.Pipeline("FnApiRunner") as pipeline:
        found: Any = pipeline | beam.Create(commits, reshuffle=False) | RollUpLedger(layout, ("tenant",), max_groups)
        assert_that(found, check)


def test_a_column_that_the_ledger_does_not_have_is_named() -> None:
    assert parse_by(" tenant,team,day,tenant", {"team"}) == ("tenant", "tags.team", "day")
    with pytest.raises(JobFileError, match=r"--by: expected columns of the ledger .*, found 'tennant'"):
        parse_by("tennant")


def test_a_ledger_of_an_older_version_is_read_with_nulls(tmp_path: Path) -> None:
    old = ledger(line()).drop_columns(["tags", "accelerator_s", "cache_hit_cost"])
    pq.write_table(old, tmp_path / "old.parquet")
    table = read_ledger(str(tmp_path / "old.parquet"), None)
    assert table.schema.equals(LEDGER_SCHEMA)
    assert roll_up(table, ("tags.team",))[None, "USD"].num_untimed == 1
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(CommitError, match=r"bad\.parquet: expected a file of the ledger"):
        read_ledger(str(tmp_path / "bad.parquet"), None)
