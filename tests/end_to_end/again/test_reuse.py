"""Incremental runs: what an earlier run answered is taken over, and only the rest is asked and paid."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.reuse import prepare_reuse
from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.console.summary import RunSummary
from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.run.launch import launch, resume
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store.sealed_json import seal_json, unseal_json
from moebeam.transforms.answer.answer_shard import LoadedEngine
from tests.support.disturbances.disturbed_runs import tables_of
from tests.support.jobs.jobs_for_tests import TEMPLATE, fake_job, priced, run_fake_job, write_parquet, write_script

pytestmark = pytest.mark.integration

PARAGRAPH = "the same long beginning of every prompt, " * 3
YESTERDAY = [f"{PARAGRAPH} row {row}" for row in range(60)] + ["BAD", "again", "again"]
TODAY = [f"{PARAGRAPH} new {row}" for row in range(5)] + YESTERDAY[20:] + ["again"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reuse")


def sections(folder: Path, **more: Any) -> dict[str, Any]:
    script = write_script(folder / "script.json", {"rules": [{"contains": "BAD", "failure": "engine_failed"}]})
    return {
        "model": {"script": str(script)},
        "plan": {"max_shard_rows": 8},
        "accounting": priced(folder),
        "input": {"id_column": "id"},
    } | more


@pytest.fixture(scope="module")
def yesterday(folder: Path, tiny_checkpoint: Path) -> Path:
    columns = {"id": [f"old{row}" for row in range(len(YESTERDAY))], "text": YESTERDAY}
    source = write_parquet(folder / "yesterday.parquet", columns)
    run_fake_job(source, folder / "yesterday", tiny_checkpoint, **sections(folder))
    return folder / "yesterday"


def today(folder: Path, name: str, checkpoint: Path, reuse: Path | None, **more: Any) -> RunSummary:
    source = write_parquet(folder / "today.parquet", {"id": [f"new{row}" for row in range(len(TODAY))], "text": TODAY})
    job = fake_job(source, folder / name, checkpoint, **sections(folder, **more))
    return launch(job, reuse=prepare_reuse(str(reuse)) if reuse is not None else None)


def answers(output: Path) -> dict[str, tuple[Any, ...]]:
    tables = tables_of(output)
    names = ("status", "output_text", "finish_reason", "provider", "model", "error_type", "merged_into")
    return {row["custom_id"]: tuple(row[name] for name in names) for row in tables["results"] + tables["rejects"]}


def test_only_new_changed_and_failed_rows_are_asked(folder: Path, yesterday: Path, tiny_checkpoint: Path) -> None:
    whole = today(folder, "whole", tiny_checkpoint, None)
    reused = today(folder, "reused", tiny_checkpoint, yesterday)
    assert answers(folder / "reused") == answers(folder / "whole")
    assert (reused.num_results, reused.num_reused) == (whole.num_results, whole.num_results - 5)
    assert reused.rejects_by_type == {"engine_failed": 1}
    tables = tables_of(folder / "reused")
    assert sorted(line["custom_id"] for line in tables["ledger"]) == ["new0", "new1", "new2", "new3", "new4", "new45"]
    run_id = read_record(str(yesterday)).run_id
    for row in tables["results"]:
        if int(row["custom_id"][3:]) < 5:
            assert row["reused_from"] is None and row["cost"] > 0
            continue
        origin = "old61" if row["output_text"] == answers(folder / "whole")["new46"][1] else None
        position = int(row["custom_id"][3:]) + 15
        assert row["reused_from"] == f"{run_id}/{origin or f'old{position}'}"
        paid = ("prompt_tokens", "completion_tokens", "attempts", "cost", "cost_allocated")
        assert [row[name] for name in paid] == [0, 0, 0, 0, 0]
    assert reused.cost is not None and whole.cost is not None and 0 < reused.cost < whole.cost / 5
    manifest = json.loads((folder / "reused" / "manifest.json").read_text())
    assert manifest["reuse"] == {"output": str(yesterday), "run_id": run_id}


def test_an_output_of_reused_rows_can_be_reused_itself(folder: Path, yesterday: Path, tiny_checkpoint: Path) -> None:
    if not (folder / "reused").exists():
        today(folder, "reused", tiny_checkpoint, yesterday)
    again = today(folder, "thrice", tiny_checkpoint, folder / "reused")
    assert again.num_reused == again.num_results == len(TODAY) - 1
    assert answers(folder / "thrice") == answers(folder / "reused")


def test_a_run_of_nothing_new_loads_no_engine(
    folder: Path, yesterday: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be asked")

    monkeypatch.setattr(LoadedEngine, "load", load)
    source = write_parquet(folder / "few.parquet", {"id": ["a", "b"], "text": YESTERDAY[3:5]})
    job = fake_job(source, folder / "few", tiny_checkpoint, **sections(folder))
    assert launch(job, reuse=prepare_reuse(str(yesterday))).num_reused == 2


def test_sampling_and_options_of_a_row_are_part_of_what_was_asked(
    folder: Path, yesterday: Path, tiny_checkpoint: Path
) -> None:
    changed = today(folder, "sampled", tiny_checkpoint, yesterday, sampling={"max_tokens": 63})
    assert changed.num_reused == 0


def test_another_model_or_schema_is_refused_and_named(folder: Path, yesterday: Path, tiny_checkpoint: Path) -> None:
    other = write_script(folder / "other.json", {"default": {"text": "{}"}})
    with pytest.raises(OutputError, match=r"--reuse .*yesterday: expected .* found other: \[model\]; run without"):
        today(folder, "refused", tiny_checkpoint, yesterday, model={"script": str(other)})
    assert not (folder / "refused" / "manifest.json").exists()


def test_an_interrupted_run_goes_on_reusing(folder: Path, yesterday: Path, tiny_checkpoint: Path) -> None:
    stopped = today(folder, "stopped", tiny_checkpoint, yesterday, limits={"max_requests": 2})
    assert stopped.status == "incomplete"
    record = read_record(str(folder / "stopped"))
    job = record.request.job.model_copy(update={"limits": type(record.request.job.limits)()})
    ended = resume(record, job)
    assert (ended.status, ended.num_reused) == ("succeeded", len(TODAY) - 6)


def test_tenants_do_not_take_over_from_each_other(folder: Path, tiny_checkpoint: Path) -> None:
    for name, tenants in (("mine", ["a", "a"]), ("theirs", ["b", "a"])):
        source = write_parquet(folder / f"{name}.parquet", {"text": ["x", "y"], "who": tenants})
        job = fake_job(source, folder / name, tiny_checkpoint, input={"tenant_column": "who"})
        summary = launch(job, reuse=prepare_reuse(str(folder / "mine")) if name == "theirs" else None)
    assert summary.num_reused == 1
    (reused,) = [row for row in tables_of(folder / "theirs")["results"] if row["reused_from"]]
    assert reused["source_row"] == 1


def test_an_unfinished_or_cleaned_run_cannot_be_reused(
    folder: Path, yesterday: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=re.escape(str(tmp_path))):
        prepare_reuse(str(tmp_path))
    shutil.copytree(yesterday, tmp_path / "cleaned")
    shutil.rmtree(tmp_path / "cleaned" / "_moebeam" / "plan")
    with pytest.raises(OutputError, match="it was cleaned"):
        prepare_reuse(str(tmp_path / "cleaned"))
    shutil.copytree(yesterday, tmp_path / "unfinished")
    manifest = tmp_path / "unfinished" / "manifest.json"
    content = unseal_json(manifest.read_bytes()).replace(b'"complete"', b'"incomplete"', 1)
    manifest.write_bytes(seal_json(content))
    with pytest.raises(OutputError, match="expected a finished run"):
        prepare_reuse(str(tmp_path / "unfinished"))


def test_the_command_takes_an_output(
    folder: Path, yesterday: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_parquet(folder / "command.parquet", {"id": ["a"], "text": YESTERDAY[:1]})
    job_file = folder / "job.toml"
    job_file.write_text(
        f"""
        input = {{ path = {json.dumps(str(source))}, id_column = "id" }}
        prompt = {{ template = {json.dumps(TEMPLATE)} }}
        output = {{ path = "by-command" }}
        sampling = {{ max_tokens = 64 }}
        [model]
        engine = "fake"
        name = "tiny"
        path = {json.dumps(str(tiny_checkpoint))}
        script = {json.dumps(str(folder / "script.json"))}
        """
    )
    command = ["run", str(job_file), "--quiet", "--json", "--reuse"]
    assert run_command([*command, str(folder / "nothing here")]) == 2
    assert "nothing here" in capsys.readouterr().err
    assert run_command([*command, str(yesterday)]) == 0
    assert json.loads(capsys.readouterr().out)["num_reused"] == 1
