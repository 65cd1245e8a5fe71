"""What DeepSeek's models take, by name and time: limits, defaults and efforts, as data (`model_limits.toml`).

Read once a process, and checked. Consulted before a run by `parameter_warnings.py`, and by the `openai` engine.

Names are those of DeepSeek's own API, and `deepseek-ai/...` for open weights, which run in process and to which the
API's rules do not apply. Models that the file does not name have no known limits: nothing is said about them.
"""

import tomllib
from datetime import UTC, date, datetime
from functools import cache
from importlib import resources
from typing import Any, Literal, TypeAlias

from pydantic import AwareDatetime, BaseModel, ConfigDict

from moebeam.schemas.chat_options import ResponseType
from moebeam.schemas.errors import InvalidSampling, abbreviate

Evidence: TypeAlias = Literal["official", "secondary"]
Thinking: TypeAlias = Literal["default", "always", "never"]


class _DatedLine(BaseModel):
    """A line and when it holds: from `effective_from` until just before `effective_to`, in UTC."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    effective_from: AwareDatetime
    effective_to: AwareDatetime | None = None
    evidence: Evidence
    source: str

    def holds(self, at: date) -> bool:
        """Whether the line holds at a time; a day without a time begins at 00:00 UTC."""
        instant = to_instant(at)
        return self.effective_from <= instant and (self.effective_to is None or instant < self.effective_to)


class ModelLimits(_DatedLine):
    """One model, while the line holds.

    Attributes:
        is_api: served by DeepSeek's API; otherwise open weights, which know only their context.
        default_effort: where none is asked for; empty for a model that has no efforts.
        default_max_tokens: of the answer, where `max_tokens` is unset: without thinking, with it, at effort `max`.
        thinking: on by default, or not to be switched.
        ignored: sampling parameters that are silently ignored without thinking.
        ignored_thinking: those ignored with thinking.
        min_top_p_thinking: a smaller `top_p` is silently raised to this.
        can_force_tools_thinking: whether `tool_choice` may be `required` or a name.
        successor: what to use in place of a model that was withdrawn.
    """

    model: str
    context_tokens: int
    max_output_tokens: int
    is_api: bool
    thinking: Thinking
    default_effort: str
    default_max_tokens: tuple[int, int, int] | None = None
    ignored: tuple[str, ...]
    ignored_thinking: tuple[str, ...]
    min_top_p_thinking: float | None = None
    can_force_tools_thinking: bool
    has_seed: bool
    response_types: tuple[ResponseType, ...]
    max_tools: int
    successor: str | None = None

    def max_tokens_by_default(self, *, thinking: bool, effort: str | None = None) -> int | None:
        """Most tokens of an answer whose request does not say; None where nothing is documented."""
        if self.default_max_tokens is None:
            return None
        plain, with_thinking, at_max = self.default_max_tokens
        return plain if not thinking else at_max if effort == "max" else with_thinking


class EffortMapping(_DatedLine):
    """Which effort models exert for the one that was asked for."""

    models: frozenset[str]
    mapping: dict[str, str]


class ModelLimitsFile(BaseModel):
    """All lines of the file."""

    limits: tuple[ModelLimits, ...]
    efforts: tuple[EffortMapping, ...]


@cache
def read_model_limits() -> ModelLimitsFile:
    """The shipped file; a line of several models becomes one line for each."""
    text = resources.files("moebeam.model_runner.checkpoint").joinpath("model_limits.toml").read_text("utf-8")
    content: dict[str, Any] = tomllib.loads(text)
    rules = content["rules"]
    limits = [
        {"model": model, **rules[line["rules"]], **{key: line[key] for key in line.keys() - {"models", "rules"}}}
        for line in content["limits"]
        for model in line["models"]
    ]
    return ModelLimitsFile.model_validate({"limits": limits, "efforts": content["efforts"]})


def find_limits(model: str, at: date) -> ModelLimits | None:
    """The line of a model that holds at a time; None if none does."""
    lines = read_model_limits().limits
    return next((line for line in lines if line.model == model.lower() and line.holds(at)), None)


def map_effort(model: str, effort: str, at: date) -> str:
    """The effort that a model exerts for the one asked for; itself for models that the file does not name.

    Raises:
        InvalidSampling: the model knows no such effort at that time, or no efforts at all; names those that it knows.
    """
    efforts = read_model_limits().efforts
    line = next((line for line in efforts if model.lower() in line.models and line.holds(at)), None)
    if line is None:
        limits = find_limits(model, at)
        if limits is None or limits.default_effort:
            return effort
        raise InvalidSampling(f"reasoning_effort: expected none ({model} has no efforts), found {abbreviate(effort)}")
    if effort not in line.mapping:
        raise InvalidSampling(
            f"reasoning_effort: expected one of {', '.join(line.mapping)} ({model}), found {abbreviate(effort)}"
        )
    return line.mapping[effort]


def to_instant(at: date) -> datetime:
    """A time in UTC: a day begins at 00:00 UTC, and a time without a zone is in UTC already."""
    if not isinstance(at, datetime):
        return datetime(at.year, at.month, at.day, tzinfo=UTC)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
