"""Finds in a Parquet footer what would end the process if pyarrow looked at it: encryption, and nesting without end.

Specification: the compact protocol of Apache Thrift, and `FileMetaData` of parquet.thrift. Values are skipped and never
kept. Only footers that look suspicious are read here: a megabyte takes about a second.
"""

from collections.abc import Iterator
from functools import lru_cache

_SCHEMA, _ROW_GROUPS, _ENCRYPTION_ALGORITHM = 2, 4, 8
"""Fields of FileMetaData."""

_NUM_CHILDREN = 5
"""Field of SchemaElement."""

_COLUMNS = 1
"""Field of RowGroup."""

_CRYPTO_METADATA, _ENCRYPTED_METADATA = 8, 9
"""Fields of ColumnChunk."""

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_LONG_LIST = 15

MAX_DEPTH = 200
"""Most levels of nesting; pyarrow's stack ends after some ten thousand."""

_NUM_SAFE_NODES = 1000
"""A schema with no more nodes than this can be nested in any way."""


@lru_cache(maxsize=2)  # row groups of one file are read one after another, and each opens it
def has_encrypted_columns(footer: bytes) -> bool:
    """Whether a footer, as stored, says that its file or a column of it is encrypted.

    One that cannot be followed to its end counts as encrypted: nobody knows what it hides.
    """
    try:
        return _FooterReader(footer).has_marks()
    except (IndexError, ValueError, RecursionError):
        return True


def is_too_deep(footer: bytes) -> bool:
    """Whether a footer's schema is nested beyond `MAX_DEPTH`; not said of schemas of few nodes or of a damaged one."""
    try:
        return _FooterReader(footer).measure_depth() > MAX_DEPTH
    except (IndexError, ValueError, RecursionError):
        return False


class _FooterReader:
    """Reads a footer from its first byte; each value is read or skipped in its place."""

    def __init__(self, footer: bytes) -> None:
        self._bytes = footer
        self._place = 0

    def has_marks(self) -> bool:
        """Raises IndexError or ValueError where the footer ends early or is none."""
        for number, kind in self._read_fields():
            if number == _ENCRYPTION_ALGORITHM:
                return True
            if number != _ROW_GROUPS or kind != _LIST:
                self._skip(kind)
            elif any(self._has_marks_in_group() for _ in range(self._read_list_head()[0])):
                return True
        return False

    def measure_depth(self) -> int:
        """Levels of the schema; 0 where it has few nodes. Raises as `has_marks` does."""
        for number, kind in self._read_fields():
            if number != _SCHEMA or kind != _LIST:
                self._skip(kind)
                continue
            num_nodes, _ = self._read_list_head()
            return self._measure_schema(num_nodes) if num_nodes > _NUM_SAFE_NODES else 0
        return 0

    def _measure_schema(self, num_nodes: int) -> int:
        deepest = 0
        waiting: list[int] = []
        for _ in range(num_nodes):
            num_children = 0
            for number, kind in self._read_fields():
                if number == _NUM_CHILDREN and kind == _I32:
                    num_children = self._read_number() >> 1
                else:
                    self._skip(kind)
            if waiting:
                waiting[-1] -= 1
            waiting.append(num_children)
            deepest = max(deepest, len(waiting))
            while waiting and waiting[-1] <= 0:
                waiting.pop()
        return deepest

    def _has_marks_in_group(self) -> bool:
        has_marks = False
        for number, kind in self._read_fields():
            if number != _COLUMNS or kind != _LIST:
                self._skip(kind)
                continue
            for _ in range(self._read_list_head()[0]):
                for column_number, column_kind in self._read_fields():
                    has_marks |= column_number in (_CRYPTO_METADATA, _ENCRYPTED_METADATA)
                    self._skip(column_kind)
        return has_marks

    def _read_fields(self) -> Iterator[tuple[int, int]]:
        """Number and kind of a struct's fields; the caller reads or skips the value of each before the next."""
        number = 0
        while (head := self._read_byte()) & 0x0F != _STOP:
            step = head >> 4
            if step:
                number += step
            else:
                zigzag = self._read_number()
                number = (zigzag >> 1) ^ -(zigzag & 1)
            yield number, head & 0x0F

    def _read_byte(self) -> int:
        value = self._bytes[self._place]
        self._place += 1
        return value

    def _read_number(self) -> int:
        value = shift = 0
        while True:
            byte = self._read_byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def _read_list_head(self) -> tuple[int, int]:
        """Length of a list or set, and the kind of its items."""
        head = self._read_byte()
        length = head >> 4
        return (self._read_number() if length == _LONG_LIST else length), head & 0x0F

    def _skip(self, kind: int) -> None:
        if kind in (_TRUE, _FALSE):
            return
        if kind in (_I16, _I32, _I64):
            self._read_number()
        elif kind in (_BYTE, _DOUBLE):
            self._place += 1 if kind == _BYTE else 8
        elif kind == _BINARY:
            num_bytes = self._read_number()
            self._place += num_bytes
        elif kind in (_LIST, _SET):
            length, item = self._read_list_head()
            self._skip_items(length, (item,))
        elif kind == _MAP:
            if length := self._read_number():
                kinds = self._read_byte()
                self._skip_items(length, (kinds >> 4, kinds & 0x0F))
        elif kind == _STRUCT:
            for _, field_kind in self._read_fields():
                self._skip(field_kind)
        else:
            raise ValueError(f"expected a kind of Thrift's compact protocol, found {kind}")

    def _skip_items(self, length: int, kinds: tuple[int, ...]) -> None:
        for _ in range(length):
            for kind in kinds:
                # Alone, a truth value takes a byte; in a struct's field it stands in the field's head.
                self._skip(_BYTE if kind in (_TRUE, _FALSE) else kind)
            if self._place > len(self._bytes):
                raise IndexError
