"""Schemas of answers: what they accept, how a violation is told, and models of pydantic in their place."""

import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pydantic
import pytest
from apache_beam.internal.cloudpickle import cloudpickle
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.contract.strict_json import MAX_DEPTH
from moebeam.schemas.contract.wording import MAX_EXCERPT
from moebeam.schemas.errors import EmptyAnswer, JobFileError, ModelRejected, NotJson, SchemaViolation
from tests.support.contracts.answer_schemas import nested, schema_of, violation

TICKET = {
    "type": "object",
    "properties": {
        "label": {"enum": ["bug", "question"]},
        "score": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 2}},
        "due": {"type": "string", "format": "date"},
    },
    "required": ["label"],
    "additionalProperties": False,
}


class Line(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    price: Decimal
    amount: int = pydantic.Field(ge=0)
    note: str | None = None


class Invoice(pydantic.BaseModel):
    lines: list[Line]
    total: int

    @pydantic.model_validator(mode="after")
    def check_total(self) -> "Invoice":
        if self.total == 666:
            raise KeyError("a fault of the user's own code")
        if self.total != sum(line.amount for line in self.lines):
            raise ValueError("total is not the sum of the amounts")
        return self


class Unspeakable(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    stream: Path.__class__


def test_check_returns_the_value_that_the_answer_spells() -> None:
    text = ' \n{"label": "bug", "score": 3, "tags": ["ab"], "due": "2026-11-01"}\t'
    assert schema_of(TICKET).check(text) == {"label": "bug", "score": 3, "tags": ["ab"], "due": "2026-11-01"}


def test_integers_beyond_64_bits_stay_exact() -> None:
    big = 2**200 + 1
    assert schema_of({"type": "integer", "minimum": big}).check(str(big)) == big
    assert "minimum" in violation(schema_of({"minimum": big}), big - 1)


def test_last_of_duplicate_keys_counts() -> None:
    assert schema_of(TICKET).check('{"label": "nonsense", "label": "bug"}') == {"label": "bug"}


@pytest.mark.parametrize("text", ["", " ", "\n\t \r\n", "\u3000"])
def test_blank_answer_is_empty_not_malformed(text: str) -> None:
    with pytest.raises(EmptyAnswer):
        schema_of(True).check(text)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 500, 100_000])
@pytest.mark.parametrize("form", ["{}", '{{"a": {}}}', '{{"b": 1, "a": [{}, 2]}}'])
def test_too_deeply_nested_answer_is_a_row_error_however_deep(depth: int, form: str) -> None:
    text = form.format(nested(depth))
    with pytest.raises(NotJson, match=f"deeper than {MAX_DEPTH}"):
        schema_of({"items": {"$ref": "#"}}).check(text)


@pytest.mark.parametrize("document", [True, {"items": {"$ref": "#"}, "uniqueItems": True}, {"not": {"const": [1]}}])
def test_answer_of_the_allowed_depth_passes(document: Any) -> None:
    assert schema_of(document).check(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))


def test_violation_of_the_allowed_depth_can_be_described() -> None:
    document = {"items": {"$ref": "#"}, "maxItems": 1, "not": {"type": "string"}}
    text = nested(MAX_DEPTH).replace("[]", '["x"]')
    with pytest.raises(SchemaViolation, match="not"):
        schema_of(document).check(text)


def test_wide_answer_is_not_taken_for_a_deep_one() -> None:
    assert schema_of(True).check(json.dumps([[]] * (2 * MAX_DEPTH)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"label": "spam"}, 'at /label: enum: expected ["bug", "question"], found "spam"'),
        ({"label": "bug", "score": -1}, "at /score: minimum: expected 0, found -1"),
        ({"label": "bug", "score": "5"}, 'at /score: type: expected integer, found "5"'),
        ({"label": "bug", "tags": ["ab", "c"]}, 'at /tags/1: minLength: expected 2, found "c"'),
        ({"label": "bug", "due": "soon"}, 'at /due: format: expected "date", found "soon"'),
        ({"score": 1}, 'at the root: required: expected a property "label", found {"score": 1}'),
        (
            {"label": "bug", "x/~": 1},
            'at the root: additionalProperties: expected no properties beyond those of the schema, found ["x/~"]',
        ),
        ([1], "at the root: type: expected object, found [1]"),
    ],
)
def test_violation_names_pointer_keyword_expected_and_found(answer: Any, message: str) -> None:
    assert violation(schema_of(TICKET), answer) == message


