"""How answers and schemas are quoted in error messages: a pointer, a short excerpt, never the whole document.

Used wherever a message of `schemas` shows a value of the user's or of the model's.
"""

import json
from collections.abc import Sequence

from jsonschema_rs import ValidationError, ValidationErrorKind

MAX_EXCERPT = 100
"""Most characters that an error message quotes of a value."""


def describe_violation(error: ValidationError) -> str:
    """One violation as pointer, keyword, expected and found; never longer than a few excerpts."""
    return f"at {pointer_of(error.instance_path)}: {_complaint(error)}, found {_found(error)}"


def _complaint(error: ValidationError) -> str:
    return f"{error.kind.name}: expected {_expected(error.kind)}"


def _expected(kind: ValidationErrorKind) -> str:
    match kind:
        case ValidationErrorKind.Type(types=types):
            return " or ".join(types)
        case ValidationErrorKind.Required(property=name):
            return f"a property {excerpt(name)}"
        case ValidationErrorKind.AnyOf(context=context) | ValidationErrorKind.OneOfNotValid(context=context):
            return shorten("one of: " + "; ".join(_complaint(branch[0]) for branch in context if branch))
        case ValidationErrorKind.OneOfMultipleValid():
            return "exactly one alternative to match, not several"
        case ValidationErrorKind.AdditionalProperties() | ValidationErrorKind.UnevaluatedProperties():
            return "no properties beyond those of the schema"
        case ValidationErrorKind.PropertyNames(error=inner):
            return f"names that keep {_complaint(inner)}"
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


def _found(error: ValidationError) -> str:
    match error.kind:
        case ValidationErrorKind.AdditionalProperties(unexpected=names):
            return excerpt(names)
        case ValidationErrorKind.UnevaluatedProperties(unexpected=names):
            return excerpt(names)
        case _:
            return excerpt(error.instance)


def pointer_of(path: Sequence[str | int]) -> str:
    """A JSON pointer (RFC 6901); `the root` for the empty one, which would not be seen."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in path)
    return shorten("".join(f"/{step}" for step in steps)) or "the root"


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
    """A foreign error in a few words; its own `__str__` may fail, or quote whatever it likes."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be printed)"
    return f"{type(error).__name__}: {text if len(text) <= 2 * MAX_EXCERPT else text[: 2 * MAX_EXCERPT - 1] + '…'}"
