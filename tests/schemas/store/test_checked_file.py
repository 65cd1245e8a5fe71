"""Files held against a digest from elsewhere, on disk and in a store, before anybody reads them."""

import hashlib
from pathlib import Path

import fsspec
import pytest

from moebeam.schemas.errors import FileDamaged
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import open_checked, read_checked

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=["disk", "store"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "results" / "part") if request.param == "disk" else "memory://checked/results/part"


def test_a_whole_file_is_read_at_random(path: str) -> None:
    storage.write_whole(path, CONTENT)
    assert read_checked(path, DIGEST) == CONTENT
    with open_checked(path, DIGEST) as source:
        assert source.seek(0, 2) == len(CONTENT)
        source.seek(1000)
        assert source.read(10) == CONTENT[1000:1010]


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT + b"x", CONTENT[:99] + b"x" + CONTENT[100:]])
def test_any_other_content_is_refused_by_name(path: str, damage: bytes) -> None:
    storage.write_whole(path, damage)
    for read in (read_checked, open_checked):
        with pytest.raises(FileDamaged, match=r"results/part: is damaged: expected content with SHA-256 .*repair "):
            read(path, DIGEST)


def test_a_missing_file_is_not_a_damaged_one(path: str) -> None:
    with pytest.raises(FileNotFoundError):
        open_checked(f"{path}-missing", DIGEST)


def test_a_store_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "memory://checked/once"
    storage.write_whole(path, CONTENT)
    opened: list[str] = []
    memory = fsspec.filesystem("memory")
    real = type(memory).open
    monkeypatch.setattr(
        type(memory), "open", lambda self, name, *a, **k: (opened.append(name), real(self, name, *a, **k))[1]
    )
    with open_checked(path, DIGEST) as source:
        assert source.read() == CONTENT
    assert len(opened) == 1
