"""Taking answers apart: total, and no character is lost."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import contextlib
import html
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.encoding.chat.answers import ParsedAnswer, parse_answer, strip_end_marker
from moebeam.model_runner.encoding.chat.call_formats import DEEPSEEK_V3, DEEPSEEK_V3_1, HERMES, CallFormat, FoundCalls
from moebeam.model_runner.encoding.deepseek.deepseek_v4 import DeepSeekV4
from moebeam.model_runner.encoding.deepseek.dsml import V4_1_CALLS, V4_CALLS
from moebeam.model_runner.encoding.deepseek.dsml_tags import CUT_END, LOOSE_PARAMETER_END, TAG
from moebeam.schemas.records import ToolCall

V4 = DeepSeekV4()
EOS = "<｜end▁of▁sentence｜>"
CALL = ToolCall("call_0", "f", '{"a": "x"}')
CALLS = V4.render_calls([CALL])
FORMATS: list[CallFormat | None] = [None, V4_CALLS, V4_1_CALLS, DEEPSEEK_V3, DEEPSEEK_V3_1, HERMES]

pieces = st.sampled_from(
    [
        *("<think>", "</think>", EOS, "\n\n", "\n", " ", "x", '"', "{", "}", "\\", "｜DSML｜", "<｜DSML｜tool_calls>"),
        *("</｜DSML｜tool_calls>", '<｜DSML｜invoke name="f">', "</｜DSML｜invoke>", "</｜DSML｜parameter>"),
        *('<｜DSML｜parameter name="k" string="true">', '<｜DSML｜parameter name="k" string="false">', "<tool_call>"),
        *("</tool_call>", '{"name": "f", "arguments": {}}', "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function"),
        *("<｜tool▁sep｜>", "f\n```json\n{}\n```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", CALLS, "[" * 2000),
    ]
)
noise = st.lists(pieces | st.text(max_size=3), max_size=14).map("".join)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A good answer that was cut, or got something in its midst."""
    call_format = draw(st.sampled_from([found for found in FORMATS if found]))
    calls = [CALL, ToolCall("", "g", '{"n": [1], "t": "</think>"}')]
    text = f"why</think>so{call_format.render(calls)}{EOS}"
    at = draw(st.integers(0, len(text)))
    end = draw(st.integers(at, min(len(text), at + 9)) | st.just(len(text)))
    return text[:at] + draw(noise) + text[end:]


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda found: found.name if found else "none")
@pytest.mark.parametrize("starts_in_reasoning", [False, True])
@given(text=noise | mutated(), has_reasoning=st.booleans())
def test_any_text_is_parsed_and_every_character_is_accounted_for(
    call_format: CallFormat | None, starts_in_reasoning: bool, text: str, has_reasoning: bool
) -> None:
    answer = parse_answer(
        text,
        starts_in_reasoning=starts_in_reasoning,
        has_reasoning=has_reasoning,
        call_format=call_format,
        end_marker=EOS,
    )
    assert_accounted(strip_end_marker(text, EOS), answer, call_format, has_reasoning)


def assert_accounted(text: str, answer: ParsedAnswer, call_format: CallFormat | None, has_reasoning: bool) -> None:
    """Reasoning, content and what follows them are the text, with nothing but understood markup between."""
    rest = text
    mended = [name for name in answer.repaired if name != "end_of_thinking"]
    if mended != list(answer.repaired):
        assert answer.reasoning_content is None
        rest = rest.lstrip()
        assert rest.startswith("</think>")
        rest = rest.removeprefix("</think>")
    if answer.reasoning_content is not None:
        lead = len(rest) - len(rest.lstrip())
        if has_reasoning and rest.startswith("<think>", lead):
            rest = rest[:lead] + rest[lead + len("<think>") :]
        assert rest.startswith(answer.reasoning_content)
        rest = rest.removeprefix(answer.reasoning_content).removeprefix("</think>")
    if mended:
        assert call_format is not None
        found_calls = call_format.read(rest, 0)
        assert found_calls is not None
        assert (found_calls.calls, list(found_calls.repaired), answer.error) == (answer.tool_calls, mended, None)
        before = rest[: found_calls.end_of_content]
        assert answer.content == "\n\n".join(filter(None, (before, found_calls.rest)))
        assert_mended_calls_hold(rest[found_calls.end_of_content :], found_calls)
        return
    assert rest.startswith(answer.content)
    rest = rest.removeprefix(answer.content)
    if answer.error is not None:
        assert rest == ""
        assert "at character " in str(answer.error)
        assert answer.tool_calls == ()
    elif not answer.tool_calls:
        assert rest == ""
    else:
        assert call_format is not None
        found = call_format.find(rest, 0)
        assert found is not None and found[0] == 0
        assert call_format.parse(rest, found[1]) == answer.tool_calls
        assert all(isinstance(json.loads(call.arguments), dict) for call in answer.tool_calls)


