"""Commits a finished run to its tables in a lakehouse: ledger, rejects, results, in this order.

Each of the three is one atomic commit that carries the run's id; one that has it already is left as it is. A run that
is among the results is therefore among rejects and ledger, too: whoever is killed in between, the next who resumes the
run commits what is missing. A receipt in the run's folder then says where the run went, so that nobody has to ask the
catalog again, nor depends on snapshots that expire.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from moebeam.schemas.column_types import loosen_sizes
from moebeam.schemas.errors import CommitError, TableCommitFailed
from moebeam.schemas.extras import require_extra
from moebeam.schemas.lakehouse.table_url import DeltaUrl, TableUrl
from moebeam.schemas.redaction.hide import hide_in_message
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import encode_record, read_record
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA, Table
from moebeam.transforms.publish.lakehouse.run_rows import LakehouseTable, RunRows, find_replaced, list_files
from moebeam.transforms.publish.lakehouse.stored_types import needs_cast, stored_schema

ORDER: tuple[Table, ...] = ("ledger", "rejects", "results")


@dataclass(frozen=True, slots=True)
class TableReceipt:
    """Where a run was committed.

    Attributes:
        url: of the table of results.
        commits: snapshot or version of each of the run's tables.
    """

    url: str
    run_id: str
    replace_where: str | None
    commits: Mapping[str, str]


def open_table(url: TableUrl) -> LakehouseTable:
    """The table of a URL, which need not exist; its library is imported here alone.

    Raises:
        MissingExtra: the library is not installed.
    """
    require_extra(url.extra, f"[output] table {str(url)!r}")
    if isinstance(url, DeltaUrl):
        from moebeam.transforms.publish.lakehouse.delta_table import DeltaLakeTable

        return DeltaLakeTable(url)
    from moebeam.transforms.publish.lakehouse.iceberg_table import IcebergTable

    return IcebergTable(url)


def table_schemas(results: pa.Schema, url: TableUrl) -> dict[Table, pa.Schema]:
    """The stored columns of a run's three tables.

    Args:
        results: of the run's results, as published.
    Raises:
        ValueError: a column has a type that the format lacks.
    """
    has_times = not isinstance(url, DeltaUrl)
    results = stored_schema(results, has_times=has_times)
    return {"results": results, "rejects": results, "ledger": stored_schema(LEDGER_SCHEMA, has_times=has_times)}


def commit_run(
    layout: RunLayout, manifest: Mapping[str, Any], schema: pa.Schema, url: TableUrl, replace_where: str | None = None
) -> TableReceipt:
    """Commit a complete run; one that has been committed to the same table is left as it is.

    Args:
        schema: of the run's results, as published.
        replace_where: column whose values in the run say which rows of results and rejects it replaces; a retry of
            an earlier run's rejects only adds.
    Raises:
        MissingExtra: the format's library is not installed.
        TableCommitFailed: a commit failed; those before it stay, and repeating goes on after them.
        CommitError: a published file is damaged.
    """
    path = layout.table_receipt(hashlib.sha256(str(url).encode()).hexdigest()[:16])
    try:
        if (receipt := read_record(path, TableReceipt, "the receipt of a commit")) is not None:
            return receipt
    except CommitError:
        pass  # the tables themselves say it, too
    tables = {table: open_table(url.of_table(table)) for table in ORDER}
    rows = _list_rows(layout, manifest, schema, url)
    if replace_where is not None and not manifest.get("retry_of"):
        results, rejects = find_replaced(rows["results"], rows["rejects"], replace_where)
        rows = {**rows, "results": results, "rejects": rejects}
    commits: dict[str, str] = {}
    for table in ORDER:
        try:
            commits[table] = tables[table].commit(rows[table])
        except CommitError:
            raise
        except Exception as error:  # catalogs and stores have trees of their own, without a common base class
            raise TableCommitFailed(
                f"[output] table: {tables[table].name}: the {table} of run {manifest['run_id']} could not be "
                f"committed: {hide_in_message(describe_error(error))}; the run is "
                f"complete in {layout.output}, and moebeam resume {layout.output} commits it"
            ) from error
    receipt = TableReceipt(str(url), manifest["run_id"], replace_where, commits)
    storage.write_whole(path, encode_record(receipt))
    return receipt


def describe_error(error: Exception) -> str:
    """An error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _list_rows(
    layout: RunLayout, manifest: Mapping[str, Any], schema: pa.Schema, url: TableUrl
) -> dict[Table, RunRows]:
    try:
        stored = table_schemas(schema, url)
    except ValueError as error:
        raise TableCommitFailed(f"[output] table {str(url)!r}: {error}") from error
    published = {"results": schema, "rejects": loosen_sizes(schema.empty_table()).schema, "ledger": LEDGER_SCHEMA}
    rows = RunRows(manifest["run_id"], "results", stored["results"], ())
    return {
        table: replace(
            rows,
            table=table,
            schema=stored[table],
            files=list_files(layout, manifest, table),
            is_cast=needs_cast(published[table], stored[table]),
        )
        for table in ORDER
    }
