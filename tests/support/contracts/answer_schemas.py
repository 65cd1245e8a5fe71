"""Schemas of answers, their refusals and violations, as tests look at them."""

import json
from typing import Any

import pytest

from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import JobFileError, SchemaViolation


def schema_of(document: Any, formats: Any = "assert") -> AnswerSchema:
    return AnswerSchema.from_json(document, formats=formats, source="ticket.json")


def refusal(document: Any) -> str:
    with pytest.raises(JobFileError) as caught:
        schema_of(document)
    return str(caught.value)


def violation(schema: AnswerSchema, answer: Any) -> str:
    with pytest.raises(SchemaViolation) as caught:
        schema.check(json.dumps(answer))
    return str(caught.value)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth
