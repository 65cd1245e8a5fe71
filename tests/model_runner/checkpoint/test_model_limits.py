from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest

from moebeam.model_runner.checkpoint.model_limits import (
    EffortMapping,
    ModelLimits,
    find_limits,
    map_effort,
    read_model_limits,
)
from moebeam.model_runner.checkpoint.parameter_warnings import parameter_warnings
from moebeam.model_runner.checkpoint.strict_tools import strict_tool_problems
from moebeam.schemas.chat_options import ChatOptions, ResponseFormat, Tool, ToolChoice
from moebeam.schemas.errors import InvalidSampling
from moebeam.schemas.records import Sampling

APRIL, AUGUST, NOVEMBER = date(2026, 4, 30), date(2026, 8, 5), date(2026, 11, 23)
PLAIN = Sampling(max_tokens=100, temperature=1.0)
STRICT = {
    "name": "f",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


def limits(model: str, at: date = NOVEMBER) -> ModelLimits:
    found = find_limits(model, at)
    assert found is not None
    return found


def warnings(
    model: str = "deepseek-v4-pro",
    at: date = NOVEMBER,
    *,
    thinking: bool = True,
    sampling: Sampling = PLAIN,
    **options: Any,
) -> list[str]:
    return parameter_warnings(model, at, thinking=thinking, sampling=sampling, options=ChatOptions(**options))


@pytest.mark.parametrize("model", ["deepseek-v4-flash", "deepseek-v4-pro", "deepseek-flash"])
def test_v4_has_the_documented_limits(model: str) -> None:
    found = limits(model)
    assert (found.context_tokens, found.max_output_tokens, found.max_tools) == (1_048_576, 393_216, 128)
    assert (found.thinking, found.default_effort, found.response_types) == ("default", "high", ("text", "json_object"))
    assert found.max_tokens_by_default(thinking=False) == 8192
    assert found.max_tokens_by_default(thinking=True, effort="high") == 65536
    assert found.max_tokens_by_default(thinking=True, effort="max") == 131072
    assert found.max_tokens_by_default(thinking=False, effort="max") == 8192


@pytest.mark.parametrize("model", ["deepseek-chat", "deepseek-reasoner"])
def test_old_names_hold_until_the_minute_of_their_withdrawal(model: str) -> None:
    assert find_limits(model, date(2026, 4, 23)) is None
    assert find_limits(model, date(2026, 7, 24)) is not None
    assert find_limits(model, datetime(2026, 7, 24, 15, 58, tzinfo=UTC)) is not None
    assert find_limits(model, datetime(2026, 7, 24, 15, 59, tzinfo=UTC)) is None
    assert find_limits(model, datetime(2026, 7, 24, 23, 58, tzinfo=timezone(timedelta(hours=8)))) is not None
    assert find_limits(model, datetime(2026, 7, 24, 15, 59)) is None
    [warning] = warnings(model)
    assert warning.startswith(f"{model} was withdrawn at 2026-07-24 15:59 UTC; use deepseek-v4-flash with thinking")


def test_open_weights_know_only_their_context() -> None:
    assert (
        limits("deepseek-ai/DeepSeek-V3").context_tokens == limits("deepseek-ai/DeepSeek-R1").context_tokens == 131072
    )
    asked = Sampling(max_tokens=10, temperature=0.0, top_p=0.5, seed=1, min_p=0.1)
    choice = ToolChoice("named", "f")
    assert warnings("deepseek-ai/DeepSeek-V4-Flash", sampling=asked, tool_choice=choice, max_reasoning_tokens=5) == []


def test_nothing_is_said_of_unknown_models() -> None:
    assert find_limits("moebeam-tickets-v4", NOVEMBER) is None
    assert warnings("moebeam-tickets-v4", sampling=Sampling(10**9), reasoning_effort="enormous") == []
    assert map_effort("moebeam-tickets-v4", "enormous", NOVEMBER) == "enormous"


@pytest.mark.parametrize("lines", [read_model_limits().limits, read_model_limits().efforts])
def test_no_two_lines_hold_at_once_and_all_name_their_source(lines: tuple[ModelLimits | EffortMapping, ...]) -> None:
    held: list[tuple[str, datetime, datetime]] = []
    for line in lines:
        assert line.source
        for model in [line.model] if isinstance(line, ModelLimits) else line.models:
            assert model == model.lower()
            end = line.effective_to or datetime.max.replace(tzinfo=UTC)
            assert line.effective_from < end
            assert not any(model == other and line.effective_from < to and since < end for other, since, to in held)
            held.append((model, line.effective_from, end))


@pytest.mark.parametrize(
    ("model", "at", "expected"),
    [
        ("deepseek-v4-flash", APRIL, "low>high medium>high high>high xhigh>max max>max"),
        ("deepseek-v4-pro", AUGUST, "low>high medium>high high>high xhigh>max max>max"),
        ("deepseek-v4-flash", AUGUST, "low>low medium>high high>high xhigh>high max>max"),
        *(
            (model, NOVEMBER, "minimal>low low>low medium>high high>high xhigh>high max>max ultra>max")
            for model in ("deepseek-v4-flash", "deepseek-v4-pro", "DeepSeek-Flash")
        ),
    ],
)
def test_efforts_are_mapped_as_of_their_date(model: str, at: date, expected: str) -> None:
    efforts = ("minimal", "low", "medium", "high", "xhigh", "max", "ultra")
    found: list[str] = []
    for effort in efforts:
        try:
            found.append(f"{effort}>{map_effort(model, effort, at)}")
        except InvalidSampling as error:
            assert f"found '{effort}'" in str(error)
    assert " ".join(found) == expected


def test_unknown_effort_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InvalidSampling, match=r"expected one of low, medium, high, xhigh, max \(.*\), found 'ultra'"):
        map_effort("deepseek-v4-flash", "ultra", APRIL)
    with pytest.raises(InvalidSampling, match="expected none"):
        map_effort("deepseek-ai/DeepSeek-R1", "high", NOVEMBER)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, []),
        ({"sampling": Sampling(10)}, ["ignores temperature with thinking (temperature = 0); a second run may answer"]),
        ({"sampling": Sampling(10), "thinking": False}, []),
        ({"sampling": Sampling(10, 1.0, top_p=0.9)}, ["ignores top_p with thinking (top_p = 0.9)."]),
        ({"sampling": Sampling(10, 1.0, top_p=0.9), "thinking": False}, []),
        ({"sampling": Sampling(10, 1.0, top_p=0.9), "model": "deepseek-flash"}, ["raises top_p to 0.95 with thinking"]),
        ({"sampling": Sampling(10, 1.0, top_p=0.97), "model": "deepseek-flash"}, []),
        (
            {"sampling": Sampling(10, 1.0, top_p=0.9), "model": "deepseek-flash", "thinking": False},
            ["ignores top_p without thinking"],
        ),
        ({"sampling": Sampling(10, 1.0, top_p=0.9), "model": "deepseek-v4-flash", "at": APRIL}, ["ignores top_p with"]),
        ({"sampling": Sampling(10, 1.0, seed=7)}, ["takes no seed"]),
        ({"sampling": Sampling(10, 1.0, min_p=0.1)}, ["takes no min_p"]),
        (
            {"sampling": Sampling(393_217, 1.0)},
            ["max_tokens is 393,217, but deepseek-v4-pro answers with at most 393,"],
        ),
        ({"tool_choice": ToolChoice("required")}, ["refuses tool_choice = required with thinking (HTTP 400)"]),
        ({"tool_choice": ToolChoice("named", "f")}, ["refuses tool_choice = f with thinking"]),
        ({"tool_choice": ToolChoice("required"), "thinking": False}, []),
        ({"response_format": ResponseFormat("json_schema", {})}, ["takes text or json_object, not json_schema"]),
        ({"response_format": ResponseFormat("json_object")}, []),
        ({"tools": (Tool("f", {"name": "f"}),) * 129}, ["takes at most 128 tools, found 129"]),
        ({"tools": (Tool("f", STRICT),)}, []),
        ({"tools": (Tool("f", STRICT), Tool("g", {**STRICT, "strict": False}))}, ["cannot take tool g as strict: at"]),
        ({"reasoning_effort": "high"}, []),
        ({"reasoning_effort": "xhigh"}, ["exerts effort high where xhigh is asked for"]),
        ({"reasoning_effort": "huge"}, ["expected one of minimal, low,"]),
        ({"reasoning_effort": "max", "thinking": False}, ["reasoning_effort = max has no effect without thinking"]),
        ({"max_reasoning_tokens": 100}, ["holds for engines in process only"]),
        ({"model": "deepseek-chat", "at": APRIL}, ["does not think"]),
        ({"model": "deepseek-reasoner", "at": APRIL, "thinking": False}, ["always thinks"]),
    ],
)
def test_warning_says_what_will_not_happen_as_asked(asked: dict[str, Any], expected: list[str]) -> None:
    found = warnings(**asked)
    assert len(found) == len(expected)
    for sentence, part in zip(found, expected, strict=True):
        assert part in sentence
        assert sentence.endswith(".") and ".." not in sentence


