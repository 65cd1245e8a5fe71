"""Requests as bodies of chat completions, each provider's way.

First step of the `openai` engine: `runner.py` asks for a body for each request and endpoint. What a provider does not
take is not sent, which is logged once where it changes the answer; limits are never enforced by cutting in silence.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from moebeam.model_runner.checkpoint.model_limits import map_effort
from moebeam.model_runner.checkpoint.strict_tools import strict_tool_problems
from moebeam.model_runner.encoding.chat.past_calls import convert_calls
from moebeam.model_runner.encoding.schema_in_prompt import with_schema_in_prompt
from moebeam.model_runner.openai_engine.profiles import Profile
from moebeam.model_runner.seeds import derive_sent_seed
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import NO_EFFORT, ORDINARY_TIERS, ChatOptions, Tool
from moebeam.schemas.errors import RequestRefused
from moebeam.schemas.records import Message, Request, Sampling

_LOGGER = logging.getLogger(__name__)
_NUM_TENANT_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class ChatBody:
    """What is posted, and whether to the address for strict tools."""

    fields: dict[str, Any]
    is_strict: bool


def chat_body(request: Request, profile: Profile, model: str, *, is_stream: bool) -> ChatBody:
    """A request as one provider takes it.

    Raises:
        RequestRefused: the provider is known to refuse it; names the field, the limit and what was found.
        InvalidSampling: the model knows no such reasoning effort.
    """
    options = request.options
    is_strict = _is_strict(options, profile)
    fields: dict[str, Any] = {
        **profile.more_fields,
        "model": model,
        "messages": [_message(message, profile) for message in _messages(request, profile)],
        profile.max_tokens_field: request.sampling.max_tokens,
        **_sampling(request.sampling, derive_sent_seed(request), profile),
        **_thinking(options, profile, model),
        **_tools(options, is_strict=is_strict),
        **_response_format(options, profile),
        **_service_tier(options, profile),
    }
    if request.tenant and profile.tenant_field is not None:
        # A provider need only tell tenants apart: their names are not sent.
        fields[profile.tenant_field] = hashlib.sha256(request.tenant.encode()).hexdigest()[:_NUM_TENANT_CHARACTERS]
    if is_stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return ChatBody(fields, is_strict and profile.strict_tools_url is not None)


def _messages(request: Request, profile: Profile) -> Sequence[Message]:
    """The chat; with the schema of the answer in words where the provider takes no schema."""
    response_format = request.options.response_format
    if response_format.type != "json_schema" or "json_schema" in profile.response_types:
        return request.messages
    schema_text = json.dumps(response_format.schema, ensure_ascii=False)
    if any(message.role == "system" and schema_text in message.content for message in request.messages):
        return request.messages
    return with_schema_in_prompt(request.messages, response_format.schema)


def _message(message: Message, profile: Profile) -> dict[str, Json]:
    extra = dict(message.extra)
    if "tool_calls" in extra:
        extra["tool_calls"] = convert_calls(extra["tool_calls"], "text", "tool_calls")
    separator = profile.part_separator
    content = message.content_json if separator is None else message.join_parts(separator)
    return {"role": message.role, "content": content, **extra}


def _sampling(sampling: Sampling, seed: int | None, profile: Profile) -> dict[str, Any]:
    """Only what differs from the interface's defaults, but the temperature always: its default is 1.

    Args:
        seed: of this request alone, in place of the one that all rows may share.
    """
    num_stop = len(sampling.stop)
    if profile.max_stop_strings and num_stop > profile.max_stop_strings:
        raise RequestRefused(
            f"stop: {profile.name} takes at most {profile.max_stop_strings} stop strings, found {num_stop}"
        )
    fields: dict[str, Any] = {"temperature": sampling.temperature}
    if sampling.top_p != 1.0:
        fields["top_p"] = sampling.top_p
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if seed is not None:
        fields["seed"] = seed
    if sampling.min_p > 0.0:
        fields["min_p"] = sampling.min_p
    if sampling.logprobs:
        fields["logprobs"] = True
    for name in ("top_logprobs", "frequency_penalty", "presence_penalty"):
        if value := getattr(sampling, name):
            if name in profile.unsupported:
                raise RequestRefused(f"{name}: {profile.name} takes none, found {value!r}")
            fields[name] = value
    for name in profile.unsupported:
        if name in fields:
            _warn_once(f"{profile.name} takes no {name}: it is not sent")
            del fields[name]
    return fields


def _service_tier(options: ChatOptions, profile: Profile) -> dict[str, Any]:
    """The tier, where the provider has tiers: elsewhere `auto` and `default` are what all requests get."""
    tier = options.service_tier
    if tier is None or (tier in ORDINARY_TIERS and tier not in profile.service_tiers):
        return {}
    if tier not in profile.service_tiers:
        raise RequestRefused(
            f"service_tier: expected {' or '.join(profile.service_tiers or ORDINARY_TIERS)}, which {profile.name} has, "
            f"found {tier!r}"
        )
    return {"service_tier": tier}


def _thinking(options: ChatOptions, profile: Profile, model: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    form, _, argument = profile.thinking.partition(":")
    thinking, effort = options.thinking, options.reasoning_effort
    if effort == NO_EFFORT and form != "none":
        # A switch says the same, and is known by more models behind it; a chat template may read either.
        thinking = False
        effort = effort if form == "template" else None
    elif thinking is False:
        effort = None
    if thinking is not None:
        match form:
            case "type":
                fields["thinking"] = {"type": "enabled" if thinking else "disabled"}
            case "enable_thinking":
                fields["enable_thinking"] = thinking
            case "reasoning":
                fields["reasoning"] = {"enabled": thinking}
            case "template":
                fields["chat_template_kwargs"] = {argument: thinking}
            case _:
                _warn_once(f"{profile.name} has no switch for thinking: it is not sent")
    if effort is not None:
        match profile.effort:
            case "mapped":
                fields["reasoning_effort"] = map_effort(model, effort, datetime.now(UTC))
            case "plain":
                fields["reasoning_effort"] = effort
            case "none":
                _warn_once(f"{profile.name} takes no reasoning_effort: it is not sent")
    if options.max_reasoning_tokens is not None:
        _warn_once(f"{profile.name} takes no budget of reasoning: max_reasoning_tokens is not sent")
    return fields


def _is_strict(options: ChatOptions, profile: Profile) -> bool:
    """Whether the tools go out as strict: where the provider can, and has nothing against any of them.

    Elsewhere their arguments are checked when they come, like all others.
    """
    if not profile.strict_tools or not any(tool.is_strict for tool in options.tools):
        return False
    if profile.strict_tools_url is None:
        return True
    problems = [f"{tool.name} {problem}" for tool in options.tools for problem in strict_tool_problems(tool)]
    if problems:
        _warn_once(f"{profile.name} cannot take these tools as strict ({problems[0]}): they are sent as plain ones")
    return not problems


def _tools(options: ChatOptions, *, is_strict: bool) -> dict[str, Any]:
    if not options.tools:
        return {}
    fields: dict[str, Any] = {"tools": [_tool(tool, is_strict=is_strict) for tool in options.tools]}
    choice = options.tool_choice
    if choice.mode == "named":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice.mode != "auto":
        fields["tool_choice"] = choice.mode
    if not options.parallel_tool_calls:
        fields["parallel_tool_calls"] = False
    return fields


def _tool(tool: Tool, *, is_strict: bool) -> dict[str, Json]:
    document: Mapping[str, Json] = tool.document
    if not is_strict and "strict" in document:
        document = {name: value for name, value in document.items() if name != "strict"}
    return {"type": "function", "function": document}


def _response_format(options: ChatOptions, profile: Profile) -> dict[str, Any]:
    response_format = options.response_format
    if response_format.type == "text":
        return {}
    if response_format.type == "json_schema" and "json_schema" in profile.response_types:
        return {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": response_format.schema},
            }
        }
    if "json_object" in profile.response_types:
        return {"response_format": {"type": "json_object"}}
    return {}


@cache
def _warn_once(message: str) -> None:
    _LOGGER.warning(message)
