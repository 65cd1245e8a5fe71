import json
import pickle
from typing import Any

import pyarrow as pa
import pydantic
import pytest
from apache_beam.internal.cloudpickle import cloudpickle

from moebeam.schemas.contract.output_type import MAX_DEPTH, MAX_FIELDS, OutputType, describe_output_type, output_type
from tests.support.paths import ROOT

STRING, INT, DOUBLE, BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
TICKET = json.loads((ROOT / "jobs" / "demo" / "ticket.schema.json").read_text())


def typed(schema: Any, formats: Any = "assert") -> OutputType:
    found = output_type(schema, formats)
    assert found is not None
    return found


def property_type(schema: Any, **definitions: Any) -> pa.DataType:
    """The type of a property with this schema, which may refer to `#/$defs`."""
    return typed({"type": "object", "properties": {"p": schema}, "$defs": definitions}).arrow.field("p").type


def stays_json_text(schema: Any, **definitions: Any) -> str:
    """The reason why a property with this schema has no type of its own."""
    found = typed({"type": "object", "properties": {"p": schema}, "$defs": definitions})
    assert found.arrow == pa.struct([("p", STRING)])
    [text] = found.json_texts
    assert text.pointer == "/p"
    return text.reason


def obj(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def test_the_demo_ticket_is_wholly_typed() -> None:
    found = typed(TICKET)
    assert found.json_text_at == ()
    assert describe_output_type(found) == (
        "struct<customer: struct<name: string, account_id: string, tier: string>, product: string, category: string, "
        "priority: string, refund_requested: boolean, amount: double, currency: string, due_date: date, "
        "regions: list<string>>"
    )


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string", "maxLength": 4}, STRING),
        ({"type": "string", "format": "date-time"}, STRING),
        ({"type": "string", "format": "date"}, pa.date32()),
        ({"type": ["null", "string"], "format": "date"}, pa.date32()),
        ({"type": "integer"}, INT),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, INT),
        ({"type": "integer", "exclusiveMaximum": 2**63}, INT),
        ({"type": "number"}, DOUBLE),
        ({"type": "boolean"}, BOOL),
        ({"enum": ["a", "b", None]}, STRING),
        ({"const": True}, BOOL),
        ({"enum": [1, 2]}, INT),
        ({"enum": [1, 2.5]}, DOUBLE),
        ({"type": "number", "enum": [1, 2]}, INT),
        ({"type": ["integer", "null"]}, INT),
        ({"type": ["integer", "number"]}, DOUBLE),
        ({"type": "string", "nullable": True}, STRING),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, INT),
        ({"anyOf": [{"type": "string", "format": "date"}, {"const": "unknown"}]}, STRING),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, DOUBLE),
        ({"type": "array", "items": {"type": "integer"}}, pa.list_(INT)),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "number"}], "items": False}, pa.list_(DOUBLE)),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "maxItems": 1}, pa.list_(INT)),
        ({"type": "array", "items": [{"type": "integer"}], "additionalItems": {"const": 1}}, pa.list_(INT)),
        ({"type": "object", "additionalProperties": {"type": "number"}}, pa.map_(STRING, DOUBLE)),
        ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, pa.map_(STRING, INT)),
        (obj(b={"type": "string"}, a={"type": "integer"}), pa.struct([("b", STRING), ("a", INT)])),
        ({"properties": {"a": {"type": "integer"}}}, pa.struct([("a", INT)])),
        ({"items": {"type": "integer"}}, pa.list_(INT)),
        ({"allOf": [{"type": "number"}, {"type": "integer"}]}, INT),
        ({"type": "string", "anyOf": [{"minLength": 3}, {"const": "x"}]}, STRING),
        ({"anyOf": [False, {"type": "integer"}]}, INT),
    ],
)
def test_schema_has_its_arrow_type(schema: Any, expected: pa.DataType) -> None:
    assert property_type(schema) == expected


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (True, "any value"),
        ({}, "any value"),
        ({"minLength": 3}, "any value"),
        (False, "nothing but null"),
        ({"type": "null"}, "nothing but null"),
        ({"type": ["string", "integer"]}, "values of several types"),
        ({"type": ["boolean", "integer"]}, "values of several types"),
        ({"enum": ["a", 1]}, "values of several types"),
        ({"enum": [["a"], {}]}, "an enum of lists or objects"),
        ({"anyOf": [{"type": "string"}, obj(a={"type": "string"})]}, "values of several types"),
        ({"anyOf": [{"type": "string"}, {}]}, "any value"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "types that contradict each other"),
        ({"type": "object"}, "an object without declared properties"),
        ({"type": "object", "additionalProperties": {}}, "an object without declared properties"),
        ({"type": "object", "additionalProperties": False}, "an object without declared properties"),
        (obj(Total={"type": "number"}, total={"type": "number"}), "names that differ only in case: Total, total"),
        (obj(STRASSE={"type": "number"}, straße={"type": "number"}), "names that differ only in case: STRASSE, straße"),
        (obj(**{"": {"type": "number"}}), "a property whose name is empty or holds a NUL"),
        (obj(**{"a\0b": {"type": "number"}}), "a property whose name is empty or holds a NUL"),
        ({"type": "integer", "maximum": 2**63}, "integers beyond 64 bits"),
        ({"type": "integer", "minimum": 2**70}, "integers beyond 64 bits"),
        ({"const": 2**63}, "integers beyond 64 bits"),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "a reference that is not followed"),
        ({"$ref": "#anchor"}, "a reference that is not followed"),
    ],
)
def test_what_has_no_type_stays_json_text_and_says_why(schema: Any, reason: str) -> None:
    assert reason in stays_json_text(schema)