def test_strict_tool_is_held_to_the_rules_at_every_depth() -> None:
    assert strict_tool_problems(Tool("f", STRICT)) == []
    assert strict_tool_problems(Tool("f", {"name": "f", "strict": True})) == []
    inner = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 3}, "y": {}}, "required": ["x"]}
    parameters = {
        **STRICT["parameters"],  # type: ignore[dict-item]
        "properties": {"a": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/i/n"}, inner]}, "minItems": 1}},
        "$defs": {"i/n": {"type": "object", "additionalProperties": True}},
    }
    assert strict_tool_problems(Tool("f", {"name": "f", "parameters": parameters})) == [
        "at /strict: expected true, found None",
        "at /parameters/properties/a/minItems: expected no such keyword, found 1",
        "at /parameters/properties/a/items/anyOf/1/required: expected all properties, found ['y'] missing",
        "at /parameters/properties/a/items/anyOf/1/additionalProperties: expected false, found None",
        "at /parameters/properties/a/items/anyOf/1/properties/x/maxLength: expected no such keyword, found 3",
        "at /parameters/$defs/i~1n/additionalProperties: expected false, found True",
    ]


def test_property_named_like_a_keyword_is_no_keyword() -> None:
    parameters = {**STRICT["parameters"], "properties": {"maxLength": {"type": "integer"}}, "required": ["maxLength"]}  # type: ignore[dict-item]
    assert strict_tool_problems(Tool("f", {**STRICT, "parameters": parameters})) == []
