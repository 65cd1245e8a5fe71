"""Strict JSON parsing, with errors that say where the text is wrong.

Python's `json` accepts more than RFC 8259 allows, and its depth limit depends on the caller's stack; an answer must not
be valid on one runner and malformed on another.
"""

import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import NoReturn, cast

from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import NotJson

MAX_DEPTH = 128
"""Most nested arrays and objects. Python's own limit depends on the caller's stack; jsonschema-rs stops at 255,
pydantic at about 200."""

MAX_DIGITS = 4_300
"""Most digits of an integer, however it is written; Python converts no more by default."""

_MAX_EXCERPT = 40
_NUMBER_OR_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL)


def parse_json(text: str) -> Json:
    """Parse exactly one JSON value as RFC 8259 defines it.

    Unlike Python's `json`, rejects NaN and infinities; lone surrogates, which no UTF-8 file can hold; and more than
    `MAX_DEPTH` levels. A number beyond a double (`1e400`) is the integer that it says, up to `MAX_DIGITS` digits. Of
    keys that an object repeats, the last one counts.

    Raises:
        NotJson: with line, column and character if known.
    """
    try:
        value = cast("Json", _DECODER.decode(text))
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} {_position(text, error.pos)}") from error
    except _NotFinite as error:
        raise NotJson(f"{error} {_position(text, _find_not_finite(text))}") from error
    except RecursionError as error:
        raise NotJson(_TOO_DEEP) from error
    except ValueError as error:
        # Python refuses to convert integers beyond sys.get_int_max_str_digits().
        raise NotJson(f"an integer is too long: {error}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and measure_depth(value) > MAX_DEPTH:
        raise NotJson(_TOO_DEEP)
    if ("\\u" in text or not text.isascii()) and has_lone_surrogate(value):
        raise NotJson("a string holds a lone surrogate, which is no Unicode character")
    return value


def keep_last_keys(text: str, value: Json) -> str:
    """The text of a value, without the keys that a later one of the same object overrides.

    Readers differ on repeated keys (DuckDB takes the first, Python the last), so what is kept of an answer has none.

    Args:
        text: as `parse_json` read it; returned as it is where no key repeats.
        value: what it read.
    """
    try:
        json.loads(text, object_pairs_hook=_refuse_repeated)
    except _RepeatedKey:
        return json.dumps(value, ensure_ascii=False)
    return text


class _RepeatedKey(Exception):
    """An object of the text has a key twice."""


def _refuse_repeated(pairs: list[tuple[str, Json]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        raise _RepeatedKey


def measure_depth(value: Json) -> int:
    """Nesting depth of arrays and objects; 0 for a scalar. Not recursive."""
    depth = 0
    level: list[Json] = [value]
    while containers := [parent for parent in level if isinstance(parent, dict | list)]:
        depth += 1
        level = [child for parent in containers for child in _children(parent)]
    return depth


def has_lone_surrogate(value: Json) -> bool:
    """Whether any string in a value cannot be encoded as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


class _NotFinite(Exception):
    """A number in the text has no finite double."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotFinite(f"{name} is not JSON")


def _finite_float(digits: str) -> float | int:
    value = float(digits)
    if not math.isinf(value):
        return value
    try:
        exact = Decimal(digits)
    except InvalidOperation:  # an exponent of twenty digits
        exact = Decimal("inf")
    if len(digits) > MAX_DIGITS or not exact.is_finite() or exact.adjusted() >= MAX_DIGITS:
        raise _NotFinite(f"the number {digits[:_MAX_EXCERPT]} has more than {MAX_DIGITS} digits")
    whole = int(exact)
    if whole != exact:
        raise _NotFinite(f"the number {digits[:_MAX_EXCERPT]} is beyond the range of a double, and no integer")
    return whole


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float)


def _find_not_finite(text: str) -> int:
    # The decoder stopped at the first such number; everything before it is well formed.
    for found in _NUMBER_OR_STRING.finditer(text):
        token = found.group()
        if token in ("NaN", "Infinity", "-Infinity") or (
            not token.startswith('"') and any(mark in token for mark in ".eE") and _is_refused(token)
        ):
            return found.start()
    return 0


def _is_refused(digits: str) -> bool:
    try:
        _finite_float(digits)
    except _NotFinite:
        return True
    return False


def _position(text: str, index: int) -> str:
    line = text.count("\n", 0, index) + 1
    column = index - text.rfind("\n", 0, index)
    where = f"at line {line}, column {column} (character {index})"
    return f"{where}, near {text[max(0, index - 20) : index + 20]!r}" if index < len(text) else where


def _children(container: Json) -> Iterable[Json]:
    match container:
        case dict():
            return container.values()
        case list():
            return container
        case _:
            return ()