@pytest.mark.parametrize("schema", [True, {}, {"type": "object"}, {"$ref": "#"}, {"type": ["string", "object"]}])
def test_answer_without_any_type_has_no_column(schema: Any) -> None:
    assert output_type(schema) is None


@pytest.mark.parametrize(
    ("schema", "expected"), [({"enum": ["a"]}, STRING), ({"items": {"type": "number"}}, pa.list_(DOUBLE))]
)
def test_root_need_not_be_an_object(schema: Any, expected: pa.DataType) -> None:
    assert typed(schema).arrow == expected


def test_dates_are_strings_where_formats_only_annotate() -> None:
    assert typed({"type": "string", "format": "date"}, "annotate").arrow == STRING


def test_alternatives_unite_their_properties() -> None:
    by_phone = obj(kind={"const": "phone"}, number={"type": "string"}, value={"type": "integer"})
    by_mail = obj(kind={"const": "mail"}, address={"type": "string"}, value={"type": "string"})
    found = typed({"oneOf": [by_phone, by_mail]})
    assert describe_output_type(found) == "struct<kind: string, number: string, value: json, address: string>"
    assert found.json_text_at == ("/value",)


def test_alternative_without_properties_keeps_those_of_the_object() -> None:
    schema = {**obj(a={"type": "integer"}), "anyOf": [{"required": ["a"]}, {"properties": {"b": {"type": "string"}}}]}
    assert typed(schema).arrow == pa.struct([("a", INT), ("b", STRING)])


@pytest.mark.parametrize(
    "conditional",
    [
        {"if": {"properties": {"a": {"const": 1}}}, "then": {"properties": {"b": {"type": "string"}}}},
        {"dependentSchemas": {"a": {"properties": {"b": {"type": "string"}}}}},
        {"allOf": [{"properties": {"b": {"type": "string"}}}]},
        {"$ref": "#/$defs/b"},
    ],
)
def test_properties_said_elsewhere_join_the_struct(conditional: Any) -> None:
    schema = {**obj(a={"type": "integer"}), **conditional, "$defs": {"b": {"properties": {"b": {"type": "string"}}}}}
    assert typed(schema).arrow == pa.struct([("a", INT), ("b", STRING)])


