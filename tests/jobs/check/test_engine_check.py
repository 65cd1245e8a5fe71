"""The engine that a job names, checked before the run."""

from pathlib import Path

import pytest

from moebeam.jobs.check.preflight import check_job
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
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
