"""Where tensors are: what the index says, and errors that name what is not there."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moebeam.model_runner.checkpoint.weight_files import (
    check_weight_files,
    list_stored_tensors,
    refuse_overlaid_file,
)
from moebeam.schemas.errors import EngineLoadError

ONE = np.zeros((2, 3), dtype=np.float32)


def write_files(folder: Path, files: Mapping[str, list[str]], index: Mapping[str, str] | None = None) -> str:
    for file, names in files.items():
        save_file(dict.fromkeys(names, ONE), folder / file)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return str(folder)


def where(path: str) -> dict[str, str]:
    return {tensor.name: Path(tensor.file).name for tensor in list_stored_tensors(path)}


def test_headers_tell_names_shapes_and_dtypes(tmp_path: Path) -> None:
    (tensor,) = list_stored_tensors(write_files(tmp_path, {"model.safetensors": ["a"]}))
    assert (tensor.name, tensor.dtype, tensor.shape) == ("a", "F32", (2, 3))


def test_the_index_is_the_authority_on_where_a_tensor_is(tmp_path: Path) -> None:
    files = {"one.safetensors": ["a", "b", "stale"], "overlay.safetensors": ["b"]}
    index = {"a": "one.safetensors", "b": "overlay.safetensors"}
    assert where(write_files(tmp_path, files, index)) == index


def test_one_file_may_be_overlaid_too_but_not_for_transformers(tmp_path: Path) -> None:
    files = {"model.safetensors": ["a", "b"], "overlay.safetensors": ["b"]}
    index = {"a": "model.safetensors", "b": "overlay.safetensors"}
    path = write_files(tmp_path, files, index)
    assert where(path) == index
    with pytest.raises(EngineLoadError, match=r"index\.json: expected no model\.safetensors among the files"):
        refuse_overlaid_file(path)


def test_an_index_that_does_not_know_the_one_file_is_of_another_checkpoint(tmp_path: Path) -> None:
    path = write_files(tmp_path, {"model.safetensors": ["a"]}, {"a": "model-00001-of-00002.safetensors"})
    assert where(path) == {"a": "model.safetensors"}
    refuse_overlaid_file(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "gone.safetensors"}, r"index\.json: .*found 1 missing: gone\.safetensors"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, r"index\.json: .* found 1 not there: 'c' in one\.safe"),
        ({"a": "../one.safetensors"}, r"index\.json: weight_map\.a: .* found '\.\./one\.safetensors'"),
        ({"a": "one.bin"}, r"index\.json: weight_map\.a: .* found 'one\.bin'"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused_by_name(
    index: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineLoadError, match=message):
        list_stored_tensors(write_files(tmp_path, {"one.safetensors": ["a"]}, index))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
def test_weights_of_an_older_format_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(EngineLoadError, match=rf"found neither, but {re.escape(name)}, of an older format"):
        check_weight_files(str(tmp_path), takes_old_files=False)
    check_weight_files(str(tmp_path), takes_old_files=True)


def test_files_that_nothing_names_are_told(tmp_path: Path) -> None:
    path = write_files(tmp_path, {"model-00001-of-00001.safetensors": ["a"]})
    with pytest.raises(EngineLoadError, match=r"found neither, but model-00001-of-00001\.safetensors: write the index"):
        check_weight_files(path, takes_old_files=True)


@pytest.mark.parametrize("num_bytes", [0, 7, 40, -1])
def test_a_file_that_is_cut_short_is_named(num_bytes: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_files(tmp_path, {file.name: ["a"]})
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(EngineLoadError, match=rf"{re.escape(str(file))}: expected a whole safetensors file"):
        list_stored_tensors(str(tmp_path))
