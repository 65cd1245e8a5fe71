"""The part of `fenced_schema.py` that runs behind the fence: compiles a row's schema and checks texts against it."""

import json
from collections.abc import Callable
from typing import TypeAlias

from moebeam.schemas.contract.answer_schema import AnswerSchema, Formats

CHECK_ENTRY = "moebeam.model_runner.fence.schema_program:compile_check"

Source: TypeAlias = "tuple[str, Formats, str]"
"""The schema as JSON text, whether formats are asserted, and the name of the schema in messages."""


def compile_check(source: Source) -> Callable[[str | None], str]:
    """What checks an answer, and returns an empty text for one that keeps the schema; None stands for no answer.

    Raises:
        JobFileError: this is no schema.
    """
    text, formats, name = source
    schema = AnswerSchema(json.loads(text), formats=formats, source=name)

    def check(answer: str | None) -> str:
        if answer is not None:
            schema.check(answer)
        return ""

    return check
