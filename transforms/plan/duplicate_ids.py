"""Rows whose id an earlier row already has, found without holding the ids of the input in one place.

Part of *plan*, only where the job names an `id_column` (or the input brings ids). Digests of ids are grouped into
buckets; inside a bucket the first row in input order survives.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moebeam.schemas.arrow import list_values
from moebeam.schemas.errors import InvalidId

NUM_BUCKETS = 64
_ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("unit", "<i4"), ("source_row", "<i8")])
"""An id as 128 bits of its BLAKE2b digest: two different ids meet once in 10^20 at a billion rows."""


def digest_ids(batch: pa.RecordBatch) -> Iterator[tuple[int, bytes]]:
    """(bucket, packed digests) of the rows of a batch that have an id of their own."""
    rows = np.empty(batch.num_rows, dtype=_ROW)
    rows["unit"] = batch.column("unit").to_numpy()
    rows["source_row"] = batch.column("source_row").to_numpy()
    ids = list_values(batch, "custom_id")
    digests = b"".join(blake2b(custom_id.encode(), digest_size=16).digest() for custom_id in ids)
    rows["high"], rows["low"] = np.frombuffer(digests, dtype="<u8").reshape(-1, 2).T
    has_id = [
        scope == "row" and error != InvalidId.error_type
        for scope, error in zip(list_values(batch, "scope"), list_values(batch, "error_type"), strict=True)
    ]
    rows = rows[np.array(has_id, dtype=bool)]
    buckets = rows["high"] % NUM_BUCKETS
    for bucket in np.unique(buckets):
        yield int(bucket), rows[buckets == bucket].tobytes()


def find_duplicates(packed: Iterable[bytes]) -> dict[int, list[int]]:
    """Of rows with equal digests all but the first in input order, as unit -> source rows, sorted."""
    chunks: list[npt.NDArray[Any]] = [np.frombuffer(chunk, dtype=_ROW) for chunk in packed]
    rows = np.sort(np.concatenate(chunks), order=("high", "low", "unit", "source_row"))
    is_duplicate = np.zeros(len(rows), dtype=bool)
    is_duplicate[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    found: dict[int, list[int]] = {}
    for row in np.sort(rows[is_duplicate], order=("unit", "source_row")):
        found.setdefault(int(row["unit"]), []).append(int(row["source_row"]))
    return found
