"""Joins the pieces of a streamed text; below `responses.py`."""

from collections.abc import Sequence


def join_pieces(pieces: Sequence[str]) -> str:
    """The text of all pieces. A surrogate pair that was split over two of them becomes its character.

    A surrogate without its other half stays as it is; *validate* says what becomes of it.
    """
    text = "".join(pieces)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return text
