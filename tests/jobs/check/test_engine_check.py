"""The engine that a job names, checked before the run."""

from pathlib import Path

import pytest

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.jobs.check.engine_config import EMBEDDED_NAME
from moebeam.jobs.check.job_file import read_job
from moebeam.jobs.check.preflight import check_job
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job
from tests.support.jobs_for_tests import fake_job, write_parquet


def test_a_check_reads_the_tokenizer_once(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = PromptEncoder.load

    def noted(path: str, encoding: str = "auto") -> PromptEncoder:
        read.append(path)
        return real(path, encoding)

    monkeypatch.setattr(PromptEncoder, "load", noted)
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    check_job(fake_job(source, tmp_path / "out", tiny_checkpoint, model={"engine": "torch"}))
    assert read == [str(tiny_checkpoint)]


def job_with(tmp_path: Path, model: dict[str, str]) -> Job:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    values = {"input": {"path": str(source)}, "prompt": {"template": "{{ text }}"}, "output": {"path": "out"}}
    return read_job({**values, **({"model": model} if model else {})})


@pytest.mark.parametrize("engine", [{}, {"engine": "torch"}])
def test_a_job_that_names_no_model_is_told_what_to_write(tmp_path: Path, engine: dict[str, str]) -> None:
    told = r'\[model\]: missing; write which model answers, such as engine = "openai", .*name = "moebeam-tickets-v4"'
    with pytest.raises(JobFileError, match=told):
        check_job(job_with(tmp_path, engine))


@pytest.mark.parametrize("engine", ["torch", "transformers", "vllm"])
def test_a_model_without_a_checkpoint_is_not_answered_by_the_demos(tmp_path: Path, engine: str) -> None:
    with pytest.raises(JobFileError, match=rf"\[model\] path: missing; engine '{engine}' needs a checkpoint's folder"):
        check_job(job_with(tmp_path, {"engine": engine, "name": "my-model"}))


def test_the_demos_model_answers_where_it_is_named(tmp_path: Path) -> None:
    checked = check_job(job_with(tmp_path, {"engine": "torch", "name": EMBEDDED_NAME}))
    assert (checked.engine.config.path, checked.engine.config.name) == (str(CHECKPOINT_PATH), EMBEDDED_NAME)


def test_a_dry_run_needs_no_checkpoint(tmp_path: Path) -> None:
    assert check_job(job_with(tmp_path, {"engine": "fake"})).engine.config.path == str(CHECKPOINT_PATH)