def test_words_beside_a_reference_say_nothing_up_to_draft_7() -> None:
    schema = {"$ref": "#/definitions/a", "type": "object", "definitions": {"a": {"type": "string"}}}
    assert typed({**schema, "$schema": "http://json-schema.org/draft-07/schema#"}).arrow == STRING
    assert output_type(schema) is None


def test_references_are_followed_by_pointer() -> None:
    assert property_type({"$ref": "#/$defs/a~1b%20c"}, **{"a/b c": {"type": "integer"}}) == INT
    assert property_type({"$ref": "#/$defs/list/prefixItems/1"}, list={"prefixItems": [True, {"const": 1}]}) == INT


def test_reference_in_an_embedded_document_is_read_from_there() -> None:
    inner = {"$id": "https://x.y/z", "$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}
    assert property_type(inner, a={"type": "string"}) == INT


def test_recursive_schema_is_typed_once_and_then_json_text() -> None:
    tree = obj(value={"type": "integer"}, children={"type": "array", "items": {"$ref": "#/$defs/tree"}})
    found = typed({"$ref": "#/$defs/tree", "$defs": {"tree": tree}})
    assert found.arrow == pa.struct([("value", INT), ("children", pa.list_(STRING))])
    assert [(text.pointer, text.reason) for text in found.json_texts] == [
        ("/children/*", "a schema that contains itself")
    ]


def test_schema_that_refers_to_itself_in_place_says_nothing_more() -> None:
    assert typed({**obj(a={"type": "integer"}), "allOf": [{"$ref": "#"}]}).arrow == pa.struct([("a", INT)])


def test_type_is_never_deeper_than_readers_bear() -> None:
    schema: Any = {"type": "integer"}
    for _ in range(60):
        schema = obj(a=schema)
    found = typed(schema)
    assert found.json_text_at == ("/a" * MAX_DEPTH,)


def test_schemas_that_refer_to_each_other_do_not_explode() -> None:
    names = [f"d{i}" for i in range(12)]
    definitions = {name: obj(**{other: {"$ref": f"#/$defs/{other}"} for other in names}) for name in names}
    found = typed({"$ref": "#/$defs/d0", "$defs": definitions})
    assert 0 < len(found.json_texts) <= MAX_FIELDS


def test_too_many_properties_have_no_column() -> None:
    assert output_type(obj(**{f"p{i}": {"type": "string"} for i in range(MAX_FIELDS + 1)})) is None


def test_pydantic_model_is_typed_through_its_definitions() -> None:
    class Line(pydantic.BaseModel):
        price: float
        note: str | None = None

    class Invoice(pydantic.BaseModel):
        lines: list[Line]
        labels: dict[str, int]
        extra: dict[str, Any]

    found = typed(Invoice.model_json_schema())
    assert describe_output_type(found) == (
        "struct<lines: list<struct<price: double, note: string>>, labels: map<string, int64>, extra: json>"
    )
    assert found.json_text_at == ("/extra",)


def test_pointers_are_escaped() -> None:
    assert typed(obj(**{"a/b~c": {"type": "array"}})).json_text_at == ("/a~1b~0c/*",)


def test_long_description_folds_the_inner_structs() -> None:
    inner = obj(**{f"a_long_name_{i}": {"type": "string"} for i in range(20)})
    found = typed(obj(one=inner, two=inner))
    assert describe_output_type(found, 80) == "struct<one: struct<20 fields>, two: struct<20 fields>>"
    assert describe_output_type(found, 30) == "struct<2 fields>"


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_type_pickles(dumps: Any) -> None:
    found = typed({**TICKET, "properties": {**TICKET["properties"], "more": {}}})
    assert pickle.loads(dumps(found)) == found
