"""Tool calls put together from a message's list or from the pieces of a stream.

Below `responses.py`. A whole message lists its calls one after the other. In a stream the pieces of a call name it by
`index`, which some servers leave out, repeat for all calls or set to -1; then its id and its place tell it apart.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from moebeam.model_runner.openai_engine.response.joined_text import join_pieces
from moebeam.schemas.records import ToolCall


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
class _OpenCall:
    index: int | None
    id: str
    name: str
    arguments: str

    def add(self, piece: CallPiece) -> None:
        self.id = self.id or piece.id
        self.name = piece.name or self.name
        self.arguments += piece.arguments


@dataclass(slots=True)
class CallPieces:
    """The calls of an answer so far, in the order in which they were opened."""

    _calls: list[_OpenCall] = field(default_factory=list[_OpenCall])

    def add_whole(self, pieces: Sequence[CallPiece]) -> None:
        """Take the calls of a whole message: one entry is one call, whatever its index."""
        self._calls += [_OpenCall(None, piece.id, piece.name, piece.arguments) for piece in pieces]

    def add_event(self, pieces: Sequence[CallPiece]) -> None:
        """Take the pieces of one event of a stream; two pieces of an event never belong to one call."""
        taken: list[_OpenCall] = []
        for place, piece in enumerate(pieces):
            num_alike = sum(_continues_unnamed(other, piece.index) for other in pieces[place:])
            call = self._find(piece, taken, num_alike)
            if call is None:
                call = _OpenCall(piece.index, "", "", "")
                self._calls.append(call)
            call.add(piece)
            taken.append(call)

    def finish(self) -> tuple[ToolCall, ...]:
        """All calls; by index where each has one of its own, else as they were opened."""
        indices = [call.index for call in self._calls]
        calls = self._calls
        if None not in indices and len({*indices}) == len(indices):
            calls = sorted(calls, key=lambda call: call.index or 0)
        return tuple(
            ToolCall(call.id or f"call_{place}", call.name, join_pieces([call.arguments]))
            for place, call in enumerate(calls)
        )

    def _find(self, piece: CallPiece, taken: Sequence[_OpenCall], num_alike: int) -> _OpenCall | None:
        """The open call that a piece continues; None if it opens one.

        Args:
            num_alike: unnamed pieces with this one's index from here to the event's end; they go to as many of the
                last calls, in order.
        """
        alike = [
            call for call in self._calls if call.index == piece.index and not any(call is other for other in taken)
        ]
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
        is_open = not last.name or not piece.arguments or not _is_object(last.arguments)
        return last if is_same and is_open else None


def _continues_unnamed(piece: CallPiece, index: int | None) -> bool:
    return not piece.name and piece.index == index


def _is_object(arguments: str) -> bool:
    """Whether arguments are complete, so that more text must be those of another call."""
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