@pytest.mark.parametrize(
    ("document", "answer", "message"),
    [
        ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, 2, "one of: type: expected string; minimum: expected 3"),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, 2, "oneOf: expected one of: type: expected string"),
        ({"oneOf": [True, True]}, 2, "oneOf: expected exactly one alternative to match, not several, found 2"),
        ({"properties": {"a": False}}, {"a": 1}, "at /a: falseSchema: expected nothing here, found 1"),
        ({"uniqueItems": True}, [1, 1], "uniqueItems: expected items that differ, found [1, 1]"),
        ({"contains": {"const": 1}}, [2], "contains: expected an item that matches, found [2]"),
        ({"not": {"type": "string"}}, "x", 'not: expected anything but {"type": "string"}, found "x"'),
        ({"propertyNames": {"maxLength": 1}}, {"ab": 1}, "propertyNames: expected names that keep maxLength"),
        ({"properties": {"a": {}}, "unevaluatedProperties": False}, {"b": 1}, 'schema, found ["b"]'),
        ({"const": {"a": 1}}, 0, 'const: expected {"a": 1}, found 0'),
        ({"properties": {"x/~y": {"type": "null"}}}, {"x/~y": 0}, "at /x~1~0y: type"),
    ],
)
def test_every_kind_of_violation_is_put_in_words(document: Any, answer: Any, message: str) -> None:
    assert message in violation(schema_of(document), answer)


def test_violation_counts_what_else_is_wrong() -> None:
    assert violation(schema_of({"items": {"type": "null"}}), [1, 2]).endswith("(and 1 more violation)")
    assert violation(schema_of({"items": {"type": "null"}}), [1] * 5).endswith("(and 4 more violations)")
    assert violation(schema_of({"items": {"type": "null"}}), [1] * 5000).endswith("(and at least 20 more violations)")


def test_violation_never_quotes_the_whole_document() -> None:
    document = {"properties": {"k" * 5000: {"enum": ["e" * 5000]}}, "maxProperties": 0}
    answer = {"k" * 5000: "v" * 5000}
    for message in (violation(schema_of(document), answer), violation(schema_of({"maxProperties": 0}), answer)):
        assert len(message) < 4 * MAX_EXCERPT


def test_formats_are_asserted_or_only_annotate() -> None:
    document = {"format": "date-time"}
    assert schema_of(document, "annotate").check('"yesterday"') == "yesterday"
    assert "format" in violation(schema_of(document, "assert"), "yesterday")


@pytest.mark.parametrize(
    ("declared", "document", "accepted", "refused"),
    [
        ("http://json-schema.org/draft-04/schema#", {"maximum": 3, "exclusiveMaximum": True}, 2, 3),
        ("http://json-schema.org/draft-06/schema#", {"exclusiveMaximum": 3}, 2, 3),
        ("http://json-schema.org/draft-07/schema#", {"if": {"const": 3}, "then": False}, 2, 3),
        ("http://json-schema.org/draft-07/schema", {"items": [{"const": 1}]}, [1], [2]),
        ("https://json-schema.org/draft/2019-09/schema", {"items": [{"const": 1}]}, [1], [2]),
        ("https://json-schema.org/draft/2020-12/schema", {"prefixItems": [{"const": 1}]}, [1], [2]),
        (None, {"prefixItems": [{"const": 1}]}, [1], [2]),
    ],
)
def test_schema_keyword_selects_the_draft(declared: str | None, document: Any, accepted: Any, refused: Any) -> None:
    schema = schema_of(document if declared is None else {"$schema": declared, **document})
    assert schema.check(json.dumps(accepted)) == accepted
    violation(schema, refused)


def test_property_named_schema_is_no_draft() -> None:
    document = {"properties": {"$schema": {"const": "mine"}}, "examples": [{"$id": "x", "$schema": "mine"}]}
    assert schema_of(document).check('{"$schema": "mine"}')


def test_changing_the_document_afterwards_does_not_change_the_contract() -> None:
    document = {"enum": ["a"]}
    schema = schema_of(document)
    document["enum"].append("b")
    assert schema.document == {"enum": ["a"]}
    violation(pickle.loads(pickle.dumps(schema)), "b")


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_pickled_schema_still_checks(dumps: Any) -> None:
    for formats, is_format_asserted in (("assert", True), ("annotate", False)):
        schema = pickle.loads(dumps(schema_of(TICKET, formats)))
        assert (schema.source, schema.formats, schema.document) == ("ticket.json", formats, TICKET)
        violation(schema, {"label": "spam"})
        if is_format_asserted:
            violation(schema, {"label": "bug", "due": "x"})
        else:
            assert schema.check('{"label": "bug", "due": "x"}')
    invoice = pickle.loads(dumps(AnswerSchema.load(f"{__name__}:Invoice")))
    with pytest.raises(ModelRejected):
        invoice.check('{"lines": [], "total": 3}')


