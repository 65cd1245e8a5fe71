"""The formats in which models write calls of tools: one a family; each renders, finds and parses calls.

All have one shape, which is also what a grammar needs: `begin`, then per call `call_begin(name)`, the arguments and
`call_end`, with `between` from call to call, then `end`. `arguments` says how the arguments stand there: `json` is one
JSON object, `dsml` are the parameters of `dsml.py`.

Parsing takes any white space where the format has some, and nothing else: calls reach to the end of the answer, or it
is a `MalformedToolCall` that names the character. Reading an answer mends DSML beforehand, see `dsml_repair.py`.
"""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moebeam.model_runner.encoding.chat.strict_arguments import arguments_text, parse_object, value_at
from moebeam.model_runner.encoding.chat.token_marks import NO_MARKS, TokenMarks
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import Tool
from moebeam.schemas.errors import InvalidMessages, MalformedToolCall, NotJson, abbreviate
from moebeam.schemas.records import ToolCall

TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
"""The names that functions may have, as `moebeam.schemas.chat_options` checks them where they are declared."""

_SPACE = re.compile(r"\s*")
_MAX_EXCERPT = 40


@dataclass(frozen=True, slots=True)
class FoundCalls:
    """The calls in an answer.

    Attributes:
        end_of_content: where the content before them ends.
        rest: text that stood behind or between them.
        repaired: what was mended to read them; see `dsml_repair.py`.
    """

    end_of_content: int
    calls: tuple[ToolCall, ...]
    rest: str = ""
    repaired: tuple[str, ...] = ()


class CallFormat(Protocol):
    """One format of calls.

    Attributes:
        name: as it is chosen and reported.
        arguments: how the arguments of a call stand in it.
        markup: the texts of tokenizer tokens that it uses.
        begin, between, end: what stands before, between and after the calls.
        call_end: what ends the arguments of a call.
    """

    @property
    def name(self) -> str: ...
    @property
    def arguments(self) -> Literal["json", "dsml"]: ...
    @property
    def markup(self) -> frozenset[str]: ...
    @property
    def begin(self) -> str: ...
    @property
    def between(self) -> str: ...
    @property
    def end(self) -> str: ...
    @property
    def call_end(self) -> str: ...

    def call_begin(self, name: str) -> str:
        """The text that opens a function's call, up to its arguments."""
        ...

    def render(self, calls: Sequence[ToolCall], *, marks: TokenMarks = NO_MARKS, where: str = "tool_calls") -> str:
        """Calls as the model writes them after its content; no text for no calls.

        Raises:
            InvalidMessages: a name or arguments that the format cannot hold; begins with `where`.
        """
        ...

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        """Where the content ends and where the calls begin, searching from a character on; None without calls."""
        ...

    def parse(self, text: str, start: int) -> tuple[ToolCall, ...]:
        """Parses the calls from where `find` found them to the end of the text.

        Raises:
            MalformedToolCall: names the character, expected and found.
        """
        ...

    def read(self, text: str, start: int, *, tools: Sequence[Tool] = (), is_cut: bool = False) -> FoundCalls | None:
        """Finds and parses the calls from a character on, mended where their meaning is certain; None without calls.

        Args:
            tools: those that could be called, where they are known.
            is_cut: the answer ended for want of tokens.
        Raises:
            MalformedToolCall: names the character, expected and found.
        """
        ...


