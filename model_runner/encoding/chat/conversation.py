"""Checks chat messages and turns them into what DeepSeek's encoders read; errors name the message and key.

The keys beside role and content are OpenAI's and those of DeepSeek's encoders: `tool_calls`, `tool_call_id`,
`reasoning_content` (or `reasoning`), `tools`, `response_format`, `task`, `wo_eos` and `prefix`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moebeam.model_runner.encoding.chat.past_calls import is_left_out
from moebeam.model_runner.encoding.chat.strict_arguments import arguments_text
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import ChatOptions, Tool, parse_tools
from moebeam.schemas.errors import InvalidMessages, RowError, abbreviate
from moebeam.schemas.records import Message, ToolCall

TASKS = frozenset({"action", "query", "authority", "domain", "title", "read_url"})


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a user's turn: text, or the result of a call."""

    text: str
    is_result: bool = False
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message, or several that a model reads as one.

    Attributes:
        index: of the first message that it came from.
        role: as in the message; a result of a tool is a user's turn once it is merged.
        parts: what a user's turn is made of; content is empty then.
        response_format: as the message has it; None if it has none.
        task: DeepSeek's quick instruction, or None.
        is_open: no end-of-sentence token is written: the model goes on where the text ends.
        is_prefix: open because the request completes a prefix, so reasoning without content is gone on with too.
    """

    index: int
    role: str
    content: str = ""
    parts: tuple[Part, ...] = ()
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    tools: tuple[Tool, ...] = ()
    response_format: Json = None
    task: str | None = None
    is_open: bool = False
    is_prefix: bool = False
    call_id: str = ""


def check_messages(messages: Sequence[Message]) -> None:
    """Checks that a chat has a message, and every message a role and text.

    Raises:
        InvalidMessages: names the message, expected and found.
    """
    if not messages:
        raise InvalidMessages("expected at least one message, found none")
    for index, message in enumerate(messages):
        for name, value in (("role", message.role), ("content", message.content)):
            if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidMessages(f"message {index}: expected text as {name}, found {type(value).__name__}")
        if not message.role:
            raise InvalidMessages(f"message {index}: expected a role, found an empty one")


def is_prefix(messages: Sequence[Message]) -> bool:
    """Whether the model continues the last message: an assistant's with `prefix: true`.

    Raises:
        InvalidMessages: another message has it.
    """
    for index, message in enumerate(messages):
        where = f"messages[{index}].prefix"
        if not _flag(message.extra.get("prefix"), where):
            continue
        if message.role != "assistant" or index != len(messages) - 1:
            raise InvalidMessages(f"{where}: expected it on the last message only, an assistant's, found it here")
        return True
    return False


def render_each(
    render: Callable[[Sequence[Message], ChatOptions], str], chats: Iterable[tuple[Sequence[Message], ChatOptions]]
) -> list[str | RowError]:
    """The prompt of each chat, or its error."""
    prompts: list[str | RowError] = []
    for messages, options in chats:
        try:
            prompts.append(render(messages, options))
        except RowError as error:
            prompts.append(error)
    return prompts


def read_turns(messages: Sequence[Message], roles: frozenset[str], separator: str) -> list[Turn]:
    """One turn a message, with its fields checked.

    Args:
        separator: what the model's encoder puts between the text parts of a message.
    Raises:
        InvalidMessages: names the message and the field, expected and found.
        InvalidTools: the same for the tools of a message.
    """
    check_messages(messages)
    is_prefix(messages)
    return [_read_turn(index, message, roles, separator) for index, message in enumerate(messages)]


def attach_options(turns: Sequence[Turn], options: ChatOptions) -> list[Turn]:
    """Attaches the request's tools and schema to the first system turn; inserts an empty one where there is none.

    Tools that must not be called (`tool_choice: none`) are not shown. `json_object` has no text of its own.

    Raises:
        InvalidMessages: that turn has tools or a response format of its own already.
    """
    tools = options.tools if options.tool_choice.mode != "none" else ()
    schema = options.response_format.schema if options.response_format.type == "json_schema" else None
    if not tools and schema is None:
        return list(turns)
    with_system = list(turns)
    position = next((at for at, turn in enumerate(turns) if turn.role == "system"), None)
    if position is None:
        with_system.insert(0, Turn(0, "system"))
        position = 0
    turn = with_system[position]
    for name, given, own in (("tools", tools, turn.tools), ("response_format", schema, turn.response_format)):
        if given and own:
            raise InvalidMessages(
                f"messages[{turn.index}].{name}: expected them in one place, found them here and in the request"
            )
    with_system[position] = replace(
        turn,
        tools=tools or turn.tools,
        response_format=schema if schema is not None else turn.response_format,
    )
    return with_system


def merge_results(turns: Sequence[Turn]) -> list[Turn]:
    """Merges adjacent tool results and user texts into one user turn; results come in the order of their calls.

    A user's text with a task ends the turn that it is merged into; the one that follows is a turn of its own.
    """
    merged: list[Turn] = []
    order: Mapping[str, int] = {}
    for turn in turns:
        if turn.role not in ("user", "tool"):
            merged.append(turn)
            continue
        is_result = turn.role == "tool"
        part = Part(turn.content, is_result, turn.call_id)
        last = merged[-1] if merged else None
        if last is not None and last.role == "user" and (is_result or last.task is None):
            merged[-1] = replace(last, parts=(*last.parts, part), task=last.task or turn.task)
        else:
            merged.append(replace(turn, role="user", content="", parts=(part,)))
    for at, turn in enumerate(merged):
        if turn.calls:
            order = {call.id: position for position, call in enumerate(turn.calls) if call.id}
        elif turn.role == "user" and order:
            merged[at] = replace(turn, parts=_in_call_order(turn.parts, order))
    return merged


def _in_call_order(parts: tuple[Part, ...], order: Mapping[str, int]) -> tuple[Part, ...]:
    results = iter(sorted((part for part in parts if part.is_result), key=lambda part: order.get(part.call_id, 0)))
    return tuple(next(results) if part.is_result else part for part in parts)


def drop_old_thinking(turns: Sequence[Turn], last_user: int) -> list[Turn]:
    """Drops reasoning and developers' turns from before the last user turn."""
    return [
        replace(turn, reasoning="") if turn.role == "assistant" and at < last_user else turn
        for at, turn in enumerate(turns)
        if turn.role != "developer" or at >= last_user
    ]


