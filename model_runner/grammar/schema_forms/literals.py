"""Which listed values llguidance 1.9.1 can write, and how.

Part of `moebeam.model_runner.grammar.schema_forms`, for `document`.
"""

import re
from collections.abc import Mapping, Sequence

from moebeam.schemas.canonical import Json

_MAX_INTEGER = 2**53
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
_UNSPELLABLE = re.compile(r"[\x7f\ud800-\udfff]")


def can_be_written(value: Json) -> bool:
    """Whether llguidance can write a value: it has no DEL and no integer beyond 2**53."""
    match value:
        case bool() | None:
            return True
        case str():
            return _UNSPELLABLE.search(value) is None
        case int() | float():
            return abs(value) < _MAX_INTEGER or not float(value).is_integer()
        case Mapping():
            return all(can_be_written(name) and can_be_written(item) for name, item in value.items())
        case _:
            return all(map(can_be_written, value))


def normalise_literal(value: Json) -> Json:
    """Writes whole floats as integers: 1.0 as 1."""
    match value:
        case float():
            return int(value) if value.is_integer() else value
        case Mapping():
            return {name: normalise_literal(item) for name, item in value.items()}
        case Sequence() if not isinstance(value, str):
            return [normalise_literal(item) for item in value]
        case _:
            return value


def has_control_character(value: Json) -> bool:
    """Whether a string in a value has a character that JSON can only write as `\\u00..`."""
    match value:
        case str():
            return _CONTROL.search(value) is not None
        case Mapping():
            return any(has_control_character(name) or has_control_character(item) for name, item in value.items())
        case Sequence():
            return any(map(has_control_character, value))
        case _:
            return False
