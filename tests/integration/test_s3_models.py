"""A checkpoint in a bucket: the torch engine answers from it as from a folder, and one that changed answers nothing."""

from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH as CHECKPOINT
from moebeam.jobs.run.launch import launch
from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision, list_checkpoint_files
from moebeam.model_runner.checkpoint.model_store import FOLDER_VARIABLE
from moebeam.schemas.errors import OutputError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from tests.support.jobs.jobs_for_tests import fake_job, read_table, write_parquet

pytestmark = pytest.mark.integration

MEASURED = ("latency_ms", "run_id", "source_file")


@pytest.fixture
def model_url(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "models"))
    url = f"{bucket}/models/demo"
    for name in list_checkpoint_files(str(CHECKPOINT)):
        storage.write_whole(f"{url}/{name}", (CHECKPOINT / name).read_bytes())
    return url


def job(folder: Path, output: str, model: str) -> Job:
    source = folder / "in.parquet"
    if not source.exists():
        write_parquet(source, {"text": [f"ticket {row}: the printer is broken" for row in range(6)]})
    engine = {"engine": "torch", "path": model, "name": "demo", "script": None}
    return fake_job(source, folder / output, Path(model), model=engine, sampling={"max_tokens": 8})


def rows(output: Path) -> list[dict[str, Any]]:
    found = read_table(output, "results")
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in found]


def test_answers_are_those_of_the_same_folder_on_disk(model_url: str, tmp_path: Path) -> None:
    assert launch(job(tmp_path, "local", str(CHECKPOINT))).num_results == 6
    assert launch(job(tmp_path, "remote", model_url)).num_results == 6
    assert rows(tmp_path / "remote") == rows(tmp_path / "local")
    (copy,) = [path for path in (tmp_path / "models").iterdir() if path.is_dir()]
    assert copy.name == compute_checkpoint_revision(model_url)


def test_a_checkpoint_that_changed_is_refused_when_the_run_goes_on(model_url: str, tmp_path: Path) -> None:
    assert launch(job(tmp_path, "out", model_url)).num_results == 6
    config = storage.read_bytes(f"{model_url}/generation_config.json")
    storage.write_whole(f"{model_url}/generation_config.json", config.replace(b"{", b'{"changed": true,', 1))
    with pytest.raises(OutputError, match=r"belongs to another job; different: \[model\]"):
        launch(job(tmp_path, "out", model_url))