def assert_mended_calls_hold(text: str, found: FoundCalls) -> None:
    """Text between tags is what a call holds, or stands whole and in its order in the text beside the calls."""
    if "escaped_markup" in found.repaired:
        text = html.unescape(text)
    between: list[str] = []
    position = 0
    for tag in [*TAG.finditer(text), None]:
        piece = text[position : tag.start() if tag else len(text)].strip()
        position = tag.end() if tag else position
        if piece and not CUT_END.fullmatch(piece):
            between.append(piece)
    objects = [json.loads(call.arguments) for call in found.calls]
    assert all(isinstance(arguments, dict) for arguments in objects)
    held = [*objects, *(value for arguments in objects for value in arguments.values())]

    def is_held(piece: str) -> bool:
        piece = LOOSE_PARAMETER_END.sub("", piece).strip()
        if any(piece in value for value in held if isinstance(value, str)):
            return True
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(piece)
            if isinstance(value, dict) and value not in held:  # parameters may follow it, or it was unwrapped
                return value.get("arguments") in objects or any({**have, **value} == have for have in objects)
            return value in held
        return False

    def fits(index: int, rest: str) -> bool:
        if index == len(between):
            return not rest
        piece = between[index]
        if is_held(piece) and fits(index + 1, rest):
            return True
        after = rest.removeprefix(piece)
        return rest.startswith(piece) and (not after or after.startswith("\n\n")) and fits(index + 1, after[2:])

    assert fits(0, found.rest), (between, held, found.rest)


@pytest.mark.parametrize(
    ("text", "starts_in_reasoning", "expected"),
    [
        ("hi", False, ParsedAnswer("hi")),
        (f"hi{EOS}{EOS}", False, ParsedAnswer("hi")),
        (f"a{EOS}b", False, ParsedAnswer(f"a{EOS}b")),
        ("why</think>so", True, ParsedAnswer("so", "why")),
        ("</think>so", True, ParsedAnswer("so", "")),
        ("why", True, ParsedAnswer("", "why")),
        ("why</think>", True, ParsedAnswer("", "why")),
        ("a</think>b</think>c", True, ParsedAnswer("b</think>c", "a")),
        ("why</think>so", False, ParsedAnswer("why</think>so")),
        ("<think>why</think>so", False, ParsedAnswer("so", "why")),
        ("\n<think>why</think>so", False, ParsedAnswer("so", "\nwhy")),
        ("<think>why</think>so", True, ParsedAnswer("so", "why")),
        (f"why</think>so{CALLS}{EOS}", True, ParsedAnswer("so", "why", (CALL,))),
        (CALLS, False, ParsedAnswer("", None, (CALL,))),
        (f"so {CALLS.lstrip()}\n", False, ParsedAnswer("so ", None, (CALL,))),
        (f"so\n{CALLS}", False, ParsedAnswer("so\n", None, (CALL,))),
        (f"why{CALLS}", True, ParsedAnswer("", "why", (CALL,))),
        ("", True, ParsedAnswer("", "")),
        ("", False, ParsedAnswer("")),
    ],
)
def test_answers_are_taken_apart(text: str, starts_in_reasoning: bool, expected: ParsedAnswer) -> None:
    assert V4.parse(text, starts_in_reasoning=starts_in_reasoning, has_tools=True) == expected


def test_calls_stay_in_the_content_where_no_tools_were_given() -> None:
    text = f"so{CALLS}"
    assert V4.parse(text, starts_in_reasoning=False, has_tools=False) == ParsedAnswer(text)


def test_malformed_calls_stay_in_the_content_and_the_error_counts_from_the_texts_begin() -> None:
    calls = CALLS.replace("</｜DSML｜parameter>", "</｜DSML｜parameter>tail")
    answer = V4.parse(f"why</think>so{calls}", starts_in_reasoning=True, has_tools=True)
    assert (answer.reasoning_content, answer.content, answer.tool_calls) == ("why", f"so{calls}", ())
    assert answer.error is not None
    assert f"at character {len('why</think>so') + calls.index('tail')}:" in str(answer.error)


def test_thinking_that_is_closed_without_being_begun_is_markup_at_the_begin_only() -> None:
    answer = V4.parse("</think>\nso", starts_in_reasoning=False, has_tools=False)
    assert answer == ParsedAnswer("\nso", repaired=("end_of_thinking",))
    assert V4.parse("a</think>so", starts_in_reasoning=False, has_tools=False) == ParsedAnswer("a</think>so")


def test_calls_that_the_reasoning_only_speaks_of_are_part_of_it() -> None:
    answer = V4.parse(f"I write <｜DSML｜tool_calls> now</think>so{CALLS}", starts_in_reasoning=True, has_tools=True)
    assert answer == ParsedAnswer("so", "I write <｜DSML｜tool_calls> now", (CALL,))


def is_plain(text: str) -> bool:
    """Whether a text holds no markup: Hypothesis draws texts of our code's constants too."""
    return not any(mark in text.lower() for mark in ("think>", "dsml", EOS.lower()))


PLAIN = st.text().filter(is_plain)


@given(reasoning=PLAIN, content=PLAIN, given_calls=st.lists(st.just(CALL), max_size=3))
def test_what_a_model_wrote_is_read_back(reasoning: str, content: str, given_calls: list[ToolCall]) -> None:
    text = f"{reasoning}</think>{content}{V4.render_calls(given_calls)}{EOS}"
    answer = V4.parse(text, starts_in_reasoning=True, has_tools=True)
    expected = tuple(ToolCall(f"call_{index}", "f", CALL.arguments) for index in range(len(given_calls)))
    assert answer == ParsedAnswer(content, reasoning, expected)


def test_many_end_markers_and_deep_brackets_take_no_time() -> None:
    """A model that runs away must not hold up a worker: these take hours if each step copies the text."""
    assert V4.parse(EOS * 200_000, starts_in_reasoning=False, has_tools=True) == ParsedAnswer("")
    text = CALLS.replace('string="true">x', 'string="false">' + "[" * 200_000)
    assert V4.parse(text, starts_in_reasoning=False, has_tools=True).repaired == ("text_for_json",)
