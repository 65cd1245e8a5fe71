"""One job in two places: a folder on disk, and the same folder in a bucket; its paths are relative, so both work."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebeam.schemas.store import storage
from tests.support.jobs.jobs_for_tests import PRICES, TEMPLATE, read_table, write_parquet, write_script
from tests.support.paths import ROOT

NUM_ROWS = 60
RUN_TIMEOUT_S = 300

JOB = f"""\
[input]
path = "in/*.parquet"
tenant_column = "tenant"
passthrough = ["n"]

[prompt]
template = "{TEMPLATE}"

[output]
path = "out"
schema = "answer.schema.json"
max_reject_share = 0.2

[model]
engine = "fake"
path = "checkpoint"
name = "tiny"
script = "script.json"

[sampling]
max_tokens = 96

[plan]
max_shard_rows = 5

[accounting]
price_book = "prices.csv"
"""
SCHEMA = {
    "type": "object",
    "properties": {"echo": {"type": "string"}, "num_prompt_tokens": {"type": "integer"}},
    "required": ["echo", "num_prompt_tokens"],
    "additionalProperties": False,
}
MEASURED = {"latency_ms", "started_at"}
"""Columns that no two runs share."""

OF_THE_PLACE = {"run_id"}
"""A run's name follows from where its input lies, among other things."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a `moebeam` process ended."""

    exit_code: int
    output: str
    errors: str

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.output)


def write_job(folder: Path, checkpoint: Path, *, latency_ms: float = 0.0) -> Path:
    """The job's folder: input, schema, script, prices, checkpoint and `job.toml`."""
    rows = range(NUM_ROWS)
    columns = {
        "text": [f"{'printer' if row % 3 else 'invoice'} trouble number {row % 40}" for row in rows],
        "tenant": [("acme", "zeta")[row % 2] for row in rows],
        "n": list(rows),
    }
    half = NUM_ROWS // 2
    for name, part in (("a", slice(0, half)), ("b", slice(half, None))):
        some = {key: values[part] for key, values in columns.items()}
        write_parquet(folder / "in" / f"{name}.parquet", some, row_group_size=7)
    failing = {"contains": "number 9", "failure": "engine_failed", "message": "broke"}
    write_script(folder / "script.json", {"latency_ms": latency_ms, "rules": [failing]})
    (folder / "answer.schema.json").write_text(json.dumps(SCHEMA))
    (folder / "prices.csv").write_text(PRICES)
    (folder / "job.toml").write_text(JOB)
    shutil.copytree(checkpoint, folder / "checkpoint")
    return folder


def upload(folder: Path, url: str) -> str:
    """Put a folder's files below a URL; the URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_whole(f"{url}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def start_moebeam(*arguments: str, env: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """`moebeam` as a process of its own, in this environment and `env`."""
    command = [str(Path(sys.executable).with_name("moebeam")), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: "subprocess.Popen[str]") -> Ended:
    """Wait for a process, which is killed if it takes too long."""
    try:
        output, errors = process.communicate(timeout=RUN_TIMEOUT_S)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Ended(process.returncode, output, errors)


def run_moebeam(*arguments: str, env: Mapping[str, str] | None = None) -> Ended:
    return wait_for(start_moebeam(*arguments, env=env))


def tables(output: Path) -> dict[str, list[dict[str, Any]]]:
    """A run's published rows without what no two places or instants share, in the order of the input."""
    return {name: [_comparable(row) for row in read_table(output, name)] for name in ("results", "rejects", "ledger")}


def _comparable(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in MEASURED | OF_THE_PLACE}
    return {**kept, "source_file": Path(row["source_file"]).name}


def assert_no_secret(secrets: Sequence[str], *texts: str) -> None:
    """None of the texts holds a secret, nor one spelled for a URL."""
    for secret in secrets:
        assert secret
        for text in texts:
            assert not re.search(re.escape(secret), text, re.IGNORECASE), "a credential was written"