@dataclass(frozen=True, slots=True)
class JsonCallFormat:
    """Calls whose arguments are one JSON object between two fixed texts.

    Attributes:
        before_name, before_arguments: what `call_begin` puts around the name.
        opening: the text by which an answer with calls is known.
        call_opening: the text by which a further call is known.
        separator: what stands between content and calls, not part of either.
    """

    name: str
    begin: str
    before_name: str
    before_arguments: str
    call_end: str
    between: str
    end: str
    opening: str
    call_opening: str
    markup: frozenset[str]
    separator: str = ""
    arguments: Literal["json"] = "json"

    def call_begin(self, name: str) -> str:
        return f"{self.before_name}{name}{self.before_arguments}"

    def render(self, calls: Sequence[ToolCall], *, marks: TokenMarks = NO_MARKS, where: str = "tool_calls") -> str:
        if not calls:
            return ""
        written = [self._render_call(call, marks, f"{where}[{index}]") for index, call in enumerate(calls)]
        return f"{self.begin}{self.between.join(written)}{self.end}"

    def find(self, text: str, start: int) -> tuple[int, int] | None:
        return find_opening(text, start, self.opening, self.separator)

    def parse(self, text: str, start: int) -> tuple[ToolCall, ...]:
        position = skip_space(text, expect(text, start, self.begin.strip()))
        calls: list[ToolCall] = []
        while not calls or text.startswith(self.call_opening, position):
            call, position = self._parse_call(text, position, len(calls))
            calls.append(call)
            position = skip_space(text, position)
        position = expect(text, position, self.end.strip())
        expect_end(text, position)
        return tuple(calls)

    def read(self, text: str, start: int, *, tools: Sequence[Tool] = (), is_cut: bool = False) -> FoundCalls | None:
        found = self.find(text, start)
        return None if found is None else FoundCalls(found[0], self.parse(text, found[1]))

    def _render_call(self, call: ToolCall, marks: TokenMarks, where: str) -> str:
        check_name(call.name, where)
        arguments = arguments_text(parse_call_arguments(call, where))
        return f"{self.call_begin(call.name)}{escape_markup(arguments, self.markup, marks)}{self.call_end}"

    def _parse_call(self, text: str, position: int, index: int) -> tuple[ToolCall, int]:
        position = expect(text, position, self.before_name.strip())
        position = skip_space(text, position)
        name, position = read_name(text, position)
        position = expect(text, skip_space(text, position), self.before_arguments.strip())
        arguments, position = read_object(text, skip_space(text, position))
        position = expect(text, skip_space(text, position), self.call_end.strip())
        return ToolCall(f"call_{index}", name, arguments), position


@dataclass(frozen=True, slots=True)
class HermesCallFormat(JsonCallFormat):
    """`<tool_call>` around one JSON object with `name` and `arguments`; models write its keys in either order."""

    def _parse_call(self, text: str, position: int, index: int) -> tuple[ToolCall, int]:
        position = skip_space(text, expect(text, position, "<tool_call>"))
        try:
            value, end = value_at(text, position)
        except NotJson as error:
            raise malformed_call(position, "a JSON object with `name` and `arguments`", str(error)) from error
        if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
            raise malformed_call(position, "an object of `name` and `arguments`", abbreviate(value))
        name, arguments = value["name"], value["arguments"]
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            raise malformed_call(position, "a function's name", abbreviate(name))
        if not isinstance(arguments, dict):
            raise malformed_call(position, "a JSON object as `arguments`", abbreviate(arguments))
        position = expect(text, skip_space(text, end), "</tool_call>")
        return ToolCall(f"call_{index}", name, arguments_text(arguments)), position


_V3_TOKENS = {
    "begin": "<｜tool▁calls▁begin｜>",
    "call": "<｜tool▁call▁begin｜>",
    "sep": "<｜tool▁sep｜>",
    "call_end": "<｜tool▁call▁end｜>",
    "end": "<｜tool▁calls▁end｜>",
}

DEEPSEEK_V3 = JsonCallFormat(
    name="deepseek_v3",
    begin=_V3_TOKENS["begin"],
    before_name=f"{_V3_TOKENS['call']}function{_V3_TOKENS['sep']}",
    before_arguments="\n```json\n",
    call_end=f"\n```{_V3_TOKENS['call_end']}",
    between="\n",
    end=_V3_TOKENS["end"],
    opening=_V3_TOKENS["begin"],
    call_opening=_V3_TOKENS["call"],
    markup=frozenset(_V3_TOKENS.values()),
)

DEEPSEEK_V3_1 = JsonCallFormat(
    name="deepseek_v3_1",
    begin=_V3_TOKENS["begin"],
    before_name=_V3_TOKENS["call"],
    before_arguments=_V3_TOKENS["sep"],
    call_end=_V3_TOKENS["call_end"],
    between="",
    end=_V3_TOKENS["end"],
    opening=_V3_TOKENS["begin"],
    call_opening=_V3_TOKENS["call"],
    markup=frozenset(_V3_TOKENS.values()),
)

