"""Whether calls survive being written and read: `python -m benchmarks.toolcalls --cases FILE.jsonl --json OUT.json`.

Each line of FILE is `{"tools": [...], "calls": [...]}` in OpenAI's form. The calls are rendered as DeepSeek-V4 writes
them, parsed again and compared as JSON values; each argument object must be valid under its tool's schema exactly when
it was before. Exit code 0 if all cases are equal, 1 if any differs, 2 for bad input. `--make FILE` writes adversarial
cases instead, the same for the same seed.
"""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from moebeam.model_runner.encoding.chat.strict_arguments import parse_object
from moebeam.model_runner.encoding.deepseek.deepseek_v4 import DeepSeekV4
from moebeam.schemas.canonical import Json, canonical_json
from moebeam.schemas.chat_options import Tool, parse_tools
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import InvalidMessages, InvalidTools, JobFileError, RowError
from moebeam.schemas.records import ToolCall

_MAX_FAILURES = 1000
_ENCODING = DeepSeekV4()


class BadInput(Exception):
    """A line of the cases is not what it should be; names file, line and field."""


@dataclass(frozen=True, slots=True)
class Case:
    """Calls to be written and read, and the functions that they call."""

    line: int
    tools: tuple[Tool, ...]
    calls: tuple[ToolCall, ...]


@dataclass(slots=True)
class Report:
    """What became of the cases.

    Attributes:
        num_refused: cases that the format refused to write, by a typed error; they count as not equal.
        num_validity_agreements: argument objects that are as valid after as before, of `num_validated`.
        num_schemas_refused: schemas of tools that are no JSON Schema; their arguments are not validated.
        failures: line and reason of cases that differ, the first thousand.
    """

    num_cases: int = 0
    num_calls: int = 0
    num_equal: int = 0
    num_refused: int = 0
    num_validated: int = 0
    num_valid_before: int = 0
    num_valid_after: int = 0
    num_validity_agreements: int = 0
    num_calls_without_tool: int = 0
    num_schemas_refused: int = 0
    failures: list[dict[str, Json]] = field(default_factory=list[dict[str, Json]])

    @property
    def is_clean(self) -> bool:
        return self.num_equal == self.num_cases and self.num_validity_agreements == self.num_validated

    def fail(self, case: Case, reason: str) -> None:
        if len(self.failures) < _MAX_FAILURES:
            self.failures.append({"line": case.line, "reason": reason})


def check_cases(cases: Iterator[Case]) -> Report:
    """Write, read and compare every case."""
    report = Report()
    for case in cases:
        report.num_cases += 1
        report.num_calls += len(case.calls)
        _check_case(case, report)
    return report


def _check_case(case: Case, report: Report) -> None:
    try:
        text = _ENCODING.render_calls(case.calls)
    except InvalidMessages as error:
        report.num_refused += 1
        report.fail(case, f"refused: {error}")
        return
    parsed = _ENCODING.parse(text, starts_in_reasoning=False, has_tools=True)
    reason = _difference(case.calls, parsed.tool_calls)
    if parsed.error is not None or parsed.content:
        reason = f"not read: {parsed.error}" if parsed.error else f"left in the content: {parsed.content[:200]!r}"
    if reason is not None:
        report.fail(case, reason)
        return
    report.num_equal += 1
    _check_validity(case, parsed.tool_calls, report)


def _difference(before: Sequence[ToolCall], after: Sequence[ToolCall]) -> str | None:
    if len(before) != len(after):
        return f"expected {len(before)} calls, found {len(after)}"
    for index, (given, read) in enumerate(zip(before, after, strict=True)):
        if given.name != read.name:
            return f"calls[{index}].name: expected {given.name!r}, found {read.name!r}"
        # Canonical text tells 1 from 1.0 and from true, where Python's == does not.
        expected, found = (canonical_json(parse_object(call.arguments)) for call in (given, read))
        if expected != found:
            return f"calls[{index}].arguments: expected {expected[:300]}, found {found[:300]}"
    return None


def _check_validity(case: Case, parsed: Sequence[ToolCall], report: Report) -> None:
    schemas = {tool.name: tool for tool in case.tools}
    for index, (before, after) in enumerate(zip(case.calls, parsed, strict=True)):
        if before.name not in schemas:
            report.num_calls_without_tool += 1
            continue
        try:
            schema = AnswerSchema.from_json(
                schemas[before.name].parameters, formats="annotate", source=f"line {case.line}, tool {before.name}"
            )
        except JobFileError:
            report.num_schemas_refused += 1
            continue
        was_valid, is_valid = _is_valid(schema, before.arguments), _is_valid(schema, after.arguments)
        report.num_validated += 1
        report.num_valid_before += was_valid
        report.num_valid_after += is_valid
        report.num_validity_agreements += was_valid == is_valid
        if was_valid != is_valid:
            report.fail(case, f"calls[{index}]: expected arguments valid {was_valid}, found {is_valid}")


def _is_valid(schema: AnswerSchema, text: str) -> bool:
    try:
        schema.check(text)
    except RowError:
        return False
    return True


