"""The command lines of a Flink cluster's Java processes; how Flink's own shell scripts would start them.

Used by `tests/support/flink/cluster.py`. Flink wants its memory in parts that a program of its own works out, and on
Java 17 it needs modules of the platform opened.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moebeam.schemas.errors import ClusterUnavailable
from tests.support.paths import ROOT

JOB_MANAGER = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
TASK_MANAGER = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
JOB_SERVER = "org.apache.beam.runners.flink.FlinkJobServerDriver"
RESOURCES = "org.apache.flink.runtime.util.bash.BashJavaUtils"
JOB_SERVER_HEAP = "-Xmx384m"
EXIT_ON_LACK = "-XX:+ExitOnOutOfMemoryError"
"""A task manager whose gRPC threads run out of memory would else live on, and its jobs wait for ever."""

_RESULT = "BASH_JAVA_UTILS_EXEC_RESULT:"
_TIMEOUT_S = 60
_OPENED = (
    "java.lang",
    "java.lang.invoke",
    "java.lang.reflect",
    "java.io",
    "java.net",
    "java.nio",
    "java.text",
    "java.time",
    "java.util",
    "java.util.concurrent",
    "java.util.concurrent.atomic",
    "java.util.concurrent.locks",
    "sun.nio.ch",
)
MODULES = (
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
    "--add-exports=java.security.jgss/sun.security.krb5=ALL-UNNAMED",
    *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED),
)


@dataclass(frozen=True, slots=True)
class FlinkFiles:
    """Where the files lie that a cluster is made of.

    Attributes:
        flink_home: a Flink distribution; `lib/` and `bin/bash-java-utils.jar` of it are used.
        beam_jars: the folder of the two jars that `jobs/deploy/flink/pom.xml` makes.
        conf: the folder with `config.yaml` and `log4j.properties`.
    """

    flink_home: Path
    beam_jars: Path
    conf: Path = field(default=ROOT / "jobs" / "deploy" / "flink" / "conf")

    def check(self) -> None:
        """See that all is there.

        Raises:
            ClusterUnavailable: a file is missing; the message says where it is expected and where it comes from.
        """
        origin = "a part of a Flink 1.19 distribution"
        for path, source in (
            (self.flink_home / "lib", origin),
            (self.flink_home / "bin" / "bash-java-utils.jar", origin),
            (self.runner_jar, "what mvn -f jobs/deploy/flink/pom.xml package makes"),
            (self.job_server_jar, "what mvn -f jobs/deploy/flink/pom.xml package makes"),
            (self.conf / "config.yaml", "jobs/deploy/flink/conf"),
        ):
            if not path.exists():
                raise ClusterUnavailable(f"{path}: expected {source}, found nothing")

    @property
    def runner_jar(self) -> Path:
        return self.beam_jars / "moebeam-flink-runner.jar"

    @property
    def job_server_jar(self) -> Path:
        return self.beam_jars / "moebeam-flink-job-server.jar"

    @property
    def class_path(self) -> str:
        """Of Flink's own processes, as if the runner lay in `lib/`."""
        return os.pathsep.join([str(self.flink_home / "lib" / "*"), str(self.runner_jar)])


def java_program() -> str:
    """The Java of `JAVA_HOME`, or else of the PATH.

    Raises:
        ClusterUnavailable: there is none.
    """
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=os.pathsep.join([f"{home}/bin"] if home else []) or None) or shutil.which("java")
    if found is None:
        raise ClusterUnavailable("java: expected Java 17 in JAVA_HOME or on the PATH, found none")
    return found


def job_manager(files: FlinkFiles, settings: Mapping[str, str]) -> list[str]:
    """The command that runs a job manager.

    Args:
        settings: Flink's configuration keys, over those of `config.yaml`.
    Raises:
        ClusterUnavailable: Flink cannot work out its memory from them.
    """
    return _flink_process(files, JOB_MANAGER, "GET_JM_RESOURCE_PARAMS", settings, ())


def task_manager(files: FlinkFiles, settings: Mapping[str, str], jvm_options: Sequence[str] = ()) -> list[str]:
    """The command that runs a task manager; as of `job_manager`."""
    return _flink_process(files, TASK_MANAGER, "GET_TM_RESOURCE_PARAMS", settings, jvm_options)


def job_server(files: FlinkFiles, *, job_manager_address: str, job_port: int, artifacts: Path) -> list[str]:
    """The command that runs Beam's job server, which takes jobs from `moebeam run` and gives them to Flink.

    Args:
        job_manager_address: host and port of the job manager's web service.
    """
    logging = [str(path) for path in sorted((files.flink_home / "lib").glob("log4j-*.jar"))]
    class_path = os.pathsep.join([str(files.job_server_jar), *logging])
    return [
        *_java(files, (JOB_SERVER_HEAP,), class_path),
        JOB_SERVER,
        f"--flink-master={job_manager_address}",
        f"--job-port={job_port}",
        "--artifact-port=0",
        "--expansion-port=-1",
        f"--artifacts-dir={artifacts}",
    ]


def _flink_process(
    files: FlinkFiles,
    main: str,
    resources: Literal["GET_JM_RESOURCE_PARAMS", "GET_TM_RESOURCE_PARAMS"],
    settings: Mapping[str, str],
    jvm_options: Sequence[str],
) -> list[str]:
    stated = [word for name, value in settings.items() for word in ("-D", f"{name}={value}")]
    memory, parts = _resources(files, resources, stated)
    java = _java(files, (EXIT_ON_LACK, *memory, *jvm_options), files.class_path)
    return [*java, main, "--configDir", str(files.conf), *stated, *parts]


def _resources(files: FlinkFiles, what: str, stated: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of the JVM, and settings of Flink, that its own arithmetic makes of the configured memory."""
    class_path = os.pathsep.join([str(files.flink_home / "bin" / "bash-java-utils.jar"), files.class_path])
    command = [java_program(), "-cp", class_path, RESOURCES, what, "--configDir", str(files.conf), *stated]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    found = [line.removeprefix(_RESULT) for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or len(found) != 2:
        last = "\n".join([*done.stdout.splitlines(), *done.stderr.splitlines()][-8:])
        raise ClusterUnavailable(f"{what}: expected two lines from {RESOURCES}, found {len(found)}:\n{last}")
    return found[0].split(), found[1].split()


def _java(files: FlinkFiles, options: Sequence[str], class_path: str) -> list[str]:
    log = files.conf / "log4j.properties"
    return [java_program(), *options, *MODULES, f"-Dlog4j.configurationFile=file:{log}", "-cp", class_path]
