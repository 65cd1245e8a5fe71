"""Reads DSML calls that break the format where their meaning is certain, and tells them from text that mentions them.

`dsml.py` reads calls strictly and comes here when that fails. Models leave out an attribute, a closing tag or the tags
around the calls, misspell a tag, or write on behind the calls. What was mended is named, one `Repair` each. Certain
it is not where a value has no end, a parameter comes twice with different values, the answer was cut, or there is text
where a tag should be: those stay errors. A tag within a sentence or in a fenced example is text.
"""

import contextlib
import html
import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

from moebeam.model_runner.encoding.chat.call_formats import (
    TOOL_NAME,
    FoundCalls,
    excerpt,
    malformed_call,
    skip_space,
)
from moebeam.model_runner.encoding.chat.strict_arguments import arguments_text, parse_object, parse_value, value_at
from moebeam.model_runner.encoding.deepseek.dsml_tags import (
    CUT_BEGIN,
    CUT_END,
    ESCAPED_TAG,
    LOOSE_PARAMETER_END,
    TAG,
    Tag,
    list_tags,
)
from moebeam.model_runner.encoding.deepseek.parameter_types import ONLY_TEXT, find_types, is_of_types
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import Tool
from moebeam.schemas.errors import MalformedToolCall, NotJson
from moebeam.schemas.records import ToolCall

Repair: TypeAlias = Literal[
    "misspelt_tag",
    "escaped_markup",
    "string_attribute",
    "text_for_json",
    "parameter_not_closed",
    "repeated_parameter",
    "json_for_parameters",
    "wrapped_arguments",
    "call_not_closed",
    "block_not_opened",
    "block_not_closed",
    "several_blocks",
    "text_after_calls",
]
"""What may be mended, as the column `repaired` names it."""

_LINE_END = re.compile(r"[^\n]*")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_NOT_ITS_OWN = ("<tool_result", "<function_results", "<\uff5c")
"""What a model that makes up results or turns writes behind its calls."""

_QUOTES = "`'\"(\u201c\u2018\u00ab"
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def mend_calls(
    text: str, start: int, *, exact_tags: frozenset[str], tools: Sequence[Tool] = (), is_cut: bool = False
) -> FoundCalls | None:
    """The calls of an answer from a character on; None where it only mentions the markup.

    Args:
        exact_tags: the beginnings of the tags as they should be.
        tools: those that could be called; their schemas tell how a value is meant.
        is_cut: the answer ended for want of tokens, so that what is missing at its end is not certain.
    Raises:
        MalformedToolCall: calls were begun, and what they mean is not certain.
    """
    repairs: set[Repair] = set()
    if (escaped := ESCAPED_TAG.search(text, start)) and not TAG.search(text, start):
        text = text[: escaped.start()] + html.unescape(text[escaped.start() :])
        repairs.add("escaped_markup")
    tags = list_tags(text, start, exact_tags)
    genuine = [tag for tag in tags if tag.is_genuine]
    if genuine and len(genuine) < len(tags):
        # Beside genuine tags, look-alikes are text that a value holds, unless nothing can be read without them.
        with contextlib.suppress(MalformedToolCall):
            if (found := _Reader(text, start, genuine, tools, is_cut, set(repairs)).read()) is not None:
                return found
    return _Reader(text, start, tags, tools, is_cut, repairs).read()


