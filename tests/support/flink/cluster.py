"""A whole Flink cluster on one machine, as processes; `local_cluster.py` starts and stops one.

A job manager, task managers, Beam's job server, and for each task manager a pool of Python workers with folders of its
own, as they would have on machines of their own. All task managers know their pool by one name; a hosts file for each
Java process maps it to the loopback address where that task manager's pool listens.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

from moebeam.schemas.errors import ClusterUnavailable
from tests.support.flink import java_commands
from tests.support.flink.java_commands import FlinkFiles

POOL_NAME = "worker-pool"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
WEB_TIMEOUT_S = 10.0
MAX_TASK_MANAGERS = 200
"""Each has a loopback address of its own, from 127.0.0.2 on."""

_STATE = "cluster.json"
_LAST_LINES = 15
_START_TOLERANCE_S = 2.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class ClusterSize:
    """How large a cluster is; the smallest memory that Flink and Beam's runner work with is the default."""

    num_task_managers: int = 2
    num_slots: int = 2
    job_manager_mib: int = 832
    task_manager_mib: int = 1024

    def job_manager_settings(self) -> dict[str, str]:
        return {"jobmanager.memory.process.size": f"{self.job_manager_mib}m"}

    def task_manager_settings(self) -> dict[str, str]:
        return {
            "taskmanager.numberOfTaskSlots": str(self.num_slots),
            "taskmanager.memory.process.size": f"{self.task_manager_mib}m",
            # A quarter of it would wait for sorts and hash tables that a job of descriptors does not need.
            "taskmanager.memory.managed.size": "64m",
        }


