"""Quotes answers and schemas in error messages: a pointer and a short excerpt, never the whole document."""

import json
from collections.abc import Sequence

from jsonschema_rs import ValidationError, ValidationErrorKind

from moebeam.schemas.contract.references import escape_step

MAX_EXCERPT = 100
"""Most characters of a value that an error message quotes."""


def describe_violation(error: ValidationError) -> str:
    """Describe one violation by pointer, keyword, expected and found; at most a few excerpts long."""
    return f"at {format_pointer(error.instance_path)}: {_format_complaint(error)}, found {_format_found(error)}"


def _format_complaint(error: ValidationError) -> str:
    return f"{error.kind.name}: expected {_format_expected(error.kind)}"


def _format_expected(kind: ValidationErrorKind) -> str:
    match kind:
        case ValidationErrorKind.Type(types=types):
            return " or ".join(types)
        case ValidationErrorKind.Required(property=name):
            return f"a property {excerpt(name)}"
        case ValidationErrorKind.AnyOf(context=context) | ValidationErrorKind.OneOfNotValid(context=context):
            return shorten("one of: " + "; ".join(_format_complaint(branch[0]) for branch in context if branch))
        case ValidationErrorKind.OneOfMultipleValid():
            return "exactly one alternative to match, not several"
        case ValidationErrorKind.AdditionalProperties() | ValidationErrorKind.UnevaluatedProperties():
            return "no properties beyond those of the schema"
        case ValidationErrorKind.PropertyNames(error=inner):
            return f"names that keep {_format_complaint(inner)}"
        case ValidationErrorKind.FalseSchema():
            return "nothing here"
        case ValidationErrorKind.UniqueItems():
            return "items that differ"
        case ValidationErrorKind.Contains():
            return "an item that matches"
        case ValidationErrorKind.Not(schema=schema):
            return f"anything but {excerpt(schema)}"
        case _:
            return excerpt(kind.value)


def _format_found(error: ValidationError) -> str:
    match error.kind:
        case ValidationErrorKind.AdditionalProperties(unexpected=names):
            return excerpt(names)
        case ValidationErrorKind.UnevaluatedProperties(unexpected=names):
            return excerpt(names)
        case _:
            return excerpt(error.instance)


def format_pointer(path: Sequence[str | int]) -> str:
    """Format a JSON pointer (RFC 6901); `the root` for the empty one, which would be invisible."""
    return shorten("".join(f"/{escape_step(step)}" for step in path)) or "the root"


def excerpt(value: object) -> str:
    pieces: list[str] = []
    length = 0
    for piece in json.JSONEncoder(ensure_ascii=False, default=repr).iterencode(value):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_EXCERPT:
            break
    return shorten("".join(pieces))


def shorten(text: str) -> str:
    return text if len(text) <= MAX_EXCERPT else f"{text[: MAX_EXCERPT - 1]}…"


def describe_error(error: BaseException) -> str:
    """Describe a third-party error briefly; its own `__str__` may raise or quote anything."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be printed)"
    return f"{type(error).__name__}: {text if len(text) <= 2 * MAX_EXCERPT else text[: 2 * MAX_EXCERPT - 1] + '…'}"
