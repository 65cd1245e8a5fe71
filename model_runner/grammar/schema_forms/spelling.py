"""Which values llguidance 1.9.1 can spell where a schema lists them, and how.

Part of `moebeam.model_runner.grammar.schema_forms`, for `document`.
"""

import re
from collections.abc import Mapping, Sequence

from moebeam.schemas.canonical import Json

_MAX_INTEGER = 2**53
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
_UNSPELLABLE = re.compile(r"[\x7f\ud800-\udfff]")


def can_be_spelled(value: Json) -> bool:
    """Whether a value has a spelling: no DEL, and no integers that a double does not hold to the unit."""
    match value:
        case bool() | None:
            return True
        case str():
            return _UNSPELLABLE.search(value) is None
        case int() | float():
            return abs(value) < _MAX_INTEGER or not float(value).is_integer()
        case Mapping():
            return all(can_be_spelled(name) and can_be_spelled(item) for name, item in value.items())
        case _:
            return all(map(can_be_spelled, value))


def spelled_value(value: Json) -> Json:
    """A value with its integers as such, whether they were written with a fraction or not."""
    match value:
        case float():
            return int(value) if value.is_integer() else value
        case Mapping():
            return {name: spelled_value(item) for name, item in value.items()}
        case Sequence() if not isinstance(value, str):
            return [spelled_value(item) for item in value]
        case _:
            return value


def has_control(value: Json) -> bool:
    """Whether a string in a value has a character that JSON can only spell by number."""
    match value:
        case str():
            return _CONTROL.search(value) is not None
        case Mapping():
            return any(has_control(name) or has_control(item) for name, item in value.items())
        case Sequence():
            return any(map(has_control, value))
        case _:
            return False
