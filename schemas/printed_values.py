"""How prompts, ids, labels and tags print Python values of the user's columns.

Templates print in a process of their own, which stays small: nothing here needs Arrow.
"""

import json
from typing import Any

from moebeam.schemas.errors import InvalidValue


def print_value(value: Any) -> Any:
    """A value as it is printed: nested values as JSON, bytes as UTF-8, times in ISO form, and others as they are.

    Raises:
        InvalidValue: bytes that are not UTF-8.
    """
    if isinstance(value, dict | list | tuple):
        return print_json(value)
    return _print_scalar(value)


def print_json(value: Any, indent: int | None = None) -> str:
    """JSON for prompts: nothing escaped for HTML or ASCII.

    Raises:
        InvalidValue: bytes that are not UTF-8.
    """
    return json.dumps(value, ensure_ascii=False, indent=indent, default=lambda scalar: str(_print_scalar(scalar)))


def _print_scalar(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            found = f"byte 0x{value[error.start]:02x} at position {error.start}"
            raise InvalidValue(f"the template prints a binary column: expected UTF-8, found {found}") from error
    return value.isoformat() if hasattr(value, "isoformat") else value
