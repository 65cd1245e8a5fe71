"""Finished runs as *publish* leaves them, made without a pipeline, and catalogs to commit them to."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyiceberg.catalog
import pytest
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.utils.config import Config

from moebeam.schemas.arrow import encode_parquet_file
from moebeam.schemas.column_types import loosen_sizes
from moebeam.schemas.lakehouse.table_url import DeltaUrl, TableUrl, parse_table_url
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA, RESULT_SCHEMA
from moebeam.transforms.publish.lakehouse.commit_run import TableReceipt, commit_run, open_table


@dataclass(frozen=True)
class PublishedRun:
    """A complete run: its folder, what its manifest says of its tables, and the columns of its results."""

    layout: RunLayout
    manifest: Mapping[str, Any]
    schema: pa.Schema

    def commit(self, url: str, replace_where: str | None = None) -> TableReceipt:
        """`commit_run`."""
        return commit_run(self.layout, self.manifest, self.schema, parse_table_url(url), replace_where)

    def forget_receipts(self) -> None:
        """As if the last launcher had been killed before it wrote one."""
        for path in (Path(self.layout.state) / "tables").glob("*.json"):
            path.unlink()


def publish_run(
    folder: Path, run_id: str, columns: Mapping[str, Sequence[Any] | pa.Array], *, num_shards: int = 2
) -> PublishedRun:
    """A run whose shards each have these rows as results, one reject without columns, and a ledger line a result."""
    layout = RunLayout(str(folder))
    arrays = {name: column if isinstance(column, pa.Array) else pa.array(column) for name, column in columns.items()}
    schema = pa.schema([*RESULT_SCHEMA, *(pa.field(name, column.type) for name, column in arrays.items())])
    loose = loosen_sizes(schema.empty_table()).schema
    num_rows = len(next(iter(arrays.values())))
    files: dict[str, list[dict[str, Any]]] = {"results": [], "rejects": [], "ledger": []}
    for number in range(num_shards):
        ids = [f"{run_id}-{number}-{row}" for row in range(num_rows)]
        results = _table(schema, num_rows, {"custom_id": ids, "run_id": [run_id] * num_rows, **arrays})
        rejects = _table(loose, 1, {"custom_id": [f"{run_id}-{number}-bad"], "run_id": [run_id], "scope": ["file"]})
        ledger = _table(LEDGER_SCHEMA, num_rows, {"custom_id": ids, "run_id": [run_id] * num_rows})
        for table, rows in (("results", results), ("rejects", rejects), ("ledger", ledger)):
            path = Path(layout.output) / table / f"part-s{number:06d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = encode_parquet_file(rows)
            path.write_bytes(content)
            files[table].append(
                {
                    "path": layout.relative(str(path)),
                    "num_rows": rows.num_rows,
                    "num_bytes": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )
    manifest = {"run_id": run_id, "status": "complete", "files": files, "retry_of": None, "input": {"limit": None}}
    return PublishedRun(layout, manifest, schema)


def _table(schema: pa.Schema, num_rows: int, values: Mapping[str, Any]) -> pa.Table:
    columns = [
        (values[field.name] if isinstance(values[field.name], pa.Array) else pa.array(values[field.name], field.type))
        if field.name in values
        else pa.nulls(num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


CATALOG = "local"


def make_catalog(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> Catalog:
    """A SQLite catalog with the namespace `db`, configured through the environment as users do."""
    folder.mkdir(parents=True, exist_ok=True)
    uri, warehouse = f"sqlite:///{folder}/catalog.db", f"file://{folder}/warehouse"
    if monkeypatch is not None:
        monkeypatch.setenv(f"PYICEBERG_CATALOG__{CATALOG.upper()}__URI", uri)
        monkeypatch.setenv(f"PYICEBERG_CATALOG__{CATALOG.upper()}__WAREHOUSE", warehouse)
        # pyiceberg reads the environment when it is imported.
        monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", Config())
    catalog = load_catalog(CATALOG, uri=uri, warehouse=warehouse)
    catalog.create_namespace_if_not_exists("db")
    return catalog


def make_url(kind: str, folder: Path) -> str:
    """A table of a format, in `make_catalog`'s catalog or in a folder."""
    return f"iceberg://{CATALOG}/db.reviews" if kind == "iceberg" else f"delta://{folder}/reviews"


def read_lakehouse(url: str, table: Any = "results") -> pa.Table:
    """All rows of a table, by the format's own library."""
    return read_url(parse_table_url(url).of_table(table))


def read_url(url: TableUrl) -> pa.Table:
    """As `read_lakehouse`."""
    if isinstance(url, DeltaUrl):
        from deltalake import DeltaTable

        return pa.table(DeltaTable(url.location).to_pyarrow_table())
    return load_catalog(CATALOG).load_table(url.identifier).scan().to_arrow()


def count_runs(url: str, table: Any = "results") -> dict[str, int]:
    """Rows of each run in a table; empty where there is no table."""
    if open_table(parse_table_url(url).of_table(table)).read_schema() is None:
        return {}
    counted = read_lakehouse(url, table).group_by("run_id").aggregate([([], "count_all")])
    return dict(sorted(zip(counted["run_id"].to_pylist(), counted["count_all"].to_pylist(), strict=True)))
