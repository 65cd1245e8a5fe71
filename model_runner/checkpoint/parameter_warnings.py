"""Warnings, shown before a run and before anything is paid for: what a job asks of its model and will not get."""

from collections.abc import Iterator
from datetime import date

from moebeam.model_runner.checkpoint.model_limits import (
    ModelLimits,
    find_limits,
    map_effort,
    read_model_limits,
    to_instant,
)
from moebeam.model_runner.checkpoint.strict_tools import strict_tool_problems
from moebeam.schemas.chat_options import NO_EFFORT, ChatOptions
from moebeam.schemas.errors import InvalidSampling
from moebeam.schemas.records import Sampling


def parameter_warnings(model: str, at: date, *, thinking: bool, sampling: Sampling, options: ChatOptions) -> list[str]:
    """What a job asks of a model that will not happen as asked, one sentence each, to be shown before the run.

    Args:
        thinking: as it will be, defaults resolved.
    Returns:
        Nothing for a model that the file does not name.
    """
    limits = find_limits(model, at)
    if limits is None:
        return [
            f"{model} was withdrawn at {line.effective_to:%Y-%m-%d %H:%M} UTC; use {line.successor}."
            for line in read_model_limits().limits
            if line.model == model.lower() and line.successor is not None
            if line.effective_to is not None and line.effective_to <= to_instant(at)
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
    if effort in (None, NO_EFFORT):
        return
    if not thinking:
        yield f"reasoning_effort = {effort} has no effect without thinking."
        return
    try:
        mapped = map_effort(limits.model, effort, at)
    except InvalidSampling as error:
        yield f"{error}."
    else:
        if mapped != effort:
            yield f"{limits.model} exerts effort {mapped} where {effort} is asked for."
