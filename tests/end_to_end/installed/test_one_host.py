"""Several worker processes of one host with one engine between them: the same answers, one copy of the weights."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from tests.support.disturbances.disturbed_runs import tables_of
from tests.support.disturbances.killed_runs import RUN_TIMEOUT_S
from tests.support.jobs.jobs_for_tests import write_parquet
from tests.support.paths import ROOT

pytestmark = pytest.mark.integration

JOB = """\
[input]
path = "in.parquet"

[prompt]
template = "ticket: {{{{ text }}}}"

[output]
path = "{output}"

[model]
engine = "torch"
path = "{model}"

[sampling]
max_tokens = 6

[plan]
max_shard_rows = 5

[failures]
engine_process = "{process}"
"""


def run(folder: Path, output: str, process: str, *args: str) -> str:
    """Run the job; what its processes said."""
    job_file = folder / f"{output}.toml"
    job_file.write_text(JOB.format(output=output, model=CHECKPOINT_PATH, process=process))
    command = [
        sys.executable,
        "-c",
        "from moebeam.jobs.commands.cli import main; main()",
        "run",
        str(job_file),
        "--debug",
        *args,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_two_workers_with_one_engine_answer_as_one_worker_does(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", {"text": [f"{'printer' if row % 3 else 'bill'} {row}" for row in range(20)]})
    run(tmp_path, "alone", "shared")
    run(tmp_path, "two", "host", "--direct_running_mode=multi_processing", "--direct_num_workers=2")
    assert tables_of(tmp_path / "two")["results"] == tables_of(tmp_path / "alone")["results"]
    manifest = (tmp_path / "two" / "manifest.json").read_text()
    assert re.search(r'"num_results": 20', manifest)
