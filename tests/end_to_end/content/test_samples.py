"""Several answers a row: drawn each for itself, prefilled once, and told as answers of one row by everything."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from moebeam.jobs.check.reuse import prepare_reuse
from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.notebook.run_job import run_job
from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.run.launch import launch, resume
from tests.support.disturbances.disturbed_runs import MEASURED
from tests.support.jobs.jobs_for_tests import (
    column,
    fake_job,
    priced,
    run_fake_job,
    write_job_file,
    write_parquet,
    write_script,
)

TEXTS = ["same", "same", "other text", None, "twice"]
HOT: dict[str, Any] = {"temperature": 2.0, "n": 3, "max_tokens": 8, "logprobs": True}
TINY = {"engine": "torch", "device": "cpu"}


def read(output: Path, table: str) -> list[dict[str, Any]]:
    order = [(name, "ascending") for name in ("source_row", "sample")]
    return pq.read_table(output / table).sort_by(order).to_pylist()


def manifest_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "manifest.json").read_text())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Three answers of the tiny model for each of five rows, one of which cannot be asked, and whose ids repeat."""
    folder = tmp_path_factory.mktemp("samples")
    write_parquet(folder / "in.parquet", {"text": TEXTS, "id": ["a", "b", "c", "d", "a"]})
    return folder


@pytest.fixture(scope="module")
def seeded(drawn: Path, tiny_checkpoint: Path) -> Path:
    prices = priced(drawn) | {"provider": "fake"}
    sections = {"input": {"id_column": "id"}, "model": TINY, "sampling": HOT | {"seed": 7}, "accounting": prices}
    run_fake_job(drawn / "in.parquet", drawn / "seeded", tiny_checkpoint, **sections)
    return drawn / "seeded"


def test_each_sample_is_a_result_of_its_own_and_a_prompt_is_computed_once(seeded: Path) -> None:
    rows = read(seeded, "results")
    assert [(row["custom_id"], row["sample"]) for row in rows] == [(name, k) for name in "abc" for k in range(3)]
    assert len({row["output_text"] for row in rows}) == 9, "equal prompts and equal rows draw apart"
    assert column(rows, "merged_into") == [None] * 9
    by_prompt = {text: [row for row in rows if TEXTS[row["source_row"]] == text] for text in ("same", "other text")}
    computed = {text: sum(row["computed_tokens"] for row in found) for text, found in by_prompt.items()}
    lengths = {text: found[0]["prompt_tokens"] for text, found in by_prompt.items()}
    counted = manifest_of(seeded)["engine"]["num_computed_prefill_tokens"]
    assert computed["same"] + computed["other text"] == counted < sum(lengths.values())
    rejects = read(seeded, "rejects")
    assert [(row["custom_id"], row["sample"], row["error_type"]) for row in rejects] == [
        ("d", 0, "null_value"),
        ("a", 0, "duplicate_id"),
    ]
    ledger = read(seeded, "ledger")
    assert [(line["custom_id"], line["sample"]) for line in ledger] == [(r["custom_id"], r["sample"]) for r in rows]
    manifest = manifest_of(seeded)
    assert (manifest["rows_in"], manifest["answers_in"], manifest["tables_version"]) == (5, 11, 6)
    assert manifest["totals"]["num_further_samples"] == 6
    assert manifest["checks"]["ledger_and_engine"] == "equal"


def test_a_seed_repeats_answers_in_any_shards(drawn: Path, tiny_checkpoint: Path, seeded: Path) -> None:
    sections: dict[str, Any] = {"input": {"id_column": "id"}, "model": TINY, "sampling": HOT | {"seed": 7}}
    launch(fake_job(drawn / "in.parquet", drawn / "cut", tiny_checkpoint, **sections, plan={"max_shard_rows": 1}))
    assert len(list((drawn / "cut" / "results").iterdir())) == 3, "samples of a row are never cut apart"
    assert column(read(drawn / "cut", "results"), "output_text") == column(read(seeded, "results"), "output_text")


