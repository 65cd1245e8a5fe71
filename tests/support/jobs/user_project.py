"""A user's project whose folders are named like moebeam's, and a job in it whose schema is a class of its own."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.support.jobs.jobs_for_tests import TEMPLATE, write_parquet

NUM_ROWS = 12
SCHEMA = "schemas.review:Review"

_MODEL = """\
import pydantic

from schemas.limits import MIN_TOKENS


class Review(pydantic.BaseModel):
    echo: str
    num_prompt_tokens: int = pydantic.Field(ge=MIN_TOKENS)
"""
_NEVER_IMPORTED = "raise RuntimeError('moebeam imported a package of the project: ' + __name__)\n"
_JOB = f"""\
[input]
path = "in.parquet"

[prompt]
template = "{TEMPLATE}"

[output]
path = "out"
schema = "{SCHEMA}"

[model]
engine = "fake"
path = "checkpoint"
name = "tiny"

[sampling]
max_tokens = 96

[plan]
max_shard_rows = 4
"""


def write_packages(folder: Path) -> None:
    """The project's packages: `schemas` holds the job's class, the others fail where anybody imports them."""
    for package in ("jobs", "model_runner", "pipelines", "tests", "transforms"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(_NEVER_IMPORTED)
    (folder / "schemas").mkdir()
    (folder / "schemas" / "__init__.py").write_text("")
    (folder / "schemas" / "review.py").write_text(_MODEL)
    (folder / "schemas" / "limits.py").write_text("MIN_TOKENS = 1\n")


def write_project(folder: Path, checkpoint: Path) -> Path:
    """The whole project; its job file."""
    write_packages(folder)
    write_parquet(folder / "in.parquet", {"text": [f"printer trouble {row}" for row in range(NUM_ROWS)]})
    shutil.copytree(checkpoint, folder / "checkpoint")
    job = folder / "job.toml"
    job.write_text(_JOB)
    return job


def project_environment(folder: Path) -> Mapping[str, str]:
    """The environment of a process that finds the project's packages before any other, and no checkout of moebeam."""
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
