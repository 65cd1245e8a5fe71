"""Documents that are no schema of answers: refused by place, with what was expected and found."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.contract.wording import MAX_EXCERPT
from moebeam.schemas.errors import JobFileError
from tests.support.contracts.answer_schemas import nested, refusal, schema_of, violation


@pytest.mark.parametrize(
    "declared", ["https://example.com/mine", "http://json-schema.org/draft-03/schema#", "", "draft-07"]
)
def test_unknown_draft_is_refused_by_name(declared: str) -> None:
    message = refusal({"$schema": declared})
    assert message.startswith("ticket.json: at /$schema: expected draft 4, 6, 7, 2019-09 or 2020-12")
    assert message.endswith(f'found "{declared}"')


def test_unknown_draft_of_an_embedded_document_is_refused_at_its_place() -> None:
    message = refusal({"$defs": {"a": {"$id": "x:y", "$schema": "https://example.com/mine"}}, "$ref": "#/$defs/a"})
    assert "at /$defs/a/$schema" in message


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"properties": {"a": {"type": "objct"}}}, 'at /properties/a/type: anyOf: expected one of: enum: expected ["'),
        ({"properties": {"a": {"minLength": -1}}}, "at /properties/a/minLength: minimum: expected 0, found -1"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "required": []}, "at /required: minItems: expected 1"),
        ({"pattern": "("}, 'at /pattern: format: expected "regex", found "("'),
        ({"$ref": "#/foo", "foo": 5}, "at /foo: type: expected boolean or object, found 5"),
        ([1], "at the root: expected a JSON Schema (an object or a boolean), found [1]"),
        (None, "at the root: expected a JSON Schema (an object or a boolean), found null"),
        ({"const": math.nan}, "expected a JSON Schema, found a value that is not JSON"),
        ({"const": {1, 2}}, "expected a JSON Schema, found a value that is not JSON"),
        ({"const": "\ud800"}, "expected Unicode text"),
    ],
)
def test_what_is_no_schema_is_refused_with_pointer_expected_and_found(document: Any, message: str) -> None:
    found = refusal(document)
    assert found.startswith("ticket.json: ")
    assert message in found


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"properties": {"b": {"$ref": "#/$defs/x"}, "a/b": {"$ref": "#/definitions/x"}}, "$defs": {"x": True}},
            'at /properties/a~1b/$ref: expected a reference to something in the document, found "#/definitions/x"',
        ),
        ({"allOf": [{"$ref": "#nowhere"}]}, "at /allOf/0/$ref: expected a reference to something in the document"),
        ({"items": {"$ref": "https://example.com/x.json#/a"}}, "at /items/$ref: expected a reference inside the docu"),
        ({"items": {"$ref": "other.json"}}, "at /items/$ref: expected a reference inside the document"),
        ({"$id": "http://a.b/c", "items": {"$ref": "d.json"}}, "at /items/$ref: expected a reference inside the"),
        ({"items": {"$ref": "file:///etc/hostname"}}, "at /items/$ref: expected a reference inside the document"),
        ({"$defs": {"unused": {"$ref": "http://localhost:9/x"}}}, "at /$defs/unused/$ref: expected a reference ins"),
    ],
)
def test_reference_out_of_the_document_or_to_nothing_is_refused_at_its_place(document: Any, message: str) -> None:
    found = refusal(document)
    assert found.startswith("ticket.json: ")
    assert message in found


def test_meta_schema_can_be_referred_to_without_fetching() -> None:
    schema = schema_of({"$ref": "https://json-schema.org/draft/2020-12/schema"})
    assert schema.check('{"type": "object"}')
    violation(schema, {"type": 5})


def test_retriever_supplies_other_documents_when_one_is_given() -> None:
    schema = AnswerSchema.from_json(
        {"$ref": "http://localhost/x"}, formats="assert", source="s", retriever=retrieve_null
    )
    assert schema.check("null") is None
    assert pickle.loads(pickle.dumps(schema)).check("null") is None
    violation(schema, 1)


def retrieve_null(uri: str) -> Any:
    return {"type": "null"}


@pytest.mark.parametrize(
    "document",
    [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#"}]}}}],
)
def test_schema_that_only_refers_to_itself_ends(document: Any) -> None:
    assert schema_of(document).check("1") == 1


@pytest.mark.parametrize("depth", [70, 150, 900, 5000])
def test_too_deeply_nested_schema_is_a_job_file_error(depth: int) -> None:
    document: Any = True
    for _ in range(depth):
        document = {"properties": {"a": document}}
    assert "ticket.json" in refusal(document)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "text that is not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
        (b"", "text that is not JSON"),
        (b'{"const": NaN}', "NaN is not JSON"),
        (b'{"const": "\xff"}', "expected JSON in UTF-8, found other bytes at byte 11"),
        (b'{"type": "string", "type": "null"}', "expected every key once in an object, found 'type' twice"),
        (b'{"type": 5}', "at /type: "),
        (b'"text"', "expected a JSON Schema (an object or a boolean)"),
        (nested(100_000).encode(), "nested deeper"),
    ],
)
def test_file_that_is_no_schema_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(JobFileError) as caught:
        AnswerSchema.load(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", ".", "unheard-of://x/y.json"])
def test_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = name if "://" in name else str(tmp_path / name)
    with pytest.raises(JobFileError) as caught:
        AnswerSchema.load(path)
    assert path in str(caught.value)


def test_no_refusal_of_a_schema_quotes_it_whole(tmp_path: Path) -> None:
    name = "n" * 5000
    (tmp_path / "twice.json").write_text(f'{{"{name}": 1, "{name}": 2}}')
    with pytest.raises(JobFileError) as caught:
        AnswerSchema.load(str(tmp_path / "twice.json"))
    assert len(str(caught.value)) < 6 * MAX_EXCERPT
    for document in ({name: {"const": math.nan}}, {"properties": {name: 5}}, {"$ref": f"#/{name}"}, [name]):
        assert len(refusal(document)) < 6 * MAX_EXCERPT
