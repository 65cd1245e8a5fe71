"""The engine that a job names, checked before the run."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.jobs.check.engine_config import EMBEDDED_NAME
from moebeam.jobs.check.job_file import read_job
from moebeam.jobs.check.preflight import check_job
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.errors import JobError, JobFileError
from moebeam.schemas.job.sections import Job
from tests.support.jobs.jobs_for_tests import fake_job, write_parquet


def test_a_check_reads_the_tokenizer_once(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = PromptEncoder.load

    def noted(path: str, encoding: str = "auto", max_model_len: int = 0) -> PromptEncoder:
        read.append(path)
        return real(path, encoding, max_model_len)

    monkeypatch.setattr(PromptEncoder, "load", noted)
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    check_job(fake_job(source, tmp_path / "out", tiny_checkpoint, model={"engine": "torch"}))
    assert read == [str(tiny_checkpoint)]


def job_with(tmp_path: Path, model: dict[str, Any]) -> Job:
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


def copy_of(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / "checkpoint"))


def set_value(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def drop_end_tokens(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        set_value(folder / name, "eos_token_id", None)
    set_value(folder / "tokenizer_config.json", "eos_token", None)
    set_value(folder / "tokenizer_config.json", "chat_template", "{{ messages[0].content }}")


def keep_old_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def name_a_missing_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')


UNLOADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a null size": (lambda folder: set_value(folder / "config.json", "hidden_size", None), "hidden_size: .*found null"),
    "no end token": (drop_end_tokens, "expected `eos_token_id`"),
    "no template": (lambda folder: set_value(folder / "tokenizer_config.json", "chat_template", None), "chat template"),
    "a broken template": (
        lambda folder: set_value(folder / "tokenizer_config.json", "chat_template", "{% for %}"),
        "tokenizer_config.json: .*chat template",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: expected a file"),
    "a missing file": (name_a_missing_file, "found 1 missing: model-00001.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "found neither"),
}


@pytest.mark.parametrize("engine", ["torch", "transformers", "vllm"])
@pytest.mark.parametrize("trouble", UNLOADABLE)
def test_what_no_engine_could_load_is_refused_before_the_run(
    trouble: str, engine: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    spoil, message = UNLOADABLE[trouble]
    folder = copy_of(tiny_checkpoint, tmp_path)
    spoil(folder)
    with pytest.raises(JobError, match=message):
        check_job(job_with(tmp_path, {"engine": engine, "path": str(folder)}))


def test_weights_of_an_older_format_are_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path)
    keep_old_weights(folder)
    with pytest.raises(JobError, match=r"pytorch_model\.bin, of an older format"):
        check_job(job_with(tmp_path, {"engine": "torch", "path": str(folder)}))


def test_the_job_may_set_the_context(tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = job_with(tmp_path, {"engine": "torch", "path": str(tiny_checkpoint), "max_model_len": 4096})
    encoder = check_job(job).engine.encoder
    assert pickle.loads(pickle.dumps(encoder)).context_length == encoder.context_length == 4096
