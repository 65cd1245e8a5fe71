"""Two answers to one row: in what they differ, and where first.

The pure part of `moebeam compare`; `joined_rows.py` brings the pairs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from moebeam.schemas.canonical import Json

Kind: TypeAlias = Literal["status", "error", "calls", "json", "text", "reasoning", "only_a", "only_b"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What may differ, the gravest first: `ok` or rejected; by what error; which functions are called with what; the JSON's
value; the text, letter by letter; the reasoning; or one run alone has the row."""

_LEAD = 12
_EXCERPT = 48


@dataclass(frozen=True, slots=True)
class Answer:
    """What one run said to a row.

    Attributes:
        calls: names and arguments in order; ids, which providers draw, are left out.
    """

    status: str | None
    error_type: str | None
    text: str | None
    json: str | None
    calls: tuple[tuple[str | None, str | None], ...]
    reasoning: str | None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Answer":
        """Of a row in `moebeam.schemas.tables.RESULT_SCHEMA`."""
        calls: Sequence[Mapping[str, Any]] = row["tool_calls"] or ()
        return cls(
            status=row["status"],
            error_type=row["error_type"],
            text=row["output_text"],
            json=row["output_json"],
            calls=tuple((call["name"], call["arguments"]) for call in calls),
            reasoning=row["reasoning_content"],
        )

    @property
    def calls_json(self) -> str | None:
        """The calls as JSON text; None without any."""
        return json.dumps(self.calls, ensure_ascii=False) if self.calls else None


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which two answers differ.

    Attributes:
        place: the first that differs: a character (from 0), a JSON pointer, or empty where the whole differs.
        a, b: what stands there, shortened.
    """

    kind: Kind
    place: str
    a: str
    b: str


def find_differences(a: Answer, b: Answer) -> list[Difference]:
    """All ways in which two answers differ, in the order of `KINDS`; empty if they say the same.

    JSON, and arguments of calls, are compared by value: white space, the order of keys and the way in which a number is
    written make no difference of theirs. The text that they came in is compared letter by letter.
    """
    if a == b:
        return []
    found: list[Difference] = []
    if a.status != b.status:
        found.append(Difference("status", "", _name_status(a), _name_status(b)))
    elif a.error_type != b.error_type:
        found.append(Difference("error", "", str(a.error_type), str(b.error_type)))
    found += _compare_calls(a.calls, b.calls)
    if (place := _compare_json(a.json, b.json)) is not None:
        found.append(Difference("json", *place))
    if a.text != b.text:
        found.append(Difference("text", *_compare_texts(a.text, b.text)))
    if a.reasoning != b.reasoning:
        found.append(Difference("reasoning", *_compare_texts(a.reasoning, b.reasoning)))
    return found


def _name_status(answer: Answer) -> str:
    return f"{answer.status} ({answer.error_type})" if answer.error_type else str(answer.status)


def _compare_calls(
    a: tuple[tuple[str | None, str | None], ...], b: tuple[tuple[str | None, str | None], ...]
) -> list[Difference]:
    for number, (one, other) in enumerate(zip(a, b, strict=False)):
        if one[0] != other[0]:
            return [Difference("calls", f"/{number}/name", str(one[0]), str(other[0]))]
        if (place := _compare_json(one[1], other[1])) is not None:
            return [Difference("calls", f"/{number}/arguments{place[0]}", *place[1:])]
    if len(a) != len(b):
        return [Difference("calls", "", f"{len(a)} calls", f"{len(b)} calls")]
    return []


def _compare_json(a: str | None, b: str | None) -> tuple[str, str, str] | None:
    """Where two JSON texts differ in value; as texts, where one is missing or cannot be read."""
    if a == b:
        return None
    if a is not None and b is not None:
        try:
            return _first_difference(json.loads(a), json.loads(b), "")
        except (ValueError, RecursionError):
            pass
    return _compare_texts(a, b)


def _first_difference(a: Json, b: Json, pointer: str) -> tuple[str, str, str] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in a or key not in b:
                return inner, _show_json(a, key), _show_json(b, key)
            if (found := _first_difference(a[key], b[key], inner)) is not None:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list):
        for place, (one, other) in enumerate(zip(a, b, strict=False)):
            if (found := _first_difference(one, other, f"{pointer}/{place}")) is not None:
                return found
        return None if len(a) == len(b) else (pointer, f"{len(a)} items", f"{len(b)} items")
    # In Python, true equals 1.
    if a == b and isinstance(a, bool) == isinstance(b, bool):
        return None
    return pointer, _shorten(json.dumps(a, ensure_ascii=False)), _shorten(json.dumps(b, ensure_ascii=False))


def _show_json(values: dict[str, Json], key: str) -> str:
    return _shorten(json.dumps(values[key], ensure_ascii=False)) if key in values else "missing"


def _compare_texts(a: str | None, b: str | None) -> tuple[str, str, str]:
    if a is None or b is None:
        first, second = ("none" if text is None else _shorten(text) for text in (a, b))
        return "", first, second
    differing = (place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    place = next(differing, min(len(a), len(b)))
    start = max(0, place - _LEAD)
    return f"character {place:,}", _shorten(a[start:], cut=start > 0), _shorten(b[start:], cut=start > 0)


def _shorten(text: str, *, cut: bool = False) -> str:
    """The beginning of a text; ends that are missing are marked."""
    shown = text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}…"
    return f"…{shown}" if cut else shown
