"""The commonest error messages of a run's rejects, counted in bounded memory.

Part of *publish*. Messages stay in `rejects/` as they are. What leaves it, for the manifest and the screen, holds no
text of rows: messages of engines and providers stay whole, as in errors that end a run; those about a row's data or
its answer are cut where they begin to quote it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from moebeam.schemas.arrow import list_values
from moebeam.schemas.canonical import Json

MAX_LISTED = 10
"""Messages in the manifest; the summary shows three of them."""

_MAX_KINDS = 1000
"""Kinds of messages that are told apart; of more, the rarest so far are dropped."""

_MAX_CHARACTERS = 200
_QUOTED = re.compile(r"""["'`{\[\u2018\u201c]|\b(found|raised)\b""")
_CHANGING = re.compile(r"\b[0-9a-f]{8,}(-[0-9a-f]{4,})*\b|\breq(uest)?[-_]\w+|(?<!HTTP )\b\d+")
"""What differs between messages of one kind: numbers, and ids of requests."""


@dataclass(frozen=True, slots=True)
class MessageCount:
    """Rejects with messages of one kind; `message` is the first of them in alphabetical order."""

    error_type: str
    message: str
    num_rows: int

    @property
    def kind(self) -> tuple[str, str]:
        return self.error_type, _CHANGING.sub("#", self.message)

    def to_json(self) -> dict[str, Json]:
        return {"error_type": self.error_type, "message": self.message, "num_rows": self.num_rows}


MESSAGE_COLUMNS = ("error_type", "error_stage", "error_message")


def count_messages(rejects: pa.Table) -> tuple[MessageCount, ...]:
    """Count the messages of a table of rejects, the commonest first."""
    columns = (list_values(rejects, name) for name in MESSAGE_COLUMNS)
    return merge_messages(
        MessageCount(kind, drop_quotes(stage, message), 1) for kind, stage, message in zip(*columns, strict=True)
    )


def drop_quotes(stage: str, message: str) -> str:
    """A reject's message without what it quotes of the row or its answer; on one line, and not long."""
    text = " ".join(message.split())
    if stage != "run" and (quote := _QUOTED.search(text)) is not None:
        text = text[: quote.start()].rstrip(" ,:;(") or text[: quote.start()]
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"


def merge_messages(counts: Iterable[MessageCount]) -> tuple[MessageCount, ...]:
    """Add up counts by kind, the commonest first."""
    merged: dict[tuple[str, str], MessageCount] = {}
    for count in counts:
        found = merged.get(count.kind)
        if found is not None:
            message = min(found.message, count.message)
            count = MessageCount(count.error_type, message, found.num_rows + count.num_rows)
        merged[count.kind] = count
    ordered = sorted(merged.values(), key=lambda count: (-count.num_rows, count.error_type, count.message))
    return tuple(ordered[:_MAX_KINDS])


def list_commonest(counts: Iterable[MessageCount]) -> list[Json]:
    """The commonest messages, for the manifest."""
    return [count.to_json() for count in merge_messages(counts)[:MAX_LISTED]]


def parse_commonest(values: Iterable[Mapping[str, Json]]) -> tuple[MessageCount, ...]:
    """The inverse of `list_commonest`."""
    return tuple(
        MessageCount(str(value["error_type"]), str(value["message"]), int(str(value["num_rows"]))) for value in values
    )
