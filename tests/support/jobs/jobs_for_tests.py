"""Jobs over small inputs with the fake engine: what tests of several folders start from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.check.job_file import read_job
from moebeam.jobs.console.summary import RunSummary
from moebeam.jobs.run.launch import launch
from moebeam.schemas.job.sections import Job

TEMPLATE = "Classify this ticket: {{ text }}"

PRICES = """\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,evidence,note
fake,tiny,2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,made up,
"""


def write_parquet(path: Path, columns: Mapping[str, Any], *, row_group_size: int = 1000) -> Path:
    """A Parquet file of Python lists or Arrow arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, row_group_size=row_group_size)
    return path


def write_script(path: Path, script: Mapping[str, Any]) -> Path:
    """A script for the fake engine."""
    path.write_text(json.dumps(script))
    return path


def fake_job(source: Path, output: Path, checkpoint: Path, /, **sections: Mapping[str, Any]) -> Job:
    """A job over `source` with the fake engine; `sections` update the job file's sections key by key."""
    values: dict[str, dict[str, Any]] = {
        "input": {"path": str(source)},
        "prompt": {"template": TEMPLATE},
        "output": {"path": str(output)},
        "model": {"engine": "fake", "path": str(checkpoint), "name": "tiny"},
        "sampling": {"max_tokens": 64},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return read_job(values)


def priced(folder: Path) -> dict[str, str]:
    """An `[accounting]` section with a price for the fake engine's model."""
    path = folder / "prices.csv"
    path.write_text(PRICES)
    return {"price_book": str(path)}


def write_job_file(job: Job, path: Path) -> Path:
    """A job as a file for the command line."""
    return write_sections(job.model_dump(mode="json", by_alias=True, exclude_unset=True), path)


def write_sections(sections: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Sections of a job file as TOML; keys without a value are left out."""
    lines: list[str] = []
    for section, values in sections.items():
        keys = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
        lines += [f"[{section}]", *keys, ""]
    path.write_text("\n".join(lines))
    return path


def run_fake_job(source: Path, output: Path, checkpoint: Path, /, **sections: Mapping[str, Any]) -> RunSummary:
    """Run `fake_job` to its end."""
    return launch(fake_job(source, output, checkpoint, **sections))


def read_table(output: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a published table, in the order of their place in the input."""
    found = pq.read_table(output / table)
    order = [("source_file", "ascending"), ("source_row", "ascending")]
    return found.sort_by(order).to_pylist()


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]
