"""Schemas that rows bring: compiled in this process if they are plain, else compiled and checked behind the fence.

Two thousand bytes of a JSON Schema can ask for gigabytes, a short regular expression for hours. A list of what a schema
must not do is never complete, so `is_plain` is a list of what it may: whatever is not on it runs in a process with
limits. Such an answer costs 0.1 ms more to check; all others cost nothing.
"""

import json
import pickle
from dataclasses import dataclass
from typing import TypeAlias

from moebeam.model_runner.fence.fence import Program
from moebeam.model_runner.fence.limits import MAX_CPU_S
from moebeam.model_runner.fence.schema_program import CHECK_ENTRY
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import AnswerSchema, Formats, parse_answer
from moebeam.schemas.contract.plain_schemas import is_plain
from moebeam.schemas.errors import JobFileError, RowError, SchemaViolation, TemplateBudgetExceeded

MAX_SCHEMA_MEMORY_BYTES = 256 << 20
"""Of address space, beyond what the process has; 2 MB of JSON Schema take some 150 MB."""


@dataclass(frozen=True, slots=True)
class FencedSchema:
    """A schema that is never compiled in this process; stands where an `AnswerSchema` stands."""

    document: Json
    formats: Formats
    source: str
    program: Program

    def check(self, text: str) -> Json:
        """As `AnswerSchema.check`.

        Raises:
            RowError: also a `SchemaViolation` where the check takes more than it may.
        """
        stripped, value = parse_answer(text)
        self._run(stripped)
        return value

    def compile(self) -> None:
        """Compile the schema behind the fence, to know that it can be.

        Raises:
            JobFileError: it is no schema, or takes too much.
        """
        try:
            self._run(None)
        except RowError as error:
            raise JobFileError(str(error)) from error

    def _run(self, item: str | None) -> None:
        (found,) = self.program.run([item])
        if isinstance(found, TemplateBudgetExceeded):
            raise SchemaViolation(str(found)) from found
        if isinstance(found, RowError):
            raise found


RowSchema: TypeAlias = AnswerSchema | FencedSchema


def load_schema(document: Json, *, formats: Formats, source: str, max_cpu_s: float = MAX_CPU_S) -> RowSchema:
    """The schema of a row; see `AnswerSchema.from_json`.

    Args:
        max_cpu_s: processor time for compiling it, and for each check.
    Raises:
        JobFileError: it is no schema, or takes too much.
    """
    fenced = vet_schema(document, formats, source, max_cpu_s)
    return fenced or AnswerSchema.from_json(document, formats=formats, source=source)


def vet_schema(document: Json, formats: Formats, source: str, max_cpu_s: float = MAX_CPU_S) -> "FencedSchema | None":
    """Compile a schema behind the fence, so that whoever compiles it in this process knows what it takes.

    Returns:
        None for a plain schema, and for a value that is not even JSON, which is refused before it is compiled.
    Raises:
        JobFileError: it is no schema, or takes too much.
    """
    try:
        if is_plain(document):
            return None
        text = json.dumps(document, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    compiled = pickle.dumps((text, formats, source))
    program = Program(CHECK_ENTRY, compiled, source, max_cpu_s, "max_template_s", MAX_SCHEMA_MEMORY_BYTES)
    fenced = FencedSchema(document, formats, source, program)
    fenced.compile()
    return fenced
