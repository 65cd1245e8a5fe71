"""Two runs side by side: `moebeam compare A B`, from their output folders alone.

Rows are matched by id and sample, and differ where status, error, calls, JSON, text or reasoning do. Beside them stand
what both runs cost, how fast they were, what their engines promise, and in what their jobs differ.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.compare.answers import KINDS, Difference, Kind, find_differences
from moebeam.jobs.compare.job_differences import JobDifference, find_job_differences
from moebeam.jobs.compare.joined_rows import Pair, Row, RunRows, input_order, join_rows
from moebeam.jobs.compare.run_figures import RunFigures, list_figures, read_figures
from moebeam.jobs.console.report_table import Column, ReportTable
from moebeam.jobs.output.current_run import read_current_run
from moebeam.jobs.output.run_record import RunRecord
from moebeam.schemas.canonical import Json
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.errors import CommitError, OutputError
from moebeam.schemas.redaction.hide import hide_in_message
from moebeam.schemas.store.streamed_file import streamed_file

_SIDES = ("status", "error_type", "output_text", "output_json", "tool_calls", "reasoning_content")
DIFFERENCE_SCHEMA = pa.schema(
    [
        pa.field("custom_id", pa.string()),
        pa.field("sample", pa.int32()),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("kinds", pa.list_(pa.string())),
        pa.field("place", pa.string()),
        *(pa.field(f"{name}_{side}", pa.large_string()) for name in _SIDES for side in ("a", "b")),
    ]
)
"""A row that differs: in what, where first, and what both runs have; null on the side of a run that lacks the row."""

_BATCH_ROWS = 1024
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DifferentRow:
    """A row that differs; `differences` are in the order of `KINDS`, at least one."""

    row: Row
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Json]:
        row = self.row
        return {
            "custom_id": row.custom_id,
            "sample": row.sample,
            "source_file": row.source_file,
            "source_row": row.source_row,
            "differences": [
                {**asdict(each), "a": hide_in_message(each.a), "b": hide_in_message(each.b)}
                for each in self.differences
            ],
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        num_equal, num_different: rows that both runs have.
        num_alone: rows that one run has.
        num_by_kind: rows that differ in each of `KINDS`; one may differ in several.
        rows: the first ones that differ, in the order of the input.
        verdict: on one line, what the difference of the rows may come from.
    """

    a: RunFigures
    b: RunFigures
    jobs: tuple[JobDifference, ...]
    num_equal: int
    num_different: int
    num_alone: int
    num_by_kind: Mapping[Kind, int]
    rows: tuple[DifferentRow, ...]
    verdict: str

    @property
    def is_same(self) -> bool:
        """Whether both runs have the same rows and say the same to each."""
        return not self.num_by_kind

    @property
    def num_written(self) -> int:
        """Lines of the file of all rows that differ."""
        return self.num_different + self.num_alone

    def to_json(self) -> dict[str, Json]:
        """All of it as JSON values."""
        return {
            "num_equal": self.num_equal,
            "num_different": self.num_different,
            "num_alone": self.num_alone,
            "num_by_kind": {**self.num_by_kind},
            "verdict": self.verdict,
            "jobs": [
                {**asdict(each), "a": hide_in_message(each.a), "b": hide_in_message(each.b)} for each in self.jobs
            ],
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "rows": [row.to_json() for row in self.rows],
        }

    def tables(self) -> Iterator[ReportTable]:
        """The same for people."""
        text = ("text", "text", "text")
        yield _table("runs", "The runs", ("figure", "a", "b"), list(list_figures(self.a, self.b)), text)
        if self.jobs:
            jobs = [(each.name, hide_in_message(each.a), hide_in_message(each.b)) for each in self.jobs]
            yield _table("jobs", "What differs in the jobs", ("key", "a", "b"), jobs, text)
        counts = [("equal", self.num_equal), ("different", self.num_different), *self.num_by_kind.items()]
        yield _table("differences", "Rows", ("rows", "count"), counts, ("text", "count"))
        if self.rows:
            rows = [
                (
                    row.row.custom_id or "",
                    row.row.sample,
                    each.kind,
                    each.place,
                    *map(hide_in_message, (each.a, each.b)),
                )
                for row in self.rows
                for each in row.differences
            ]
            names = ("custom_id", "sample", "differs in", "place", "a", "b")
            title = f"The first {len(self.rows):,} rows that differ"
            yield _table("rows", title, names, rows, ("text", "count", "text", "text", "text", "text"))


def _table(name: str, title: str, names: Sequence[str], rows: Sequence[Any], kinds: Sequence[Any]) -> ReportTable:
    columns = tuple(Column(name, kind) for name, kind in zip(names, kinds, strict=True))
    return ReportTable(name, title, columns, tuple(tuple(row) for row in rows))


