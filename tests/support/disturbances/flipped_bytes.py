"""Small runs one bit of whose files is flipped: what every reader of the folder then says, held against the truth."""

import contextlib
import json
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.notebook.run_job import read_answers
from moebeam.jobs.output.batch_export import export_batch
from moebeam.jobs.output.run_record import RetryOf, read_record
from moebeam.jobs.output.status import read_status
from moebeam.jobs.quotes.earlier_run import read_earlier_run
from moebeam.jobs.reports.reconcile import add_up_ledger
from moebeam.jobs.reports.report import make_report, require_run
from moebeam.jobs.run.retry_failed import read_rejected_rows
from moebeam.schemas.errors import JobError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.reuse import EarlierAnswers, ReuseSource, write_fences
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.sorted_runs import read_rows
from tests.support.disturbances.stopped_run import NUM_ROWS, Engine, PlannedRun

Verdict: TypeAlias = Literal["equal", "told", "named", "unnamed", "crash", "silent"]
"""What a reader made of a flip, from best to worst.

equal: the right figures. told: other ones, and the same reader counts damaged lines or warns of the file. named: an
error that names the file. unnamed: an error that does not. crash: no error for people. silent: other figures, and no
word.
"""

VERDICTS: tuple[Verdict, ...] = ("equal", "told", "named", "unnamed", "crash", "silent")
FINE: frozenset[Verdict] = frozenset({"equal", "told", "named"})

