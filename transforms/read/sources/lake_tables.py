"""Tables of a lakehouse as input: Iceberg and Delta, each at one snapshot or version.

Part of the scan before *read*. Catalogs and stores are configured where their libraries look for it. Data files are
read one after the other, in the order of their paths, so that the rows of a version have one order.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.extras import require_extra
from moebeam.schemas.lakehouse.table_url import DeltaUrl, IcebergUrl, TableUrl, parse_table_url

_PIN = re.compile(r"\?(snapshot|version)=(\d+)$")
_KEYS = {IcebergUrl: "snapshot", DeltaUrl: "version"}
_BATCH_ROWS = 1024


def strip_pin(url: str) -> str:
    """A table's URL without its version."""
    return _PIN.sub("", url)


def pin_table(url: str) -> str:
    """A table's URL with its version, the newest one where it names none.

    Raises:
        InputPatternError: no such table or version.
    """
    parsed, pin = _parse(url)
    if pin is not None:
        return url
    opened = _open(parsed, None)
    if isinstance(parsed, DeltaUrl):
        return f"{url}?version={opened.version()}"
    snapshot = opened.current_snapshot()
    if snapshot is None:
        raise InputPatternError(f"[input] path {url!r}: expected a table with a snapshot, found one without rows")
    return f"{url}?snapshot={snapshot.snapshot_id}"


def read_table(url: str, needed: Collection[str] | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Read a pinned table.

    Args:
        needed: columns to read; None means all.
    Returns:
        The schema of what is read, and batches of at most 1,024 rows.
    Raises:
        InputPatternError: no such table or version, or one that its library cannot read.
    """
    parsed, pin = _parse(url)
    opened = _open(parsed, pin)
    try:
        if isinstance(parsed, DeltaUrl):
            schema, batches = _read_delta(opened, needed)
        else:
            schema, batches = _read_iceberg(opened, pin, needed)
    except Exception as error:  # each library has its own error tree, without a common base class
        raise _describe(url, error) from error
    return schema, _telling_errors(url, batches)


def _parse(url: str) -> tuple[TableUrl, int | None]:
    found = _PIN.search(url)
    try:
        parsed = parse_table_url(strip_pin(url))
    except ValueError as error:
        raise InputPatternError(f"[input] path: {error}") from error
    key = _KEYS[type(parsed)]
    if found is not None and found[1] != key:
        raise InputPatternError(f"[input] path {url!r}: expected ?{key}=NUMBER, found {found[0]}")
    return parsed, None if found is None else int(found[2])


def _open(url: TableUrl, pin: int | None) -> Any:
    """A `deltalake.DeltaTable`, or a `pyiceberg.table.Table` that has the snapshot."""
    require_extra(url.extra, f"[input] path {str(url)!r}")
    try:
        if isinstance(url, DeltaUrl):
            from deltalake import DeltaTable

            return DeltaTable(url.location, version=pin)
        from pyiceberg.catalog import load_catalog

        opened = load_catalog(url.catalog).load_table(url.identifier)
    except Exception as error:  # as above
        raise _describe(f"{url}{'' if pin is None else f', {_KEYS[type(url)]} {pin}'}", error) from error
    if pin is not None and opened.snapshot_by_id(pin) is None:
        known = ", ".join(str(snapshot.snapshot_id) for snapshot in opened.snapshots()[-3:])
        raise InputPatternError(
            f"[input] path {str(url)!r}: expected snapshot {pin}, found it expired or unknown; the last are {known}"
        )
    return opened


def _read_delta(table: Any, needed: Collection[str] | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    dataset = table.to_pyarrow_dataset()
    schema = _choose(dataset.schema, needed)
    fragments = sorted(dataset.get_fragments(), key=lambda fragment: fragment.path)

    def read() -> Iterator[pa.RecordBatch]:
        for fragment in fragments:
            yield from fragment.to_batches(
                schema=dataset.schema,
                columns=schema.names,
                batch_size=_BATCH_ROWS,
                batch_readahead=1,
                use_threads=False,
            )

    return schema, read()


def _read_iceberg(
    table: Any, snapshot: int | None, needed: Collection[str] | None
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    from pyiceberg.expressions import AlwaysTrue
    from pyiceberg.io.pyarrow import ArrowScan, schema_to_pyarrow

    scan = table.scan(snapshot_id=snapshot)
    names = _choose(schema_to_pyarrow(scan.projection()), needed).names
    scan = scan.select(*names) if names else scan
    projected = scan.projection()
    schema = schema_to_pyarrow(projected, include_field_ids=False)
    tasks = sorted(scan.plan_files(), key=lambda task: task.file.file_path)
    reader = ArrowScan(table.metadata, table.io, projected, AlwaysTrue())

    def read() -> Iterator[pa.RecordBatch]:
        for task in tasks:
            for batch in reader.to_record_batches([task]):
                yield from _cast(batch, schema)

    return schema, read()


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> Iterable[pa.RecordBatch]:
    return pa.Table.from_batches([batch]).select(schema.names).cast(schema).to_batches(_BATCH_ROWS)


def _choose(schema: pa.Schema, needed: Collection[str] | None) -> pa.Schema:
    return schema if needed is None else pa.schema([field for field in schema if field.name in needed])


def _telling_errors(url: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except Exception as error:  # as above
        raise _describe(url, error) from error


def _describe(url: str, error: Exception) -> InputPatternError:
    text = " ".join(str(error).split())
    return InputPatternError(f"[input] path {url!r}: the table cannot be read: {type(error).__name__}: {text}")
