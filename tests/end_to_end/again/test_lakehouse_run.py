"""A job whose run ends in a lakehouse: committed by its launcher, or by who runs or resumes it later."""

from pathlib import Path

import pytest

from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.run import finish
from moebeam.jobs.run.launch import launch, resume
from tests.support.jobs.jobs_for_tests import fake_job, write_parquet
from tests.support.jobs.published_runs import count_runs


def test_a_run_whose_launcher_died_before_the_commit_is_committed_by_the_next_one(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a", "b", "c"], "tenant": ["x", "y", "x"]})
    url, out = f"delta://{tmp_path}/reviews", tmp_path / "out"
    job = fake_job(
        source,
        out,
        tiny_checkpoint,
        input={"passthrough": ["tenant"]},
        output={"table": url, "replace_where": "tenant"},
    )

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    real = finish.commit_run
    monkeypatch.setattr(finish, "commit_run", stop)
    with pytest.raises(KeyboardInterrupt):
        launch(job)
    assert count_runs(url) == {}
    monkeypatch.setattr(finish, "commit_run", real)
    summary = launch(job)
    assert (summary.status, summary.table, sorted(summary.table_commits)) == (
        "already_done",
        url,
        ["ledger", "rejects", "results"],
    )
    assert count_runs(url) == {summary.run_id: 3}
    assert count_runs(url, "ledger") == {summary.run_id: 3}
    # A finished run can go to another table, too.
    other = f"delta://{tmp_path}/other"
    elsewhere = job.model_copy(update={"output": job.output.model_copy(update={"table": other})})
    assert resume(read_record(str(out)), elsewhere).table == other
    assert count_runs(other) == {summary.run_id: 3}
