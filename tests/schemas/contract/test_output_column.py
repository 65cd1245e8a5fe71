import io
import json
from datetime import date
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.contract.output_column import TypedColumn, output_column
from moebeam.schemas.contract.output_type import OutputType, output_type


def typed(schema: Any) -> OutputType:
    found = output_type(schema)
    assert found is not None
    return found


def column(schema: Any, *values: Any) -> TypedColumn:
    return output_column(values, typed(schema))


def round_trip(array: "pa.Array[Any]") -> pa.Table:
    """The column after Parquet; pandas must be able to take it too."""
    sink = io.BytesIO()
    table = pa.table({"output": array})
    pq.write_table(table, sink)
    found = pq.read_table(io.BytesIO(sink.getvalue()))
    assert found.schema == table.schema
    assert len(found.to_pandas()) == len(array)
    return found


TICKET = {
    "type": "object",
    "properties": {
        "category": {"enum": ["bug", "question"]},
        "due": {"type": "string", "format": "date"},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
        "lines": {"type": "array", "items": {"type": "object", "properties": {"price": {"type": "number"}}}},
        "anything": True,
    },
}
ANSWER = {
    "category": "bug",
    "due": "2026-11-23",
    "counts": {"a": 1},
    "lines": [{"price": 1}, None],
    "anything": {"ü": [1, None]},
}


def test_column_holds_the_answers() -> None:
    found = column(TICKET, ANSWER, None, {})
    assert found.num_misfits == 0
    empty = dict.fromkeys(ANSWER)
    assert round_trip(found.array).column("output").to_pylist() == [
        {
            "category": "bug",
            "due": date(2026, 11, 23),
            "counts": [("a", 1)],
            "lines": [{"price": 1.0}, None],
            "anything": '{"ü":[1,null]}',
        },
        None,
        empty,
    ]


def test_duckdb_reads_the_fields_by_name() -> None:
    output = round_trip(column(TICKET, ANSWER, None).array)  # noqa: F841 (DuckDB finds it by its name)
    found = duckdb.sql(
        "select output.category, output.due + 1, output.counts['a'], output.lines[1].price, output.anything->>'$.ü[0]' "
        "from output"
    )
    assert found.fetchall() == [("bug", date(2026, 11, 24), 1, 1.0, "1"), (None, None, None, None, None)]


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer"}, 2**63),
        ({"type": "integer"}, -(2**63) - 1),
        ({"type": "integer"}, 1e300),
        ({"type": "number"}, 2**53 + 1),
        ({"type": "number"}, 10**400),
        ({"type": "string", "format": "date"}, "0000-01-01"),
        ({"items": {"type": "string"}}, "abc"),
        ({"properties": {"a": {"type": "integer"}}}, []),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, [["a", 1]]),
        ({"type": "number"}, True),
        ({"type": "number"}, 10**400),
        ({"type": "integer"}, False),
        ({"type": "boolean"}, 1),
        ({"type": "string"}, 1),
        ({"type": "string", "format": "date"}, 5),
        ({"type": "string", "format": "date"}, "20261123"),
        ({"type": "string", "format": "date"}, "2026-W48-1"),
    ],
)
def test_value_that_does_not_fit_is_null_and_counted(schema: Any, value: Any) -> None:
    found = column(schema, value, None)
    assert (found.array.to_pylist(), found.num_misfits) == ([None, None], 1)


def test_misfit_leaves_its_neighbours_alone() -> None:
    schema = {"properties": {"a": {"type": "integer"}, "b": {"items": {"type": "integer"}}}}
    found = column(schema, {"a": 2**64, "b": [1, 2**64, 3]}, {"a": 4})
    assert found.array.to_pylist() == [{"a": None, "b": [1, None, 3]}, {"a": 4, "b": None}]
    assert found.num_misfits == 2


def test_numbers_stay_exact() -> None:
    assert column({"type": "integer"}, 3.0, 2**63 - 1).array.to_pylist() == [3, 2**63 - 1]
    assert column({"type": "number"}, 2**60, 10**22, 1.5).array.to_pylist() == [2.0**60, 1e22, 1.5]


def test_undeclared_properties_are_no_misfits() -> None:
    found = column({"properties": {"a": {"type": "integer"}}}, {"a": 1, "b": 2})
    assert (found.array.to_pylist(), found.num_misfits) == ([{"a": 1}], 0)


def test_json_text_keeps_order_and_digits() -> None:
    schema = {"properties": {"big": {"type": "integer", "maximum": 2**70}, "any": {}}}
    found = column(schema, {"big": 2**69, "any": {"b": "x", "a": None}}, {"any": "x"}, {"any": None})
    assert found.array.to_pylist() == [
        {"big": str(2**69), "any": '{"b":"x","a":null}'},
        {"big": None, "any": '"x"'},
        {"big": None, "any": None},
    ]