def test_without_a_seed_a_resumed_run_goes_on_as_it_began_and_another_differs(
    drawn: Path, tiny_checkpoint: Path
) -> None:
    sections: dict[str, Any] = {"input": {"id_column": "id"}, "model": TINY, "sampling": HOT}
    stopped, whole, other = (drawn / name for name in ("stopped", "whole", "other"))
    job = fake_job(drawn / "in.parquet", stopped, tiny_checkpoint, **sections)
    limited = job.model_copy(update={"limits": job.limits.model_copy(update={"max_requests": 4})})
    assert launch(limited).exit_code == 4
    begun = json.loads((stopped / "_moebeam" / "job.json").read_text())
    assert resume(read_record(str(stopped)), job).status == "succeeded"
    # The same run without a stop: its key is all that a run without a seed has of its own.
    (whole / "_moebeam").mkdir(parents=True)
    (whole / "_moebeam" / "job.json").write_text(json.dumps(begun))
    for output in (whole, other):
        launch(fake_job(drawn / "in.parquet", output, tiny_checkpoint, **sections))
    # The second attempt computes a shared prefix again, see `transforms/answer/journal.py`; log probabilities follow
    # the shape of a step in their last digits.
    left_out = {*MEASURED, "cached_tokens", "computed_tokens", "logprobs"}
    tables = [
        [{name: value for name, value in row.items() if name not in left_out} for row in read(output, "results")]
        for output in (stopped, whole)
    ]
    assert tables[0] == tables[1]
    texts = [{row["output_text"] for row in read(output, "results")} for output in (whole, other)]
    assert len(texts[0]) == len(texts[1]) == 9
    assert not texts[0] & texts[1]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Four samples of each of three rows, of which two samples of one row fail."""
    folder = tmp_path_factory.mktemp("scripted")
    rules = [{"contains": "bad", "sample": k, "failure": "engine_failed", "message": "broke"} for k in (1, 3)]
    rules += [{"contains": "Classify", "sample": k, "text": "x" * (k + 1)} for k in range(4)]
    script = write_script(folder / "script.json", {"rules": rules})
    source = write_parquet(folder / "in.parquet", {"text": ["good", "bad", "fine"]})
    sampling = {"temperature": 1.0, "n": 4, "max_tokens": 8}
    job = fake_job(
        source,
        folder / "out",
        tiny_checkpoint,
        model={"script": str(script)},
        sampling=sampling,
        accounting=priced(folder),
        output={"max_reject_share": 0.2},
    )
    summary = launch(job)
    assert (summary.rows_in, summary.answers_in, summary.num_results, summary.num_rejects) == (3, 12, 10, 2)
    assert summary.exit_code == 0, "two of twelve answers are within 0.2"
    return folder


def told(capsys: pytest.CaptureFixture[str], *command: str, code: int = 0) -> Any:
    assert run_command([*command, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_quote_multiplies_answers_and_shares_prompts(
    scripted: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {
        "sampling": {"temperature": 1.0, "max_tokens": 8, "n": 4},
        "accounting": {"price_book": str(scripted / "prices.csv")},
    }
    job = fake_job(scripted / "in.parquet", tmp_path / "out", tiny_checkpoint, **sections)
    job_file = write_job_file(job, tmp_path / "job.toml")
    quote = told(capsys, "estimate", str(job_file))
    one = told(capsys, "estimate", str(job_file), "--set", "sampling.n=1")
    sampled = told(capsys, "estimate", str(job_file), "--sample", "2")
    assert (quote["num_rows"], quote["requests"]["expected"]) == (3, 12)
    assert quote["tree_tokens"] == one["tree_tokens"]
    assert quote["prompt_tokens"]["expected"] == 4 * one["prompt_tokens"]["expected"]
    assert quote["max_output_tokens"]["expected"] == 4 * one["max_output_tokens"]["expected"] == 96
    assert sampled["requests"] == {"low": 8, "expected": 12, "high": 12}
    assert sampled["tree_tokens"]["expected"] >= quote["tree_tokens"]["expected"] * 0.9
    totals = manifest_of(scripted / "out")["totals"]
    assert totals["prompt_tokens"] == quote["prompt_tokens"]["expected"]
    assert totals["prompt_tokens"] - totals["cached_tokens"] == quote["tree_tokens"]["expected"]


def test_only_the_samples_that_failed_are_retried(scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("retry-failed", str(scripted / "out"), "--kinds", "engine_failed", "--output", str(scripted / "retry"))
    refused = told(capsys, *command, "--set", "sampling.n=2", code=2)
    assert "sampling.n" in refused["error"]
    summary = told(capsys, *command, code=3)
    assert (summary["rows_in"], summary["answers_in"], summary["num_rejects"]) == (1, 2, 2)
    assert [(row["custom_id"], row["sample"]) for row in read(scripted / "retry", "rejects")] == [
        ("in.parquet:1", 1),
        ("in.parquet:1", 3),
    ]


def test_another_run_takes_samples_over_by_their_number(scripted: Path, tiny_checkpoint: Path) -> None:
    record = read_record(str(scripted / "out"))
    job = record.request.job
    more = job.model_copy(
        update={
            "output": job.output.model_copy(update={"path": str(scripted / "more")}),
            "sampling": job.sampling.model_copy(update={"n": 5}),
        }
    )
    summary = launch(more, reuse=prepare_reuse(str(scripted / "out")))
    assert (summary.num_results, summary.num_reused) == (13, 10)
    before = {(row["custom_id"], row["sample"]): row["output_text"] for row in read(scripted / "out", "results")}
    for row in read(scripted / "more", "results"):
        assert (row["reused_from"] is not None) == ((row["custom_id"], row["sample"]) in before)
        if row["reused_from"] is not None:
            assert row["output_text"] == before[row["custom_id"], row["sample"]]


def test_views_pick_the_likeliest_sample_of_each_row(seeded: Path) -> None:
    with duckdb.connect() as database:
        database.execute(f"SET VARIABLE moebeam_run = '{seeded}'")
        database.execute((seeded / "views.sql").read_text())
        best = database.sql("SELECT custom_id, sample FROM best_samples ORDER BY 1").fetchall()
        assert database.sql("SELECT count(*) FROM broken_invariants").fetchall() == [(0,)]
    means = {
        (row["custom_id"], row["sample"]): sum(row["logprobs"]) / len(row["logprobs"])
        for row in read(seeded, "results")
    }
    assert best == [max((key for key in means if key[0] == name), key=means.__getitem__) for name in "abc"]


def test_greedy_samples_are_answered_once_and_a_frame_has_a_row_an_answer(tiny_checkpoint: Path) -> None:
    import pandas as pd

    data = pd.DataFrame({"text": ["one", "two"]}, index=["x", "y"])
    job = {
        "prompt": {"template": "{{ text }}"},
        "model": {"engine": "fake", "path": str(tiny_checkpoint), "name": "tiny"},
        "sampling": {"n": 3, "max_tokens": 64},
    }
    answers = run_job(job, data, progress=False)
    assert list(answers.index) == ["x"] * 3 + ["y"] * 3
    assert list(answers["sample"]) == [0, 1, 2] * 2
    assert answers["merged_into"].notna().tolist() == [False, True, True] * 2
    assert answers["attempts"].sum() == 2
    assert answers.groupby("custom_id")["output_text"].nunique().tolist() == [1, 1]


def test_costs_of_samples_add_up(scripted: Path) -> None:
    rows, ledger = (
        read(scripted / "out", "results") + read(scripted / "out", "rejects"),
        read(scripted / "out", "ledger"),
    )
    assert sum((row["cost"] for row in rows), Decimal(0)) == sum((line["cost"] for line in ledger), Decimal(0)) > 0
    assert sum(row["cost_allocated"] for row in rows) == sum(line["cost"] for line in ledger)
