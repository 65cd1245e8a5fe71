"""Files that unpack without end, lie about themselves or are cut; each lies beside an ordinary file of three rows."""

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.hostile_content.case import HostileCase, small_job_over
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH

Write: TypeAlias = Callable[[Path], None]
"""Writes a hostile file at a path."""

_ORDINARY = frozenset({"good 0", "good 1", "good 2"})
_LENGTH_BYTES = 8
_MIB = 1 << 20


def _write_rows(path: Path, texts: list[str]) -> None:
    ids = [f"{path.stem} {index}" for index in range(len(texts))]
    pq.write_table(pa.table({"id": ids, "text": texts}), path)


def _repeat(path: Path, num_rows: int, num_characters: int) -> None:
    """One value in a dictionary, and indices that are run lengths."""
    indices = pa.array([0], pa.int32()).take(pa.nulls(num_rows, pa.int64()).fill_null(0))
    text = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * num_characters]))
    table = pa.table({"id": pa.nulls(num_rows, pa.string()).fill_null("bad"), "text": text})
    pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=num_rows)


def _repeat_in_a_list(path: Path, num_items: int, num_characters: int) -> None:
    """A row whose list repeats one long text."""
    indices = pa.array([0], pa.int32()).take(pa.nulls(num_items, pa.int64()).fill_null(0))
    items = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * num_characters]))
    lists = pa.ListArray.from_arrays(pa.array([0, num_items], pa.int32()), items)
    pq.write_table(pa.table({"id": ["bad"], "text": lists}), path, compression="zstd", store_schema=False)


def _list_numbers(path: Path, num_items: int) -> None:
    """A row whose list repeats one number."""
    items = pa.nulls(num_items, pa.int64()).fill_null(7)
    lists = pa.ListArray.from_arrays(pa.array([0, num_items], pa.int32()), items)
    pq.write_table(pa.table({"id": ["bad"], "text": lists}), path, compression="zstd")


def _inflate(path: Path, codec: str, num_bytes: int) -> None:
    """One text that compresses as far as the codec can."""
    table = pa.table({"id": ["bad"], "text": ["x" * num_bytes]})
    pq.write_table(table, path, compression=codec, use_dictionary=False, write_statistics=False)


def _cut(path: Path, share: float) -> None:
    _write_rows(path, [f"text {index}" for index in range(500)])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _lie_about_footer(path: Path, num_bytes: int) -> None:
    _write_rows(path, ["a", "b"])
    content = path.read_bytes()
    path.write_bytes(content[:-_LENGTH_BYTES] + struct.pack("<I", num_bytes) + b"PAR1")


def _change_footer(path: Path, found: bytes, put: bytes) -> None:
    """Replace bytes of a footer by as many others."""
    _write_rows(path, ["a"] * 50)
    content = path.read_bytes()
    start = len(content) - _LENGTH_BYTES - int.from_bytes(content[-8:-4], "little")
    footer = content[start:-_LENGTH_BYTES]
    assert len(found) == len(put), "a footer keeps its length"
    assert found in footer, "the footer has it"
    path.write_bytes(content[:start] + footer.replace(found, put) + content[-_LENGTH_BYTES:])


def _garble(path: Path, share: float) -> None:
    """Pages of noise below a whole footer."""
    _write_rows(path, [f"text {index} " * 50 for index in range(500)])
    content = bytearray(path.read_bytes())
    footer = len(content) - _LENGTH_BYTES - int.from_bytes(content[-8:-4], "little")
    for position in range(4, int(footer * share)):
        content[position] ^= (position * 37 + 11) & 0xFF
    path.write_bytes(bytes(content))


def _widen(path: Path, num_columns: int) -> None:
    """Many columns."""
    values = {f"column {index}": pa.array(["x"]) for index in range(num_columns)}
    pq.write_table(pa.table({"id": ["bad"], "text": ["x"], **values}), path, write_statistics=False)


