"""The record of the input that a run claims."""

from pathlib import Path

import pytest

from moebeam.jobs.output.run_record import RunRequest, save_input
from moebeam.schemas.errors import InputChanged
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.read.input_scan import scan_input
from tests.support.jobs.jobs_for_tests import fake_job, write_parquet


@pytest.mark.parametrize("is_new", [False, True])
def test_a_claim_names_the_file_that_changed_since_the_check(tmp_path: Path, is_new: bool) -> None:
    source = write_parquet(tmp_path / "in" / "a.parquet", {"text": ["a"]})
    job = fake_job(source.parent, tmp_path / "out", tmp_path)
    found = scan_input(job.input)
    write_parquet(source.with_name("b.parquet") if is_new else source, {"text": ["longer"]})
    with pytest.raises(InputChanged, match="files added, removed" if is_new else r"a\.parquet: changed"):
        save_input(RunLayout(job.output.path), RunRequest(job, None), found)
    assert not (tmp_path / "out").exists()
