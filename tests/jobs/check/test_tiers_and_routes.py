"""Service tiers, routes, providers' names and the shipped book, checked before the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.job_file import load_job, read_job
from moebeam.jobs.check.preflight import CheckedJob, check_job
from moebeam.jobs.prices.shipped import BUILTIN
from moebeam.schemas.canonical import fingerprint
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job
from tests.support.jobs.jobs_for_tests import fake_job, write_parquet

HEADER = (
    "provider,model,effective_from_utc,effective_to_utc,window_utc,mode,currency,cache_hit_per_mtok,"
    "cache_miss_per_mtok,output_per_mtok\n"
)
ORDINARY = "openai,m,2020-01-01T00:00:00Z,,,,USD,1,2,4\n"
FLEX = "openai,m,2020-01-01T00:00:00Z,,,flex,USD,0.5,1,2\n"


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "DEEPSEEK_API_KEY", "DASHSCOPE_API_KEY", "AZURE_OPENAI_API_KEY"):
        monkeypatch.setenv(name, "key")


def job_of(folder: Path, prices: str | None = HEADER + ORDINARY, **sections: Mapping[str, Any]) -> Job:
    if not (folder / "in.parquet").exists():
        write_parquet(folder / "in.parquet", {"text": ["a"]})
    values: dict[str, dict[str, Any]] = {
        "input": {"path": str(folder / "in.parquet")},
        "prompt": {"template": "{{ text }}"},
        "output": {"path": str(folder / "out")},
        "model": {"engine": "openai", "provider": "openai", "name": "m"},
    }
    if prices is not None:
        (folder / "prices.csv").write_text(prices)
        values["accounting"] = {"price_book": str(folder / "prices.csv")}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return read_job(values)


def checked(folder: Path, *prices: str | None, **sections: Mapping[str, Any]) -> CheckedJob:
    return check_job(job_of(folder, *prices, **sections))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"model": {"provider": "deepseek", "service_tier": "flex"}},
            r"\[model\] service_tier: the provider 'deepseek' cannot follow it, found 'flex'",
        ),
        (
            {"model": {"service_tier": "flex", "fallbacks": [{"provider": "deepseek"}]}},
            r"\[model\] fallbacks\.1 service_tier: the provider 'deepseek' cannot follow it",
        ),
        (
            {"model": {"service_tier": "flex", "mode": "batch"}},
            r"\[model\] service_tier: batches have a price of their own and no tiers, found 'flex'",
        ),
        ({"model": {"mode": "batch", "routes": [{"name": "b"}]}}, r"\[model\] routes: expected none in mode 'batch'"),
        (
            {"model": {"routes": [{"name": "b"}]}, "accounting": {"model": "m"}},
            r"\[accounting\] model: expected none beside \[\[model\.routes\]\]",
        ),
        (
            {"model": {"routes": [{"name": "b", "provider": "azure"}]}},
            r"\[model\] routes\.1 base_url: missing; provider 'azure' has no address of its own",
        ),
        (
            {"model": {"routes": [{"name": "b", "api_key_variable": "NOBODYS_KEY"}]}},
            r"\[model\] routes\.1: expected the key of provider 'openai' in the environment variable NOBODYS_KEY",
        ),
        (
            {"model": {"base_url": "https://h/v1?api-version=2024-10-21"}},
            r"\[model\] base_url: expected an address without query for provider 'openai'",
        ),
        ({"model": {"provider": "openia"}}, r"\[model\] provider: .*found 'openia'; did you mean 'openai'\?"),
    ],
)
def test_what_no_row_could_get_is_refused_before_the_run(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(JobFileError, match=words):
        checked(tmp_path, **sections)


@pytest.mark.parametrize(
    ("engine", "sampling", "words"),
    [
        ("torch", {"logprobs": True, "top_logprobs": 2}, r"\[sampling\] top_logprobs: the engine 'torch' cannot"),
        ("transformers", {"logprobs": True}, r"\[sampling\] logprobs: the engine 'transformers' cannot"),
    ],
)
def test_sampling_that_the_engine_cannot_follow_is_refused_before_the_run(
    tmp_path: Path, tiny_checkpoint: Path, engine: str, sampling: dict[str, Any], words: str
) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    with pytest.raises(JobFileError, match=words):
        check_job(fake_job(source, tmp_path / "out", tiny_checkpoint, model={"engine": engine}, sampling=sampling))


def test_a_tier_is_priced_by_the_books_line_of_its_mode(tmp_path: Path) -> None:
    found = checked(tmp_path, HEADER + ORDINARY + FLEX, model={"service_tier": "flex"})
    assert found.price_line is not None
    assert (found.price_line.mode, found.price_line.line_id) == ("flex", "3")
    assert not [warning for warning in found.warnings if "price" in warning]


def test_a_tier_without_a_price_is_a_warning_and_no_limit_of_cost(tmp_path: Path) -> None:
    found = checked(tmp_path, model={"service_tier": "flex"})
    assert found.currency == "USD"
    assert any(
        "no price of provider 'openai', model 'm', mode 'flex': such costs stay null" in w for w in found.warnings
    )
    with pytest.raises(JobFileError, match="model 'm', mode 'flex' that holds now, found none"):
        checked(tmp_path, model={"service_tier": "flex"}, limits={"max_cost": 1})


def test_a_route_without_a_price_is_a_warning(tmp_path: Path) -> None:
    priced = ORDINARY.replace(",m,", ",b,")
    found = checked(tmp_path, HEADER + ORDINARY + priced, model={"routes": [{"name": "b"}, {"name": "c"}]})
    assert [w for w in found.warnings if "no price" in w] == [
        f"{tmp_path}/prices.csv: no price of provider 'openai', model 'c': such costs stay null"
    ]


def test_a_price_that_is_missing_names_the_providers_that_have_one(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"provider 'deepseek', model 'm' .*the book has prices of openai"):
        checked(tmp_path, model={"provider": "deepseek"})


def test_what_a_provider_passes_over_is_told_before_the_run(tmp_path: Path) -> None:
    found = checked(tmp_path, sampling={"min_p": 0.1}, thinking={"mode": "enabled"})
    told = [warning for warning in found.warnings if "it is not sent" in warning]
    assert told == [
        "[sampling] min_p: the provider 'openai' cannot follow it, found 0.1: it is not sent",
        "[thinking] thinking: the provider 'openai' cannot follow it, found 'enabled': it is not sent",
    ]


def test_all_names_of_a_provider_are_one_job(tmp_path: Path) -> None:
    model = {"name": "deepseek-v4-flash"}
    first, other = (
        checked(tmp_path, None, model={**model, "provider": name}, accounting={"price_book": BUILTIN})
        for name in ("alibaba", "alibaba-bailian")
    )
    assert first.identity == other.identity
    assert first.price_line == other.price_line
    assert first.price_line is not None
    assert first.price_line.provider == "alibaba"


def test_the_word_for_the_shipped_book_is_no_path(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    (tmp_path / "job.toml").write_text(
        '[input]\npath = "in.parquet"\n[prompt]\ntemplate = "{{ text }}"\n[output]\npath = "out"\n'
        '[model]\nengine = "openai"\nprovider = "deepseek"\nname = "deepseek-v4-pro"\n'
        '[accounting]\nprice_book = "builtin"\n[[value_chain.parties]]\nname = "a"\nprice_book = "builtin"\n'
        '[[value_chain.parties]]\nname = "b"\n'
    )
    job = load_job(str(tmp_path / "job.toml"))
    assert job.accounting.price_book == job.value_chain.parties[0].price_book == "builtin"
    assert load_job(str(tmp_path / "job.toml"), ["accounting.price_book=builtin"]) == job
    assert load_job(str(tmp_path / "job.toml"), ["accounting.price_book=./builtin"]).accounting.price_book != "builtin"
    line = check_job(job).price_line
    assert line is not None
    assert line.provider == "deepseek"


def test_identities_of_older_runs_stay_as_they_were(tmp_path: Path) -> None:
    parts = checked(tmp_path).identity.parts
    older = {"max_tokens", "temperature", "top_p", "stop", "min_p", "logprobs", "seed"}
    sampling = job_of(tmp_path).sampling.model_dump(mode="json", include=older)
    assert parts["[sampling]"] == fingerprint(sampling)
    assert parts["[thinking] and [tools]"] == fingerprint({"options": "{}", "column": None})
    changed = checked(tmp_path, sampling={"presence_penalty": 0.5}, model={"service_tier": "flex"}).identity.parts
    assert {name for name in parts if parts[name] != changed[name]} == {"[sampling]", "[thinking] and [tools]"}


def test_routes_are_part_of_a_jobs_identity_and_their_addresses_are_not(tmp_path: Path) -> None:
    plain, routed, moved = (
        checked(tmp_path, model={"routes": routes}).identity.parts["[model]"]
        for routes in ([], [{"name": "b"}], [{"name": "b", "base_url": "http://elsewhere/v1"}])
    )
    assert plain != routed == moved