@dataclass(frozen=True, slots=True)
class ClusterProcess:
    """A process of the cluster; id and start together name it for good."""

    name: str
    pid: int
    started: float

    def find(self) -> psutil.Process | None:
        """The process, or None if it is no more."""
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) <= _START_TOLERANCE_S
            return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class LocalCluster:
    """A cluster in a folder: its logs, its workers' folders, and `cluster.json`, which says what runs."""

    def __init__(
        self, folder: Path, files: FlinkFiles, size: ClusterSize | None = None, *, prefix: Sequence[str] = ()
    ) -> None:
        """Describe a cluster; nothing is started.

        Args:
            prefix: put before every command; a test's guard that ends what outlives it.
        """
        self.folder = folder.absolute()
        self.files = files
        self._size = size or ClusterSize()
        self._prefix = prefix
        self._rpc_port, self._web_port, self._job_port, self._pool_port = free_ports(4)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._processes: dict[str, ClusterProcess] = {}

    @property
    def job_endpoint(self) -> str:
        return f"localhost:{self._job_port}"

    @property
    def job_manager_address(self) -> str:
        return f"localhost:{self._web_port}"

    @property
    def beam_options(self) -> list[str]:
        """What `moebeam run` needs to run a job here."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint={self.job_endpoint}",
            "--environment_type=EXTERNAL",
            f"--environment_config={POOL_NAME}:{self._pool_port}",
            f"--parallelism={self._size.num_task_managers}",
        ]

    def start(self) -> None:
        """Start everything and wait until the cluster takes jobs.

        Raises:
            ClusterUnavailable: a part is missing, ended, or is not ready in time; what was started is ended again.
        """
        self.files.check()
        if any(process.find() for process in read_processes(self.folder)):
            raise ClusterUnavailable(f"{self.folder}: a cluster runs here; stop it first")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start_job_manager()
            for index in range(self._size.num_task_managers):
                self.start_task_manager(index)
            self._start_job_server()
            self.wait_for_task_managers(self._size.num_task_managers)
            self._wait(lambda: _is_open(self._job_port), "the job server")
        except BaseException:
            self.stop()
            raise

    def start_task_manager(self, index: int) -> None:
        """Start a task manager, or start it again, and its pool unless that one runs."""
        address = f"127.0.0.{2 + index}"
        if not self.is_running(f"pool-{index}"):
            folder = self.folder / f"pool-{index}"
            pool = ["--address", f"{address}:{self._pool_port}", "--folder", str(folder)]
            environment = {"TMPDIR": str(_made(folder / "tmp")), "PYTHONPATH": _python_path()}
            self._spawn(
                f"pool-{index}",
                [sys.executable, "-m", "moebeam.jobs.deploy.flink.worker_pool", *pool],
                folder,
                environment,
            )
        name = f"task-manager-{index}"
        folder = _made(self.folder / name)
        hosts = folder / "hosts"
        own = f"127.0.0.1 localhost {socket.gethostname()}"
        hosts.write_text(f"{own}\n{address} {POOL_NAME}\n")
        settings = {
            **self._shared_settings(folder),
            **self._size.task_manager_settings(),
            "taskmanager.host": "localhost",
            "taskmanager.bind-host": "localhost",
            "taskmanager.resource-id": f"{name}-{time.time_ns()}",
        }
        self._spawn(
            name, java_commands.task_manager(self.files, settings, [f"-Djdk.net.hosts.file={hosts}"]), folder, {}
        )

    def wait_for_task_managers(self, count: int) -> None:
        """Wait until so many task managers are at the job manager's service.

        Raises:
            ClusterUnavailable: they are not in time.
        """
        self._wait(lambda: self._num_task_managers() >= count, f"{count} task managers")

    def overview(self, path: str) -> Any:
        """What the job manager's web service answers to a path such as `/jobs/overview`, as JSON values.

        Raises:
            ClusterUnavailable: it does not answer.
        """
        try:
            found = httpx2.get(f"http://{self.job_manager_address}{path}", timeout=WEB_TIMEOUT_S)
            return found.raise_for_status().json()
        except httpx2.HTTPError as error:
            raise ClusterUnavailable(f"{self.job_manager_address}{path}: {error}") from error

    def find(self, name: str) -> psutil.Process:
        """A process of the cluster: `job-manager`, `job-server`, `task-manager-N`, `pool-N`."""
        process = self._processes[name].find()
        assert process is not None, f"{name} does not run"
        return process

    def is_running(self, name: str) -> bool:
        return name in self._processes and self._processes[name].find() is not None

    def stop(self) -> None:
        """End all processes of the cluster."""
        stop_processes(self._processes.values())
        for child in self._children.values():
            child.wait()

    def _start_job_manager(self) -> None:
        folder = _made(self.folder / "job-manager")
        settings = {
            **self._shared_settings(folder),
            **self._size.job_manager_settings(),
            "jobmanager.bind-host": "localhost",
            "rest.port": str(self._web_port),
            "rest.address": "localhost",
            "rest.bind-address": "localhost",
            "web.tmpdir": str(folder / "tmp"),
        }
        self._spawn("job-manager", java_commands.job_manager(self.files, settings), folder, {})

    def _start_job_server(self) -> None:
        folder = _made(self.folder / "job-server")
        command = java_commands.job_server(
            self.files,
            job_manager_address=self.job_manager_address,
            job_port=self._job_port,
            artifacts=folder / "artifacts",
        )
        self._spawn("job-server", command, folder, {})

    def _shared_settings(self, folder: Path) -> dict[str, str]:
        return {
            "jobmanager.rpc.address": "localhost",
            "jobmanager.rpc.port": str(self._rpc_port),
            "io.tmp.dirs": str(_made(folder / "tmp")),
        }

    def _spawn(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        if name in self._children:
            self._children[name].wait()
        with (_made(folder) / "process.log").open("ab") as log:
            child = subprocess.Popen(
                [*self._prefix, *command],
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal that started the cluster is not meant for it.
                start_new_session=True,
            )
        self._children[name] = child
        self._processes[name] = ClusterProcess(name, child.pid, psutil.Process(child.pid).create_time())
        state = {
            "beam_options": self.beam_options,
            "web": f"http://{self.job_manager_address}",
            "processes": [asdict(process) for process in self._processes.values()],
        }
        (self.folder / _STATE).write_text(json.dumps(state, indent=2))

    def _wait(self, is_ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_ready():
            ended = [name for name in self._processes if not self.is_running(name)]
            if ended or time.monotonic() > deadline:
                problem = f"{ended[0]} ended" if ended else f"it is not there after {START_TIMEOUT_S:.0f} s"
                raise ClusterUnavailable(f"expected {what}, {problem}:\n{self._last_words(ended)}")
            time.sleep(_POLL_S)

    def _last_words(self, names: Sequence[str]) -> str:
        lines: list[str] = []
        for name in names or ["job-manager", "task-manager-0", "job-server"]:
            log = self.folder / name / "process.log"
            text = log.read_text(errors="replace") if log.exists() else ""
            lines += [f"{log}:", *text.splitlines()[-_LAST_LINES:]]
        return "\n".join(lines)

    def _num_task_managers(self) -> int:
        try:
            return int(self.overview("/overview")["taskmanagers"])
        except ClusterUnavailable:
            return 0


def read_state(folder: Path) -> dict[str, Any]:
    """What a cluster's folder says of it.

    Raises:
        ClusterUnavailable: no cluster was started there.
    """
    try:
        return json.loads((folder / _STATE).read_text())
    except FileNotFoundError as error:
        raise ClusterUnavailable(f"{folder / _STATE}: expected the state of a cluster, found none") from error


def read_processes(folder: Path) -> list[ClusterProcess]:
    """The processes that a cluster in a folder was started with, whether they still run or not."""
    if not (folder / _STATE).exists():
        return []
    return [ClusterProcess(**process) for process in read_state(folder)["processes"]]


def stop_processes(processes: Iterable[ClusterProcess]) -> None:
    """End processes, with SIGKILL where they take too long."""
    found = [process for known in processes if (process := known.find()) is not None]
    for process in found:
        process.terminate()
    _, left = psutil.wait_procs(found, timeout=STOP_TIMEOUT_S)
    for process in left:
        process.kill()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that are free now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _python_path() -> str:
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)
