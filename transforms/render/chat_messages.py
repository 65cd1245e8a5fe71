"""A row's chat messages: parsed from a column or a batch line, and written to the plan as JSON.

Part of *render*.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from moebeam.schemas.canonical import Json, canonical_json
from moebeam.schemas.errors import InvalidMessages, UnsupportedRequest, abbreviate
from moebeam.schemas.records import Message

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "latest_reminder"})


def parse_messages(value: object) -> tuple[Message, ...]:
    """Parse messages from a list of structs, or from the JSON text of one.

    Raises:
        InvalidMessages: not the chat shape; names the message and the field, expected and found.
        UnsupportedRequest: a content part that is not text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidMessages(f"messages: expected a JSON list, found text that is not JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise InvalidMessages(f"messages: expected a list that is not empty, found {abbreviate(value)}")
    return tuple(_parse_message(index, item) for index, item in enumerate(cast("list[object]", value)))


def messages_json(messages: Sequence[Message]) -> str:
    """Messages as canonical JSON.

    Raises:
        InvalidMessages: a value that JSON cannot hold, or text that is not Unicode.
    """
    try:
        text = canonical_json(
            [{"role": message.role, "content": message.content_json, **message.extra} for message in messages]
        )
        text.encode()
    except (ValueError, TypeError) as error:
        raise InvalidMessages(f"messages: expected text, numbers, lists and objects, found: {error}") from error
    return text


def _parse_message(index: int, item: object) -> Message:
    where = f"messages[{index}]"
    if not isinstance(item, Mapping):
        raise InvalidMessages(f"{where}: expected an object, found {abbreviate(item)}")
    fields = {str(key): value for key, value in cast("Mapping[Any, Any]", item).items() if value is not None}
    role = fields.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidMessages(f"{where}.role: expected one of {', '.join(sorted(ROLES))}, found {abbreviate(role)}")
    content = fields.pop("content", "" if fields else None)
    if isinstance(content, list):
        texts = [_read_text(where, part) for part in cast("list[object]", content)]
        return Message.of_parts(role, texts, cast("dict[str, Json]", fields))
    if not isinstance(content, str):
        raise InvalidMessages(f"{where}.content: expected text, found {abbreviate(content)}")
    return Message(role, content, cast("dict[str, Json]", fields))


def _read_text(where: str, part: object) -> str:
    fields = cast("Mapping[str, object]", part) if isinstance(part, Mapping) else {}
    text = fields.get("text")
    if fields.get("type") != "text" or not isinstance(text, str):
        raise UnsupportedRequest(f"{where}.content: expected text parts only, found {abbreviate(part)}")
    return text