@pytest.mark.parametrize(
    "schema",
    [
        TICKET,
        {"type": "string"},
        {"type": "array", "items": {"type": "array", "items": False}},
        {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": {"type": "null"}}},
        {"properties": {"a.b": {"type": "integer"}, 'c"d': {"type": "null"}, " ": {"properties": {"x": {}}}}},
    ],
)
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_empty_and_null_columns_round_trip(schema: Any, num_rows: int) -> None:
    array = column(schema, *[None] * num_rows).array
    assert array.null_count == num_rows
    output = round_trip(array)
    assert duckdb.sql("select count(*), count(output) from output").fetchall() == [(num_rows, 0)]
    assert output.num_rows == num_rows


# A schema, a strategy for its valid instances, and what the column then holds.
Case = tuple[Any, st.SearchStrategy[Any]]

names = st.text(alphabet="abcxyz_.ü ", min_size=1, max_size=4)
leaves: st.SearchStrategy[Case] = st.sampled_from(
    [
        ({"type": "string"}, st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
        ({"type": "string", "format": "date"}, st.dates().map(date.isoformat)),
        ({"type": "integer"}, st.integers() | st.sampled_from([2.0, -0.0, 2**63, 2**63 - 1])),
        ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False) | st.integers()),
        ({"type": "boolean"}, st.booleans()),
        ({"type": "null"}, st.none()),
        ({"enum": ["a", "b", None]}, st.sampled_from(["a", "b", None])),
        ({"enum": [1, "b", True]}, st.sampled_from([1, "b", True])),
        ({}, st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=2))),
    ]
)


def grow(cases: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    def nullable(case: Case) -> Case:
        return {"anyOf": [case[0], {"type": "null"}]}, case[1] | st.none()

    def list_of(case: Case) -> Case:
        return {"type": "array", "items": case[0]}, st.lists(case[1], max_size=3)

    def map_of(case: Case) -> Case:
        return {"type": "object", "additionalProperties": case[0]}, st.dictionaries(names, case[1], max_size=3)

    def make_struct(fields: dict[str, Case]) -> Case:
        schema = {"type": "object", "properties": {name: of for name, (of, _) in fields.items()}}
        return schema, st.fixed_dictionaries({}, optional={name: values for name, (_, values) in fields.items()})

    def union_of(pair: tuple[Case, Case]) -> Case:
        return {"anyOf": [pair[0][0], pair[1][0]]}, pair[0][1] | pair[1][1]

    return (
        cases.map(nullable)
        | cases.map(list_of)
        | cases.map(map_of)
        | st.dictionaries(names, cases, max_size=3).map(make_struct)
        | st.tuples(cases, cases).map(union_of)
    )


cases = st.recursive(leaves, grow, max_leaves=6)


def agrees(type: pa.DataType, found: Any, answer: Any) -> int:
    """The number of misfits; fails where the column says anything that the answer did not."""
    if found is None:
        return int(answer is not None)
    if pa.types.is_struct(type):
        assert isinstance(answer, dict)
        return sum(
            agrees(type.field(i).type, found[type.field(i).name], answer.get(type.field(i).name))
            for i in range(type.num_fields)
        )
    if pa.types.is_map(type):
        assert isinstance(answer, dict) and [name for name, _ in found] == list(answer)
        return sum(agrees(type.item_type, value, answer[name]) for name, value in found)
    if pa.types.is_list(type):
        assert isinstance(answer, list) and len(found) == len(answer)
        return sum(agrees(type.value_type, *pair) for pair in zip(found, answer, strict=True))
    if pa.types.is_date32(type):
        assert found.isoformat() == answer
    elif pa.types.is_string(type):
        assert found == answer or json.loads(found) == answer
    else:
        assert found == answer and isinstance(found, bool) == isinstance(answer, bool)
    return 0


@given(cases.flatmap(lambda case: st.tuples(st.just(case[0]), st.lists(case[1], max_size=4))))
def test_column_says_what_valid_answers_say(case: tuple[Any, list[Any]]) -> None:
    schema, answers = case
    contract = AnswerSchema.from_json(schema, formats="assert", source="drawn")
    answers = [contract.check(json.dumps(answer)) for answer in answers]
    type_ = output_type(schema)
    if type_ is None:
        return
    found = output_column([*answers, None], type_)
    array = round_trip(found.array).column("output").to_pylist()
    assert array.pop() is None
    assert sum(agrees(type_.arrow, *pair) for pair in zip(array, answers, strict=True)) == found.num_misfits


@given(
    cases,
    st.lists(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda inner: st.lists(inner) | st.dictionaries(names, inner),
        ),
        max_size=3,
    ),
)
def test_no_answer_at_all_breaks_the_column(case: Case, answers: list[Any]) -> None:
    type_ = output_type(case[0])
    if type_ is not None:
        assert len(output_column(answers, type_).array) == len(answers)
