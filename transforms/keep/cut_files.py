"""How many rows each file of kept rows takes, by the digests of rows, and the digest of all.

Part of *keep*. Rows fall into slots by the first bits of their digests, and neighbouring slots make a file. The result
depends on the rows alone: not on bundles, their order or the runner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moebeam.transforms.keep.row_batches import DIGEST
from moebeam.transforms.read.input_scan import GROUP_BYTES, GROUP_ROWS

SLOT_BITS = 12
NUM_SLOTS = 1 << SLOT_BITS
_MODULUS = 1 << 256


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Some rows, counted.

    Attributes:
        slots: rows of each slot that has some.
        num_bytes: of all rows, in Arrow.
        digest_sum: sum of the rows' digests modulo 2**256, in hexadecimal; independent of order and bundles.
    """

    slots: tuple[tuple[int, int], ...] = ()
    num_bytes: int = 0
    digest_sum: str = "0"

    @property
    def num_rows(self) -> int:
        return sum(count for _, count in self.slots)

    def __add__(self, other: "RowCounts") -> "RowCounts":
        slots = dict(self.slots)
        for slot, count in other.slots:
            slots[slot] = slots.get(slot, 0) + count
        digests = (int(self.digest_sum, 16) + int(other.digest_sum, 16)) % _MODULUS
        return RowCounts(tuple(sorted(slots.items())), self.num_bytes + other.num_bytes, f"{digests:x}")


@dataclass(frozen=True, slots=True)
class FileCut:
    """How the rows are divided into files.

    Attributes:
        digest: SHA-256 of all rows, which is the identity of the input.
        starts: first slot of each file, from 0.
    """

    digest: str
    starts: tuple[int, ...]
    num_rows: int


def count_slots(table: pa.Table) -> RowCounts:
    """Count the rows of a table with digests."""
    digests = _list_digests(table)
    slots, counts = np.unique(_find_slots(digests), return_counts=True)
    total = sum(int.from_bytes(digest) for digest in digests) % _MODULUS
    return RowCounts(tuple(zip(slots.tolist(), counts.tolist(), strict=True)), table.nbytes, f"{total:x}")


def _list_digests(table: pa.Table) -> list[bytes]:
    return cast("list[bytes]", table.column(DIGEST).to_pylist())


def cut_files(counts: RowCounts) -> FileCut:
    """Divide all rows into files of at most `GROUP_ROWS` rows and about `GROUP_BYTES`, as far as slots allow."""
    num_rows = counts.num_rows
    most = max(1, min(GROUP_ROWS, GROUP_BYTES * num_rows // max(1, counts.num_bytes)))
    starts, held = [0], 0
    for slot, count in counts.slots:
        if held and held + count > most:
            starts.append(slot)
            held = 0
        held += count
    digest = sha256(f"{num_rows} {counts.digest_sum}".encode()).hexdigest()
    return FileCut(digest, tuple(starts), num_rows)


def divide_table(table: pa.Table, cut: FileCut) -> dict[int, pa.Table]:
    """The rows of a table by number of their file."""
    numbers = np.searchsorted(np.array(cut.starts), _find_slots(_list_digests(table)), side="right") - 1
    order = np.argsort(numbers, kind="stable")
    table, numbers = table.take(pa.array(order, pa.int64())), numbers[order]
    found, begins = np.unique(numbers, return_index=True)
    ends = [*begins[1:].tolist(), len(numbers)]
    return {
        number: table.slice(start, end - start)
        for number, start, end in zip(found.tolist(), begins.tolist(), ends, strict=True)
    }


def _find_slots(digests: Sequence[bytes]) -> "npt.NDArray[Any]":
    leading = np.frombuffer(b"".join(digest[:2] for digest in digests), dtype=">u2")
    return (leading >> (16 - SLOT_BITS)).astype(np.int64)
