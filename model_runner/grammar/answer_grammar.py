"""Builds the grammar of a whole answer: reasoning, then free text, JSON or calls of tools, as llguidance Lark.

The *render* stage turns a request's `ChatOptions` and its model's format of calls into the text of `Request.grammar`;
engines compile it (`constraint.py`). Equal requests have equal texts, so that a grammar is compiled once.

    built = build_answer_grammar(options, schema=schema, call_format="deepseek_v4", starts_in_reasoning=True,
                                 token_id=tokenizer.token_to_id)

Markup that is one token of the tokenizer is written as its number, because text never spells such a token; other markup
is written as text. Free text and raw strings never spell the markup of calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING
from moebeam.model_runner.encoding.chat.call_formats import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_1,
    HERMES,
    CallFormat,
    JsonCallFormat,
)
from moebeam.model_runner.encoding.deepseek.dsml import DSML, V3_2_CALLS, V4_1_CALLS, V4_CALLS, DsmlFormat
from moebeam.model_runner.grammar.json_grammar import enforceable_schema, json_schema_grammar
from moebeam.model_runner.grammar.lark_writer import LarkWriter
from moebeam.model_runner.grammar.parameter_grammar import ParameterWriter
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import ChatOptions, Tool
from moebeam.schemas.contract.answer_schema import Formats
from moebeam.schemas.errors import InvalidGrammar

CALL_FORMATS: Mapping[str, CallFormat] = {
    known.name: known for known in (V4_CALLS, V3_2_CALLS, V4_1_CALLS, DEEPSEEK_V3, DEEPSEEK_V3_1, HERMES)
}
"""The formats for which there are grammars, by `CallFormat.name`."""

CHARACTERS_PER_TOKEN = 4
"""By which `max_reasoning_tokens` is counted for a tokenizer that spells `</think>` in pieces."""

_BLANK = r"/\n{1,2}/"


@dataclass(frozen=True, slots=True)
class BuiltGrammar:
    """A grammar and what it leaves to validation.

    Attributes:
        text: JSON, as `Request.grammar` takes it.
        relaxed: pointers of a tool's parameters begin with `/tools/NAME/parameters`.
        narrowed: keywords by which valid values, or a usual way to write them, are left out.
    """

    text: str
    relaxed: tuple[Relaxation, ...]
    narrowed: tuple[Relaxation, ...] = ()


def find_content_schema(options: ChatOptions, schema: Json | None) -> Json | None:
    """The schema of an answer's content: the given one, else what the response format says; None for any text."""
    if schema is not None or options.response_format.type == "text":
        return schema
    return options.response_format.schema if options.response_format.type == "json_schema" else {"type": "object"}


def build_answer_grammar(
    options: ChatOptions,
    *,
    schema: Json | None,
    call_format: str | None,
    starts_in_reasoning: bool,
    token_id: Callable[[str], int | None],
    formats: Formats = "assert",
) -> BuiltGrammar | None:
    """The grammar of a request's answer; None where any text is one.

    An answer is at most `max_reasoning_tokens` of reasoning and `</think>`, where the prompt ends within the reasoning;
    then, by `tool_choice`, calls, or either calls or the content. Content before calls is free text; where a form of
    the content is asked for, there is none before calls. Called functions keep their schemas, strict or not, once there
    is a grammar; properties that are not declared are not generated for DSML.

    Args:
        schema: of the content; None takes what `options.response_format` says.
        call_format: name of the encoding's way to write calls; None where it has none.
        token_id: the tokenizer's id of a token's text, or None.
        formats: whether validation asserts `format` of the content.
    Raises:
        InvalidGrammar: no text is an answer, because the schema refuses every value.
    """
    schema = find_content_schema(options, schema)
    style = CALL_FORMATS.get(call_format) if call_format is not None else None
    tools = options.callable_tools if style is not None else ()
    must_call = options.tool_choice.mode in ("required", "named") and bool(tools)
    has_budget = starts_in_reasoning and options.max_reasoning_tokens is not None
    has_limits = bool(tools) and (must_call or not options.parallel_tool_calls or any(tool.is_strict for tool in tools))
    if schema is None and not has_limits and not has_budget:
        return None
    content = None if schema is None or must_call else enforceable_schema(schema, formats=formats)
    if content is not None and not tools and not starts_in_reasoning:
        return BuiltGrammar(json_schema_grammar(content.document), content.relaxed, content.narrowed)
    writer = LarkWriter(token_id, {END_OF_THINKING} | (style.markup if style is not None else frozenset()))
    relaxed = list(content.relaxed if content is not None else ())
    narrowed = list(content.narrowed if content is not None else ())
    start: list[str] = []
    if starts_in_reasoning:
        start.append(_write_reasoning(writer, options.max_reasoning_tokens))
    bodies: list[str] = []
    if content is not None:
        # Models are used to begin behind a blank line.
        blank = f"{writer.terminal('BLANK', _BLANK)}? " if starts_in_reasoning else ""
        bodies.append(writer.rule("content", blank + writer.json(content.document)))
    if style is not None and tools:
        opening, calls = _write_calls(
            writer, tools, style, relaxed, narrowed, is_single=not options.parallel_tool_calls
        )
        bodies.append(writer.rule("calls", f"{writer.literal(opening)} {calls}"))
        if content is None and not must_call:
            text = writer.text_without("TEXT", style.opening if isinstance(style, JsonCallFormat) else DSML)
            bodies = [text, writer.rule("text_and_calls", f"{writer.until('until_calls', text, opening)} {calls}")]
    if not bodies:
        bodies.append(writer.terminal("TEXT", "/(?s:.*)/"))
    start.append(writer.rule("body", " | ".join(bodies)))
    return BuiltGrammar(writer.write(" ".join(start)), tuple(relaxed), tuple(narrowed))


