"""The order of planned rows, and points in it where one range of rows ends and the next begins.

Part of *plan*. Token order comes first. Equal prompts are ordered by the rest of the request, then by input order, so
that a range may begin within a million equal prompts.
"""

import json
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from moebeam.schemas.arrow import list_values
from moebeam.schemas.canonical import canonical_json
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import parse_sampling_json

RUN_ORDER = ("prefix_key", "sampling", "options", "cost_center", "unit", "source_row", "sample")
"""Token order first; equal requests of one cost centre are adjacent, in input order, a row's samples together."""

ORIGIN = ("source_file", "source_row", "sample")
"""Columns that plans and tables share, and that tell their rows apart."""

RequestRest: TypeAlias = tuple[str, bool, str, str]
"""Distinguishes requests of one prompt, in order: sampling, whether there are no options, options, cost centre."""


@dataclass(frozen=True, slots=True, order=True)
class RowKey:
    """A point in `RUN_ORDER`; with parts left out, it stands before every row that matches the given ones.

    None is between two samples of a row, so that they stay together.
    """

    key: bytes = b""
    request: RequestRest | tuple[()] = ()
    row: tuple[int, int] | tuple[()] = ()

    @property
    def text(self) -> str:
        """Canonical JSON, for samples and for transfer between workers."""
        return canonical_json([self.key.hex(), list(self.request), list(self.row)])

    @classmethod
    def from_text(cls, text: str) -> "RowKey":
        """Inverse of `text`; an empty text is the beginning."""
        if not text:
            return cls()
        key, request, row = json.loads(text)
        return cls(bytes.fromhex(key), tuple(request), tuple(row))


class Places:
    """`RowKey`s of rows in `RUN_ORDER`, built on access."""

    def __init__(self, rows: pa.Table | pa.RecordBatch) -> None:
        self._num_rows = rows.num_rows
        self._columns: list[Any] = [rows.column(name) for name in RUN_ORDER[:6]]

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> RowKey:
        unit, source_row = (column[row].as_py() for column in self._columns[4:])
        return RowKey(self.key(row), self.request(row), (unit, source_row))

    def key(self, row: int) -> bytes:
        return self._columns[0][row].as_py()

    def request(self, row: int) -> RequestRest:
        sampling, options, cost_center = (column[row].as_py() for column in self._columns[1:4])
        # Arrow sorts null after every text.
        return sampling, options is None, options or "", cost_center

    def first_from(self, place: RowKey) -> int:
        """The first row not before a place; the number of rows if there is none."""
        return bisect_left(self, place)


def sort_rows(table: pa.Table) -> pa.Table:
    """Sort rows in `RUN_ORDER`."""
    return table.sort_by([(name, "ascending") for name in RUN_ORDER])


def can_merge(sampling: str, section: PlanSection) -> bool:
    """Whether equal requests with this sampling are answered once; a cut never separates such rows."""
    return section.merge == "always" or (section.merge == "auto" and parse_sampling_json(sampling).is_greedy)


def list_origins(table: pa.Table) -> list[tuple[str, int, int]]:
    """The `ORIGIN` of each row of a plan, or of a table of results or rejects."""
    return list(zip(*(list_values(table, name) for name in ORIGIN), strict=True))
