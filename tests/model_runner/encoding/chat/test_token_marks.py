"""Marks on spelled tokens: found everywhere, taken away without a trace, none in ordinary text."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.encoding.chat.token_marks import MARK, NO_MARKS, TokenMarks

TOKENS = ["<｜User｜>", "<｜User｜>>", "<think>", "</think>", "<ab>", "ab", "b>", "aba", "[[", "  ", "\n", "｜DSML｜"]
MARKS = TokenMarks(TOKENS)

texts = st.lists(st.sampled_from([*TOKENS, MARK, "<", "｜User｜>", "a", "b", ">", "["]) | st.text(max_size=2)).map(
    "".join
)


@given(text=texts, but=st.sets(st.sampled_from(TOKENS)))
def test_marks_can_be_taken_away_and_leave_the_text(text: str, but: set[str]) -> None:
    assert MARKS.plain(MARKS.mark(text, but=but)) == text


@given(text=texts)
def test_marked_text_spells_no_token(text: str) -> None:
    marked = MARKS.mark(text)
    assert not [token for token in MARKS.texts if token in marked]
    assert MARKS.has_token_text(text) is (marked != text)


@given(pieces=st.lists(st.tuples(texts, st.sampled_from(sorted(MARKS.texts)))))
def test_sections_join_to_the_prompt_and_keep_genuine_tokens_apart(pieces: list[tuple[str, str]]) -> None:
    prompt = "".join(MARKS.mark(text) + token for text, token in pieces)
    sections = list(MARKS.sections(prompt))
    assert "".join(text for text, _ in sections) == MARKS.plain(prompt)
    assert len(sections) == len([text for text, _ in sections if text])
    for text, is_data in sections:
        assert is_data or MARKS.plain(text) == text


def test_section_of_data_reaches_from_token_to_token() -> None:
    prompt = "a<ab>" + MARKS.mark("x <think> y") + "<ab>z"
    assert list(MARKS.sections(prompt)) == [("a<ab>", False), ("x <think> y", True), ("<ab>z", False)]


@pytest.mark.parametrize("text", ["", "1 < 2 > 1", f"x{MARK}y", "<thin", "  \n", "天气"])
def test_ordinary_text_is_not_touched(text: str) -> None:
    assert MARKS.mark(text) == text
    assert MARKS.plain(text) == text


def test_tokens_that_a_caller_needs_are_left() -> None:
    assert MARKS.mark("<think><ab>", but=["<think>"]) == f"<think><{MARK}a{MARK}b{MARK}>"


def test_json_is_marked_in_strings_and_keys() -> None:
    marked = MARKS.mark_json({"[[": ["<think>", 1, None, True, {"k": "x"}]})
    assert marked == {f"[{MARK}[": [f"<{MARK}think>", 1, None, True, {"k": "x"}]}


def test_without_tokens_nothing_is_marked() -> None:
    assert NO_MARKS.mark(f"<think>{MARK}") == f"<think>{MARK}"
    assert list(NO_MARKS.sections("<think>")) == [("<think>", False)]