def _write_reasoning(writer: LarkWriter, max_tokens: int | None) -> str:
    """Text up to `</think>`, which must come when the tokens are used up.

    llguidance counts tokens up to a token, not up to a text: where the tokenizer has no `</think>`, characters count.
    """
    if max_tokens is not None and writer.is_token(END_OF_THINKING):
        thought = writer.text_without("THOUGHT", END_OF_THINKING)
        limited = writer.rule("thought", thought, options=f"[max_tokens={max_tokens}]")
        return writer.rule("reasoning", f"{limited} {writer.literal(END_OF_THINKING)}")
    max_characters = None if max_tokens is None else max_tokens * CHARACTERS_PER_TOKEN
    thought = writer.text_without("THOUGHT", END_OF_THINKING, max_characters=max_characters)
    return writer.until("reasoning", thought, END_OF_THINKING)


def _write_calls(
    writer: LarkWriter,
    tools: Sequence[Tool],
    style: CallFormat,
    relaxed: list[Relaxation],
    narrowed: list[Relaxation],
    *,
    is_single: bool,
) -> tuple[str, str]:
    """Calls of tools: the fixed text that they begin with, and a rule of all that follows it."""
    before_name, _ = style.call_begin("?").split("?")
    calls: list[str] = []
    for index, tool in enumerate(tools):
        document = _enforce_arguments(tool, relaxed, narrowed)
        if isinstance(style, DsmlFormat):
            arguments = ParameterWriter(writer, style, f"tool{index}").arguments(document)
        else:
            arguments = writer.json(document)
        rest = style.call_begin(tool.name).removeprefix(before_name)
        # A line that DSML ends its parameters with stands before the tag already.
        end = style.call_end.removeprefix(style.between) if style.arguments == "dsml" else style.call_end
        calls.append(writer.rule(f"tool{index}", f"{writer.literal(rest)} {arguments} {writer.literal(end)}"))
    call = writer.rule("call", " | ".join(calls))
    end = writer.literal(style.end) if style.end else ""
    more = "" if is_single else f"({writer.literal(style.between + before_name)} {call})*"
    return style.begin + before_name, writer.rule("more_calls", f"{call} {more} {end}".strip())


def _enforce_arguments(tool: Tool, relaxed: list[Relaxation], narrowed: list[Relaxation]) -> Mapping[str, Json]:
    """The schema of a tool's arguments, which are an object whatever it says."""
    pointer = f"/tools/{tool.name}/parameters"
    parameters = tool.parameters
    schema: Mapping[str, Json] = parameters if isinstance(parameters, Mapping) else {}
    try:
        enforceable = enforceable_schema({**schema, "type": "object"})
    except InvalidGrammar:
        relaxed.append(Relaxation(pointer, "type", "no object keeps this schema"))
        return enforceable_schema({"type": "object"}).document
    for named, entries in ((relaxed, enforceable.relaxed), (narrowed, enforceable.narrowed)):
        named += [replace(entry, pointer=pointer + entry.pointer) for entry in entries]
    return enforceable.document
