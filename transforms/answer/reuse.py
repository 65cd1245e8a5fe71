"""Reuse: requests that an earlier run answered are taken over instead of asked.

Stands in the *answer* stage, before *run*. Plans are in token order, the earlier run's as well as this one's; so the
requests of one shard lie in few of the earlier shards, next to each other. The fences, the first and last key of each
earlier shard, say in which; no set of ids or digests is held, however large the runs are.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.arrow import values_of
from moebeam.schemas.errors import CommitError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.sorted_runs import read_rows, write_rows

MAX_FENCE_BYTES = 256
"""A fence keeps so much of a key; shards whose fences touch there are looked at both."""

NUM_HELD_SHARDS = 4

ANSWER_COLUMNS = (
    "output_text",
    "output_json",
    "reasoning_content",
    "tool_calls",
    "finish_reason",
    "provider",
    "model",
    "model_revision",
    "logprobs",
)
"""What is taken over of a row of results; what it cost was paid once, by the earlier run."""

_FENCES = pa.schema([("shard", pa.string()), ("first", pa.binary()), ("last", pa.binary())])
_RequestKey: TypeAlias = tuple[bytes, str, str | None]


@dataclass(frozen=True, slots=True)
class ReuseSource:
    """The finished run whose answers are taken over."""

    output: str
    run_id: str


@dataclass(frozen=True, slots=True)
class EarlierAnswer:
    """A row of an earlier run's results.

    Attributes:
        values: by the names of `ANSWER_COLUMNS`.
        reused_from: run and id of that row, as `run_id/custom_id`.
    """

    values: Mapping[str, Any]
    reused_from: str


def fences_path(layout: RunLayout) -> str:
    """Where a run keeps the fences of the earlier one; they hold the beginnings of prompts, as plans do."""
    return storage.join(layout.plan, "reuse-fences.arrow")


def write_fences(source: RunLayout, layout: RunLayout) -> None:
    """Look once at the borders of all shards of a finished run, and keep them in the folder of this one.

    Raises:
        FileNotFoundError: the run's plan is gone.
        OSError: a store failed.
    """
    plan = read_plan(source)
    if plan is None:
        raise FileNotFoundError(source.plan_record)
    rows: list[tuple[str, bytes, bytes]] = []
    for shard in plan.shards:
        if shard.num_requests:
            planned = read_rows(source.shard_plan(shard.shard), ["prefix_key"])
            keys = [key for key in values_of(planned, "prefix_key") if key is not None]
            rows.append((shard.shard, min(keys)[:MAX_FENCE_BYTES], max(keys)[:MAX_FENCE_BYTES]))
    rows.sort(key=lambda row: row[1])
    arrays = [pa.array([row[place] for row in rows], field.type) for place, field in enumerate(_FENCES)]
    write_rows(fences_path(layout), pa.Table.from_arrays(arrays, schema=_FENCES))


@dataclass(slots=True)
class EarlierAnswers:
    """The answers of one earlier run, shard by shard as they are looked for.

    Attributes:
        fences: the table that `write_fences` wrote.
    """

    source: ReuseSource
    fences: pa.Table
    _firsts: list[bytes] = field(init=False)
    _lasts: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._firsts, self._lasts = values_of(self.fences, "first"), values_of(self.fences, "last")

    @classmethod
    def load(cls, source: ReuseSource, layout: RunLayout) -> "EarlierAnswers":
        """Read the fences that a run keeps, once for all its shards.

        Raises:
            OSError: the store failed.
        """
        return _earlier_answers(source, fences_path(layout))

    def of(self, table: pa.Table, asked: Iterable[int]) -> dict[int, EarlierAnswer]:
        """The earlier answers to rows of a shard's plan; nothing for rows that were not answered then.

        Args:
            asked: rows of `table`, which has `moebeam.schemas.tables.plan_schema`.
        Raises:
            CommitError: tables and plan of the earlier run contradict each other.
            OSError: a store failed.
        """
        keys, sampling, options = (values_of(table, name) for name in ("prefix_key", "sampling", "options"))
        wanted = {row: (keys[row], sampling[row], options[row]) for row in asked}
        found: dict[int, EarlierAnswer] = {}
        if not wanted:
            return found
        lowest, highest = min(key for key, *_ in wanted.values()), max(key for key, *_ in wanted.values())
        for shard in self._shards(lowest, highest):
            answers = _answers_of(self.source, shard)
            for row, request in wanted.items():
                if row not in found and (answer := answers.get(request)) is not None:
                    found[row] = answer
        return found

    def _shards(self, lowest: bytes, highest: bytes) -> Iterator[str]:
        """The shards that may hold keys from `lowest` to `highest`, in order."""
        names = self.fences.column("shard")
        start = bisect_left(self._lasts, lowest[:MAX_FENCE_BYTES])
        stop = bisect_right(self._firsts, highest[:MAX_FENCE_BYTES])
        for position in range(start, stop):
            yield names[position].as_py()


@lru_cache(maxsize=2)
def _earlier_answers(source: ReuseSource, path: str) -> EarlierAnswers:
    return EarlierAnswers(source, read_rows(path))


@lru_cache(maxsize=NUM_HELD_SHARDS)
def _answers_of(source: ReuseSource, shard: str) -> dict[_RequestKey, EarlierAnswer]:
    """The valid answers of one earlier shard by what was asked; of merged rows the first one's."""
    layout = RunLayout(source.output)
    path = layout.published("results", shard)
    if not storage.exists(path):
        return {}  # all its rows were rejected
    with storage.open_input(path) as file:
        results = pq.read_table(file, columns=["custom_id", "source_file", "source_row", *ANSWER_COLUMNS])
    places = list(zip(values_of(results, "source_file"), values_of(results, "source_row"), strict=True))
    row_of = {place: row for row, place in enumerate(places)}
    columns = {name: values_of(results, name) for name in ("custom_id", *ANSWER_COLUMNS)}
    names = ("source_file", "source_row", "prefix_key", "sampling", "options")
    planned = read_rows(layout.shard_plan(shard), names)
    answers: dict[_RequestKey, EarlierAnswer] = {}
    num_found = 0
    for file, number, *request in zip(*(values_of(planned, name) for name in names), strict=True):
        row = row_of.get((file, number))
        if row is None:
            continue
        num_found += 1
        key, sampling, options = request
        answer = EarlierAnswer(
            {name: columns[name][row] for name in ANSWER_COLUMNS}, f"{source.run_id}/{columns['custom_id'][row]}"
        )
        answers.setdefault((key, sampling, options), answer)
    if num_found != results.num_rows:
        raise CommitError(
            f"{path}: expected the rows of {layout.shard_plan(shard)}, found {results.num_rows - num_found} others"
        )
    return answers


def parsed_output(answer: EarlierAnswer) -> Any:
    """The value of an answer that is JSON, for the typed column; None of one that is not."""
    text = answer.values["output_json"]
    return None if text is None else json.loads(text)
