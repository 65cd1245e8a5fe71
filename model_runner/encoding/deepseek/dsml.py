"""Calls in DeepSeek's DSML: V3.2, V4 and V4.1, which differ in the names of their tags only.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Beijing</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

A string stands raw under `string="true"`, with no escape of any kind; everything else is JSON under `string="false"`.
A string that spells markup cannot stand raw, so it is written as JSON too, each `<` as `\\u003c` (ADR 0004). The name
of a parameter with quotes, backslashes, control characters or markup is the inside of a JSON string. Two different
argument objects are never written alike, and `parse` gives back what `render` was given. `read` also takes calls that
break the format, see `dsml_repair.py`.
"""

# ruff: noqa: RUF001, RUF002 - the bars of the wire format are U+FF5C

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from moebeam.model_runner.encoding.chat.call_formats import (
    FoundCalls,
    check_name,
    escape_markup,
    excerpt,
    expect,
    expect_end,
    malformed_call,
    parse_call_arguments,
    read_name,
    skip_space,
)
from moebeam.model_runner.encoding.chat.strict_arguments import arguments_text, parse_value
from moebeam.model_runner.encoding.chat.token_marks import NO_MARKS, TokenMarks
from moebeam.model_runner.encoding.deepseek.dsml_repair import is_meant_otherwise, mend_calls
from moebeam.model_runner.encoding.deepseek.dsml_tags import find_loose_tag
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import Tool
from moebeam.schemas.errors import MalformedToolCall, NotJson
from moebeam.schemas.records import ToolCall

DSML = "｜DSML｜"

_MARKUP = re.compile(rf"{DSML}|<｜|</?think>")
_NAME_TO_ESCAPE = re.compile(r'["\\\x00-\x1f]')
_NAME = re.compile(r'"((?:[^"\\]|\\.)*)" string="(true|false)">', re.DOTALL)


