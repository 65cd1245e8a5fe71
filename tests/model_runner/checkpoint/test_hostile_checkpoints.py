"""Checkpoints that lie about themselves or never end are refused by their file's name, before they are used."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.checkpoint import files
from moebeam.model_runner.checkpoint.fenced_tokenizer import try_tokenizer
from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision, read_json_object
from moebeam.model_runner.checkpoint.model_config import read_model_config
from moebeam.model_runner.checkpoint.weight_files import list_stored_tensors
from moebeam.schemas.errors import EngineLoadError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(CHECKPOINT_PATH, tmp_path / "checkpoint")


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    edit(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("key", "value", "most"),
    [("num_hidden_layers", 10**9, "10,000"), ("vocab_size", 10**12, "2,147,483,647"), ("unknown", -(10**40), "2,147")],
)
def test_absurd_sizes_are_refused_by_name(checkpoint: Path, key: str, value: int, most: str) -> None:
    change(checkpoint / "config.json", lambda document: document.update({key: value}))
    with pytest.raises(EngineLoadError, match=rf"config\.json: {key}: expected at most {most}"):
        read_model_config(str(checkpoint))


def test_files_larger_than_any_of_their_kind_are_not_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 1 << 20)
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to("/dev/zero")
    with pytest.raises(EngineLoadError, match=r"config\.json: expected at most 1 MiB, found more"):
        read_json_object(str(checkpoint), "config.json")
    assert compute_checkpoint_revision(str(checkpoint))


def test_json_in_endless_levels_is_refused(checkpoint: Path) -> None:
    deep = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    (checkpoint / "config.json").write_bytes(deep)
    with pytest.raises(EngineLoadError, match=r"config\.json: expected JSON"):
        read_json_object(str(checkpoint), "config.json")
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(EngineLoadError, match="expected a whole safetensors file"):
        list_stored_tensors(str(checkpoint))


@pytest.mark.parametrize("shape", [[10**9, 10**9], [-1, -1], [1]])
def test_a_header_whose_shape_is_not_that_of_its_bytes_is_refused(checkpoint: Path, shape: list[int]) -> None:
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = shape
    written = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])
    with pytest.raises(EngineLoadError, match=rf"{name}: expected \w+ of shape"):
        list_stored_tensors(str(checkpoint))


def test_a_tokenizer_is_tried_behind_the_fence(checkpoint: Path) -> None:
    try_tokenizer(str(checkpoint))
    grown = {"type": "Replace", "pattern": {"Regex": "a"}, "content": "b" * 1_000_000}
    change(checkpoint / "tokenizer.json", lambda document: document.update(normalizer=grown))
    with pytest.raises(EngineLoadError, match=r"tokenizer\.json: expected at most 1536 MiB of memory to read it"):
        try_tokenizer(str(checkpoint))
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineLoadError, match=r"tokenizer\.json: expected a Hugging Face"):
        try_tokenizer(str(checkpoint))
