"""The folder of locks and sockets: nobody else's, no link, closed to others."""

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moebeam.model_runner import host_folder as module
from moebeam.model_runner.host_folder import check_own_socket, host_folder, make_private_folder


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="h") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def test_it_is_made_for_its_user_alone(place: Path) -> None:
    folder = host_folder()
    assert folder.parent == place and folder.stat().st_mode & 0o777 == 0o700
    assert host_folder() == folder


def test_a_link_is_refused(place: Path) -> None:
    host_folder().rename(place / "elsewhere")
    (place / f"moebeam-{module.os.getuid()}").symlink_to(place / "elsewhere")
    with pytest.raises(PermissionError, match=r"expected a folder of user .* found lrwx.* set TMPDIR"):
        host_folder()


def test_one_that_others_may_enter_is_refused(place: Path) -> None:
    host_folder().chmod(0o750)
    with pytest.raises(PermissionError, match=r"only its user may enter, found mode 0750; remove it"):
        host_folder()


def test_another_users_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = module.os.getuid() + 1
    host_folder().rename(place / f"moebeam-{other}")
    monkeypatch.setattr(module.os, "getuid", lambda: other)
    with pytest.raises(PermissionError, match="expected a folder of user"):
        host_folder()


def test_a_folder_of_an_older_version_is_closed(place: Path) -> None:
    (host_folder() / "engines").mkdir(mode=0o755)
    assert make_private_folder(host_folder() / "engines").stat().st_mode & 0o777 == 0o700


def test_only_a_socket_is_a_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "real"))
        check_own_socket(place / "real")
        (place / "link").symlink_to(place / "real")
        with pytest.raises(PermissionError, match="expected a socket of user"):
            check_own_socket(place / "link")
    with pytest.raises(FileNotFoundError):
        check_own_socket(place / "missing")