@dataclass(frozen=True, slots=True)
class DsmlFormat:
    """DSML with the tags of one model.

    Attributes:
        block, invoke, parameter: the names of the tags, with the space before them where the model writes one.
    """

    name: str
    block: str
    invoke: str = "invoke"
    parameter: str = "parameter"
    arguments: Literal["dsml"] = "dsml"
    between: str = "\n"

    @property
    def markup(self) -> frozenset[str]:
        return frozenset({DSML})

    @property
    def begin(self) -> str:
        return f"\n\n<{DSML}{self.block}>\n"

    @property
    def end(self) -> str:
        return f"\n</{DSML}{self.block}>"

    @property
    def call_end(self) -> str:
        return f"\n</{DSML}{self.invoke}>"

    def call_begin(self, name: str) -> str:
        return f'<{DSML}{self.invoke} name="{name}">\n'

    def parameter_begin(self, name: str, *, is_string: bool) -> str:
        """What opens a parameter, up to its value; parameters stand `between` each other."""
        return self._open_parameter(_escape_name(name), is_string)

    @property
    def parameter_end(self) -> str:
        """What ends the value of a parameter."""
        return f"</{DSML}{self.parameter}>"

    def render(self, calls: Sequence[ToolCall], *, marks: TokenMarks = NO_MARKS, where: str = "tool_calls") -> str:
        """Calls as the model writes them, after the blank line that separates them from the content."""
        if not calls:
            return ""
        written = [self._render_call(call, marks, f"{where}[{index}]") for index, call in enumerate(calls)]
        return f"{self.begin}{self.between.join(written)}{self.end}"

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        """The first DSML tag of any kind, or what may be meant as one; `parse` reports one that opens no block."""
        begins = [position for tag in (f"<{DSML}", f"</{DSML}") if (position := text.find(tag, start)) >= 0]
        begin = min(begins, default=-1)
        if begin < 0 and (begin := find_loose_tag(text, start)) < 0:
            return None
        return (begin - 2 if text.endswith("\n\n", start, begin) else begin), begin

    def parse(self, text: str, start: int) -> tuple[ToolCall, ...]:
        """The calls of a block that reaches to the end of the text."""
        position = skip_space(text, expect(text, start, self.begin.strip()))
        calls: list[ToolCall] = []
        while not calls or text.startswith(f"<{DSML}{self.invoke}", position):
            call, position = self._parse_call(text, position, len(calls))
            calls.append(call)
            position = skip_space(text, position)
        expect_end(text, expect(text, position, self.end.strip()))
        return tuple(calls)

    def read(self, text: str, start: int, *, tools: Sequence[Tool] = (), is_cut: bool = False) -> FoundCalls | None:
        found = self.find(text, start)
        if found is None:
            return None
        try:
            exact = FoundCalls(found[0], self.parse(text, found[1]))
        except MalformedToolCall:
            exact = None
        if exact is not None and not any(is_meant_otherwise(call, tools) for call in exact.calls):
            return exact
        return mend_calls(text, start, exact_tags=self._tags, tools=tools, is_cut=is_cut) or exact

    @property
    def _tags(self) -> frozenset[str]:
        """Every tag as it should be, those with attributes up to the first."""
        names = (self.block, self.invoke, self.parameter)
        openings = {f"<{DSML}{self.block}>", f"<{DSML}{self.invoke}", f"<{DSML}{self.parameter}"}
        return frozenset({*openings, *(f"</{DSML}{name}>" for name in names)})

    def _render_call(self, call: ToolCall, marks: TokenMarks, where: str) -> str:
        check_name(call.name, where)
        parameters = [
            self._render_parameter(name, value, marks) for name, value in parse_call_arguments(call, where).items()
        ]
        return f"{self.call_begin(call.name)}{self.between.join(parameters)}{self.call_end}"

    def _render_parameter(self, name: str, value: Json, marks: TokenMarks) -> str:
        is_raw = isinstance(value, str) and not _MARKUP.search(value) and not marks.has_token_text(value)
        if is_raw:
            written = cast("str", value)
        else:
            written = escape_markup(json.dumps(value, ensure_ascii=False), _JSON_MARKUP, marks)
        return f"{self._open_parameter(marks.mark(_escape_name(name)), is_raw)}{written}{self.parameter_end}"

    def _open_parameter(self, name: str, is_string: bool) -> str:
        return f'<{DSML}{self.parameter} name="{name}" string="{"true" if is_string else "false"}">'

    def _parse_call(self, text: str, position: int, index: int) -> tuple[ToolCall, int]:
        position = expect(text, position, f'<{DSML}{self.invoke} name="')
        name, position = read_name(text, position)
        position = skip_space(text, expect(text, position, '">'))
        close = self.call_end.strip()
        arguments: dict[str, Json] = {}
        while not text.startswith(close, position):
            key, value, end = self._parse_parameter(text, position)
            if key in arguments:
                raise malformed_call(position, "every parameter once", f"{key!r} again")
            arguments[key] = value
            position = skip_space(text, end)
        return ToolCall(f"call_{index}", name, arguments_text(arguments)), position + len(close)

    def _parse_parameter(self, text: str, start: int) -> tuple[str, Json, int]:
        position = expect(text, start, f"<{DSML}{self.parameter} name=")
        found = _NAME.match(text, position)
        if found is None:
            raise malformed_call(position, '"NAME" string="true|false">', excerpt(text, position))
        key, begin = _unescape_name(found[1], position), found.end()
        end = text.find(self.parameter_end, begin)
        if end < 0:
            raise malformed_call(begin, f"a value that ends with {self.parameter_end!r}", "the end of the answer")
        value = text[begin:end]
        after = end + len(self.parameter_end)
        if found[2] == "true":
            if (inner := value.find(DSML)) >= 0:
                raise malformed_call(begin + inner, f"a raw string without {DSML}", excerpt(text, begin + inner))
            return key, value, after
        try:
            return key, parse_value(value), after
        except NotJson as error:
            raise malformed_call(begin, "a JSON value", str(error)) from error


_JSON_MARKUP = frozenset({DSML, "<think>", "</think>"})


def _escape_name(name: str) -> str:
    if not _NAME_TO_ESCAPE.search(name) and not _MARKUP.search(name):
        return name
    return json.dumps(name, ensure_ascii=False)[1:-1].replace("<", "\\u003c")


def _unescape_name(written: str, position: int) -> str:
    if "\\" not in written:
        return written
    try:
        value = parse_value(f'"{written}"')
    except NotJson as error:
        raise malformed_call(position, "a parameter's name", str(error)) from error
    return cast("str", value)


V4_CALLS = DsmlFormat("deepseek_v4", "tool_calls")
V3_2_CALLS = DsmlFormat("deepseek_v3_2", "function_calls")
V4_1_CALLS = DsmlFormat("deepseek_v4_1", " calls", " invoke", " parameter")
