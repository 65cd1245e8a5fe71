"""Each byte of a file flipped in place, and the file read by the one function of the product that reads its kind.

A reader that verifies a file before anything else sees it cannot pass on what is wrong in it. So a run's readers need
not all look at every flip: it takes a millisecond, not seconds, and every byte of a run can be flipped.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from moebeam.jobs.output.run_record import read_input_record, read_record
from moebeam.schemas.errors import JobError
from moebeam.schemas.store.checked_file import open_checked
from moebeam.schemas.store.record_json import read_note
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_file import PARQUET_END, check_sealed
from moebeam.transforms.durable.commit import read_commit, read_commits
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.durable.lease import Lease
from moebeam.transforms.durable.progress import ShardProgress
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.sorted_runs import read_rows
from moebeam.transforms.publish.manifest import mend_views
from moebeam.transforms.publish.manifest_file import read_manifest_file
from moebeam.transforms.publish.publish_spec import read_spec
from tests.support.disturbances.flipped_bytes import Flip, file_sizes, kind_of

Found: TypeAlias = Literal["equal", "named", "counted", "absent", "unnamed", "crash", "silent"]
"""What the reader made of a flip.

equal: the same content. named: an error for people that names the file. counted: a journal's lines that cannot be read
are counted. absent: a note that may be lost at any time is taken for lost. unnamed: an error without the file. crash:
no error for people. silent: other content, and no word.
"""

FINE_ALONE: frozenset[str] = frozenset({"equal", "named", "counted", "absent"})

_NOTES: dict[str, type[Any]] = {"progress": ShardProgress, "leases": Lease}


@dataclass
class TallyAlone:
    """Counts by kind of file, and one example of each verdict that is not fine."""

    by_kind: dict[str, Counter[str]] = field(default_factory=dict[str, "Counter[str]"])
    examples: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def totals(self) -> Counter[str]:
        return sum(self.by_kind.values(), Counter[str]())


def flip_each_byte(output: Path, seed: int, *, num_per_file: int = 0) -> TallyAlone:
    """Flip one bit of each byte of each file of a run, one after the other; each is put back.

    Args:
        num_per_file: bytes of each file, drawn at random; 0 is all.
    Raises:
        ValueError: a file of the run is of no known kind.
    """
    dice, tally = random.Random(seed), TallyAlone()
    readers = dict(find_readers(output))
    for path, size in file_sizes(output).items():
        read, content = readers[path], (output / path).read_bytes()
        truth = read()
        counts = tally.by_kind.setdefault(kind_of(path), Counter())
        places = range(size) if not num_per_file else dice.sample(range(size), min(size, num_per_file))
        for place in places:
            flip = Flip(path, place, dice.randrange(8))
            flip.apply(output)
            found, words = _judge(read, truth, Path(path).name)
            # Not flipped back: the reader may have mended it.
            with (output / path).open("r+b") as file:
                file.seek(place)
                file.write(content[place : place + 1])
            counts[found] += 1
            if found not in FINE_ALONE:
                tally.examples.setdefault(f"{found}: {kind_of(path)}", f"{flip}: {words}")
        if read() != truth:
            raise ValueError(f"{path}: expected the content from before the flips")
    return tally


def _judge(read: Callable[[], object], truth: object, name: str) -> tuple[Found, str]:
    try:
        said = read()
    except JobError as error:
        return ("named" if name in str(error) else "unnamed"), str(error)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    if said == truth:
        return "equal", ""
    if said is None:
        return "absent", ""
    if isinstance(said, _Journal) and said.num_damaged:
        return "counted", ""
    return "silent", str(said)[:200]


@dataclass(frozen=True, slots=True)
class _Journal:
    entries: tuple[str, ...]
    num_damaged: int


def find_readers(output: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each file of a run, with what reads it.

    Raises:
        ValueError: a file is of no known kind.
    """
    layout = RunLayout(str(output))
    digests = _find_digests(layout)
    for path in file_sizes(output):
        whole, stem, kind = str(output / path), Path(path).stem, kind_of(path)
        if path in digests:
            yield path, lambda whole=whole, digest=digests[path]: open_checked(whole, digest).close()
        elif kind == "journal":
            yield path, lambda shard=Path(path).parent.name: _read_journal(layout, shard)
        elif kind == "plan of a shard":
            yield path, lambda whole=whole: read_rows(whole).to_pylist()
        elif kind == "commits":
            yield path, lambda shard=stem: read_commit(layout, shard)
        elif kind in _NOTES:
            yield path, lambda whole=whole, record=_NOTES[kind]: read_note(whole, record)
        elif path == "views.sql":
            # Nothing of moebeam reads it; `moebeam repair` writes what differs again.
            yield path, lambda whole=whole: (mend_views(layout), Path(whole).read_bytes())[1]
        elif kind == "wasted":
            yield path, lambda whole=whole: check_sealed(whole, PARQUET_END)
        elif path in _RECORDS:
            yield path, lambda read=_RECORDS[path]: read(layout)
        else:
            raise ValueError(f"{path}: expected a file of a known kind")


_RECORDS: dict[str, Callable[[RunLayout], object]] = {
    "manifest.json": read_manifest_file,
    "_moebeam/job.json": lambda layout: read_record(layout.output),
    "_moebeam/input.json": read_input_record,
    "_moebeam/plan/plan.json": read_plan,
    "_moebeam/publish.json": lambda layout: str(read_spec(layout)),
}


def _read_journal(layout: RunLayout, shard: str) -> _Journal:
    content = read_journal(layout, shard)
    return _Journal(tuple(map(str, content.entries)), content.num_damaged)


def _find_digests(layout: RunLayout) -> dict[str, str]:
    """SHA-256 of each table that a commit or the manifest names, by its path below the output folder."""
    digests: dict[str, str] = {}
    for commit in read_commits(layout).values():
        for file in commit.files:
            digests[file.path] = digests[layout.relative(layout.published_file(file.table, commit.shard))] = file.sha256
    manifest = read_manifest_file(layout)
    for files in () if manifest is None else manifest["files"].values():
        digests.update({file["path"]: file["sha256"] for file in files})
    return digests
