"""`moebeam repair`: reads every file of a run, says which are not what was written, and makes the folder usable again.

What can be made of other files is made at once: the plan's record, a table of which another copy is whole. The rest is
set aside, below `_moebeam/damaged/`, so that the next launch makes it again: the plan from the input, a shard's tables
from its journal or by asking again. Nothing is deleted, and a run at work is left alone.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console

from moebeam.jobs.output.frame_record import check_frame
from moebeam.jobs.output.run_record import input_record_path
from moebeam.jobs.output.run_state import find_signs_of_life, launchers_folder, read_manifest
from moebeam.schemas.answers import ShardCommit
from moebeam.schemas.errors import CommitError, FileDamaged, OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import read_checked
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_file import ARROW_END, PARQUET_END, check_sealed
from moebeam.schemas.store.sealed_json import unseal_json
from moebeam.schemas.tables import TABLES
from moebeam.transforms.answer.reuse import fences_path
from moebeam.transforms.answer.waste import waste_folder
from moebeam.transforms.durable.commit import list_committed_shards, open_committed, read_commit
from moebeam.transforms.durable.journal_file import list_journaled_shards, read_journal
from moebeam.transforms.plan.mend_plan import mend_record, set_plan_aside
from moebeam.transforms.publish.manifest import mend_views, publish_shard, views_path

_MADE = "made again"
_ASIDE = "set aside"
_LEFT = "left as it is"


@dataclass(frozen=True, slots=True)
class Repaired:
    """A damaged file: what became of it, and what follows.

    Attributes:
        needs_launch: whether the run's next launch has to make it again.
    """

    path: str
    done: str
    note: str
    needs_launch: bool = False


def repair(layout: RunLayout) -> list[Repaired]:
    """Check every file of a run and mend or set aside what is damaged.

    Raises:
        OutputError: there is no run, or somebody is at work on it.
        CommitError: the damage is such that nothing can be made again.
        OSError: the store failed.
    """
    if not storage.is_folder(layout.state):
        raise OutputError(f"{layout.output}: expected the output folder of a run, found no _moebeam in it")
    life = find_signs_of_life(layout)
    if life.is_alive:
        raise OutputError(f"{layout.output}: the run is at work ({'; '.join(life.who)}); repair it when it has ended")
    found = [
        *_repair_notes(layout),
        *_repair_records(layout),
        *_repair_plan(layout),
        *_repair_shards(layout),
        *_find_journal_damage(layout),
        *_find_frame_damage(layout),
    ]
    with contextlib.suppress(OutputError):
        if any(one.needs_launch for one in found) and read_manifest(layout) is not None:
            # A finished run is not launched; its manifest comes again, at the end of the launch that repairs it.
            _set_aside(layout, layout.manifest)
            found.append(Repaired(layout.manifest, _ASIDE, "it comes again with what is repaired"))
    return found


def print_repair(console: Console, layout: RunLayout, found: list[Repaired]) -> None:
    """Say what was found, and what to do next."""
    for one in found:
        console.print(f"{one.path}: damaged; {one.done}: {one.note}", soft_wrap=True, markup=False, highlight=False)
    if not found:
        console.print("every file is what was written", highlight=False)
    elif any(one.needs_launch for one in found):
        console.print(f"now: moebeam resume {layout.output}", markup=False, highlight=False, soft_wrap=True)


def describe_repair(found: list[Repaired]) -> dict[str, Any]:
    """The answer of `--json`."""
    return {"num_damaged": len(found), "damaged": [asdict(one) for one in found]}


def _is_whole(check: Callable[[], object]) -> bool:
    try:
        check()
    except (FileDamaged, ValueError):
        return False
    except FileNotFoundError:
        return True
    return True


def _read_json(path: str) -> object:
    return json.loads(unseal_json(storage.read_bytes(path)))


def _set_aside(layout: RunLayout, path: str) -> None:
    name = layout.relative(path).replace("/", "~")
    storage.copy_whole(path, storage.join(layout.damaged, name))
    storage.remove_files([path])


def _repair_notes(layout: RunLayout) -> Iterator[Repaired]:
    """Leases, progress, presence, the notes of a stop and of a failure: once nobody is at work, none is needed."""
    folders = (layout.leases, layout.progress, launchers_folder(layout))
    paths = [path for folder in folders for path, _ in _list_files(folder)]
    for path in (*paths, layout.stop, layout.failure):
        if not _is_whole(lambda path=path: _read_json(path)):
            _set_aside(layout, path)
            yield Repaired(path, _ASIDE, "a note of an attempt that has ended")
    for path, _ in _list_files(waste_folder(layout)):
        if not _is_whole(lambda path=path: check_sealed(path, PARQUET_END)):
            _set_aside(layout, path)
            yield Repaired(path, _ASIDE, "it is made again from the shard's journal", needs_launch=True)


def _repair_records(layout: RunLayout) -> Iterator[Repaired]:
    if not _is_whole(lambda: _read_json(layout.job)):
        yield Repaired(layout.job, _LEFT, "moebeam run JOB.toml, with the job of this run, writes it again")
    if not _is_whole(lambda: _read_json(layout.publish_record)):
        yield Repaired(layout.publish_record, _LEFT, "the next launch writes it again", needs_launch=True)
    elif mend_views(layout):
        yield Repaired(views_path(layout), _MADE, "from the run's record")
    path = input_record_path(layout)
    if not _is_whole(lambda: _read_json(path)):
        _set_aside(layout, path)
        yield Repaired(path, _ASIDE, "the next launch reads the input again", needs_launch=True)
    if not _is_whole(lambda: _read_json(layout.quote)):
        _set_aside(layout, layout.quote)
        yield Repaired(layout.quote, _ASIDE, "moebeam estimate JOB.toml --save writes it again")
    if not _is_whole(lambda: _read_json(layout.manifest)):
        _set_aside(layout, layout.manifest)
        yield Repaired(layout.manifest, _ASIDE, "it is made again from the commits", needs_launch=True)


def _repair_plan(layout: RunLayout) -> Iterator[Repaired]:
    fences = fences_path(layout)
    if not _is_whole(lambda: check_sealed(fences, ARROW_END)):
        _set_aside(layout, fences)
        yield Repaired(fences, _ASIDE, "it is made again from the plan of the run that is reused", needs_launch=True)
    if not _is_whole(lambda: _read_json(layout.plan_record)):
        try:
            mend_record(layout)
            yield Repaired(layout.plan_record, _MADE, "from the plans of the shards")
        except FileDamaged:
            yield Repaired(
                layout.plan_record, _LEFT, "the plans of the shards were cleaned; only commands that show need it"
            )
    for path in set_plan_aside(layout):
        yield Repaired(path, _ASIDE, "the plan is made again from the input, which must be the same", True)


def _repair_shards(layout: RunLayout) -> Iterator[Repaired]:
    for shard in list_committed_shards(layout):
        try:
            commit = read_commit(layout, shard)
        except FileDamaged:
            yield _answer_again(layout, shard, layout.shard_commit(shard))
            continue
        if commit is not None and (damaged := _find_damaged_tables(layout, commit)):
            try:
                for table in TABLES:
                    if (source := open_committed(layout, commit, table)) is not None:
                        source.close()
            except CommitError:
                yield _answer_again(layout, shard, damaged[0])
                continue
            for path in damaged:
                _set_aside(layout, path)
            publish_shard(commit, layout)
            for path in damaged:
                yield Repaired(path, _MADE if storage.exists(path) else _ASIDE, "its other copy is whole")


def _find_damaged_tables(layout: RunLayout, commit: ShardCommit) -> list[str]:
    """Files of a committed shard that are there and not what was committed, or that are nowhere."""
    damaged: list[str] = []
    for file in commit.files:
        paths = (layout.published_file(file.table, commit.shard), storage.join(layout.output, file.path))
        there = [path for path in paths if storage.exists(path)]
        damaged += [path for path in there if not _is_whole(partial(read_checked, path, file.sha256))]
        if not there:
            damaged.append(paths[0])
    return damaged


def _answer_again(layout: RunLayout, shard: str, path: str) -> Repaired:
    """Take a shard's commit back; its tables go with it, since other ones take their place."""
    _set_aside(layout, layout.shard_commit(shard))
    for table in TABLES:
        published = layout.published_file(table, shard)
        if storage.exists(published):
            _set_aside(layout, published)
    num_kept = sum(entry.is_answer for entry in read_journal(layout, shard).entries)
    kept = (
        f"{num_kept} of its answers are in its journal and not paid again" if num_kept else "its model is asked again"
    )
    return Repaired(path, _ASIDE, f"shard {shard} is answered again; {kept}", needs_launch=True)


def _find_journal_damage(layout: RunLayout) -> Iterator[Repaired]:
    for shard in list_journaled_shards(layout):
        if num_damaged := read_journal(layout, shard).num_damaged:
            note = f"{num_damaged} answers in it cannot be read; those that no ledger has are asked for again"
            yield Repaired(layout.shard_journal(shard), _LEFT, note)


def _find_frame_damage(layout: RunLayout) -> Iterator[Repaired]:
    for path, _ in _list_files(layout.frames):
        if not _is_whole(lambda path=path: check_frame(path)):
            yield Repaired(path, _LEFT, "run_job, with the same data, writes it again")


def _list_files(folder: str) -> list[tuple[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        return [*storage.list_files(folder)]
    return []
