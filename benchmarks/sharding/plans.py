"""The product's own plans of made prompts, and what they compute: `python -m benchmarks.sharding.plans --rows 200000`.

Rendered rows go through the functions that the steps of *plan* call: runs, ranges, shards. Told of each input: how many
shards, how even, what they compute beside the bound `tree + (shards - 1) x deepest path`, and what planning took of
processor time and memory. Each input is planned in a process of its own. docs/sharding.md has figures.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.sharding.simulator import most_prefill_tokens
from benchmarks.sharding.workloads import zipf
from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tokens_of, num_tree_tokens, prefix_key
from moebeam.schemas.arrow import list_values
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import Sampling, parse_sampling_json, sampling_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import plan_schema
from moebeam.transforms.plan.build_shards import PlanSpec, build_shards, write_plan
from moebeam.transforms.plan.shard_cut import estimate_output_tokens
from moebeam.transforms.plan.shard_ranges import cut_ranges
from moebeam.transforms.plan.sorted_runs import MAX_SORTED_RUN_BYTES, RunFile, read_rows, write_runs
from moebeam.transforms.read.input_scan import GROUP_ROWS

SAMPLINGS = tuple(Sampling(max_tokens=most, temperature=1.0) for most in (32, 128, 512, 4096))
"""One for each row, at random; none is greedy, so that equal prompts are not merged."""

BATCH_ROWS = 1024
_VOCAB_SIZE = 100_000

Tokens: TypeAlias = npt.NDArray[np.int32]
Maker: TypeAlias = Callable[[int, np.random.Generator], Iterator[Tokens]]


@dataclass(frozen=True, slots=True)
class PlanFigures:
    """A plan of one input, after the fact.

    Attributes:
        expected_tokens: of each shard, its prefix tree and what its answers are expected to take.
        cpu_s: processor time of planning; making the rows does not count, nor does reading the shards again.
        peak_rss_bytes: of the process, with the rows that were being made.
    """

    name: str
    num_rows: int
    num_prompt_tokens: int
    tree_tokens: int
    deepest_tokens: int
    num_runs: int
    num_ranges: int
    expected_tokens: tuple[int, ...]
    most_rows: int
    computed_tokens: int
    runs_cpu_s: float
    cpu_s: float
    peak_rss_bytes: int

    @property
    def bound_tokens(self) -> int:
        """Most prompt tokens that these shards may compute."""
        return most_prefill_tokens(self.tree_tokens, len(self.expected_tokens), self.deepest_tokens)

    @property
    def keeps_bound(self) -> bool:
        return self.tree_tokens <= self.computed_tokens <= self.bound_tokens

    @property
    def line(self) -> str:
        """A row of the table; see `HEAD`."""
        mean = sum(self.expected_tokens) / max(1, len(self.expected_tokens))
        most = max(self.expected_tokens, default=0)
        return (
            f"{self.name:<12}{self.num_runs:>6}{self.num_ranges:>8}{len(self.expected_tokens):>8,}{most:>12,}{mean:>12,.0f}"
            f"{self.most_rows:>10,}{self.computed_tokens / max(1, self.tree_tokens):>9.3f}"
            f"{self.bound_tokens / max(1, self.tree_tokens):>9.3f}{self.runs_cpu_s:>8.1f}{self.cpu_s:>8.1f}"
            f"{self.peak_rss_bytes >> 20:>10,}"
        )


HEAD = (
    f"{'input':<12}{'runs':>6}{'ranges':>8}{'shards':>8}{'largest':>12}{'mean':>12}{'most rows':>10}{'computed':>9}"
    f"{'at most':>9}{'runs s':>8}{'all s':>8}{'peak MiB':>10}"
)


def _zipf_rows(num_rows: int, draw: np.random.Generator) -> Iterator[Tokens]:
    """Documents behind one system prompt, some asked about thousands of times, most once or twice."""
    for document in zipf(num_rows, max(1, num_rows // 5), 1.05, draw).tolist():
        yield np.concatenate([_document(0, 60), _document(document + 1, 300), _tail(draw, 20, 80)])


def _one_prefix(num_rows: int, draw: np.random.Generator) -> Iterator[Tokens]:
    """All behind one long root."""
    for _ in range(num_rows):
        yield np.concatenate([_document(0, 600), _tail(draw, 20, 200)])


def _all_equal(num_rows: int, draw: np.random.Generator) -> Iterator[Tokens]:
    """One prompt, asked again and again."""
    del draw
    for _ in range(num_rows):
        yield _document(0, 400)


def _all_distinct(num_rows: int, draw: np.random.Generator) -> Iterator[Tokens]:
    """Nothing in common."""
    for _ in range(num_rows):
        yield _tail(draw, 100, 900)


def _sorted_rows(num_rows: int, draw: np.random.Generator) -> Iterator[Tokens]:
    """As `zipf`, in token order already: each run holds a part of the order for itself."""
    documents = np.sort(zipf(num_rows, max(1, num_rows // 5), 1.05, draw)).tolist()
    for row, document in enumerate(documents):
        first = np.array([document, row], dtype=np.int32)
        yield np.concatenate(
            [_document(0, 60), first[:1], _document(document + 1, 300), first[1:], _tail(draw, 20, 80)]
        )


INPUTS: Mapping[str, Maker] = {
    "zipf": _zipf_rows,
    "one_prefix": _one_prefix,
    "equal": _all_equal,
    "distinct": _all_distinct,
    "sorted": _sorted_rows,
}


@lru_cache(maxsize=1024)
def _document(number: int, num_tokens: int) -> Tokens:
    return np.random.default_rng(number).integers(3, _VOCAB_SIZE, num_tokens, dtype=np.int32)


def _tail(draw: np.random.Generator, least: int, most: int) -> Tokens:
    return draw.integers(3, _VOCAB_SIZE, int(draw.integers(least, most + 1)), dtype=np.int32)


def rendered_batches(
    name: str, num_rows: int, *, samplings: Sequence[Sampling] = SAMPLINGS, vocab_size: int = _VOCAB_SIZE
) -> Iterator[pa.RecordBatch]:
    """Rows of an input as *render* leaves them.

    Args:
        vocab_size: token ids are folded to below it, which keeps `sorted` sorted only where nothing is folded.
    """
    draw = np.random.default_rng(list(name.encode()))
    texts = [sampling_json(sampling) for sampling in samplings]
    prompts = INPUTS[name](num_rows, draw)
    schema = plan_schema([])
    for start in range(0, num_rows, BATCH_ROWS):
        tokens = [next(prompts) % vocab_size for _ in range(min(BATCH_ROWS, num_rows - start))]
        count = len(tokens)
        values: dict[str, Sequence[object]] = {
            "custom_id": [f"row-{start + row}" for row in range(count)],
            "source_file": ["made.parquet"] * count,
            "source_row": range(start, start + count),
            "unit": [start // GROUP_ROWS] * count,
            "scope": ["row"] * count,
            "num_rows": [1] * count,
            "sample": [0] * count,
            "prefix_key": [prefix_key("", ids) for ids in tokens],
            "num_prompt_tokens": [len(ids) for ids in tokens],
            "messages": [json.dumps([{"role": "user", "content": ids.tobytes().hex()[::2]}]) for ids in tokens],
            "sampling": [texts[choice] for choice in draw.integers(len(texts), size=count).tolist()],
            "tenant": [""] * count,
            "cost_center": [""] * count,
            "passthrough": [{}] * count,
        }
        columns = [pa.array(values.get(field.name, [None] * count), field.type) for field in schema]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def write_all_runs(batches: Iterator[pa.RecordBatch], spec: PlanSpec) -> tuple[list[RunFile], float]:
    """Write runs of as many rows as *plan* would, and the processor time that this alone took."""
    runs: list[RunFile] = []
    seconds = 0.0
    held: list[pa.RecordBatch] = []

    def write() -> float:
        before = _cpu_s()
        runs.extend(write_runs(held, spec.layout, spec.section))
        held.clear()
        return _cpu_s() - before

    for batch in batches:
        if held and sum(one.num_rows for one in held) + batch.num_rows > GROUP_ROWS:
            seconds += write()
        held.append(batch)
        if sum(one.nbytes for one in held) >= MAX_SORTED_RUN_BYTES:
            seconds += write()
    if held:
        seconds += write()
    return runs, seconds


def plan_input(name: str, num_rows: int, section: PlanSection) -> PlanFigures:
    """Plan an input in this process, and look at the shards."""
    with tempfile.TemporaryDirectory(prefix="moebeam-plans-") as folder:
        spec = PlanSpec(section, RunLayout(folder), ())
        runs, runs_cpu_s = write_all_runs(rendered_batches(name, num_rows), spec)
        before = _cpu_s()
        ranges = list(cut_ranges(runs, spec.layout))
        shards = write_plan([shard for part in ranges for shard in build_shards(part, spec, {})], spec.layout)
        cpu_s, peak_rss_bytes = runs_cpu_s + _cpu_s() - before, _peak_rss_bytes()
        keys: list[bytes] = []
        expected: list[int] = []
        for shard in shards:
            planned = read_rows(spec.layout.shard_plan(shard.shard), ["prefix_key", "sampling"])
            keys += list_values(planned, "prefix_key")
            outputs = sum(
                estimate_output_tokens(parse_sampling_json(text).max_tokens)
                for text in list_values(planned, "sampling")
            )
            expected.append(shard.num_tree_tokens + outputs)
    lengths = np.array([num_tokens_of(key) for key in keys], dtype=np.int64)
    return PlanFigures(
        name=name,
        num_rows=sum(shard.num_rows for shard in shards),
        num_prompt_tokens=int(lengths.sum()),
        tree_tokens=num_tree_tokens(lengths, common_prefix_lengths(keys)),
        deepest_tokens=int(lengths.max(initial=0)),
        num_runs=len(runs),
        num_ranges=len(ranges),
        expected_tokens=tuple(expected),
        most_rows=max((shard.num_rows for shard in shards), default=0),
        computed_tokens=sum(shard.num_tree_tokens for shard in shards),
        runs_cpu_s=runs_cpu_s,
        cpu_s=cpu_s,
        peak_rss_bytes=peak_rss_bytes,
    )


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_rss_bytes() -> int:
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and print; 1 if a plan lost a row or broke the bound."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharding.plans", description="The product's own plans of made prompts."
    )
    parser.add_argument("--rows", type=int, default=20_000, help="prompts of each input")
    parser.add_argument("--inputs", nargs="+", choices=list(INPUTS), default=list(INPUTS))
    parser.add_argument("--max_shard_tokens", type=int, default=PlanSection().max_shard_tokens)
    parser.add_argument("--max_shard_rows", type=int, default=PlanSection().max_shard_rows)
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows: expected at least 1, found {args.rows}")
    section = PlanSection(max_shard_tokens=args.max_shard_tokens, max_shard_rows=args.max_shard_rows)
    print(HEAD, file=sys.stderr)
    found: list[PlanFigures] = []
    for name in args.inputs:
        # A fresh process each: the peak of memory counts from its start.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(plan_input, name, args.rows, section).result())
        print(found[-1].line, file=sys.stderr)
    if args.json:
        print(json.dumps({"benchmark": "sharding_plans", "plans": [asdict(figures) for figures in found]}))
    wrong = [figures for figures in found if not figures.keeps_bound or figures.num_rows != args.rows]
    for figures in wrong:
        print(
            f"{figures.name}: expected {args.rows} rows and {figures.tree_tokens} to {figures.bound_tokens} computed "
            f"tokens, found {figures.num_rows} and {figures.computed_tokens}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
