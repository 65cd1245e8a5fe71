"""A job while it is read, and its problems: one line per key, with expected and found."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from moebeam.schemas.job.sections import Job

MAX_SHOWN_CHARS = 60


_EXPECTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "an array",
    "model_type": "a section",
    "finite_number": "a finite number",
    "decimal_type": "a number",
    "decimal_parsing": "a number",
    "string_too_short": "a path",
}


KeyPath = tuple[str, ...]


@dataclass(slots=True)
class Draft:
    """A job being read: values by section and key, and where each `--set` value came from."""

    name: str
    values: dict[str, Any]
    set_texts: dict[KeyPath, str] = field(default_factory=dict[KeyPath, str])
    problems: list[str] = field(default_factory=list[str])

    def refuse(self, place: KeyPath, problem: str) -> None:
        if place in self.set_texts:
            self.problems.append(f"--set {'.'.join(place)}: {problem}")
        else:
            self.problems.append(f"{self.name}: {format_place(place)}: {problem}")


def explain_errors(draft: Draft, error: ValidationError, *, skip: set[KeyPath]) -> None:
    """Turn pydantic's errors into one line per key; branches of a union become `a or b`."""
    expected: dict[KeyPath, list[str]] = {}
    found: dict[KeyPath, str] = {}
    for problem in error.errors(include_url=False):
        place = tuple(str(part) for part in problem["loc"][:2])
        if place in skip:
            continue
        if problem["type"] == "missing":
            draft.refuse(
                place,
                _explain_missing(place)
                if len(problem["loc"]) <= 2
                else f"{_format_inner_place(problem['loc'])}: missing",
            )
        elif problem["type"] == "extra_forbidden":
            # Without the value: a secret may stand where a variable's name belongs.
            draft.refuse(place, f"{_format_inner_place(problem['loc'])}: unknown key")
        elif problem["type"] == "value_error":
            draft.refuse(place, str(problem.get("ctx", {}).get("error", problem["msg"])))
        else:
            expected.setdefault(place, []).append(
                _format_expected(problem["type"], problem.get("ctx", {}), problem["loc"])
            )
            found.setdefault(place, _format_value(problem["input"]))
    for place, wanted in expected.items():
        problem = f"expected {' or '.join(dict.fromkeys(wanted))}, found {found[place]}"
        if place in draft.set_texts and "a string" in wanted:
            problem += f"""; for a string write --set '{".".join(place)}="{draft.set_texts[place]}"'"""
        draft.refuse(place, problem)


def _format_inner_place(place: Sequence[int | str]) -> str:
    """Format a place in an array of tables: number, from 1, and key."""
    return ".".join(str(part + 1) if isinstance(part, int) else part for part in place[2:])


def _explain_missing(place: KeyPath) -> str:
    section = cast("type[BaseModel]", Job.model_fields[place[0]].annotation)
    if len(place) == 1:
        needed = [key for key, inner in section.model_fields.items() if inner.is_required()]
        return f"the section is missing; it needs at least {', '.join(needed) or 'path'}"
    description = next(
        (inner.description for key, inner in section.model_fields.items() if (inner.alias or key) == place[1]), None
    )
    return f"missing{f' ({description[0].lower()}{description[1:]})' if description else ''}"


def _format_expected(kind: str, context: Mapping[str, Any], place: Sequence[int | str]) -> str:
    is_item = bool(place) and isinstance(place[-1], int)
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
        bound = context[bounds[kind]]
        return f"{words[bounds[kind]]} {int(bound) if bound == int(bound) else bound}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "too_long":
        return f"at most {context['max_length']} items"
    wanted = _EXPECTED.get(kind, kind.replace("_", " "))
    return f"an array of {wanted.removeprefix('a ').removeprefix('an ')}s" if is_item else wanted


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a section"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def format_place(place: KeyPath) -> str:
    return f"[{place[0]}]" if len(place) == 1 else f"[{place[0]}] {'.'.join(place[1:])}"


def join_problems(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems in the job", *(f"  {problem}" for problem in problems)])
