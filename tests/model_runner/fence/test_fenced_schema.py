"""Schemas of rows behind the fence: what they take more than they may is an error of theirs alone."""

import json
import pickle
from typing import Any

import pytest

from moebeam.model_runner.fence.fenced_schema import FencedSchema, load_schema, vet_schema
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import EmptyAnswer, JobFileError, NotJson, SchemaViolation

PATTERN = {"properties": {"a": {"pattern": "^(?=x)x+$"}}}


def doubling_below(num_levels: int, depth: int) -> dict[str, Any]:
    """A schema that doubles where a count of the first levels does not see it."""
    definitions: dict[str, Any] = {
        f"d{level}": {"allOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(depth)
    }
    schema: dict[str, Any] = {"$ref": "#/$defs/d0", "unevaluatedProperties": False}
    for _ in range(num_levels):
        schema = {"properties": {"a": schema}}
    return {**schema, "$defs": definitions | {f"d{depth}": {}}}


def load(schema: Any, max_cpu_s: float = 5.0) -> AnswerSchema | FencedSchema:
    return load_schema(schema, formats="assert", source="the schema", max_cpu_s=max_cpu_s)


def test_a_schema_that_takes_too_long_to_compile_is_refused_and_the_next_one_is_not() -> None:
    with pytest.raises(JobFileError, match=r"the schema: expected at most 0\.2 s of processor time .*max_template_s"):
        load(doubling_below(10, 26), max_cpu_s=0.2)
    assert load(PATTERN).check('{"a": "x"}') == {"a": "x"}


def test_a_schema_that_takes_too_much_memory_is_refused() -> None:
    with pytest.raises(JobFileError, match="the schema: expected at most 256 MiB of memory"):
        load(doubling_below(10, 26), max_cpu_s=60.0)


def test_a_check_that_takes_too_long_is_a_violation_and_the_next_answer_is_checked() -> None:
    fenced = load({"items": {"pattern": "(?=.*x)(?=.*y)(a*a*a*a*)b"}}, max_cpu_s=0.2)
    with pytest.raises(SchemaViolation, match=r"expected at most 0\.2 s of processor time"):
        fenced.check(json.dumps(["a" * 3_000] * 2_000))
    assert fenced.check('["abxy"]') == ["abxy"]


def test_a_fenced_schema_checks_as_any_other_and_travels_to_workers() -> None:
    fenced = load(PATTERN)
    assert isinstance(fenced, FencedSchema)
    again: FencedSchema = pickle.loads(pickle.dumps(fenced))
    direct = AnswerSchema(PATTERN, formats="assert", source="the schema")
    for text in ('{"a": "y"}', '{"a": "x"}', "", "{", "[1]"):
        assert describe(again, text) == describe(direct, text)


def describe(schema: AnswerSchema | FencedSchema, text: str) -> object:
    try:
        return schema.check(text)
    except (EmptyAnswer, NotJson, SchemaViolation) as error:
        return type(error), str(error)


def test_what_is_no_schema_is_refused_from_behind_the_fence_too() -> None:
    with pytest.raises(JobFileError, match=r"not a JSON Schema: at /properties/a/pattern"):
        load({"properties": {"a": {"pattern": "("}}})


def test_plain_schemas_are_compiled_here_and_need_no_vetting() -> None:
    plain = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert isinstance(load(plain), AnswerSchema)
    assert vet_schema(plain, "assert", "the schema") is None
