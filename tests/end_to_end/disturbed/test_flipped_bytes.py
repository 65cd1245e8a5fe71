"""One flipped bit in any file of a run: never another answer or figure, and a way on from each."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.flipped_bytes.alone import FINE_ALONE, flip_each_byte
from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.run.launch import launch
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.errors import PipelineFailed
from moebeam.transforms.durable.commit import list_committed_shards, read_commit
from moebeam.transforms.plan.plan_record import read_plan
from tests.support.disturbances.flipped_bytes import FINE, Flip, FlippedRun, make_runs, pick_flips
from tests.support.disturbances.stopped_run import NUM_ROWS, Engine, PlannedRun
from tests.support.jobs.jobs_for_tests import read_table


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> PromptEncoder:
    return PromptEncoder.load(str(tiny_checkpoint), "auto")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, encoder: Any) -> dict[str, FlippedRun]:
    return make_runs(tmp_path_factory.mktemp("flipped"), tiny_checkpoint, encoder)


def repair(output: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run_command(["repair", str(output), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def read_rows_of(run: PlannedRun) -> list[list[dict[str, Any]]]:
    return [read_table(run.output, name) for name in ("results", "rejects")]


@pytest.mark.parametrize("name", ["complete", "killed"])
def test_no_flipped_bit_gives_another_answer_or_figure(runs: dict[str, FlippedRun], name: str, tmp_path: Path) -> None:
    run = runs[name]
    for flip in pick_flips(run.run.output, 1, seed=3):
        found = run.judge([flip], tmp_path)
        assert {reader: said for reader, said in found.items() if said[0] not in FINE} == {}, flip


@pytest.mark.parametrize("name", ["complete", "stopped", "killed"])
def test_what_reads_a_kind_of_file_passes_on_no_flipped_bit(runs: dict[str, FlippedRun], name: str) -> None:
    tally = flip_each_byte(runs[name].run.output, seed=3, num_per_file=2)
    assert set(tally.totals) <= FINE_ALONE, tally.examples


def test_damaged_views_are_written_again(
    runs: dict[str, FlippedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["complete"].run.copy(tmp_path / "out")
    whole = (run.output / "views.sql").read_bytes()
    Flip("views.sql", 300, 1).apply(run.output)
    found = repair(run.output, capsys)
    assert [(entry["path"], entry["done"]) for entry in found["damaged"]] == [
        (str(run.output / "views.sql"), "made again")
    ]
    assert (run.output / "views.sql").read_bytes() == whole


def test_an_export_over_a_damaged_journal_counts_what_it_leaves_out(
    runs: dict[str, FlippedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["stopped"]
    committed = list_committed_shards(run.run.layout)
    (journal,) = (path for path in run.run.output.rglob("*.jsonl") if path.parent.name not in committed)
    flip = Flip(journal.relative_to(run.run.output).as_posix(), 300, 1)
    verdicts = {reader: verdict for reader, (verdict, _) in run.judge([flip], tmp_path).items()}
    assert (verdicts.pop("export"), verdicts.pop("answers")) == ("told", "told")
    assert set(verdicts.values()) <= {"equal", "told"}
    copy = run.run.copy(tmp_path / "out")
    flip.apply(copy.output)
    words = ["export", str(copy.output), "--openai-batch", str(tmp_path / "batch"), "--partial", "--json"]
    assert run_command(words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["num_damaged_journal_lines"] == 1
    assert "1 answers cannot be read and are left out" in said.err


def test_a_damaged_plan_is_made_again_from_the_input(runs: dict[str, FlippedRun], tmp_path: Path) -> None:
    run = runs["killed"].run.copy(tmp_path / "out")
    plan, committed = read_plan(run.layout), list_committed_shards(run.layout)
    left = next(shard for shard in run.shards if shard not in committed)
    Flip(f"_moebeam/plan/{left}.arrow", 777, 3).apply(run.output)
    with pytest.raises(PipelineFailed, match=rf"{left}\.arrow: is damaged: .*made again from the input"):
        launch(run.job)
    assert launch(run.job).status == "succeeded"
    assert read_plan(run.layout) == plan
    assert sum(map(len, read_rows_of(run))) == NUM_ROWS


def test_a_damaged_record_of_the_plan_is_made_again_from_the_plans_of_the_shards(
    runs: dict[str, FlippedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["complete"].run.copy(tmp_path / "out")
    plan = read_plan(run.layout)
    Flip("_moebeam/plan/plan.json", 40, 0).apply(run.output)
    found = repair(run.output, capsys)
    assert [(entry["path"], entry["done"]) for entry in found["damaged"]] == [(run.layout.plan_record, "made again")]
    assert read_plan(run.layout) == plan
    assert repair(run.output, capsys)["status"] == "whole"


def test_a_damaged_record_of_a_cleaned_plan_is_left_and_the_rest_is_looked_at(
    runs: dict[str, FlippedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["complete"].run.copy(tmp_path / "out")
    for plan in (run.output / "_moebeam" / "plan").glob("*.arrow"):
        plan.unlink()
    Flip("_moebeam/plan/plan.json", 40, 0).apply(run.output)
    Flip("_moebeam/job.json", 40, 0).apply(run.output)
    found = repair(run.output, capsys)
    done = {Path(entry["path"]).name: entry["done"] for entry in found["damaged"]}
    assert done == {"job.json": "left as it is", "plan.json": "left as it is"}


def test_repair_names_each_damaged_plan_of_a_shard_by_its_path(
    runs: dict[str, FlippedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["killed"].run.copy(tmp_path / "out")
    broken = run.shards[1:3]
    for shard in broken:
        Flip(f"_moebeam/plan/{shard}.arrow", 777, 3).apply(run.output)
    found = repair(run.output, capsys)
    assert [entry["path"] for entry in found["damaged"]] == [run.layout.shard_plan(shard) for shard in broken]


def test_a_damaged_table_is_made_again_from_its_journal(
    runs: dict[str, FlippedRun], encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["complete"].run.copy(tmp_path / "out")
    before = read_rows_of(run)
    Flip(f"results/part-{run.shards[1]}.parquet", 500, 1).apply(run.output)
    found = repair(run.output, capsys)
    assert [Path(entry["path"]).name for entry in found["damaged"]] == [
        f"part-{run.shards[1]}.parquet",
        "manifest.json",
    ]
    assert len([*(run.output / "_moebeam" / "damaged").iterdir()]) >= 3, "nothing is deleted"
    paid = [entry.reference for entry in run.entries()]
    assert run.launch(Engine(), encoder) == "done"
    assert read_rows_of(run) == before
    assert [entry.reference for entry in run.entries()] == paid, "no answer is paid again"


def test_a_damaged_copy_of_a_table_gives_way_to_the_whole_one(
    runs: dict[str, FlippedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["stopped"].run.copy(tmp_path / "out")
    published = run.output / "results" / f"part-{run.shards[0]}.parquet"
    whole = published.read_bytes()
    published.unlink()
    published.write_bytes(whole[:100] + b"x" + whole[101:])
    found = repair(run.output, capsys)
    assert [(Path(entry["path"]).name, entry["done"]) for entry in found["damaged"]] == [(published.name, "made again")]
    assert published.read_bytes() == whole


def test_repair_leaves_no_damaged_copy_in_place_and_deletes_none(
    runs: dict[str, FlippedRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["stopped"].run.copy(tmp_path / "out")
    commit = read_commit(run.layout, run.shards[0])
    assert commit is not None
    staged = {file.table: run.output / file.path for file in commit.files}
    broken = (run.output / "results" / f"part-{run.shards[0]}.parquet", staged["ledger"])
    for path in broken:
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(b"x" + whole[1:])
    found = repair(run.output, capsys)
    assert {entry["path"]: entry["done"] for entry in found["damaged"]} == {
        str(broken[0]): "made again",
        str(broken[1]): "set aside",
    }
    assert len([*(run.output / "_moebeam" / "damaged").iterdir()]) == 2
    assert repair(run.output, capsys)["status"] == "whole"


def test_stray_files_among_leases_and_records_of_waste_stop_nothing(
    runs: dict[str, FlippedRun], encoder: Any, tmp_path: Path
) -> None:
    run = runs["killed"].run.copy(tmp_path / "out")
    for name in ("leases/notes.json", "wasted/s000000.broken.parquet-staged"):
        (run.output / "_moebeam" / name).parent.mkdir(exist_ok=True)
        (run.output / "_moebeam" / name).write_text("no")
    assert run_command(["status", str(run.output)]) == 0
    assert run.launch(Engine(), encoder) == "done"
