"""A piece of hostile content: the small job that meets it, and the rows that it must leave alone.

Each module beside this one that is named after a kind has a tuple `CASES`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

OUTPUT = "out"
"""Folder of the run, beside the job file."""

KEY_VARIABLE = "MOEBEAM_HOSTILE_KEY"
KEY = "sk-hostile-0123456789abcdefghij"
"""What every job finds in its environment as the key of a provider."""


@dataclass(frozen=True, slots=True)
class HostileCase:
    """One piece of content.

    Attributes:
        name: unique in its kind; says what the content does.
        prepare: fills an empty folder with input and job file, whose output is the folder's `OUTPUT`, and gives the
            path of the job file. A server that answers the job serves while the context is entered.
        others: ids of rows that are no part of it. Once the run begins each of them is answered, unless content is the
            whole job's, such as its template or checkpoint: then there are none.
        is_harmless: whether rows that meet it may be answered as well as rejected.
    """

    name: str
    prepare: Callable[[Path], AbstractContextManager[Path]]
    others: frozenset[str] = frozenset()
    is_harmless: bool = False


def ordinary_case() -> HostileCase:
    """A job without anything hostile in it."""
    rows = [{"id": f"row {row}", "text": f"ticket {row}"} for row in range(5)]
    return HostileCase("ordinary", lambda folder: small_job(folder, rows), is_harmless=True)


def small_job(
    folder: Path, rows: Sequence[Mapping[str, Any]], **sections: Mapping[str, Any]
) -> AbstractContextManager[Path]:
    """A job of the engine `fake` over a Parquet file of rows with the columns `id` and `text`.

    Args:
        sections: update the job file's sections key by key; `None` leaves a key out.
    """
    source = folder / "in.parquet"
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), source)
    return small_job_over(folder, source, **sections)


def small_job_over(folder: Path, source: Path, **sections: Mapping[str, Any]) -> AbstractContextManager[Path]:
    """The same over files that are there."""
    values: dict[str, dict[str, Any]] = {
        "input": {"path": str(source), "id_column": "id"},
        "prompt": {"template": "Classify this ticket: {{ text }}"},
        "output": {"path": str(folder / OUTPUT), "max_reject_share": 1.0},
        "model": {"engine": "fake", "name": "tiny"},
        "sampling": {"max_tokens": 64},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    job_file = folder / "job.toml"
    job_file.write_text(_write_toml(values))
    return nullcontext(job_file)


def _write_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        # Strings, numbers, booleans and lists of them are written alike in JSON and in TOML.
        pairs = [(key, json.dumps(value, ensure_ascii=False)) for key, value in values.items() if value is not None]
        lines += [f"{key} = {text}" for key, text in pairs]
    return "\n".join(lines) + "\n"
