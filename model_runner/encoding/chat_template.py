"""Renders prompts with a checkpoint's Jinja chat template: DeepSeek-V3, R1 and V3.1, and all other families.

The template runs behind the fence, in `chat_program.py`. How the model writes calls and whether it reasons is read from
the markers in its source.
"""

import pickle
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

from moebeam.model_runner.checkpoint.files import read_checkpoint_file, read_json_object
from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING, THINK, ParsedAnswer, parse_answer
from moebeam.model_runner.encoding.chat.call_formats import JsonCallFormat, format_of_template
from moebeam.model_runner.encoding.chat.conversation import check_messages, is_prefix
from moebeam.model_runner.encoding.chat.past_calls import convert_calls
from moebeam.model_runner.encoding.chat.template_forms import CallForm, Render, find_call_form, reads_parts
from moebeam.model_runner.encoding.chat.token_marks import NO_MARKS, TokenMarks
from moebeam.model_runner.encoding.chat_program import ENTRY, Chat
from moebeam.model_runner.fence.fence import Program
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import DEFAULT_OPTIONS, ChatOptions, Tool
from moebeam.schemas.errors import EngineLoadError, InvalidMessages, RowError, TemplateBudgetExceeded
from moebeam.schemas.records import Message, ToolCall
from moebeam.schemas.store import storage

TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_NAME, _TOOLS_NAME = "default", "tool_use"
_THINKING = (THINK, END_OF_THINKING)
_PROBED_ANSWER = "Quite so"
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
        EngineLoadError: a source is no Jinja, or even a small chat takes more than the fence allows.
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
        self._program = Program(ENTRY, pickle.dumps((source, tool_source)), "the chat template")
        self._special_tokens = dict(special_tokens or {})
        self._marks = marks
        both = source + (tool_source or "")
        self.call_format: JsonCallFormat | None = format_of_template(both)
        self.has_reasoning: bool = THINK in both or END_OF_THINKING in both
        self._probes: dict[tuple[bool | None, str | None], bool] = {}
        self._call_forms: dict[bool, CallForm] = {}
        self._part_readers: dict[tuple[bool, str], bool] = {}
        self._check_small_chat()

    @classmethod
    def load(cls, path: str, settings: Mapping[str, Any], marks: TokenMarks = NO_MARKS) -> Self:
        """The template of `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`.

        Args:
            settings: what `tokenizer_config.json` holds.
        Raises:
            EngineLoadError: there is none, it is no Jinja, or a small chat takes too much; names the file.
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
        tokens = read_special_tokens(path, settings)
        try:
            return cls(source, tool_source=tool_source, special_tokens=tokens, marks=marks)
        except EngineLoadError as error:
            raise EngineLoadError(f"{storage.join(path, file)}: {error}") from error

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
            except (InvalidMessages, TemplateBudgetExceeded):
                self._probes[key] = False
        return self._probes[key]

    def render(self, messages: Sequence[Message], options: ChatOptions = DEFAULT_OPTIONS) -> str:
        (prompt,) = self.render_batch([(messages, options)])
        if isinstance(prompt, RowError):
            raise prompt
        return prompt

    def render_batch(self, chats: Sequence[tuple[Sequence[Message], ChatOptions]]) -> list[str | RowError]:
        prepared: list[Chat | RowError] = []
        for messages, options in chats:
            try:
                prepared.append(self._prepare(messages, options))
            except RowError as error:
                prepared.append(error)
        prompts = iter(self._run([chat for chat in prepared if not isinstance(chat, RowError)]))
        return [
            chat if isinstance(chat, RowError) else _cut_at_end(next(prompts)) if is_prefix(messages) else next(prompts)
            for chat, (messages, _) in zip(prepared, chats, strict=True)
        ]

    def _prepare(self, messages: Sequence[Message], options: ChatOptions) -> Chat:
        """A chat as the template gets it."""
        check_messages(messages)
        completes_prefix = is_prefix(messages)
        tools = self._template_tools(options)
        variables = {**self._list_variables(tools, is_to_answer=not completes_prefix), **_list_switches(options)}

        def render_chat(chat: Sequence[dict[str, Any]]) -> str:
            (prompt,) = self._run([(bool(tools), chat, variables)])
            if isinstance(prompt, RowError):
                raise prompt
            return prompt

        chat = [
            self._template_message(index, message, bool(tools), render_chat) for index, message in enumerate(messages)
        ]
        if completes_prefix:
            chat[-1]["content"] = self._marks.mark(messages[-1].content, but=_THINKING) + _END_OF_PREFIX
        return bool(tools), chat, variables

    def _list_variables(self, tools: list[Json] | None, *, is_to_answer: bool) -> dict[str, Json]:
        """The variables of every chat, beside its messages and switches."""
        return {
            **self._special_tokens,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": is_to_answer,
        }

    def _run(self, chats: Sequence[Chat]) -> list[str | RowError]:
        return [cast("str | RowError", result) for result in self._program.run(chats)]

    def _check_small_chat(self) -> None:
        """Compile the template, and render a chat that costs nothing.

        Raises:
            EngineLoadError: see the class.
        """
        variables = self._list_variables(None, is_to_answer=True)
        (result,) = self._run([(False, [{"role": "user", "content": "x"}], variables)])
        if isinstance(result, TemplateBudgetExceeded):
            raise EngineLoadError(str(result)) from result

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

    def parse(
        self,
        text: str,
        *,
        starts_in_reasoning: bool,
        has_tools: bool,
        tools: Sequence[Tool] = (),
        is_cut: bool = False,
    ) -> ParsedAnswer:
        return parse_answer(
            text,
            starts_in_reasoning=starts_in_reasoning,
            has_reasoning=self.has_reasoning,
            call_format=self.call_format if has_tools else None,
            end_marker=self._special_tokens.get("eos_token"),
            tools=tools,
            is_cut=is_cut,
        )

    def starts_in_reasoning(self, prompt_tail: str) -> bool:
        """Whether the prompt ends with an open `<think>`, as that of R1 does."""
        return prompt_tail.rstrip().endswith(THINK)

    def find_turn_end(self) -> str:
        """What the template writes behind an answer that ends a chat; empty where it takes no such chat."""
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBED_ANSWER}]
        (prompt,) = self._run([(False, chat, self._list_variables(None, is_to_answer=False))])
        return prompt.rpartition(_PROBED_ANSWER)[2] if isinstance(prompt, str) and _PROBED_ANSWER in prompt else ""

    def _template_message(self, index: int, message: Message, has_tools: bool, render: Render) -> dict[str, Any]:
        """A message in the form that the template reads.

        Raises:
            InvalidMessages: a past call whose arguments cannot be brought into that form.
        """
        # Templates look for the reasoning in what an assistant said.
        but = _THINKING if message.role == "assistant" else ()
        fields: dict[str, Json] = dict(message.extra)
        content: Any = self._marks.mark(message.content, but=but)
        if fields.get("tool_calls"):
            form = self._find_call_form(has_tools, render)
            fields["tool_calls"] = convert_calls(fields["tool_calls"], form.arguments, f"messages[{index}].tool_calls")
            content = content or (None if form.has_null else "")
        if message.parts and self._reads_parts(message.role, has_tools, render):
            content = [{"type": "text", "text": self._marks.mark(text, but=but)} for text in message.parts]
        extra = {key: self._marks.mark_json(value, but=but) for key, value in fields.items()}
        return {**extra, "role": message.role, "content": content}

    def _find_call_form(self, has_tools: bool, render: Render) -> CallForm:
        if has_tools not in self._call_forms:
            self._call_forms[has_tools] = find_call_form(render)
        return self._call_forms[has_tools]

    def _reads_parts(self, role: str, has_tools: bool, render: Render) -> bool:
        key = has_tools, role
        if key not in self._part_readers:
            self._part_readers[key] = reads_parts(render, role)
        return self._part_readers[key]

    def _template_tools(self, options: ChatOptions) -> list[Json] | None:
        """The tools to show; None, as `transformers` gives it, where there are none."""
        if not options.tools or options.tool_choice.mode == "none":
            return None
        return [{"type": "function", "function": self._marks.mark_json(tool.document)} for tool in options.tools]


def _list_switches(options: ChatOptions) -> dict[str, Json]:
    """The variables by which templates switch thinking; undefined where a request does not ask."""
    switches: dict[str, Json] = {}
    if (thinking := options.asked_thinking) is not None:
        switches |= {"thinking": thinking, "enable_thinking": thinking}
    if options.reasoning_effort is not None:
        switches["reasoning_effort"] = options.reasoning_effort
    return switches


def _cut_at_end(prompt: str | RowError) -> str | RowError:
    """The prompt up to the end of the text that the model goes on with, without what the template puts behind it."""
    if isinstance(prompt, RowError):
        return prompt
    end = prompt.rfind(_END_OF_PREFIX)
    if end < 0:
        return InvalidMessages("the chat template does not show the prefix that the last message asks to complete")
    return prompt[:end]


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


def read_special_tokens(path: str, settings: Mapping[str, Any]) -> dict[str, str]:
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
