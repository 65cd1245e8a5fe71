"""A job with everything in it that a crash could spoil, and what must be true of its output however it was disturbed.

Repairs, rejects of several stages, repeated ids, merged rows, tenants, prices, a file that cannot be read, and many
small shards. Tests of kills and faults start here, and so does `benchmarks/faults.py`.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from moebeam.schemas.job.sections import Job
from tests.support.jobs.jobs_for_tests import fake_job, priced, write_job_file, write_parquet, write_script

MEASURED = frozenset({"latency_ms", "started_at", "journal"})
"""Columns that two runs of one job need not have in common."""

SCHEMA = {
    "type": "object",
    "properties": {"category": {"type": "string"}, "score": {"type": "integer"}},
    "required": ["category"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Work:
    """The input of a job that will be disturbed, and the files beside it."""

    folder: Path
    checkpoint: Path
    num_rows: int
    latency_ms: float = 0.0
    max_shard_rows: int = 40

    def write(self) -> "Work":
        """Write input, schema, prices and the engine's script."""
        rows = range(self.num_rows)
        texts: list[str | None] = [f"{'printer' if row % 3 else 'invoice'} trouble {row // 2 % 211}" for row in rows]
        for row in range(5, self.num_rows, 50):
            texts[row] = None
        columns: dict[str, Any] = {
            "text": texts,
            "id": [f"t{row - row % 20 if row % 20 == 7 else row}" for row in rows],
            "tenant": [("acme", "zeta", "omega")[row % 3] for row in rows],
            "n": list(rows),
        }
        half = self.num_rows // 2
        for name, part in (("a", slice(half)), ("b", slice(half, None))):
            values = {key: column[part] for key, column in columns.items()}
            write_parquet(self.folder / "in" / f"{name}.parquet", values, row_group_size=max(1, self.num_rows // 8))
        (self.folder / "in" / "c.parquet").write_bytes(b"PAR1 not really")
        (self.folder / "schema.json").write_text(json.dumps(SCHEMA))
        priced(self.folder)
        rules = [
            {"contains": "trouble 13", "attempt": 1, "text": "no json"},
            {"contains": "trouble 17", "text": '{"category": 5}'},
            {"contains": "trouble 19", "failure": "engine_failed", "message": "scripted"},
        ]
        default = {"text": '{"category": "fine", "score": 3}'}
        script = {"default": default, "rules": rules, "latency_ms": self.latency_ms}
        write_script(self.folder / "script.json", script)
        return self

    def job(self, output: Path | str) -> Job:
        """The job with `output`, which may be an object store's."""
        sections: dict[str, Mapping[str, Any]] = {
            "input": {"id_column": "id", "tenant_column": "tenant", "passthrough": ["n"]},
            "output": {"path": str(output), "schema": str(self.folder / "schema.json"), "max_reject_share": 1.0},
            "model": {"script": str(self.folder / "script.json")},
            "accounting": {"price_book": str(self.folder / "prices.csv")},
            "plan": {"max_shard_rows": self.max_shard_rows},
        }
        return fake_job(self.folder / "in", Path("unused"), self.checkpoint, **sections)

    def write_job_file(self, output: Path) -> Path:
        """The same job as a file for the command line."""
        return write_job_file(self.job(output), self.folder / f"{output.name}.toml")


Tables = dict[str, list[dict[str, Any]]]


def tables_of(output: Path) -> Tables:
    """All published rows without their measured times, in an order of their own.

    Ledger lines of waste are left out: what an attempt paid that was given up depends on where it was given up.
    """
    tables: Tables = {}
    for table in ("results", "rejects", "ledger"):
        rows = [
            {name: value for name, value in row.items() if name not in MEASURED}
            for row in pq.read_table(output / table).to_pylist()
            if row.get("outcome") != "wasted"
        ]
        tables[table] = sorted(
            rows, key=lambda row: (row["source_file"], row["source_row"] or 0, row.get("attempt", 0))
        )
    return tables


def problems_of(output: Path, work: Work, undisturbed: Tables | None) -> list[str]:
    """What is wrong with a finished output; empty if nothing is. None compares with no other tables."""
    problems: list[str] = []
    manifest = json.loads((output / "manifest.json").read_text())
    if manifest["status"] != "complete":
        problems.append(f"manifest.status is {manifest['status']}")
    tables = tables_of(output)
    for name, rows in tables.items():
        if undisturbed is not None and rows != undisturbed[name]:
            problems.append(f"{name}: {len(rows)} rows differ from the {len(undisturbed[name])} undisturbed ones")
    answered = [*tables["results"], *tables["rejects"]]
    seen = Counter(row["n"] for row in answered if row["scope"] == "row")
    if seen != Counter(range(work.num_rows)):
        problems.append("not every input row appears exactly once in results or rejects")
    for column in ("cost", "cost_allocated"):
        sums = {sum((row[column] or Decimal(0) for row in rows), Decimal(0)) for rows in (answered, tables["ledger"])}
        if sums | {Decimal(manifest["totals"]["costs"]["USD"])} != sums or len(sums) != 1:
            problems.append(f"{column}: rows, ledger and manifest do not sum to the same: {sums}")
    left = [
        str(path.relative_to(output))
        for path in output.rglob("*")
        if path.is_file() and path.parent.name != "wasted" and path.name.endswith((".tmp", "-staged"))
    ]
    if left:
        problems.append(f"left over: {left[:5]}")
    for state in ("staging", "leases", "plan/runs"):
        if (output / "_moebeam" / state).exists():
            problems.append(f"left over: _moebeam/{state}")
    named = {file["path"] for files in manifest["files"].values() for file in files}
    found = {str(path.relative_to(output)) for path in output.rglob("*.parquet")}
    empty = {f"{table}/part-empty.parquet" for table, files in manifest["files"].items() if not files}
    if found != named | empty:
        problems.append(f"the manifest names {len(named)} files, {len(found)} are there: {sorted(found ^ named)[:5]}")
    return problems
