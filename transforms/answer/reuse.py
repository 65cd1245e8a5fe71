"""Reuse: takes answers from an earlier run instead of asking again.

Part of *answer*, before *run*. Both runs' plans are in token order, so one shard's requests lie in a few neighbouring
shards of the earlier run. Fences, the first and last key of each earlier shard, say which; no set of ids or digests is
held, however large the runs are.
"""

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.arrow import list_values
from moebeam.schemas.errors import CommitError
from moebeam.schemas.records import parse_sampling_json
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.commit import open_committed, read_commit
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.row_order import ORIGIN, list_origins
from moebeam.transforms.plan.sorted_runs import read_rows, write_rows

MAX_FENCE_BYTES = 256
"""Bytes of a key that a fence keeps; shards whose fences agree up to there are both searched."""

NUM_HELD_SHARDS = 4

ANSWER_COLUMNS = (
    "output_text",
    "output_json",
    "reasoning_content",
    "tool_calls",
    "finish_reason",
    "provider_finish_reason",
    "provider",
    "model",
    "model_revision",
    "logprobs",
    "top_logprobs",
    "repaired",
)
"""Result columns to take over; null where tables of an older version lack one. Costs are not among them: the earlier
run paid."""

_FENCES = pa.schema([("shard", pa.string()), ("first", pa.binary()), ("last", pa.binary())])
_RequestKey: TypeAlias = tuple[bytes, str, str | None, str, int]
"""Prompt, sampling, options, the row's id and the sample. Greedy requests have no id and sample 0, since any answer to
an equal one is theirs; of sampled ones each has its own."""

_ANY_ROW = ""


@dataclass(frozen=True, slots=True)
class ReuseSource:
    """The finished run to take answers from."""

    output: str
    run_id: str


@dataclass(frozen=True, slots=True)
class EarlierAnswer:
    """A row of an earlier run's results.

    Attributes:
        values: by the names in `ANSWER_COLUMNS`.
        reused_from: that row, as `run_id/custom_id`.
    """

    values: Mapping[str, Any]
    reused_from: str


def fences_path(layout: RunLayout) -> str:
    """Path of the earlier run's fences in this run's plan folder; like plans, they hold the beginnings of prompts."""
    return storage.join(layout.plan, "reuse-fences.arrow")


def write_fences(source: RunLayout, layout: RunLayout) -> None:
    """Read the first and last key of every shard of a finished run, and store them with this run's plan.

    Raises:
        FileNotFoundError: the finished run's plan is gone.
        OSError: a store failed.
    """
    plan = read_plan(source)
    if plan is None:
        raise FileNotFoundError(source.plan_record)
    rows: list[tuple[str, bytes, bytes]] = []
    for shard in plan.shards:
        if shard.num_requests:
            planned = read_rows(source.shard_plan(shard.shard), ["prefix_key"])
            keys = [key for key in list_values(planned, "prefix_key") if key is not None]
            rows.append((shard.shard, min(keys)[:MAX_FENCE_BYTES], max(keys)[:MAX_FENCE_BYTES]))
    rows.sort(key=lambda row: row[1])
    arrays = [pa.array([row[place] for row in rows], field.type) for place, field in enumerate(_FENCES)]
    write_rows(fences_path(layout), pa.Table.from_arrays(arrays, schema=_FENCES))


