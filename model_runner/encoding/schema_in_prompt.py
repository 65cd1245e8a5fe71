"""The form of an answer, asked for in words: for models that no grammar holds to it.

DeepSeek's JSON mode wants the word JSON and an example in the prompt (its API guide); remote engines get the schema so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import cast

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import JobFileError, RowError
from moebeam.schemas.records import Message

_MAX_DEPTH = 8
_TEXTS = {
    "date-time": "2026-01-31T12:00:00Z",
    "date": "2026-01-31",
    "time": "12:00:00Z",
    "email": "name@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def with_schema_in_prompt(messages: Sequence[Message], schema: Json) -> tuple[Message, ...]:
    """The messages with the schema, the word JSON and a small example behind the first system text.

    A system message is put first where there is none. The example is left out where none was found that keeps the
    schema.
    """
    text = _instruction(json.dumps(schema, ensure_ascii=False))
    for position, message in enumerate(messages):
        if message.role == "system":
            content = f"{message.content}\n\n{text}" if message.content else text
            return (*messages[:position], replace(message, content=content), *messages[position + 1 :])
    return (Message("system", text), *messages)


@lru_cache(maxsize=256)
def _instruction(schema_text: str) -> str:
    schema = cast("Json", json.loads(schema_text))
    text = f"Answer with one JSON value and nothing else. It must keep this JSON Schema:\n{schema_text}"
    example = example_of(schema)
    if example is None:
        return text
    return f"{text}\n\nAn example of such JSON, whose values are made up:\n{json.dumps(example, ensure_ascii=False)}"


def example_of(schema: Json) -> Json:
    """A small value that keeps a schema; None where none was found, or where only null keeps it."""
    value = _Example(schema).of(schema, 0)
    try:
        AnswerSchema.from_json(schema, formats="annotate", source="example").check(json.dumps(value))
    except (RowError, JobFileError):
        return None
    return value


class _Example:
    """Builds a value by the keywords that say what it must be; the caller checks whether it holds."""

    def __init__(self, root: Json) -> None:
        self._root = root

    def of(self, schema: Json, depth: int) -> Json:
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return None
        for keyword in ("const", "default"):
            if keyword in schema:
                return schema[keyword]
        for keyword in ("examples", "enum"):
            if values := _items(schema.get(keyword)):
                return values[0]
        if isinstance(reference := schema.get("$ref"), str):
            return self.of(self._target(reference), depth + 1)
        if parts := _items(schema.get("allOf")):
            rest = {key: value for key, value in schema.items() if key != "allOf"}
            return self.of(_merged([rest, *(self._resolved(part) for part in parts)]), depth + 1)
        for keyword in ("anyOf", "oneOf"):
            if branches := _items(schema.get(keyword)):
                rest = {key: value for key, value in schema.items() if key != keyword}
                return self.of(_merged([rest, self._resolved(branches[0])]), depth + 1)
        return self._of_type(schema, depth)

    def _of_type(self, schema: Mapping[str, Json], depth: int) -> Json:
        kind = schema.get("type")
        if isinstance(kind, Sequence) and not isinstance(kind, str):
            kind = next((name for name in kind if name != "null"), "null")
        if kind is None:
            kind = "object" if "properties" in schema else "array" if "items" in schema else "string"
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                num_items = max(1, _number(schema.get("minItems"), 1))
                if schema.get("maxItems") == 0:
                    return []
                return [self.of(schema.get("items", {"type": "string"}), depth + 1)] * int(num_items)
            case "string":
                return self._string(schema)
            case "integer" | "number":
                return _within(schema, is_integer=kind == "integer")
            case "boolean":
                return True
            case _:
                return None

    def _object(self, schema: Mapping[str, Json], depth: int) -> Json:
        properties = schema.get("properties")
        known = properties if isinstance(properties, Mapping) else {}
        wanted = [*known, *(name for name in _items(schema.get("required")) if name not in known)]
        return {str(name): self.of(known.get(str(name), {"type": "string"}), depth + 1) for name in wanted}

    def _string(self, schema: Mapping[str, Json]) -> str:
        text = _TEXTS.get(str(schema.get("format")), "text")
        shortest, longest = int(_number(schema.get("minLength"), 0)), int(_number(schema.get("maxLength"), 1000))
        return (text + "x" * (shortest - len(text)))[:longest]

    def _resolved(self, schema: Json) -> Json:
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        return self._target(reference) if isinstance(reference, str) else schema

    def _target(self, reference: str) -> Json:
        """What a reference within the document means; nothing is fetched."""
        value = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if reference.startswith("#") else None


def _items(value: Json) -> Sequence[Json]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else []


def _number(value: Json, otherwise: int) -> int | float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _within(schema: Mapping[str, Json], *, is_integer: bool) -> int | float:
    low = _number(schema.get("minimum"), 0)
    if "exclusiveMinimum" in schema:
        low = max(low, _number(schema.get("exclusiveMinimum"), 0) + 1)
    high = _number(schema.get("maximum"), 1_000_000_000)
    value = low if low > 1 or high < 1 else 1
    value = min(value, high)
    return int(value) if is_integer else value


def _merged(schemas: Sequence[Json]) -> dict[str, Json]:
    """One schema for several that hold at once: properties and required names joined, of all else the first."""
    merged: dict[str, Json] = {}
    for schema in schemas:
        for key, value in schema.items() if isinstance(schema, Mapping) else ():
            before = merged.get(key)
            if key == "properties" and isinstance(before, Mapping) and isinstance(value, Mapping):
                merged[key] = {**before, **value}
            elif key == "required" and before is not None:
                merged[key] = [*_items(before), *_items(value)]
            else:
                merged.setdefault(key, value)
    return merged
