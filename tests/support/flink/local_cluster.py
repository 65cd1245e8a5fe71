"""The command that starts and stops a Flink cluster on this machine, to try jobs on.

The commands around `tests/support/flink/cluster.py`; `stop`, `status` and `options` work from what `start` left in
FOLDER.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moebeam.jobs.console.console import Answer, AsJson, Debug, run_and_report
from tests.support.flink.cluster import (
    MAX_TASK_MANAGERS,
    ClusterSize,
    LocalCluster,
    read_processes,
    read_state,
    stop_processes,
)
from tests.support.flink.java_commands import FlinkFiles
from tests.support.paths import ROOT

BEAM_JARS = ROOT / "jobs" / "deploy" / "flink" / "target"

ClusterFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The cluster's logs, state and worker folders.")]

_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A whole Flink cluster on one machine, with a pool of Python workers for each task manager.",
)


@_app.command()
def start(
    folder: ClusterFolder,
    flink_home: Annotated[Path, typer.Option(help="A Flink 1.19 distribution.", envvar="FLINK_HOME")],
    beam_jars: Annotated[
        Path, typer.Option(help="Where mvn -f jobs/deploy/flink/pom.xml package left its jars.")
    ] = BEAM_JARS,
    task_managers: Annotated[int, typer.Option(min=1, max=MAX_TASK_MANAGERS)] = 2,
    slots: Annotated[int, typer.Option(min=1, help="Bundles at once in each task manager.")] = 2,
    task_manager_mib: Annotated[int, typer.Option(min=800, help="Memory of each task manager.")] = 1024,
    is_json: AsJson = False,
    is_debug: Debug = False,
) -> None:
    """Start a cluster whose files lie in FOLDER, and show the options of `moebeam run` for it."""

    def work(console: Console) -> tuple[int, Answer]:
        size = ClusterSize(task_managers, slots, task_manager_mib=task_manager_mib)
        cluster = LocalCluster(folder, FlinkFiles(flink_home.absolute(), beam_jars.absolute()), size)
        cluster.start()
        console.print(f"moebeam run JOB.toml {' '.join(cluster.beam_options)}", soft_wrap=True, highlight=False)
        return 0, read_state(folder)

    run_and_report(work, is_json=is_json, is_debug=is_debug)


@_app.command()
def options(folder: ClusterFolder) -> None:
    """Print the options that `moebeam run` needs for the cluster in FOLDER."""
    # On standard output, unlike what other commands tell, for $(...) in a shell.
    print(" ".join(read_state(folder)["beam_options"]))


@_app.command()
def status(folder: ClusterFolder, is_json: AsJson = False, is_debug: Debug = False) -> None:
    """Say which processes of the cluster in FOLDER run; exit code 1 if one does not."""

    def work(console: Console) -> tuple[int, Answer]:
        state = read_state(folder)
        found = {process.name: process.find() for process in read_processes(folder)}
        for name, process in found.items():
            what = "gone" if process is None else f"{process.memory_info().rss / 2**20:,.0f} MiB, process {process.pid}"
            console.print(f"{name:<16}{what}", soft_wrap=True, highlight=False)
        console.print(f"web service     {state['web']}", soft_wrap=True, highlight=False)
        running = {name: process is not None for name, process in found.items()}
        return int(not all(running.values())), {**state, "running": running}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


@_app.command()
def stop(folder: ClusterFolder, is_json: AsJson = False, is_debug: Debug = False) -> None:
    """End the cluster in FOLDER; its logs stay."""

    def work(console: Console) -> tuple[int, Answer]:
        read_state(folder)
        stop_processes(read_processes(folder))
        return 0, {"status": "stopped"}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


if __name__ == "__main__":
    _app()
