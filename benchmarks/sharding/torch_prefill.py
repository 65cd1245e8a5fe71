"""What sharding costs the torch engine: `python -m benchmarks.sharding.torch_prefill [--rows 300] [--workers 2]`.

The product plans prompts twice, into one shard and into many. The torch engine answers the one in this process's child,
and the many by several worker processes, each taking the next shard when it is free. Held against each other: the
prompt tokens that the engines computed, with the bound `(shards - 1) x deepest path`, and all answers.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.sharding.plans import INPUTS, rendered_batches, write_all_runs
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.prefix_tree import token_ids_of
from moebeam.model_runner.protocol import ModelRunner, load_runner
from moebeam.schemas.arrow import list_values
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import Request, Sampling
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.plan.build_shards import PlanSpec, build_shards
from moebeam.transforms.plan.plan_record import PlannedShard
from moebeam.transforms.plan.shard_ranges import cut_ranges
from moebeam.transforms.plan.sorted_runs import read_rows
from tests.support.engines.engine_configs import engine_config

SAMPLING = Sampling(max_tokens=8)


@dataclass(frozen=True, slots=True)
class ShardAnswers:
    """What one worker made of one shard: prompt tokens computed, and the answers by row."""

    worker: int
    computed_tokens: int
    texts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One input, answered as one shard and as many."""

    name: str
    num_rows: int
    num_prompt_tokens: int
    deepest_tokens: int
    num_shards: int
    num_workers: int
    one_shard_tokens: int
    planned_tokens: int
    computed_tokens: int
    num_other_answers: int

    @property
    def lost_tokens(self) -> int:
        """Prompt tokens computed again because of the cuts."""
        return self.computed_tokens - self.one_shard_tokens

    @property
    def most_lost_tokens(self) -> int:
        return (self.num_shards - 1) * self.deepest_tokens

    @property
    def line(self) -> str:
        """The comparison in words."""
        return (
            f"{self.name}: {self.num_rows:,} prompts of {self.num_prompt_tokens:,} tokens, the longest "
            f"{self.deepest_tokens:,}; computed {self.one_shard_tokens:,} as one shard, {self.computed_tokens:,} as "
            f"{self.num_shards} on {self.num_workers} workers (planned {self.planned_tokens:,}): lost "
            f"{self.lost_tokens:,}, at most {self.most_lost_tokens:,}; {self.num_other_answers} answers differ"
        )


_engine: ModelRunner | None = None


def _load(checkpoint: str) -> None:
    """Load this worker's engine."""
    global _engine
    _engine = load_runner(engine_config("torch", checkpoint, "sharding", "none", dtype="float32", device="cpu"))


def _answer(plan_path: str) -> ShardAnswers:
    """Let this worker's engine answer a planned shard."""
    assert _engine is not None
    planned = read_rows(plan_path)
    requests = [
        Request(custom_id, token_ids_of(key), (), SAMPLING)
        for custom_id, key in zip(list_values(planned, "custom_id"), list_values(planned, "prefix_key"), strict=True)
    ]
    texts: dict[str, str] = {}
    computed = 0
    for completion in _engine.generate(requests):
        assert completion.usage.computed_tokens is not None, "the torch engine counts what it computes"
        computed += completion.usage.computed_tokens
        texts[completion.request_id] = completion.text or ""
    return ShardAnswers(os.getpid(), computed, texts)


def plan_prompts(name: str, num_rows: int, vocab_size: int, spec: PlanSpec) -> list[PlannedShard]:
    """The product's plan of an input, on the store."""
    batches = rendered_batches(name, num_rows, samplings=[SAMPLING], vocab_size=vocab_size)
    runs, _ = write_all_runs(batches, spec)
    return [shard for part in cut_ranges(runs, spec.layout) for shard in build_shards(part, spec, {})]


def answer_shards(
    shards: Sequence[PlannedShard], layout: RunLayout, checkpoint: str, num_workers: int
) -> list[ShardAnswers]:
    """Answer planned shards by so many worker processes, each with an engine of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_load, initargs=(checkpoint,)) as pool:
        return list(pool.map(_answer, [layout.shard_plan(shard.shard) for shard in shards]))


def compare(name: str, num_rows: int, checkpoint: str, *, num_shards: int, num_workers: int) -> Comparison:
    """Plan and answer one input both ways.

    Args:
        num_shards: about how many, by the limit of rows.
    """
    vocab_size = json.loads(Path(checkpoint, "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="moebeam-torch-") as folder:
        one_spec = PlanSpec(
            PlanSection(max_shard_tokens=1 << 40, max_shard_rows=num_rows), RunLayout(f"{folder}/1"), ()
        )
        one = plan_prompts(name, num_rows, vocab_size, one_spec)
        section = PlanSection(max_shard_tokens=1 << 40, max_shard_rows=-(-num_rows // num_shards))
        many_spec = PlanSpec(section, RunLayout(f"{folder}/n"), ())
        many = plan_prompts(name, num_rows, vocab_size, many_spec)
        (alone,) = answer_shards(one, one_spec.layout, checkpoint, 1)
        parts = answer_shards(many, many_spec.layout, checkpoint, num_workers)
        keys = list_values(read_rows(one_spec.layout.shard_plan(one[0].shard)), "prefix_key")
    texts = {row: text for part in parts for row, text in part.texts.items()}
    return Comparison(
        name=name,
        num_rows=len(texts),
        num_prompt_tokens=one[0].num_prompt_tokens,
        deepest_tokens=max(token_ids_of(key).size for key in keys),
        num_shards=len(many),
        num_workers=len({part.worker for part in parts}),
        one_shard_tokens=alone.computed_tokens,
        planned_tokens=sum(shard.num_tree_tokens for shard in many),
        computed_tokens=sum(part.computed_tokens for part in parts),
        num_other_answers=sum(texts.get(row) != text for row, text in alone.texts.items()),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; 1 if the engines lost more than the bound, or a prompt or an answer changed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharding.torch_prefill", description="What sharding costs the torch engine."
    )
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--inputs", nargs="+", choices=list(INPUTS), default=["zipf", "one_prefix", "distinct"])
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--checkpoint", default=str(CHECKPOINT_PATH), help="folder of a model that fits in memory twice"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    args = parser.parse_args(argv)
    for name in ("rows", "shards", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, found {getattr(args, name)}")
    found: list[Comparison] = []
    for name in args.inputs:
        found.append(compare(name, args.rows, args.checkpoint, num_shards=args.shards, num_workers=args.workers))
        print(found[-1].line, file=sys.stderr)
    if args.json:
        print(json.dumps({"benchmark": "sharding_torch", "inputs": [asdict(comparison) for comparison in found]}))
    is_wrong = [
        one.lost_tokens > one.most_lost_tokens or one.num_rows != args.rows or one.num_other_answers > 0
        for one in found
    ]
    return 1 if any(is_wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