@dataclass(slots=True)
class _Reader:
    """Reads the tags of one answer in order; `repairs` collects what was mended."""

    text: str
    start: int
    tags: Sequence[Tag]
    tools: Sequence[Tool]
    is_cut: bool
    repairs: set[Repair]
    calls: list[ToolCall] = field(default_factory=list[ToolCall])
    at: int = 0  # the next tag
    position: int = 0
    _fences: list[int] = field(init=False)
    _ends_with_tag: bool = field(init=False)

    def __post_init__(self) -> None:
        # Content begins a line, although it stands directly behind `</think>`.
        self._fences = [self.start + found.start() for found in _FENCE.finditer(self.text[self.start :])]
        line = _LINE_END.search(self.text, self.tags[-1].end) if self.tags else None
        self._ends_with_tag = line is not None and not line[0].strip()

    def read(self) -> FoundCalls | None:
        first = self._find_first(self.start)
        if first is None:
            self._refuse_begun()
            return None
        begin, self.at = self.tags[first].begin, first
        self.position = begin
        rests: list[str] = []
        while True:
            self._read_block()
            following = self._find_first(self.position, self.at)
            end = len(self.text) if following is None else self.tags[following].begin
            rests.append(self.text[self.position : end])
            if following is None:
                break
            self.repairs.add("several_blocks")
            self.at, self.position = following, self.tags[following].begin
        rest = self._check_rests(rests)
        if rest:
            self.repairs.add("text_after_calls")
        content_end = begin - len(_trailing_break(self.text[self.start : begin], is_exact=not self.repairs))
        return FoundCalls(content_end, tuple(self.calls), rest, tuple(sorted(self.repairs)))

    def _find_first(self, start: int, first: int = 0) -> int | None:
        """The tag that opens calls: a block with a call in it, or a call, on a line of its own."""
        for index in range(first, len(self.tags)):
            tag = self.tags[index]
            if tag.begin < start or tag.is_end or tag.kind not in ("block", "invoke"):
                continue
            inside = index + 1 if tag.kind == "block" else index
            if inside >= len(self.tags) or not self._is_call(inside):
                continue
            if tag.kind == "block" and self.text[tag.end : self.tags[inside].begin].strip():
                continue
            if self._begins_line(tag.begin) and not self._is_fenced(start, tag.begin):
                return index
        return None

    def _is_call(self, index: int) -> bool:
        """Whether a tag opens a call: with a name that a function may have, and followed by what belongs to it."""
        tag = self.tags[index]
        if tag.kind != "invoke" or tag.is_end or not TOOL_NAME.fullmatch(tag.attributes.get("name", "")):
            return False
        if tag.is_empty:
            return True
        following = skip_space(self.text, tag.end)
        is_tag = index + 1 < len(self.tags) and self.tags[index + 1].begin == following
        return is_tag or self.text.startswith("{", following) or following == len(self.text)

    def _begins_line(self, position: int) -> bool:
        """Whether a tag stands where calls do: on a line of its own, or behind a sentence and at the text's end."""
        before = position
        while before > self.start and self.text[before - 1] in " \t\r":
            before -= 1
        is_alone = before <= self.start or self.text[before - 1] == "\n"
        return is_alone or (self.text[before - 1] not in _QUOTES and self._ends_with_tag)

    def _is_fenced(self, start: int, position: int) -> bool:
        return (bisect_left(self._fences, position) - bisect_left(self._fences, start)) % 2 == 1

    def _refuse_begun(self) -> None:
        """Raises where the text opens calls without any that can be read, or ends in the midst of such a tag."""
        for tag in self._list_begun():
            if self._begins_line(tag.begin) and not self._is_fenced(self.start, tag.begin):
                raise malformed_call(tag.begin, "calls, each with its name", excerpt(self.text, tag.begin))
        line = max(self.text.rfind("\n", self.start) + 1, self.start)
        if (cut := CUT_BEGIN.fullmatch(self.text, skip_space(self.text, line))) and len(cut[0]) > 1:
            raise malformed_call(cut.start(), "calls", excerpt(self.text, cut.start()))

    def _list_begun(self) -> list[Tag]:
        """The tags that open something, and that only tags follow, or an end on another line."""
        begun: list[Tag] = []
        following, has_end = "", False
        for tag, later in zip(reversed(self.tags), (None, *reversed(self.tags)), strict=False):
            gap = self.text[tag.end : len(self.text) if later is None else later.begin]
            following = gap.lstrip()[:1] or following
            is_open_call = tag.kind == "invoke" and has_end and not gap.split("\n", 1)[0].strip()
            is_begun = is_open_call or following in ("", "<", "{")
            is_example = "$" in tag.attributes.get("name", "")
            if is_begun and tag.kind in ("block", "invoke") and not tag.is_end and not is_example:
                begun.append(tag)
            has_end = has_end or tag.is_end
        return begun[::-1]

    def _next_tag(self) -> Tag | None:
        """The tag that stands at the position, white space before it left out; None where none does."""
        self.position = skip_space(self.text, self.position)
        while self.at < len(self.tags) and self.tags[self.at].begin < self.position:
            self.at += 1
        tag = self.tags[self.at] if self.at < len(self.tags) else None
        return tag if tag is not None and tag.begin == self.position else None

    def _take(self, tag: Tag) -> None:
        if not tag.is_exact:
            self.repairs.add("misspelt_tag")
        self.position, self.at = tag.end, self.at + 1

    def _read_block(self) -> None:
        """Reads one block, with or without the tags around it."""
        tag = self._next_tag()
        assert tag is not None
        if tag.kind == "block":
            self._take(tag)
        else:
            self.repairs.add("block_not_opened")
        while True:
            tag = self._next_tag()
            if tag is None or tag.kind == "other" or (tag.kind == "block" and not tag.is_end):
                break
            if tag.kind == "block":
                self._take(tag)
                return
            if tag.is_end:
                self._take(tag)
                self.repairs.add("misspelt_tag")  # a closing tag once more
                continue
            self._read_call(tag)
        self._note_missing_end("block_not_closed")

    def _note_missing_end(self, repair: Repair) -> None:
        is_at_end = self.position >= len(self.text) or CUT_END.fullmatch(self.text, self.position)
        if self.is_cut and is_at_end:
            raise malformed_call(self.position, "the end of the calls", "the end of an answer that was cut")
        self.repairs.add(repair)

    def _read_call(self, tag: Tag) -> None:
        name = tag.attributes.get("name", "")
        if tag.kind != "invoke" or not TOOL_NAME.fullmatch(name):
            raise malformed_call(tag.begin, "a call with the name of a function", excerpt(self.text, tag.begin))
        self._take(tag)
        arguments: dict[str, Json] = {}
        if not tag.is_empty:
            self._read_parameters(name, arguments)
        arguments = self._unwrap(name, arguments)
        self.calls.append(ToolCall(f"call_{len(self.calls)}", name, arguments_text(arguments)))

    def _read_parameters(self, function: str, arguments: dict[str, Json]) -> None:
        begin = skip_space(self.text, self.position)
        while True:
            tag = self._next_tag()
            if tag is not None and tag.kind == "parameter" and not tag.is_end:
                self._read_parameter(function, tag, arguments)
            elif tag is not None and tag.kind == "invoke" and tag.is_end:
                self._take(tag)
                return
            elif tag is not None and tag.kind == "parameter":
                self._take(tag)
                self.repairs.add("misspelt_tag")  # a closing tag once more
            elif self.position == begin and self.text.startswith("{", begin):
                self._read_json(arguments)
            elif tag is not None and tag.kind in ("block", "invoke"):
                self.repairs.add("call_not_closed")
                return
            elif self.position >= len(self.text) or CUT_END.fullmatch(self.text, self.position):
                self._note_missing_end("call_not_closed")
                return
            else:
                raise malformed_call(self.position, "a parameter or the call's end", excerpt(self.text, self.position))

    def _read_json(self, arguments: dict[str, Json]) -> None:
        try:
            value, end = value_at(self.text, self.position)
        except NotJson as error:
            raise malformed_call(self.position, "parameters or a JSON object", str(error)) from error
        arguments |= cast("dict[str, Json]", value)
        self.repairs.add("json_for_parameters")
        self.position = end

    def _read_parameter(self, function: str, tag: Tag, arguments: dict[str, Json]) -> None:
        name = tag.attributes.get("name")
        if name is None:
            raise malformed_call(tag.begin, "a parameter's name", excerpt(self.text, tag.begin))
        self._take(tag)
        written = "" if tag.is_empty else self._read_written(tag.end)
        value = self._decode(function, name, tag.attributes.get("string"), written, tag.end)
        if name in arguments:
            if arguments[name] != value:
                raise malformed_call(tag.begin, "every parameter once", f"{name!r} again, with another value")
            self.repairs.add("repeated_parameter")
        arguments[name] = value

    def _read_written(self, begin: int) -> str:
        """A value as it is written, up to the tag that closes it."""
        tag = self.tags[self.at] if self.at < len(self.tags) else None
        if tag is None:
            raise malformed_call(begin, "a value with an end", "the end of the answer")
        if tag.kind == "other" or (tag.kind == "block" and not tag.is_end):
            raise malformed_call(tag.begin, "a value without markup", excerpt(self.text, tag.begin))
        written = self.text[begin : tag.begin]
        if tag.kind == "parameter" and tag.is_end:
            self._take(tag)
            return written
        self.repairs.add("parameter_not_closed")
        self.position = tag.begin
        if plain := LOOSE_PARAMETER_END.search(written):
            return written[: plain.start()].removesuffix("\n")
        # The line break before the next tag is the format's.
        return written.removesuffix("\n")

    def _decode(self, function: str, name: str, is_string: str | None, written: str, begin: int) -> Json:
        """The value that a text means, by its attribute, its parameter's schema, and whether it is JSON."""
        types = find_types(self.tools, function, name)
        attribute = (is_string or "").strip().lower()
        is_known = attribute in ("true", "false")
        if not is_known:
            self.repairs.add("string_attribute")
            attribute = "true" if types == ONLY_TEXT else "false"
        if attribute == "true" and (not types or "string" in types):
            return written
        try:
            value = parse_value(_PYTHON_WORDS.get(written.strip(), written))
        except NotJson as error:
            if attribute == "false" and _is_json(written):
                raise malformed_call(begin, "a JSON value", str(error)) from error
            if attribute == "false" and is_known:
                self.repairs.add("text_for_json")
            return written
        if attribute == "true" and not is_of_types(value, types or ()):
            return written
        if attribute == "true" or (types == ONLY_TEXT and not isinstance(value, str)):
            self.repairs.add("string_attribute")
        return written if types == ONLY_TEXT and not isinstance(value, str) else value

    def _unwrap(self, function: str, arguments: dict[str, Json]) -> dict[str, Json]:
        """The arguments that stand as one parameter named `arguments`, of a function that has none of that name."""
        inner = unwrap_arguments(arguments, function, self.tools)
        if inner is None:
            return arguments
        self.repairs.add("wrapped_arguments")
        return inner

    def _check_rests(self, rests: Sequence[str]) -> str:
        """The text behind and between the blocks, without the line breaks that separate it."""
        texts = [text for rest in rests if (text := rest.strip())]
        if texts and CUT_END.fullmatch(texts[-1]):
            self.repairs.add("block_not_closed")
            del texts[-1]
        for text in texts:
            if any(mark in text for mark in _NOT_ITS_OWN) or TAG.search(text):
                raise malformed_call(self.text.index(text), "the end of the answer after the calls", excerpt(text, 0))
        return "\n\n".join(texts)


