"""The lines of a stream of server-sent events, of bytes that come in pieces."""


class EventLines:
    """Cuts bytes at line ends; only those of ASCII, since others may stand inside of JSON strings."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that a piece completes, without their ends; empty ones may be among them."""
        if b"\r" in piece:
            piece = piece.replace(b"\r", b"\n")
        if b"\n" not in piece:
            self._begun.append(piece)
            return []
        first, *lines = piece.split(b"\n")
        self._begun.append(first)
        complete = [b"".join(self._begun), *lines[:-1]]
        self._begun = [lines[-1]]
        return complete

    def end(self) -> bytes:
        """What stands after the last line end."""
        return b"".join(self._begun)
