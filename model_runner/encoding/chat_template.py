"""Renders prompts with a checkpoint's Jinja chat template: DeepSeek-V3, R1 and V3.1, and all other families.

The environment is the one that Hugging Face documents. How the model writes calls and whether it reasons is read from
the markers in the template's source.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Self, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from moebeam.model_runner.checkpoint.files import read_checkpoint_file, read_json_object
from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING, THINK, ParsedAnswer, parse_answer
from moebeam.model_runner.encoding.chat.call_formats import JsonCallFormat, format_of_template
from moebeam.model_runner.encoding.chat.conversation import check_messages, is_prefix
from moebeam.model_runner.encoding.chat.token_marks import NO_MARKS, TokenMarks
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import DEFAULT_OPTIONS, ChatOptions
from moebeam.schemas.errors import EngineLoadError, InvalidMessages
from moebeam.schemas.records import Message, ToolCall
from moebeam.schemas.store import storage

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_NAME, _TOOLS_NAME = "default", "tool_use"
_END_OF_PREFIX = "\ufdd1"
"""A noncharacter behind the text that is gone on with: its end is found by it, and templates do not trim it."""


class ChatTemplate:
    """See `ChatEncoding`; immutable.

    Args:
        source: the template.
        tool_source: the template for chats with tools, where the checkpoint has one of its own.
        special_tokens: `bos_token` and its kin as text, which templates print.
        marks: the tokens that data must not spell.
    Raises:
        jinja2.TemplateError: a source is no Jinja.
    """

    name = "chat_template"

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        marks: TokenMarks = NO_MARKS,
    ) -> None:
        environment = _build_environment()
        self._template = environment.from_string(source)
        self._tool_template = environment.from_string(tool_source) if tool_source is not None else self._template
        self._special_tokens = dict(special_tokens or {})
        self._marks = marks
        both = source + (tool_source or "")
        self.call_format: JsonCallFormat | None = format_of_template(both)
        self.has_reasoning: bool = THINK in both or END_OF_THINKING in both
        self._probes: dict[tuple[bool | None, str | None], bool] = {}

    @classmethod
    def load(cls, path: str, settings: Mapping[str, Any], marks: TokenMarks = NO_MARKS) -> Self:
        """The template of `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`.

        Args:
            settings: what `tokenizer_config.json` holds.
        Raises:
            EngineLoadError: there is none, or it is no Jinja; names the file.
        """
        tool_source = None
        file = TEMPLATE_FILE
        if storage.exists(storage.join(path, file)):
            try:
                source = read_checkpoint_file(path, file).decode("utf-8")
            except UnicodeDecodeError as error:
                raise EngineLoadError(f"{storage.join(path, file)}: expected UTF-8 text, found: {error}") from error
        else:
            file = SETTINGS_FILE
            source, tool_source = _read_templates(path, settings.get("chat_template"))
        tokens = _read_special_tokens(path, settings)
        try:
            return cls(source, tool_source=tool_source, special_tokens=tokens, marks=marks)
        except jinja2.TemplateError as error:
            raise EngineLoadError(
                f"{storage.join(path, file)}: expected a Jinja chat template, found: {error}"
            ) from error

    @property
    def markup(self) -> frozenset[str]:
        reasoning = {THINK, END_OF_THINKING} if self.has_reasoning else set[str]()
        return frozenset(reasoning) | (self.call_format.markup if self.call_format else frozenset())

    def is_thinking(self, options: ChatOptions) -> bool:
        """Renders a small chat to find out, because only the template knows what the options do."""
        key = options.thinking, options.reasoning_effort
        if key not in self._probes:
            probe = ChatOptions(thinking=options.thinking, reasoning_effort=options.reasoning_effort)
            try:
                self._probes[key] = self.starts_in_reasoning(self.render([Message("user", "x")], probe))
            except InvalidMessages:
                self._probes[key] = False
        return self._probes[key]

    def render(self, messages: Sequence[Message], options: ChatOptions = DEFAULT_OPTIONS) -> str:
        check_messages(messages)
        completes_prefix = is_prefix(messages)
        chat = [self._template_message(message) for message in messages]
        if completes_prefix:
            chat[-1]["content"] += _END_OF_PREFIX
        tools = self._template_tools(options)
        template = self._tool_template if tools else self._template
        variables = {**self._special_tokens, **tools, **_list_switches(options)}
        try:
            prompt = template.render(messages=chat, add_generation_prompt=not completes_prefix, **variables)
        except jinja2.TemplateError as error:
            raise InvalidMessages(f"the chat template refused the messages: {error}") from error
        except Exception as error:
            # A template is foreign code: a chat that it did not expect may raise anything.
            raise InvalidMessages(f"the chat template failed: {type(error).__name__}: {error}") from error
        return _cut_at_end(prompt) if completes_prefix else prompt

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model writes them.

        Raises:
            InvalidMessages: the template knows no calls, or these cannot be written.
        """
        if not calls:
            return ""
        if self.call_format is None:
            raise InvalidMessages("tool_calls: expected none, because the model's chat template knows no calls")
        return self.call_format.render(calls, marks=self._marks)

    def parse(self, text: str, *, starts_in_reasoning: bool, has_tools: bool) -> ParsedAnswer:
        return parse_answer(
            text,
            starts_in_reasoning=starts_in_reasoning,
            has_reasoning=self.has_reasoning,
            call_format=self.call_format if has_tools else None,
            end_marker=self._special_tokens.get("eos_token"),
        )

    def starts_in_reasoning(self, prompt_tail: str) -> bool:
        """Whether the prompt ends with an open `<think>`, as that of R1 does."""
        return prompt_tail.rstrip().endswith(THINK)

    def _template_message(self, message: Message) -> dict[str, Any]:
        # Templates look for the reasoning in what an assistant said.
        but = (THINK, END_OF_THINKING) if message.role == "assistant" else ()
        extra = {key: self._marks.mark_json(value, but=but) for key, value in message.extra.items()}
        return {**extra, "role": message.role, "content": self._marks.mark(message.content, but=but)}

    def _template_tools(self, options: ChatOptions) -> dict[str, Json]:
        if not options.tools or options.tool_choice.mode == "none":
            return {}
        return {
            "tools": [{"type": "function", "function": self._marks.mark_json(tool.document)} for tool in options.tools]
        }


