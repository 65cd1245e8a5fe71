"""`moebeam estimate`: what it promises before a run is held against what the run then takes."""

import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.commands.prices_command import parse_instant
from moebeam.jobs.console.summary import RunSummary
from moebeam.jobs.quotes.earlier_run import read_earlier_run
from moebeam.jobs.quotes.quote_job import Quote, QuoteTerms, quote_job
from moebeam.jobs.quotes.quote_record import compare_quote_with_run, save_quote
from moebeam.jobs.run.launch import launch
from moebeam.schemas.errors import JobFileError, OutputError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.quote import prompt_survey
from tests.support.jobs.jobs_for_tests import fake_job, priced, write_parquet, write_script

TEXTS = [f"the printer on floor {number % 7} is broken, ticket {number * number}" for number in range(60)]


def quote_of(job: Job, **terms: Any) -> Quote:
    return quote_job(job, QuoteTerms(at=parse_instant("2026-11-24T00:00:00Z"), **terms))[0]


def job_of(folder: Path, checkpoint: Path, texts: list[str], name: str = "out", **sections: Any) -> Job:
    source = write_parquet(folder / f"in-{name}" / "tickets.parquet", {"text": texts})
    return fake_job(source, folder / name, checkpoint, accounting=priced(folder), **sections)


def bounds_hold(quote: Quote, summary: RunSummary) -> bool:
    cost = quote.own.cost
    assert cost is not None
    assert cost.high is not None
    assert summary.cost is not None
    return cost.low <= summary.cost <= cost.high


def test_the_quote_of_a_finished_job_is_within_three_percent(tmp_path: Path, tiny_checkpoint: Path) -> None:
    first = launch(job_of(tmp_path, tiny_checkpoint, TEXTS, "first"))
    assert first.cost is not None
    like = read_earlier_run(str(tmp_path / "first"))
    more = [text.replace("printer", "copier") for text in TEXTS] + TEXTS[:30]
    job = job_of(tmp_path, tiny_checkpoint, more, "second")
    quote = quote_of(job, like=like)
    second = launch(job)
    assert second.cost is not None
    assert quote.own.cost is not None
    assert abs(quote.own.cost.expected / second.cost - 1) <= Decimal("0.03")
    assert bounds_hold(quote, second)


