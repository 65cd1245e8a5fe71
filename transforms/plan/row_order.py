"""The order of planned rows, and points in it: where one range of rows ends and the next begins.

Part of *plan*. Token order comes first. Among equal prompts the rest of the request decides, and then the order of the
input, so that a range may begin inside of a million equal prompts.
"""

import json
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

from moebeam.schemas.canonical import canonical_json
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import sampling_of

RUN_ORDER = ("prefix_key", "sampling", "options", "cost_center", "unit", "source_row")
"""Token order first; equal requests of one cost centre stand together, the first of the input ahead."""

RequestRest: TypeAlias = tuple[str, bool, str, str]
"""What tells requests of one prompt apart, in order: sampling, whether there are no options, options, cost centre."""


@dataclass(frozen=True, slots=True, order=True)
class RowKey:
    """A point in `RUN_ORDER`; with parts left out it stands before every row that agrees with what is there."""

    key: bytes = b""
    request: RequestRest | tuple[()] = ()
    row: tuple[int, int] | tuple[()] = ()

    @property
    def text(self) -> str:
        """Canonical JSON, for travel and for samples."""
        return canonical_json([self.key.hex(), list(self.request), list(self.row)])

    @classmethod
    def of_text(cls, text: str) -> "RowKey":
        """The inverse of `text`; an empty text is the beginning."""
        if not text:
            return cls()
        key, request, row = json.loads(text)
        return cls(bytes.fromhex(key), tuple(request), tuple(row))


class Places:
    """The places of rows that stand in `RUN_ORDER`."""

    def __init__(self, rows: pa.Table | pa.RecordBatch) -> None:
        self._num_rows = rows.num_rows
        self._columns: list[Any] = [rows.column(name) for name in RUN_ORDER]

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
        """The first row that does not stand before a place; the number of rows if all do."""
        return bisect_left(self, place)


def sort_rows(table: pa.Table) -> pa.Table:
    """Rows in `RUN_ORDER`."""
    return table.sort_by([(name, "ascending") for name in RUN_ORDER])


def can_merge(sampling: str, section: PlanSection) -> bool:
    """Whether equal requests with this sampling are answered once; such rows are never cut apart."""
    return section.merge == "always" or (section.merge == "auto" and sampling_of(sampling).is_greedy)
