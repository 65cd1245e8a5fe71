"""A Flink cluster on this machine with worker pools of its own, of jars that PyPI and Maven Central bring.

`python -m tests.support.flink.built_cluster` fetches the jars ahead of the tests; else the first test that needs them
does.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path, PurePosixPath

import httpx2

from tests.support.flink.cluster import ClusterSize, LocalCluster
from tests.support.flink.java_commands import FlinkFiles
from tests.support.paths import ROOT
from tests.support.servers.local_servers import cache_folder, guarded

FLINK_VERSION = "1.19.3"
FLINK_PACKAGE = "apache-flink-libraries"
COMMAND_TIMEOUT_S = 900
DEBIAN_PACKAGES = ("openjdk-17-jre-headless", "maven")

_POM = ROOT / "jobs" / "deploy" / "flink" / "pom.xml"
_WANTED = ("deps/lib/", "deps/bin/")


class FlinkInstallError(Exception):
    """The cluster's files cannot be fetched; the tests that need them fail, they are not skipped."""


def install() -> FlinkFiles:
    """The cluster's files, fetched into the user's cache folder if they are not there yet.

    Raises:
        FlinkInstallError: Java, Maven or a registry is missing.
    """
    _install_java()
    cache = cache_folder()
    flink = cache / f"flink-{FLINK_VERSION}"
    if not flink.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _unpack_flink(_download(Path(folder)), Path(folder) / "flink")
            os.replace(Path(folder) / "flink", flink)
    # Another pom makes other jars.
    beam = cache / f"beam-flink-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:12]}"
    if not beam.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _run(["mvn", "-B", "-q", "-f", str(_POM), "package", f"-Ddestination={folder}/jars"], Path(folder))
            os.replace(Path(folder) / "jars", beam)
    return FlinkFiles(flink, beam)


def make_cluster(folder: Path, size: ClusterSize | None = None) -> LocalCluster:
    """A cluster that ends with this process, not started yet.

    Raises:
        FlinkInstallError: as of `install`.
    """
    return LocalCluster(folder, install(), size, prefix=guarded([]))


def _install_java() -> None:
    if shutil.which("java") and shutil.which("mvn"):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise FlinkInstallError(
            f"Flink needs Java 17 and Maven: expected java and mvn on the PATH, such as of Debian's "
            f"{' and '.join(DEBIAN_PACKAGES)}; they are installed here only for root, with apt-get"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _run(["apt-get", "update", "-q"], Path.cwd(), environment)
    _run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *DEBIAN_PACKAGES], Path.cwd(), environment)


def _download(folder: Path) -> Path:
    """The source package that carries Flink's jars, checked against the index; nothing of it is run.

    An installer would run its `setup.py` only to learn its name, and could not build it without Flink's own sources. So
    uv is told the name, and asked where the file lies by the indexes that this machine is set up with.
    """
    project = f"""
    [project]
    name = "flink-jars"
    version = "0"
    requires-python = ">=3.11"
    dependencies = ["{FLINK_PACKAGE}=={FLINK_VERSION}"]
    [[tool.uv.dependency-metadata]]
    name = "{FLINK_PACKAGE}"
    version = "{FLINK_VERSION}"
    requires-dist = []
    """
    (folder / "pyproject.toml").write_text(project)
    beside = Path(sys.executable).with_name("uv")
    _run([str(beside) if beside.exists() else "uv", "lock", "--quiet", "--python", sys.executable], folder)
    packages = tomllib.loads((folder / "uv.lock").read_text())["package"]
    source = next(package["sdist"] for package in packages if package["name"] == FLINK_PACKAGE)
    archive, digest = folder / "flink.tar.gz", hashlib.sha256()
    try:
        with (
            httpx2.stream("GET", source["url"], follow_redirects=True, timeout=60.0) as answer,
            archive.open("wb") as sink,
        ):
            for chunk in answer.raise_for_status().iter_bytes(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    except httpx2.HTTPError as error:
        raise FlinkInstallError(f"{FLINK_PACKAGE}=={FLINK_VERSION}: cannot be fetched: {error}") from error
    if source["hash"] != f"sha256:{digest.hexdigest()}":
        raise FlinkInstallError(
            f"{FLINK_PACKAGE}=={FLINK_VERSION}: expected {source['hash']}, found {digest.hexdigest()}"
        )
    return archive


def _unpack_flink(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as package:
        for member in package:
            inner = PurePosixPath(member.name).relative_to(PurePosixPath(member.name).parts[0])
            if member.isfile() and str(inner).startswith(_WANTED):
                member.name = str(inner.relative_to("deps"))
                package.extract(member, target, filter="data")


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise FlinkInstallError(f"{command[0]}: expected it beside this interpreter or on the PATH") from error
    if done.returncode:
        last = "\n".join([*done.stdout.splitlines(), *done.stderr.splitlines()][-8:])
        raise FlinkInstallError(f"{' '.join(command)} failed:\n{last}")


if __name__ == "__main__":
    try:
        print(install().flink_home)
    except FlinkInstallError as error:
        sys.exit(f"error: {error}")
