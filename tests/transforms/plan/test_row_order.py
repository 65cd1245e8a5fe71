"""Places of rows: the order of sorted tables, of samples, and of what travels between workers is one order."""

from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from moebeam.transforms.plan.row_order import RUN_ORDER, Places, RowKey, sort_rows

TEXTS = st.text(alphabet='a\x00é\U0001f600"', max_size=2)
ROWS = st.lists(
    st.tuples(
        st.binary(max_size=3), TEXTS, st.none() | TEXTS, TEXTS, st.integers(0, 2), st.integers(0, 3), st.integers(0, 2)
    ),
    min_size=1,
    max_size=12,
)
TYPES = (pa.large_binary(), pa.string(), pa.string(), pa.string(), pa.int32(), pa.int64(), pa.int32())


def table_of(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(
        {name: pa.array(values, kind) for name, values, kind in zip(RUN_ORDER, columns, TYPES, strict=True)}
    )


@given(ROWS)
def test_places_stand_in_the_order_of_sorted_tables(rows: list[tuple[Any, ...]]) -> None:
    places = Places(sort_rows(table_of(rows)))
    found = [places[row] for row in range(len(places))]
    assert found == sorted(found)


@given(ROWS)
def test_places_come_back_from_their_texts(rows: list[tuple[Any, ...]]) -> None:
    places = Places(table_of(rows))
    for place in (places[row] for row in range(len(places))):
        for part in (place, RowKey(place.key), RowKey(place.key, place.request)):
            assert RowKey.from_text(part.text) == part
    assert RowKey.from_text("") == RowKey() <= places[0]


@given(ROWS, st.data())
def test_a_place_with_parts_left_out_stands_before_all_that_agree_with_it(
    rows: list[tuple[Any, ...]], data: st.DataObject
) -> None:
    places = Places(sort_rows(table_of(rows)))
    picked = places[data.draw(st.integers(0, len(rows) - 1))]
    all_places = [places[row] for row in range(len(rows))]
    assert places.first_from(picked) == all_places.index(picked)
    assert places.first_from(RowKey(picked.key)) == [p.key for p in all_places].index(picked.key)
    requests = [(p.key, p.request) for p in all_places]
    assert places.first_from(RowKey(picked.key, picked.request)) == requests.index((picked.key, picked.request))


@given(ROWS, st.integers(2, 4))
def test_no_place_is_between_two_samples_of_a_row(rows: list[tuple[Any, ...]], num_samples: int) -> None:
    rows_once = {row[:6] for row in rows}
    table = sort_rows(table_of([(*row, sample) for sample in reversed(range(num_samples)) for row in rows_once]))
    places = Places(table)
    assert table.column("sample").to_pylist() == [*range(num_samples)] * len(rows_once)
    firsts = [places.first_from(places[row]) for row in range(len(places))]
    assert firsts == [row - row % num_samples for row in range(len(places))]
