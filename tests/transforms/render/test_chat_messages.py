"""Chats that rows bring."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.errors import InvalidMessages, UnsupportedRequest
from moebeam.schemas.records import Message
from moebeam.transforms.render.chat_messages import messages_json, parse_messages

MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), st.text()), min_size=1, max_size=4
)


@given(MESSAGES)
def test_messages_survive_the_plan(messages: list[Message]) -> None:
    assert parse_messages(json.loads(messages_json(messages))) == tuple(messages)


def test_text_parts_are_kept_apart_and_other_fields_too() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = parse_messages([{"role": "user", "content": parts, "name": "n", "tool_calls": None}])
    assert message == Message("user", "a\nb", {"name": "n"}, ("a", "b"))
    assert parse_messages(messages_json([message])) == (message,)
    assert parse_messages([{"role": "user", "content": parts[:1]}]) == (Message("user", "a"),)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[{", "text that is not JSON"),
        ([], "a list that is not empty"),
        ({"role": "user"}, "a list that is not empty"),
        (["hi"], r"messages\[0\]: expected an object"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]\.role: expected one of .*found 'robot'"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content: expected text, found 3"),
        ([{"role": "user"}], r"messages\[0\]\.content: expected text, found None"),
    ],
)
def test_what_is_not_a_chat_is_refused_by_field(value: object, expected: str) -> None:
    with pytest.raises(InvalidMessages, match=expected):
        parse_messages(value)


def test_images_are_unsupported_not_ignored() -> None:
    with pytest.raises(UnsupportedRequest, match="image_url"):
        parse_messages([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