HERMES = HermesCallFormat(
    name="hermes",
    begin="",
    before_name='<tool_call>\n{"name": "',
    before_arguments='", "arguments": ',
    call_end="}\n</tool_call>",
    between="\n",
    end="",
    opening="<tool_call>",
    call_opening="<tool_call>",
    markup=frozenset({"<tool_call>", "</tool_call>"}),
    separator="\n",
)


def format_of_template(source: str) -> JsonCallFormat | None:
    """Recognises a chat template's format of calls by the markers in its source; None if it has none."""
    if _V3_TOKENS["begin"] in source or _V3_TOKENS["call"] in source:
        # V3 and R1 fence the arguments as Markdown, V3.1 puts them behind the separator.
        return DEEPSEEK_V3 if "```json" in source else DEEPSEEK_V3_1
    if "<tool_call>" in source and '"arguments"' in source.replace("\\", "") and "<function=" not in source:
        return HERMES
    return None


def escape_markup(json_text: str, markup: frozenset[str], marks: TokenMarks) -> str:
    """Escapes every `<` as `\\u003c` where a JSON text spells markup; its value stays the same."""
    if marks.has_token_text(json_text) or any(token in json_text for token in markup) or "<｜" in json_text:
        json_text = json_text.replace("<", "\\u003c")
    return marks.mark(json_text)


def check_name(name: str, where: str) -> None:
    """Refuse a function's name that could be taken for markup.

    Raises:
        InvalidMessages: begins with `where`.
    """
    if not TOOL_NAME.fullmatch(name):
        raise InvalidMessages(
            f"{where}.name: expected 1 to 128 letters, digits, or any of _ . : -, found {abbreviate(name)}"
        )


def parse_call_arguments(call: ToolCall, where: str) -> dict[str, Json]:
    """The arguments of a call that is to be rendered.

    Raises:
        InvalidMessages: begins with `where`.
    """
    try:
        return parse_object(call.arguments)
    except NotJson as error:
        raise InvalidMessages(f"{where}.arguments: expected a JSON object, found: {error}") from error


def malformed_call(position: int, expected: str, found: str) -> MalformedToolCall:
    """The error for calls that cannot be parsed, with the character at fault."""
    return MalformedToolCall(f"at character {position}: expected {expected}, found {found}")


def excerpt(text: str, position: int) -> str:
    """The text at a character, shortened for an error message."""
    if position >= len(text):
        return "the end of the answer"
    return abbreviate(text[position : position + _MAX_EXCERPT])


def skip_space(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def expect(text: str, position: int, literal: str) -> int:
    """Skips a fixed text; returns the position after it.

    Raises:
        MalformedToolCall: another text stands there.
    """
    if not text.startswith(literal, position):
        raise malformed_call(position, repr(literal), excerpt(text, position))
    return position + len(literal)


def expect_end(text: str, position: int) -> None:
    """Only white space may follow the calls.

    Raises:
        MalformedToolCall: something else does.
    """
    position = skip_space(text, position)
    if position < len(text):
        raise malformed_call(position, "the end of the answer after the calls", excerpt(text, position))


def read_name(text: str, position: int) -> tuple[str, int]:
    """A function's name, and the character after it.

    Raises:
        MalformedToolCall: none stands there.
    """
    found = TOOL_NAME.match(text, position)
    if found is None:
        raise malformed_call(position, "a function's name", excerpt(text, position))
    return found[0], found.end()


def read_object(text: str, position: int) -> tuple[str, int]:
    """The object at a position, serialised again as JSON, and the position after it.

    Raises:
        MalformedToolCall: none stands there.
    """
    try:
        value, end = value_at(text, position)
    except NotJson as error:
        raise malformed_call(position, "a JSON object", str(error)) from error
    if not isinstance(value, dict):
        raise malformed_call(position, "a JSON object", abbreviate(value))
    return json.dumps(value, ensure_ascii=False), end


def find_opening(text: str, start: int, opening: str, separator: str) -> tuple[int, int] | None:
    """Where content ends (before the separator, if it stands there) and where an opening text begins."""
    begin = text.find(opening, start)
    if begin < 0:
        return None
    is_separated = separator and text.endswith(separator, start, begin)
    return (begin - len(separator) if is_separated else begin), begin