def is_meant_otherwise(call: ToolCall, tools: Sequence[Tool]) -> bool:
    """Whether arguments that keep the format are not what the function takes, so that another reading is looked for."""
    arguments = parse_object(call.arguments)
    if unwrap_arguments(arguments, call.name, tools) is not None:
        return True
    return any(
        bool(types := find_types(tools, call.name, name))
        and not is_of_types(value, types)
        and (isinstance(value, str) or types == ONLY_TEXT)
        for name, value in arguments.items()
    )


def unwrap_arguments(arguments: Mapping[str, Json], function: str, tools: Sequence[Tool]) -> dict[str, Json] | None:
    """The arguments within one parameter named `arguments`; None where that is the function's own, or is no object."""
    if list(arguments) != ["arguments"] or find_types(tools, function, "arguments") is not None:
        return None
    inner = arguments["arguments"]
    if isinstance(inner, str):
        try:
            inner = parse_value(inner)
        except NotJson:
            return None
    return dict(inner) if isinstance(inner, Mapping) else None


def _is_json(text: str) -> bool:
    """Whether a text is JSON, though perhaps one that two readers could read differently."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _trailing_break(content: str, *, is_exact: bool) -> str:
    """The line breaks that separate content from calls: the blank line of the format, or one where calls break it."""
    kept = content.rstrip("\n")
    found = content[max(len(kept), len(content) - 2) :]
    return "" if is_exact and found == "\n" else found
