"""A Delta table, by delta-rs, which takes its options from the environment as its store's own tools do.

Published files are copied into the table's folder byte by byte and become `add` actions. The run is the application of
a `txn` action: delta-rs refuses a commit beside another one of the same application. Where rows are replaced or columns
added, or where the table asks more of its writers than to add files, delta-rs reads the rows as a stream and
writes them itself.
"""

import datetime
import json
import os
import random
import time
import uuid
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, create_table_with_add_actions

from moebeam.schemas.lakehouse.table_url import DeltaUrl
from moebeam.schemas.store import storage
from moebeam.transforms.publish.lakehouse.run_rows import RUN_ID, CommitConflict, Replaced, RunFile, RunRows, map_files
from moebeam.transforms.publish.lakehouse.stored_types import check_fit

MAX_ATTEMPTS = 20
_MAX_WAIT_S = 2.0

_FREE_FEATURES = frozenset({"appendOnly", "timestampNtz"})
"""Features of a table that ask nothing of who adds whole files."""
_LAST_FREE_VERSION = 2
"""Writer version before constraints, generated columns and renamed ones."""


class DeltaLakeTable:
    """See `LakehouseTable`."""

    def __init__(self, url: DeltaUrl) -> None:
        self._url = url

    @property
    def name(self) -> str:
        return str(self._url)

    def _open(self) -> DeltaTable | None:
        location = self._url.location
        if storage.is_local(location) and not storage.is_folder(location):
            return None
        try:
            return DeltaTable(location)
        except TableNotFoundError:
            return None

    def read_schema(self) -> pa.Schema | None:
        table = self._open()
        return None if table is None else _read_schema(table)

    def find_commit(self, run_id: str) -> str | None:
        table = self._open()
        return table and _find_commit(table, run_id)

    def commit(self, rows: RunRows) -> str:
        """See `LakehouseTable`.

        Raises:
            CommitConflict: others changed the table before every attempt.
            FileDamaged: a published file is not what was published.
        """
        added: list[AddAction] | None = None
        for attempt in range(MAX_ATTEMPTS):
            table = self._open()
            if table is not None and (found := _find_commit(table, rows.run_id)) is not None:
                self._remove(added or [])
                return found
            # delta-rs adds columns only to tables whose files it writes itself.
            has_new_columns = table is not None and check_fit(_read_schema(table), rows.schema).has_added
            takes_files = table is None or (rows.replaced is None and not has_new_columns and _takes_files(table))
            if takes_files and added is None:
                added = self._copy_files(rows)
            try:
                self._commit_once(table, rows, added if takes_files else None)
            except CommitFailedError:
                time.sleep(random.uniform(0, min(_MAX_WAIT_S, 0.05 * 2**attempt)))
                continue
            except Exception:
                now = self._open()
                if now is None or (table is not None and _find_commit(now, rows.run_id) is None):
                    raise
                continue  # the answer was lost after the commit, or somebody else has just created the table
            return str(DeltaTable(self._url.location).version()) if table is None else str(table.version())
        self._remove(added or [])
        raise CommitConflict(f"expected one of {MAX_ATTEMPTS} attempts to succeed, found the table changed in each")

    def _copy_files(self, rows: RunRows) -> list[AddAction]:
        """Copy a run's files into the table's folder, under names that no other attempt has."""
        attempt = uuid.uuid4().hex[:12]

        def copy(file: RunFile) -> AddAction:
            content = rows.read_bytes(file)
            name = f"{rows.run_id}-{file.name}-{attempt}.parquet"
            storage.write_whole(storage.join(self._url.location, name), content)
            at_ms, statistics = int(time.time() * 1000), json.dumps({"numRecords": file.num_rows})
            return AddAction(name, len(content), {}, at_ms, True, statistics)

        return [*map_files(rows, copy)]

    def _remove(self, added: list[AddAction]) -> None:
        """Remove files that no version has; those of a killed attempt are left to `vacuum`."""
        storage.remove_files([storage.join(self._url.location, action.path) for action in added])

    def _commit_once(self, table: DeltaTable | None, rows: RunRows, added: list[AddAction] | None) -> None:
        properties = CommitProperties(
            custom_metadata={RUN_ID: rows.run_id}, app_transactions=[Transaction(_application(rows.run_id), 1)]
        )
        if table is None:
            if storage.is_local(self._url.location):
                os.makedirs(self._url.location.removeprefix("file://"), exist_ok=True)
            schema = Schema.from_arrow(rows.schema)
            create_table_with_add_actions(self._url.location, schema, added or [], commit_properties=properties)
        elif added is not None:
            table.create_write_transaction([*added], "append", table.schema(), commit_properties=properties)
        elif rows.replaced is None or not rows.replaced.values:
            write_deltalake(table, rows.stream(), mode="append", schema_mode="merge", commit_properties=properties)
        else:
            write_deltalake(
                table,
                rows.stream(),
                mode="overwrite",
                predicate=_match(rows.replaced),
                schema_mode="merge",
                commit_properties=properties,
            )


def _application(run_id: str) -> str:
    return f"moebeam/{run_id}"


def _read_schema(table: DeltaTable) -> pa.Schema:
    arrow: Any = table.schema().to_arrow()
    return pa.schema(arrow)


def _find_commit(table: DeltaTable, run_id: str) -> str | None:
    if table.transaction_version(_application(run_id)) is None:
        return None
    versions = [entry["version"] for entry in table.history() if entry.get(RUN_ID) == run_id]
    return str(versions[0]) if versions else "an earlier version"


def _takes_files(table: DeltaTable) -> bool:
    """Whether the table asks nothing of who adds files to it: no partitions, constraints, generated columns."""
    protocol = table.protocol()
    features = frozenset(protocol.writer_features or ())
    is_free = protocol.min_writer_version <= _LAST_FREE_VERSION or (bool(features) and features <= _FREE_FEATURES)
    invariants = any("delta.invariants" in field.metadata for field in table.schema().fields)
    return is_free and not invariants and not table.metadata().partition_columns


def _match(replaced: Replaced) -> str:
    column = '"{}"'.format(replaced.column.replace('"', '""'))
    values = [_quote(value) for value in replaced.values if value is not None]
    tests = [f"{column} IN ({', '.join(values)})"] if values else []
    if len(values) < len(replaced.values):
        tests.append(f"{column} IS NULL")
    return " OR ".join(tests)


def _quote(value: str | int | datetime.date) -> str:
    if isinstance(value, str):
        return "'{}'".format(value.replace("'", "''"))
    return f"DATE '{value.isoformat()}'" if isinstance(value, datetime.date) else str(value)
