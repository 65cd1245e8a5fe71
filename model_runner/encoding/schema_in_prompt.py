"""Asks for an answer's schema in the prompt, for engines that cannot enforce a grammar.

DeepSeek's JSON mode wants the word JSON and an example in the prompt (its API guide); remote engines get the schema so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import cast

from moebeam.model_runner.fence.fenced_schema import load_schema
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import JobFileError, RowError
from moebeam.schemas.records import Message

_MAX_DEPTH = 8
_MAX_NODES = 2_000
"""Most values of which an example is made; one that needs more would help no model."""

_MAX_CHARACTERS = 10_000
_TEXTS = {
    "date-time": "2026-01-31T12:00:00Z",
    "date": "2026-01-31",
    "time": "12:00:00Z",
    "email": "name@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def with_schema_in_prompt(messages: Sequence[Message], schema: Json) -> tuple[Message, ...]:
    """Appends the schema, the word JSON and a small example to the first system message, or adds such a message.

    Leaves the example out where none was found that is valid.
    """
    text = _write_instruction(json.dumps(schema, ensure_ascii=False))
    for position, message in enumerate(messages):
        if message.role == "system":
            content = f"{message.content}\n\n{text}" if message.content else text
            parts = (*message.parts, text) if message.parts else ()
            return (*messages[:position], replace(message, content=content, parts=parts), *messages[position + 1 :])
    return (Message("system", text), *messages)


@lru_cache(maxsize=256)
def _write_instruction(schema_text: str) -> str:
    schema = cast("Json", json.loads(schema_text))
    text = f"Answer with one JSON value and nothing else. It must keep this JSON Schema:\n{schema_text}"
    example = make_example(schema)
    if example is None:
        return text
    return f"{text}\n\nAn example of such JSON, whose values are made up:\n{json.dumps(example, ensure_ascii=False)}"


def make_example(schema: Json) -> Json:
    """A small value that keeps a schema; None where none was found, or where only null keeps it."""
    try:
        value = _Example(schema).build(schema, 0)
        load_schema(schema, formats="annotate", source="example").check(json.dumps(value))
    except (RowError, JobFileError, _TooLargeError):
        return None
    return value


class _TooLargeError(Exception):
    """An example would be too large."""


class _Example:
    """Builds a value by the keywords that say what it must be; the caller checks whether it holds."""

    def __init__(self, root: Json) -> None:
        self._root = root
        self._num_nodes = 0

    def build(self, schema: Json, depth: int) -> Json:
        """A value of a schema.

        Raises:
            _TooLargeError: it takes more than `_MAX_NODES` values, or a text of more than `_MAX_CHARACTERS`.
        """
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES:
            raise _TooLargeError
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return None
        for keyword in ("const", "default"):
            if keyword in schema:
                return schema[keyword]
        for keyword in ("examples", "enum"):
            if values := _list_items(schema.get(keyword)):
                return values[0]
        if isinstance(reference := schema.get("$ref"), str):
            return self.build(self._find_target(reference), depth + 1)
        if parts := _list_items(schema.get("allOf")):
            rest = {key: value for key, value in schema.items() if key != "allOf"}
            return self.build(_merge_schemas([rest, *(self._resolve(part) for part in parts)]), depth + 1)
        for keyword in ("anyOf", "oneOf"):
            if branches := _list_items(schema.get(keyword)):
                rest = {key: value for key, value in schema.items() if key != keyword}
                return self.build(_merge_schemas([rest, self._resolve(branches[0])]), depth + 1)
        return self._build_of_type(schema, depth)

    def _build_of_type(self, schema: Mapping[str, Json], depth: int) -> Json:
        kind = schema.get("type")
        if isinstance(kind, Sequence) and not isinstance(kind, str):
            kind = next((name for name in kind if name != "null"), "null")
        if kind is None:
            kind = "object" if "properties" in schema else "array" if "items" in schema else "string"
        match kind:
            case "object":
                return self._build_object(schema, depth)
            case "array":
                num_items = max(1, _number(schema.get("minItems"), 1))
                if num_items > _MAX_NODES:
                    raise _TooLargeError
                if schema.get("maxItems") == 0:
                    return []
                return [self.build(schema.get("items", {"type": "string"}), depth + 1) for _ in range(int(num_items))]
            case "string":
                return self._build_string(schema)
            case "integer" | "number":
                return _choose_number(schema, is_integer=kind == "integer")
            case "boolean":
                return True
            case _:
                return None

    def _build_object(self, schema: Mapping[str, Json], depth: int) -> Json:
        properties = schema.get("properties")
        known = properties if isinstance(properties, Mapping) else {}
        wanted = [*known, *(name for name in _list_items(schema.get("required")) if name not in known)]
        return {str(name): self.build(known.get(str(name), {"type": "string"}), depth + 1) for name in wanted}

    def _build_string(self, schema: Mapping[str, Json]) -> str:
        text = _TEXTS.get(str(schema.get("format")), "text")
        shortest, longest = int(_number(schema.get("minLength"), 0)), int(_number(schema.get("maxLength"), 1000))
        if shortest > _MAX_CHARACTERS:
            raise _TooLargeError
        return (text + "x" * (shortest - len(text)))[:longest]

    def _resolve(self, schema: Json) -> Json:
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        return self._find_target(reference) if isinstance(reference, str) else schema

    def _find_target(self, reference: str) -> Json:
        """What a reference within the document means; nothing is fetched."""
        value = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if reference.startswith("#") else None


def _list_items(value: Json) -> Sequence[Json]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else []


def _number(value: Json, otherwise: int) -> int | float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _choose_number(schema: Mapping[str, Json], *, is_integer: bool) -> int | float:
    low = _number(schema.get("minimum"), 0)
    if "exclusiveMinimum" in schema:
        low = max(low, _number(schema.get("exclusiveMinimum"), 0) + 1)
    high = _number(schema.get("maximum"), 1_000_000_000)
    value = low if low > 1 or high < 1 else 1
    value = min(value, high)
    return int(value) if is_integer else value


def _merge_schemas(schemas: Sequence[Json]) -> dict[str, Json]:
    """One schema for several that hold at once: properties and required names joined, of all else the first."""
    merged: dict[str, Json] = {}
    for schema in schemas:
        for key, value in schema.items() if isinstance(schema, Mapping) else ():
            before = merged.get(key)
            if key == "properties" and isinstance(before, Mapping) and isinstance(value, Mapping):
                merged[key] = {**before, **value}
            elif key == "required" and before is not None:
                merged[key] = [*_list_items(before), *_list_items(value)]
            else:
                merged.setdefault(key, value)
    return merged
