"""A table of an Iceberg catalog, by pyiceberg, which is configured by its own means.

Published files become data files byte by byte: they have no field ids, and a name mapping of the table stands for them.
The run's id is a property of the snapshot. pyiceberg's own retries would add the rows again beside those that another
launcher has committed meanwhile; they are off, and each attempt here looks for the run first.
"""

import io
import itertools
import random
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NoSuchNamespaceError,
    NoSuchTableError,
    TableAlreadyExistsError,
    ValidationException,
)
from pyiceberg.expressions import AlwaysFalse, BooleanExpression, In, IsNull, Or, Reference
from pyiceberg.io import pyarrow as pyiceberg_parquet
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.table import Table, TableProperties, Transaction
from pyiceberg.typedef import Record

from moebeam.schemas.lakehouse.table_url import IcebergUrl
from moebeam.schemas.redaction.known_secrets import is_secret_name, learn_secret
from moebeam.transforms.publish.lakehouse.run_rows import RUN_ID, CommitConflict, Replaced, RunFile, RunRows, map_files
from moebeam.transforms.publish.lakehouse.stored_types import check_fit

MAX_ATTEMPTS = 20
_MAX_WAIT_S = 2.0


@dataclass(frozen=True, slots=True)
class _CopiedFile:
    """A file in the table's location, with its footer; it belongs to the table once it is committed."""

    path: str
    num_bytes: int
    footer: pq.FileMetaData


class IcebergTable:
    """See `LakehouseTable`."""

    def __init__(self, url: IcebergUrl) -> None:
        self._url = url

    @property
    def name(self) -> str:
        return str(self._url)

    @cached_property
    def _catalog(self) -> Catalog:
        catalog = load_catalog(self._url.catalog)
        for key, value in catalog.properties.items():
            if is_secret_name(key):
                learn_secret(str(value))
                learn_secret(str(value).rpartition(":")[2])
        return catalog

    def _load(self) -> Table | None:
        try:
            return self._catalog.load_table(self._url.identifier)
        except (NoSuchTableError, NoSuchNamespaceError):
            return None

    def read_schema(self) -> pa.Schema | None:
        """See `LakehouseTable`.

        Raises:
            ValueError: the table's namespace is missing.
        """
        if (table := self._load()) is not None:
            return pyiceberg_parquet.schema_to_pyarrow(table.schema(), include_field_ids=False)
        if not self._catalog.namespace_exists(self._url.namespace):
            namespace = ".".join(self._url.namespace)
            raise ValueError(f"expected the namespace {namespace!r} in the catalog, found none; create it first")
        return None

    def find_commit(self, run_id: str) -> str | None:
        table = self._load()
        return table and _find_commit(table, run_id)

    def commit(self, rows: RunRows) -> str:
        """See `LakehouseTable`.

        Raises:
            CommitConflict: others changed the table before every attempt.
            FileDamaged: a published file is not what was published.
        """
        table = self._load() or self._create(rows.schema)
        copied: list[_CopiedFile] | None = None
        for attempt in range(MAX_ATTEMPTS):
            if (found := _find_commit(table, rows.run_id)) is not None:
                _remove(table, copied or [])
                return found
            if copied is None and table.spec().is_unpartitioned():
                copied = _copy_files(table, rows)
            try:
                return _commit_once(table, rows, copied)
            except (CommitFailedException, ValidationException):
                time.sleep(random.uniform(0, min(_MAX_WAIT_S, 0.05 * 2**attempt)))
                table.refresh()
            except Exception:
                # The answer may have been lost after the commit.
                table.refresh()
                if (found := _find_commit(table, rows.run_id)) is None:
                    raise
                return found
        _remove(table, copied or [])
        raise CommitConflict(f"expected one of {MAX_ATTEMPTS} attempts to succeed, found the table changed in each")

    def _create(self, schema: pa.Schema) -> Table:
        try:
            return self._catalog.create_table(self._url.identifier, schema)
        except TableAlreadyExistsError:
            return self._catalog.load_table(self._url.identifier)


def _find_commit(table: Table, run_id: str) -> str | None:
    for snapshot in table.snapshots():
        if snapshot.summary is not None and snapshot.summary.additional_properties.get(RUN_ID) == run_id:
            return str(snapshot.snapshot_id)
    return None