_VOLATILE = ("last_sign_s", "output", "workers")
_OF_AN_ATTEMPT = ("journal", "accelerator_s")


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of one file, by its path below the output folder."""

    path: str
    place: int
    bit: int

    def apply(self, output: Path) -> None:
        """Flip the bit; links to the file are flipped with it."""
        with (output / self.path).open("r+b") as file:
            file.seek(self.place)
            (byte,) = file.read(1)
            file.seek(self.place)
            file.write(bytes([byte ^ 1 << self.bit]))


def pick_flips(output: Path, num_per_kind: int, seed: int) -> list[Flip]:
    """Some flips of each kind of file."""
    by_kind: dict[str, list[tuple[str, int]]] = {}
    for path, size in file_sizes(output).items():
        by_kind.setdefault(kind_of(path), []).extend((path, place) for place in range(size))
    dice = random.Random(seed)
    return [
        Flip(path, place, dice.randrange(8))
        for kind in sorted(by_kind)
        for path, place in dice.sample(by_kind[kind], num_per_kind)
    ]


def kind_of(path: str) -> str:
    """The kind of a file: its folder, or its own name where it stands alone."""
    folder = path.rpartition("/")[0]
    name = path.rpartition("/")[2]
    if "/journal/" in path:
        return "journal"
    if "/plan" in path and name.endswith(".arrow"):
        return "plan of a shard"
    return folder.rpartition("/")[2] if folder not in ("", "_moebeam") and name != "plan.json" else name


def file_sizes(output: Path) -> dict[str, int]:
    """Bytes of each file by its path below the output folder, sorted."""
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output).as_posix(): path.stat().st_size for path in files}


@dataclass
class FlippedRun:
    """A run that every reader can look at, before and after flips.

    Attributes:
        is_complete: whether it is finished; else readers also finish it.
        truth: what each reader says of the undamaged run.
    """

    run: PlannedRun
    encoder: Any
    is_complete: bool
    truth: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def learn(self, folder: Path) -> "FlippedRun":
        """Look at an undamaged copy."""
        with tempfile.TemporaryDirectory(dir=folder) as made:
            self.truth = dict(self._look(self.run.copy(Path(made) / "out")))
        wrong = {name: said for name, said in self.truth.items() if isinstance(said, Exception)}
        assert not wrong, wrong
        return self

    def judge(self, flips: Sequence[Flip], folder: Path) -> dict[str, tuple[Verdict, str]]:
        """What each reader makes of a copy with flips, and its words."""
        with tempfile.TemporaryDirectory(dir=folder) as made:
            copy = self.run.copy(Path(made) / "out")
            for flip in flips:
                flip.apply(copy.output)
            told = list[str]()
            with _keep_warnings(told):
                found: dict[str, tuple[Verdict, str]] = {}
                for name, one in self._look(copy):
                    found[name] = self._compare(name, one, flips, told)
                    told.clear()
        return found

    def _compare(self, name: str, said: Any, flips: Sequence[Flip], warnings: Sequence[str]) -> tuple[Verdict, str]:
        names = {flip.path.rpartition("/")[2] for flip in flips}
        if isinstance(said, Exception):
            text = f"{type(said).__name__}: {said}"
            if not isinstance(said, JobError):
                return "crash", text
            return ("named" if any(one in text for one in names) else "unnamed"), text
        if said == self.truth[name]:
            return "equal", ""
        # Of a journal its shard's folder is named.
        marks = {*names, *(f"/{flip.path.rpartition('/')[0]}: " for flip in flips)}
        is_told = isinstance(said, dict) and bool(cast("dict[str, Any]", said).get("num_damaged"))
        is_told = is_told or any(mark in warning for warning in warnings for mark in marks)
        return ("told" if is_told else "silent"), _difference(said, self.truth[name])

    def _look(self, run: PlannedRun) -> Iterator[tuple[str, Any]]:
        for name, reader in (READERS_OF_COMPLETE if self.is_complete else READERS_OF_STOPPED).items():
            try:
                yield name, json.loads(json.dumps(reader(run, self.encoder), default=str, sort_keys=True))
            except Exception as error:
                yield name, error


class _Kept(logging.Handler):
    def __init__(self, words: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._words = words

    def emit(self, record: logging.LogRecord) -> None:
        self._words.append(record.getMessage())


@contextlib.contextmanager
def _keep_warnings(words: list[str]) -> Generator[None]:
    """Collect what the product warns of."""
    handler, logger = _Kept(words), logging.getLogger("moebeam")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _difference(said: Any, truth: Any) -> str:
    one, other = json.dumps(said), json.dumps(truth)
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"…{one[max(0, place - 60) : place + 40]}… instead of …{other[max(0, place - 20) : place + 40]}…"


def _status(run: PlannedRun, encoder: Any) -> Any:
    told = read_status(read_record(str(run.output))).to_json()
    account: Any = told["account"] or {}
    return {
        "num_damaged": account.get("num_damaged_journal_lines"),
        **{name: value for name, value in told.items() if name not in _VOLATILE},
    }


def _report(run: PlannedRun, encoder: Any) -> Any:
    made: Any = make_report(read_record(str(run.output)), by="tenant,day,outcome").to_json()
    damaged = [row["value"] for row in made["run"] if row["what"] == "lines of journals that cannot be read"]
    return {**made, "output": "", "num_damaged": damaged}


def _export(run: PlannedRun, encoder: Any) -> Any:
    made = export_batch(read_record(str(run.output)), str(run.output.parent / "batch"), is_partial=True)
    files = [Path(path).read_text() for path in (made.output_file, made.error_file)]
    return {"num_damaged": made.num_damaged, "files": files}


def _bill(run: PlannedRun, encoder: Any) -> Any:
    found, _ = require_run(run.layout)
    sums, num_unpriced = add_up_ledger(found.read_ledgers(), utc_offset=timedelta())
    return {"num_damaged": found.account.num_damaged, "sums": sorted(map(str, sums.items())), "unpriced": num_unpriced}


def _answers(run: PlannedRun, encoder: Any) -> Any:
    return read_answers(run.layout, is_finished=False).to_pylist()


def _earlier(run: PlannedRun, encoder: Any) -> Any:
    return str(read_earlier_run(str(run.output))).replace(str(run.output), "")


def _reuse(run: PlannedRun, encoder: Any) -> Any:
    """What a run with the same plan would take over."""
    layout = RunLayout(str(run.output.parent / "reusing"))
    write_fences(run.layout, layout)
    found: list[Any] = []
    plan = read_plan(run.layout)
    assert plan is not None
    answers = EarlierAnswers.load(ReuseSource(str(run.output), "earlier"), layout)
    for shard in plan.shards:
        table = read_rows(run.layout.shard_plan(shard.shard))
        asked = [row for row, error in enumerate(table.column("error_type").to_pylist()) if error is None]
        found += [[row, str(answer)] for row, answer in sorted(answers.find_answers(table, asked).items())]
    return found


def _retry(run: PlannedRun, encoder: Any) -> Any:
    kinds = ("refused", "invalid_json")
    rows = list(read_rejected_rows(read_record(str(run.output)), RetryOf(str(run.output), "earlier", kinds)))
    return pa.concat_tables(rows).to_pylist() if rows else []


def _finish(run: PlannedRun, encoder: Any) -> Any:
    """Answer what is left, and read the tables with other means."""
    ended = run.launch(Engine(), encoder)
    tables = {
        name: pq.read_table(run.output / name).sort_by([("source_row", "ascending")]) for name in ("results", "rejects")
    }
    ledger = pq.read_table(run.output / "ledger").drop_columns(list(_OF_AN_ATTEMPT))
    order = [(name, "ascending") for name in ("source_row", "attempt", "outcome", "cost")]
    return [ended, *(table.to_pylist() for table in tables.values()), ledger.sort_by(order).to_pylist()]


Reader: TypeAlias = Callable[[PlannedRun, Any], Any]
_READERS: dict[str, Reader] = {
    "status": _status,
    "report": _report,
    "export": _export,
    "reconcile": _bill,
    "answers": _answers,
}
READERS_OF_COMPLETE: dict[str, Reader] = {**_READERS, "estimate": _earlier, "reuse": _reuse, "retry": _retry}
READERS_OF_STOPPED: dict[str, Reader] = {**_READERS, "finish": _finish}


def make_runs(folder: Path, checkpoint: Path, encoder: Any, num_rows: int = NUM_ROWS) -> dict[str, FlippedRun]:
    """A finished run; one stopped in order; one killed when something was committed and nothing was published."""
    dice = random.Random(7)
    planned = PlannedRun.plan(folder, checkpoint, num_rows)
    complete, stopped, killed = (planned.copy(folder / name) for name in ("complete", "stopped", "killed"))
    assert complete.launch(Engine(), encoder) == "done"
    stopped.stop(Engine(num_left=19), encoder)
    killed.launch(Engine(num_left=20), encoder)
    killed.journal_again(dice)
    return {
        "complete": FlippedRun(complete, encoder, is_complete=True).learn(folder),
        "stopped": FlippedRun(stopped, encoder, is_complete=False).learn(folder),
        "killed": FlippedRun(killed, encoder, is_complete=False).learn(folder),
    }


@dataclass
class Tally:
    """Counts of flips by the worst verdict of any reader, and the words of the first of each bad kind."""

    by_kind: dict[str, Counter[str]] = field(default_factory=dict[str, "Counter[str]"])
    examples: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, flip: Flip, found: Mapping[str, tuple[Verdict, str]]) -> None:
        reader = max(found, key=lambda name: VERDICTS.index(found[name][0]))
        verdict, words = found[reader]
        self.by_kind.setdefault(kind_of(flip.path), Counter())[verdict] += 1
        if verdict not in FINE:
            self.examples.setdefault(f"{verdict}: {kind_of(flip.path)}, {reader}", f"{flip}: {words}")

    @property
    def totals(self) -> Counter[str]:
        return sum(self.by_kind.values(), Counter[str]())
