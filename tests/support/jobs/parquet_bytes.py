"""Parquet files that pyarrow does not write, put together byte by byte: other writers' schemas, and damaged footers.

One row group, uncompressed PLAIN pages of version 1. Specification: parquet.thrift, in Thrift's compact protocol.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Value = int | float | str | bytes
Repetition = Literal["required", "optional", "repeated"]

_REPETITIONS: tuple[Repetition, ...] = ("required", "optional", "repeated")
_TYPES = {"int32": 1, "int64": 2, "double": 5, "binary": 6}
_CONVERTED = {"utf8": 0, "map": 1, "map_key_value": 2, "list": 3}


@dataclass(frozen=True, slots=True)
class Node:
    """One line of a schema, depth first.

    Attributes:
        kind: a physical type; empty for a group, which has `num_children`.
        converted: its annotation, such as `utf8` or `list`; empty for none.
    """

    name: str | bytes
    repetition: Repetition = "required"
    kind: str = ""
    num_children: int = 0
    converted: str = ""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A column's values with their levels; the values of nulls are left out.

    Attributes:
        path: names from the root; its last one may be wrong on purpose.
        key: whether to mark the column as encrypted with a key of its own.
    """

    path: tuple[str | bytes, ...]
    kind: str
    values: Sequence[Value]
    definitions: Sequence[int] = ()
    repetitions: Sequence[int] = ()
    is_encrypted: bool = False


def write_parquet_bytes(
    path: Path, nodes: Sequence[Node], leaves: Sequence[Leaf], num_rows: int, *, after_footer: bytes = b""
) -> Path:
    """Write a file; `after_footer` stands between footer and length, as a signature does."""
    content = bytearray(b"PAR1")
    chunks: list[bytes] = []
    for leaf in leaves:
        offset = len(content)
        content += _page(leaf)
        chunks.append(_chunk(leaf, offset, len(content) - offset))
    schema = [_node(Node("schema", num_children=_count_roots(nodes))), *map(_node, nodes)]
    group = _struct({1: _list(12, chunks), 2: _number(6, len(content)), 3: _number(6, num_rows)})
    footer = _struct({1: _number(5, 1), 2: _list(12, schema), 3: _number(6, num_rows), 4: _list(12, [group])})
    footer += after_footer
    path.write_bytes(bytes(content) + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return path


def _count_roots(nodes: Sequence[Node]) -> int:
    count = place = 0
    while place < len(nodes):
        waiting = 1
        while waiting:
            waiting += nodes[place].num_children - 1
            place += 1
        count += 1
    return count


def _node(node: Node) -> bytes:
    fields: dict[int, tuple[int, bytes]] = {3: _number(5, _REPETITIONS.index(node.repetition)), 4: _binary(node.name)}
    if node.kind:
        fields[1] = _number(5, _TYPES[node.kind])
    else:
        fields[5] = _number(5, node.num_children)
    if node.converted:
        fields[6] = _number(5, _CONVERTED[node.converted])
    return _struct(fields)


def _chunk(leaf: Leaf, offset: int, num_bytes: int) -> bytes:
    num_values = max(len(leaf.values), len(leaf.definitions))
    metadata = _struct(
        {
            1: _number(5, _TYPES[leaf.kind]),
            2: _list(5, [_varint(0), _varint(3 << 1)]),
            3: _list(8, [_binary(name)[1] for name in leaf.path]),
            4: _number(5, 0),
            5: _number(6, num_values),
            6: _number(6, num_bytes),
            7: _number(6, num_bytes),
            9: _number(6, offset),
        }
    )
    fields = {2: _number(6, offset), 3: (12, metadata)}
    if leaf.is_encrypted:
        fields[8] = (12, _struct({2: (12, _struct({1: _list(8, [_binary(name)[1] for name in leaf.path])}))}))
    return _struct(fields)


def _page(leaf: Leaf) -> bytes:
    values = b"".join(_plain(leaf.kind, value) for value in leaf.values)
    content = _levels(leaf.repetitions) + _levels(leaf.definitions) + values
    num_values = max(len(leaf.values), len(leaf.definitions))
    data = _struct({1: _number(5, num_values), 2: _number(5, 0), 3: _number(5, 3), 4: _number(5, 3)})
    size = _number(5, len(content))
    return _struct({1: _number(5, 0), 2: size, 3: size, 5: (12, data)}) + content


def _levels(levels: Sequence[int]) -> bytes:
    """Levels as runs of one value each, whose width is that of the highest (at most 255); none for a flat column."""
    if not levels:
        return b""
    runs = b"".join(_varint(1 << 1) + bytes([level]) for level in levels)
    return struct.pack("<I", len(runs)) + runs


def _plain(kind: str, value: Value) -> bytes:
    if kind == "binary":
        assert isinstance(value, str | bytes)
        raw = value.encode() if isinstance(value, str) else value
        return struct.pack("<I", len(raw)) + raw
    return struct.pack({"int32": "<i", "int64": "<q", "double": "<d"}[kind], value)


def _struct(fields: dict[int, tuple[int, bytes]]) -> bytes:
    content, last = b"", 0
    for number, (kind, value) in sorted(fields.items()):
        content += bytes([(number - last) << 4 | kind]) + value
        last = number
    return content + b"\x00"


def _number(kind: int, value: int) -> tuple[int, bytes]:
    return kind, _varint(value << 1 if value >= 0 else (-value << 1) - 1)


def _binary(text: str | bytes) -> tuple[int, bytes]:
    raw = text.encode() if isinstance(text, str) else text
    return 8, _varint(len(raw)) + raw


def _list(kind: int, items: Sequence[bytes]) -> tuple[int, bytes]:
    head = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([0xF0 | kind]) + _varint(len(items))
    return 9, head + b"".join(items)


def _varint(value: int) -> bytes:
    content = b""
    while value > 0x7F:
        content += bytes([value & 0x7F | 0x80])
        value >>= 7
    return content + bytes([value])
