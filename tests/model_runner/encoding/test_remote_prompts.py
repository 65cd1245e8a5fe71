"""Prompts without a tokenizer: what is sent alike is laid out alike, and what begins alike shares its beginning."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.encoding.remote_prompts import NUM_BYTES_PER_WORD, RemotePrompts, load_encoder
from moebeam.model_runner.prefix_tree import common_prefix_lengths, prefix_key, token_ids_of
from moebeam.schemas.chat_options import DEFAULT_OPTIONS, ChatOptions, ResponseFormat, Tool, ToolChoice
from moebeam.schemas.errors import InvalidMessages
from moebeam.schemas.records import Message

PROMPTS = RemotePrompts("somebody's model")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(["system", "user", "assistant", "tool"]),
        TEXTS,
        st.dictionaries(st.sampled_from(["name", "tool_call_id"]), TEXTS, max_size=2),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
TOOLS = tuple(Tool(name, {"name": name, "description": "x"}) for name in ("look", "tell"))
OPTIONS = st.builds(
    ChatOptions,
    tools=st.sampled_from([(), TOOLS[:1], TOOLS]),
    tool_choice=st.sampled_from([ToolChoice(), ToolChoice("none")]),
    response_format=st.sampled_from([ResponseFormat(), ResponseFormat("json_object")]),
    thinking=st.sampled_from([None, True, False]),
    reasoning_effort=st.sampled_from([None, "high", "max"]),
)


def words_of(*messages: Message, options: ChatOptions = DEFAULT_OPTIONS) -> bytes:
    (words,) = PROMPTS.encode_batch([PROMPTS.render(messages, options)])
    return prefix_key("", words, are_words=True)


@given(one=MESSAGES, one_options=OPTIONS, other=MESSAGES, other_options=OPTIONS)
def test_two_chats_have_one_key_only_if_they_are_sent_alike(
    one: tuple[Message, ...], one_options: ChatOptions, other: tuple[Message, ...], other_options: ChatOptions
) -> None:
    are_equal = words_of(*one, options=one_options) == words_of(*other, options=other_options)
    assert are_equal == ((one, one_options) == (other, other_options))


def test_no_text_can_spell_the_border_of_another_message() -> None:
    # A layout in plain text would take these for each other.
    assert words_of(Message("user", "a\0")) != words_of(Message("user", "a"))
    layout = PROMPTS.render([Message("user", "a"), Message("assistant", "b")])
    first = layout[0]
    assert layout.startswith(f"{first}user")
    with pytest.raises(InvalidMessages, match="lone surrogate"):
        PROMPTS.render([Message("user", layout.removeprefix(f"{first}user")[1:].removesuffix(first))])


@given(MESSAGES, OPTIONS)
def test_a_key_gives_its_words_back_and_counts_a_word_for_four_bytes(
    messages: tuple[Message, ...], options: ChatOptions
) -> None:
    layout = PROMPTS.render(messages, options)
    (words,) = PROMPTS.encode_batch([layout])
    assert np.array_equal(token_ids_of(prefix_key("t", words, are_words=True)), words)
    assert len(words) == -(-len(layout.encode("utf-8", "surrogateescape")) // NUM_BYTES_PER_WORD)


@pytest.mark.parametrize("letters", ["the quick brown fox ", "敏捷的棕色狐狸", "быстрая лиса "])
def test_chats_that_begin_alike_share_the_words_of_their_beginning(letters: str) -> None:
    system = Message("system", letters * 20)
    tools = replace(DEFAULT_OPTIONS, tools=TOOLS)
    keys = sorted(words_of(system, Message("user", text), options=tools) for text in ("one", "two"))
    num_shared = common_prefix_lengths(keys)[1]
    assert num_shared * NUM_BYTES_PER_WORD > len(system.content.encode())
    # The tools stand between the system text and the turns, as providers put them.
    keys = sorted(words_of(system, Message("user", "one"), options=options) for options in (tools, DEFAULT_OPTIONS))
    assert 0 <= num_shared - common_prefix_lengths(keys)[1] < 40
    # How the answer begins is no part of what is shared.
    thinking = replace(tools, thinking=True)
    keys = sorted(words_of(system, Message("user", "one"), options=options) for options in (tools, thinking))
    assert common_prefix_lengths(keys)[1] > num_shared


def test_only_a_prompt_that_cannot_fit_is_refused() -> None:
    known = RemotePrompts.of_model("deepseek-v4-flash")
    assert known.context_length == 1024 * 1024
    assert known.fits(1_900_000, 8_192), "four bytes may be half a token"
    assert not known.fits(2_200_000, 8_192)
    assert PROMPTS.context_length is None
    assert PROMPTS.fits(10**9, 10**6), "nobody knows this model's context"


def test_text_that_is_no_unicode_is_refused_by_name() -> None:
    with pytest.raises(InvalidMessages, match="lone surrogate"):
        PROMPTS.render([Message("user", "a\udcfe")])
    with pytest.raises(InvalidMessages, match="at least one"):
        PROMPTS.render([])


def test_default_thinking_follows_the_known_limits_of_the_model() -> None:
    assert RemotePrompts("deepseek-v4-flash").thinks(DEFAULT_OPTIONS)
    assert not PROMPTS.thinks(DEFAULT_OPTIONS)
    assert PROMPTS.thinks(replace(DEFAULT_OPTIONS, thinking=True))


def test_neither_torch_nor_beam_is_needed() -> None:
    code = (
        "import sys; from moebeam.model_runner.encoding.remote_prompts import load_encoder; "
        "load_encoder('', 'auto', 'm'); assert not {'torch', 'apache_beam'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tokenizers_folder_gives_the_exact_encoder(tiny_checkpoint: Path) -> None:
    assert not load_encoder(str(tiny_checkpoint), "auto", "m").is_estimated
    assert load_encoder("", "auto", "m").is_estimated
