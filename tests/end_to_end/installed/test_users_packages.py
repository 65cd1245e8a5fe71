"""A job whose folder has packages named like the checkout's folders; its schema lives in one of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.disturbances.killed_runs import RUN_TIMEOUT_S
from tests.support.jobs.jobs_for_tests import column, read_table, write_parquet, write_script
from tests.support.paths import ROOT

JOB = """\
[input]
path = "in.parquet"

[prompt]
template = "{{ text }}"

[output]
path = "output"
schema = "schemas.review:Review"
max_reject_share = 1.0

[model]
engine = "fake"
script = "script.json"

[repair]
max_attempts = 1
"""
REVIEW = """\
import pydantic
from transforms.words import REFUSED

class Review(pydantic.BaseModel):
    word: str

    @pydantic.field_validator("word")
    @classmethod
    def check(cls, word: str) -> str:
        if word in REFUSED:
            raise ValueError("refused by the user's own code")
        return word
"""


@pytest.mark.integration
@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_schema_of_a_users_package_validates_in_every_worker(tmp_path: Path, mode: str) -> None:
    for package in ("schemas", "model_runner", "transforms", "pipelines", "jobs", "tests"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "schemas" / "review.py").write_text(REVIEW)
    (tmp_path / "transforms" / "words.py").write_text("REFUSED = {'bad'}\n")
    (tmp_path / "job.toml").write_text(JOB)
    words = ["good", "bad", "fair"]
    rules = [{"contains": word, "text": json.dumps({"word": word})} for word in words]
    write_script(tmp_path / "script.json", {"rules": rules})
    write_parquet(tmp_path / "in.parquet", {"text": words})
    main = "from moebeam.jobs.commands.cli import main; main()"
    workers = ["--direct_num_workers", "2" if mode == "multi_processing" else "1", "--direct_running_mode", mode]
    # `-c` puts the working directory, the checkout, on the path; workers inherit it.
    command = [sys.executable, "-c", main, "run", str(tmp_path / "job.toml"), *workers]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert column(read_table(tmp_path / "output", "results"), "source_row") == [0, 2]
    (rejected,) = read_table(tmp_path / "output", "rejects")
    assert "refused by the user's own code" in rejected["error_message"]
