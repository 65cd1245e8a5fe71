"""What a checkpoint's revision depends on, and what it does not."""

import shutil
import struct
from pathlib import Path

import pytest

from moebeam.model_runner.checkpoint import files as checkpoint
from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision
from moebeam.schemas.errors import EngineLoadError


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_revision_is_that_of_the_contents_not_of_the_place(tiny_checkpoint: Path, folder: Path) -> None:
    assert compute_checkpoint_revision(str(folder)) == compute_checkpoint_revision(str(tiny_checkpoint) + "/")
    assert len(compute_checkpoint_revision(str(folder))) == 64


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_one_changed_byte_changes_the_revision(folder: Path, name: str) -> None:
    before = compute_checkpoint_revision(str(folder))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert compute_checkpoint_revision(str(folder)) != before


def test_added_template_changes_the_revision_and_a_readme_does_not(folder: Path) -> None:
    before = compute_checkpoint_revision(str(folder))
    (folder / "README.md").write_text("x")
    assert compute_checkpoint_revision(str(folder)) == before
    (folder / "chat_template.jinja").write_text("x")
    assert compute_checkpoint_revision(str(folder)) != before


def test_large_weights_are_sampled_from_first_to_last_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_WHOLE_BYTES", 1000)
    monkeypatch.setattr(checkpoint, "NUM_BLOCK_BYTES", 16)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    (num_header_bytes,) = struct.unpack("<Q", content[:8])
    before = compute_checkpoint_revision(str(folder))

    def revision_with(position: int) -> str:
        changed = bytearray(content)
        changed[position] ^= 1
        weights.write_bytes(changed)
        return compute_checkpoint_revision(str(folder))

    assert revision_with(20) != before
    assert revision_with(8 + num_header_bytes) != before
    assert revision_with(len(content) - 1) != before
    assert revision_with(8 + num_header_bytes + 100) == before  # between two blocks: documented as unseen
    weights.write_bytes(content + b"\0")
    assert compute_checkpoint_revision(str(folder)) != before


def test_damaged_header_of_large_weights_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_WHOLE_BYTES", 1000)
    (folder / "model.safetensors").write_bytes(b"\xff" * 2000)
    with pytest.raises(EngineLoadError, match=r"model\.safetensors.*header"):
        compute_checkpoint_revision(str(folder))


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"config\.json"):
        compute_checkpoint_revision(str(tmp_path))
    with pytest.raises(EngineLoadError, match=r"config\.json"):
        compute_checkpoint_revision(str(tmp_path / "missing"))


def test_links_count_as_the_files_that_they_lead_to(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As the cache of a model hub lays its snapshots out."""
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in tiny_checkpoint.iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot / "original").symlink_to(tmp_path)
    assert compute_checkpoint_revision(str(snapshot)) == compute_checkpoint_revision(str(tiny_checkpoint))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(EngineLoadError, match=r"model\.safetensors: expected a readable file"):
        compute_checkpoint_revision(str(snapshot))
