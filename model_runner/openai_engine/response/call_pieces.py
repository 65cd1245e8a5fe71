"""Tool calls put together from a message's list or from the pieces of a stream.

Below `responses.py`. A whole message lists its calls one after the other. In a stream the pieces of a call name it by
`index`, which some servers leave out, repeat for all calls or set to -1; then its id and its place tell it apart.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from moebeam.model_runner.openai_engine.response.joined_text import join_pieces
from moebeam.schemas.errors import MalformedResponse
from moebeam.schemas.records import ToolCall

MAX_CALLS = 256
"""Most calls of an answer, twice the most tools that OpenAI takes."""
_MARKS = re.compile(r'["\\{}\[\]]')


@dataclass(frozen=True, slots=True)
class CallPiece:
    """What one entry of `tool_calls` says of a call; empty for what it leaves out.

    Attributes:
        index: None where it is missing or negative.
    """

    index: int | None
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class _ObjectScan:
    """How far the JSON object has come whose text arrives in pieces; each piece is looked at once."""

    _num_open: int = 0
    _has_begun: bool = False
    _is_object: bool = False
    _is_string: bool = False
    _num_skipped: int = 0

    @property
    def is_closed(self) -> bool:
        """Whether the object is complete."""
        return self._is_object and self._num_open == 0 and not self._is_string

    def feed(self, text: str) -> None:
        if not self._has_begun and (begun := text.lstrip()):
            self._has_begun, self._is_object = True, begun.startswith("{")
        start = self._num_skipped
        for found in _MARKS.finditer(text):
            if found.start() < start:
                continue
            mark = found[0]
            if self._is_string:
                if mark == "\\":
                    start = found.start() + 2
                elif mark == '"':
                    self._is_string = False
            elif mark == '"':
                self._is_string = True
            elif mark != "\\":
                self._num_open += 1 if mark in "{[" else -1
        self._num_skipped = max(0, start - len(text))


@dataclass(slots=True)
class _OpenCall:
    index: int | None
    id: str
    name: str
    arguments: list[str] = field(default_factory=list[str])
    _scan: _ObjectScan = field(default_factory=_ObjectScan)
    _num_scanned: int = 0

    @property
    def has_whole_object(self) -> bool:
        """Whether the arguments are complete, so that more text must be those of another call."""
        for text in self.arguments[self._num_scanned :]:
            self._scan.feed(text)
        self._num_scanned = len(self.arguments)
        return self._scan.is_closed

    def add(self, piece: CallPiece) -> None:
        self.id = self.id or piece.id
        self.name = piece.name or self.name
        if piece.arguments:
            self.arguments.append(piece.arguments)


@dataclass(slots=True)
class CallPieces:
    """The calls of an answer so far, in the order in which they were opened."""

    _calls: list[_OpenCall] = field(default_factory=list[_OpenCall])
    _by_index: dict[int | None, list[_OpenCall]] = field(default_factory=dict[int | None, list[_OpenCall]])

    def add_whole(self, pieces: Sequence[CallPiece]) -> None:
        """Take the calls of a whole message: one entry is one call, whatever its index.

        Raises:
            MalformedResponse: there are too many; so does `add_event`.
        """
        for piece in pieces:
            self._open(None).add(piece)

    def add_event(self, pieces: Sequence[CallPiece]) -> None:
        """Take the pieces of one event of a stream; two pieces of an event never belong to one call."""
        taken: set[int] = set()
        num_unnamed = Counter(piece.index for piece in pieces if not piece.name)
        for piece in pieces:
            call = self._find(piece, taken, num_unnamed[piece.index]) or self._open(piece.index)
            call.add(piece)
            taken.add(id(call))
            num_unnamed[piece.index] -= not piece.name

    def finish(self) -> tuple[ToolCall, ...]:
        """All calls; by index where each has one of its own, else as they were opened."""
        indices = [call.index for call in self._calls]
        calls = self._calls
        if None not in indices and len({*indices}) == len(indices):
            calls = sorted(calls, key=lambda call: call.index or 0)
        return tuple(
            ToolCall(call.id or f"call_{place}", call.name, join_pieces(call.arguments))
            for place, call in enumerate(calls)
        )

    def _open(self, index: int | None) -> _OpenCall:
        if len(self._calls) == MAX_CALLS:
            raise MalformedResponse(f"tool_calls: expected at most {MAX_CALLS}, found more")
        call = _OpenCall(index, "", "")
        self._calls.append(call)
        self._by_index.setdefault(index, []).append(call)
        return call

    def _find(self, piece: CallPiece, taken: set[int], num_alike: int) -> _OpenCall | None:
        """The open call that a piece continues; None if it opens one.

        Args:
            num_alike: unnamed pieces with this one's index from here to the event's end; they go to as many of the
                last calls, in order.
        """
        alike = [call for call in self._by_index.get(piece.index, ()) if id(call) not in taken]
        named = [call for call in alike if piece.id and call.id == piece.id]
        if named:
            return named[-1]
        if not alike:
            return None
        if not piece.name:
            # Servers that make up a new id for each piece send the name once only.
            return alike[-num_alike] if num_alike <= len(alike) else alike[0]
        last = alike[-1]
        is_same = last.name in ("", piece.name) and not (piece.id and last.id)
        is_open = not last.name or not piece.arguments or not last.has_whole_object
        return last if is_same and is_open else None