def read_cases(path: str) -> Iterator[Case]:
    """The cases of a file, line by line; blank lines are passed over.

    Raises:
        BadInput: the file cannot be read, or a line is no case.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield _case_of(f"{path}:{line}", line, text)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: expected a readable file in UTF-8, found: {error}") from error


def _case_of(where: str, line: int, text: str) -> Case:
    try:
        value: object = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: expected JSON, found: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{where}: expected an object with `tools` and `calls`, found {type(value).__name__}")
    document = cast("dict[str, object]", value)
    try:
        tools = parse_tools(document.get("tools"), f"{where}: tools")
    except InvalidTools as error:
        raise BadInput(str(error)) from error
    calls = document.get("calls")
    if not isinstance(calls, list):
        raise BadInput(f"{where}: calls: expected a list, found {type(calls).__name__}")
    items = cast("list[object]", calls)
    return Case(line, tools, tuple(_call_of(f"{where}: calls[{index}]", item) for index, item in enumerate(items)))


def _call_of(where: str, item: object) -> ToolCall:
    function = cast("Mapping[str, Any]", item).get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping):
        raise BadInput(f"{where}: expected a call with `name` and `arguments`, found {type(item).__name__}")
    fields = cast("Mapping[str, Any]", function)
    name, arguments = fields.get("name"), fields.get("arguments")
    if not isinstance(name, str):
        raise BadInput(f"{where}.name: expected text, found {type(name).__name__}")
    # Whether arguments can be written at all is for the format to say: a refusal is a result, not bad input.
    text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments
    if not isinstance(text, str):
        raise BadInput(f"{where}.arguments: expected an object or its text, found {type(arguments).__name__}")
    return ToolCall("", name, text)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"expected every key once in an object, found {[key for key, _ in pairs]}")
    return values


_FRAGMENTS = (
    *("", " ", "\n", "\n\n", "\t", "\\", '"', "'", "<", ">", "&lt;", "é", "天气", "😀", "\u0000", "\u2028", "\ufdd0"),
    *("true", "false", "null", "1", "1e2", "100.0", "NaN", "{}", "[]", '{"a": 1}', '"quoted"', "\\u003c", "<b>"),
    *(
        "｜DSML｜",
        "<｜DSML｜",
        "</｜DSML｜parameter>",
        "</｜DSML｜invoke>",
        "</｜DSML｜tool_calls>",
        "<｜DSML｜tool_calls>",
    ),
    *(
        '<｜DSML｜parameter name="x" string="true">',
        '" string="false">',
        "<｜end▁of▁sentence｜>",
        "<think>",
        "</think>",
    ),
)
_NUMBERS = (0, -1, 1.0, -0.0, 100.0, 1e2, 1e-7, 1.5e300, 2**53 + 1, -(2**63) - 1, 10**30, 0.1, 1e16)
_SCHEMAS: tuple[dict[str, Json], ...] = (
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]},
    {"type": "object", "additionalProperties": {"type": ["string", "null"], "maxLength": 12}},
    {"type": "object", "properties": {"a": {"const": "1"}, "b": {"enum": [1, "1", True]}}, "minProperties": 1},
)


def make_cases(num_cases: int, seed: int) -> Iterator[dict[str, Json]]:
    """Cases with all that could be mistaken: markup, numbers as text, quotes in names, empty and nested values."""
    draw = random.Random(seed)
    for _ in range(num_cases):
        names = [f"f{position}" for position in range(draw.randint(1, 3))]
        tools: list[Json] = [
            {"type": "function", "function": {"name": name, "parameters": draw.choice(_SCHEMAS)}} for name in names
        ]
        yield {"tools": tools, "calls": [_make_call(draw, draw.choice(names)) for _ in range(draw.randint(1, 4))]}


def _make_call(draw: random.Random, name: str) -> Json:
    keys = [draw.choice(["a", "b", _make_text(draw)]) for _ in range(draw.randint(0, 4))]
    arguments: dict[str, Json] = {key: _make_value(draw, 0) for key in keys}
    as_text = json.dumps(arguments, ensure_ascii=draw.random() < 0.5)
    function: dict[str, Json] = {"name": name, "arguments": draw.choice([as_text, arguments])}
    return draw.choice([function, {"id": "x", "type": "function", "function": function}])


def _make_text(draw: random.Random) -> str:
    return "".join(draw.choice(_FRAGMENTS) for _ in range(draw.randint(0, 4)))


def _make_value(draw: random.Random, depth: int) -> Json:
    makers: list[Callable[[], Json]] = [
        lambda: _make_text(draw),
        lambda: _make_text(draw),
        lambda: draw.choice(_NUMBERS),
        lambda: draw.choice([None, True, False]),
        lambda: [_make_value(draw, depth + 1) for _ in range(draw.randint(0, 3))],
        lambda: {_make_text(draw): _make_value(draw, depth + 1) for _ in range(draw.randint(0, 3))},
    ]
    return draw.choice(makers if depth < 3 else makers[:4])()


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong ones end with code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toolcalls", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cases", metavar="FILE", help="cases to check, one a line")
    what.add_argument("--make", metavar="FILE", help="write adversarial cases")
    parser.add_argument("--json", metavar="OUT", help="where the report goes; required with --cases")
    parser.add_argument("--num-cases", type=int, default=10_000, help="how many to make")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.cases and not options.json:
        parser.error("--cases needs --json OUT")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse_options(arguments)
    if options.make:
        with open(options.make, "w", encoding="utf-8") as file:
            for case in make_cases(options.num_cases, options.seed):
                file.write(json.dumps(case, ensure_ascii=False) + "\n")
        return 0
    try:
        report = check_cases(read_cases(options.cases))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Path(options.json).write_text(json.dumps(asdict(report), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    reasons = Counter(str(failure["reason"]).split(":", 1)[0] for failure in report.failures)
    print(
        f"{report.num_equal} of {report.num_cases} cases equal ({report.num_calls} calls, {report.num_refused} cases "
        f"refused); arguments as valid as before: {report.num_validity_agreements} of {report.num_validated}"
        + "".join(f"\n  {count} x {reason}" for reason, count in reasons.most_common(5))
    )
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