def compare_runs(a: RunRecord, b: RunRecord, *, num_shown: int = 10, target: str | None = None) -> Comparison:
    """Compare two runs, finished or not; memory holds a part of the rows.

    Args:
        num_shown: how many of the rows that differ the comparison holds.
        target: Parquet file, on disk or in an object store, for all rows that differ, in `DIFFERENCE_SCHEMA`.
    Raises:
        OutputError: nothing is planned yet in one of them, a table is damaged, or `target` cannot be written.
    """
    manifest_a, figures_a = _read_run(a)
    manifest_b, figures_b = _read_run(b)
    num_by_kind: Counter[Kind] = Counter()
    num_rows = Counter[bool]()

    def differing(write: "Callable[[Pair, DifferentRow], None] | None") -> Iterator[DifferentRow]:
        for pair in join_rows(RunRows.find(a.layout), RunRows.find(b.layout)):
            found = tuple(_compare(pair))
            if pair.a is not None and pair.b is not None:
                num_rows[not found] += 1
            if found:
                different = DifferentRow(pair.some, found)
                num_by_kind.update(each.kind for each in found)
                if write is not None:
                    write(pair, different)
                yield different

    try:
        with _difference_file(target) as write:
            rows = heapq.nsmallest(num_shown, differing(write), key=lambda one: input_order(one.row))
    except OSError as error:
        what = f"{a.layout.output} and {b.layout.output} cannot be compared"
        raise OutputError(f"{what if target is None else f'{what} into {target}'}: {error}") from error
    jobs = find_job_differences(a, b, manifest_a, manifest_b)
    return Comparison(
        figures_a,
        figures_b,
        tuple(jobs),
        num_equal=num_rows[True],
        num_different=num_rows[False],
        num_alone=num_by_kind["only_a"] + num_by_kind["only_b"],
        num_by_kind={kind: num_by_kind[kind] for kind in KINDS if num_by_kind[kind]},
        rows=tuple(rows),
        verdict=_judge(bool(num_by_kind), bool(jobs), figures_a.determinism, figures_b.determinism),
    )


def _read_run(record: RunRecord) -> tuple[dict[str, Any], RunFigures]:
    layout = record.layout
    try:
        run = read_current_run(layout)
        if run.manifest is None:
            raise OutputError(
                f"{layout.manifest}: expected the manifest of a run, or its plan, found neither; moebeam status "
                f"{layout.output} shows how far it is"
            )
        return run.manifest, read_figures(run, run.manifest)
    except (CommitError, OSError) as error:
        raise OutputError(f"{layout.output}: cannot be looked at: {error}") from error


def _compare(pair: Pair) -> Iterator[Difference]:
    if pair.a is None or pair.b is None:
        has_a = pair.a is not None
        answer = pair.some.answer
        yield Difference(
            "only_a" if has_a else "only_b", "", *((str(answer.status), "") if has_a else ("", str(answer.status)))
        )
    else:
        yield from find_differences(pair.a.answer, pair.b.answer)


def _judge(is_different: bool, is_other_job: bool, a: Determinism | None, b: Determinism | None) -> str:
    """What the difference of the rows, or that there is none, may come from."""
    promises = [promise for promise in (a, b) if promise is not None]
    told = "; ".join(dict.fromkeys(promise.describe() for promise in promises)) or "no engine said what it promises"
    if not is_different:
        return f"the runs say the same; promised is {told}"
    if is_other_job:
        return f"the jobs differ, see above; promised for one job is {told}"
    if len(promises) == 2 and all(promise.promise != "none" for promise in promises):
        return f"the jobs are the same, and more was promised: {told}"
    return f"the jobs are the same, and no more was promised: {told}"


@contextmanager
def _difference_file(target: str | None) -> Generator["Callable[[Pair, DifferentRow], None] | None"]:
    """What writes a row that differs; the file appears when the block ends. None where none is asked for."""
    if target is None:
        yield None
        return
    with TemporaryDirectory(prefix="moebeam-compare-") as folder:
        path = Path(folder) / "differences.parquet"
        waiting: list[dict[str, Any]] = []
        with pq.ParquetWriter(str(path), DIFFERENCE_SCHEMA, compression="zstd") as writer:

            def write(pair: Pair, different: DifferentRow) -> None:
                waiting.append(_difference_line(pair, different))
                if len(waiting) == _BATCH_ROWS:
                    flush()

            def flush() -> None:
                if waiting:
                    writer.write_table(pa.Table.from_pylist(waiting, schema=DIFFERENCE_SCHEMA))
                    waiting.clear()

            yield write
            flush()
        with streamed_file(target) as write_piece, path.open("rb") as source:
            while piece := source.read(_COPY_BYTES):
                write_piece(piece)


def _difference_line(pair: Pair, different: DifferentRow) -> dict[str, Any]:
    row = different.row
    line: dict[str, Any] = {
        "custom_id": row.custom_id,
        "sample": row.sample,
        "source_file": row.source_file,
        "source_row": row.source_row,
        "kinds": [each.kind for each in different.differences],
        "place": different.differences[0].place or None,
    }
    for side, found in (("a", pair.a), ("b", pair.b)):
        if found is not None:
            said = found.answer
            values = (said.status, said.error_type, said.text, said.json, said.calls_json, said.reasoning)
            line.update({f"{name}_{side}": value for name, value in zip(_SIDES, values, strict=True)})
    return line