def test_a_quote_with_repairs_takes_them_from_the_earlier_run(tmp_path: Path, tiny_checkpoint: Path) -> None:
    script = write_script(
        tmp_path / "script.json", {"rules": [{"attempt": 1, "contains": "floor 3", "text": "no JSON"}]}
    )
    (tmp_path / "schema.json").write_text(json.dumps({"type": "object"}))
    job = job_of(tmp_path, tiny_checkpoint, TEXTS, "repaired", model={"script": str(script)})
    job = job.model_copy(update={"output": job.output.model_copy(update={"schema_": str(tmp_path / "schema.json")})})
    summary = launch(job)
    quote = quote_of(job, like=read_earlier_run(str(tmp_path / "repaired")))
    assert summary.cost is not None
    assert quote.own.cost is not None
    assert abs(quote.own.cost.expected / summary.cost - 1) <= Decimal("0.03")
    assert bounds_hold(quote, summary)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("ab ", max_size=12), min_size=1, max_size=12),
    max_tokens=st.integers(1, 64),
    merge=st.sampled_from(["auto", "never"]),
)
@pytest.mark.integration
def test_what_a_run_costs_lies_within_the_bounds_of_its_quote(
    texts: list[str], max_tokens: int, merge: str, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("quoted")
    job = job_of(folder, tiny_checkpoint, texts, sampling={"max_tokens": max_tokens}, plan={"merge": merge})
    quote = quote_of(job)
    assert bounds_hold(quote, launch(job))


def test_the_plan_of_the_run_is_what_was_quoted(tmp_path: Path, tiny_checkpoint: Path) -> None:
    texts = [*TEXTS, *TEXTS[:5]]
    job = job_of(tmp_path, tiny_checkpoint, texts)
    quote = quote_of(job)
    launch(job)
    plan = json.loads((tmp_path / "out" / "_moebeam" / "plan" / "plan.json").read_text())["shards"]
    assert quote.tokens.requests.expected == sum(shard["num_requests"] for shard in plan) == len(TEXTS)
    assert quote.tokens.merged_rows.expected == 5
    assert quote.tokens.prompt_tokens.expected == sum(shard["num_prompt_tokens"] for shard in plan)
    assert quote.tokens.tree_tokens.expected == sum(shard["num_tree_tokens"] for shard in plan)


def test_rows_that_would_be_rejected_are_not_quoted(tmp_path: Path, tiny_checkpoint: Path) -> None:
    texts = ["fine", "x" * 600, None]
    quote = quote_of(job_of(tmp_path, tiny_checkpoint, texts))  # type: ignore[arg-type]
    assert dict(quote.survey.rejects) == {"context_overflow": 1, "null_value": 1}
    assert quote.tokens.requests.expected == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sample_is_a_fixed_draw_with_bounds_around_the_whole(
    seed: int, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fingerprint holds the file's time, and bounds hold for almost all draws only.
    monkeypatch.setattr(prompt_survey, "random", SimpleNamespace(Random=lambda _: Random(seed)))
    job = job_of(tmp_path, tiny_checkpoint, TEXTS)
    whole, sample = quote_of(job), quote_of(job, num_sample_rows=20)
    assert sample.survey.num_surveyed_rows == 20
    assert sample.to_json() == quote_of(job, num_sample_rows=20).to_json()
    for name in ("prompt_tokens", "tree_tokens", "requests"):
        found = getattr(sample.tokens, name)
        assert found.low <= getattr(whole.tokens, name).expected <= found.high


def test_a_saved_quote_stands_beside_what_the_run_took(tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = job_of(tmp_path, tiny_checkpoint, TEXTS)
    quote, identity = quote_job(job, QuoteTerms(at=parse_instant(None)))
    save_quote(quote, identity)
    summary = launch(job)
    figures = {figure.name: figure for figure in compare_quote_with_run(RunLayout(job.output.path))}
    assert figures["cost"].actual == summary.cost
    assert figures["cost"].is_within is True
    assert figures["prompt tokens"].relative_error == 0
    assert figures["rows"].expected == figures["rows"].actual == len(TEXTS)


def test_without_a_quote_the_plan_stands_beside_the_run(tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = job_of(tmp_path, tiny_checkpoint, TEXTS)
    launch(job)
    figures = {figure.name: figure for figure in compare_quote_with_run(RunLayout(job.output.path))}
    assert set(figures) == {"prompt tokens", "cache hits"}
    assert figures["cache hits"].relative_error == 0
    assert figures["cache hits"].is_within is None


def test_a_quote_is_not_saved_into_another_jobs_output(tmp_path: Path, tiny_checkpoint: Path) -> None:
    launch(job_of(tmp_path, tiny_checkpoint, TEXTS))
    other = job_of(tmp_path, tiny_checkpoint, TEXTS, sampling={"max_tokens": 3})
    quote, identity = quote_job(other, QuoteTerms(at=parse_instant(None)))
    with pytest.raises(OutputError, match="belongs to another job"):
        save_quote(quote, identity)


def test_an_unknown_provider_and_a_folder_without_a_run_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = job_of(tmp_path, tiny_checkpoint, TEXTS)
    with pytest.raises(JobFileError, match=r"--provider: expected one of fake, .* found 'nobody'"):
        quote_of(job, providers=("nobody",))
    with pytest.raises(OutputError, match=r"--like .*: expected the output of a finished run"):
        read_earlier_run(str(tmp_path / "nowhere"))


def test_a_model_without_a_price_is_quoted_in_tokens(tmp_path: Path, tiny_checkpoint: Path) -> None:
    quote = quote_of(job_of(tmp_path, tiny_checkpoint, TEXTS), model="other")
    assert quote.own.cost is None
    assert "has no price of 'other'" in " ".join(quote.notes)


JOB_FILE = """
[input]
path = "tickets.parquet"
[prompt]
template = "Classify this ticket: {{{{ text }}}}"
[output]
path = "out"
[model]
engine = "torch"
path = "{checkpoint}"
name = "deepseek-v4-flash"
"""


@pytest.fixture
def job_file(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    write_parquet(tmp_path / "tickets.parquet", {"text": TEXTS})
    path = tmp_path / "job.toml"
    path.write_text(JOB_FILE.format(checkpoint=tiny_checkpoint) + "[sampling]\nmax_tokens = 32\n")
    return path


def test_the_command_needs_neither_beam_nor_torch(job_file: Path) -> None:
    program = (
        "import sys; from moebeam.jobs.commands.cli import run_command; "
        f"code = run_command(['estimate', {str(job_file)!r}, '--json']); "
        "print([name for name in ('apache_beam', 'torch', 'transformers') if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    quote, loaded = done.stdout.splitlines()
    assert loaded == "[] 0"
    assert json.loads(quote)["num_rows"] == len(TEXTS)


def test_the_command_names_the_cheapest_start(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--at", "2026-11-24T02:00:00Z", "--deadline", "2026-11-24T05:00:00Z", "--provider", "deepseek"]
    assert run_command(["estimate", str(job_file), *args, "--output-tokens", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["provider"] == "deepseek"
    assert found["plan"]["start"] == "2026-11-24T04:00:00+00:00"
    (deepseek,) = [offer for offer in found["offers"] if offer["provider"] == "deepseek"]
    hours = {hour["at"][11:13]: Decimal(hour["cost"]) for hour in deepseek["hours"]}
    assert hours["02"] == 2 * hours["04"]
    assert deepseek["cache_rule"] == "stored_units"


def test_all_offers_stand_in_one_table_the_cheapest_first(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["estimate", str(job_file), "--at", "2026-11-24T02:00:00Z", "--output-tokens", "5"]) == 0
    lines = capsys.readouterr().err.splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("offer ")]
    table = []
    for line in lines[head + 1 :]:
        cells = line.split("  ")
        if "%" not in line:
            break
        table.append([cell.strip() for cell in cells if cell.strip()])
    dollars = [Decimal(cells[1]) for cells in table if "USD" in cells]
    assert len(dollars) > 3
    assert dollars == sorted(dollars)
    names = [cells[0] for cells in table]
    assert sum(name.endswith("(this job)") for name in names) == 1
    assert [name for name in names if name.startswith("volcano")] == names[len(dollars) : len(dollars) + 2]
    assert any("not compared for want of a rate" in line and "CNY" in line for line in lines)


def test_an_offer_is_named_by_any_name_of_its_provider(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["estimate", str(job_file), "--at", "2026-11-24T02:00:00Z", "--json"]
    assert run_command([*args, "--provider", "alibaba-bailian"]) == 0
    found = json.loads(capsys.readouterr().out)["offers"][1:]
    assert [(offer["provider"], offer["mode"]) for offer in found] == [("alibaba", "online"), ("alibaba", "batch")]
    assert run_command([*args, "--provider", "alibabba"]) == 2
    assert "did you mean 'alibaba'?" in capsys.readouterr().out


def test_the_command_talks_to_people_and_refuses_wrong_deadlines(
    job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["estimate", str(job_file), "--sample", "10", "--at", "2026-11-24T00:00:00Z"]) == 0
    told = capsys.readouterr().err
    assert "a quote; no model was asked" in told
    assert "probability" in told
    late = ["--at", "2026-11-24T00:00:00Z", "--deadline", "2026-11-23T00:00:00Z"]
    assert run_command(["estimate", str(job_file), *late]) == 2