def _list_switches(options: ChatOptions) -> dict[str, Json]:
    """The variables by which templates switch thinking; undefined where a request does not ask."""
    switches: dict[str, Json] = {}
    if options.thinking is not None:
        switches |= {"thinking": options.thinking, "enable_thinking": options.thinking}
    if options.reasoning_effort is not None:
        switches["reasoning_effort"] = options.reasoning_effort
    return switches


def _cut_at_end(prompt: str) -> str:
    """The prompt up to the end of the text that the model goes on with, without what the template puts behind it."""
    end = prompt.rfind(_END_OF_PREFIX)
    if end < 0:
        raise InvalidMessages("the chat template does not show the prefix that the last message asks to complete")
    return prompt[:end]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks answers for training; a prompt keeps the body as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _build_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that Hugging Face documents for chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    functions = cast("dict[str, Any]", environment.globals)
    functions["raise_exception"] = _raise_exception
    functions["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # UTC, because workers of one job may run in different time zones.
    return datetime.now(UTC).strftime(pattern)


def _read_templates(path: str, found: object) -> tuple[str, str | None]:
    """The default template, and the one for tools where there are named ones."""
    tool_source: object = None
    if isinstance(found, list):
        named = {
            str(entry.get("name")): entry.get("template")
            for entry in cast("list[Any]", found)
            if isinstance(entry, dict)
        }
        found, tool_source = named.get(_DEFAULT_NAME), named.get(_TOOLS_NAME)
        if found is None:
            raise EngineLoadError(
                f"{storage.join(path, SETTINGS_FILE)}: expected a chat template named `{_DEFAULT_NAME}`, "
                f"found only: {', '.join(sorted(named)) or 'none'}"
            )
    if not isinstance(found, str):
        raise EngineLoadError(
            f"{path}: expected a chat template in {TEMPLATE_FILE} or as `chat_template` in {SETTINGS_FILE}, "
            f"found {'none' if found is None else type(found).__name__}. How this model wants its chats laid out is "
            f"not guessed: put the template that its authors describe into {TEMPLATE_FILE}"
        )
    return found, tool_source if isinstance(tool_source, str) else None


def _read_special_tokens(path: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its kin as text; `tokenizer_config.json` wins over `special_tokens_map.json`."""
    sources = [settings]
    if storage.exists(storage.join(path, "special_tokens_map.json")):
        sources.append(read_json_object(path, "special_tokens_map.json"))
    tokens: dict[str, str] = {}
    for source in sources:
        for name in _TOKEN_NAMES:
            value: Any = source.get(name)
            if isinstance(value, dict):
                value = cast("dict[str, Any]", value).get("content")
            if isinstance(value, str):
                tokens.setdefault(name, value)
    return tokens
