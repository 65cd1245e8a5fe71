"""What a request asks of the model beside its messages: tools, the form of the answer, thinking.

Names and shapes follow OpenAI's chat completions, plus DeepSeek's `thinking`. JSON from job files and rows is checked
here; encoders, grammars and validation read the records.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias, cast, get_args

from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import InvalidResponseFormat, InvalidSampling, InvalidTools, abbreviate

MAX_TOOLS = 128
"""Most tools in one request, as documented by DeepSeek's API."""

ToolChoiceMode: TypeAlias = Literal["auto", "none", "required", "named"]
ResponseType: TypeAlias = Literal["text", "json_object", "json_schema"]
ServiceTier: TypeAlias = Literal["auto", "default", "flex", "priority"]

_RESPONSE_TYPES: tuple[ResponseType, ...] = ("text", "json_object", "json_schema")
ORDINARY_TIERS: tuple[ServiceTier, ...] = ("auto", "default")
"""Service tiers that mean what an engine or a provider without tiers does anyway."""

_SERVICE_TIERS: tuple[ServiceTier, ...] = get_args(ServiceTier)
NO_EFFORT = "none"
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        document: the function object as declared (`name`, `description`, `parameters`, `strict`). Key order is kept,
            because the model reads the keys in that order.
    """

    name: str
    document: Mapping[str, Json]

    @property
    def parameters(self) -> Json:
        """JSON Schema of the arguments; a function declared without one takes an empty object."""
        found = self.document.get("parameters")
        return {"type": "object", "properties": {}, "additionalProperties": False} if found is None else found

    @property
    def is_strict(self) -> bool:
        """Whether the schema constrains decoding, not only validation."""
        return self.document.get("strict") is True


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call a tool; `name` is the one that it must call."""

    mode: ToolChoiceMode = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The form of the answer; `schema` is set if the type is `json_schema`."""

    type: ResponseType = "text"
    schema: Json = None


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What a request asks for besides its messages and sampling.

    Attributes:
        thinking: None is the default of the model's encoding.
        reasoning_effort: as the job or the row spells it; the encoder maps it to what the model supports. `none` asks
            for no thinking.
        max_reasoning_tokens: an in-process engine closes the reasoning after this many tokens.
        service_tier: how soon, and at which price, a provider answers; None leaves the choice to it.
        model: the route to another model than the job's; None asks the job's.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = field(default_factory=ResponseFormat)
    thinking: bool | None = None
    reasoning_effort: str | None = None
    max_reasoning_tokens: int | None = None
    service_tier: ServiceTier | None = None
    model: str | None = None

    @property
    def asked_thinking(self) -> bool | None:
        """What the request says of thinking: the switch, or the effort `none`, which wins over it; None if neither."""
        return False if self.reasoning_effort == NO_EFFORT else self.thinking

    @property
    def is_thinking_off(self) -> bool:
        """Whether the request asks for no thinking."""
        return self.asked_thinking is False

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that `tool_choice` lets the model call."""
        match self.tool_choice.mode:
            case "none":
                return ()
            case "named":
                return tuple(tool for tool in self.tools if tool.name == self.tool_choice.name)
            case "auto" | "required":
                return self.tools


DEFAULT_OPTIONS = ChatOptions()
OPTION_NAMES = tuple(option.name for option in fields(ChatOptions))


def parse_tools(value: object, where: str = "tools") -> tuple[Tool, ...]:
    """Parse tools in OpenAI's form: a list of `{"type": "function", "function": {...}}`, or of bare function objects.

    Raises:
        InvalidTools: names tool and field, expected and found.
    """
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidTools(f"{where}: expected a list of tools, found {abbreviate(value)}")
    items = cast("Sequence[object]", value)
    if len(items) > MAX_TOOLS:
        raise InvalidTools(f"{where}: expected at most {MAX_TOOLS} tools, found {len(items)}")
    tools = tuple(_parse_tool(item, f"{where}[{index}]") for index, item in enumerate(items))
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidTools(f"{where}[{index}].name: expected every name once, found {name!r} again")
    return tools


