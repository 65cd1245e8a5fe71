"""Parses a call's arguments strictly, so that every JSON reader gets the same object.

`ToolCall.arguments` is JSON text. Refuses what two readers could read differently: duplicate keys, numbers that are not
finite, lone surrogates, more nesting than `moebeam.schemas.contract.strict_json.MAX_DEPTH`. Numbers are
those of Python: integers exact, all others the nearest double.
"""

import json
from collections.abc import Mapping
from typing import Any

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.strict_json import parse_json
from moebeam.schemas.errors import NotJson, abbreviate


def parse_value(text: str) -> Json:
    """Parses a text that is one JSON value without duplicate keys.

    Raises:
        NotJson: it is not; says where and what was found.
    """
    value = parse_json(text)
    if "{" in text:
        json.loads(text, object_pairs_hook=_refuse_duplicates)
    return value


def parse_object(text: str) -> dict[str, Json]:
    """The arguments of a call.

    Raises:
        NotJson: the text is no JSON object, or one that readers could read differently.
    """
    value = parse_value(text)
    if not isinstance(value, dict):
        raise NotJson(f"expected a JSON object, found {abbreviate(value)}")
    return value


def value_at(text: str, start: int) -> tuple[Json, int]:
    """Parses the JSON value at a position; returns it and the position after it.

    Raises:
        NotJson: none begins there, or one that readers could read differently.
    """
    try:
        _, end = _SCANNER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at character {error.pos}") from error
    except (RecursionError, ValueError) as error:
        raise NotJson(f"expected JSON that Python can read, found: {error}") from error
    return parse_value(text[start:end]), end


def arguments_text(value: Mapping[str, Json]) -> str:
    """Serialises arguments for `ToolCall`: keys in their order, not ASCII-escaped."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


_SCANNER = json.JSONDecoder()


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise NotJson(f"expected every key once in an object, found {abbreviate(key)} twice")
        values[key] = value
    return values
