"""A GCS server on this machine: fake-gcs-server, built from the Go module proxy, with its objects in memory.

`python -m tests.support.servers.gcs_server` builds it ahead of the tests; else the first test that needs it does.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests.support.servers.go_programs import GoProgramError, go_program
from tests.support.servers.local_servers import free_port, guarded, is_open, wait_until

VERSION = "v1.56.1"
MODULE = "github.com/fsouza/fake-gcs-server"
START_TIMEOUT_S = 60


class GcsServerError(Exception):
    """The GCS server does not start; the tests that need it fail, they are not skipped."""


def install() -> Path:
    """The server's binary.

    Raises:
        GoProgramError: it cannot be built.
    """
    return go_program(MODULE, VERSION, name="fake-gcs-server")


@dataclass
class GcsServer:
    """A server without credentials; it ends with the process that started it."""

    folder: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What Beam's client and gcsfs read: the address, and that nobody needs to be asked who they are.

        gcsfs would otherwise ask Google what kind of bucket each one is, and warn that it cannot. Whoever asks a
        cloud's machine who it is, is refused at once.
        """
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GCE_METADATA_HOST": "127.0.0.1:1",
            "GCE_METADATA_IP": "127.0.0.1:1",
            "GCE_METADATA_DETECT_RETRIES": "1",
        }

    def bucket(self, name: str) -> str:
        """Make a bucket; its URL."""
        made = httpx2.post(f"{self.address}/storage/v1/b", json={"name": name}, timeout=START_TIMEOUT_S)
        made.raise_for_status()
        return f"gs://{name}"

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            GcsServerError: it ended, or did not answer in time.
        """
        serve = [str(install()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        command = guarded(
            [*serve, "-public-host", f"127.0.0.1:{self.port}", "-backend", "memory", "-log-level", "warn"]
        )
        log = self.folder / "server.log"
        with log.open("ab") as sink:
            self._process = subprocess.Popen(command, stdout=sink, stderr=sink)
        try:
            wait_until(lambda: is_open(self.port), self._process, START_TIMEOUT_S, log)
        except TimeoutError as error:
            self._process = None
            raise GcsServerError(f"fake-gcs-server does not answer: {error}") from error

    def kill(self) -> None:
        """End it at once; connections are refused from here on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


if __name__ == "__main__":
    try:
        print(install())
    except GoProgramError as error:
        sys.exit(f"error: {error}")
