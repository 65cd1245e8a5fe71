"""`[model]` of remote engines in job files: fallbacks as tables, and messages that never show a key."""

from pathlib import Path

import pytest

from moebeam.jobs.check.job_file import load_job
from moebeam.jobs.output.run_record import find_secrets
from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.schemas.errors import JobFileError

KEY = "sk-0123456789abcdef"
HEAD = """\
[input]
path = "in.parquet"
[output]
path = "out"
[model]
engine = "openai"
provider = "deepseek"
name = "deepseek-v4-flash"
"""


def written(folder: Path, text: str) -> str:
    path = folder / "job.toml"
    path.write_text(HEAD + text)
    return str(path)


def test_fallbacks_are_tables_in_their_order(tmp_path: Path) -> None:
    text = """
[[model.fallbacks]]
provider = "alibaba"
name = "deepseek-v4"
[[model.fallbacks]]
provider = "vllm"
base_url = "http://127.0.0.1:8000/v1/"
"""
    job = load_job(written(tmp_path, text), ["model.max_concurrency=7"])
    assert job.model.fallbacks == (
        FallbackSection(provider="alibaba", name="deepseek-v4"),
        FallbackSection(provider="vllm", base_url="http://127.0.0.1:8000/v1"),
    )
    assert job.model.max_concurrency == 7


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (f'api_key = "{KEY}"', [], r"\[model\] api_key: unknown key; did you mean 'api_key_variable'"),
        (
            f'api_key_variable = "{KEY}"',
            [],
            r"\[model\] api_key_variable: expected the NAME of an environment variable",
        ),
        ("", [f"model.api_key_variable={KEY}"], r"--set model\.api_key_variable: expected the NAME"),
        (
            f'[[model.fallbacks]]\nprovider = "vllm"\napi_key = "{KEY}"',
            [],
            r"\[model\] fallbacks: 1\.api_key: unknown key",
        ),
        (
            f'[[model.fallbacks]]\nprovider = "vllm"\napi_key_variable = "{KEY}"',
            [],
            r"\[model\] fallbacks: expected the NAME of an environment variable",
        ),
        ("[[model.fallbacks]]\nname = 'm'", [], r"\[model\] fallbacks: 1\.provider: missing"),
        (f'base_url = "https://user:{KEY}@host/v1"', [], r"\[model\] base_url: expected an address without user"),
        (f'base_url = "https://host/v1?token={KEY}"', [], r"\[model\] base_url: expected an address without user"),
    ],
)
def test_a_key_in_a_job_file_is_refused_and_not_shown(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(JobFileError, match=message) as caught:
        load_job(written(tmp_path, text), overrides)
    assert KEY not in str(caught.value)


def test_credentials_are_looked_for_in_every_table(tmp_path: Path) -> None:
    job = load_job(written(tmp_path, '[[model.fallbacks]]\nprovider = "vllm"'))
    fallback = job.model.fallbacks[0].model_copy(update={"base_url": f"https://user:{KEY}@host"})
    changed = job.model_copy(update={"model": job.model.model_copy(update={"fallbacks": (fallback,)})})
    (problem,) = find_secrets(changed)
    assert str(problem).startswith("[model] fallbacks.1.base_url: holds credentials")
    assert KEY not in str(problem)
