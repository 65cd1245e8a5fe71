"""Publishing can be repeated, by launchers one after another or side by side, and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.run.launch import launch
from moebeam.schemas.errors import CommitError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import result_schema
from moebeam.transforms.durable.commit import read_commit
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.shard_ranges import ShardRange, cut_ranges
from moebeam.transforms.publish.manifest import publish_shard
from tests.support.disturbances.disturbed_runs import Work, problems_of, tables_of


@pytest.fixture
def work(tmp_path: Path, tiny_checkpoint: Path) -> Work:
    return Work(tmp_path, tiny_checkpoint, 40, max_shard_rows=20).write()


def test_what_was_published_may_be_published_again_after_staging_is_gone(work: Work) -> None:
    output = work.folder / "out"
    launch(work.job(output))
    layout = RunLayout(str(output))
    commit = read_commit(layout, "s000000")
    assert commit is not None
    assert not Path(layout.staging).exists()
    publish_shard(commit, layout)
    Path(layout.published_file(commit.files[0].table, commit.shard)).unlink()
    with pytest.raises(CommitError, match="found no file"):
        publish_shard(commit, layout)


def test_nothing_is_left_when_the_manifest_appears(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    output = work.folder / "out"
    layout = RunLayout(str(output))
    there: list[str] = []
    left: list[Path] = []
    real = storage.write_whole

    def look(path: str, content: bytes) -> None:
        for name in () if left else ("results/.part-s000000.parquet.0123.tmp", "_moebeam/commits/.s0.json.0123.tmp"):
            # As a process that was killed in the middle of a write leaves them.
            left.append(output / name)
            left[-1].parent.mkdir(parents=True, exist_ok=True)
            left[-1].write_bytes(b"half")
        if path == layout.manifest:
            there.extend(name for name in ("staging", "leases", "progress", "plan/runs") if (state / name).exists())
            there.extend(str(path) for path in output.rglob(".*.tmp"))
        real(path, content)

    state = output / "_moebeam"
    monkeypatch.setattr(storage, "write_whole", look)
    launch(work.job(output))
    assert len(left) == 2
    assert there == []


def test_a_run_that_another_launcher_completed_meanwhile_stays_complete(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = work.folder / "out"
    launch(work.job(output))
    layout = RunLayout(str(output))
    undisturbed = tables_of(output)
    from moebeam.transforms.publish.manifest import write_manifest
    from moebeam.transforms.publish.publish_spec import PublishSpec

    before = Path(layout.manifest).read_text()
    found: dict[str, Any] = json.loads(before)
    commit = read_commit(layout, "s000000")
    assert commit is not None
    spec = PublishSpec(found["run_id"], layout, result_schema(()), work.num_rows, {})
    assert write_manifest([commit], spec) == before
    assert problems_of(output, work, undisturbed) == []


def test_a_plan_that_another_launcher_finished_meanwhile_is_taken(work: Work) -> None:
    output = work.folder / "out"
    launch(work.job(output))
    layout = RunLayout(str(output))
    plan = read_plan(layout)
    assert plan is not None
    # Its runs are gone, and so are those that this launcher wrote into the same folder.
    assert list(cut_ranges([], layout)) == [ShardRange(shard.shard, "", "", ()) for shard in plan.shards]


def test_a_damaged_plan_is_named(work: Work) -> None:
    layout = RunLayout(str(work.folder / "out"))
    storage.write_whole(layout.plan_record, b'{"shards": [')
    with pytest.raises(CommitError, match=r"plan/plan\.json: is damaged: expected the record of a plan"):
        read_plan(layout)