def _copy_files(table: Table, rows: RunRows) -> list[_CopiedFile]:
    """Copy a run's files to where the table keeps its own, under names that no other attempt has."""
    attempt, places = uuid.uuid4().hex[:12], table.location_provider()

    def copy(file: RunFile) -> _CopiedFile:
        content = rows.read_bytes(file)
        path = places.new_data_location(f"{rows.run_id}-{file.name}-{attempt}.parquet")
        with table.io.new_output(path).create() as output:
            output.write(content)
        return _CopiedFile(path, len(content), pq.read_metadata(io.BytesIO(content)))

    return [*map_files(rows, copy)]


def _remove(table: Table, copied: list[_CopiedFile]) -> None:
    """Remove files that no snapshot has; those of a killed attempt are left to the table's maintenance."""
    for file in copied:
        table.io.delete(file.path)


def _commit_once(table: Table, rows: RunRows, copied: list[_CopiedFile] | None) -> str:
    """One attempt at the commit: columns, removed rows and added files become visible together.

    Args:
        copied: None for a partitioned table, whose files pyiceberg writes.
    """
    properties = {**table.metadata.properties, TableProperties.COMMIT_NUM_RETRIES: "0"}
    table.metadata = table.metadata.model_copy(update={"properties": properties})
    added = {RUN_ID: rows.run_id}
    tx = table.transaction()
    existing = pyiceberg_parquet.schema_to_pyarrow(table.schema(), include_field_ids=False)
    if check_fit(existing, rows.schema).has_added:
        with tx.update_schema() as update:
            update.union_by_name(rows.schema)
    if tx.table_metadata.name_mapping() is None:
        mapping = tx.table_metadata.schema().name_mapping.model_dump_json()
        tx.set_properties({TableProperties.DEFAULT_NAME_MAPPING: mapping})
    if rows.replaced is not None and rows.replaced.values and table.current_snapshot() is not None:
        with warnings.catch_warnings():
            # It warns where no row matches.
            warnings.simplefilter("ignore")
            tx.delete(_match(rows.replaced), added)
    with tx.update_snapshot(snapshot_properties=added).fast_append() as append:
        for file in _write_files(tx, table, rows) if copied is None else _describe_files(tx, copied):
            append.append_data_file(file)
    snapshot = append.snapshot_id
    tx.commit_transaction()
    return str(snapshot)


def _match(replaced: Replaced) -> BooleanExpression:
    column = Reference(replaced.column)
    values = [value for value in replaced.values if value is not None]
    # The annotations of pyiceberg's expressions, which are pydantic models, hide their positional arguments.
    is_in, is_null = cast("Any", In), cast("Any", IsNull)
    known: BooleanExpression = is_in(column, values) if values else AlwaysFalse()
    return Or(known, is_null(column)) if len(values) < len(replaced.values) else known


def _describe_files(tx: Transaction, copied: list[_CopiedFile]) -> Iterator[DataFile]:
    """Data files with the statistics of their footers; pyiceberg's `add_files` looks at the schema of each anew."""
    metadata = tx.table_metadata
    columns = pyiceberg_parquet.compute_statistics_plan(metadata.schema(), metadata.properties)
    mapping = pyiceberg_parquet.parquet_path_to_id_mapping(metadata.schema())
    for file in copied:
        statistics = pyiceberg_parquet.data_file_statistics_from_parquet_metadata(file.footer, columns, mapping)
        yield DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=file.path,
            file_format=FileFormat.PARQUET,
            partition=Record(),
            file_size_in_bytes=file.num_bytes,
            sort_order_id=None,
            spec_id=metadata.default_spec_id,
            equality_ids=None,
            key_metadata=None,
            **statistics.to_serialized_dict(),
        )


def _write_files(tx: Transaction, table: Table, rows: RunRows) -> Iterator[DataFile]:
    """Data files of a partitioned table: each published file is divided by the partitions of its rows."""
    write: Any = pyiceberg_parquet._dataframe_to_data_files  # pyright: ignore[reportPrivateUsage]
    attempt, counter = uuid.uuid4(), itertools.count()
    for file in rows.files:
        yield from write(tx.table_metadata, rows.read_table(file), table.io, attempt, counter)