@dataclass(slots=True)
class EarlierAnswers:
    """Answers of one earlier run, loaded shard by shard on demand.

    Attributes:
        fences: the table that `write_fences` wrote.
    """

    source: ReuseSource
    fences: pa.Table
    _firsts: list[bytes] = field(init=False)
    _lasts: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._firsts, self._lasts = list_values(self.fences, "first"), list_values(self.fences, "last")

    @classmethod
    def load(cls, source: ReuseSource, layout: RunLayout) -> "EarlierAnswers":
        """Read a run's fences, cached so that its shards share them.

        Raises:
            OSError: the store failed.
        """
        return _earlier_answers(source, fences_path(layout))

    def find_answers(self, table: pa.Table, asked: Iterable[int]) -> dict[int, EarlierAnswer]:
        """Earlier answers to rows of a shard's plan, by row; rows without one are absent.

        Args:
            asked: rows of `table`, which has `moebeam.schemas.tables.plan_schema`.
        Raises:
            CommitError: tables and plan of the earlier run are damaged, or contradict each other.
            OSError: a store failed.
        """
        requests = _list_requests(table)
        wanted = {row: requests[row] for row in asked}
        num_equal = Counter(map(_of_any_row, requests))
        found: dict[int, EarlierAnswer] = {}
        if not wanted:
            return found
        lowest, highest = min(key for key, *_ in wanted.values()), max(key for key, *_ in wanted.values())
        for shard in self._shards(lowest, highest):
            answers = _read_answers(self.source, shard)
            for row, request in wanted.items():
                # Rows of one request that is sampled must not all take one answer; a row alone may take any.
                is_alone = num_equal[_of_any_row(request)] == 1
                answer = answers.get(request) or (answers.get(_of_any_row(request)) if is_alone else None)
                if row not in found and answer is not None:
                    found[row] = answer
        return found

    def _shards(self, lowest: bytes, highest: bytes) -> Iterator[str]:
        """Shards that may hold keys from `lowest` to `highest`, in order."""
        names = self.fences.column("shard")
        start = bisect_left(self._lasts, lowest[:MAX_FENCE_BYTES])
        stop = bisect_right(self._firsts, highest[:MAX_FENCE_BYTES])
        for position in range(start, stop):
            yield names[position].as_py()


@lru_cache(maxsize=2)
def _earlier_answers(source: ReuseSource, path: str) -> EarlierAnswers:
    return EarlierAnswers(source, read_rows(path))


@lru_cache(maxsize=NUM_HELD_SHARDS)
def _read_answers(source: ReuseSource, shard: str) -> dict[_RequestKey, EarlierAnswer]:
    """Valid answers of one earlier shard, by request; of merged rows, the first one's."""
    layout = RunLayout(source.output)
    path = layout.published_file("results", shard)
    if (commit := read_commit(layout, shard)) is None:
        raise CommitError(f"{layout.shard_commit(shard)}: expected the commit of a finished run, found no such file")
    if (file := open_committed(layout, commit, "results")) is None:
        return {}  # all its rows were rejected
    with file:
        parquet = pq.ParquetFile(file)
        wanted = ("custom_id", *ORIGIN, *ANSWER_COLUMNS)
        results = parquet.read([name for name in wanted if name in parquet.schema_arrow.names])
    row_of = {place: row for row, place in enumerate(list_origins(results))}
    missing: list[Any] = [None] * results.num_rows
    columns = {
        name: list_values(results, name) if name in results.schema.names else missing
        for name in ("custom_id", *ANSWER_COLUMNS)
    }
    planned = read_rows(layout.shard_plan(shard), (*ORIGIN, *_REQUEST))
    answers: dict[_RequestKey, EarlierAnswer] = {}
    num_found = 0
    for place, request in zip(list_origins(planned), _list_requests(planned), strict=True):
        row = row_of.get(place)
        if row is None:
            continue
        num_found += 1
        answer = EarlierAnswer(
            {name: columns[name][row] for name in ANSWER_COLUMNS}, f"{source.run_id}/{columns['custom_id'][row]}"
        )
        answers.setdefault(request, answer)
        answers.setdefault(_of_any_row(request), answer)
    if num_found != results.num_rows:
        raise CommitError(
            f"{path}: expected the rows of {layout.shard_plan(shard)}, found {results.num_rows - num_found} others"
        )
    return answers


_REQUEST = ("prefix_key", "sampling", "options", "custom_id")


def _list_requests(planned: pa.Table) -> list[_RequestKey]:
    """What makes answers interchangeable, of each row of a plan; of a reject a key that no request has."""
    samplings = list_values(planned, "sampling")
    greedy = {text: text is None or parse_sampling_json(text).is_greedy for text in set(samplings)}
    columns = (list_values(planned, name) for name in (*_REQUEST, "sample"))
    return [
        (key, sampling, options, _ANY_ROW, 0) if greedy[sampling] else (key, sampling, options, custom_id, sample)
        for key, sampling, options, custom_id, sample in zip(*columns, strict=True)
    ]


def _of_any_row(request: _RequestKey) -> _RequestKey:
    return (*request[:3], _ANY_ROW, request[4])


def parse_output(answer: EarlierAnswer) -> Any:
    """An answer's JSON value, for the typed column; None if it is not JSON."""
    text = answer.values["output_json"]
    return None if text is None else json.loads(text)