def _nest(path: Path, num_levels: int) -> None:
    """A column of lists in lists."""
    value: Any = pa.array(["x"])
    for _ in range(num_levels):
        value = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), value)
    pq.write_table(pa.table({"id": ["bad"], "text": value}), path)


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write_text(path: Path, num_characters: int) -> None:
    """One long row of words, and of one letter."""
    _write_rows(path, ["lorem ipsum dolor sit amet, " * (num_characters // 28), "a" * num_characters])


def _invalid_text(path: Path) -> None:
    values = pa.array([b"\xff\xfe\xed\xa0\x80", b"fine"]).view(pa.binary())
    pq.write_table(pa.table({"id": ["bad 0", "bad 1"], "text": values.cast(pa.string(), safe=False)}), path)


_PARQUET: Mapping[str, Write] = MappingProxyType(
    {
        "a text of 100 KB in 3,000,000 rows": partial(_repeat, num_rows=3_000_000, num_characters=100_000),
        "a text of 20 MB in 1,000 rows": partial(_repeat, num_rows=1_000, num_characters=20 * _MIB),
        "a text of 100 KB 1,000,000 times in a row": partial(
            _repeat_in_a_list, num_items=1_000_000, num_characters=100_000
        ),
        "a number 40,000,000 times in a row": partial(_list_numbers, num_items=40_000_000),
        "500 MB in zstd": partial(_inflate, codec="zstd", num_bytes=500 * _MIB),
        "500 MB in gzip": partial(_inflate, codec="gzip", num_bytes=500 * _MIB),
        "500 MB in brotli": partial(_inflate, codec="brotli", num_bytes=500 * _MIB),
        "200 MB in lz4": partial(_inflate, codec="lz4", num_bytes=200 * _MIB),
        "two texts of 20 MiB": partial(_write_text, num_characters=20 * _MIB),
        "cut in the middle": partial(_cut, share=0.5),
        "cut in the footer": partial(_cut, share=0.98),
        "a footer of 4 GB": partial(_lie_about_footer, num_bytes=0xFFFF_FFF0),
        "a footer of 3 bytes": partial(_lie_about_footer, num_bytes=3),
        "a footer of garbled numbers": partial(_change_footer, found=b"\x16d", put=b"\x16\x04"),
        "pages of noise": partial(_garble, share=1.0),
        "20,000 columns": partial(_widen, num_columns=20_000),
        "lists in lists, 400 levels": partial(_nest, num_levels=400),
        "text that is no UTF-8": _invalid_text,
        "zeros": partial(_write_bytes, content=bytes(4 * _MIB)),
        "the first bytes alone": partial(_write_bytes, content=b"PAR1"),
    }
)


def _batch_line(custom_id: str, **body: Any) -> bytes:
    return json.dumps(
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **body},
        }
    ).encode()


def _line_of(value: str) -> bytes:
    """A line whose `metadata` is raw JSON."""
    return _batch_line("bad", metadata="VALUE").replace(b'"VALUE"', value.encode())


_LINES: Mapping[str, Callable[[], bytes]] = MappingProxyType(
    {
        "a line of 64 MB": lambda: _batch_line("bad", messages=[{"role": "user", "content": "x" * (64 * _MIB)}]),
        "a line without end": lambda: b'{"custom_id": "' + b"x" * (64 * _MIB),
        "100,000 levels of lists": lambda: _line_of("[" * 100_000 + "]" * 100_000),
        "100,000 levels of objects": lambda: _line_of('{"a":' * 100_000 + "1" + "}" * 100_000),
        "a number of a million digits": lambda: _line_of("9" * 1_000_000),
        "an exponent of a million digits": lambda: _line_of("1e" + "9" * 1_000_000),
        "a million keys": lambda: _line_of("{" + ",".join(f'"{index}":0' for index in range(1_000_000)) + "}"),
        "300,000 messages": lambda: _batch_line("bad", messages=[{"role": "user", "content": "x"}] * 300_000),
        "20,000 tools": lambda: _batch_line(
            "bad", tools=[{"type": "function", "function": {"name": f"f{index}"}} for index in range(20_000)]
        ),
        "packed zeros": lambda: zlib.compress(bytes(64 * _MIB), 9, wbits=31),
        "half of a surrogate pair": lambda: _batch_line("bad").replace(b'"x"', b'"\\ud800"'),
        "zeros and noise": lambda: bytes(range(256)) * 4_000,
    }
)


def _prepare_parquet(folder: Path, write: Write) -> AbstractContextManager[Path]:
    source = folder / "in"
    source.mkdir()
    _write_rows(source / "good.parquet", ["a", "b", "c"])
    # In a process of its own: the job's would inherit the peak of the memory that this takes.
    writer = get_context("spawn").Process(target=write, args=(source / "bad.parquet",))
    writer.start()
    writer.join()
    # With a tokenizer, which takes more memory than estimates do.
    return small_job_over(folder, source, model={"path": str(CHECKPOINT_PATH)})


def _prepare_lines(folder: Path, make_line: Callable[[], bytes]) -> AbstractContextManager[Path]:
    source = folder / "in.jsonl"
    source.write_bytes(b"\n".join([_batch_line("good 0"), make_line(), _batch_line("good 1"), _batch_line("good 2")]))
    return small_job_over(folder, source, input={"id_column": None}, prompt={"template": None})


CASES = (
    *(
        HostileCase(name, partial(_prepare_parquet, write=write), others=_ORDINARY, is_harmless=True)
        for name, write in _PARQUET.items()
    ),
    *(
        HostileCase(f"lines: {name}", partial(_prepare_lines, make_line=make_line), others=_ORDINARY, is_harmless=True)
        for name, make_line in _LINES.items()
    ),
)
