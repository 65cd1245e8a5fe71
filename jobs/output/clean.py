"""`moebeam clean`: removes what attempts that are gone left behind, and prompts that were kept long enough.

Never touched: results, rejects, ledger, manifest, commits, and the tables of committed shards that are not published
yet. Nothing is removed while anybody is at work on the run.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from moebeam.jobs.console.formats import format_bytes
from moebeam.jobs.output.run_record import RunRecord
from moebeam.jobs.output.run_state import launchers_folder, modified_at, read_manifest, signs_of_life
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.waste import waste_folder
from moebeam.transforms.durable.commit import read_commit
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.publish.manifest import passing_files

RETENTION_DAYS = 30.0
"""How long the plan and the journals of a finished run are kept, which hold its prompts and answers; `retry-failed`
needs the plan."""

_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Removal:
    """Files of one kind that are to go."""

    what: str
    paths: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CleanPlan:
    """What a cleaning removes.

    Attributes:
        kept: what was left although one might expect it to go, and why.
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
    """Find what can go.

    Args:
        older_than_days: a finished run's plan and journals go when the run ended so long ago.
    Raises:
        OutputError: somebody is at work on the run, or its files cannot be looked at.
    """
    layout = record.layout
    try:
        life = signs_of_life(layout)
        if life.is_alive:
            raise OutputError(
                f"{layout.output}: the run is at work ({'; '.join(life.who)}); clean it when it has ended"
            )
        manifest = read_manifest(layout)
        is_complete = manifest is not None and manifest["status"] == "complete"
        removals = list(_leftovers(layout, is_complete=is_complete))
        kept: list[str] = []
        plans = [entry for entry in _below(layout.plan) if entry[0].endswith(".arrow") and "/runs/" not in entry[0]]
        journals = _below(layout.journal)
        what = " and ".join(
            [*(["the plan, with its prompts"] if plans else []), *(["the journals, with answers"] if journals else [])]
        )
        if what and not is_complete:
            them = "them" if journals else "it"
            kept.append(f"{what}: the run is not finished and needs {them} to resume")
        elif what:
            age_days = _age_days(layout)
            if age_days is not None and age_days >= older_than_days:
                removals.append(_removal("plans, which hold prompts", plans))
                removals.append(_removal("journals of answers, which are in the tables", journals))
            else:
                told = "an unknown time" if age_days is None else f"{age_days:.0f} days"
                kept.append(f"{what}: the run ended {told} ago, less than {older_than_days:g} days")
    except OSError as error:
        raise OutputError(f"{layout.output}: cannot be looked at: {error}") from error
    return CleanPlan(layout.output, tuple(removal for removal in removals if removal.paths), tuple(kept))


def print_cleaning(console: Console, plan: CleanPlan) -> None:
    """What goes and what stays, for a person."""
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
    """Remove what was found; files that are gone already are no error.

    Raises:
        OutputError: something could not be removed.
    """
    try:
        for removal in plan.removals:
            storage.remove_files(removal.paths)
        layout = RunLayout(plan.output)
        states = (layout.staging, layout.sorted_runs, layout.leases, layout.progress, layout.journal)
        for folder in (*states, launchers_folder(layout)):
            if not _below(folder):
                storage.remove_tree(folder)
    except OSError as error:
        raise OutputError(f"{plan.output}: could not be cleaned to the end: {error}") from error


_Entry = tuple[str, Mapping[str, Any]]


def _leftovers(layout: RunLayout, *, is_complete: bool) -> Iterator[Removal]:
    """What nobody needs once nobody is at work."""
    needed = set[str]() if is_complete else _committed_files(layout)
    staged = [entry for entry in _below(layout.staging) if entry[0].rpartition("/")[2] not in needed]
    yield _removal("staged tables of attempts that were not committed", staged)
    if is_complete or read_plan(layout) is not None:
        yield _removal("sorted runs of the plan", _below(layout.sorted_runs))
    yield _removal("leases", _below(layout.leases))
    yield _removal("heartbeats", [*_below(layout.progress), *_below(launchers_folder(layout))])
    if is_complete:
        yield _removal("records of waste, whose lines are in the ledger", _below(waste_folder(layout)))
    temporaries = [entry for path in passing_files(layout) for entry in _below(path)]
    yield _removal("temporary files of writers that were killed", temporaries)


def _committed_files(layout: RunLayout) -> set[str]:
    """Names of the staged files that commits name."""
    names: set[str] = set()
    for name in storage.list_names(layout.commits, ".json"):
        commit = read_commit(layout, name.removesuffix(".json"))
        names |= {file.path.rpartition("/")[2] for file in commit.files} if commit is not None else set()
    return names


def _below(folder: str) -> Sequence[_Entry]:
    """All files below a folder; none if there is no such folder."""
    with contextlib.suppress(FileNotFoundError):
        return storage.list_files(folder)
    return []


def _removal(what: str, entries: Sequence[_Entry]) -> Removal:
    return Removal(what, tuple(path for path, _ in entries), sum(int(info.get("size") or 0) for _, info in entries))


def _age_days(layout: RunLayout) -> float | None:
    """How long ago the manifest was written; None if the store does not tell."""
    instants = [modified_at(info) for _, info in storage.list_files(layout.manifest)]
    return None if not instants or instants[0] is None else (time.time() - instants[0]) / _DAY_S
