"""The engine that a host shares listens to those who know its key; from others it unpickles nothing."""

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import pytest

from moebeam.model_runner.engine_process import host_runner
from moebeam.model_runner.engine_process.host_engine import HostEngine
from moebeam.model_runner.engine_process.host_runner import HostRunner
from moebeam.schemas.errors import EngineLoadError
from tests.support.engines.engine_configs import engine_config

KEY = b"k" * 32
TIMEOUT_S = 30


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def send_at_once(peer: "Connection[Any, Any]", bomb: Bomb) -> None:
    peer.send(bomb)
    peer.send(bomb)


def guess_the_key(peer: "Connection[Any, Any]", bomb: Bomb) -> None:
    with pytest.raises(AuthenticationError):
        answer_challenge(peer, b"g" * 32)
    peer.send(bomb)


def know_the_key(peer: "Connection[Any, Any]", bomb: Bomb) -> None:
    answer_challenge(peer, KEY)
    deliver_challenge(peer, KEY)
    peer.send(bomb)


@pytest.mark.parametrize(("talk", "is_read"), [(send_at_once, False), (guess_the_key, False), (know_the_key, True)])
def test_a_peer_without_the_key_has_nothing_unpickled(
    tmp_path: Path, talk: Callable[["Connection[Any, Any]", Bomb], None], is_read: bool
) -> None:
    peer, theirs = (Connection(end.detach()) for end in socket.socketpair())
    engine = HostEngine(tmp_path / "socket", KEY, None)

    def serve() -> None:
        with contextlib.suppress(AttributeError):  # what is unpickled here is no configuration
            engine.serve_worker(theirs)

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        talk(peer, Bomb(tmp_path / "executed"))
    peer.close()
    serving.join(TIMEOUT_S)
    assert not serving.is_alive()
    assert (tmp_path / "executed").exists() is is_read


def test_a_socket_that_is_a_link_is_not_spoken_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="h") as name:
        folder = Path(name)
        monkeypatch.setattr(host_runner, "host_folder", lambda: folder)
        monkeypatch.setattr(Path, "lstat", _stat_of_a_link(folder, Path.lstat))
        given = engine_config("fake", "", "model", "revision", script=str(tmp_path / "script.json"))
        with pytest.raises(EngineLoadError, match=r"cannot be reached: .*expected a socket of user"):
            HostRunner(given)


def _stat_of_a_link(folder: Path, real: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """`lstat` for which every socket below a folder is a link."""

    def lstat(path: Path) -> Any:
        if path.suffix == ".socket" and path.is_relative_to(folder):
            link = folder / "link"
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")
            return real(link)
        return real(path)

    return lstat
