"""Which output folders a job may have: its own, or one that is free, also when others claim it at the same time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.run.launch import launch
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store import storage
from tests.support.jobs.jobs_for_tests import fake_job, run_fake_job, write_parquet


def test_an_output_of_another_job_or_with_other_files_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    with pytest.raises(OutputError, match=r"belongs to another job; different: \[sampling\]\."):
        run_fake_job(source, tmp_path / "out", tiny_checkpoint, sampling={"max_tokens": 65})
    with pytest.raises(OutputError, match=r"different: --limit\. A trial needs an output of its own"):
        launch(fake_job(source, tmp_path / "out", tiny_checkpoint), limit=1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(OutputError, match="files that are not a moebeam run"):
        run_fake_job(source, tmp_path / "photos", tiny_checkpoint)
    (tmp_path / "photos" / "_moebeam").mkdir()
    (tmp_path / "photos" / "cat.jpg").rename(tmp_path / "photos" / "_moebeam" / "cat.jpg")
    with pytest.raises(OutputError, match="files that are not a moebeam run"):
        run_fake_job(source, tmp_path / "photos", tiny_checkpoint)


def test_an_output_whose_claim_was_killed_half_way_is_free(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    state = tmp_path / "out" / "_moebeam"
    state.mkdir(parents=True)
    (state / ".job.json.0123.tmp").write_bytes(b"{")
    (state / "probe-0123").write_bytes(b"first")
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    assert summary.num_results == 1
    assert sorted(path.name for path in state.iterdir() if path.is_file()) == ["input.json", "job.json", "publish.json"]


def test_an_output_that_another_launcher_claims_meanwhile_is_shared(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    real = storage.list_files

    def list_files(pattern: str) -> list[tuple[str, Mapping[str, Any]]]:
        if pattern == str(tmp_path / "out"):
            monkeypatch.setattr(storage, "list_files", real)
            run_fake_job(source, tmp_path / "out", tiny_checkpoint)
        return real(pattern)

    monkeypatch.setattr(storage, "list_files", list_files)
    (tmp_path / "out").mkdir()
    assert run_fake_job(source, tmp_path / "out", tiny_checkpoint).num_results == 1


def test_an_output_inside_the_input_folder_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", {"text": ["a"]})
    with pytest.raises(OutputError, match="lies inside the input"):
        run_fake_job(tmp_path / "in", tmp_path / "in" / "out", tiny_checkpoint)


def test_an_output_that_cannot_be_written_is_a_clear_error(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"file.*cannot be written"):
        run_fake_job(source, tmp_path / "file" / "out", tiny_checkpoint)
    with pytest.raises(OutputError, match=r"/proc/moebeam'.*cannot be written"):
        run_fake_job(source, Path("/proc/moebeam"), tiny_checkpoint)


def test_of_two_jobs_that_start_at_once_on_one_output_one_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    first = check_job(fake_job(source, tmp_path / "out", tiny_checkpoint))
    second = check_job(fake_job(source, tmp_path / "out", tiny_checkpoint, prompt={"template": "B {{ text }}"}))
    first.claim_output()
    first.claim_output()
    with pytest.raises(OutputError, match=r"belongs to another job; different: \[prompt\]"):
        second.claim_output()