def parse_tool_choice(value: object, tools: Sequence[Tool], where: str = "tool_choice") -> ToolChoice:
    """`auto`, `none`, `required`, or one tool: its name, or OpenAI's `{"type": "function", "function": {"name": ...}}`.

    Raises:
        InvalidTools: another value, an undeclared tool, or a required call without tools.
    """
    if value is None:
        return ToolChoice()
    name: object = value
    if isinstance(value, Mapping):
        fields_ = cast("Mapping[str, object]", value)
        function = fields_.get("function", fields_)
        name = cast("Mapping[str, object]", function).get("name") if isinstance(function, Mapping) else None
    if name in ("auto", "none"):
        return ToolChoice(cast("ToolChoiceMode", name))
    if name == "required":
        if not tools:
            raise InvalidTools(f"{where}: expected tools to choose from, found 'required' without any")
        return ToolChoice("required")
    if not isinstance(name, str):
        raise InvalidTools(f"{where}: expected auto, none, required or a tool's name, found {abbreviate(value)}")
    if name not in [tool.name for tool in tools]:
        known = ", ".join(tool.name for tool in tools) or "none is declared"
        raise InvalidTools(f"{where}: expected auto, none, required or a declared tool ({known}), found {name!r}")
    return ToolChoice("named", name)


def parse_response_format(value: object, where: str = "response_format") -> ResponseFormat:
    """Parse `text`, `json_object`, or a JSON Schema, nested as in OpenAI's API or flat.

    Nested is `{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}`, flat
    `{"type": "json_schema", "schema": {...}}`.

    Raises:
        InvalidResponseFormat: names field, expected and found.
    """
    if value is None:
        return ResponseFormat()
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        raise InvalidResponseFormat(f"{where}: expected an object with `type`, found {abbreviate(value)}")
    document = cast("Mapping[str, Json]", value)
    kind = document.get("type")
    if kind not in _RESPONSE_TYPES:
        raise InvalidResponseFormat(
            f"{where}.type: expected one of {', '.join(_RESPONSE_TYPES)}, found {abbreviate(kind)}"
        )
    if kind != "json_schema":
        return ResponseFormat(kind)
    nested = document.get("json_schema")
    holder, at = (nested, f"{where}.json_schema") if isinstance(nested, Mapping) else (document, where)
    schema = cast("Mapping[str, Json]", holder).get("schema")
    if not isinstance(schema, Mapping | bool):
        raise InvalidResponseFormat(f"{at}.schema: expected a JSON Schema, found {abbreviate(schema)}")
    return ResponseFormat("json_schema", schema)


def parse_thinking(value: object, where: str = "thinking") -> bool | None:
    """Parse DeepSeek's `{"type": "enabled" | "disabled"}`, the bare word, or a boolean; null is the model's default.

    Raises:
        InvalidSampling: another value.
    """
    found = cast("Mapping[str, object]", value).get("type") if isinstance(value, Mapping) else value
    if found is None and value is None:
        return None
    if found in ("enabled", True):
        return True
    if found in ("disabled", False):
        return False
    raise InvalidSampling(f"{where}: expected enabled or disabled, found {abbreviate(value)}")


_PLAIN_VALUES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("parallel_tool_calls", "true or false", lambda found: isinstance(found, bool)),
    ("reasoning_effort", "a word", lambda found: isinstance(found, str) and bool(found)),
    ("max_reasoning_tokens", "a positive integer", lambda found: type(found) is int and found > 0),
    ("service_tier", f"one of {', '.join(_SERVICE_TIERS)}", lambda found: found in _SERVICE_TIERS),
    ("model", "the name of a model", lambda found: isinstance(found, str) and bool(found)),
)


_PLAIN_NAMES = (
    "parallel_tool_calls",
    "thinking",
    "reasoning_effort",
    "max_reasoning_tokens",
    "service_tier",
    "model",
)
"""Options whose value is their JSON."""


