"""Datasets of the Hugging Face Hub as input, by `hf://`."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem, constants

from moebeam.jobs.run.launch import launch
from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.store.file_mark import mark_now
from moebeam.transforms.read.input_scan import scan_input
from tests.support.jobs.jobs_for_tests import fake_job
from tests.support.servers.hub_stand_in import REPO, serve_hub


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        texts = [f"the printer on floor {part}{row} is broken" for row in range(5)]
        pq.write_table(pa.table({"text": texts}), folder / "data" / f"train-{part}.parquet")
    (folder / "README.md").write_text("no rows\n")
    with serve_hub(folder) as address:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = address + template.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        HfFileSystem.clear_instance_cache()
        yield folder
    HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize(("path", "num_rows"), [("data/*.parquet", 10), ("data/train-1.parquet", 5), ("data", 10)])
def test_a_job_reads_a_dataset_of_the_hub(
    path: str, num_rows: int, dataset: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    job = fake_job(tmp_path, tmp_path / "out", tiny_checkpoint, input={"path": f"hf://datasets/{REPO}/{path}"})
    assert launch(job).num_results == num_rows


def test_a_file_of_the_hub_that_changes_is_told_from_what_it_was(dataset: Path) -> None:
    path = f"hf://datasets/{REPO}/README.md"
    before = mark_now(path)
    assert mark_now(path).is_same(before)
    (dataset / "README.md").write_text("no lines")
    assert not mark_now(path).is_same(before)


def test_an_input_of_the_hub_that_changes_between_attempts_is_another_input(dataset: Path) -> None:
    section = InputSection(path=f"hf://datasets/{REPO}/data/train-0.parquet")
    before = scan_input(section).fingerprint
    assert scan_input(section).fingerprint == before
    source = dataset / "data" / "train-0.parquet"
    content = source.read_bytes()
    source.write_bytes(content.replace(b"printer", b"drawers"))
    assert source.read_bytes() != content
    assert scan_input(section).fingerprint != before


def test_a_dataset_that_is_not_there_is_named(dataset: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = fake_job(tmp_path, tmp_path / "out", tiny_checkpoint, input={"path": "hf://datasets/acme/nothing/a.parquet"})
    with pytest.raises(InputPatternError, match="acme/nothing"):
        launch(job)
