"""`moebeam clean`: removes leftovers of ended attempts, and prompts past their retention.

It never touches results, rejects, ledger, manifest, commits, or unpublished tables of committed shards, and removes
nothing while a launcher or worker is active.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from moebeam.jobs.console.formats import format_bytes
from moebeam.jobs.output.run_record import RunRecord
from moebeam.jobs.output.run_state import find_signs_of_life, launchers_folder, read_manifest, read_modified_at
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.waste import waste_folder
from moebeam.transforms.durable.commit import read_commits
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.publish.manifest import passing_files

RETENTION_DAYS = 30.0
"""Retention of a finished run's plan and journals, which hold prompts and answers; `retry-failed` needs the plan."""

_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Removal:
    """Files of one kind to remove."""

    what: str
    paths: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CleanPlan:
    """What `clean` removes.

    Attributes:
        kept: what stays unexpectedly, and why.
    """

    output: str
    removals: tuple[Removal, ...]
    kept: tuple[str, ...]

    @property
    def num_files(self) -> int:
        return sum(len(removal.paths) for removal in self.removals)

    @property
    def num_bytes(self) -> int:
        return sum(removal.num_bytes for removal in self.removals)

    def to_json(self) -> dict[str, object]:
        """The record as JSON values."""
        return {
            "output": self.output,
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "removed": {
                removal.what: {"num_files": len(removal.paths), "num_bytes": removal.num_bytes}
                for removal in self.removals
            },
            "kept": list(self.kept),
        }


def plan_cleaning(record: RunRecord, older_than_days: float = RETENTION_DAYS) -> CleanPlan:
    """Find what can be removed.

    Args:
        older_than_days: age of a finished run at which its plan and journals are removed.
    Raises:
        OutputError: the run is active, or its files cannot be read.
    """
    layout = record.layout
    try:
        life = find_signs_of_life(layout)
        if life.is_alive:
            raise OutputError(
                f"{layout.output}: the run is at work ({'; '.join(life.who)}); clean it when it has ended"
            )
        manifest = read_manifest(layout)
        is_complete = manifest is not None and manifest["status"] == "complete"
        removals = list(_find_leftovers(layout, is_complete=is_complete))
        kept: list[str] = []
        plans = [
            entry for entry in _list_files(layout.plan) if entry[0].endswith(".arrow") and "/runs/" not in entry[0]
        ]
        journals = _list_files(layout.journal)
        frames = _list_files(layout.frames)
        found = {"the plan, with its prompts": plans, "the journals, with answers": journals, "the data frame": frames}
        what = " and ".join(name for name, files in found.items() if files)
        if what and not is_complete:
            them = "them" if journals else "it"
            kept.append(f"{what}: the run is not finished and needs {them} to resume")
        elif what:
            age_days = _read_age_days(layout)
            if age_days is not None and age_days >= older_than_days:
                removals.append(_make_removal("plans, which hold prompts", plans))
                removals.append(_make_removal("journals of answers, which are in the tables", journals))
                removals.append(_make_removal("data frames that run_job answered", frames))
            else:
                age = "an unknown time" if age_days is None else f"{age_days:.0f} days"
                kept.append(f"{what}: the run ended {age} ago, less than {older_than_days:g} days")
    except OSError as error:
        raise OutputError(f"{layout.output}: cannot be looked at: {error}") from error
    return CleanPlan(layout.output, tuple(removal for removal in removals if removal.paths), tuple(kept))


def print_cleaning(console: Console, plan: CleanPlan) -> None:
    """Print what is removed and what is kept."""
    if not plan.removals:
        console.print("nothing to remove", highlight=False)
    for removal in plan.removals:
        files = f"{len(removal.paths):,} file{'' if len(removal.paths) == 1 else 's'}"
        console.print(f"{files}, {format_bytes(removal.num_bytes)}: {removal.what}", markup=False, highlight=False)
    if len(plan.removals) > 1:
        console.print(f"{plan.num_files:,} files, {format_bytes(plan.num_bytes)} in all", highlight=False)
    for reason in plan.kept:
        console.print(f"kept: {reason}", soft_wrap=True, markup=False, highlight=False)


def clean(plan: CleanPlan) -> None:
    """Remove the planned files; missing ones are ignored.

    Raises:
        OutputError: a file cannot be removed.
    """
    try:
        for removal in plan.removals:
            storage.remove_files(removal.paths)
        layout = RunLayout(plan.output)
        states = (layout.staging, layout.sorted_runs, layout.leases, layout.progress, layout.journal, layout.frames)
        for folder in (*states, layout.logs, launchers_folder(layout)):
            if not _list_files(folder):
                storage.remove_tree(folder)
    except OSError as error:
        raise OutputError(f"{plan.output}: could not be cleaned to the end: {error}") from error


_Entry = tuple[str, Mapping[str, Any]]


def _find_leftovers(layout: RunLayout, *, is_complete: bool) -> Iterator[Removal]:
    """Find files that no later attempt needs."""
    needed = set[str]() if is_complete else _list_committed_files(layout)
    staged = [entry for entry in _list_files(layout.staging) if entry[0].rpartition("/")[2] not in needed]
    yield _make_removal("staged tables of attempts that were not committed", staged)
    if is_complete or read_plan(layout) is not None:
        yield _make_removal("sorted runs of the plan", _list_files(layout.sorted_runs))
    yield _make_removal("leases", _list_files(layout.leases))
    yield _make_removal("heartbeats", [*_list_files(layout.progress), *_list_files(launchers_folder(layout))])
    yield _make_removal("logs of worker processes", _list_files(layout.logs))
    if is_complete:
        yield _make_removal("records of waste, whose lines are in the ledger", _list_files(waste_folder(layout)))
    temporaries = [entry for path in passing_files(layout) for entry in _list_files(path)]
    yield _make_removal("temporary files of writers that were killed", temporaries)


def _list_committed_files(layout: RunLayout) -> set[str]:
    """List the staged files that commits name."""
    names: set[str] = set()
    for commit in read_commits(layout).values():
        names |= {file.path.rpartition("/")[2] for file in commit.files}
    return names


def _list_files(folder: str) -> Sequence[_Entry]:
    """List all files below a folder; empty if there is no such folder."""
    with contextlib.suppress(FileNotFoundError):
        return storage.list_files(folder)
    return []


def _make_removal(what: str, entries: Sequence[_Entry]) -> Removal:
    return Removal(what, tuple(path for path, _ in entries), sum(int(info.get("size") or 0) for _, info in entries))


def _read_age_days(layout: RunLayout) -> float | None:
    """Days since the manifest was written; None if the store gives no time."""
    instants = [read_modified_at(info) for _, info in storage.list_files(layout.manifest)]
    return None if not instants or instants[0] is None else (time.time() - instants[0]) / _DAY_S