def with_own_values(options: ChatOptions, own: Mapping[str, object]) -> ChatOptions:
    """The job's options, overridden by the row's own values.

    Args:
        own: any of `OPTION_NAMES`, in the shapes of the chat completion API; null counts as absent.
    Raises:
        InvalidTools, InvalidResponseFormat, InvalidSampling: a value of another shape; names field, expected, found.
    """
    said = {name: value for name, value in own.items() if value is not None}
    values: dict[str, Any] = {}
    tools = options.tools
    if "tools" in said:
        tools = values["tools"] = parse_tools(said["tools"])
    if "tool_choice" in said:
        values["tool_choice"] = parse_tool_choice(said["tool_choice"], tools)
    elif "tools" in said:
        values["tool_choice"] = _check_tool_choice(options.tool_choice, tools)
    if "response_format" in said:
        values["response_format"] = parse_response_format(said["response_format"])
    if "thinking" in said:
        values["thinking"] = parse_thinking(said["thinking"])
    for name, expected, is_right in _PLAIN_VALUES:
        if name in said:
            if not is_right(said[name]):
                raise InvalidSampling(f"{name}: expected {expected}, found {abbreviate(said[name])}")
            values[name] = said[name]
    return replace(options, **values)


def _check_tool_choice(choice: ToolChoice, tools: Sequence[Tool]) -> ToolChoice:
    """Check the job's choice against a row's own tools."""
    return parse_tool_choice(choice.name if choice.mode == "named" else choice.mode, tools)


def options_json(options: ChatOptions) -> str:
    """Options as JSON text, equal for equal options. Keys of tools and schemas keep their order."""
    values: dict[str, Any] = {
        name: value for name in _PLAIN_NAMES if (value := getattr(options, name)) != getattr(DEFAULT_OPTIONS, name)
    }
    if options.tools:
        values["tools"] = [tool.document for tool in options.tools]
    if options.tool_choice.mode != "auto":
        choice = options.tool_choice
        values["tool_choice"] = {"function": {"name": choice.name}} if choice.mode == "named" else choice.mode
    if options.response_format.type != "text":
        response_format = options.response_format
        schema = {"schema": response_format.schema} if response_format.type == "json_schema" else {}
        values["response_format"] = {"type": response_format.type, **schema}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


@lru_cache(maxsize=1024)
def parse_options_json(text: str) -> ChatOptions:
    """The inverse of `options_json`."""
    values: dict[str, Any] = json.loads(text)
    tools = parse_tools(values.pop("tools", None))
    choice = values.pop("tool_choice", None)
    response_format = parse_response_format(values.pop("response_format", None))
    assert values.keys() <= set(OPTION_NAMES), f"unknown options in {text[:200]}"
    return ChatOptions(
        tools=tools, tool_choice=parse_tool_choice(choice, tools), response_format=response_format, **values
    )


def _parse_tool(item: object, where: str) -> Tool:
    if not isinstance(item, Mapping):
        raise InvalidTools(f"{where}: expected an object, found {abbreviate(item)}")
    document = cast("Mapping[str, Json]", item)
    if "function" in document:
        kind = document.get("type", "function")
        if kind != "function":
            raise InvalidTools(f"{where}.type: expected 'function', found {abbreviate(kind)}")
        function = document["function"]
        if not isinstance(function, Mapping):
            raise InvalidTools(f"{where}.function: expected an object, found {abbreviate(function)}")
        document, where = function, f"{where}.function"
    name = document.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise InvalidTools(
            f"{where}.name: expected 1 to 128 letters, digits, or any of _ . : -, found {abbreviate(name)}"
        )
    for key, expected in (("description", str), ("strict", bool)):
        found = document.get(key)
        if found is not None and not isinstance(found, expected):
            raise InvalidTools(f"{where}.{key}: expected {expected.__name__}, found {abbreviate(found)}")
    parameters = document.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidTools(f"{where}.parameters: expected a JSON Schema object, found {abbreviate(parameters)}")
    return Tool(name, document)