def json_line(value: Json) -> str:
    """JSON as DeepSeek's encoders write it into a prompt: one line, keys in their order, not ASCII-escaped."""
    return json.dumps(value, ensure_ascii=False)


def _read_turn(index: int, message: Message, roles: frozenset[str], separator: str) -> Turn:
    where = f"messages[{index}]"
    extra = message.extra
    if message.role not in roles:
        raise InvalidMessages(
            f"{where}.role: expected one of {', '.join(sorted(roles))}, found {abbreviate(message.role)}"
        )
    task = extra.get("task")
    if task is not None and not (isinstance(task, str) and task in TASKS):
        raise InvalidMessages(f"{where}.task: expected one of {', '.join(sorted(TASKS))}, found {abbreviate(task)}")
    if message.role == "developer" and not message.content:
        raise InvalidMessages(f"{where}.content: expected text of the developer, found none")
    is_prefixed = _flag(extra.get("prefix"), f"{where}.prefix")
    return Turn(
        index,
        message.role,
        message.join_parts(separator),
        reasoning=_text(extra.get("reasoning_content", extra.get("reasoning")), f"{where}.reasoning_content"),
        calls=_calls(extra.get("tool_calls"), f"{where}.tool_calls") if message.role == "assistant" else (),
        tools=parse_tools(extra.get("tools"), f"{where}.tools"),
        response_format=extra.get("response_format") or None,
        task=task,
        is_open=is_prefixed or _flag(extra.get("wo_eos"), f"{where}.wo_eos"),
        is_prefix=is_prefixed,
        call_id=_text(extra.get("tool_call_id"), f"{where}.tool_call_id"),
    )


def _calls(value: Json, where: str) -> tuple[ToolCall, ...]:
    """OpenAI's tool calls, or bare `{"name": ..., "arguments": ...}`; arguments as JSON text or as an object."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidMessages(f"{where}: expected a list of calls, found {abbreviate(value)}")
    return tuple(_call(item, f"{where}[{index}]") for index, item in enumerate(value))


def _call(value: Json, where: str) -> ToolCall:
    if not isinstance(value, Mapping):
        raise InvalidMessages(f"{where}: expected an object, found {abbreviate(value)}")
    function = value.get("function", value)
    if not isinstance(function, Mapping):
        raise InvalidMessages(f"{where}.function: expected an object, found {abbreviate(function)}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise InvalidMessages(f"{where}.name: expected text, found {abbreviate(name)}")
    if is_left_out(arguments):
        arguments = "{}"
    if isinstance(arguments, Mapping):
        try:
            arguments = arguments_text(arguments)
        except (ValueError, RecursionError) as error:
            raise InvalidMessages(f"{where}.arguments: expected a JSON object, found: {error}") from error
    if not isinstance(arguments, str):
        raise InvalidMessages(f"{where}.arguments: expected a JSON object or its text, found {abbreviate(arguments)}")
    return ToolCall(_text(value.get("id"), f"{where}.id"), name, arguments)


def _text(value: Json, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidMessages(f"{where}: expected text, found {abbreviate(value)}")
    return value


def _flag(value: Json, where: str) -> bool:
    if value is None or isinstance(value, bool):
        return value is True
    raise InvalidMessages(f"{where}: expected true or false, found {abbreviate(value)}")