def test_load_reads_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "ticket.schema.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TICKET).encode())
    schema = AnswerSchema.load(str(path), "annotate")
    assert (schema.document, schema.source, schema.model) == (TICKET, str(path), None)
    assert AnswerSchema.load(f"file://{path}").check('{"label": "bug"}')


def test_pydantic_model_is_schema_and_validator_at_once() -> None:
    schema = AnswerSchema.load(f"{__name__}:Invoice")
    assert schema.model is Invoice
    assert schema.document == Invoice.model_json_schema()
    good = {"lines": [{"price": "1.50", "amount": 2}, {"price": 3, "amount": 1, "note": None}], "total": 3}
    assert schema.check(json.dumps(good)) == good
    assert "at /lines/0/amount" in violation(schema, {"lines": [{"price": 1, "amount": -2}], "total": -2})
    with pytest.raises(ModelRejected) as caught:
        schema.check(json.dumps({**good, "total": 4}))
    assert str(caught.value).startswith(
        "at the root: Invoice expected: Value error, total is not the sum of the amounts, found {"
    )
    with pytest.raises(ModelRejected) as caught:
        schema.check('{"lines": [], "total": 666}')
    assert str(caught.value).startswith('Invoice raised KeyError: "a fault of the user\'s own code"; found {')


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Missing", "has no 'Missing'"),
        ("TICKET", "expected a pydantic BaseModel class, found"),
        ("schema_of", "expected a pydantic BaseModel class, found"),
        ("Unspeakable", "expected a model with a JSON Schema, found PydanticInvalidForJsonSchema"),
    ],
)
def test_what_is_no_pydantic_model_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(JobFileError) as caught:
        AnswerSchema.load(f"{__name__}:{name}")
    assert str(caught.value).startswith(f"{__name__}:{name}: ")
    assert message in str(caught.value)


def test_equal_documents_are_compiled_once() -> None:
    document = {"properties": {"a": {"const": "tool argument"}}}
    first = schema_of(document)
    assert schema_of(json.loads(json.dumps(document))) is first
    assert schema_of(document, "annotate") is not first
    assert pickle.loads(pickle.dumps(first)) is first
    document["properties"]["a"]["const"] = "another"
    assert schema_of(document).check('{"a": "another"}')
    assert schema_of({"const": 1}) is not schema_of({"const": 1.0})


class Unprintable(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class UnprintableLookup(LookupError):
    __str__ = Unprintable.__str__


class Loud(pydantic.BaseModel):
    text: str

    @pydantic.field_validator("text")
    @classmethod
    def check_text(cls, text: str) -> str:
        if text == "key":
            raise KeyError("k" * 5000)
        if text == "unprintable":
            raise Unprintable
        if text == "lookup":
            raise UnprintableLookup
        raise ValueError(text)


@pytest.mark.parametrize("text", ["key", "unprintable", "lookup", "v" * 5000])
def test_whatever_the_users_code_raises_is_told_in_a_few_words(text: str) -> None:
    answer = json.dumps({"text": text, **{f"more{i}": i for i in range(1000)}})
    with pytest.raises(ModelRejected) as caught:
        AnswerSchema.load(f"{__name__}:Loud").check(answer)
    assert len(str(caught.value)) < 6 * MAX_EXCERPT


@pytest.mark.parametrize("source", ["raise RuntimeError('at import')", "import no_such_module_here", "def"])
def test_module_that_cannot_be_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "users_models.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(JobFileError, match="users_models:Ticket: module 'users_models' cannot be imported"):
        AnswerSchema.load("users_models:Ticket")


@settings(deadline=None)
@given(st.text() | st.text(alphabet='{}[]":,0123456789.eE+-truefalsnN\\u dD8Infity'))
def test_any_text_gives_a_value_or_a_row_error(text: str) -> None:
    schema = schema_of({"type": "object"})
    try:
        value = schema.check(text)
    except (EmptyAnswer, NotJson, SchemaViolation) as error:
        assert len(str(error)) < 500
    else:
        assert isinstance(value, dict)
