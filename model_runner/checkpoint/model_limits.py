"""What DeepSeek's models take, by name and date: limits, defaults, and parameters that do nothing.

Consulted before a run: a job that asks for what its model does not do is told so before anything is paid for. One
table, `LIMITS`, and one for the efforts, `EFFORTS`; each line carries its evidence and the time it holds for, as half
open intervals in UTC. `official` was read in a page of DeepSeek's, `secondary` in somebody else's.

Names are those of DeepSeek's own API, and `deepseek-ai/...` for open weights, which run in process and to which the
API's rules do not apply. Models that the table does not know have no known limits: nothing is said about them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Literal, TypeAlias

from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import MAX_TOOLS, ChatOptions, ResponseType, Tool
from moebeam.schemas.errors import InvalidSampling, abbreviated
from moebeam.schemas.records import Sampling

Evidence: TypeAlias = Literal["official", "secondary"]
Thinking: TypeAlias = Literal["default", "always", "never"]

K = 1024
FACTS = "DeepSeek's API guides, read November 2026"


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """One model, while the line holds.

    Attributes:
        is_api: served by DeepSeek's API; otherwise open weights, which know only their context.
        default_max_tokens: of the answer, where `max_tokens` is unset: without thinking, with it, at effort `max`.
        thinking: on by default, or not to be switched.
        ignored: sampling parameters that are silently ignored without thinking.
        ignored_thinking: those ignored with thinking.
        min_top_p_thinking: a smaller `top_p` is silently raised to this.
        can_force_tools_thinking: whether `tool_choice` may be `required` or a name.
    """

    model: str
    effective_from: datetime
    effective_to: datetime | None
    evidence: Evidence
    source: str
    context_tokens: int
    max_output_tokens: int
    is_api: bool = True
    thinking: Thinking = "default"
    default_effort: str | None = "high"
    default_max_tokens: tuple[int, int, int] | None = (8 * K, 64 * K, 128 * K)
    ignored: tuple[str, ...] = ()
    ignored_thinking: tuple[str, ...] = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    min_top_p_thinking: float | None = None
    can_force_tools_thinking: bool = False
    has_seed: bool = False
    response_types: tuple[ResponseType, ...] = ("text", "json_object")
    max_tools: int = MAX_TOOLS

    def max_tokens_by_default(self, *, thinking: bool, effort: str | None = None) -> int | None:
        """Most tokens of an answer whose request does not say; None where nothing is documented."""
        if self.default_max_tokens is None:
            return None
        plain, with_thinking, at_max = self.default_max_tokens
        return plain if not thinking else at_max if effort == "max" else with_thinking


_V4 = ModelLimits(
    model="deepseek-v4-flash",
    effective_from=_utc("2026-04-24"),
    effective_to=_utc("2026-09-10T04:00"),
    evidence="secondary",  # The default of max_tokens, and that top_p is ignored; the rest is official.
    source=FACTS,
    context_tokens=1024 * K,
    max_output_tokens=384 * K,
)
_V4_1_FLASH = replace(
    _V4,
    model="deepseek-flash",
    effective_from=_utc("2026-09-10T04:00"),
    effective_to=None,
    source=f"{FACTS}; top_p: notes on V4.1-Flash's release, September 2026",
    ignored=("top_p",),
    ignored_thinking=("temperature", "presence_penalty", "frequency_penalty"),
    min_top_p_thinking=0.95,
)
_OPEN = ModelLimits(
    model="deepseek-ai/deepseek-v4-flash",
    effective_from=_utc("2026-04-24"),
    effective_to=None,
    evidence="secondary",
    source="the models' cards",
    context_tokens=1024 * K,
    max_output_tokens=384 * K,
    is_api=False,
    default_max_tokens=None,
    ignored_thinking=(),
    can_force_tools_thinking=True,
    has_seed=True,
    response_types=("text", "json_object", "json_schema"),
)
_OPEN_V3 = replace(
    _OPEN,
    model="deepseek-ai/deepseek-v3",
    effective_from=_utc("2024-12-26"),
    evidence="secondary",
    context_tokens=128 * K,
    max_output_tokens=128 * K,
    thinking="never",
    default_effort=None,
)

LIMITS: tuple[ModelLimits, ...] = (
    _V4,
    # Since V4.1 the old name is served by it.
    replace(_V4_1_FLASH, model="deepseek-v4-flash"),
    _V4_1_FLASH,
    replace(_V4, model="deepseek-v4-pro", effective_to=None),
    replace(_V4, model="deepseek-chat", effective_to=_utc("2026-07-24T15:59"), thinking="never"),
    replace(_V4, model="deepseek-reasoner", effective_to=_utc("2026-07-24T15:59"), thinking="always"),
    _OPEN,
    replace(_OPEN, model="deepseek-ai/deepseek-v4-pro"),
    _OPEN_V3,
    replace(_OPEN_V3, model="deepseek-ai/deepseek-r1", effective_from=_utc("2025-01-20"), thinking="always"),
)

SUCCESSORS: Mapping[str, str] = {
    "deepseek-chat": "deepseek-v4-flash with thinking disabled",
    "deepseek-reasoner": "deepseek-v4-flash with thinking enabled",
}


@dataclass(frozen=True, slots=True)
class EffortMapping:
    """Which effort a model exerts for the one that was asked for."""

    models: frozenset[str]
    effective_from: datetime
    effective_to: datetime | None
    evidence: Evidence
    source: str
    mapping: Mapping[str, str] = field(hash=False)


_APRIL = {"low": "high", "medium": "high", "high": "high", "xhigh": "max", "max": "max"}
_NOW = {
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}
_FLASH_NAMES = frozenset({"deepseek-v4-flash", "deepseek-flash"})

EFFORTS: tuple[EffortMapping, ...] = (
    EffortMapping(
        _FLASH_NAMES | {"deepseek-chat", "deepseek-reasoner"},
        _utc("2026-04-24"),
        _utc("2026-07-31"),
        "official",
        "thinking mode guide, April 2026",
        _APRIL,
    ),
    EffortMapping(
        _FLASH_NAMES,
        _utc("2026-07-31"),
        _utc("2026-08-13"),
        "secondary",
        "the guide's table for V4-Flash-0731 as quoted in github.com/vllm-project/vllm/pull/50580; medium as before",
        {**_APRIL, "low": "low", "xhigh": "high"},
    ),
    EffortMapping(
        frozenset({"deepseek-v4-pro"}),
        _utc("2026-04-24"),
        _utc("2026-08-13"),
        "official",
        "thinking mode guide, April 2026; until V4-Pro-0813",
        _APRIL,
    ),
    EffortMapping(
        _FLASH_NAMES | {"deepseek-v4-pro"},
        _utc("2026-08-13"),
        None,
        "official",
        "thinking mode guide, read November 2026; begins with V4-Pro-0813, minimal and ultra were added later",
        _NOW,
    ),
    EffortMapping(
        frozenset({"deepseek-ai/deepseek-v4-flash", "deepseek-ai/deepseek-v4-pro"}),
        _utc("2026-04-24"),
        None,
        "official",
        "the release's encoder, of which the weights are; later checkpoints have profiles of their own",
        _APRIL,
    ),
)


def limits_of(model: str, at: date) -> ModelLimits | None:
    """The line of a model that holds at a time (a day without a time begins at 00:00 UTC); None if none does."""
    name, instant = model.lower(), _instant(at)
    return next((line for line in LIMITS if line.model == name and _holds(line, instant)), None)


def mapped_effort(model: str, effort: str, at: date) -> str:
    """The effort that a model exerts for the one asked for; itself for models that the table does not know.

    Raises:
        InvalidSampling: the model knows no such effort at that time, or no efforts at all; names those that it knows.
    """
    name, instant = model.lower(), _instant(at)
    line = next((line for line in EFFORTS if name in line.models and _holds(line, instant)), None)
    if line is None:
        limits = limits_of(model, at)
        if limits is None or limits.default_effort is not None:
            return effort
        raise InvalidSampling(f"reasoning_effort: expected none ({model} has no efforts), found {abbreviated(effort)}")
    if effort not in line.mapping:
        raise InvalidSampling(
            f"reasoning_effort: expected one of {', '.join(line.mapping)} ({model}), found {abbreviated(effort)}"
        )
    return line.mapping[effort]


def parameter_warnings(model: str, at: date, *, thinking: bool, sampling: Sampling, options: ChatOptions) -> list[str]:
    """What a job asks of a model that will not happen as asked, one sentence each, to be shown before the run.

    Args:
        thinking: as it will be, defaults resolved.
    Returns:
        Nothing for a model that the table does not know.
    """
    limits = limits_of(model, at)
    if limits is None:
        gone = [line for line in LIMITS if line.model == model.lower() and line.effective_to is not None]
        return [
            f"{model} was withdrawn at {line.effective_to:%Y-%m-%d %H:%M} UTC; use {SUCCESSORS[line.model]}."
            for line in gone
            if line.effective_to is not None and line.effective_to <= _instant(at) and line.model in SUCCESSORS
        ]
    return [
        *_limit_warnings(limits, thinking, sampling, options),
        *(_sampling_warnings(limits, thinking, sampling) if limits.is_api else ()),
        *(_option_warnings(limits, thinking, options) if limits.is_api else ()),
        *_effort_warnings(limits, at, thinking, options),
    ]


def _limit_warnings(limits: ModelLimits, thinking: bool, sampling: Sampling, options: ChatOptions) -> Iterator[str]:
    if sampling.max_tokens > limits.max_output_tokens:
        yield f"max_tokens is {sampling.max_tokens:,}, but {limits.model} answers with at most " + (
            f"{limits.max_output_tokens:,} tokens."
        )
    if thinking and limits.thinking == "never":
        yield f"{limits.model} does not think: thinking = enabled has no effect."
    if not thinking and limits.thinking == "always":
        yield f"{limits.model} always thinks: thinking = disabled has no effect."
    if options.max_reasoning_tokens is not None and limits.is_api:
        yield f"{limits.model} takes no budget of reasoning: max_reasoning_tokens holds for engines in process only."


def _sampling_warnings(limits: ModelLimits, thinking: bool, sampling: Sampling) -> Iterator[str]:
    mode, ignored = ("with", limits.ignored_thinking) if thinking else ("without", limits.ignored)
    for name in ("temperature", "top_p"):
        value = getattr(sampling, name)
        if name in ignored and value != 1.0:
            consequence = "; a second run may answer differently" if value == 0.0 else ""
            yield f"{limits.model} silently ignores {name} {mode} thinking ({name} = {value:g}){consequence}."
    floor = limits.min_top_p_thinking
    if thinking and floor is not None and sampling.top_p < floor:
        yield f"{limits.model} silently raises top_p to {floor:g} with thinking (top_p = {sampling.top_p:g})."
    if sampling.seed is not None and not limits.has_seed:
        yield f"{limits.model} takes no seed: a second run may answer differently (seed = {sampling.seed})."
    if sampling.min_p > 0.0:
        yield f"{limits.model} takes no min_p (min_p = {sampling.min_p:g})."


def _option_warnings(limits: ModelLimits, thinking: bool, options: ChatOptions) -> Iterator[str]:
    choice = options.tool_choice
    if thinking and choice.mode in ("required", "named") and not limits.can_force_tools_thinking:
        asked = choice.name if choice.mode == "named" else choice.mode
        yield (f"{limits.model} refuses tool_choice = {asked} with thinking (HTTP 400); use auto, or disable thinking.")
    if options.response_format.type not in limits.response_types:
        yield (
            f"{limits.model} takes {' or '.join(limits.response_types)}, not {options.response_format.type}: it is "
            "asked for a JSON object, with the schema in the prompt, and its answers are validated here."
        )
    if len(options.tools) > limits.max_tools:
        yield f"{limits.model} takes at most {limits.max_tools} tools, found {len(options.tools)}."
    if any(tool.is_strict for tool in options.tools):
        for tool in options.tools:
            for problem in strict_tool_problems(tool):
                yield f"{limits.model} cannot take tool {tool.name} as strict: {problem}."


def _effort_warnings(limits: ModelLimits, at: date, thinking: bool, options: ChatOptions) -> Iterator[str]:
    effort = options.reasoning_effort
    if effort is None:
        return
    if not thinking:
        yield f"reasoning_effort = {effort} has no effect without thinking."
        return
    try:
        mapped = mapped_effort(limits.model, effort, at)
    except InvalidSampling as error:
        yield f"{error}."
    else:
        if mapped != effort:
            yield f"{limits.model} exerts effort {mapped} where {effort} is asked for."


_REFUSED_KEYWORDS = ("minLength", "maxLength", "minItems", "maxItems")
_ONE_SCHEMA = ("items", "additionalProperties", "not")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "$defs", "definitions", "patternProperties")


def strict_tool_problems(tool: Tool) -> list[str]:
    """Why DeepSeek's API would refuse a tool in strict mode: pointer into the function, expected and found.

    Every function is strict, and in every object all properties are required and no others allowed; lengths of strings
    and lists cannot be bounded.
    """
    problems = [] if tool.is_strict else [f"at /strict: expected true, found {tool.document.get('strict')!r}"]
    return problems + list(_strict_problems(tool.parameters, "/parameters"))


def _strict_problems(schema: Json, pointer: str) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    properties = schema.get("properties")
    if schema.get("type") == "object" or isinstance(properties, Mapping):
        names = list(properties) if isinstance(properties, Mapping) else []
        required = schema.get("required")
        missing = [name for name in names if not isinstance(required, list) or name not in required]
        if missing:
            yield f"at {pointer}/required: expected all properties, found {abbreviated(missing)} missing"
        if schema.get("additionalProperties") is not False:
            found = abbreviated(schema.get("additionalProperties"))
            yield f"at {pointer}/additionalProperties: expected false, found {found}"
    for keyword in _REFUSED_KEYWORDS:
        if keyword in schema:
            yield f"at {pointer}/{keyword}: expected no such keyword, found {abbreviated(schema[keyword])}"
    for keyword in _ONE_SCHEMA:
        yield from _strict_problems(schema.get(keyword), f"{pointer}/{keyword}")
    for keyword in _SCHEMA_LISTS:
        parts = schema.get(keyword)
        for index, part in enumerate(parts if isinstance(parts, list) else []):
            yield from _strict_problems(part, f"{pointer}/{keyword}/{index}")
    for keyword in _SCHEMA_MAPS:
        named = schema.get(keyword)
        for name, part in named.items() if isinstance(named, Mapping) else ():
            escaped = name.replace("~", "~0").replace("/", "~1")
            yield from _strict_problems(part, f"{pointer}/{keyword}/{escaped}")


def _holds(line: ModelLimits | EffortMapping, instant: datetime) -> bool:
    return line.effective_from <= instant and (line.effective_to is None or instant < line.effective_to)


def _instant(at: date) -> datetime:
    if not isinstance(at, datetime):
        return datetime(at.year, at.month, at.day, tzinfo=UTC)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
